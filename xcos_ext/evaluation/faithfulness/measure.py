"""All protocols on one model, and what every explainer costs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from xcos_ext.evaluation.figures import plain
from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers import available, create
from xcos_ext.explain.explainers.interface import EmbeddingCosine, Explainer, PairModel
from xcos_ext.explain.fills import FILLS
from xcos_ext.io.errors import XCosError
from xcos_ext.io.optional import MissingPackageError

from .deletion import Deletion, deletion_identification, deletion_verification
from .faces import Faces
from .locality import Locality, locality
from .maps import explained
from .patch import Patch, patch_replacement
from .study import Results, Settings, Study, Tick, device_of
from .swap import RegionSwap, region_swap

__all__ = ["CONTROLS", "PROTOCOLS", "Faithfulness", "Timing", "default_explainers", "faithfulness"]

#: Protocol -> what it measures.
PROTOCOLS: Mapping[str, str] = {
    "region-swap": "does a map show where a region was swapped?",
    "deletion": "verification while pixels go, or come, in the order of a map",
    "identification": "the same for rank-1 identification",
    "locality": "does a cell's similarity answer to the cell's own pixels?",
    "patch": "do the cells that a map names turn the verdict?",
}

_FUNCTIONS: dict[str, Callable[..., Results[Any]]] = {
    "region-swap": region_swap,
    "deletion": deletion_verification,
    "identification": deletion_identification,
    "locality": locality,
    "patch": patch_replacement,
}

#: Explainers that are always measured too.
CONTROLS = ("random", "centre")

_CHEAP = ("xcos", "xcos-similarity", "xcos-attention", "gradcam", "xssab")
_TIMED, _TIMED_SECONDS = 20, 5.0

Stage = Callable[[str], AbstractContextManager[Tick]]


@dataclass(frozen=True)
class Timing:
    """Seconds for the maps of one pair, features included, one pair at a time.

    Attributes: median, low and high (quartiles), and the number of pairs timed.
    """

    median: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Faithfulness:
    """What was measured.

    Attributes:
        model: its name.
        threshold: that explanations are about, or None.
        threshold_from_pairs: whether it is the equal error rate's on these pairs, for want of another.
        explainers: names, controls last.
        skipped: explainer or protocol -> why it was left out.
        timings: explainer -> seconds a pair.
        region_swap, deletion, identification, locality, patch: results; None where not asked for, or not yet.
        failures: pictures that could not be used -> why.
        device: that it ran on.
        complete: whether all that was asked for is in.
    """

    model: str
    explainers: tuple[str, ...]
    threshold: float | None = None
    threshold_from_pairs: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    region_swap: RegionSwap | None = None
    deletion: Deletion | None = None
    identification: Deletion | None = None
    locality: Locality | None = None
    patch: Patch | None = None
    failures: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data: dict[str, Any] = plain(self)
        timings = {
            name: {"median": t.median, "quartiles": [t.low, t.high], "pairs": t.pairs}
            for name, t in self.timings.items()
        }
        failed = [{"picture": key, "reason": why} for key, why in self.failures.items()]
        del data["timings"], data["failures"]
        return data | {"seconds_a_pair": timings, "failed_pictures": failed}


def _field(protocol: str) -> str:
    """Of :class:`Faithfulness`."""
    return protocol.replace("-", "_")


def default_explainers() -> tuple[str, ...]:
    """xCos's own maps and the cheap ones of those that there are, then the controls."""
    there = available()
    return tuple(name for name in (*_CHEAP, *CONTROLS) if name in there)


def _name(explainer: str | Explainer) -> str:
    return explainer if isinstance(explainer, str) else explainer.name


def _made(explainer: str | Explainer) -> Explainer:
    return create(explainer) if isinstance(explainer, str) else explainer


@contextlib.contextmanager
def _no_stage(title: str) -> Iterator[Tick]:
    yield lambda done, total: None


