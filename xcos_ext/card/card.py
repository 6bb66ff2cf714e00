"""What an exported graph says of itself: model, preprocessing, thresholds, and how its templates are laid out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from xcos_ext.io.errors import ModelError

from .calibration import FMRCurve, checked_thresholds
from .preprocessing import Preprocessing

__all__ = ["FORMAT", "INPUTS", "OUTPUTS", "Kind", "OnnxCard", "TemplateLayout"]

Kind = Literal["pair", "template", "score"]

FORMAT = "xcos_ext.onnx"
VERSION = "1"
_PREFIX = "xcos."

#: Names of a graph's inputs and outputs, by its kind.
INPUTS: dict[str, tuple[str, ...]] = {
    "pair": ("images_a", "images_b"),
    "template": ("images",),
    "score": ("templates_a", "templates_b"),
}
OUTPUTS: dict[str, tuple[str, ...]] = {
    "pair": ("score", "similarity", "attention"),
    "template": ("templates",),
    "score": ("score", "similarity", "attention"),
}


@dataclass(frozen=True)
class TemplateLayout:
    """Where the parts of a face lie in its flat template [T], fp32.

    In this order: unit features [cells, channels]; norms [cells]; with learned attention the half-projections u
    and -v, each [hidden, cells], and their shares of the logits, each [cells] (see :mod:`xcos_ext.ops.templates`).

    Attributes:
        grid: (H, W); cells = H * W.
        channels: C of a cell's feature.
        hidden: channels of the half-projections; 0 without learned attention.

    >>> TemplateLayout((7, 7), 32).size  # 49 cells of 32 channels, and 49 norms
    1617
    """

    grid: tuple[int, int]
    channels: int
    hidden: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        whole = all(isinstance(size, int) for size in (*self.grid, self.channels, self.hidden))
        if not whole or len(self.grid) != 2 or min(*self.grid, self.channels) < 1 or self.hidden < 0:
            raise ValueError(f"templates: expected a grid (H, W) of cells with channels, got {self}")

    @property
    def cells(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each part, in order."""
        found: dict[str, tuple[int, ...]] = {"features": (self.cells, self.channels), "norms": (self.cells,)}
        if self.hidden:
            found |= {"projection": (2, self.hidden, self.cells), "bias": (2, self.cells)}
        return found

    @property
    def size(self) -> int:
        """T: numbers a template has."""
        return sum(math.prod(shape) for shape in self.parts.values())

    def split(self, templates: Any) -> dict[str, Any]:
        """Name -> part [N, *shape] of templates [N, T]; views of an array or a tensor."""
        start, found = 0, {}
        for name, shape in self.parts.items():
            stop = start + math.prod(shape)
            found[name] = templates[:, start:stop].reshape(-1, *shape)
            start = stop
        return found


@dataclass(frozen=True)
class OnnxCard:
    """The metadata of an exported graph; every part lies in the file as text, so other programs can read it too.

    Attributes:
        kind: ``"pair"``, ``"template"`` or ``"score"``.
        name: of the model.
        fingerprint: of all that its features depend on (:meth:`xcos_ext.model.XCosModel.fingerprint`).
        preprocessing: what the images have gone through.
        threshold: the same person if score >= threshold; None: unknown.
        dtype: of the backbone inside: ``"float32"`` or ``"float16"``. The head is float32.
        opset: of the standard operators.
        attention: ``"learned"``, ``"norm"`` or ``"uniform"``.
        layout: of the templates.
        symmetric: whether score(A, B) = score(B, A) for every pair.
        fmr_thresholds: thresholds at false match rates.
        fmr_curve: the false match rate at any score; None: not calibrated.
        pair_weights: what learned attention needs to score templates elsewhere, and the fingerprint of the network
            that they are of; empty without.

    >>> layout = TemplateLayout((7, 7), 32)
    >>> card = OnnxCard("pair", "mine", "0" * 16, Preprocessing(), 0.3, "float32", 18, "norm", layout)
    >>> OnnxCard.from_metadata(card.as_metadata(), opset=18, where="mine.onnx") == card
    True
    """

    kind: Kind
    name: str
    fingerprint: str
    preprocessing: Preprocessing
    threshold: float | None
    dtype: str
    opset: int
    attention: str
    layout: TemplateLayout
    symmetric: bool = True
    fmr_thresholds: Mapping[float, float] = field(default_factory=dict)
    fmr_curve: FMRCurve | None = None
    pair_weights: Mapping[str, Any] = field(default_factory=dict)

    def as_metadata(self) -> dict[str, str]:
        """Name -> text, for the file."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del values["opset"]  # the file says it
        values["templates"] = values.pop("layout")
        return {_PREFIX + name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}

    @classmethod
    def from_metadata(cls, data: Mapping[str, str], opset: int, where: str) -> OnnxCard:
        """The card that :meth:`as_metadata` wrote.

        Args:
            data: the file's metadata.
            opset: of the file.
            where: the file, for messages.

        Raises:
            ModelError: not metadata of this package, of another version, or damaged.
        """
        found = {name.removeprefix(_PREFIX): text for name, text in data.items() if name.startswith(_PREFIX)}
        if found.get("format") != FORMAT:
            raise ModelError(
                f"{where}: an ONNX graph without xcos_ext's metadata; expected one that xcos export onnx wrote (a "
                "recogniser's graph becomes one through xcos plug)"
            )
        if found.get("version") != VERSION:
            raise ModelError(
                f"{where}: graph format {found.get('version')!r}; this version of xcos_ext reads {VERSION!r}"
            )
        try:
            values: dict[str, Any] = {
                name: found[name] for name in ("kind", "name", "fingerprint", "dtype", "attention")
            }
            for name, kind in (("symmetric", bool), ("pair_weights", dict)):
                values[name] = kind(json.loads(found[name]))
            values["threshold"] = json.loads(found["threshold"])
            if values["kind"] not in get_args(Kind):
                raise ValueError(f"kind {values['kind']!r}")
            if values["threshold"] is not None and not math.isfinite(values["threshold"]):
                raise ValueError("threshold is not finite")
            layout, curve = json.loads(found["templates"]), json.loads(found["fmr_curve"])
            return cls(
                preprocessing=Preprocessing(**json.loads(found["preprocessing"])),
                opset=opset,
                layout=TemplateLayout(layout["grid"], layout["channels"], layout["hidden"]),
                fmr_thresholds=checked_thresholds(json.loads(found["fmr_thresholds"])),
                fmr_curve=None if curve is None else FMRCurve.from_dict(curve),
                **values,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{where}: damaged metadata ({type(error).__name__}: {error})") from error
