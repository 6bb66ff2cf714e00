"""Training a decoder: the picture of a face from what a frozen model keeps of it (docs/maps.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from recipes.mixing import mixed, warped
from xcos_ext.explain.explainers.interface import EmbeddingCosine, PairModel, XCosPairs
from xcos_ext.explain.reconstruction import FeatureDecoder, fingerprint_of, load_decoder, save_decoder
from xcos_ext.io.shipped import default_weights
from xcos_ext.model import load_model, load_recogniser
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.data import Pictures, read_pictures
from xcos_ext.training.settings import NONE, SETTINGS, ConfigError, TrainConfig
from xcos_ext.training.task import BatchIndex, weight_decay_groups
from xcos_ext.training.tasks.config import DataConfig
from xcos_ext.training.tasks.sources import held_out_people

__all__ = ["DecodeConfig", "DecodeTask", "DecoderConfig", "Experiment", "Judge", "create", "load_judged", "measure"]

_BATCH = 64  # pictures of a forward pass outside training
_SAMPLED = 2048  # pictures, of as many people, that means and scales come from, at most
_EVALUATED = 512  # held-out pictures in an evaluation at most
_DEEPER = (4, 8)  # maps of these shares of the picture's side are compared

# Altered so little that the picture stays one that is worth drawing.
_LIGHT = AugmentConfig(
    flip=0.5, rotate=3, scale=0.03, stretch=0.02, shift=0.01, brightness=0.15, contrast=0.15, saturation=0.2, gamma=0.1,
    tint=0.05, grey=0.03, blur=0, noise=0, patch=0,
)  # fmt: skip


@dataclass(frozen=True, config=SETTINGS)
class DecoderConfig:
    """What is decoded, and by what.

    Attributes:
        model: weights whose features are decoded; none: of the model that the package ships.
        features: ``"grid"``: of an xCos model; ``"embedding"``: of a recogniser with its output block.
        start: a decoder's file to start from, of the same form; none: random weights.
        widths: channels at 1, 2, 4 and 8 times the grid's size.
    """

    model: Annotated[str | None, NONE] = None
    features: Literal["grid", "embedding"] = "grid"
    start: Annotated[str | None, NONE] = None
    widths: tuple[PositiveInt, ...] = (192, 128, 64, 32)


@dataclass(frozen=True, config=SETTINGS)
class DecodeConfig:
    """A weighted sum of losses.

    Attributes:
        pixels: weight of the mean absolute difference of the pictures, RGB in 0..1.
        identity: weight of 1 - the cosine of what the model keeps of the drawn picture and of the real one.
        perceptual: weight of the squared distance of the model's own inner maps at a quarter and an eighth of the
            picture's side, in units of their variance.
        judged: share of each batch whose drawings the model looks at; the rest has pixels alone. For slow models.
    """

    pixels: float = Field(default=8.0, ge=0)
    identity: float = Field(default=0.5, ge=0)
    perceptual: float = Field(default=0.5, ge=0)
    judged: float = Field(default=1.0, gt=0, le=1)


@dataclass(frozen=True, config=SETTINGS)
class Experiment:
    """An experiment's file for ``task = "recipes.decode"``.

    Attributes:
        data, decoder, loss, train: tables of the file.
        task: this one.
        name: of the exported decoder.
    """

    data: DataConfig
    train: TrainConfig
    decoder: DecoderConfig = DecoderConfig()
    loss: DecodeConfig = DecodeConfig()
    task: Literal["recipes.decode"] = "recipes.decode"
    name: str = "decoder"


def create(experiment: Experiment, progress: Callable[[str, int, int], None] | None = None) -> DecodeTask:
    """The task of an experiment's file: reads model and pictures."""
    model = load_judged(experiment.decoder)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("reading", done, total)

    pictures = read_pictures(experiment.data.pictures, model.preprocessing.size, progress=tell)
    return DecodeTask(
        model,
        pictures,
        experiment.decoder,
        experiment.loss,
        held_out_people(experiment.data, pictures.names),
        name=experiment.name,
    )


def load_judged(config: DecoderConfig) -> PairModel:
    """The frozen model whose features are decoded.

    Raises:
        ConfigError: no file of an embedding's recogniser.
        ModelError: a file that cannot be used.
    """
    if config.features == "grid":
        return XCosPairs(load_model(default_weights() if config.model is None else config.model).requires_grad_(False))
    if config.model is None:
        raise ConfigError("decoder.model: expected weights of a recogniser whose embeddings are decoded, got nothing")
    return EmbeddingCosine(load_recogniser(config.model).requires_grad_(False))


