"""Training the default model: a narrow network learns what several teachers say, cell by cell, of faces however seen.

The teachers look at pictures as they are; the student at the same faces turned, moved, covered, small, badly lit, and
with regions of other faces in them. What it is to say is known in each case: of a face that was altered, what the
teachers say of the picture; of a region of another face, what they say of that face there; of what is covered, nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipes.altered import compressed, covered, cut, shaded, shrunk, turned
from recipes.swaps import SwapConfig, swapped
from recipes.teachers import TargetSpace, ask, joined
from xcos_ext.backbones import Recogniser
from xcos_ext.evaluation import calibrate, eer
from xcos_ext.model import XCosHead, XCosModel, load_model, save_model
from xcos_ext.ops import xcos_matrix
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.data import Pictures, normalised, read_pictures
from xcos_ext.training.losses import all_pairs, teacher_loss
from xcos_ext.training.settings import SETTINGS, ConfigError, TrainConfig
from xcos_ext.training.task import BatchIndex, weight_decay_groups
from xcos_ext.training.tasks.config import DataConfig
from xcos_ext.training.tasks.sources import held_out_people

__all__ = [
    "AlterConfig",
    "Experiment",
    "Sources",
    "StudentConfig",
    "StudentTask",
    "WeightConfig",
    "create",
    "load_sources",
]

_BLOCK = 512  # pictures whose targets are made at once
_BATCH = 64  # pictures of a forward pass outside training
_AXES_PEOPLE = 2000  # people at most that the axes are computed from
_PROFILE = "profile"  # in the names of pictures that are profiles already

# Faces with another's region: cells stay where they are. Others: as detectors err, a quarter of them badly.
_COLOURS: dict[str, float] = {"brightness": 0.3, "contrast": 0.35, "saturation": 0.4, "gamma": 0.3, "grey": 0.08}
_LIGHT = AugmentConfig(flip=0, rotate=1, scale=0.01, stretch=0.01, shift=0.01, blur=0, noise=2, patch=0, **_COLOURS)
_USUAL = AugmentConfig(flip=0, rotate=5, scale=0.06, stretch=0.03, shift=0.03, blur=0.1, patch=0.05, **_COLOURS)
_FAR = AugmentConfig(flip=0, rotate=14, scale=0.12, stretch=0.06, shift=0.08, blur=0.1, patch=0.05, **_COLOURS)


@dataclass(frozen=True, config=SETTINGS)
class StudentConfig:
    """The model, and who teaches it.

    Attributes:
        teachers: files of recognisers, weights or ONNX.
        trust: weight of each teacher's embedding.
        start: model to start from, of ``recipes.surgery`` or of an earlier training.
        spread: sharing between the teachers' cells, in cells.
        channels: of the grid feature: principal axes kept of every cell.
        person: share of the mean over the person's frontal pictures in what is wanted of one of them.
        profile: the same in what is wanted of a profile.
    """

    teachers: tuple[str, ...]
    start: str
    trust: tuple[float, ...] = (1.0,)
    spread: float = Field(default=2.0, ge=0)
    channels: int = Field(default=32, ge=1)
    person: float = Field(default=0.3, ge=0, le=1)
    profile: float = Field(default=0.7, ge=0, le=1)


@dataclass(frozen=True, config=SETTINGS)
class AlterConfig:
    """Shares of the faces of a batch that are altered.

    Attributes:
        turned: to one side, of those that are no profiles already.
        covered: by what people wear.
        cut: by the edge of the photograph.
        far: moved, turned in the plane and scaled beyond what detectors usually do, of those without a swapped region.
        small, dark, jpeg: small for a moment, dark on one side, compressed.
    """

    turned: float = Field(default=0.3, ge=0, le=1)
    covered: float = Field(default=0.15, ge=0, le=1)
    cut: float = Field(default=0.15, ge=0, le=1)
    far: float = Field(default=0.3, ge=0, le=1)
    small: float = Field(default=0.1, ge=0, le=1)
    dark: float = Field(default=0.15, ge=0, le=1)
    jpeg: float = Field(default=0.1, ge=0, le=1)


@dataclass(frozen=True, config=SETTINGS)
class WeightConfig:
    """A weighted sum of losses.

    Attributes:
        features: squared distance to the teachers' grid feature, whose variance is 1.
        pasted: how often a cell from another picture counts in it: few cells are such, and only these tell a cell from
            its face; those from another picture of the same person tell that a border is no sign of another.
        leak: of cells with another person's region, the squared distance of the cosine with what was there before to
            the teachers': how much of the face around it such a cell still tells.
        pairs: L_cos over all pairs of faces without a swapped region, every pair alike: the few genuine pairs of a
            batch, counted as much as its hundreds of impostors, drown what the teachers say of these in noise.
        cells: squared distance of S to the teachers', cell by cell, over all pairs of faces, as far as both are seen.
        evidence: cross-entropy of telling by S alone whether two cells are one person's (:class:`CellEvidence`).
    """

    features: float = Field(default=6.0, ge=0)
    pasted: float = Field(default=12.0, gt=0)
    leak: float = Field(default=2.0, ge=0)
    pairs: float = Field(default=20.0, ge=0)
    cells: float = Field(default=10.0, ge=0)
    evidence: float = Field(default=2.0, ge=0)


@dataclass(frozen=True, config=SETTINGS)
class Experiment:
    """An experiment's file for ``task = "recipes.student"``.

    Attributes:
        data, student, train, loss, alter, swaps: tables of the file; five faces in eight may be swapped.
        profiles: share of the people of a batch that have profiles among their pictures, where there are such.
        task: this one.
        name: of the exported model.
    """

    data: DataConfig
    student: StudentConfig
    train: TrainConfig
    loss: WeightConfig = WeightConfig()
    alter: AlterConfig = AlterConfig()
    swaps: SwapConfig = SwapConfig(share=0.9)
    profiles: float = Field(default=0.3, ge=0, le=1)
    task: Literal["recipes.student"] = "recipes.student"
    name: str = "xcos-slim"


class Sources(NamedTuple):
    """Attributes: pictures, and of each as it is and mirrored: the grid features that the teachers want for it
    [2, N, K, h, w] (fp16, mean 0, variance 1) and their joint embedding [2, N, D]; indices of the pictures that are
    trained on and of those held out."""

    pictures: Pictures
    features: Tensor
    embeddings: Tensor
    trained: Tensor
    held_out: Tensor


def load_sources(experiment: Experiment, progress: Callable[[str, int, int], None] | None = None) -> Sources:
    """Read the pictures, and read or compute what the teachers say of them."""
    data, student = experiment.data, experiment.student
    if len(student.trust) != len(student.teachers):
        raise ConfigError(f"student.trust: expected {len(student.teachers)} numbers, got {len(student.trust)}")
    tell = None if progress is None else lambda done, total: progress("reading", done, total)
    pictures = read_pictures(data.pictures, progress=tell)
    device = "cuda" if experiment.train.device != "cpu" and torch.cuda.is_available() else "cpu"
    answers = ask(student.teachers, pictures, Path(data.cache), device=device, progress=progress)
    held_out = pictures.of_people(held_out_people(data, pictures.names))
    trained = torch.ones(len(pictures), dtype=torch.bool)
    trained[held_out] = False
    chosen = torch.nonzero(trained).flatten()
    first = torch.from_numpy(np.unique(pictures.people[chosen].numpy(), return_index=True)[1])
    some = chosen[first[:: max(1, len(first) // _AXES_PEOPLE)]]
    space = TargetSpace.fit(
        [cells[0, some] for cells in answers.cells], student.trust, (7, 7), student.spread, student.channels
    )
    features = torch.stack(
        [
            torch.cat([space.features(space.side_by_side(part)) for part in zip(*blocks, strict=True)])
            for blocks in ([cells[view].split(_BLOCK) for cells in answers.cells] for view in range(2))
        ]
    )
    embeddings = joined(answers.embeddings, student.trust)
    # Frontal pictures lean towards the mean of their person's, profiles towards how the person looks from the front.
    frontal = _frontal(pictures)
    lean = torch.where(frontal, student.person, student.profile)
    for views in (features, embeddings):
        views.lerp_(_of_person(views, pictures.people, frontal), lean.view(-1, *[1] * (views.dim() - 2)))
    features /= features[:, chosen].square().mean().sqrt()
    return Sources(pictures, features.half(), F.normalize(embeddings, dim=2), chosen, held_out)


def _frontal(pictures: Pictures) -> Tensor:
    return torch.tensor([_PROFILE not in key for key in pictures.keys])


def _of_person(views: Tensor, people: Tensor, counted: Tensor) -> Tensor:
    """[2, N, ...] -> [N, ...]: the mean over all views of those of the person's pictures that count; over all of them
    where none does."""
    some = torch.zeros(int(people.max()) + 1, dtype=torch.bool).index_put_((people[counted],), torch.tensor(True))
    counted = counted | ~some[people]
    sums = torch.zeros(len(some), *views.shape[2:]).index_add_(0, people[counted], views.mean(0)[counted])
    counts = torch.bincount(people[counted], minlength=len(some)).view(-1, *[1] * (views.dim() - 2))
    return (sums / counts.clamp_min(1))[people]


def create(experiment: Experiment, progress: Callable[[str, int, int], None] | None = None) -> StudentTask:
    """The task of an experiment's file."""
    return StudentTask(load_sources(experiment, progress), experiment)


