"""Models from weights files, and back: layouts are recognised by their keys and checked strictly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xcos_ext import backbones
from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.card.calibration import FMRCurve, checked_thresholds
from xcos_ext.card.preprocessing import Preprocessing
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.models import local_file
from xcos_ext.io.text import few, first_line
from xcos_ext.io.weights import StrPath, read_weights, write_safetensors

from .attention import XCosAttention
from .head import ClosedFormHead, XCosHead
from .layouts import KNOWN_RECOGNISERS, irse_name, recogniser_name, recogniser_options, sized_by_embedding
from .model import XCosModel
from .plugin import DEFAULT_SPREAD, plug
from .statistics import PlugStatistics, find_statistics

__all__ = ["load_model", "load_recogniser", "save_model"]

_FORMAT = "xcos_ext.model"
_VERSION = "1"
_MOST_CLAIMED = 1 << 30
_NESTED = ("state_dict", "model_state_dict", "state_dict_backbone", "model", "net", "weights")

State = dict[str, Tensor]
_Module = TypeVar("_Module", bound=nn.Module)
_Read = TypeVar("_Read")


# --- reading a state dict


def _state_dict(contents: Mapping[str, Any], path: StrPath) -> State:
    """The state dict in a checkpoint: at the top, or under one of the usual names; without ``module.``."""
    state: Mapping[str, Any] = contents
    if not any(isinstance(value, Tensor) for value in contents.values()):
        for name in _NESTED:
            if isinstance(contents.get(name), Mapping):
                state = contents[name]
                break
    tensors: State = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            if state is contents:
                continue  # training checkpoints keep epochs and the like beside the weights
            raise ModelError(f"{path}: {key!r}: expected a tensor, got {type(value).__name__}")
        tensors[key] = value
    if not tensors:
        raise ModelError(f"{path}: holds no weights (keys: {few(map(str, contents)) or 'none'})")
    claimed = sum(_claimed(value) for value in tensors.values())
    if claimed > _MOST_CLAIMED:
        raise ModelError(
            f"{path}: expected weights that the file holds, got shapes of {claimed:,} bytes that it does not"
        )
    prefix = "module."
    if all(key.startswith(prefix) for key in tensors):
        tensors = {key[len(prefix) :]: value for key, value in tensors.items()}
    return {key: _checked(key, value, path) for key, value in tensors.items()}


def _claimed(value: Tensor) -> int:
    """Bytes that a tensor's shape would take beyond those it has: a pickle of a few bytes may expand a number to any
    shape."""
    if value.layout != torch.strided:
        return 0
    return max(0, value.numel() * value.element_size() - value.untyped_storage().nbytes())


def _checked(key: str, value: Tensor, path: StrPath) -> Tensor:
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise ModelError(f"{path}: {key}: expected a plain dense tensor")
    if not value.is_floating_point():
        return value
    try:
        finite = bool(torch.isfinite(value).all())
    except RuntimeError as error:  # more dimensions than torch computes with
        raise ModelError(f"{path}: {key}: expected a plain dense tensor ({first_line(error)})") from error
    if not finite:
        raise ModelError(f"{path}: {key}: {int((~torch.isfinite(value)).sum())} values are NaN or infinite")
    if key.endswith("running_var") and value.numel() and float(value.min()) < 0:
        raise ModelError(f"{path}: {key}: negative variance")
    return value.detach().float()


class _Uninitialised(TorchFunctionMode):
    """Leaves out what modules do to fill their parameters, so that the caller's random numbers stay as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if func is torch.randn:
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


def _bare(build: Callable[[], _Module]) -> _Module:
    """Build without initialising parameters; the weights are assigned afterwards.

    On the CPU rather than on "meta": untouched memory costs nothing, and a single operation on meta tensors imports
    torch's compiler, which takes longer than everything else here.
    """
    with torch.device("cpu"), _Uninitialised():
        return build()


def _check_keys(module: nn.Module, state: Mapping[str, Tensor], path: StrPath, what: str) -> None:
    """Compare names and shapes with a module's own; one error names everything that does not fit."""
    expected = module.state_dict()
    # Weights saved by old torch versions have no step counters.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} (expected {list(value.shape)}, got {list(state[key].shape)})"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(found)} {label}: {few(found)}"
        for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(f"{path}: keys do not fit {what}: {'; '.join(problems)}")