def faithfulness(
    model: PairModel,
    faces: Faces,
    explainers: Sequence[str | Explainer] | None = None,
    *,
    protocols: Sequence[str] | None = None,
    settings: Settings | None = None,
    stage: Stage = _no_stage,
    save: Callable[[Faithfulness], None] | None = None,
) -> Faithfulness:
    """Measure explainers on a model.

    Args:
        model: whose decisions are explained. A plain cosine without a threshold gets that of the equal error rate on
            these pairs, for the explainers that need one.
        faces: the pictures.
        explainers: names of :func:`xcos_ext.explain.explainers.available`, or explainers; None:
            :func:`default_explainers`, without those that cannot explain this model. The controls are added.
        protocols: keys of :data:`PROTOCOLS`; None: all that suit the model.
        settings: how much of what.
        stage: gives a progress bar, called with its title: a context manager of a function ``tick(done, total)``.
        save: is given the results after every protocol, so that an interruption does not lose them.

    Raises:
        XCosError: an explainer that was asked for by name cannot explain this model.
        TooFewError: fewer pairs, people or pictures than asked for.
        ValueError: an unknown name, or what a protocol has to say.
    """
    settings = settings or Settings()
    wanted = tuple(dict.fromkeys(PROTOCOLS if protocols is None else protocols))
    for name in wanted:
        if name not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    for name in settings.fills:
        if name not in FILLS:
            raise ValueError(f"fill: expected one of {', '.join(FILLS)}, got {name!r}")
    asked = [item for item in (default_explainers() if explainers is None else explainers) if item not in CONTROLS]
    for item in asked:
        if isinstance(item, str) and item not in available():
            raise ValueError(f"explainer: expected some of {', '.join(available())}, got {item!r}")
    device = device_of(model)
    about = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    lent = model.threshold is None and isinstance(model, EmbeddingCosine)
    if lent:
        model = _with_threshold(model, faces, settings)
    result = Faithfulness(model.name, (), model.threshold, lent, device=about)
    with stage("timing") as tick:
        result, own = _timed(model, faces, asked, result, explainers is not None, settings.seed, tick)
    result = replace(result, explainers=(*map(_name, own), *CONTROLS))
    study = Study(model, faces, settings)
    for name in wanted:
        # Made anew: what is random in a protocol does not depend on what was run before it.
        every = [*map(_made, own), *(create(c, seed=settings.seed) if c == "random" else create(c) for c in CONTROLS)]
        try:
            with stage(name) as tick:
                study.tick = tick
                found = _FUNCTIONS[name](study, every)
        except ValueError as error:
            # A protocol that nobody named may not suit the model or the list.
            if protocols is not None or not str(error).startswith(("model:", "pairs:")):
                raise
            result = replace(result, skipped=result.skipped | {name: str(error)})
            continue
        changes: dict[str, Any] = {_field(name): found, "failures": dict(faces.failures)}
        result = replace(result, **changes)
        if save is not None:
            save(result)
    return replace(result, complete=True, failures=dict(faces.failures))


@torch.no_grad()
def _with_threshold(model: PairModel, faces: Faces, settings: Settings) -> EmbeddingCosine:
    """A plain cosine with the equal error rate's threshold on the pairs: recognisers carry none."""
    assert isinstance(model, EmbeddingCosine)
    study = Study(model, faces, settings)
    drawn, genuine, _ = faces.draw_both(study.count(), settings.seed)
    threshold = eer(study.pair_scores(drawn), genuine).threshold
    return EmbeddingCosine(model.recogniser, threshold=threshold, name=model.name)


def _timed(
    model: PairModel,
    faces: Faces,
    asked: Sequence[str | Explainer],
    result: Faithfulness,
    strict: bool,
    seed: int,
    tick: Tick,
) -> tuple[Faithfulness, list[str | Explainer]]:
    """Seconds a pair of each explainer, and those that can explain the model."""
    drawn, _, _ = faces.draw_both(1, seed)
    device = device_of(model)
    a, b = Study(model, faces).sides(drawn)
    able: list[str | Explainer] = []
    skipped, timings = dict(result.skipped), dict(result.timings)
    for number, item in enumerate([*asked, *CONTROLS]):
        tick(number, len(asked) + len(CONTROLS))
        try:
            explainer = _made(item)
            with torch.no_grad():
                explained(explainer, model, a[:1], b[:1])  # also warms up
        except (ValueError, MissingPackageError) as error:
            if strict and isinstance(error, MissingPackageError):
                raise
            if strict:
                raise XCosError(f"{_name(item)} cannot explain this model: {error}") from error
            skipped[_name(item)] = str(error)
            continue
        if item not in CONTROLS:
            able.append(item)
        seconds: list[float] = []
        while len(seconds) < 3 or (len(seconds) < _TIMED and sum(seconds) < _TIMED_SECONDS):
            place = len(seconds) % len(a)
            _wait(device)
            started = time.perf_counter()
            with torch.no_grad():
                explainer(model, a[place : place + 1], b[place : place + 1])
            _wait(device)
            seconds.append(time.perf_counter() - started)
        low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
        timings[explainer.name] = Timing(median, low, high, len(seconds))
    return replace(result, skipped=skipped, timings=timings), able


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
