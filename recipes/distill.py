"""Training a small model from nothing but a teacher's words on altered faces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipes.bank import Answers, Bank, BankConfig, open_bank, teacher_answers
from recipes.swaps import CellEvidence, SwapConfig, swapped
from xcos_ext.backbones import CompactNet, Recogniser
from xcos_ext.evaluation import calibrate, verification
from xcos_ext.evaluation.datasets import Pair, read_pairs
from xcos_ext.io.errors import XCosError
from xcos_ext.model import (
    XCosAttention,
    XCosHead,
    XCosModel,
    load_model,
    load_recogniser,
    plug,
    plug_statistics,
    save_model,
)
from xcos_ext.model.projection import CellProjection
from xcos_ext.ops import xcos_matrix, xcos_score
from xcos_ext.ops.templates import Templates
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.data import Pictures, normalised, read_pictures
from xcos_ext.training.losses import all_pairs, teacher_loss
from xcos_ext.training.sampling import IdentityBatches
from xcos_ext.training.settings import NONE, SETTINGS, ConfigError, TrainConfig
from xcos_ext.training.task import BatchIndex, weight_decay_groups
from xcos_ext.training.tasks.config import DataConfig
from xcos_ext.training.tasks.sources import fix_statistics, held_out_people

__all__ = [
    "DistillConfig",
    "DistillSources",
    "DistillTask",
    "Experiment",
    "StudentConfig",
    "create",
    "load_distillation",
]

_BATCH = 64  # pictures of a forward pass outside training
_EVIDENCE_RATE = 5.0  # of learning the cells' scale and shift, times the rate of the rest


# Swapped faces are altered after the swap, so little that cells stay where they are.
_LIGHT = AugmentConfig(
    flip=0, rotate=1, scale=0.01, stretch=0.01, shift=0.01, brightness=0.2, contrast=0.2, saturation=0.3, gamma=0.2,
    tint=0.08, grey=0.05, blur=0.1, noise=2, patch=0,
)  # fmt: skip


@dataclass(frozen=True, config=SETTINGS)
class StudentConfig:
    """The model to train, and its teacher.

    Attributes:
        teacher: weights of the recogniser that teaches, through its closed form.
        start: a model of the same form to start from; none: random weights.
        spread: of the teacher's closed form, in cells.
        channels: of the grid feature: principal axes kept of every cell of the teacher's.
        attention: ``"norm"``, or ``"residual"``: its learned correction.
        hidden: channels inside the attention network.
        symmetric: attention averaged over both orders of the faces.
    """

    teacher: str
    start: Annotated[str | None, NONE] = None
    spread: float = Field(default=0.7, ge=0)
    channels: int = Field(default=32, ge=1)
    attention: Literal["norm", "residual"] = "residual"
    hidden: int = Field(default=16, ge=1)
    symmetric: bool = True


@dataclass(frozen=True, config=SETTINGS)
class DistillConfig:
    """A weighted sum of losses.

    Attributes:
        features: weight of the squared distance to the teacher's grid feature, in units of its variance.
        pairs: weight of L_cos over all pairs of a batch: squared distance of the score to the teacher's plain cosine.
        hints: weight of the squared distance to the teacher's inner maps, in units of their variance, through a 1x1
            convolution that is not kept; it falls to 0 along a line.
        hints_until: share of the steps at which it gets there.
        attention_from: share of the steps after which the attention's correction is trained; before, W is the norm
            attention, for there is nothing to attend to yet.
    """

    features: float = Field(default=1.0, ge=0)
    pairs: float = Field(default=10.0, ge=0)
    hints: float = Field(default=1.0, ge=0)
    hints_until: float = Field(default=0.8, gt=0, le=1)
    attention_from: float = Field(default=0.6, ge=0, le=1)


@dataclass(frozen=True, config=SETTINGS)
class Experiment:
    """An experiment's file for ``task = "recipes.distill"``.

    Attributes:
        data, student, bank, loss, swaps, train: tables of the file.
        task: this one.
        name: of the exported model.
    """

    data: DataConfig
    student: StudentConfig
    train: TrainConfig
    bank: BankConfig = BankConfig()
    loss: DistillConfig = DistillConfig()
    swaps: SwapConfig = SwapConfig()
    task: Literal["recipes.distill"] = "recipes.distill"
    name: str = "xcos-compact"


def create(experiment: Experiment, progress: Callable[[str, int, int], None] | None = None) -> DistillTask:
    """The task of an experiment's file: reads the pictures and reads or makes the bank."""
    sources = load_distillation(
        experiment.data, experiment.student, experiment.bank, experiment.swaps, progress=progress
    )
    return DistillTask(
        sources,
        experiment.student,
        experiment.loss,
        experiment.data,
        experiment.swaps,
        steps=experiment.train.steps,
        seed=experiment.train.seed,
        name=experiment.name,
    )