def _load_strict(module: nn.Module, state: Mapping[str, Tensor], path: StrPath, what: str) -> None:
    """Assign ``state`` to a module built by :func:`_bare`, after :func:`_check_keys`."""
    _check_keys(module, state, path, what)
    assigned: State = {}
    for key, value in module.state_dict().items():
        given = state.get(key)
        if given is None:
            assigned[key] = torch.zeros((), dtype=value.dtype)  # a missing step counter
        elif value.is_floating_point():
            assigned[key] = given.float().contiguous()
        else:
            assigned[key] = given.to(value.dtype)
    module.load_state_dict(assigned, assign=True)
    module.requires_grad_(True)


def _sub(state: Mapping[str, Tensor], prefix: str) -> State:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


# --- recognising layouts


def _as_recogniser(state: State, path: StrPath) -> Recogniser:
    """The recogniser that the keys are of, also under ``backbone.`` beside a margin head.

    Raises:
        ModelError: no layout that is known.
    """
    name = recogniser_name(state, path)
    if name is None and any(key.startswith("backbone.") for key in state):
        others = [key for key in state if not key.startswith("backbone.") and key != "head.kernel"]
        inner = _sub(state, "backbone.")
        if not others and (name := recogniser_name(inner, path)) is not None:
            state = inner
    if name is None and any(key.startswith("backbone.") for key in state) and any(k.startswith("head.") for k in state):
        raise ModelError(
            f"{path}: the state dict of an XCosModel, without how it was built and what its scores mean; expected a "
            "file of xcos_ext.model.save_model(model, ...)"
        )
    if name is None:
        raise ModelError(
            f"{path}: no known layout ({len(state)} tensors, first: {few(state)}); supported are xcos_ext "
            "models, the public xCos checkpoints (backbone.*, attention.*) and recognisers with the keys of "
            f"{KNOWN_RECOGNISERS}"
        )
    recogniser = _bare(lambda: backbones.create(name, **recogniser_options(name, state)))
    _load_strict(recogniser, state, path, name)
    return recogniser.eval()


# --- the public xCos checkpoints


def _is_official(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("attention.") for key in state) or "backbone.conv1x1.0.weight" in state


def _from_official(state: State, path: StrPath) -> XCosModel:
    """``backbone.{input_layer,body,conv1x1}``, ``attention.*``; the rest is checked and left out."""
    if not any(key.startswith("backbone.body.") for key in state):
        raise ModelError(f"{path}: an xCos checkpoint without backbone.body.*: the backbone is missing")
    backbone_state = _sub(state, "backbone.")
    name = irse_name(backbone_state, path)

    # One module with every key that the layout may have, so that one check names all that does not fit.
    output = any(key.startswith("backbone.output_layer.") for key in state)
    backbone = _bare(lambda: backbones.create(name, output=output))
    head = _bare(lambda: XCosHead(attention=XCosAttention(symmetric=False)))
    assert head.attention is not None
    backbone.add_module("conv1x1", head.conv1x1)
    whole = nn.ModuleDict({"backbone": backbone, "attention": head.attention})
    if target := _sub(state, "backbone_target."):
        teacher = irse_name(target, path)
        whole["backbone_target"] = _bare(lambda: backbones.create(teacher))
    kernel = state.get("head.kernel")
    if kernel is not None:
        if kernel.dim() != 2 or kernel.shape[0] != 32 * 7 * 7:
            raise ModelError(f"{path}: head.kernel: expected [1568, classes], got {list(kernel.shape)}")
        state = {key: value for key, value in state.items() if key != "head.kernel"}
    _check_keys(whole, state, path, f"the xCos layout over {name}")

    # The output block in there was not trained with this head and the teacher is not needed: neither is kept.
    body = _bare(lambda: backbones.create(name, output=False))
    wanted = body.state_dict()
    _load_strict(body, {key: value for key, value in backbone_state.items() if key in wanted}, path, name)
    head_state = {f"conv1x1.{key}": value for key, value in _sub(state, "backbone.conv1x1.").items()}
    head_state |= {key: value for key, value in state.items() if key.startswith("attention.")}
    _load_strict(head, head_state, path, "the xCos head")
    return XCosModel(body, head, name=f"xcos-{name}").eval()


# --- xcos_ext's own files


