"""What is kept of a face so that all pairs of many faces can be scored.

A face's template holds its cells at unit length and, for learned attention, all of the attention network that depends
on this face alone. With E the shared embedding, the network's first convolution splits into a part of each face,
conv(cat(E(A), E(B))) = u(A) + v(B) (batch norm folded in, the shift in u), and with a = the slope of the activation
behind it

    prelu(u + v) = a u + v + (1 - a) max(u, -v),

so that of the second convolution only the maximum's share depends on the pair. The first face (the probe) keeps u and
conv2(a u), the second (the gallery face) -v and conv2(v). This is the network itself, not an approximation: see
csrc/core/xcos_matrix.h for the formula that the operators compute from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from xcos_ext.io.fingerprint import fingerprint_state

__all__ = [
    "Attention",
    "AttentionParameters",
    "Templates",
    "check_sides",
    "resolve_attention",
]

Normalize = Literal["softmax", "min-shift"]
Role = Literal["probe", "gallery", "both"]
FixedAttention = Literal["uniform", "norm"]

STORAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A cell shorter than this is divided by it instead of by its norm: the operators' eps.
EPS = 1e-6

# Faces at a time where nothing is differentiated: temporaries stay below some ten MB.
CHUNK = 2048


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of norms, biases, parameters and scores: fp64 for fp64 features, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_storage(dtype: torch.dtype, argument: str, where: str) -> None:
    if dtype not in STORAGE_DTYPES:
        raise TypeError(
            f"{where}: {argument}: expected dtype float16, bfloat16, float32 or float64, "
            f"got {_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)}"
        )


def check_role(role: str, where: str) -> None:
    if role not in ("probe", "gallery", "both"):
        raise ValueError(f"{where}: role: expected 'probe', 'gallery' or 'both', got {role!r}")


class AttentionState:
    """The parameters of an attention network as they were when its templates were made.

    Two templates of one unchanged network share this object, so comparing them costs nothing. Otherwise their
    fingerprints decide; they are computed when first asked for, and only then is a GPU waited for.
    """

    __slots__ = ("__weakref__", "_extra", "_fingerprint", "_snapshot")

    def __init__(self, tensors: Mapping[str, Tensor], extra: str) -> None:
        self._extra = extra
        self._fingerprint: str | None = None
        floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
        # One copy of all of them: the network may change before anyone asks.
        flat = torch.cat([t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in floating.values()])
        parts = flat.split([t.numel() for t in floating.values()])
        self._snapshot: dict[str, Tensor] | None = {
            name: part.view(t.shape) for (name, t), part in zip(floating.items(), parts, strict=True)
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits; see :func:`xcos_ext.io.fingerprint.fingerprint_state`."""
        if self._fingerprint is None:
            assert self._snapshot is not None
            self._fingerprint = fingerprint_state(self._snapshot, extra=self._extra)
            self._snapshot = None
        return self._fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionState.known, (self.fingerprint,)

    @classmethod
    def known(cls, fingerprint: str) -> AttentionState:
        """The state that a stored fingerprint stands for."""
        state = cls.__new__(cls)
        state._extra, state._fingerprint, state._snapshot = "", fingerprint, None
        return state

    @classmethod
    def of(cls, module: nn.Module, settings: Mapping[str, Any]) -> AttentionState:
        """The state of a module: the same object as long as neither its tensors nor ``settings`` change.

        A change is seen by the tensors' addresses and version counters, without reading them; edits that torch does
        not count (through ``.data``, or a replayed CUDA graph) are not seen.
        """
        tensors = module.state_dict(keep_vars=True)
        extra = json.dumps(settings, sort_keys=True)
        try:
            # Step counters included: batch norm updates its statistics without counting it, but counts its steps.
            marks = [(name, t.data_ptr(), t._version, t.shape, t.dtype) for name, t in tensors.items()]
        except RuntimeError:
            if any(t.is_inference() for t in tensors.values()):
                return cls(tensors, extra)  # such tensors count nothing
            # No values to look at (tracing, torch.func): whatever this module makes fits together.
            return _UNTRACKED.setdefault(module, cls.known("untracked"))
        known = _STATES.get(module)
        if known is not None and known.marks == marks and known.extra == extra:
            return known.state
        state = cls(tensors, extra)
        # The aliases keep the memory from being handed to other tensors, whose addresses would look the same.
        _STATES[module] = _Known([t.detach() for t in tensors.values()], marks, extra, state)
        return state


