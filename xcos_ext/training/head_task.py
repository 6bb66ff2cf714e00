"""Training a head on the maps of a frozen recogniser, computed once."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation import auc, calibrate, eer, operating_point
from xcos_ext.io.errors import XCosError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import (
    ArcFaceHead,
    ClosedFormHead,
    CosFaceHead,
    XCosAttention,
    XCosHead,
    XCosModel,
    load_recogniser,
    plug,
    plug_statistics,
    save_model,
)
from xcos_ext.ops import xcos_matrix

from .cache import Maps, cached_maps
from .data import (
    IdentityBatches,
    PairBatches,
    Pictures,
    hardest_impostors,
    people_of_folds,
    people_of_list,
    people_of_share,
    read_pictures,
)
from .head_config import DataConfig, HeadExperiment, LossConfig, ModelConfig
from .losses import all_pairs, cosine_loss, make_loss, pair_scores, sample_classes, teacher_loss
from .norms import fix_statistics
from .seeds import BatchIndex
from .settings import ConfigError
from .task import weight_decay_groups

__all__ = [
    "Experiment",
    "HeadTask",
    "Sources",
    "build_head",
    "create",
    "create_from",
    "held_out_people",
    "load_sources",
]

_FMRS = (1e-2, 1e-3)
_DECISION_FMR = 5e-3  # of the exported model's threshold, as in xcos_ext.evaluation.calibrate
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something
_STATISTICS_PEOPLE = 1000  # one picture each of at most so many people for the closed form's mean
_EVALUATED = 3000  # pictures in an evaluation at most
_HARDEST = 20  # impostors kept for each picture


#: The settings of this task's experiments.
Experiment = HeadExperiment


class Drawn(NamedTuple):
    """Attributes: pictures int64 [n], and the generator for whatever else is drawn for them."""

    pictures: Tensor
    generator: torch.Generator


@dataclasses.dataclass
class Sources:
    """Attributes: the frozen recogniser in evaluation mode, pictures, and its maps of them."""

    recogniser: Recogniser
    pictures: Pictures
    maps: Maps


def load_sources(
    data: DataConfig,
    model: ModelConfig,
    *,
    flipped: bool = False,
    chosen: Callable[[str], bool] | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Sources:
    """Read recogniser and pictures, and compute or read the maps.

    Args:
        data: which pictures, and where maps are kept.
        model: which recogniser.
        flipped: with the mirrored pictures' maps.
        chosen: which people to read; None: all.
        device: where maps are computed.
        progress: called with what is done, items done and items in all.
    """
    recogniser = load_recogniser(model.recogniser).requires_grad_(False)

    def tell(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    size = recogniser.preprocessing.size
    pictures = read_pictures(data.pictures, size, chosen=chosen, progress=tell("reading"))
    folder = Path(data.cache)
    maps = cached_maps(recogniser, pictures, folder, flipped=flipped, device=device, progress=tell("computing maps"))
    recogniser.to("cpu")
    return Sources(recogniser, pictures, maps)


def held_out_people(data: DataConfig, names: tuple[str, ...]) -> set[str]:
    """People that must not be trained on, by all the rules given.

    Raises:
        ConfigError: folds without a pairs file.
        XCosError: a list or pairs file that cannot be used.
    """
    if data.folds and data.pairs is None:
        raise ConfigError("data.pairs: expected the pairs file that data.folds belong to, got nothing")
    found = people_of_share(names, data.held_out_share)
    if data.held_out_list is not None:
        found |= people_of_list(data.held_out_list)
    if data.pairs is not None and data.folds:
        found |= people_of_folds(data.pairs, data.folds)
    return found & set(names)


def build_head(config: ModelConfig, sources: Sources, trained: Tensor, seed: int) -> XCosHead:
    """A new head as the settings say, in evaluation mode, its batch norms' statistics measured.

    Args:
        config: of the model.
        sources: recogniser and maps.
        trained: indices of the pictures that may be looked at.
        seed: of random weights.
    """
    recogniser, pictures, maps = sources.recogniser, sources.pictures, sources.maps
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        closed: ClosedFormHead | None = None
        channels = config.channels
        if config.start == "closed-form":
            statistics: Any = config.statistics
            if statistics is None:
                first = np.unique(pictures.people[trained].numpy(), return_index=True)[1][:_STATISTICS_PEOPLE]
                grids = maps.grids[0][trained[torch.from_numpy(first)]]
            try:
                if statistics is None:
                    statistics = plug_statistics(recogniser, grids.split(64), project=channels, spread=config.spread)
                plugged = plug(recogniser, statistics=statistics, project=channels, spread=config.spread)
            except ValueError as error:
                raise ConfigError(f"model: no closed form to start from: {error}") from error
            closed = cast(ClosedFormHead, plugged.head)
            channels = closed.channels
        elif channels is None:
            raise ConfigError("model.channels: expected a whole number with start = 'random', got none")
        attention: Any = config.attention
        if attention in ("residual", "learned"):
            attention = XCosAttention(
                channels,
                config.hidden,
                temperature=config.temperature,
                symmetric=config.symmetric,
                residual=attention == "residual",
            )
        if closed is None:
            head = XCosHead(recogniser.grid_shape[0], channels, attention=attention)
        elif isinstance(attention, str) or attention.residual:
            if attention == "uniform":
                raise ConfigError("model.attention: expected 'residual', 'learned' or 'norm' with the closed form")
            head = XCosHead.from_closed_form(closed, attention)
        else:
            start = XCosHead.from_closed_form(closed, "norm")
            head = XCosHead(start.in_channels, channels, attention=attention, projection=start.projection)
        fix_statistics(head, maps.grids[0][trained[:: max(1, len(trained) // 1024)]], seed)
    return head


class _Margins(nn.Module):
    """What is trained: the head and, with L_id, a margin head over the people."""

    def __init__(self, head: XCosHead, margin: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.margin = margin


class HeadTask:
    """Trains a head on the maps of a frozen recogniser, which is also the teacher of L_cos.

    Nothing of the recogniser is run while training: its maps and embeddings were computed once, in evaluation mode.
    The head is in evaluation mode too: batch norms keep the statistics measured at the start, all weights are trained.

    Args:
        sources: recogniser, pictures, maps.
        model: the head.
        loss: what to minimise.
        held_out: people to evaluate on and never to look at.
        batch: faces of one micro-step, for early errors; None: not checked.
        seed: of random weights.
        name: of the exported model.

    Raises:
        XCosError: settings that do not fit each other or the data.
    """

    def __init__(
        self,
        sources: Sources,
        model: ModelConfig,
        loss: LossConfig,
        held_out: set[str] = frozenset(),  # type: ignore[assignment]
        *,
        batch: int | None = None,
        seed: int = 0,
        name: str = "xcos-head",
    ) -> None:
        self.sources, self.model_config, self.config, self.name = sources, model, loss, name
        pictures, maps = sources.pictures, sources.maps
        if loss.cosine > 0 and maps.embeddings is None:
            raise ConfigError("loss.cosine: expected a recogniser with an output block, whose cosines are the target")
        if not (loss.cosine or loss.contrast or loss.identity):
            raise ConfigError("loss: expected a weight above 0 among cosine, contrast and identity, got none")
        if loss.contrast and loss.pairs == "drawn":
            raise ConfigError("loss.contrast: expected loss.pairs = 'all', whose batches it is over, got 'drawn'")
        self.held_out = pictures.of_people(held_out)
        self.trained = pictures.of_people(set(pictures.names) - set(held_out))
        head = build_head(model, sources, self.trained, seed)
        self.start = {n: p.detach().clone() for n, p in head.named_parameters() if n.startswith("cells.")}
        self.labels = self._labels()
        self.module = _Margins(head, self._margin(head, seed))
        self.contrast = make_loss(loss.contrast_kind, loss.contrast_temperature, loss.contrast_margin)
        self._pairs: PairBatches | None = None
        self._batches: dict[int, IdentityBatches] = {}
        if loss.pairs == "drawn":
            hardest = None
            if loss.hard > 0:
                if maps.embeddings is None:
                    raise ConfigError("loss.hard: expected a recogniser with an output block to find hard pairs with")
                hardest = hardest_impostors(maps.embeddings[0], pictures.people, self.trained, _HARDEST)
            self._pairs = PairBatches(pictures.people, self.trained, hardest, loss.hard)
        elif batch is not None:
            self._identities(batch)

    # --- set up

    def _labels(self) -> Tensor:
        """Class of each picture, int64 [N]; -1 for those not trained on."""
        people = self.sources.pictures.people
        labels = torch.full((len(people),), -1, dtype=torch.int64)
        labels[self.trained] = people[self.trained].unique(return_inverse=True)[1]
        return labels

    def _margin(self, head: XCosHead, seed: int) -> nn.Module | None:
        config = self.config
        if config.identity == 0:
            return None
        made = ArcFaceHead if config.margin_head == "arcface" else CosFaceHead
        given = {"scale": config.margin_scale, "margin": config.margin}
        _, height, width = self.sources.recogniser.grid_shape
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + 1)
            return made(
                head.channels * height * width,
                int(self.labels.max()) + 1,
                **{name: value for name, value in given.items() if value is not None},
            )

    def _identities(self, size: int) -> IdentityBatches:
        """Batches of ``size`` faces."""
        if size not in self._batches:
            self._batches[size] = self._new_identities(size)
        return self._batches[size]

    def _new_identities(self, size: int) -> IdentityBatches:
        others = round(self.config.others * size)
        each = self.config.pictures_each
        others += (size - others) % each
        people = self.sources.pictures.people
        return IdentityBatches(people, self.trained, (size - others) // each, each, others)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Tensors of the projection learn at a rate relative to their size; attention and margin head as usual."""
        groups: list[dict[str, Any]] = []
        for name, parameter in self.module.head.named_parameters():
            if name.startswith("cells."):
                size = float(parameter.detach().square().mean().sqrt())
                groups.append({"params": [parameter], "rate_scale": size or 1.0, "weight_decay": 0.0})
        for part in (getattr(self.module.head, "conv1x1", None), self.module.head.attention, self.module.margin):
            if part is not None:
                groups += weight_decay_groups(part)
        return groups

    # --- steps

    def draw(self, index: BatchIndex, size: int) -> Drawn:
        """Which pictures one part consists of."""
        if self._pairs is not None:
            pairs = self._pairs.draw(index.generator(), size // 2 * index.parts)
            chosen = torch.cat((index.slice_of(pairs.first), index.slice_of(pairs.second)))
            return Drawn(chosen, index.generator(1, own=True))
        generator = index.generator(own=True)
        return Drawn(self._identities(size).draw(generator), generator)

    def labelled(self, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Whose the pictures are, and what L_id needs."""
        made = {"people": self.sources.pictures.people[chosen], "labels": self.labels[chosen]}
        if self.config.identity and self.config.class_share < 1:
            classes = int(self.labels.max()) + 1
            made["classes"] = sample_classes(made["labels"], classes, self.config.class_share, generator)
        return made

    def batch(self, index: BatchIndex, size: int) -> dict[str, Tensor]:
        """Maps of one part, and whose they are."""
        chosen, generator = self.draw(index, size)
        maps = self.sources.maps
        views = torch.randint(len(maps.grids), (len(chosen),), generator=generator)
        made = {"grids": maps.grids[views, chosen], **self.labelled(chosen, generator)}
        if maps.embeddings is not None:
            made["embeddings"] = maps.embeddings[views, chosen]
        return made

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The weighted sum and its parts."""
        head = self.module.head
        features = head.features(batch["grids"].float())
        return self.anchored(*combined_loss(self.config, self.contrast, head, self.module.margin, features, batch))

    def anchored(self, total: Tensor, parts: dict[str, float | Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """A loss with the projection's squared relative distance to its start added."""
        if self.config.anchor == 0 or not self.start:
            return total, parts
        moved = total.new_zeros(())
        for name, parameter in self.module.head.named_parameters():
            if name in self.start:
                start = self.start[name] = self.start[name].to(parameter)
                moved = moved + (parameter - start).square().sum() / start.square().sum().clamp_min(1e-12)
        return total + self.config.anchor * moved, parts | {"moved": moved.detach()}

    def describe(self) -> Mapping[str, Any]:
        """Settings, data and weights that a resumed training must share."""
        return {
            "task": "head",
            # Wherever the weights lie, they must be the same.
            "model": dataclasses.asdict(self.model_config)
            | {"recogniser": fingerprint_weights(self.sources.recogniser)},
            "loss": dataclasses.asdict(self.config),
            "pictures": self.sources.pictures.fingerprint,
            "trained": len(self.trained),
            "held_out": len(self.held_out),
        }

    # --- results

    def report(self) -> list[str]:
        """What is worth knowing about the data, a line each."""
        people = self.sources.pictures.people
        sizes = [
            f"{len(part)} pictures of {len(people[part].unique())} people" for part in (self.trained, self.held_out)
        ]
        return [f"{sizes[0]} to train on, {sizes[1]} held out", *self.sources.pictures.report()]

    @torch.no_grad()
    def features(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Grid features of pictures, on the CPU."""
        head = cast(_Margins, module).head
        device = next(head.parameters()).device
        grids = self.sources.maps.grids[0]
        return torch.cat([head.features(grids[part].to(device).float()).cpu() for part in chosen.split(256)])

    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """Verification on all pairs of pictures of the people held out (at most 3,000 pictures)."""
        return verify(self, cast(_Margins, module).head, lambda chosen: self.features(module, chosen))

    def model(self, module: nn.Module) -> XCosModel:
        """Recogniser and head, not calibrated."""
        head = copy.deepcopy(cast(_Margins, module).head).cpu()
        return XCosModel(self.sources.recogniser, head, name=self.name).eval()

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``model.safetensors``: recogniser and head, for ``xcos_ext.load_model``."""
        model = self.model(module)
        calibrate_on(model, self, lambda chosen: self.features(module, chosen))
        path = folder / "model.safetensors"
        save_model(model, path)
        return [path]


@torch.no_grad()
def verify(task: HeadTask, head: XCosHead, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """AUC, EER, TAR and correlation with the teacher's cosine on all pairs of pictures held out.

    Args:
        task: whose people are held out.
        head: scores.
        features: from indices of pictures to grid features on the CPU.
    """
    if len(task.held_out) < 2:
        return {}
    chosen = _thinned(task.held_out)
    templates = head.templates(features(chosen).to(next(head.parameters()).device), "both")
    scores, genuine = _upper(xcos_matrix(templates, templates).cpu(), task.sources.pictures.people[chosen])
    if genuine.all() or not genuine.any():
        return {}
    metrics = {"auc": auc(scores, genuine), "eer": eer(scores, genuine).rate}
    for rate in _FMRS:
        metrics[f"tar_at_{rate:g}"] = operating_point(scores, genuine, rate).tar
    embeddings = task.sources.maps.embeddings
    if embeddings is not None:
        own = embeddings[0][chosen]
        cosines, _ = _upper(own @ own.T, task.sources.pictures.people[chosen])
        metrics["correlation"] = float(np.corrcoef(scores, cosines)[0, 1])
    return metrics


@torch.no_grad()
def calibrate_on(model: XCosModel, task: HeadTask, features: Callable[[Tensor], Tensor]) -> None:
    """Gives a model thresholds from all impostor pairs of the people held out (of those trained on, if none are),
    where these are enough to tell rates."""
    pictures = task.sources.pictures
    chosen = _thinned(task.held_out if len(task.held_out) > 1 else task.trained)
    names = [pictures.names[int(number)] for number in pictures.people[chosen]]
    pairs = len(chosen) * (len(chosen) - 1) // 2
    rates = [rate for rate in (1e-1, *_FMRS) if pairs * rate >= 2 * _EXPECTED_MATCHES]
    if pairs * _DECISION_FMR >= 2 * _EXPECTED_MATCHES:
        found = calibrate(model, features(chosen), names, decision_fmr=_DECISION_FMR, fmrs=rates)
        model.set_calibration(found)


def _thinned(chosen: Tensor) -> Tensor:
    """At most so many pictures as an evaluation takes, evenly spread."""
    return chosen[:: max(1, -(-len(chosen) // _EVALUATED))]


def _upper(scores: Tensor, people: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores above the diagonal and whether they are of genuine pairs."""
    rows, columns = torch.triu_indices(len(people), len(people), 1)
    return scores[rows, columns].double().numpy(), (people[rows] == people[columns]).numpy()


def combined_loss(
    config: LossConfig,
    contrast: Callable[[Tensor, Tensor], Tensor],
    head: XCosHead,
    margin: nn.Module | None,
    features: Tensor,
    batch: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """L_id, L_cos and the contrast of a batch of grid features.

    Args:
        config: weights and kinds.
        contrast: of :func:`make_loss`.
        head: in evaluation mode.
        margin: for L_id.
        features: F [B, C, H, W]; with drawn pairs, first all first faces, then all second ones.
        batch: ``people``, ``labels``, and where needed ``embeddings`` (the teacher's) and ``classes``.

    Returns:
        (total, parts): without the weights in the parts.
    """
    total = features.new_zeros(())
    parts: dict[str, float | Tensor] = {}
    people = batch["people"]

    def add(name: str, weight: float, value: Tensor) -> None:
        nonlocal total
        total = total + weight * value
        parts[name] = value.detach()

    if config.pairs == "drawn" and config.cosine > 0:
        a, b = features.chunk(2)
        first, second = batch["embeddings"].chunk(2)
        scores = pair_scores(head, a, b, config.detach)
        add("cosine", config.cosine, cosine_loss(scores, (first * second).sum(1), config.distance))
    elif config.pairs == "all" and (config.cosine > 0 or config.contrast > 0):
        scores = all_pairs(head, features, config.detach)
        if config.cosine > 0:
            kinds_of = people if config.balanced else None
            add("cosine", config.cosine, teacher_loss(scores, batch["embeddings"], kinds_of, config.distance))
        if config.contrast > 0:
            add("contrast", config.contrast, contrast(scores, people))
    if margin is not None:
        logits = margin(head.identity(features), batch["labels"], batch.get("classes"))
        labels = batch["labels"]
        if "classes" in batch:
            labels = torch.searchsorted(batch["classes"], labels)
        add("identity", config.identity, F.cross_entropy(logits, labels))
    if not total.requires_grad:
        raise XCosError("loss: nothing that is trained takes part in it")
    return total, parts


def create(experiment: HeadExperiment, progress: Callable[[str, int, int], None] | None = None) -> HeadTask:
    """The task of an experiment's file: reads the pictures and computes the maps.

    Args:
        experiment: settings.
        progress: called with what is done, items done and items in all.
    """
    sources = load_sources(experiment.data, experiment.model, flipped=experiment.loss.flipped, progress=progress)
    return create_from(sources, experiment, held_out_people(experiment.data, sources.pictures.names))


def create_from(sources: Sources, experiment: HeadExperiment, held_out: set[str]) -> HeadTask:
    """The task of an experiment's file on pictures that are there already.

    Args:
        sources: of the experiment.
        experiment: settings.
        held_out: people who are not trained on.
    """
    train = experiment.train
    return HeadTask(
        sources,
        experiment.model,
        experiment.loss,
        held_out,
        batch=train.part_size(1),
        seed=train.seed,
        name=experiment.name,
    )