def save_model(model: XCosModel, path: StrPath, *, dtype: torch.dtype | None = None) -> None:
    """Write a model to a safetensors file that :func:`load_model` reads back.

    The file is written under a temporary name and renamed, so a failure leaves no partial file.

    Args:
        model: a model whose backbone is in the registry (:func:`xcos_ext.backbones.available`).
        path: target; conventionally ``.safetensors``.
        dtype: to store floating-point tensors in, e.g. float16 for half the size; None: as they are.

    Raises:
        ModelError: what :func:`load_model` would refuse: a backbone that cannot be built again by name, weights that
            are not finite or that ``dtype`` cannot hold, thresholds at rates that are none. Nothing is written.
        OutputError: the file cannot be written.
        TypeError: not a model, or not a floating-point dtype.

    >>> import tempfile
    >>> model = XCosModel(backbones.create("slim", output=False), XCosHead(512, 32, attention="norm"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(model, f"{folder}/model.safetensors")
    ...     load_model(f"{folder}/model.safetensors").fingerprint() == model.fingerprint()
    True
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype}")
    if not isinstance(model, XCosModel):
        raise TypeError(f"model: expected an XCosModel, got {type(model).__name__}")
    if hasattr(model.backbone, "body_proto"):
        raise ModelError(
            "model: its backbone is an ONNX graph, which a safetensors file cannot hold; write the model with "
            "xcos_ext.deploy.export_onnx"
        )
    if model.architecture not in backbones.available():
        raise ModelError(
            f"model: its backbone ({model.architecture!r}) is not in the registry, so a file could not be "
            "loaded again; add it with xcos_ext.backbones.register"
        )
    assert isinstance(model.backbone, Recogniser)
    try:
        fmr_thresholds = checked_thresholds(model.fmr_thresholds)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"model: fmr_thresholds: {error}") from error
    metadata = {
        "xcos_format": _FORMAT,
        "version": _VERSION,
        "kind": model.head.kind,
        "name": model.name,
        "architecture": model.architecture,
        "embedding_size": json.dumps(model.backbone.embedding_size),
        "head": json.dumps(model.head.config()),
        "preprocessing": json.dumps(asdict(model.preprocessing)),
        "threshold": json.dumps(model.threshold),
        "fmr_thresholds": json.dumps({repr(rate): t for rate, t in fmr_thresholds.items()}),
        "fmr_curve": json.dumps(None if model.fmr_curve is None else model.fmr_curve.as_dict()),
    }
    state = model.state_dict()
    wrong = [key for key, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        raise ModelError(f"model: expected finite weights, got NaN or infinity in {len(wrong)} tensors: {few(wrong)}")
    if dtype is not None:
        state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
        lost = [key for key, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
        if lost:
            raise ModelError(f"model: {len(lost)} tensors do not fit into {dtype}: {few(lost)}")
    write_safetensors(path, state, metadata)


def _own_head(
    kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], path: StrPath
) -> XCosHead | ClosedFormHead:
    if kind == XCosHead.kind:
        return _bare(lambda: XCosHead.from_config(config))
    if kind == ClosedFormHead.kind:
        parts = _sub(state, "head.")
        missing = {"weight", "constant"} - set(parts)
        if missing:
            raise ModelError(f"{path}: missing: {', '.join(f'head.{name}' for name in sorted(missing))}")
        channels, height, width = config["grid_shape"]
        names = ("scale", "spread", "mean", "basis")
        head = ClosedFormHead(
            parts["weight"],
            constant=parts["constant"],
            grid_shape=(channels, height, width),
            **{name: parts.get(name) for name in names},
        )
        head.set_matching(**config.get("matching", {"radius": 0}))
        return head
    raise ModelError(f"{path}: kind of head: expected 'learned' or 'closed-form', got {kind!r}")


def _calibrated(
    key: str, metadata: Mapping[str, str], read: Callable[[Mapping[str, Any]], _Read], path: StrPath
) -> _Read | None:
    """A part of the calibration; None where the file has none, as those of earlier versions."""
    try:
        data = json.loads(metadata.get(key, "null"))
        return None if data is None else read(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: damaged metadata: {key}: {error}") from error


def _from_own(state: State, metadata: Mapping[str, str], path: StrPath) -> XCosModel:
    if metadata.get("version") != _VERSION:
        raise ModelError(
            f"{path}: model format {metadata.get('version')!r}; this version of xcos_ext reads {_VERSION!r}"
        )
    name = metadata.get("architecture", "")
    if name not in backbones.available():
        raise ModelError(f"{path}: architecture {name!r} is not in the registry")
    try:
        options: dict[str, Any] = {}
        embedding_size = json.loads(metadata["embedding_size"])
        if embedding_size is None:
            options["output"] = False
        elif sized_by_embedding(name):
            options["embedding_size"] = int(embedding_size)
        backbone = _bare(lambda: backbones.create(name, **options))
        head = _own_head(metadata["kind"], json.loads(metadata["head"]), state, path)
        model = XCosModel(
            backbone,
            head,
            preprocessing=Preprocessing(**json.loads(metadata["preprocessing"])),
            threshold=json.loads(metadata["threshold"]),
            name=metadata.get("name", name),
            fmr_thresholds=_calibrated("fmr_thresholds", metadata, checked_thresholds, path),
            fmr_curve=_calibrated("fmr_curve", metadata, FMRCurve.from_dict, path),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: damaged metadata ({type(error).__name__}: {error})") from error
    _load_strict(model, state, path, f"a {metadata['kind']} model over {name}")
    return model.eval()


# --- public


def load_recogniser(path: StrPath, *, device: str | torch.device = "cpu") -> Recogniser:
    """Load a face recognition network from its weights, without making an xCos model of it.

    Args:
        path: a state dict (.pt, .pth or .safetensors) of an IR or IR-SE network, an iresnet or a MobileFaceNet; an
            ONNX graph (:class:`~xcos_ext.backbones.OnnxRecogniser`); a name (``"sface"``) or an address, see
            :func:`load_model`.
        device: where to put it; graphs run on the CPU.

    Returns:
        The network in evaluation mode, with its output block.

    Raises:
        ModelError: the file cannot be used; the message names it and the reason.

    >>> load_recogniser("missing.pt")
    Traceback (most recent call last):
    xcos_ext.io.errors.ModelError: missing.pt: no such file
    """
    path = local_file(path, "recogniser")
    if path.suffix.lower() == ".onnx":
        return backbones.OnnxRecogniser(path)
    contents, metadata = read_weights(path)
    state = _state_dict(contents, path)
    if metadata.get("xcos_format") == _FORMAT or _is_official(state):
        raise ModelError(f"{path}: an xCos model, not a recogniser; use load_model")
    return _as_recogniser(state, path).to(device)


def load_model(
    path: StrPath | None = None,
    *,
    device: str | torch.device = "cpu",
    statistics: PlugStatistics | StrPath | None = None,
    project: int | None = None,
    spread: float = DEFAULT_SPREAD,
) -> XCosModel:
    """Load a model of explainable face similarity; the layout is recognised by the file's keys.

    Read are files of :func:`save_model`; the public xCos checkpoints; and recognisers (IR and IR-SE
    50/100/152, insightface's iresnets, both MobileFaceNets), which become models through
    :func:`~xcos_ext.model.plug`. A recogniser for whose weights no statistics are known is plugged without centring,
    with a warning and without a threshold.

    Files of ``torch.save`` are read with ``weights_only=True``: a pickle that could run code is refused,
    unexecuted. Half-precision weights are converted to fp32.

    Args:
        path: .pt, .pth, .safetensors, or a recogniser's ONNX graph; a name of ``xcos models list``
            (:data:`xcos_ext.io.models.REGISTRY`), whose file is fetched on first use; an address,
            ``hf://owner/repo/file`` or ``https://...#sha256=...``; None: the model that the package ships, ``"slim"``.
        device: where to put the model.
        statistics: for recognisers: a statistics file or object, instead of the shipped ones.
        project: for recognisers: principal axes per cell, as in ``plug``.
        spread: for recognisers: sharing between neighbouring cells, as in ``plug``; ignored for other files.

    Returns:
        The model in evaluation mode, fp32.

    Raises:
        ModelError: the file is missing, a directory, empty, damaged, unsafe, not a checkpoint, of another
            architecture (missing, unexpected and misshapen keys are named), or has NaN or infinite weights.
        ValueError: ``statistics`` or ``project`` for a file that is not a recogniser.

    >>> model = load_model()
    >>> model.name, model.features(torch.zeros(1, 3, 112, 112)).shape
    ('xcos-slim', torch.Size([1, 32, 7, 7]))
    """
    path = local_file(path, "model", "recogniser")
    if path.suffix.lower() == ".onnx":
        recogniser: Recogniser = backbones.OnnxRecogniser(path)
    else:
        contents, metadata = read_weights(path)
        state = _state_dict(contents, path)
        if metadata.get("xcos_format") == _FORMAT or _is_official(state):
            if statistics is not None or project is not None:
                raise ValueError("statistics, project: only for recognisers; this file is already an xCos model")
            own = metadata.get("xcos_format") == _FORMAT
            model = _from_own(state, metadata, path) if own else _from_official(state, path)
            return model.to(device)
        recogniser = _as_recogniser(state, path)
    if statistics is None and find_statistics(fingerprint_weights(recogniser)) is None:
        if project is not None:
            raise ModelError(f"{path}: project={project} needs statistics, and none are known for these weights")
        warnings.warn(
            f"{path}: no statistics are known for these {recogniser.architecture} weights, so the cells are "
            "not centred and there is no decision threshold; compute them with xcos_ext.model.plug_statistics",
            stacklevel=2,
        )
        return plug(recogniser, centre=False, spread=spread).to(device)
    return plug(recogniser, statistics=statistics, project=project, spread=spread).to(device)
