"""Training a head together with the body below it, drawn to what the recogniser said before."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosHead, XCosModel, save_model

from .augment import augmented
from .cache import normalised
from .head_config import BodyConfig, HeadExperiment
from .head_task import HeadTask, Sources, calibrate_on, combined_loss, held_out_people, load_sources, verify
from .seeds import BatchIndex
from .task import weight_decay_groups

__all__ = ["Experiment", "ModelTask", "create"]

#: The settings of this task's experiments.
Experiment = HeadExperiment


class _Trained(nn.Module):
    def __init__(self, body: Recogniser, head: XCosHead, margin: nn.Module | None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.margin = margin


class ModelTask:
    """Trains a head and the recogniser's body, at a small rate, on altered pictures.

    The teacher is the recogniser as it was. It is never run while training: its embeddings of the unaltered pictures
    were computed once, in evaluation mode, with the maps. Batch norms of the body keep the statistics that they have,
    those of the head the ones measured at the start; all weights are trained. The body's output block takes no part and
    stays as it is.

    Args:
        start: the head's task, whose head, data and losses are taken over.
        body: how the body is trained.
    """

    def __init__(self, start: HeadTask, body: BodyConfig) -> None:
        self.start, self.body_config = start, body
        recogniser = start.sources.recogniser
        trained = copy.deepcopy(recogniser).eval().requires_grad_(True)
        for name, parameter in trained.named_parameters():
            if name.startswith(trained.output_prefixes):
                parameter.requires_grad_(False)
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = _Trained(trained, start.module.head, start.module.margin)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head's groups, and the body's at its own rate."""
        return [
            *self.start.parameter_groups(),
            *weight_decay_groups(self.module.body, rate_scale=self.body_config.rate_scale),
        ]

    def batch(self, index: BatchIndex, size: int) -> dict[str, Tensor]:
        """Altered pictures of one part, and the teacher's embeddings of them as they are."""
        drawn = self.start.draw(index, size)
        sources = self.start.sources
        generator = index.generator(2, own=True)
        made = {
            "images": augmented(sources.pictures.images[drawn.pictures], self.body_config.augment, generator),
            **self.start.labelled(drawn.pictures, drawn.generator),
        }
        if sources.maps.embeddings is not None:
            made["embeddings"] = sources.maps.embeddings[0, drawn.pictures]
        return made

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The head's losses; in lower precision, where it is asked for, only the body computes."""
        module, config = self.module, self.start.config
        if module.body.training or module.head.training:
            raise XCosError("model: expected body and head in evaluation mode, which fixes batch norms' statistics")
        images = normalised(module.body, batch["images"]).contiguous(memory_format=torch.channels_last)
        grid = module.body.grid(images)
        with torch.autocast(grid.device.type, enabled=False):
            features = module.head.features(grid.float().contiguous())
            total, parts = combined_loss(config, self.start.contrast, module.head, module.margin, features, batch)
            return self.start.anchored(total, parts)

    def describe(self) -> Mapping[str, Any]:
        """The head's settings, and the body's."""
        return {**self.start.describe(), "task": "model", "body": dataclasses.asdict(self.body_config)}

    def report(self) -> list[str]:
        """As :meth:`HeadTask.report`."""
        return self.start.report()

    @torch.no_grad()
    def features(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Grid features of pictures, on the CPU."""
        trained = cast(_Trained, module)
        device = next(trained.parameters()).device
        images = self.start.sources.pictures.images
        return torch.cat(
            [
                trained.head.features(trained.body.grid(normalised(trained.body, images[part].to(device)))).cpu()
                for part in chosen.split(64)
            ]
        )

    def evaluate(self, module: nn.Module) -> Mapping[str, float]:
        """As :meth:`HeadTask.evaluate`."""
        return verify(self.start, cast(_Trained, module).head, lambda chosen: self.features(module, chosen))

    def model(self, module: nn.Module) -> XCosModel:
        """Body and head, not calibrated."""
        trained = copy.deepcopy(cast(_Trained, module)).cpu()
        return XCosModel(trained.body, trained.head, name=self.start.name).eval()

    def export(self, module: nn.Module, folder: Path) -> list[Path]:
        """``model.safetensors``: body and head, for ``xcos_ext.load_model``."""
        model = self.model(module)
        calibrate_on(model, self.start, lambda chosen: self.features(module, chosen))
        path = folder / "model.safetensors"
        save_model(model, path)
        return [path]


def create(experiment: HeadExperiment, progress: Callable[[str, int, int], None] | None = None) -> ModelTask:
    """The task of an experiment's file: reads the pictures and computes the maps that the head starts from."""
    sources: Sources = load_sources(experiment.data, experiment.model, progress=progress)
    start = HeadTask(
        sources,
        experiment.model,
        experiment.loss,
        held_out_people(experiment.data, sources.pictures.names),
        batch=experiment.train.part_size(1),
        seed=experiment.train.seed,
        name=experiment.name,
    )
    return ModelTask(start, experiment.body)
