"""The fastest way to run a model on this machine, found by trying candidates in turns (docs/deploy.md)."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcos_ext.card.calibration import FMRCurve
from xcos_ext.card.preprocessing import Preprocessing
from xcos_ext.io.several import several
from xcos_ext.io.text import duration, first_line
from xcos_ext.model.model import XCosModel
from xcos_ext.ops import XCosScore
from xcos_ext.ops.templates import Role, Templates

from .candidates import DTYPE_NAMES, Candidate, build_candidate, names
from .inference import FLOATS
from .timing import Contender, Spread, clock_for, measure_in_turns

__all__ = ["CompiledModel", "Trial", "choose", "compile_for_inference"]

#: How far a score may be from the eager model's. fp32 differs by rounding only (1e-6 was measured), and by that of
#: TensorFloat-32 where the GPU's convolutions use it; half precision is for those who ask for it.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_TF32_TOLERANCE = 5e-3
#: Rounds of timing in any case: quartiles need some.
_LEAST_ROUNDS = 5

Example = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trial:
    """One candidate, and what became of it.

    Attributes:
        name: e.g. ``"packed fp32"``.
        seconds: of a call; None where it could not run.
        speedup: times faster than the eager model, from calls of the same round.
        error: largest difference of a score from the eager model's; None where it could not run.
        build_seconds: preparing it, compilation included.
        problem: why it could not be chosen: its failure, or an error above the tolerance; None: it could.
    """

    name: str
    seconds: Spread | None = None
    speedup: Spread | None = None
    error: float | None = None
    build_seconds: float = 0.0
    problem: str | None = None


def choose(faster: Mapping[str, Spread], margin: float) -> str:
    """The simplest whose median is not beaten by the margin.

    Args:
        faster: times faster than one peer, by name; simplest first.
        margin: share by which the fastest must be ahead of a simpler one, e.g. 0.03.

    Returns:
        A name.

    >>> faster = {"eager": Spread.of([1.0]), "folded": Spread.of([1.5]), "packed": Spread.of([1.51])}
    >>> choose(faster, 0.03), choose(faster, 0.001)
    ('folded', 'packed')
    """
    enough = max(spread.median for spread in faster.values()) / (1 + margin)
    return next(name for name, spread in faster.items() if spread.median >= enough)


def _table(trials: Sequence[Trial], chosen: str) -> str:
    """Trials as text, one a line; the chosen one has a star."""
    rows = [["", "candidate", "time", "quartiles", "x eager", "score error", "built in", ""]]
    for trial in trials:
        timed, faster = ["-", ""], ""
        if (spread := trial.seconds) is not None:
            timed = [duration(spread.median), f"{duration(spread.low)} .. {duration(spread.high)}"]
        if (speedup := trial.speedup) is not None:
            faster = f"{speedup.median:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]"
        error = "" if trial.error is None else f"{trial.error:.1e}"
        star = "*" if trial.name == chosen else ""
        rows.append([star, trial.name, *timed, faster, error, duration(trial.build_seconds), trial.problem or ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors, no autocast: compiled code is guarded by all three, and they are ours."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _ordinary(images: Tensor) -> Tensor:
    """The same pictures, not as an inference tensor, for which compiled code would be made a second time."""
    return images.clone() if images.is_inference() else images


class CompiledModel:
    """A model as the fastest candidate that was found for it; made by :func:`compile_for_inference`.

    It keeps what belongs to the model: preprocessing, threshold, calibration, scoring of features, templates. Batches
    of other sizes than the example's work too: CUDA graphs are captured for up to eight sizes as they come, code
    compiled for one size leaves the others to the folded model. Results are new tensors, computed without gradients,
    whatever autocast says.

    Threads may share one object. On a GPU work is queued on the caller's current stream; candidates with CUDA graphs
    hold a lock while they queue it.

    Attributes:
        chosen: name of the candidate.
        trials: everything that was tried, simplest first.
        device: where images have to be.
        name, architecture, preprocessing, threshold, fmr_thresholds, fmr_curve, fingerprint: the model's own.
    """

    name: str
    architecture: str
    preprocessing: Preprocessing
    threshold: float | None
    fmr_thresholds: dict[float, float]
    fmr_curve: FMRCurve | None
    fingerprint: Callable[[], str]

    def __init__(
        self, model: XCosModel, candidate: Candidate, trials: Sequence[Trial], chosen: str, device: torch.device
    ) -> None:
        self._model = model
        self._candidate = candidate
        self.trials = tuple(trials)
        self.chosen = chosen
        self.device = device

    def __getattr__(self, name: str) -> Any:
        if name not in CompiledModel.__annotations__:
            raise AttributeError(f"CompiledModel has no attribute {name!r}")
        return getattr(self._model, name)

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
            return self._candidate.features(_ordinary(images))

    def features_of(self, pictures: Sequence[NDArray[np.uint8]], batch_size: int = 32) -> Tensor:
        """Grid features of aligned pictures, some at a time.

        Args:
            pictures: N >= 0, uint8 RGB [height, width, 3], of the size that ``preprocessing`` expects.
            batch_size: pictures per forward pass; the example's is the fastest.

        Returns:
            F [N, C, 7, 7].
        """
        several(pictures, "pictures", "pictures")
        starts = range(0, max(1, len(pictures)), batch_size)
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
            return self._candidate.pair(_ordinary(images_a), _ordinary(images_b.to(images_a.dtype)))

    def report(self) -> str:
        """The trials as a table."""
        return _table(self.trials, self.chosen)

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
    wanted = (torch.float32,) if dtypes is None else tuple(several(dtypes, "dtypes", "dtypes"))
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(FLOATS):
        raise ValueError(f"dtypes: expected some of float32, bfloat16 and float16, each once, got {wanted}")
    return tuple(dtype for dtype in FLOATS if dtype in wanted)


def _default_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return _TF32_TOLERANCE
    return _TOLERANCES[dtype]


def _problem(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


class _Search:
    """Builds candidates, compares their scores with the eager model's, and times them."""

    def __init__(self, model: XCosModel, images: tuple[Tensor, ...], device: torch.device) -> None:
        self.model, self.images, self.device = model, images, device
        self.shape = (len(images) * images[0].shape[0], *images[0].shape[1:])
        eager = build_candidate("eager", model, torch.float32, self.shape, device)
        # Pictures alone are compared by their scores with others: themselves, mirrored.
        self._others = eager.features(images[0].flip(3)) if len(images) == 1 else None
        self._wanted = self._scores(eager)
        if not bool(self._wanted.isfinite().all()):
            raise ValueError("example: expected images whose scores are finite, got scores that are not")
        self.candidates: dict[str, Candidate] = {"eager": eager}
        self.trials: dict[str, Trial] = {"eager": Trial("eager", error=0.0)}

    def _scores(self, candidate: Candidate) -> Tensor:
        if self._others is None:
            return candidate.pair(*self.images).score
        found: Tensor = self.model.score(candidate.features(self.images[0]), self._others)
        return found

    def prepare(self, name: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
        """Build a candidate and compare its scores; what fails is noted."""
        began = time.perf_counter()
        error = problem = None
        try:
            candidate = build_candidate(kind, self.model, dtype, self.shape, self.device)
            # The first call compiles and captures. A score that is not finite is infinitely far away.
            error = float((self._scores(candidate) - self._wanted).abs().max().nan_to_num(math.inf, math.inf))
            if error > tolerance:
                problem = f"scores differ by up to {error:.1e}, more than {tolerance:.1e}"
            self.candidates[name] = candidate  # timed in any case, so that the report says what the tolerance costs
        except Exception as failure:
            problem = _problem(failure)
        self.trials[name] = Trial(name, None, None, error, time.perf_counter() - began, problem)

    def time(self, seconds: float) -> None:
        """Time all candidates in turns.

        Raises:
            Exception: what the eager model raises.
        """

        clock, alone = clock_for(self.device), len(self.images) == 1
        calls = [candidate.features if alone else candidate.pair for candidate in self.candidates.values()]
        contenders = [Contender(functools.partial(call, *self.images), clock) for call in calls]
        share = seconds / len(contenders)
        found = measure_in_turns(contenders, share, one_by_one=False, least=_LEAST_ROUNDS)
        eager = found[0]
        if eager.failure is not None:
            raise eager.failure
        for name, measured in zip(self.candidates, found, strict=True):
            trial = self.trials[name]
            if measured.failure is not None:
                self.trials[name] = replace(trial, problem=_problem(measured.failure))
            else:
                speedup = Spread.of_ratios(eager.bursts, measured.bursts)
                self.trials[name] = replace(trial, seconds=Spread.of(measured.bursts), speedup=speedup)

    def choose(self, margin: float) -> CompiledModel:
        """The model as the simplest candidate that none without a problem beats by the margin."""
        trials = tuple(self.trials.values())
        usable = {trial.name: trial.speedup for trial in trials if trial.problem is None and trial.speedup is not None}
        chosen = choose(usable, margin)
        return CompiledModel(self.model, self.candidates[chosen], trials, chosen, self.device)


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
    ``eager`` is always a candidate.

    Args:
        model: in evaluation mode, all on one device. It is not changed, and is kept for scoring features.
        example: a pair of batches [N, 3, height, width] of normalised images, or one batch if only features are
            wanted. Faces, rather than noise: scores are compared on them.
        dtypes: of the body: float32, bfloat16, float16. None: float32, which keeps scores up to rounding.
        seconds: to spend on timing; preparing and compiling come on top (``Trial.build_seconds``), and every candidate
            is timed five times in any case.
        candidates: names of those to try, None: the usual ones of the device.
        tolerance: largest difference of a score from the eager model's; None: 1e-4 for float32 (5e-3 where the GPU's
            convolutions round to TensorFloat-32), 0.05 for bfloat16 and 0.01 for float16.
        margin: share by which the fastest must be ahead of a simpler one to be taken instead of it.
        progress: told what is being done, some words each time.

    Returns:
        The model as the candidate that was chosen, with all trials.

    Raises:
        ValueError: a model in training mode or on several devices, an example of another shape or device, or an option
            out of range.
        TypeError: another kind of model, or images that are no floating-point tensors.
        RuntimeError: an example that asks for gradients.

    >>> from xcos_ext import backbones, model
    >>> small = model.XCosModel(backbones.SlimFaceNet(), model.XCosHead(512)).eval()
    >>> pair = torch.zeros(1, 3, 112, 112), torch.ones(1, 3, 112, 112)
    >>> fast = compile_for_inference(small, pair, candidates=["folded"], seconds=0)
    >>> [trial.name for trial in fast.trials], fast(*pair).score.shape
    (['eager', 'folded fp32'], torch.Size([1]))
    """
    device = _check_model(model)
    images = _check_example(model, device, example)
    wanted = _check_dtypes(dtypes)
    for option, value, text in (
        ("seconds", seconds, "a number of at least 0"),
        ("margin", margin, "a share of at least 0"),
        ("tolerance", 0.0 if tolerance is None else tolerance, "a number of at least 0, or None"),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{option}: expected {text}, got {value!r}")
    kinds = names(device, candidates)
    say = progress or (lambda words: None)
    with _plain(device):
        search = _Search(model, images, device)
        for kind, dtype in ((kind, dtype) for kind in kinds if kind != "eager" for dtype in wanted):
            name = f"{kind} {DTYPE_NAMES[dtype]}"
            say(f"preparing {name}")
            search.prepare(name, kind, dtype, _default_tolerance(dtype, device) if tolerance is None else tolerance)
        say(f"timing {len(search.candidates)} candidates")
        search.time(seconds)
    return search.choose(margin)
