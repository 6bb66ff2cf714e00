"""Training a head on the maps of a frozen recogniser, computed once; or together with the body below it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.devices import module_device
from xcos_ext.evaluation import calibrate, verification
from xcos_ext.io.errors import XCosError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.several import several
from xcos_ext.model import ArcFaceHead, CosFaceHead, XCosHead, XCosModel, save_model
from xcos_ext.ops import xcos_matrix

from ..augment import augmented
from ..data import normalised
from ..losses import all_pairs, cosine_loss, make_loss, pair_scores, sample_classes, teacher_loss
from ..sampling import IdentityBatches, PairBatches, hardest_impostors
from ..settings import ConfigError
from ..task import BatchIndex, weight_decay_groups
from .config import HeadExperiment
from .sources import Sources, build_head, held_out_people, load_sources

__all__ = ["Experiment", "HeadTask", "ModelTask", "create", "make_task"]

_FMRS = (1e-2, 1e-3)
_DECISION_FMR = 5e-3  # of the exported model's threshold, as in xcos_ext.evaluation.calibrate
_EXPECTED_MATCHES = 30  # impostor pairs times rate, for a threshold at that rate to mean something
_EVALUATED = 3000  # pictures in an evaluation at most
_HARDEST = 20  # impostors kept for each picture

#: The settings of this module's experiments.
Experiment = HeadExperiment


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
        experiment: settings; its ``data`` has been read.
        held_out: people to evaluate on and never to look at.

    Raises:
        XCosError: settings that do not fit each other or the data.
    """

    _at_once = 256  # pictures of a forward pass outside training

    def __init__(self, sources: Sources, experiment: HeadExperiment, held_out: Collection[str] = ()) -> None:
        self.sources, self.experiment, self.config = sources, experiment, experiment.loss
        loss, seed = experiment.loss, experiment.train.seed
        pictures, embeddings = sources.pictures, sources.maps.embeddings
        several(held_out, "held_out")
        if loss.cosine > 0 and embeddings is None:
            raise ConfigError("loss.cosine: expected a recogniser with an output block, whose cosines are the target")
        if not (loss.cosine or loss.contrast or loss.identity):
            raise ConfigError("loss: expected a weight above 0 among cosine, contrast and identity, got none")
        if loss.contrast and loss.pairs == "drawn":
            raise ConfigError("loss.contrast: expected loss.pairs = 'all', whose batches it is over, got 'drawn'")
        self.held_out = pictures.of_people(held_out)
        self.trained = pictures.of_people(set(pictures.names) - set(held_out))
        head = build_head(experiment.model, sources, self.trained, seed)
        self.start = {n: p.detach().clone() for n, p in head.named_parameters() if n.startswith("cells.")}
        # Class of each picture; -1 for those not trained on.
        self.labels = torch.full((len(pictures),), -1, dtype=torch.int64)
        self.labels[self.trained] = pictures.people[self.trained].unique(return_inverse=True)[1]
        self.classes = int(self.labels.max()) + 1
        self.module = Trained(head, self._margin(head, seed) if loss.identity else None)
        self.contrast = make_loss(loss.contrast_kind, loss.contrast_temperature, loss.contrast_margin)
        self._pairs: PairBatches | None = None
        self._batches: dict[int, IdentityBatches] = {}
        if loss.pairs == "drawn":
            hardest = None
            if loss.hard > 0:
                if embeddings is None:
                    raise ConfigError("loss.hard: expected a recogniser with an output block to find hard pairs with")
                hardest = hardest_impostors(embeddings[0], pictures.people, self.trained, _HARDEST)
            self._pairs = PairBatches(pictures.people, self.trained, hardest, loss.hard)
        else:
            self._identities(experiment.train.part_size(1))  # too few people are found before anything is trained

    def _margin(self, head: XCosHead, seed: int) -> nn.Module:
        config = self.config
        made = ArcFaceHead if config.margin_head == "arcface" else CosFaceHead
        given = {"scale": config.margin_scale, "margin": config.margin}
        _, height, width = self.sources.recogniser.grid_shape
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + 1)
            return made(
                head.channels * height * width,
                self.classes,
                **{name: value for name, value in given.items() if value is not None},
            )

    def _identities(self, size: int) -> IdentityBatches:
        """Batches of ``size`` faces."""
        if size not in self._batches:
            each, others = self.config.pictures_each, round(self.config.others * size)
            others += (size - others) % each
            people = self.sources.pictures.people
            self._batches[size] = IdentityBatches(people, self.trained, (size - others) // each, each, others)
        return self._batches[size]

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

    def draw(self, index: BatchIndex, size: int) -> tuple[Tensor, torch.Generator]:
        """Which pictures one part consists of, int64 [n], and the generator for whatever else is drawn for them."""
        if self._pairs is not None:
            sides = self._pairs.draw(index.generator(), size // 2 * index.parts)
            return torch.cat([index.slice_of(side) for side in sides]), index.generator(1, own=True)
        generator = index.generator(own=True)
        return self._identities(size).draw(generator), generator

    def labelled(self, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Whose the pictures are, and what L_id needs."""
        made = {"people": self.sources.pictures.people[chosen], "labels": self.labels[chosen]}
        if self.config.identity and self.config.class_share < 1:
            made["classes"] = sample_classes(made["labels"], self.classes, self.config.class_share, generator)
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
                known = people if config.balanced else None
                losses["cosine"] = config.cosine, teacher_loss(scores, batch["embeddings"], known, config.distance)
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
            moved = []  # the projection's squared relative distance to its start
            for name, parameter in head.named_parameters():
                if name in self.start:
                    start = self.start[name] = self.start[name].to(parameter)
                    moved.append((parameter - start).square().sum() / start.square().sum().clamp_min(1e-12))
            losses["moved"] = config.anchor, torch.stack(moved).sum()
        total = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in losses.items()}

    def describe(self) -> Mapping[str, Any]:
        """Settings, data and weights that a resumed training must share."""
        return {
            "task": "head",
            # Wherever the weights lie, they must be the same.
            "model": dataclasses.asdict(self.experiment.model)
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

    def _grid(self, trained: Trained, chosen: Tensor, device: torch.device) -> Tensor:
        """Maps of pictures."""
        return self.sources.maps.grids[0][chosen].to(device).float()

    @torch.no_grad()
    def features(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Grid features of pictures, on the CPU."""
        trained, device = cast(Trained, module), module_device(module)
        parts = chosen.split(self._at_once)
        return torch.cat([trained.head.features(self._grid(trained, part, device)).cpu() for part in parts])

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """AUC, EER, TAR and correlation with the teacher's cosine on all pairs of pictures of the people held out (at
        most 3,000 pictures); empty where these are not of both kinds."""
        if len(self.held_out) < 2:
            return {}
        chosen = _thinned(self.held_out)
        people = self.sources.pictures.people[chosen]
        rows, columns = torch.triu_indices(len(chosen), len(chosen), 1)
        genuine = (people[rows] == people[columns]).numpy()
        if genuine.all() or not genuine.any():
            return {}
        features = self.features(module, chosen).to(module_device(module))
        templates = cast(Trained, module).head.templates(features, "both")
        scores = xcos_matrix(templates, templates).cpu()[rows, columns].double().numpy()
        report = verification(scores, genuine, fmrs=_FMRS)
        metrics = {"auc": report.auc, "eer": report.eer}
        metrics |= {f"tar_at_{point.requested:g}": point.tar for point in report.operating_points}
        if self.sources.maps.embeddings is not None:
            own = self.sources.maps.embeddings[0][chosen]
            metrics["correlation"] = float(np.corrcoef(scores, (own @ own.T)[rows, columns].double())[0, 1])
        return metrics

    def model(self, module: nn.Module) -> XCosModel:
        """Recogniser and head, not calibrated."""
        trained = copy.deepcopy(cast(Trained, module)).cpu()
        return XCosModel(trained.body or self.sources.recogniser, trained.head, name=self.experiment.name).eval()

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


class ModelTask(HeadTask):
    """Trains a head and the recogniser's body, at a small rate, on altered pictures.

    The teacher is the recogniser as it was. It is never run while training: its embeddings of the unaltered pictures
    were computed once, in evaluation mode, with the maps. Batch norms of the body keep the statistics that they have,
    those of the head the ones measured at the start; all weights are trained. The body's output block takes no part and
    stays as it is.

    Arguments are those of :class:`HeadTask`.
    """

    _at_once = 64

    def __init__(self, sources: Sources, experiment: HeadExperiment, held_out: Collection[str] = ()) -> None:
        super().__init__(sources, experiment, held_out)
        trained = copy.deepcopy(sources.recogniser).eval().requires_grad_(True)
        for name, parameter in trained.named_parameters():
            if name.startswith(trained.output_prefixes):
                parameter.requires_grad_(False)
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = Trained(self.module.head, self.module.margin, trained)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head's groups, and the body's at its own rate."""
        body = cast(Recogniser, self.module.body)
        return [*super().parameter_groups(), *weight_decay_groups(body, rate_scale=self.experiment.body.rate_scale)]

    def batch(self, index: BatchIndex, size: int) -> dict[str, Tensor]:
        """Altered pictures of one part, and the teacher's embeddings of them as they are."""
        chosen, generator = self.draw(index, size)
        images = self.sources.pictures.images[chosen]
        made = {
            "images": augmented(images, self.experiment.body.augment, index.generator(2, own=True)),
            **self.labelled(chosen, generator),
        }
        if self.sources.maps.embeddings is not None:
            made["embeddings"] = self.sources.maps.embeddings[0, chosen]
        return made

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The head's losses; in lower precision, where it is asked for, only the body computes."""
        body, head = cast(Recogniser, self.module.body), self.module.head
        if body.training or head.training:
            raise XCosError("model: expected body and head in evaluation mode, which fixes batch norms' statistics")
        grid = body.grid(normalised(body, batch["images"]).contiguous(memory_format=torch.channels_last))
        with torch.autocast(grid.device.type, enabled=False):
            return self.combined(head.features(grid.float().contiguous()), batch)

    def describe(self) -> Mapping[str, Any]:
        """The head's settings, and the body's."""
        return {**super().describe(), "task": "model", "body": dataclasses.asdict(self.experiment.body)}

    def _grid(self, trained: Trained, chosen: Tensor, device: torch.device) -> Tensor:
        body = cast(Recogniser, trained.body)
        return body.grid(normalised(body, self.sources.pictures.images[chosen].to(device)))


def _thinned(chosen: Tensor) -> Tensor:
    """At most so many pictures as an evaluation takes, evenly spread."""
    return chosen[:: max(1, -(-len(chosen) // _EVALUATED))]


def make_task(sources: Sources, experiment: HeadExperiment, held_out: Collection[str]) -> HeadTask:
    """The task of an experiment on pictures that are there already; arguments are those of :class:`HeadTask`."""
    return (ModelTask if experiment.task == "model" else HeadTask)(sources, experiment, held_out)


def create(experiment: HeadExperiment, progress: Callable[[str, int, int], None] | None = None) -> HeadTask:
    """The task of an experiment's file: reads the pictures and computes the maps.

    Args:
        experiment: settings.
        progress: called with what is done, items done and items in all.
    """
    flipped = experiment.loss.flipped and experiment.task == "head"  # of the pictures altered, the body sees others
    sources = load_sources(experiment.data, experiment.model, flipped=flipped, progress=progress)
    return make_task(sources, experiment, held_out_people(experiment.data, sources.pictures.names))
