"""Training a head together with the body below it, drawn to what the recogniser said before."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from xcos_ext.backbones import Recogniser
from xcos_ext.io.errors import XCosError

from ..augment import augmented
from ..data import normalised
from ..task import BatchIndex, weight_decay_groups
from .config import BodyConfig, HeadExperiment, LossConfig, ModelConfig
from .head import HeadTask, Trained
from .sources import Sources, held_out_people, load_sources

__all__ = ["Experiment", "ModelTask", "create"]

#: The settings of this task's experiments.
Experiment = HeadExperiment


class ModelTask(HeadTask):
    """Trains a head and the recogniser's body, at a small rate, on altered pictures.

    The teacher is the recogniser as it was. It is never run while training: its embeddings of the unaltered pictures
    were computed once, in evaluation mode, with the maps. Batch norms of the body keep the statistics that they have,
    those of the head the ones measured at the start; all weights are trained. The body's output block takes no part and
    stays as it is.

    Args:
        sources, model, loss, held_out, options: as of :class:`HeadTask`.
        body: how the body is trained.
    """

    def __init__(
        self,
        sources: Sources,
        model: ModelConfig,
        loss: LossConfig,
        held_out: set[str] = frozenset(),  # type: ignore[assignment]
        *,
        body: BodyConfig,
        **options: Any,
    ) -> None:
        super().__init__(sources, model, loss, held_out, **options)
        self.body_config = body
        trained = copy.deepcopy(sources.recogniser).eval().requires_grad_(True)
        for name, parameter in trained.named_parameters():
            if name.startswith(trained.output_prefixes):
                parameter.requires_grad_(False)
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = Trained(self.module.head, self.module.margin, trained)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head's groups, and the body's at its own rate."""
        body = cast(Recogniser, self.module.body)
        return [*super().parameter_groups(), *weight_decay_groups(body, rate_scale=self.body_config.rate_scale)]

    def batch(self, index: BatchIndex, size: int) -> dict[str, Tensor]:
        """Altered pictures of one part, and the teacher's embeddings of them as they are."""
        chosen, generator = self.draw(index, size)
        images = self.sources.pictures.images[chosen]
        made = {
            "images": augmented(images, self.body_config.augment, index.generator(2, own=True)),
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
        return {**super().describe(), "task": "model", "body": dataclasses.asdict(self.body_config)}

    @torch.no_grad()
    def features(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Grid features of pictures, on the CPU."""
        trained = cast(Trained, module)
        body, head = cast(Recogniser, trained.body), trained.head
        device = next(trained.parameters()).device
        images = self.sources.pictures.images
        return torch.cat(
            [head.features(body.grid(normalised(body, images[part].to(device)))).cpu() for part in chosen.split(64)]
        )


def create(experiment: HeadExperiment, progress: Callable[[str, int, int], None] | None = None) -> HeadTask:
    """The task of an experiment's file: reads the pictures and computes the maps that the head starts from."""
    sources = load_sources(experiment.data, experiment.model, progress=progress)
    held_out = held_out_people(experiment.data, sources.pictures.names)
    return ModelTask.from_experiment(sources, experiment, held_out, body=experiment.body)
