"""The fastest way to run a model on this machine, found by trying (docs/inference.md)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.card.calibration import FMRCurve
from xcos_ext.card.preprocessing import Preprocessing
from xcos_ext.model.model import XCosModel
from xcos_ext.ops import XCosScore
from xcos_ext.ops.templates import Role, Templates

from .inference import FLOATS
from .trials import Spread, Trial, choose, speedups, table, time_in_turns
from .ways import DTYPE_NAMES, Way, build, ways_for

__all__ = ["CompiledModel", "compile_for_inference"]

Example = Tensor | tuple[Tensor, Tensor]

#: How far a score may be from the eager model's. fp32 differs by rounding only (1e-6 was measured), and by that of
#: TensorFloat-32 where the GPU's convolutions use it; half precision is for those who ask for it.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_TF32_TOLERANCE = 5e-3
_LONGEST_REASON = 160


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors, no autocast: compiled code is guarded by all three, and they are ours."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _ordinary(images: Tensor) -> Tensor:
    """The same pictures, not as an inference tensor, for which compiled code would be made a second time."""
    return images.clone() if images.is_inference() else images


class CompiledModel:
    """A model in the fastest way that was found for it; made by :func:`compile_for_inference`.

    It keeps what belongs to the model: preprocessing, threshold, calibration, scoring of features, templates. Batches
    of the example's size take the chosen way. Others work too: CUDA graphs are captured for up to eight sizes as they
    come, code compiled for one size leaves the others to the folded model. Results are new tensors, computed without
    gradients, whatever autocast says.

    Threads may share one object. On a GPU work is queued on the caller's current stream; ways with CUDA graphs hold a
    lock while they queue it.

    Attributes:
        chosen: name of the way.
        trials: everything that was tried, simplest first.
        device: where images have to be.
    """

    def __init__(self, model: XCosModel, way: Way, trials: Sequence[Trial], chosen: str, device: torch.device) -> None:
        self._model = model
        self._way = way
        self.trials = tuple(trials)
        self.chosen = chosen
        self.device = device

    # --- what belongs to the model

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def architecture(self) -> str:
        """The backbone's registry name, or ``"custom"``."""
        return self._model.architecture

    @property
    def preprocessing(self) -> Preprocessing:
        """Pixel normalisation that the images need."""
        return self._model.preprocessing

    @property
    def threshold(self) -> float | None:
        """Two faces are the same person if score >= threshold; None: unknown."""
        return self._model.threshold

    @property
    def fmr_thresholds(self) -> dict[float, float]:
        """Thresholds at stated false match rates."""
        return self._model.fmr_thresholds

    @property
    def fmr_curve(self) -> FMRCurve | None:
        """The false match rate at any score."""
        return self._model.fmr_curve

    def fingerprint(self) -> str:
        """The model's own: features are the same up to the tolerance that was asked for."""
        return self._model.fingerprint()

    # --- computing

    def features(self, images: Tensor) -> Tensor:
        """Grid feature F of each face.

        Args:
            images: [N, 3, height, width], normalised by ``preprocessing``; floating point, on ``device``.

        Returns:
            F [N, C, 7, 7].

        Raises:
            ValueError: a wrong shape or device.
            TypeError: not a floating-point tensor.
            RuntimeError: the images ask for gradients.
        """
        _check_images(self._model, self.device, images, "images")
        with _plain(self.device):
            return self._way.features(_ordinary(images))

    def features_of(self, pictures: Sequence[NDArray[np.uint8]], batch_size: int = 32) -> Tensor:
        """Grid features of aligned pictures, some at a time.

        Args:
            pictures: N >= 1, uint8 RGB [height, width, 3], of the size that ``preprocessing`` expects.
            batch_size: pictures per forward pass; the example's is the fastest.

        Returns:
            F [N, C, 7, 7].
        """
        starts = range(0, len(pictures), batch_size)
        batches = (self.preprocessing(pictures[i : i + batch_size]) for i in starts)
        return torch.cat([self.features(batch.to(self.device)) for batch in batches])

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[False] = ...) -> Tensor: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[True]) -> XCosScore: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool) -> Tensor | XCosScore: ...

    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False) -> Tensor | XCosScore:
        """Similarity of two batches of grid features; see :meth:`XCosModel.score`."""
        with torch.no_grad():
            return self._model.score(features_a, features_b, return_maps=return_maps)

    def templates(self, features: Tensor, role: Role = "probe", dtype: torch.dtype | None = None) -> Templates:
        """Templates of faces for all-pairs scoring and search; see :meth:`XCosModel.templates`."""
        with torch.no_grad():
            return self._model.templates(features, role, dtype)

    def __call__(self, images_a: Tensor, images_b: Tensor) -> XCosScore:
        """Scores of pairs with their maps.

        Args:
            images_a: the first faces [N, 3, height, width], as for :meth:`features`.
            images_b: the second faces, as many.

        Returns:
            ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``.

        Raises:
            ValueError: a wrong shape or device, or batches of different sizes.
            TypeError: not a floating-point tensor.
            RuntimeError: the images ask for gradients.
        """
        _check_images(self._model, self.device, images_a, "images_a")
        _check_images(self._model, self.device, images_b, "images_b")
        if images_a.shape != images_b.shape:
            raise ValueError(
                f"images_b: expected as many faces as images_a, {images_a.shape[0]}, got {images_b.shape[0]}"
            )
        with _plain(self.device):
            # Both go through as one batch, which has one dtype.
            return self._way.pair(_ordinary(images_a), _ordinary(images_b.to(images_a.dtype)))

    # --- how it was found

    def report(self) -> str:
        """The trials as a table."""
        return table(self.trials, self.chosen)

    def __repr__(self) -> str:
        return f"CompiledModel(name={self.name!r}, chosen={self.chosen!r}, device='{self.device}')"