def _cosines(features: Tensor) -> Tensor:
    """[N, K, h, w] -> [h * w, N, N]: S between all pairs of faces, cell by cell."""
    unit = F.normalize(features, dim=1, eps=1e-6).flatten(2).permute(2, 0, 1)
    return torch.bmm(unit, unit.mT)


class CellEvidence(nn.Module):
    """How sure S makes one that two cells are one person's: logit = scale * S + shift, with weights of every place.

    Args:
        grid: h, w.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((grid[0] * grid[1],), 6.0))
        self.shift = nn.Parameter(torch.full((grid[0] * grid[1],), -2.0))

    def loss(self, features: Tensor, people: Tensor, faces: Tensor, seen: Tensor) -> Tensor:
        """Cross-entropy over all pairs of different faces and all cells.

        Cells come in four kinds: of one person or of two, in faces of one person or of two. Each kind counts alike,
        rare as swapped cells are: they tell whether a cell answers for its own pixels or for the face.

        Args:
            features: [N, K, h, w].
            people: int64 [N, h, w], whose each cell is.
            faces: int64 [N], whose each face is, but for what was pasted into it.
            seen: [N, h, w], 0 to 1; cells of which less than half is seen in either face do not count.
        """
        logits = self.scale[:, None, None] * _cosines(features) + self.shift[:, None, None]
        whose, there = people.flatten(1).T, seen.flatten(1).T > 0.5
        same, alike = whose[:, :, None] == whose[:, None], (faces[:, None] == faces)[None]
        counted = torch.triu(there[:, :, None] & there[:, None], 1)
        losses = F.binary_cross_entropy_with_logits(logits, same.to(logits.dtype), reduction="none")
        kinds = (same & alike, ~same & ~alike, ~same & alike, same & ~alike)
        counts = [(kind & counted).to(losses.dtype) for kind in kinds]
        return torch.stack([(losses * own).sum() / own.sum().clamp_min(1) for own in counts]).mean()


class _Student(nn.Module):
    """Body and head, and what only training needs."""

    def __init__(self, body: Recogniser, head: XCosHead, grid: tuple[int, int]) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.evidence = CellEvidence(grid)


def _cells_loss(features: Tensor, wanted: Tensor, seen: Tensor) -> Tensor:
    """Mean squared distance of S between all pairs of faces, cell by cell, to what is wanted of it.

    Args:
        features, wanted: [N, K, h, w].
        seen: of each cell [N, h, w], 0 to 1; what is covered in either face does not count.
    """
    first, second = torch.triu_indices(len(features), len(features), 1, device=features.device)
    apart = _cosines(features) - _cosines(wanted)
    both = torch.einsum("ip,jp->pij", seen.flatten(1), seen.flatten(1))
    return (apart.square() * both)[:, first, second].mean()


class StudentTask:
    """Trains a body and a head that exist already.

    Args:
        sources: pictures and what the teachers say.
        experiment: all settings.

    Raises:
        XCosError: settings that do not fit each other or the data.
    """

    def __init__(self, sources: Sources, experiment: Experiment) -> None:
        self.sources, self.experiment = sources, experiment
        model = load_model(experiment.student.start)
        head = cast(XCosHead, model.head)
        if not isinstance(model.backbone, Recogniser) or head.channels != experiment.student.channels:
            raise ConfigError(
                f"student.start: expected a model with {experiment.student.channels} channels, got {head.channels}"
            )
        self.module = _Student(model.backbone.requires_grad_(True), head.requires_grad_(True), (7, 7))
        self.module.train()
        self.module.head.eval()  # its batch norms, the attention's, have fixed statistics
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        #: The body's pass in training; a compiled one may take its place.
        self.grid: Callable[[Tensor], Tensor] = model.backbone.grid
        pictures, trained = sources.pictures, sources.trained
        self.frontal = _frontal(pictures)
        by_person: dict[int, list[int]] = {}
        for picture in trained.tolist():
            by_person.setdefault(int(pictures.people[picture]), []).append(picture)
        several = [torch.tensor(own) for own in by_person.values() if len(own) > 1]
        self.posed = [own for own in several if not self.frontal[own].all()]
        self.others = [own for own in several if self.frontal[own].all()]
        self.single = torch.tensor([own[0] for own in by_person.values() if len(own) == 1] or trained.tolist())
        if len(several) < 2:
            raise ConfigError(f"data.pictures: expected people with two pictures, got {len(several)}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything."""
        body = [group | {"muon": group["params"][0].dim() == 4} for group in weight_decay_groups(self.module.body)]
        rest = [*weight_decay_groups(self.module.head), *weight_decay_groups(self.module.evidence)]
        return [*body, *(group | {"muon": False} for group in rest)]

    # --- steps

    def _drawn(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures of a batch, three quarters in pairs of one person, and each one's twin in it.

        Those without a twin come first, where faces stay whole: it is in pairs that a pasted region tells most.
        """
        pairs = min((3 * size) // 8, len(self.posed) + len(self.others))
        posed = min(round(self.experiment.profiles * pairs), len(self.posed)) if self.others else pairs
        posed = max(posed, pairs - len(self.others))
        chosen = []
        for people, count in ((self.posed, posed), (self.others, pairs - posed)):
            for person in torch.randperm(len(people), generator=generator)[:count]:
                own = people[int(person)]
                chosen.append(own[torch.randperm(len(own), generator=generator)[:2]])
        paired = torch.stack(chosen)[torch.randperm(pairs, generator=generator)].flatten()
        single = size - 2 * pairs
        rest = torch.randint(len(self.single), (single,), generator=generator)
        twins = torch.arange(size)
        twins[single:] = single + (torch.arange(2 * pairs) ^ 1)
        return torch.cat((self.single[rest], paired)), twins

    def batch(self, index: BatchIndex, size: int) -> dict[str, Tensor]:
        """Altered faces, and what the teachers want to hear of them."""
        sources, alter = self.sources, self.experiment.alter
        generator = index.generator(own=True)

        def share(of: float) -> Tensor:
            return torch.rand(size, generator=generator) < of

        chosen, twins = self._drawn(size, generator)
        views = torch.randint(2, (size,), generator=generator)
        images = sources.pictures.images[chosen].float()
        images = torch.where(views.bool()[:, None, None, None], images.flip(3), images)
        aside = torch.nonzero(share(alter.turned) & self.frontal[chosen]).flatten()
        images[aside] = turned(images[aside], generator)
        # The first faces stay whole, so that pairs of one person are left for the loss on scores.
        first = 2 * ((3 * size) // 16)
        made = swapped(images[first:], twins[first:] - first, (7, 7), self.experiment.swaps, generator)
        images = torch.cat((images[:first], made.images))
        own = torch.arange(first)[:, None, None].expand(-1, 7, 7)
        owner = torch.cat((own, made.owner + first))
        whole = torch.cat((torch.ones(first, dtype=torch.bool), made.whole))
        images, there = cut(images, alter.cut, generator)
        images, seen = covered(images, alter.covered, generator)
        seen = seen * there
        images = shaded(shrunk(images, alter.small, generator), alter.dark, generator)
        bytes_ = images.clamp(0, 255).round().to(torch.uint8)
        far = share(alter.far) & whole
        moved = torch.empty_like(bytes_)
        for config, these in ((_LIGHT, ~whole), (_FAR, far), (_USUAL, whole & ~far)):
            moved[these] = augmented(bytes_[these], config, generator)
        # A cell's owner is asked for the cell as it is in the owner's whole face, so that neighbours do not tell.
        features = sources.features[views, chosen].float().flatten(2).transpose(1, 2)
        flat = owner.flatten(1)
        features = seen.flatten(1)[:, :, None] * features[flat, torch.arange(flat.shape[1])]
        people = sources.pictures.people[chosen]
        return {
            "images": compressed(moved, alter.jpeg, generator),
            "features": features.transpose(1, 2).unflatten(2, (7, 7)),
            "before": sources.features[views, chosen],
            "embeddings": sources.embeddings[views, chosen],
            "people": people[owner],
            "pasted": owner != torch.arange(size)[:, None, None],
            "faces": people,
            "whole": whole,
            "seen": seen,
        }

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The weighted sum and its parts."""
        weights, module = self.experiment.loss, self.module
        images = normalised(module.body, batch["images"]).contiguous(memory_format=torch.channels_last)
        grid = self.grid(images)
        with torch.autocast(images.device.type, enabled=False):
            features = module.head.features(grid.float().contiguous())
            whole = torch.nonzero(batch["whole"]).flatten()
            foreign = batch["people"] != batch["faces"][:, None, None]
            counts = torch.where(batch["pasted"], weights.pasted, 1.0)
            before, wanted_there = batch["before"].float(), batch["features"]
            leak = F.cosine_similarity(features, before, dim=1) - F.cosine_similarity(wanted_there, before, dim=1)
            apart = (features - batch["features"]).square().mean(1)
            parts = {
                "features": (counts * apart).sum() / counts.sum(),
                "leak": (leak.square() * foreign).sum() / foreign.sum().clamp_min(1),
                "cells": _cells_loss(features, batch["features"], batch["seen"]),
                "evidence": module.evidence.loss(features, batch["people"], batch["faces"], batch["seen"]),
                "pairs": teacher_loss(all_pairs(module.head, features[whole]), batch["embeddings"][whole]),
            }
        total = sum(getattr(weights, name) * value for name, value in parts.items())
        return cast(Tensor, total), {name: value.detach() for name, value in parts.items()}

    def describe(self) -> Mapping[str, Any]:
        """Settings, data and weights that a resumed training must share."""
        settings = dataclasses.asdict(self.experiment)
        return {
            **{name: settings[name] for name in ("task", "loss", "alter", "swaps", "profiles")},
            **{name: settings["student"][name] for name in ("trust", "spread", "channels", "person", "profile")},
            "pictures": self.sources.pictures.fingerprint,
            "trained": len(self.sources.trained),
        }

    # --- results

    def report(self) -> list[str]:
        """What was odd about the pictures, a line each."""
        return self.sources.pictures.report()

    @torch.no_grad()
    def _features(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Grid features of pictures as they are, on the CPU."""
        student = cast(_Student, module).eval()
        pictures = self.sources.pictures.images[chosen].permute(0, 2, 3, 1).numpy()
        return XCosModel(student.body, student.head).eval().features_of(list(pictures), _BATCH).cpu()

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """For each set among the people held out, 1 - EER over all pairs of its pictures: of frontal ones, and of
        frontal ones against profiles."""
        pictures, held_out = self.sources.pictures, self.sources.held_out
        sets = [pictures.names[int(person)].split("-", 1)[0] for person in pictures.people[held_out]]
        figures: dict[str, float] = {}
        for name in sorted(set(sets)):
            own = held_out[torch.tensor([one == name for one in sets])]
            features, people, frontal = self._features(module, own), pictures.people[own], self.frontal[own]
            templates = cast(_Student, module).head.templates(features, role="both")
            scores = cast(Tensor, xcos_matrix(templates, templates))
            sides = {name: (frontal, frontal), f"{name}_profile": (frontal, ~frontal)}
            for figure, (first, second) in sides.items():
                if not second.any():
                    continue
                chosen = scores[first][:, second]
                same = people[first][:, None] == people[second]
                keep = torch.ones_like(same)
                if second is first:
                    keep = torch.triu(keep, 1)
                if (same & keep).any() and (~same & keep).any():
                    figures[figure] = 1 - eer(chosen[keep].numpy(), same[keep].numpy()).rate
        return figures

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``model.safetensors``, calibrated on the people held out, set by set, where they are enough."""
        student = cast(_Student, module).eval()
        model = XCosModel(student.body, student.head, name=self.experiment.name).eval()
        pictures = self.sources.pictures
        own = self.sources.held_out[self.frontal[self.sources.held_out]]
        if len(own) > 1:
            names = [pictures.names[int(person)] for person in pictures.people[own]]
            sets = [name.split("-", 1)[0] for name in names]
            try:
                model.set_calibration(calibrate(model, self._features(module, own), names, domains=sets))
            except ValueError:  # too few people to tell a rate
                model.threshold = None
        path = folder / "model.safetensors"
        save_model(model, path)
        return [path]
