"""What the rows of a gallery are: a face's template and labels as Arrow columns, and the head that they belong to."""

from __future__ import annotations

import ctypes
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.card.calibration import FMRCurve
from xcos_ext.devices import module_device
from xcos_ext.io.errors import GalleryError
from xcos_ext.io.optional import gallery_package
from xcos_ext.model.model import XCosModel
from xcos_ext.ops.templates import (
    AttentionParameters,
    AttentionState,
    FixedAttention,
    Templates,
    check_storage,
    result_dtype,
)

from .labels import canonical_json, label_checksum

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FORMAT", "Layout"]

#: Version of the format on disk. A reader refuses versions that it does not know.
FORMAT = 1

_KEY = b"xcos.gallery"
_ROWS_AT_ONCE = 256  # whose bytes are laid side by side for their checksums: they stay in the cache
# Checks of what was written: of the template's bytes, and of the labels.
CHECKS = ("checksum", "label_checksum")

# Arrow has no bfloat16: its bits are kept.
_ARROW = {torch.float16: "float16", torch.bfloat16: "uint16", torch.float32: "float32", torch.float64: "float64"}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _ARROW}


@dataclass(frozen=True, eq=False)
class Column:
    """One array of a template, named as the attribute of :class:`xcos_ext.Templates` and as the Arrow column."""

    name: str
    shape: tuple[int, ...]  # of one face's values
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """Number of them in a face."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a face."""
        return self.values * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Layout:
    """Shapes and dtype of a gallery's templates, and where they come from; None: that is unknown."""

    grid: tuple[int, int]  # (H, W)
    channels: int  # of a cell
    dtype: torch.dtype  # of features and projections
    attention: AttentionParameters | FixedAttention  # the templates' own
    model: str | None = None  # fingerprint of the model that makes the templates; None: only their head is known
    model_name: str | None = None  # for reports
    threshold: float | None = None  # the model's decision threshold for one pair
    fmr_curve: FMRCurve | None = None  # the model's false match rate at any score

    @classmethod
    def of(cls, source: Any, dtype: torch.dtype, grid: tuple[int, int] = (7, 7)) -> Layout:
        """The layout for a model, a head, or templates; TypeError for something else or an integer dtype."""
        check_storage(dtype, "dtype", "Gallery.create")
        if isinstance(source, Templates):
            sample, model = source[:0].to(dtype=dtype), None
        elif hasattr(source, "templates"):
            model = source if isinstance(source, XCosModel) else None
            device = module_device(source)
            with torch.inference_mode():
                if model is None:
                    features = torch.zeros(1, source.channels, *grid, device=device)
                else:
                    features = model.features(torch.zeros(1, 3, *model.preprocessing.size, device=device))
                sample = source.templates(features, "gallery", dtype)
        else:
            raise TypeError(
                f"Gallery.create: source: expected an XCosModel, a head or Templates, got {type(source).__name__}"
            )
        attention = sample.attention
        if isinstance(attention, AttentionParameters):
            attention = attention.detach().to("cpu")
        layout = cls(sample.grid, sample.channels, dtype, attention)
        if model is None:
            return layout
        return replace(
            layout,
            model=model.fingerprint(),
            model_name=model.name,
            threshold=model.threshold,
            fmr_curve=model.fmr_curve,
        )

    def weighs(self, attention: Tensor | str) -> bool:
        """Whether the model weighs cells like that: what it knows of scores is of those."""
        return isinstance(attention, str) and attention in ("own", self.attention)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The template's arrays, in the order in which they are stored."""
        cells = self.grid[0] * self.grid[1]
        wide = result_dtype(self.dtype)
        columns = [Column("features", (cells, self.channels), self.dtype), Column("norms", (cells,), wide)]
        if isinstance(self.attention, AttentionParameters):
            layers, hidden = self.attention.orders, self.attention.hidden
            columns.append(Column("projection", (layers, hidden, cells), self.dtype))
            columns.append(Column("bias", (layers, cells), wide))
        return tuple(columns)

    @property
    def face_bytes(self) -> int:
        """Bytes of one face's template."""
        return sum(column.nbytes for column in self.columns)

    @property
    def tile_rows(self) -> int:
        """Faces that are read and scored together: about 100 MB of them, at least 1,024."""
        return max(1024, (96 << 20) // self.face_bytes // 1024 * 1024)

    @property
    def head(self) -> str:
        """Fingerprint of the learned attention, or the fixed attention's name."""
        return self.attention.fingerprint if isinstance(self.attention, AttentionParameters) else self.attention

    @functools.cached_property
    def _fields(self) -> list[pa.Field]:
        pa = gallery_package("pyarrow")
        # Random bits to a compressor: looking at them costs time and saves no byte.
        plain = {b"lance-encoding:compression": b"none"}
        fields = [
            pa.field("id", pa.string(), nullable=False),
            pa.field("person", pa.string()),
            pa.field("metadata", pa.json_(), nullable=False),
            *(pa.field(name, pa.uint64(), nullable=False) for name in CHECKS),
        ]
        for column in self.columns:
            item = pa.field("item", getattr(pa, _ARROW[column.dtype])(), nullable=False)
            fields.append(pa.field(column.name, pa.list_(item, column.values), nullable=False, metadata=plain))
        return fields

    def schema(self) -> pa.Schema:
        """Arrow schema of the rows, with this layout in its metadata."""
        return gallery_package("pyarrow").schema(
            self._fields, metadata={_KEY: canonical_json(self._as_dict()).encode()}
        )

    @property
    def tile_columns(self) -> list[str]:
        """Columns of the packed tiles: the arrays and their checksum."""
        return ["checksum", *(column.name for column in self.columns)]

    def tile_schema(self) -> pa.Schema:
        """Arrow schema of the packed tiles."""
        return gallery_package("pyarrow").schema([f for f in self._fields if f.name in self.tile_columns])

    def _as_dict(self) -> dict[str, Any]:
        attention: Any = self.attention
        if isinstance(attention, AttentionParameters):
            names = ("temperature", "normalize", "symmetric", "fingerprint")
            arrays = {"weight": attention.weight.tolist(), "slope": attention.slope.tolist()}
            attention = arrays | {name: getattr(attention, name) for name in names}
        return {
            "format": FORMAT,
            "grid": list(self.grid),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": attention,
            "fmr_curve": None if self.fmr_curve is None else self.fmr_curve.as_dict(),
            **{name: getattr(self, name) for name in ("channels", "model", "model_name", "threshold")},
        }

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> Layout:
        """The layout in a schema's metadata; GalleryError where there is none, or one of another version."""
        raw = (schema.metadata or {}).get(_KEY)
        if raw is None:
            raise GalleryError("format: expected a gallery of xcos_ext, got another Lance data set")
        try:
            data = json.loads(raw)
            if data.get("format") != FORMAT:
                raise GalleryError(
                    f"format: expected version {FORMAT}, got {data.get('format')!r}; another version of xcos_ext "
                    "wrote it"
                )
            dtype = _DTYPES[data["dtype"]]
            attention = data["attention"]
            if not isinstance(attention, str):
                wide = result_dtype(dtype)
                attention = AttentionParameters(
                    weight=torch.tensor(attention["weight"], dtype=wide, device="cpu"),
                    slope=torch.tensor(attention["slope"], dtype=wide, device="cpu"),
                    temperature=float(attention["temperature"]),
                    normalize=attention["normalize"],
                    symmetric=bool(attention["symmetric"]),
                    state=AttentionState.known(attention["fingerprint"]),
                )
            curve = data["fmr_curve"]
            height, width = data["grid"]
            return cls(
                (int(height), int(width)),
                int(data["channels"]),
                dtype,
                attention,
                model=data["model"],
                model_name=data["model_name"],
                threshold=data["threshold"],
                fmr_curve=None if curve is None else FMRCurve.from_dict(curve),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, GalleryError):
                raise
            raise GalleryError(f"format: damaged description ({type(error).__name__}: {error})") from error

    def on(self, device: torch.device) -> Layout:
        """The same with the attention's parameters on a device."""
        return self if isinstance(self.attention, str) else replace(self, attention=self.attention.to(device))

    def empty(self) -> Templates:
        """No faces, of this kind."""
        return self.assemble({c.name: torch.empty(0, *c.shape, dtype=c.dtype, device="cpu") for c in self.columns})

    def assemble(self, tensors: Mapping[str, Tensor]) -> Templates:
        """Templates of arrays by column name."""
        return Templates(
            features=tensors["features"],
            norms=tensors["norms"],
            grid=self.grid,
            attention=self.attention,
            role="gallery",
            projection=tensors.get("projection"),
            bias=tensors.get("bias"),
        )

    def check(self, templates: Any, argument: str, where: str) -> Templates:
        """Templates in this gallery's dtype; GalleryError for another grid, number of channels, or head."""
        if not isinstance(templates, Templates):
            raise TypeError(f"{where}: {argument}: expected Templates, got {type(templates).__name__}")
        grids = [f"{height}x{width}" for height, width in (self.grid, templates.grid)]
        for what, expected, got in (("channels", self.channels, templates.channels), ("grid", *grids)):
            if got != expected:
                raise GalleryError(f"{where}: {argument}: expected {what} {expected} as the gallery has, got {got}")
        mine, theirs = self.attention, templates.attention
        if isinstance(mine, AttentionParameters) and isinstance(theirs, AttentionParameters):
            same = mine.matches(theirs)
        else:
            same = mine == theirs
        if not same:
            got = theirs.fingerprint if isinstance(theirs, AttentionParameters) else theirs
            raise GalleryError(
                f"{where}: {argument}: expected templates of the gallery's head ({self.head}), got those of another "
                f"({got})"
            )
        return templates.detach().to(self.dtype)

    def check_finite(self, templates: Templates, argument: str, where: str, ids: Sequence[str] | None = None) -> None:
        """GalleryError for NaN or infinity, whose scores are no hits: such a face would be stored and never found."""
        arrays = [getattr(templates, column.name) for column in self.columns]
        # The extremes are one quick pass, and are not finite where any value is not.
        if not len(templates) or all(bool(end.isfinite()) for array in arrays for end in array.aminmax()):
            return
        finite = torch.stack([array.isfinite().flatten(1).all(1) for array in arrays]).all(0)
        wrong = (~finite).nonzero().squeeze(1).tolist()
        if wrong:
            first = f"{argument}[{wrong[0]}]" + ("" if ids is None else f" ({ids[wrong[0]]!r})")
            more = f" in {len(wrong)} of {len(templates)} templates" if len(wrong) > 1 else ""
            raise GalleryError(f"{where}: {first}: expected finite values, got NaN or infinity{more}")

    def arrays(self, templates: Templates) -> dict[str, np.ndarray]:
        """The templates' bytes, uint8 [N, bytes of a face] a column."""
        arrays = {}
        for column in self.columns:
            tensor: Tensor = getattr(templates, column.name).contiguous()
            arrays[column.name] = tensor.view(torch.uint8).reshape(len(templates), column.nbytes).numpy()
        return arrays

    def batch(
        self, templates: Templates, ids: Sequence[str], persons: Sequence[str | None], metadata: Sequence[str]
    ) -> pa.Table:
        """Rows ready to be written: templates from :meth:`check`, metadata as :func:`canonical_json` writes it."""
        pa, schema = gallery_package("pyarrow"), self.schema()
        arrays = self.arrays(templates)
        labels = [label_checksum(*row) for row in zip(ids, persons, metadata, strict=True)]
        columns = [
            pa.array(ids, pa.string()),
            pa.array(persons, pa.string()),
            pa.array(metadata, pa.json_()),
            pa.array(row_checksums(arrays), pa.uint64()),
            pa.array(np.array(labels, dtype=np.uint64), pa.uint64()),
        ]
        for name, array in arrays.items():
            kind = schema.field(name).type
            count = len(ids) * kind.list_size
            values = pa.Array.from_buffers(kind.value_type, count, [None, pa.py_buffer(array)])
            columns.append(pa.FixedSizeListArray.from_arrays(values, type=kind))
        return pa.Table.from_arrays(columns, schema=schema)

    def templates(self, batch: pa.RecordBatch) -> Templates:
        """The templates of rows: views of the batch's memory, which is read-only and kept as long as they are."""
        return self.assemble({c.name: column_tensor(batch.column(c.name), c) for c in self.columns})


def row_checksums(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Checksums (xxh3, 64 bits) of the templates' bytes, uint64 [N]."""
    digest = gallery_package("xxhash").xxh3_64_intdigest
    count = len(next(iter(arrays.values())))
    sums = np.empty(count, np.uint64)
    for part in iter_slices(count, _ROWS_AT_ONCE):
        rows = np.concatenate([array[part] for array in arrays.values()], axis=1)
        sums[part] = [digest(row) for row in rows]
    return sums


def damaged_rows(layout: Layout, batch: pa.RecordBatch) -> list[int]:
    """Rows of a batch whose template is not what its checksum says."""
    found = row_checksums(layout.arrays(layout.templates(batch)))
    stored = batch.column("checksum").to_numpy(zero_copy_only=False)
    return np.flatnonzero(found != stored).tolist()


def column_span(array: pa.FixedSizeListArray, column: Column) -> tuple[int, int]:
    """Address and bytes of a column's values."""
    values = array.values
    buffer = values.buffers()[1]
    start = (values.offset + array.offset * column.values) * column.dtype.itemsize
    return (0, 0) if buffer is None else (buffer.address + start, len(array) * column.nbytes)


def column_tensor(array: pa.FixedSizeListArray, column: Column) -> Tensor:
    """A column's values as a tensor [N, *shape] on the same memory."""
    address, size = column_span(array, column)
    if size == 0:
        return torch.empty(len(array), *column.shape, dtype=column.dtype, device="cpu")
    # Not through NumPy: torch warns of its read-only arrays, and nobody writes here.
    memory = (ctypes.c_char * size).from_address(address)
    memory._arrow = array  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=column.dtype).view(len(array), *column.shape)


def iter_slices(count: int, step: int) -> Iterator[slice]:
    """[0, count) in pieces of ``step``."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
