"""A model as an ONNX graph of standard operators, which any runtime can run."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from xcos_ext.card.card import INPUTS, OUTPUTS, Kind, OnnxCard, TemplateLayout
from xcos_ext.io.atomic import check_output, write_atomically
from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import MissingPackageError, need
from xcos_ext.io.text import first_line
from xcos_ext.model.attention import XCosAttention
from xcos_ext.model.model import XCosModel
from xcos_ext.onnx.files import contents_hash
from xcos_ext.onnx.session import run_graph, session_of
from xcos_ext.onnx.splice import with_body

from .graphs import BodyGraph, PairGraph, ScoreGraph, TemplateGraph, attention_of, check_exportable, layout_of

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "export_onnx"]

#: Written by default, and the oldest that can be: torch's exporter writes it without converting graphs downwards, and
#: runtimes of some years ago read it.
OPSET = 18

#: Largest difference from the model in torch that a graph may have, by the type inside, on random pictures.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


def export_onnx(
    model: XCosModel,
    path: str | os.PathLike[str],
    *,
    kind: Kind = "pair",
    dtype: torch.dtype = torch.float32,
    dynamic_batch: bool = True,
    batch_size: int = 1,
    opset: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> OnnxCard:
    """Write a model as an ONNX graph: standard operators only, the head in fp32, batch norms folded.

    ========== ============================================ ======================================================
    kind       inputs, fp32                                 outputs, fp32
    ========== ============================================ ======================================================
    pair       images_a, images_b [N, 3, height, width]     score [N], similarity and attention [N, H, W]
    template   images [N, 3, height, width]                 templates [N, T], see :class:`TemplateLayout`
    score      templates_a, templates_b [N, T]              score [N], similarity and attention [N, H, W]
    ========== ============================================ ======================================================

    Images are normalised by the model's preprocessing, which stands in the file's metadata beside the threshold, the
    calibration and the model's fingerprint. Where onnxruntime is installed, the graph is run and compared with the
    model before the file appears.

    Args:
        model: in evaluation mode.
        path: ``.onnx``; appears whole or not at all.
        kind: what the graph computes.
        dtype: of the backbone inside: float32, or float16 for GPUs. Cells, softmax and sums are fp32 in any case.
        dynamic_batch: N may change from run to run; else it is ``batch_size``.
        batch_size: N of a graph with a fixed batch.
        opset: of the standard operators, 18 or later; None: 18.
        progress: told what is being done, a word or two each time.

    Returns:
        The file's metadata.

    Raises:
        ValueError: a model in training mode, with matched cells, with hooks or methods of the user's own, an unknown
            kind, a batch size below 1, or an opset that cannot be written.
        TypeError: not a model, or another dtype.
        OutputError: the file cannot be written.
        ModelError: a graph that does not compute what the model does.
        MissingPackageError: onnx or onnxscript is not installed.
    """
    say = progress or (lambda step: None)
    target = check_output(path, (".onnx",))
    library = need("onnx", "exporting to ONNX", extra="onnx")
    need("onnxscript", "exporting to ONNX", extra="onnx")
    version = _checked(model, kind, dtype, batch_size, opset, library)
    layout = layout_of(model)
    card = _card(model, kind, dtype, version, layout)

    say("tracing")
    module, inputs = _module(model, kind, dtype, layout, 2 if dynamic_batch else batch_size)
    names = INPUTS[kind]
    body = getattr(model.backbone, "body_proto", None) if kind != "score" else None
    proto = _trace(module, inputs, names, OUTPUTS[kind], dynamic_batch, version)
    if body is not None:
        proto = with_body(proto, body(), names, model.preprocessing.size)
    _finish(proto, card, version, library)

    say("checking")
    try:
        library.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ModelError(f"{os.fspath(path)}: torch wrote a graph that is not valid ONNX ({error})") from error
    contents = proto.SerializeToString()
    _compare(contents, model, card, layout, 3 if dynamic_batch else batch_size)
    say("writing")
    write_atomically(target, methodcaller("write", contents))
    return card


def _checked(model: XCosModel, kind: str, dtype: torch.dtype, batch_size: int, opset: int | None, library: Any) -> int:
    """The opset, once every argument is known to be usable."""
    if not isinstance(model, XCosModel):
        raise TypeError(f"model: expected an XCosModel, got {type(model).__name__}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'pair', 'template' or 'score', got {kind!r}")
    if dtype not in (torch.float32, torch.float16):
        raise TypeError(f"dtype: expected torch.float32 or torch.float16, got {dtype}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    newest = int(library.defs.onnx_opset_version())
    version = OPSET if opset is None else opset
    if isinstance(version, bool) or not isinstance(version, int) or not OPSET <= version <= newest:
        raise ValueError(
            f"opset: expected {OPSET} to {newest} (the newest that onnx {library.__version__} knows), got {opset!r}"
        )
    if dtype == torch.float16 and getattr(model.backbone, "body_proto", None) is not None:
        raise ValueError(
            "dtype: expected float32 for a backbone that is an ONNX graph itself: its types stay as they are"
        )
    check_exportable(model)
    return version


def _card(model: XCosModel, kind: Kind, dtype: torch.dtype, opset: int, layout: TemplateLayout) -> OnnxCard:
    attention = attention_of(model.head)
    kind_of_attention, symmetric, pair_weights = str(attention), True, dict[str, Any]()
    if isinstance(attention, XCosAttention):
        kind_of_attention, symmetric = "learned", attention.symmetric
        with torch.no_grad():
            device = next(attention.parameters()).device
            empty = torch.zeros(1, layout.channels, *layout.grid, device=device)
            parameters = attention.templates(empty).parameters
        pair_weights = {
            "weight": parameters.weight.float().cpu().tolist(),
            "slope": float(parameters.slope),
            "temperature": parameters.temperature,
            "normalize": parameters.normalize,
            "symmetric": parameters.symmetric,
            "fingerprint": parameters.fingerprint,
        }
    return OnnxCard(
        kind=kind,
        name=model.name,
        fingerprint=model.fingerprint(),
        preprocessing=model.preprocessing,
        threshold=model.threshold,
        dtype=str(dtype).removeprefix("torch."),
        opset=opset,
        attention=kind_of_attention,
        layout=layout,
        symmetric=symmetric,
        fmr_thresholds=dict(model.fmr_thresholds),
        fmr_curve=model.fmr_curve,
        pair_weights=pair_weights,
    )


def _module(
    model: XCosModel, kind: Kind, dtype: torch.dtype, layout: TemplateLayout, batch: int
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What is traced, and inputs to trace it with."""
    generator = torch.Generator().manual_seed(0)
    if kind == "score":
        return ScoreGraph(model, layout).eval(), tuple(
            torch.randn(batch, layout.size, generator=generator) for _ in range(2)
        )
    if getattr(model.backbone, "body_proto", None) is not None:
        body, shape = None, tuple(model.backbone.grid_shape)  # type: ignore[arg-type]
    else:
        body, shape = BodyGraph(model, dtype), (3, *model.preprocessing.size)
    images = [torch.randn(batch, *shape, generator=generator) for _ in INPUTS[kind]]
    module = TemplateGraph(model, body) if kind == "template" else PairGraph(model, layout, body)
    return module.eval().requires_grad_(False), tuple(images)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter reports its steps, and packages that are not needed, through warnings and logs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace(
    module: nn.Module,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    outputs: Sequence[str],
    dynamic: bool,
    opset: int,
) -> onnx.ModelProto:
    # An upper bound spares the exporter guards against overflow in the products of sizes.
    batch = torch.export.Dim("batch", min=1, max=65536)
    with _quietly(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs),
                dynamo=True,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic else None,
                opset_version=opset,
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(
                f"model: torch cannot write its backbone as an ONNX graph ({first_line(error, 300)})"
            ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def _finish(proto: onnx.ModelProto, card: OnnxCard, opset: int, library: Any) -> None:
    """Metadata in; what only tells of the machine that wrote the file out."""
    version = {entry.domain: entry.version for entry in proto.opset_import}
    if set(version) - {"", "ai.onnx"} or proto.functions:
        raise ModelError(f"model: its graph needs operators that are not ONNX's own ({', '.join(sorted(version))})")
    if version.get("", opset) != opset:
        raise ValueError(f"opset: expected {version['']}, in which this backbone's graph is written, got {opset}")
    for graph in (proto.graph, *(node for node in proto.graph.node), *proto.graph.value_info):
        del graph.metadata_props[:]  # stack traces, with the paths of this machine
        graph.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    proto.ir_version = library.helper.find_min_ir_version_for(proto.opset_import)
    proto.producer_name, proto.producer_version = "xcos_ext", _version()
    proto.graph.name = f"xcos {card.kind}"
    notes = card.as_metadata() | {"xcos.sha256": contents_hash(proto)}
    library.helper.set_model_props(proto, notes)


def _version() -> str:
    from xcos_ext import __version__

    return __version__


def _compare(contents: bytes, model: XCosModel, card: OnnxCard, layout: TemplateLayout, batch: int) -> None:
    """Run the graph beside the model.

    Raises:
        ModelError: another result, or a graph that onnxruntime cannot run.
    """
    try:
        session = session_of(contents, "model")
    except MissingPackageError:
        return
    generator = torch.Generator().manual_seed(1)
    shape = (batch, layout.size) if card.kind == "score" else (batch, 3, *model.preprocessing.size)
    given = [torch.randn(shape, generator=generator) for _ in INPUTS[card.kind]]
    got = run_graph(session, {n: t.numpy() for n, t in zip(INPUTS[card.kind], given, strict=True)}, "model")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        if card.kind == "score":
            wanted: Sequence[Tensor] = ScoreGraph(model, layout)(*given)
        elif card.kind == "pair":
            wanted = model(*(t.to(device) for t in given))
        else:
            wanted = (TemplateGraph(model, BodyGraph(model, torch.float32))(*given),)
    for name, ours, theirs in zip(OUTPUTS[card.kind], got, wanted, strict=True):
        expected = theirs.float().cpu().numpy()
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        off = float(np.abs(ours - expected).max(initial=0)) / scale
        if not off <= TOLERANCE[card.dtype]:
            raise ModelError(
                f"model: its graph in {card.dtype} is off by {off:.1e} in {name!r} (at most "
                f"{TOLERANCE[card.dtype]:.0e} is accepted); its values may not fit into {card.dtype}"
            )