def _check_images(model: XCosModel, device: torch.device, images: Tensor, argument: str) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(images).__name__}")
    model._check_images(images, argument)
    if images.device != device:
        raise ValueError(f"{argument}: expected images on {device}, where the model is, got {images.device}")
    if images.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{argument}: expected images without gradients, got requires_grad=True: a model for inference has none; "
            "use the model it was made of"
        )


def _check_model(model: XCosModel) -> torch.device:
    if not isinstance(model, XCosModel):
        raise TypeError(f"model: expected an XCosModel, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(f"model: expected all weights on one device, got {sorted(map(str, devices)) or 'none'}")
    return devices.pop()


def _check_example(model: XCosModel, device: torch.device, example: Example) -> tuple[Tensor, ...]:
    images = (example,) if isinstance(example, Tensor) else tuple(example)
    if len(images) not in (1, 2):
        raise ValueError(f"example: expected a batch of images, or a pair of batches, got {len(images)} of them")
    for part in images:
        _check_images(model, device, part, "example")
    sizes = {part.shape[0] for part in images}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"example: expected batches of one size, at least 1, got {[p.shape[0] for p in images]}")
    return tuple(_ordinary(part.detach()) for part in images)


def _check_dtypes(dtypes: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...]:
    wanted = (torch.float32,) if dtypes is None else tuple(dtypes)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(FLOATS):
        raise ValueError(f"dtypes: expected some of float32, bfloat16 and float16, each once, got {wanted}")
    return tuple(dtype for dtype in FLOATS if dtype in wanted)


def _check_number(name: str, value: float, text: str, low: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}: expected {text}, got {value!r}")


def _default_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return _TF32_TOLERANCE
    return _TOLERANCES[dtype]


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


class _Search:
    """Builds ways, compares their scores with the eager model's, and times those that keep to the tolerance."""

    def __init__(self, model: XCosModel, images: tuple[Tensor, ...], device: torch.device) -> None:
        self.model, self.images, self.device = model, images, device
        self.shape = (len(images) * images[0].shape[0], *images[0].shape[1:])
        self.eager = build("eager", model, torch.float32, self.shape, device)
        # Pictures alone are compared by their scores with others: themselves, mirrored.
        self._others = self.eager.features(images[0].flip(3)) if len(images) == 1 else None
        self._wanted = self._scores(self.eager)
        if not bool(self._wanted.isfinite().all()):
            raise ValueError("example: expected images whose scores are finite, got scores that are not")

    def call(self, way: Way) -> Callable[[], Any]:
        """What is timed."""
        if len(self.images) == 1:
            return lambda: way.features(self.images[0])
        return lambda: way.pair(*self.images)

    def _scores(self, way: Way) -> Tensor:
        if self._others is None:
            return way.pair(*self.images).score
        found: Tensor = self.model.score(way.features(self.images[0]), self._others)
        return found

    def error(self, way: Way) -> float:
        """Largest difference of a score; infinite for one that is not finite."""
        error = float((self._scores(way) - self._wanted).abs().max())
        return error if math.isfinite(error) else math.inf


