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
from xcos_ext.model import ArcFaceHead, CosFaceHead, XCosHead, XCosModel, save_model
from xcos_ext.ops import xcos_matrix

from ..losses import all_pairs, cosine_loss, make_loss, pair_scores, sample_classes, teacher_loss
from ..sampling import IdentityBatches, PairBatches, hardest_impostors
from ..settings import ConfigError
from ..task import BatchIndex, weight_decay_groups
from .config import HeadExperiment, LossConfig, ModelConfig
from .sources import Sources, build_head, held_out_people, load_sources

__all__ = ["Experiment", "HeadTask", "create"]

_FMRS = (1e-2, 1e-3)
_DECISION_FMR = 5e-3  # of the exported model's threshold, as in xcos_ext.evaluation.calibrate
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something
_EVALUATED = 3000  # pictures in an evaluation at most
_HARDEST = 20  # impostors kept for each picture

#: The settings of this task's experiments.
Experiment = HeadExperiment


class Drawn(NamedTuple):
    """Attributes: pictures int64 [n], and the generator for whatever else is drawn for them."""

    pictures: Tensor
    generator: torch.Generator


class Trained(nn.Module):
    """What is trained: the head; with L_id, a margin head over the people; where it learns too, the body."""

    def __init__(self, head: XCosHead, margin: nn.Module | None, body: Recogniser | None = None) -> None:
        super().__init__()
        self.body = body
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
        self.module = Trained(head, self._margin(head, seed))
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

    @classmethod
    def from_experiment(
        cls, sources: Sources, experiment: HeadExperiment, held_out: set[str], **options: Any
    ) -> HeadTask:
        """The task of an experiment's file on pictures that are there already.

        Args:
            sources: of the experiment.
            experiment: settings.
            held_out: people who are not trained on.
            options: further ones of the class.
        """
        train = experiment.train
        return cls(
            *(sources, experiment.model, experiment.loss, held_out),
            batch=train.part_size(1),
            seed=train.seed,
            name=experiment.name,
            **options,
        )

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
        return self.combined(self.module.head.features(batch["grids"].float()), batch)

    def combined(self, features: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """L_id, L_cos, the contrast and the anchor of a batch of grid features.

        Args:
            features: F [B, C, H, W]; with drawn pairs, first all first faces, then all second ones.
            batch: ``people``, ``labels``, and where needed ``embeddings`` (the teacher's) and ``classes``.

        Returns:
            (total, parts): without the weights in the parts.
        """
        config, head, margin = self.config, self.module.head, self.module.margin
        people, labels = batch["people"], batch["labels"]
        losses: dict[str, tuple[float, Tensor]] = {}
        if config.pairs == "drawn" and config.cosine > 0:
            a, b = features.chunk(2)
            first, second = batch["embeddings"].chunk(2)
            scores = pair_scores(head, a, b, config.detach)
            losses["cosine"] = config.cosine, cosine_loss(scores, (first * second).sum(1), config.distance)
        elif config.pairs == "all" and (config.cosine > 0 or config.contrast > 0):
            scores = all_pairs(head, features, config.detach)
            if config.cosine > 0:
                kinds_of = people if config.balanced else None
                distance = teacher_loss(scores, batch["embeddings"], kinds_of, config.distance)
                losses["cosine"] = config.cosine, distance
            if config.contrast > 0:
                losses["contrast"] = config.contrast, self.contrast(scores, people)
        if margin is not None:
            logits = margin(head.identity(features), labels, batch.get("classes"))
            if "classes" in batch:
                labels = torch.searchsorted(batch["classes"], labels)
            losses["identity"] = config.identity, F.cross_entropy(logits, labels)
        if not any(loss.requires_grad for _, loss in losses.values()):
            raise XCosError("loss: nothing that is trained takes part in it")
        if config.anchor > 0 and self.start:
            losses["moved"] = config.anchor, self._moved()
        total = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in losses.items()}

    def _moved(self) -> Tensor:
        """The projection's squared relative distance to its start."""
        moved = []
        for name, parameter in self.module.head.named_parameters():
            if name in self.start:
                start = self.start[name] = self.start[name].to(parameter)
                moved.append((parameter - start).square().sum() / start.square().sum().clamp_min(1e-12))
        return torch.stack(moved).sum()

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
        head = cast(Trained, module).head
        device = next(head.parameters()).device
        grids = self.sources.maps.grids[0]
        return torch.cat([head.features(grids[part].to(device).float()).cpu() for part in chosen.split(256)])

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """AUC, EER, TAR and correlation with the teacher's cosine on all pairs of pictures of the people held out (at
        most 3,000 pictures); empty where these are not of both kinds."""
        if len(self.held_out) < 2:
            return {}
        head, chosen = cast(Trained, module).head, _thinned(self.held_out)
        people = self.sources.pictures.people[chosen]
        templates = head.templates(self.features(module, chosen).to(next(head.parameters()).device), "both")
        scores, genuine = _upper(xcos_matrix(templates, templates).cpu(), people)
        if genuine.all() or not genuine.any():
            return {}
        metrics = {"auc": auc(scores, genuine), "eer": eer(scores, genuine).rate}
        for rate in _FMRS:
            metrics[f"tar_at_{rate:g}"] = operating_point(scores, genuine, rate).tar
        embeddings = self.sources.maps.embeddings
        if embeddings is not None:
            own = embeddings[0][chosen]
            cosines, _ = _upper(own @ own.T, people)
            metrics["correlation"] = float(np.corrcoef(scores, cosines)[0, 1])
        return metrics

    def model(self, module: nn.Module) -> XCosModel:
        """Recogniser and head, not calibrated."""
        trained = copy.deepcopy(cast(Trained, module)).cpu()
        return XCosModel(trained.body or self.sources.recogniser, trained.head, name=self.name).eval()

    @torch.no_grad()
    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``model.safetensors``: recogniser and head, for ``xcos_ext.load_model``, with thresholds from all impostor
        pairs of the people held out (of those trained on, if none are), where these are enough to tell rates."""
        model = self.model(module)
        chosen = _thinned(self.held_out if len(self.held_out) > 1 else self.trained)
        names = [self.sources.pictures.names[int(number)] for number in self.sources.pictures.people[chosen]]
        pairs = len(chosen) * (len(chosen) - 1) // 2
        rates = [rate for rate in (1e-1, *_FMRS) if pairs * rate >= 2 * _EXPECTED_MATCHES]
        if pairs * _DECISION_FMR >= 2 * _EXPECTED_MATCHES:
            features = self.features(module, chosen)
            model.set_calibration(calibrate(model, features, names, decision_fmr=_DECISION_FMR, fmrs=rates))
        path = folder / "model.safetensors"
        save_model(model, path)
        return [path]


def _thinned(chosen: Tensor) -> Tensor:
    """At most so many pictures as an evaluation takes, evenly spread."""
    return chosen[:: max(1, -(-len(chosen) // _EVALUATED))]


def _upper(scores: Tensor, people: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores above the diagonal and whether they are of genuine pairs."""
    rows, columns = torch.triu_indices(len(people), len(people), 1)
    return scores[rows, columns].double().numpy(), (people[rows] == people[columns]).numpy()


def create(experiment: HeadExperiment, progress: Callable[[str, int, int], None] | None = None) -> HeadTask:
    """The task of an experiment's file: reads the pictures and computes the maps.

    Args:
        experiment: settings.
        progress: called with what is done, items done and items in all.
    """
    sources = load_sources(experiment.data, experiment.model, flipped=experiment.loss.flipped, progress=progress)
    return HeadTask.from_experiment(sources, experiment, held_out_people(experiment.data, sources.pictures.names))
