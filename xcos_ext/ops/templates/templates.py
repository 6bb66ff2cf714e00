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

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._checks import dtype_name, result_dtype
from .._kept import kept_checked
from .cells import FixedAttention, Role, check_features, check_role, check_storage, in_chunks, unit_cells
from .parameters import AttentionParameters

__all__ = ["Templates", "differentiable", "other_attention"]


@kept_checked
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

    >>> faces = Templates.from_features(torch.ones(5, 8, 7, 7), torch.float16)
    >>> len(faces), len(faces[1:3]), tuple(faces.features.shape), faces.grid, faces.dtype
    (5, 2, (5, 49, 8), (7, 7), torch.float16)
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
            raise ValueError(f"Templates: {name}: expected dtype {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")
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

        with torch.autocast(features.device.type, enabled=False):
            unit, norms = in_chunks(compute, features)
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
                ("dtype", dtype_name(part.dtype), dtype_name(first.dtype)),
                ("device", part.device, first.device),
            ):
                if got != expected:
                    raise ValueError(
                        f"{where}: templates[{index}]: expected {what} {expected} like templates[0], got {got}"
                    )
            problem = other_attention(first, part)
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
            attention=next((p.attention for p in parts if differentiable(p.attention)), first.attention),
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
    def tensors(self) -> list[Tensor]:
        """What there is of features, norms, projection and bias."""
        return [t for t in (self.features, self.norms, self.projection, self.bias) if t is not None]

    @property
    def nbytes(self) -> int:
        """Memory of all faces' tensors; views count as if they were copies."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

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
            index = torch.as_tensor(index if len(index) else range(0), device="cpu")
            index = index if index.numel() else index.long()
        if not isinstance(index, Tensor):
            raise TypeError(f"Templates: index: expected int, slice, list or tensor, got {type(index).__name__}")
        if index.dtype not in (torch.int64, torch.int32, torch.bool) or index.dim() > 1:
            raise TypeError(
                f"Templates: index: expected a one-dimensional tensor of int64 or bool, "
                f"got {dtype_name(index.dtype)} of shape {list(index.shape)}"
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
            f"role={self.role}, attention={attention}, dtype={dtype_name(self.dtype)}, device={self.device})"
        )


def differentiable(attention: AttentionParameters | str) -> bool:
    return isinstance(attention, AttentionParameters) and (
        attention.weight.requires_grad or attention.slope.requires_grad
    )


def described(templates: Templates) -> str:
    return "learned" if templates.learned else f"{templates.attention!r}"


def other_attention(first: Templates, other: Templates) -> str | None:
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
    return f"expected {described(first)} attention like {{first}}, got {described(other)}"
