"""All protocols on one model, and what every explainer costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xcos_ext.deploy.timing import Clock, Spread
from xcos_ext.devices import module_device
from xcos_ext.evaluation.figures import plain
from xcos_ext.evaluation.verification import eer
from xcos_ext.explain.explainers import available, create
from xcos_ext.explain.explainers.interface import EmbeddingCosine, Explainer, PairModel
from xcos_ext.explain.fills import FILLS
from xcos_ext.io.errors import XCosError
from xcos_ext.io.optional import MissingPackageError
from xcos_ext.io.several import several

from .deletion import Deletion, deletion_identification, deletion_verification
from .faces import Faces
from .locality import Locality, locality
from .maps import explained
from .patch import Patch, patch_replacement
from .study import Results, Settings, Study, Tick
from .swap import RegionSwap, region_swap

__all__ = ["CONTROLS", "PROTOCOLS", "Faithfulness", "faithfulness"]

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

_USUAL = ("xcos", "xcos-similarity", "xcos-attention", "gradcam", "xssab")  # the cheap ones
_TIMED, _TIMED_SECONDS = 20, 5.0

Stage = Callable[[str], AbstractContextManager[Tick]]


@dataclass(frozen=True)
class Faithfulness:
    """What was measured.

    Attributes:
        model: its name.
        threshold: that explanations are about, or None.
        threshold_from_pairs: whether it is the equal error rate's on these pairs, for want of another.
        explainers: names, controls last.
        skipped: explainer or protocol -> why it was left out.
        timings: explainer -> seconds for the maps of one pair, features included, one pair at a time.
        region_swap, deletion, identification, locality, patch: results; None where not asked for, or not yet.
        failures: pictures that could not be used -> why.
        several: pictures with more than one face, of which the most prominent was taken -> how many.
        device: that it ran on.
        complete: whether all that was asked for is in.
    """

    model: str
    explainers: tuple[str, ...]
    threshold: float | None = None
    threshold_from_pairs: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    timings: dict[str, Spread] = field(default_factory=dict)
    region_swap: RegionSwap | None = None
    deletion: Deletion | None = None
    identification: Deletion | None = None
    locality: Locality | None = None
    patch: Patch | None = None
    failures: dict[str, str] = field(default_factory=dict)
    several: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"
    complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data: dict[str, Any] = plain(self)
        timings = {
            name: {"median": t.median, "quartiles": [t.low, t.high], "pairs": t.samples}
            for name, t in self.timings.items()
        }
        failed = [{"picture": key, "reason": why} for key, why in self.failures.items()]
        del data["timings"], data["failures"], data["several"]
        return data | {"seconds_a_pair": timings, "failed_pictures": failed, "several_faces": list(self.several)}


def _name(explainer: str | Explainer) -> str:
    return explainer if isinstance(explainer, str) else explainer.name


def _made(explainer: str | Explainer, seed: int) -> Explainer:
    if not isinstance(explainer, str):
        return explainer
    return create(explainer, seed=seed) if explainer == "random" else create(explainer)


def _check(values: Sequence[str], kind: str, expected: Sequence[str], how: str = "one") -> None:
    for value in values:
        if value not in expected:
            raise ValueError(f"{kind}: expected {how} of {', '.join(expected)}, got {value!r}")


def faithfulness(
    model: PairModel,
    faces: Faces,
    explainers: Sequence[str | Explainer] | None = None,
    *,
    protocols: Sequence[str] | None = None,
    settings: Settings | None = None,
    stage: Stage = lambda title: nullcontext(lambda done, total: None),
    save: Callable[[Faithfulness], None] = lambda result: None,
) -> Faithfulness:
    """Measure explainers on a model.

    Args:
        model: whose decisions are explained. A plain cosine without a threshold gets that of the equal error rate on
            these pairs, for the explainers that need one.
        faces: the pictures.
        explainers: names of :func:`xcos_ext.explain.explainers.available`, or explainers; None: xCos's own maps and
            other cheap ones, without those that cannot explain this model. The controls are added.
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
    wanted = tuple(dict.fromkeys(PROTOCOLS if protocols is None else several(protocols, "protocols")))
    asked = _USUAL if explainers is None else several(explainers, "explainers", "names or explainers")
    asked = [item for item in asked if item not in CONTROLS]
    _check(wanted, "protocol", tuple(PROTOCOLS))
    _check(settings.fills, "fill", tuple(FILLS))
    _check([item for item in asked if isinstance(item, str)], "explainer", available(), "some")
    device = module_device(getattr(model, "module", None))
    about = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
    lent = model.threshold is None and isinstance(model, EmbeddingCosine)
    if lent:
        model = _with_threshold(model, faces, settings)
    with stage("timing") as tick:
        timings, skipped = _timed(model, faces, [*asked, *CONTROLS], settings.seed, explainers is not None, tick)
    able = [item for item in [*asked, *CONTROLS] if _name(item) in timings]
    names = tuple(map(_name, able))
    result = Faithfulness(model.name, names, model.threshold, lent, skipped, timings, device=about)
    study = Study(model, faces, settings)
    for name in wanted:
        try:
            with stage(name) as tick:
                study.tick = tick
                # Made anew: what is random in a protocol does not depend on what was run before it.
                found = _FUNCTIONS[name](study, [_made(item, settings.seed) for item in able])
        except ValueError as error:
            # A protocol that nobody named may not suit the model or the list.
            if protocols is not None or not str(error).startswith(("model:", "pairs:")):
                raise
            result = replace(result, skipped=result.skipped | {name: str(error)})
            continue
        changes: dict[str, Any] = {name.replace("-", "_"): found}
        result = replace(result, **changes, failures=dict(faces.failures), several=dict(faces.several))
        save(result)
    return replace(result, complete=True, failures=dict(faces.failures), several=dict(faces.several))