@dataclasses.dataclass
class DistillSources:
    """Attributes: the plugged teacher in evaluation mode, pictures, their bank, the pairs to evaluate on, and what the
    teacher says of the pictures, where faces with swapped regions are wanted."""

    teacher: XCosModel
    pictures: Pictures
    bank: Bank
    pairs: list[Pair]
    answers: Answers | None = None


def load_distillation(
    data: DataConfig,
    student: StudentConfig,
    bank: BankConfig,
    swaps: SwapConfig = SwapConfig(),  # noqa: B008
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> DistillSources:
    """Read teacher and pictures, and read or make the bank.

    With a pairs file, the teacher's mean and axes come from the people who are in no pair of it, and faces are mixed
    within a fold: whichever folds are held out, nothing of their people reaches the student.

    Args:
        data: which pictures, and where the bank is kept.
        student: which teacher.
        bank: its size.
        swaps: whether what the teacher says of the pictures is wanted.
        progress: called with what is done, items done and items in all.
    """

    def tell(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    recogniser = load_recogniser(student.teacher).requires_grad_(False)
    pictures = read_pictures(data.pictures, recogniser.preprocessing.size, progress=tell("reading"))
    try:
        pairs = [] if data.pairs is None else read_pairs(data.pairs)
    except (OSError, ValueError) as error:
        raise XCosError(f"data.pairs: {error}") from error
    fold_of = {person: pair.fold + 1 for pair in pairs for person in (pair.person_a, pair.person_b)}
    groups = torch.tensor([fold_of.get(name, 0) for name in pictures.names])
    free = torch.nonzero((groups[pictures.people] == 0) if (groups == 0).any() else torch.ones(len(pictures))).flatten()
    first = np.unique(pictures.people[free].numpy(), return_index=True)[1]
    faces = pictures.images[free[torch.from_numpy(first)]].permute(0, 2, 3, 1).numpy()
    statistics = plug_statistics(recogniser, [faces], project=student.channels, spread=student.spread)
    teacher = plug(recogniser, statistics=statistics, project=student.channels, spread=student.spread)
    made = open_bank(teacher, pictures, groups, bank, Path(data.cache), progress=tell("asking the teacher"))
    answers = None
    if swaps.people:
        answers = teacher_answers(
            teacher, pictures, Path(data.cache), amp=bank.amp, progress=tell("asking about whole faces")
        )
    return DistillSources(teacher, pictures, made, pairs, answers)


class _Student(nn.Module):
    """Body and head, which are kept; the convolutions that make the teacher's inner maps of the body's; with swapped
    faces, the evidence of cells."""

    def __init__(
        self,
        body: CompactNet,
        head: XCosHead,
        hints: Mapping[str, tuple[int, int]],
        evidence: CellEvidence | None,
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head
        # torch allows no dots in names
        self.hints = nn.ModuleDict(
            {name.replace(".", "_"): nn.Conv2d(cin, cout, 1) for name, (cin, cout) in hints.items()}
        )
        self.evidence = evidence


class DistillTask:
    """Trains a small body and an xCos head to say what a teacher says.

    A student sees altered faces and mixtures of faces, and learns the teacher's grid feature of each, its inner maps,
    and its cosine for every pair of a batch. Labels are used only to draw batches in which some faces are alike. With
    ``swaps`` it also sees the pictures themselves, some with a region of another (:mod:`recipes.swaps`), and
    learns whose each cell is.

    Args:
        sources: teacher, pictures, bank.
        student: the model.
        config: weights of the losses.
        data: whom to hold out.
        swaps: faces with swapped regions.
        steps: of the whole training, for the schedules of the losses.
        seed: of random weights.
        name: of the exported model.

    Raises:
        XCosError: settings that do not fit each other or the data.
    """

    def __init__(
        self,
        sources: DistillSources,
        student: StudentConfig,
        config: DistillConfig,
        data: DataConfig,
        swaps: SwapConfig = SwapConfig(),  # noqa: B008
        *,
        steps: int,
        seed: int = 0,
        name: str = "xcos-compact",
    ) -> None:
        self.sources, self.student, self.config, self.steps, self.seed, self.name = (
            sources, student, config, steps, seed, name,
        )  # fmt: skip
        self.swaps = swaps
        pictures, bank = sources.pictures, sources.bank
        held_out = held_out_people(data, pictures.names)
        self.held_out = pictures.of_people(held_out)
        allowed = torch.ones(len(pictures), dtype=torch.bool)
        allowed[self.held_out] = False
        self.trained = torch.nonzero(allowed[bank.first] & allowed[bank.second]).flatten()
        self.people = pictures.people[bank.first]
        self.pairs = [pair for pair in sources.pairs if {pair.person_a, pair.person_b} <= held_out]
        self._drawn: IdentityBatches | None = None
        self._embeddings: Tensor | None = None
        some = self.trained[:: max(1, len(self.trained) // 2048)]
        self.variance = float(bank.features[some].float().var(0).mean())
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            body = CompactNet()
            attention: Any = "norm"
            if student.attention == "residual":
                attention = XCosAttention(student.channels, student.hidden, symmetric=student.symmetric, residual=True)
            projection = CellProjection(body.grid_shape, student.channels, separable=False, spread=False)
            nn.init.zeros_(projection.weight)  # no feature is a better guess than a random one
            head = XCosHead(body.grid_shape[0], student.channels, attention=attention, projection=projection)
            if student.start is not None:
                _take_weights(body, head, student.start)
            self.taps = self._matched(body, bank)
            taps = {hint: (cin, bank.hints[hint].shape[1]) for hint, (_, cin) in self.taps.items()}
            self.module = _Student(body, head, taps, CellEvidence(body.grid_shape[1:]) if swaps.people else None)
        self._faces: IdentityBatches | None = None
        if swaps.people:
            if sources.answers is None:
                raise ConfigError("swaps.people: expected sources that were loaded for swapped faces")
            everyone = torch.ones(len(pictures), dtype=torch.bool)
            everyone[self.held_out] = False
            chosen = torch.nonzero(everyone).flatten()
            self._faces = IdentityBatches(pictures.people, chosen, swaps.people, 2, swaps.others)
        self.centres = {hint: _centre(values[some]) for hint, values in bank.hints.items()}
        self.module.train()
        self.module.head.eval()  # its batch norms, the attention's, have fixed statistics
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _matched(body: CompactNet, bank: Bank) -> dict[str, tuple[int, int]]:
        """For each hint the number and the channels of the body's map of the same size."""
        with torch.no_grad():
            maps = body.eval().maps(torch.zeros(1, 3, *body.preprocessing.size))
        taps = {}
        for name, values in bank.hints.items():
            fitting = [i for i, made in enumerate(maps) if made.shape[2:] == values.shape[2:]]
            if not fitting:
                sizes = ", ".join("x".join(map(str, made.shape[2:])) for made in maps)
                raise ConfigError(
                    f"bank.hints: expected modules whose outputs have one of the sizes {sizes}, got {name} with "
                    f"{'x'.join(map(str, values.shape[2:]))}"
                )
            taps[name] = fitting[0], maps[fitting[0]].shape[1]
        return taps

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Kernels for Muon where the engine has it; the cells' matrices and the attention as usual."""
        groups = []
        for part in (self.module.body, self.module.hints):
            for group in weight_decay_groups(part):
                groups.append(group | {"muon": group["params"][0].dim() == 4 and part is self.module.body})
        groups += [group | {"muon": False} for group in weight_decay_groups(self.module.head)]
        if self.module.evidence is not None:
            # Its two numbers a cell are of another size than weights are.
            parameters = list(self.module.evidence.parameters())
            groups.append({"params": parameters, "rate_scale": _EVIDENCE_RATE, "weight_decay": 0.0, "muon": False})
        return groups

    # --- steps

    def batch(self, index: BatchIndex, size: int) -> dict[str, Any]:
        """Pairs of altered faces made of the same person, and what the teacher says of each."""
        bank = self.sources.bank
        generator = index.generator(own=True)
        chosen = self._identities(size).draw(generator)
        made = {
            "images": bank.images[chosen],
            "features": bank.features[chosen],
            "embeddings": F.normalize(bank.embeddings[chosen].float()),
            "hints": {name: values[chosen] for name, values in bank.hints.items()},
            "step": index.step,
        }
        return made if self._faces is None else made | {"swaps": self._swapped(self._faces.draw(generator), generator)}

    def _swapped(self, chosen: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures, mirrored or not, moved and recoloured a little, some with a region of another; what is known of
        their cells."""
        pictures, answers, grid = (
            self.sources.pictures,
            cast(Answers, self.sources.answers),
            self.module.body.grid_shape[1:],
        )
        views = torch.randint(2, (len(chosen),), generator=generator)
        images = pictures.images[chosen].float()
        images = torch.where(views.bool()[:, None, None, None], images.flip(3), images)
        twins = torch.arange(len(chosen))
        pairs = 2 * self.swaps.people
        twins[:pairs] = twins[:pairs] ^ 1
        faces = swapped(images, twins, grid, self.swaps, generator)
        # A cell's owner is one face; what is taken of it is that cell.
        features, rows, columns = answers.features[views, chosen], torch.arange(grid[0]), torch.arange(grid[1])
        return {
            "images": augmented(faces.images.clamp(0, 255).round().to(torch.uint8), _LIGHT, generator),
            "features": features[faces.owner, :, rows[:, None], columns].permute(0, 3, 1, 2),
            "embeddings": answers.embeddings[views, chosen],
            "people": pictures.people[chosen][faces.owner],
            "faces": pictures.people[chosen],
            "whole": faces.whole,
        }

    def _identities(self, size: int) -> IdentityBatches:
        if size % 2:
            raise ConfigError(f"train.batch: expected an even number of faces in each part of a batch, got {size}")
        if self._drawn is None or len(self._drawn) != size:
            self._drawn = IdentityBatches(self.people, self.trained, size // 2, 2)
        return self._drawn

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The weighted sum and its parts."""
        config, module = self.config, self.module
        progress = batch["step"] / self.steps
        swaps, count = batch.get("swaps"), len(batch["images"])
        images = batch["images"] if swaps is None else torch.cat((batch["images"], swaps["images"]))
        images = normalised(module.body, images).contiguous(memory_format=torch.channels_last)
        maps = module.body.maps(images)
        parts: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            grid = maps[-1].float().contiguous()
            everything = module.head.features(grid)
            features = everything[:count]
            parts["features"] = (features - batch["features"].float()).square().mean() / self.variance
            if (
                batch["step"] == self._attention_from
                and module.head.attention is not None
                and self.student.start is None
            ):
                fix_statistics(module.head, grid[:count].detach(), self.seed)
            parts["pairs"] = teacher_loss(self._scores(features, batch["step"]), batch["embeddings"])
            total = config.features * parts["features"] + config.pairs * parts["pairs"]
            if swaps is not None:
                total = total + self._swap_loss(everything[count:], swaps, batch["step"], parts)
        maps = tuple(made[:count] for made in maps)
        weight = config.hints * max(0.0, 1 - progress / config.hints_until)
        for name, (number_, _) in self.taps.items():
            if weight > 0:
                mean, variance = self.centres[name]
                made = module.hints[name.replace(".", "_")](maps[number_]).float()
                wanted = batch["hints"][name].float() - mean.to(made.device)
                parts[name] = (made - wanted).square().mean() / variance
                total = total + weight * parts[name]
            else:  # every parameter takes part in every loss
                total = total + 0.0 * sum(p.sum() for p in module.hints.parameters())
        return total, {name: value.detach() for name, value in parts.items()}

    def _swap_loss(self, features: Tensor, swaps: dict[str, Tensor], step: int, parts: dict[str, Tensor]) -> Tensor:
        """The weighted losses over faces with swapped regions, noted in ``parts``."""
        config, evidence = self.swaps, cast(CellEvidence, self.module.evidence)
        whole = swaps["whole"]
        parts["swapped"] = (features - swaps["features"].float()).square().mean() / self.variance
        parts["cells"] = evidence.loss(features, swaps["people"], swaps["faces"])
        total = config.features * parts["swapped"] + config.cells * parts["cells"]
        if int(whole.sum()) > 1:
            parts["whole"] = teacher_loss(self._scores(features[whole], step), swaps["embeddings"][whole])
            total = total + config.pairs * parts["whole"]
        return total

    @property
    def _attention_from(self) -> int:
        """Step from which the attention's correction is trained."""
        return round(self.config.attention_from * self.steps) if self.student.start is None else 0

    def _scores(self, features: Tensor, step: int) -> Tensor:
        """All pairs; W is norm attention until its correction is trained."""
        head = self.module.head
        if head.attention is None or step < self._attention_from:
            templates = Templates.from_features(features, None, "norm")
            scores = xcos_matrix(templates, templates)
            if head.attention is not None:
                scores = scores + 0.0 * sum(p.sum() for p in head.attention.parameters())
            return scores
        return all_pairs(head, features)

    def describe(self) -> Mapping[str, Any]:
        """Settings, data and weights that a resumed training must share."""
        return {
            "task": "recipes.distill",
            "student": dataclasses.asdict(self.student),
            "loss": dataclasses.asdict(self.config),
            "swaps": dataclasses.asdict(self.swaps),
            "teacher": self.sources.teacher.fingerprint(),
            "pictures": self.sources.pictures.fingerprint,
            "bank": len(self.sources.bank),
            "trained": len(self.trained),
            "held_out": len(self.held_out),
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
        """Verification on the pairs of the folds held out; empty without pairs."""
        if not self.pairs:
            return {}
        places = {key.rsplit(".", 1)[0]: i for i, key in enumerate(self.sources.pictures.keys)}
        ends = [
            (
                places[f"{p.person_a}/{p.person_a}_{p.number_a:04d}"],
                places[f"{p.person_b}/{p.person_b}_{p.number_b:04d}"],
            )
            for p in self.pairs
        ]
        used, local = np.unique(np.array(ends), return_inverse=True)
        a, b = torch.from_numpy(local.reshape(-1, 2)).unbind(1)
        features = self._features(module, torch.from_numpy(used))
        genuine, folds = np.array([p.genuine for p in self.pairs]), np.array([p.fold for p in self.pairs])
        teacher = self._teacher(torch.from_numpy(used))
        cosines = (teacher[a] * teacher[b]).sum(1).numpy()
        figures = {}
        head = cast(_Student, module).head
        norm = cast(Tensor, xcos_score(features[a], features[b], "norm"))
        own = cast(Tensor, head.score(features[a], features[b])) if head.attention is not None else norm
        for name, scores in (("", own), ("norm_", norm)):
            report = verification(scores.numpy(), genuine, folds if len(np.unique(folds)) > 1 else None)
            if report.accuracy is not None:
                figures[f"{name}accuracy"] = report.accuracy.mean
            figures[f"{name}auc"] = report.auc
        return figures | {"correlation": float(np.corrcoef(own.numpy(), cosines)[0, 1])}

    def _teacher(self, chosen: Tensor) -> Tensor:
        """The teacher's unit embeddings of pictures, computed once."""
        if self._embeddings is None:
            made = []
            for part in chosen.split(_BATCH):
                images = self.sources.pictures.images[part]
                made.append(self.sources.teacher.backbone(normalised(self.sources.teacher.backbone, images)))  # type: ignore[arg-type]
            self._embeddings = F.normalize(torch.cat(made))
        return self._embeddings

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``model.safetensors``, calibrated on the people held out, where they are enough."""
        student = cast(_Student, module).eval()
        model = XCosModel(student.body, student.head, name=self.name).eval()
        people = self.sources.pictures.people[self.held_out]
        if len(self.held_out) > 1:
            names = [self.sources.pictures.names[int(person)] for person in people]
            try:
                model.set_calibration(calibrate(model, self._features(module, self.held_out), names))
            except ValueError:  # too few people to tell a rate
                model.threshold = None
        path = folder / "model.safetensors"
        save_model(model, path)
        return [path]


def _take_weights(body: Recogniser, head: XCosHead, file: str) -> None:
    """Weights of a model file of the same form.

    Raises:
        ConfigError: another form.
    """
    model = load_model(file)
    if model.architecture != body.architecture or model.head.config() != head.config():
        raise ConfigError(
            f"student.start: expected a model with body {body.architecture!r} and head {head.config()}, got "
            f"{model.architecture!r} and {model.head.config()}"
        )
    body.load_state_dict(model.backbone.state_dict())
    head.load_state_dict(model.head.state_dict())


def _centre(values: Tensor) -> tuple[Tensor, float]:
    """Mean of each channel [1, C, 1, 1], and the variance around it over everything."""
    values = values.float()
    mean = values.mean((0, 2, 3), keepdim=True)
    return mean, float((values - mean).square().mean())
