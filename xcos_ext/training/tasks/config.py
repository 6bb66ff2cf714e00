"""Settings of the tasks that train a head: tables ``[data]``, ``[model]`` and ``[loss]`` of an experiment's file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..augment import AugmentConfig
from ..losses import Detach
from ..settings import NONE, SETTINGS, TrainConfig

__all__ = ["BodyConfig", "DataConfig", "HeadExperiment", "LossConfig", "ModelConfig"]


@dataclass(frozen=True, config=SETTINGS)
class DataConfig:
    """Which pictures, and whose are kept for evaluation.

    Attributes:
        pictures: aligned crops ``<person>/<picture>``: folder or zip archive.
        held_out_share: share of the people to hold out, chosen by their names.
        held_out_list: text file of people to hold out, one a line.
        pairs: LFW pairs file whose ``folds`` are held out.
        folds: numbers of folds, from 1; no person in their pairs is trained on.
        cache: folder for the frozen network's maps.
    """

    pictures: str
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    held_out_list: Annotated[str | None, NONE] = None
    pairs: Annotated[str | None, NONE] = None
    folds: tuple[int, ...] = ()
    cache: str = "cache"


@dataclass(frozen=True, config=SETTINGS)
class ModelConfig:
    """The network and its head.

    Attributes:
        recogniser: weights of the recogniser, which is also the teacher.
        start: ``"closed-form"``: a matrix for each cell and norm attention, as ``xcos_ext.model.plug`` makes them;
            ``"random"``: the published 1x1 block with random weights.
        channels: of the grid feature; with the closed form, principal axes per cell, or none to keep the embedding's
            length; mean and axes come from one picture each of the people trained on.
        spread: of the closed form, in cells.
        attention: ``"residual"`` corrects norm attention, ``"learned"`` is the published network; ``"norm"`` and
            ``"uniform"`` have nothing to learn.
        hidden: channels inside the attention network.
        symmetric: attention averaged over both orders of the faces.
        temperature: of the attention's softmax.
    """

    recogniser: str
    start: Literal["closed-form", "random"] = "closed-form"
    channels: Annotated[int | None, Field(ge=1), NONE] = 32
    spread: float = Field(default=0.7, ge=0)
    attention: Literal["residual", "learned", "norm", "uniform"] = "residual"
    hidden: int = Field(default=16, ge=1)
    symmetric: bool = True
    temperature: float = Field(default=1.0, gt=0)


@dataclass(frozen=True, config=SETTINGS)
class LossConfig:
    """A weighted sum of losses; a weight of 0 leaves one out.

    Attributes:
        pairs: ``"all"``: batches of people with several pictures, and losses over all pairs of a batch; ``"drawn"``:
            pairs, half of them genuine.
        pictures_each: with all pairs: pictures of each person.
        others: with all pairs: share of the batch that are single faces of other people.
        flipped: also train on mirrored pictures; their maps take as much room again.
        hard: with drawn pairs: share of the impostor pairs among the teacher's most similar ones.
        cosine: weight of L_cos, the distance of scores to the teacher's cosines.
        distance: of L_cos.
        balanced: genuine and impostor pairs count half each in L_cos over all pairs.
        contrast: weight of a loss over all pairs of a batch.
        contrast_kind: which one.
        contrast_temperature: of infonce.
        contrast_margin: of contrastive and triplet; none: 0.3 and 0.2.
        identity: weight of L_id, cross-entropy of margin logits over the people trained on.
        margin_head: of L_id.
        margin_scale: none: 64 for arcface, 30 for cosface.
        margin: none: 0.5 for arcface, 0.35 for cosface.
        class_share: share of the people in each step's softmax.
        detach: what L_cos and the contrast do not push: ``"attention"``: the grid feature through W; ``"features"``:
            the grid feature at all.
        anchor: weight of the squared relative distance of the projection to where it started.
    """

    pairs: Literal["all", "drawn"] = "all"
    pictures_each: int = Field(default=2, ge=2)
    others: float = Field(default=0.0, ge=0, lt=1)
    flipped: bool = False
    hard: float = Field(default=0.0, ge=0, le=1)
    cosine: float = Field(default=1.0, ge=0)
    distance: Literal["mse", "l1"] = "mse"
    balanced: bool = False
    contrast: float = Field(default=0.0, ge=0)
    contrast_kind: Literal["infonce", "contrastive", "triplet"] = "infonce"
    contrast_temperature: float = Field(default=0.05, gt=0)
    contrast_margin: Annotated[float | None, NONE] = None
    identity: float = Field(default=0.0, ge=0)
    margin_head: Literal["arcface", "cosface"] = "arcface"
    margin_scale: Annotated[float | None, Field(gt=0), NONE] = None
    margin: Annotated[float | None, Field(ge=0), NONE] = None
    class_share: float = Field(default=1.0, gt=0, le=1)
    detach: Detach = "none"
    anchor: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, config=SETTINGS)
class BodyConfig:
    """How the body is trained along, with ``task = "model"``.

    Attributes:
        rate_scale: its learning rate in units of ``train.rate``.
        augment: alterations of its pictures.
    """

    rate_scale: float = Field(default=0.01, ge=0)
    augment: AugmentConfig = AugmentConfig()


@dataclass(frozen=True, config=SETTINGS)
class HeadExperiment:
    """An experiment's file for ``task = "head"`` and ``task = "model"``.

    Attributes:
        data, model, loss, train: tables of the file.
        body: another, with ``task = "model"`` only.
        task: which one.
        name: of the exported model.
    """

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    body: BodyConfig = BodyConfig()
    task: Literal["head", "model"] = "head"
    name: str = "xcos-head"