def compile_for_inference(
    model: XCosModel,
    example: Example,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    seconds: float = 10.0,
    candidates: Sequence[str] | None = None,
    tolerance: float | None = None,
    margin: float = 0.03,
    progress: Callable[[str], None] | None = None,
) -> CompiledModel:
    """Find the fastest way to run a model on this machine, at the example's shape, by trying them.

    On a CPU: the model as it is (``eager``), with batch norms folded (``folded``), with weights and fused activations
    as oneDNN likes them (``packed``, see :func:`for_inference`), through torch.compile (``inductor``; ``autotuned`` on
    request) and AOTInductor (``ahead of time``). On a GPU: ``eager``, ``folded``, that as a CUDA graph (``graph``),
    ``inductor``, and compiled ones as CUDA graphs (``inductor graph``, ``autotuned graph``). One that fails, for want
    of a compiler or of memory, is noted with its reason; so is one whose scores are too far from the eager model's.
    The eager way is always a candidate.

    Args:
        model: in evaluation mode, all on one device. It is not changed, and is kept for scoring features.
        example: a pair of batches [N, 3, height, width] of normalised images, or one batch if only features are
            wanted. Faces, rather than noise: scores are compared on them.
        dtypes: of the body: float32, bfloat16, float16. None: float32, which keeps scores up to rounding.
        seconds: to spend on timing; preparing and compiling come on top (``Trial.build_seconds``), and every candidate
            is timed five times in any case.
        candidates: names of the ways to try, None: the usual ones of the device.
        tolerance: largest difference of a score from the eager model's; None: 1e-4 for float32 (5e-3 where the GPU's
            convolutions round to TensorFloat-32), 0.05 for bfloat16 and 0.01 for float16.
        margin: share by which the fastest way must be ahead of a simpler one to be taken instead of it.
        progress: told what is being done, some words each time.

    Returns:
        The model in the way that was chosen, with all trials.

    Raises:
        ValueError: a model in training mode or on several devices, an example of another shape or device, or an option
            out of range.
        TypeError: another kind of model, or images that are no floating-point tensors.
        RuntimeError: an example that asks for gradients.
    """
    device = _check_model(model)
    images = _check_example(model, device, example)
    wanted = _check_dtypes(dtypes)
    _check_number("seconds", seconds, "a number of at least 0", 0.0)
    _check_number("margin", margin, "a share of at least 0", 0.0)
    if tolerance is not None:
        _check_number("tolerance", tolerance, "a number of at least 0, or None", 0.0)
    kinds = ways_for(device, candidates)
    say = progress or (lambda words: None)
    with _plain(device):
        search = _Search(model, images, device)
        ways: dict[str, Way] = {"eager": search.eager}
        trials: dict[str, Trial] = {"eager": Trial("eager", error=0.0)}
        for kind, dtype in ((kind, dtype) for kind in kinds if kind != "eager" for dtype in wanted):
            name = f"{kind} {DTYPE_NAMES[dtype]}"
            limit = _default_tolerance(dtype, device) if tolerance is None else tolerance
            say(f"preparing {name}")
            began = time.perf_counter()
            try:
                way = build(kind, model, dtype, search.shape, device)
                error = search.error(way)  # the first call compiles and captures
            except Exception as failure:
                trials[name] = Trial(name, build_seconds=time.perf_counter() - began, problem=_reason(failure))
                continue
            problem = None if error <= limit else f"scores differ by up to {error:.1e}, more than {limit:.1e}"
            trials[name] = Trial(name, None, None, error, time.perf_counter() - began, problem)
            ways[name] = way  # timed in any case, so that the report says what the tolerance costs
        say(f"timing {len(ways)} ways")

        def failed(name: str, failure: Exception) -> None:
            if name == "eager":
                raise failure
            trials[name] = Trial(name, None, None, trials[name].error, trials[name].build_seconds, _reason(failure))

        samples = time_in_turns({name: search.call(way) for name, way in ways.items()}, seconds, device, failed)
    faster = speedups(samples, "eager")
    for name, taken in samples.items():
        trial = trials[name]
        trials[name] = Trial(name, Spread.of(taken), faster[name], trial.error, trial.build_seconds, trial.problem)
    chosen = choose({name: spread for name, spread in faster.items() if trials[name].problem is None}, margin)
    return CompiledModel(model, ways[chosen], list(trials.values()), chosen, device)