class Judge:
    """A frozen model that looks at pictures: its feature, and its inner maps on the way to it.

    The inner maps are the last ones at a quarter and at an eighth of the picture's side, whatever the architecture.

    Args:
        model: of an xCos model or a recogniser, in evaluation mode.
    """

    def __init__(self, model: PairModel) -> None:
        self.model = model
        self.network = cast(nn.Module, model.module)  # type: ignore[attr-defined]
        if self.network.training:
            raise ValueError("model: expected evaluation mode, got training mode")
        self.network.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pixels = model.preprocessing
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
        self.taps: list[nn.Module] = []
        self._made: dict[nn.Module, Tensor] = {}
        for module in self._inner():
            module.register_forward_hook(self._keep)
            self.taps.append(module)

    def _keep(self, module: nn.Module, _: Any, made: Tensor) -> None:
        self._made[module] = made

    def _inner(self) -> list[nn.Module]:
        height, width = self.model.preprocessing.size
        last: dict[tuple[int, int], nn.Module] = {}

        def note(module: nn.Module, _: Any, made: Any) -> None:
            if isinstance(made, Tensor) and made.dim() == 4:
                last[(made.shape[2], made.shape[3])] = module

        hooks = [module.register_forward_hook(note) for module in self.network.modules()]
        try:
            with torch.no_grad():
                self.model.features(torch.zeros(1, 3, height, width))
        finally:
            for hook in hooks:
                hook.remove()
        return [last[size] for part in _DEEPER if (size := (height // part, width // part)) in last]

    def to(self, device: torch.device) -> Judge:
        """Moves the network."""
        if self.mean.device != device:
            self.network.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures, RGB in 0..1 [N, 3, H, W] -> features, fp32, and inner maps; differentiable."""
        images = ((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.model.features(images).float()
        maps = [self._made[module] for module in self.taps]
        self._made.clear()
        return features, maps

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of uint8 pictures [N, 3, H, W], some at a time."""
        return torch.cat([self(part.to(self.mean.device).float() / 255)[0] for part in images.split(_BATCH)])


class DecodeTask:
    """Trains a decoder on what a frozen model keeps of pictures, altered lightly and mixed with one another.

    Mean and scale of the features and the mean face come from one picture each of the people trained on.

    Args:
        model: whose features are decoded.
        pictures: of the size that it expects.
        decoder: which decoder.
        loss: the losses' weights.
        held_out: people not to train on.
        name: of the exported decoder.

    Raises:
        ConfigError: a start of another form, or nobody to train on.
        ValueError: pictures whose side is not 16 times the grid's.
    """

    def __init__(
        self,
        model: PairModel,
        pictures: Pictures,
        decoder: DecoderConfig,
        loss: DecodeConfig,
        held_out: set[str],
        *,
        name: str = "decoder",
    ) -> None:
        self.judge, self.pictures, self.decoder_config, self.config = Judge(model), pictures, decoder, loss
        self.held_out = pictures.of_people(held_out)
        mask = torch.ones(len(pictures), dtype=torch.bool)
        mask[self.held_out] = False
        self.trained = torch.nonzero(mask).flatten()
        if len(self.trained) < 2:
            raise ConfigError(f"data: expected at least two pictures to train on, got {len(self.trained)}")
        firsts = torch.cat((torch.tensor([True]), pictures.people[self.trained].diff() != 0))
        sample = self.trained[firsts][:_SAMPLED]
        features = self.judge.features(pictures.images[sample])
        made = FeatureDecoder(features.shape[1:], fingerprint=fingerprint_of(model), widths=decoder.widths, name=name)
        if made.picture_size != tuple(pictures.images.shape[2:]):
            raise ValueError(
                f"model: expected one whose pictures have 16 times its grid's side, {made.picture_size}, got "
                f"{tuple(pictures.images.shape[2:])}"
            )
        if decoder.start is not None:
            _take_weights(made, decoder.start)
        made.mean.copy_(features.mean(0))
        made.scale.copy_(features.std(0).clamp_min(1e-3 * float(features.std())))
        made.mean_face.copy_(pictures.images[sample].float().mean(0) / 255)
        with torch.no_grad():
            maps = self.judge(pictures.images[sample[:_BATCH]].float() / 255)[1]
        self.variances = [float(m.float().var(0).mean()) for m in maps]
        self.module = made.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The convolutions' kernels for Muon where the engine has it."""
        inner = weight_decay_groups(self.module.stages)
        outer = [*weight_decay_groups(self.module.enter), *weight_decay_groups(self.module.leave)]
        return [
            *(group | {"muon": group["params"][0].dim() == 4} for group in inner),
            *(group | {"muon": False} for group in outer),
        ]

    def batch(self, index: BatchIndex, size: int) -> Tensor:
        """Faces of the people trained on, some of them mixtures: uint8 [n, 3, H, W]."""
        generator = index.generator(own=True)
        chosen, partners = (self.trained[torch.randint(len(self.trained), (size,), generator=generator)] for _ in "ab")
        images = self.pictures.images
        faces = warped(mixed(images[chosen].float(), images[partners].float(), generator), generator)
        return augmented(faces.clamp(0, 255).to(torch.uint8), _LIGHT, generator)

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The weighted sum and its parts."""
        config, judge = self.config, self.judge.to(batch.device)
        wanted = batch.float() / 255
        with torch.no_grad():
            features, maps = judge(wanted)
        drawn = self.module(features)
        parts = {"pixels": (drawn - wanted).abs().mean()}
        total = config.pixels * parts["pixels"]
        if config.identity > 0 or config.perceptual > 0:
            count = max(1, round(config.judged * len(batch)))
            again, drawn_maps = judge(drawn[:count])
            parts["identity"] = 1 - _cosine(again, features[:count]).mean()
            distances = [
                (made.float() - real[:count].float()).square().mean() / variance
                for made, real, variance in zip(drawn_maps, maps, self.variances, strict=True)
            ]
            parts["perceptual"] = torch.stack(distances).mean() if distances else drawn.new_zeros(())
            total = total + config.identity * parts["identity"] + config.perceptual * parts["perceptual"]
        return total, {name: value.detach() for name, value in parts.items()}

    def describe(self) -> Mapping[str, Any]:
        """Settings, data and model that a resumed training must share."""
        return {
            "task": "recipes.decode",
            "decoder": dataclasses.asdict(self.decoder_config) | {"model": self.module.fingerprint},
            "loss": dataclasses.asdict(self.config),
            "pictures": self.pictures.fingerprint,
            "trained": len(self.trained),
            "held_out": len(self.held_out),
        }

    def report(self) -> list[str]:
        """What was odd about the pictures, a line each."""
        return self.pictures.report()

    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """Figures of :func:`measure` on held-out pictures; empty without any."""
        step = -(-len(self.held_out) // _EVALUATED) or 1
        chosen = self.held_out[::step]
        if not len(chosen):
            return {}
        decoder = cast(FeatureDecoder, module).eval()
        return {
            name: value
            for name, value in measure(decoder, self.judge, self.pictures.images[chosen]).items()
            if not name.startswith("mean face")
        }

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``decoder.safetensors``."""
        path = folder / "decoder.safetensors"
        save_decoder(cast(FeatureDecoder, module), path)
        return [path]


def _take_weights(decoder: FeatureDecoder, file: str) -> None:
    """Weights of a decoder's file of the same form; means and scales are those of the new model's features."""
    start = load_decoder(file)
    if (start.shape, start.widths) != (decoder.shape, decoder.widths):
        raise ConfigError(
            f"decoder.start: expected a decoder of features {decoder.shape} with widths {decoder.widths}, got "
            f"{start.shape} with {start.widths}"
        )
    decoder.load_state_dict(start.state_dict())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


@torch.no_grad()
def measure(
    decoder: FeatureDecoder, judge: Judge, images: Tensor, *, threshold: float | None = None
) -> dict[str, float]:
    """How much of pictures is in what the model kept of them, beside the mean face as a control.

    Args:
        decoder: in evaluation mode.
        judge: the model whose features it reads.
        images: uint8 [N, 3, H, W], of people that it was not trained on.
        threshold: decision threshold; None: the model's own, or no figure on decisions where it has none.

    Returns:
        ``l1`` (RGB in 0..1), ``psnr`` (dB, mean over pictures), ``identity`` (cosine of the features of drawing and
        picture), ``score`` (the model's similarity of both), ``verified`` (share with score >= threshold), and the same
        with ``mean face`` before each, for the mean face instead of the drawing.
    """
    threshold = judge.model.threshold if threshold is None else threshold
    judge.to(decoder.mean.device)
    sums: dict[str, float] = {}
    for part in images.split(_BATCH):
        real = part.to(decoder.mean.device).float() / 255
        features = judge(real)[0]
        drawings = {"": decoder(features).clamp(0, 1), "mean face ": decoder.mean_face.expand_as(real)}
        for name, drawn in drawings.items():
            again = judge(drawn)[0]
            score = judge.model.score(features, again)
            values = {
                "l1": (drawn - real).abs().mean((1, 2, 3)),
                "psnr": -10 * (drawn - real).square().mean((1, 2, 3)).clamp_min(1e-10).log10(),
                "identity": _cosine(again, features),
                "score": score,
            }
            if threshold is not None:
                values["verified"] = (score >= threshold).float()
            for key, value in values.items():
                sums[name + key] = sums.get(name + key, 0.0) + float(value.double().sum())
    return {name: value / len(images) for name, value in sums.items()}