@torch.no_grad()
def _with_threshold(model: PairModel, faces: Faces, settings: Settings) -> EmbeddingCosine:
    """A plain cosine with the equal error rate's threshold on the pairs: recognisers carry none."""
    assert isinstance(model, EmbeddingCosine)
    study = Study(model, faces, settings)
    drawn, genuine, _ = faces.draw_both(study.count(), settings.seed)
    threshold = eer(study.pair_scores(drawn), genuine).threshold
    return EmbeddingCosine(model.recogniser, threshold=threshold, name=model.name)


@torch.no_grad()
def _timed(
    model: PairModel, faces: Faces, asked: Sequence[str | Explainer], seed: int, strict: bool, tick: Tick
) -> tuple[dict[str, Spread], dict[str, str]]:
    """Seconds a pair of each explainer that can explain the model; why the others cannot."""
    drawn, _, _ = faces.draw_both(1, seed)
    study = Study(model, faces)
    a, b = study.sides(drawn)
    clock = Clock()
    timings: dict[str, Spread] = {}
    skipped: dict[str, str] = {}
    for number, item in enumerate(asked):
        tick(number, len(asked))
        try:
            explainer = _made(item, seed)
            explained(explainer, model, a[:1], b[:1])  # also warms up
        except (ValueError, MissingPackageError) as error:
            if strict and isinstance(error, MissingPackageError):
                raise
            if strict:
                raise XCosError(f"{_name(item)} cannot explain this model: {error}") from error
            skipped[_name(item)] = str(error)
            continue
        seconds: list[float] = []
        while len(seconds) < 3 or (len(seconds) < _TIMED and sum(seconds) < _TIMED_SECONDS):
            place = len(seconds) % len(a)
            pair = a[place : place + 1], b[place : place + 1]
            seconds.append(clock.seconds(partial(_finished, explainer, model, *pair), 1))
        timings[explainer.name] = Spread.of(seconds)
    return timings, skipped


def _finished(explainer: Explainer, model: PairModel, a: Tensor, b: Tensor) -> None:
    """Make maps, and wait until a GPU has made them: the host's own time counts."""
    explainer(model, a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