class _Known(NamedTuple):
    aliases: list[Tensor]
    marks: list[tuple[Any, ...]]
    extra: str
    state: AttentionState


_STATES: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_UNTRACKED: weakref.WeakKeyDictionary[nn.Module, AttentionState] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionParameters:
    """The part of a learned attention network that every pair needs.

    Attributes:
        weight: [hidden, 3, 3], (1 - a) times the second convolution with its batch norm folded in; fp32, or fp64 for
            fp64 templates.
        slope: [1], of the last activation; same dtype and device.
        temperature: divides the logits before the softmax; no effect on min-shift.
        normalize: ``"softmax"`` or ``"min-shift"``.
        symmetric: both orders of the faces are averaged.
        state: the network that these belong to; None: weight and slope stand for it.

    Raises:
        ValueError: a wrong shape, dtype, device or value.
    """

    weight: Tensor
    slope: Tensor
    temperature: float = 1.0
    normalize: Normalize = "softmax"
    symmetric: bool = False
    state: AttentionState | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        where = "AttentionParameters"
        weight, slope = self.weight, self.slope
        if weight.dim() != 3 or tuple(weight.shape[1:]) != (3, 3) or weight.shape[0] < 1:
            raise ValueError(f"{where}: weight: expected shape [hidden, 3, 3], got {list(weight.shape)}")
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{where}: weight: expected dtype float32 or float64, got {_name(weight.dtype)}")
        if tuple(slope.shape) != (1,):
            raise ValueError(f"{where}: slope: expected shape [1], got {list(slope.shape)}")
        if slope.dtype != weight.dtype or slope.device != weight.device:
            raise ValueError(
                f"{where}: slope: expected {_name(weight.dtype)} on {weight.device} like weight, "
                f"got {_name(slope.dtype)} on {slope.device}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"{where}: temperature: expected a finite number above 0, got {self.temperature}")
        if self.normalize not in ("softmax", "min-shift"):
            raise ValueError(f"{where}: normalize: expected 'softmax' or 'min-shift', got {self.normalize!r}")
        if self.state is None:
            settings = [float(self.temperature), self.normalize, bool(self.symmetric)]
            state = AttentionState({"weight": weight, "slope": slope}, json.dumps(settings))
            object.__setattr__(self, "state", state)

    @property
    def hidden(self) -> int:
        """Channels of the half-projections."""
        return self.weight.shape[0]

    @property
    def orders(self) -> int:
        """2 for symmetric attention, where both orders of the faces count, else 1."""
        return 2 if self.symmetric else 1

    @property
    def fingerprint(self) -> str:
        """Short hash of all parameters and settings that decide the templates; equal on every device."""
        assert self.state is not None
        return self.state.fingerprint

    def matches(self, other: AttentionParameters) -> bool:
        """Whether both come from the same parameters; free for templates of one unchanged network."""
        return self.state is other.state or self.fingerprint == other.fingerprint

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AttentionParameters:
        """On another device, or in fp32 or fp64; itself where nothing changes."""
        weight, slope = self.weight.to(device, dtype), self.slope.to(device, dtype)
        if weight is self.weight and slope is self.slope:
            return self
        return dataclasses.replace(self, weight=weight, slope=slope)

    def detach(self) -> AttentionParameters:
        """Cut from the graph."""
        return dataclasses.replace(self, weight=self.weight.detach(), slope=self.slope.detach())


def cell_norms(cells: Tensor, dim: int) -> Tensor:
    """Lengths of cells along ``dim``; 0 without gradient where a cell is 0, NaN where the squares overflow."""
    squared = (cells * cells).sum(dim)
    zero = squared == 0
    norms = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
    # Squares beyond the dtype's range: x / inf would be a silent 0.
    return torch.where(norms.isinf(), torch.nan, norms)


def unit_cells(features: Tensor) -> tuple[Tensor, Tensor]:
    """Grid features [N, C, H, W], fp32 or fp64, to unit cells [N, H * W, C] and norms [N, H * W].

    The norm is clamped to 1e-6 where it divides, as in the operators, so zero cells stay 0; they get no gradient.
    """
    cells = features.flatten(2).transpose(1, 2)
    norms = cell_norms(cells, 2)
    if cells.requires_grad:
        cells = torch.where((norms == 0).unsqueeze(2), cells.detach(), cells)
    return cells / norms.clamp_min(EPS).unsqueeze(2), norms


def in_chunks(compute: Callable[[Tensor], Sequence[Tensor]], faces: Tensor, *, whole: bool) -> Sequence[Tensor]:
    """``compute`` on all faces at once, or on some thousand at a time; its outputs have the faces first."""
    if whole or faces.shape[0] <= CHUNK:
        return compute(faces)
    outputs: list[Tensor] = []
    for start in range(0, faces.shape[0], CHUNK):
        parts = compute(faces[start : start + CHUNK])
        if not outputs:
            outputs = [part.new_empty((faces.shape[0], *part.shape[1:])) for part in parts]
        for output, part in zip(outputs, parts, strict=True):
            output[start : start + CHUNK] = part
    return outputs


@contextlib.contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """fp32 convolutions in fp32: a GPU would use TF32, whose rounding a template would keep for good."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


@dataclasses.dataclass(frozen=True, eq=False, repr=False, slots=True)
class Templates:
    """Faces ready to be scored in all pairs: what :func:`xcos_ext.xcos_matrix` and its siblings take.

    Made by ``templates()`` of :class:`XCosAttention`, of a head or of a model, or by :meth:`from_features` without a
    head. Immutable; ``len()`` is the number of faces, and an int, a slice, a list, or a tensor of indices or of bools
    selects faces (an int gives a batch of one). Views wherever torch gives views.

    With learned attention the first face of a pair and the second keep different parts, so templates have a role:
    probes are first faces, gallery faces second ones; ``"both"`` holds the parts of either, for all pairs within one
    batch (``xcos_matrix(t, t)``). Templates without learned attention serve both sides.

    Attributes:
        features: [N, H * W, C], unit length per cell (0 where the cell was 0); float16, bfloat16, float32 or float64.
        norms: [N, H * W], the cells' lengths before; float32, or float64 for float64 features.
        grid: (H, W).
        attention: the templates' own attention: :class:`AttentionParameters`, ``"uniform"`` or ``"norm"``.
        role: ``"probe"``, ``"gallery"`` or ``"both"``.
        projection: [N, layers, hidden, H * W], dtype of the features, or None without learned attention. Layers:
            (u) for probes, (-v) for gallery faces, (u, -v) for both; symmetric attention has (u, -v), (-v, u) and
            (u, -v, u).
        bias: [N, layers, H * W], dtype of the norms: the faces' shares of the logits, for the first face where the
            layer is u, for the second where it is -v. None without learned attention.

    Raises:
        TypeError: an argument of another type, or a dtype that is not floating-point.
        ValueError: shapes, dtypes or devices that do not fit each other.
    """

    features: Tensor
    norms: Tensor
    grid: tuple[int, int]
    attention: AttentionParameters | FixedAttention
    role: Role = "both"
    projection: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        where = "Templates"
        if not isinstance(self.features, Tensor):
            raise TypeError(f"{where}: features: expected a tensor, got {type(self.features).__name__}")
        height, width = self.grid
        if height < 1 or width < 1:
            raise ValueError(f"{where}: grid: expected at least one cell, got {height}x{width}")
        cells = height * width
        if self.features.dim() != 3 or self.features.shape[1] != cells or self.features.shape[2] < 1:
            raise ValueError(
                f"{where}: features: expected shape [N, {cells}, C] for a grid of {height}x{width}, "
                f"got {list(self.features.shape)}"
            )
        check_storage(self.features.dtype, "features", where)
        check_role(self.role, where)
        faces, wide = self.features.shape[0], result_dtype(self.features.dtype)
        self._check("norms", self.norms, (faces, cells), wide)
        if isinstance(self.attention, AttentionParameters):
            parameters = self.attention
            layers = parameters.orders + (self.role == "both")
            self._check("projection", self.projection, (faces, layers, parameters.hidden, cells), self.dtype)
            self._check("bias", self.bias, (faces, layers, cells), wide)
            self._check("attention.weight", parameters.weight, tuple(parameters.weight.shape), wide)
        elif self.attention not in ("uniform", "norm"):
            raise ValueError(
                f"{where}: attention: expected AttentionParameters, 'uniform' or 'norm', got {self.attention!r}"
            )
        elif self.projection is not None or self.bias is not None:
            raise ValueError(f"{where}: projection: expected None with {self.attention!r} attention, got a tensor")

    def _check(self, name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Templates: {name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"Templates: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"Templates: {name}: expected dtype {_name(dtype)}, got {_name(tensor.dtype)}")
        if tensor.device != self.device:
            raise ValueError(f"Templates: {name}: expected device {self.device} like features, got {tensor.device}")

    @classmethod
    def from_features(
        cls, features: Tensor, dtype: torch.dtype | None = None, attention: FixedAttention = "uniform"
    ) -> Templates:
        """Templates of any feature maps, without a head; they serve as probes and as gallery.

        Args:
            features: [N, C, H, W], floating-point.
            dtype: how to store the unit features; None: the features' dtype.
            attention: ``"uniform"``, or ``"norm"`` (proportional to the product of the two cells' norms).

        Returns:
            Templates, differentiable to ``features``.

        Raises:
            TypeError: not a tensor, or not floating-point.
            ValueError: a wrong shape, or another attention.
        """
        where = "Templates.from_features"
        if attention not in ("uniform", "norm"):
            raise ValueError(f"{where}: attention: expected 'uniform' or 'norm', got {attention!r}")
        check_features(features, None, where)
        storage = features.dtype if dtype is None else dtype
        check_storage(storage, "dtype", where)
        exact = torch.float64 if torch.float64 in (features.dtype, storage) else torch.float32

        def compute(part: Tensor) -> Sequence[Tensor]:
            unit, norms = unit_cells(part.to(exact))
            return unit.to(storage), norms.to(result_dtype(storage))

        whole = torch.is_grad_enabled() and features.requires_grad
        with torch.autocast(features.device.type, enabled=False):
            unit, norms = in_chunks(compute, features, whole=whole)
        return cls(unit, norms, (features.shape[2], features.shape[3]), attention)

    @classmethod
    def cat(cls, templates: Iterable[Templates]) -> Templates:
        """All faces of several templates, in order.

        Raises:
            TypeError: something else among them.
            ValueError: none at all, or templates of another role, grid, number of channels, dtype, device, or head.
        """
        parts = list(templates)
        where = "Templates.cat"
        for index, part in enumerate(parts):
            if not isinstance(part, Templates):
                raise TypeError(f"{where}: templates[{index}]: expected Templates, got {type(part).__name__}")
        if not parts:
            raise ValueError(f"{where}: templates: expected at least one, got none")
        first = parts[0]
        for index, part in enumerate(parts[1:], 1):
            for what, got, expected in (
                ("role", part.role, first.role),
                ("grid", f"{part.grid[0]}x{part.grid[1]}", f"{first.grid[0]}x{first.grid[1]}"),
                ("channels", part.channels, first.channels),
                ("dtype", _name(part.dtype), _name(first.dtype)),
                ("device", part.device, first.device),
            ):
                if got != expected:
                    raise ValueError(
                        f"{where}: templates[{index}]: expected {what} {expected} like templates[0], got {got}"
                    )
            problem = _other_attention(first, part)
            if problem is not None:
                raise ValueError(f"{where}: templates[{index}]: {problem.format(first='templates[0]')}")
        if len(parts) == 1:
            return first

        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            return None if tensors[0] is None else torch.cat(cast("list[Tensor]", tensors))

        return dataclasses.replace(
            first,
            features=torch.cat([part.features for part in parts]),
            norms=torch.cat([part.norms for part in parts]),
            projection=joined([part.projection for part in parts]),
            bias=joined([part.bias for part in parts]),
            attention=next((p.attention for p in parts if _differentiable(p.attention)), first.attention),
        )

    @property
    def faces(self) -> int:
        """Number of faces."""
        return self.features.shape[0]

    @property
    def channels(self) -> int:
        """Channels of a cell's feature."""
        return self.features.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of features and projections."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Where all tensors live."""
        return self.features.device

    @property
    def nbytes(self) -> int:
        """Memory of all faces' tensors; views count as if they were copies."""
        tensors = (self.features, self.norms, self.projection, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def learned(self) -> bool:
        """Whether the templates' own attention is a learned one."""
        return isinstance(self.attention, AttentionParameters)

    @property
    def parameters(self) -> AttentionParameters:
        """Parameters of the learned attention.

        Raises:
            ValueError: the attention is not learned.
        """
        if not isinstance(self.attention, AttentionParameters):
            raise ValueError(f"Templates: expected learned attention, got {self.attention!r}")
        return self.attention

    @property
    def half_projection(self) -> Tensor:
        """[N, hidden, H * W]: u for probes, -v for gallery faces; of symmetric attention the first order's.

        Raises:
            ValueError: without learned attention, or with role "both" (take ``as_probe()`` or ``as_gallery()``).
        """
        if self.projection is None:
            raise ValueError(f"Templates: half_projection: expected learned attention, got {self.attention!r}")
        if self.role == "both":
            raise ValueError(
                "Templates: half_projection: expected role 'probe' or 'gallery', got 'both'; "
                "take as_probe() or as_gallery() first"
            )
        return self.projection[:, 0]

    def __len__(self) -> int:
        return self.faces

    def __getitem__(self, index: Any) -> Templates:
        """Some faces; see the class.

        Raises:
            IndexError: an index outside, or a mask of another length.
            TypeError: anything else than an int, a slice, a list, or a tensor (or array) of int64 or bool.
        """
        if isinstance(index, slice):
            if index.step is not None and index.step < 1:
                raise ValueError(f"Templates: index: expected a step above 0, got {index.step}")
            return self._map(lambda t: t[index])
        array = not isinstance(index, Tensor) and getattr(index, "ndim", 0) == 1  # NumPy's
        if not isinstance(index, (Tensor, bool)) and not array and hasattr(index, "__index__"):
            face = operator.index(index)
            if not -self.faces <= face < self.faces:
                raise IndexError(f"Templates: index {face} is out of range for {self.faces} faces")
            face %= self.faces
            return self._map(lambda t: t[face : face + 1])
        if array or isinstance(index, (list, range)):
            index = torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.int64)
        if not isinstance(index, Tensor):
            raise TypeError(f"Templates: index: expected int, slice, list or tensor, got {type(index).__name__}")
        if index.dtype not in (torch.int64, torch.int32, torch.bool) or index.dim() > 1:
            raise TypeError(
                f"Templates: index: expected a one-dimensional tensor of int64 or bool, "
                f"got {_name(index.dtype)} of shape {list(index.shape)}"
            )
        if index.dtype == torch.bool and tuple(index.shape) != (self.faces,):
            raise IndexError(f"Templates: index: expected a mask of {self.faces} bools, got {list(index.shape)}")
        chosen = index.reshape(-1).to(self.device)
        # A mask is turned into indices once, not for every tensor.
        chosen = chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen.to(torch.int64)
        return self._map(lambda t: t.index_select(0, chosen))

    def _map(self, change: Callable[[Tensor], Tensor], **others: Any) -> Templates:
        """The same change of every tensor that has the faces first."""
        return dataclasses.replace(
            self,
            features=change(self.features),
            norms=change(self.norms),
            projection=None if self.projection is None else change(self.projection),
            bias=None if self.bias is None else change(self.bias),
            **others,
        )

    def to(
        self,
        *targets: torch.device | torch.dtype | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Templates:
        """On another device, or stored in another floating dtype: ``to("cuda", torch.float16)``.

        Norms, biases and parameters stay float32 (float64 for float64 storage). Differentiable.

        Returns:
            New templates, or these where nothing changes.

        Raises:
            TypeError: a dtype that is not float16, bfloat16, float32 or float64, or two devices or dtypes.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                if dtype is not None:
                    raise TypeError("Templates.to: dtype: expected one, got two")
                dtype = target
            else:
                if device is not None:
                    raise TypeError("Templates.to: device: expected one, got two")
                device = target
        storage = self.dtype if dtype is None else dtype
        check_storage(storage, "dtype", "Templates.to")
        place = self.device if device is None else torch.device(device)
        wide = result_dtype(storage)

        def moved(tensor: Tensor, kind: torch.dtype) -> Tensor:
            return tensor.to(place, kind, non_blocking=non_blocking)

        features = moved(self.features, storage)
        if features is self.features:
            return self
        attention = self.attention
        return dataclasses.replace(
            self,
            features=features,
            norms=moved(self.norms, wide),
            projection=None if self.projection is None else moved(self.projection, storage),
            bias=None if self.bias is None else moved(self.bias, wide),
            attention=attention.to(features.device, wide) if isinstance(attention, AttentionParameters) else attention,
        )

    def detach(self) -> Templates:
        """Cut from the graph, parameters included; the memory is shared."""
        attention = self.attention.detach() if isinstance(self.attention, AttentionParameters) else self.attention
        return self._map(Tensor.detach, attention=attention)

    def as_probe(self) -> Templates:
        """These faces as the first of their pairs: views, no copies.

        Raises:
            ValueError: gallery templates of learned attention, which lack the part of a first face.
        """
        return self._as("probe")

    def as_gallery(self) -> Templates:
        """These faces as the second of their pairs: views, no copies.

        Raises:
            ValueError: probe templates of learned attention, which lack the part of a second face.
        """
        return self._as("gallery")

    def _as(self, role: Literal["probe", "gallery"]) -> Templates:
        if self.role == role:
            return self
        if isinstance(self.attention, AttentionParameters):
            if self.role != "both":
                raise ValueError(
                    f"Templates.as_{role}: expected templates of role {role!r} or 'both', got role {self.role!r}; "
                    "make them with role='both' to have both parts"
                )
            assert self.projection is not None and self.bias is not None
            start = 0 if role == "probe" else 1
            layers = slice(start, start + self.attention.orders)
            return dataclasses.replace(
                self, role=role, projection=self.projection[:, layers], bias=self.bias[:, layers]
            )
        return dataclasses.replace(self, role=role)

    def __repr__(self) -> str:
        attention: str = "own"
        if isinstance(self.attention, AttentionParameters):
            p = self.attention
            attention = p.normalize if p.normalize == "min-shift" else f"softmax, temperature={p.temperature:g}"
            attention = f"learned ({attention}{', symmetric' if p.symmetric else ''})"
        else:
            attention = self.attention
        return (
            f"Templates(faces={self.faces}, grid={self.grid[0]}x{self.grid[1]}, channels={self.channels}, "
            f"role={self.role}, attention={attention}, dtype={_name(self.dtype)}, device={self.device})"
        )


def check_features(features: Tensor, channels: int | None, where: str) -> None:
    """Grid features [N, C, H, W] of a floating dtype."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{where}: features: expected a tensor, got {type(features).__name__}")
    expected = "C" if channels is None else str(channels)
    if features.dim() != 4 or (channels is not None and features.shape[1] != channels):
        raise ValueError(f"{where}: features: expected [N, {expected}, H, W], got {list(features.shape)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{where}: features: expected at least one channel and one cell, got {list(features.shape)}")
    check_storage(features.dtype, "features", where)


def _differentiable(attention: AttentionParameters | str) -> bool:
    return isinstance(attention, AttentionParameters) and (
        attention.weight.requires_grad or attention.slope.requires_grad
    )


def _described(templates: Templates) -> str:
    return "learned" if templates.learned else f"{templates.attention!r}"


def _other_attention(first: Templates, other: Templates) -> str | None:
    """Why ``other`` does not go with ``first``, with {first} for its name; None where it does."""
    one, two = first.attention, other.attention
    if isinstance(one, AttentionParameters) and isinstance(two, AttentionParameters):
        if one.matches(two):
            return None
        return (
            f"expected templates of one head, got fingerprint {two.fingerprint} where {{first}} has "
            f"{one.fingerprint}; the templates come from different heads, or the head has changed in between"
        )
    if one == two:
        return None
    return f"expected {_described(first)} attention like {{first}}, got {_described(other)}"


class Attention(NamedTuple):
    """How a call weighs the cells: one of three ways.

    Attributes:
        kind: ``"learned"``: from both faces' projections; ``"weights"``: known before the gallery is; ``"norm"``: by
            the product of the cells' norms.
        parameters: of learned attention, else None.
        weights: [1, H * W] for all pairs or [P, H * W] for every probe its own, float32 (float64 for float64
            templates), else None.
    """

    kind: Literal["learned", "weights", "norm"]
    parameters: AttentionParameters | None
    weights: Tensor | None


def check_sides(op: str, probes: Templates, gallery: Templates, attention: Any = "own") -> None:
    """Whether two templates can be scored against each other.

    The role counts only where the templates' own learned attention is used; with any other one only their features
    are.

    Raises:
        TypeError: one of them is not Templates.
        RuntimeError: a wrong role, other channels, grid, dtype or device, or templates of different heads.
    """
    for name, side in (("probes", probes), ("gallery", gallery)):
        if not isinstance(side, Templates):
            hint = "; make them with head.templates(features, role)" if isinstance(side, Tensor) else ""
            raise TypeError(f"{op}: {name}: expected Templates, got {type(side).__name__}{hint}")
    # Compared before they are put into words: traced sizes have none.
    compared: tuple[tuple[str, Any, Any, Callable[[Any], str]], ...] = (
        ("channels", probes.channels, gallery.channels, str),
        ("grid", probes.grid, gallery.grid, lambda grid: "{}x{}".format(*grid)),
        ("dtype", probes.dtype, gallery.dtype, _name),
        ("device", probes.device, gallery.device, str),
    )
    for what, expected, got, words in compared:
        if expected != got:
            raise RuntimeError(f"{op}: gallery: expected {what} {words(expected)} like probes, got {words(got)}")
    own = isinstance(attention, str) and attention == "own"
    if own or (probes.learned and gallery.learned):
        problem = _other_attention(probes, gallery)
        if problem is not None:
            raise RuntimeError(f"{op}: gallery: {problem.format(first='probes')}")
    if own and probes.learned:
        for name, side, role in (("probes", probes, "probe"), ("gallery", gallery, "gallery")):
            if side.role not in (role, "both"):
                raise RuntimeError(
                    f"{op}: {name}: expected templates of role {role!r} or 'both', got role {side.role!r}; "
                    f"make them with templates(features, role={role!r})"
                )


def resolve_attention(op: str, attention: Any, probes: Templates, gallery: Templates) -> Attention:
    """The ``attention`` argument of the all-pairs functions, checked and brought to one of three forms.

    Args:
        op: for messages.
        attention: ``"own"``, ``"uniform"``, ``"norm"``, or weights [H, W] or [P, H, W], used as they are.
        probes: checked by :func:`check_sides`.
        gallery: likewise.

    Raises:
        TypeError: neither a text nor a tensor.
        RuntimeError: an unknown name, or weights of another shape, dtype or device.
    """
    if isinstance(attention, str):
        if attention not in ("own", "uniform", "norm"):
            raise RuntimeError(
                f"{op}: attention: expected 'own', 'uniform', 'norm' or a tensor [H, W] or [P, H, W], got {attention!r}"
            )
        chosen: Any = probes.attention if attention == "own" else attention
        if isinstance(chosen, AttentionParameters):
            # Both sides' parameters are equal; those that are being learned get the gradient.
            if not _differentiable(chosen) and _differentiable(gallery.attention):
                chosen = gallery.attention
            return Attention("learned", chosen, None)
        if chosen == "norm":
            return Attention("norm", None, None)
        cells = probes.features.shape[1]
        uniform = probes.norms.new_full((1, cells), 1.0 / cells)
        return Attention("weights", None, uniform)
    if not isinstance(attention, Tensor):
        raise TypeError(f"{op}: attention: expected a text or a tensor, got {type(attention).__name__}")
    height, width = probes.grid
    shapes = ((height, width), (probes.faces, height, width))
    if tuple(attention.shape) not in shapes:
        raise RuntimeError(
            f"{op}: attention: expected shape {list(shapes[0])} or {list(shapes[1])}, got {list(attention.shape)}"
        )
    if attention.dtype not in STORAGE_DTYPES:
        raise RuntimeError(
            f"{op}: attention: expected dtype float16, bfloat16, float32 or float64, got {_name(attention.dtype)}"
        )
    if attention.device != probes.device:
        raise RuntimeError(f"{op}: attention: expected device {probes.device} like probes, got {attention.device}")
    weights = attention.to(result_dtype(probes.dtype)).reshape(-1, height * width)
    return Attention("weights", None, weights)
