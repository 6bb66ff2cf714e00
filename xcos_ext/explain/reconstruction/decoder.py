"""The decoder: a face drawn from what a recogniser kept of it, whole or with parts of that put out, and its files.

The network is our design, see docs/maps.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext.explain.explainers.interface import EmbeddingCosine, PairModel, XCosPairs
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_state
from xcos_ext.io.several import several
from xcos_ext.io.shipped import DATA
from xcos_ext.io.weights import read_safetensors, write_safetensors

__all__ = [
    "FeatureDecoder",
    "decoded",
    "fingerprint_of",
    "load_decoder",
    "reconstruct",
    "save_decoder",
    "shipped_decoders",
    "without",
]

StrPath = str | os.PathLike[str]

_DOUBLINGS = 4  # from a cell to its 16 x 16 pixels
_SEED = (64, 7, 7)  # what an embedding is unfolded to
_BATCH = 64  # pictures decoded at a time
_FORMAT = "xcos-decoder-1"


def _conv(cin: int, cout: int, gain: float = 2.0) -> nn.Conv2d:
    conv = nn.Conv2d(cin, cout, 3, padding=1)
    nn.init.normal_(conv.weight, std=math.sqrt(gain / (9 * cin)))
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class _Block(nn.Module):
    """x + conv(relu(conv(relu x))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = _conv(channels, channels)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class _Cells(nn.Module):
    """A matrix for each cell: [N, C, h, w] -> [N, K, h, w]. A channel need not mean the same in every cell."""

    def __init__(self, shape: tuple[int, int, int], out: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.weight = nn.Parameter(torch.randn(height * width, channels, out) / math.sqrt(channels))
        self.bias = nn.Parameter(torch.zeros(out, height, width))

    def forward(self, x: Tensor) -> Tensor:
        cells = torch.bmm(x.flatten(2).permute(2, 0, 1), self.weight)  # [h * w, N, K]
        return cells.permute(1, 2, 0).unflatten(2, x.shape[2:]) + self.bias


class _Unfold(nn.Module):
    """[N, D] -> [N, K, h, w] by one matrix."""

    def __init__(self, size: int, out: tuple[int, int, int]) -> None:
        super().__init__()
        self.out = out
        self.linear = nn.Linear(size, math.prod(out))
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(size))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x)).unflatten(1, self.out)


class FeatureDecoder(nn.Module):
    """A face's picture from its feature: a grid [C, h, w] or an embedding [D].

    The feature is standardised entry by entry, goes through a matrix of its own for each cell (or one matrix, for an
    embedding), and through residual 3x3 convolutions at 7, 14, 28 and 56 pixels; the last ones make the 2x2 pixels of
    each place. What they make is added to the mean face, so a decoder that knows nothing shows that.

    >>> FeatureDecoder((32, 7, 7))(torch.zeros(1, 32, 7, 7)).shape
    torch.Size([1, 3, 112, 112])

    Args:
        shape: of one feature: (C, h, w) or (D,).
        fingerprint: of the model that makes the features, from
            :func:`~xcos_ext.explain.reconstruction.fingerprint_of`.
        widths: channels at 1, 2, 4 and 8 times the grid's size.
        name: for reports.

    Attributes:
        mean: data-set mean of the features; what removed entries are replaced by.
        scale: their standard deviation; positive.
        mean_face: RGB in 0..1, [3, 16 h, 16 w].

    Raises:
        ValueError: a shape or widths of another form.
    """

    mean: Tensor
    scale: Tensor
    mean_face: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        fingerprint: str = "",
        widths: Sequence[int] = (192, 128, 64, 32),
        name: str = "decoder",
    ) -> None:
        super().__init__()
        shape = tuple(int(size) for size in several(shape, "shape", "numbers", ordered=True))
        widths = tuple(int(width) for width in several(widths, "widths", "numbers", ordered=True))
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ValueError(f"shape: expected (channels, height, width) or (length,), got {shape}")
        if len(widths) != _DOUBLINGS or min(widths) < 1:
            raise ValueError(f"widths: expected {_DOUBLINGS} positive numbers, got {widths}")
        self.shape, self.fingerprint, self.widths, self.name = shape, fingerprint, widths, name
        grid = shape[1:] if len(shape) == 3 else _SEED[1:]
        self.picture_size = (grid[0] << _DOUBLINGS, grid[1] << _DOUBLINGS)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("mean_face", torch.full((3, *self.picture_size), 0.5))
        self.enter: nn.Module
        self.enter = _Cells(shape, _SEED[0]) if len(shape) == 3 else _Unfold(shape[0], _SEED)  # type: ignore[arg-type]
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(cin, cout, gain=1.0), _Block(cout)) for cin, cout in pairwise((_SEED[0], *widths))
        )
        self.leave = _conv(widths[-1], 12, gain=0.002)
        self.unfold = nn.PixelShuffle(2)

    @property
    def grid(self) -> bool:
        """Whether features are grids [C, h, w], not embeddings."""
        return len(self.shape) == 3

    def check(self, features: Tensor) -> None:
        """Refuse what is no batch of features: TypeError if not floating-point, ValueError if not [N, *shape]."""
        if features.dim() != 1 + len(self.shape) or tuple(features.shape[1:]) != self.shape:
            raise ValueError(f"features: expected [N, {_listed(self.shape)}], got {list(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"features: expected floating-point features, got {features.dtype}")

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, *shape] -> pictures, RGB in about 0..1, fp32 [N, 3, H, W], not clamped; differentiable."""
        x = self.enter((features.float() - self.mean) / self.scale)
        x = x.contiguous(memory_format=torch.channels_last)
        for number, stage in enumerate(self.stages):
            if number:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = stage(x)
        return self.mean_face + self.unfold(self.leave(F.relu(x))).float()


# --- features with parts put out


def fingerprint_of(model: PairModel) -> str:
    """Short hash of all that features depend on: an xCos model's own, or of a recogniser's weights and pixels.

    >>> import xcos_ext
    >>> fingerprint_of(XCosPairs(xcos_ext.load_model())) in shipped_decoders()
    True

    Raises:
        ValueError: another kind of model, without a method ``fingerprint()``.
    """
    if isinstance(model, XCosPairs):
        return model.model.fingerprint()
    if isinstance(model, EmbeddingCosine):
        recogniser = model.recogniser
        return fingerprint_state(recogniser.state_dict(), extra=f"embedding {recogniser.preprocessing}")
    own = getattr(model, "fingerprint", None)
    if not callable(own):
        raise ValueError("model: expected an xCos model, a recogniser's cosine or one with fingerprint(), got another")
    return str(own())


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _mask(chosen: Tensor | Sequence[int], shape: tuple[int, ...], argument: str) -> Tensor:
    """bool [1 or N, *shape] of a mask with or without N."""
    mask = torch.as_tensor(chosen)
    if mask.dtype != torch.bool:
        raise TypeError(f"{argument}: expected a bool mask, got {mask.dtype}")
    if tuple(mask.shape[-len(shape) :]) != shape or mask.dim() - len(shape) not in (0, 1):
        raise ValueError(
            f"{argument}: expected bool [{_listed(shape)}] or [N, {_listed(shape)}], got {list(mask.shape)}"
        )
    return mask.reshape(-1, *shape)


def without(
    decoder: FeatureDecoder,
    features: Tensor,
    *,
    channels: Tensor | Sequence[int] | None = None,
    cells: Tensor | None = None,
    entries: Tensor | None = None,
) -> Tensor:
    """Features with a set of entries replaced by the data-set mean of those entries; the others stay as they are.

    >>> decoder = FeatureDecoder((3, 2, 2))
    >>> without(decoder, torch.ones(1, 3, 2, 2), channels=[0, 2]).sum((2, 3))
    tensor([[0., 4., 0.]])

    Args:
        decoder: whose mean is used.
        features: [N, *shape].
        channels: of an embedding, or of a grid in all its cells: numbers, or bool [C] or [N, C].
        cells: of a grid, with all their channels: bool [h, w] or [N, h, w].
        entries: any: bool [*shape] or [N, *shape].

    Returns:
        The features' shape and dtype; a new tensor. Of several kinds of sets the union is replaced.

    Raises:
        TypeError: features that are not floating-point, or a mask that is not bool.
        ValueError: a wrong shape or number, or cells of an embedding.
    """
    decoder.check(features)
    shape, device = decoder.shape, features.device
    removed = torch.zeros(1, *shape, dtype=torch.bool, device=device)
    if channels is not None:
        chosen = torch.as_tensor(several(channels, "channels", "numbers")).to(device)
        if chosen.dtype != torch.bool:
            count, numbers = shape[0], chosen
            chosen = torch.zeros(count, dtype=torch.bool, device=device)
            if numbers.numel():
                if numbers.is_floating_point() or numbers.dim() != 1 or not 0 <= numbers.min() <= numbers.max() < count:
                    raise ValueError(f"channels: expected numbers from 0 to {count - 1} or a bool mask, got {channels}")
                chosen[numbers.long()] = True
        removed = removed | _mask(chosen, shape[:1], "channels").view(-1, shape[0], *(1 for _ in shape[1:]))
    if cells is not None:
        if not decoder.grid:
            raise ValueError("cells: expected a decoder of grid features, got one of embeddings, which have no cells")
        removed = removed | _mask(cells, shape[1:], "cells").to(device).unsqueeze(1)
    if entries is not None:
        removed = removed | _mask(entries, shape, "entries").to(device)
    if len(removed) not in (1, len(features)):
        raise ValueError(f"sets: expected one for all faces or {len(features)}, got {len(removed)}")
    return torch.where(removed, decoder.mean.to(features), features)


@torch.no_grad()
def reconstruct(decoder: FeatureDecoder, features: Tensor, **sets: Any) -> Tensor:
    """Pictures of what was kept of faces, optionally without a set of channels, cells or entries.

    >>> reconstruct(FeatureDecoder((3, 2, 2)).eval(), torch.ones(1, 3, 2, 2), channels=[0]).shape
    torch.Size([1, 3, 32, 32])

    Args:
        decoder: in evaluation mode.
        features: [N, *shape], as ``PairModel.features`` makes them.
        **sets: ``channels``, ``cells``, ``entries``: as for :func:`without`, which also says what is refused.

    Returns:
        RGB in 0..1, fp32 [N, 3, H, W].
    """
    return decoded(decoder, without(decoder, features, **sets))


def decoded(decoder: FeatureDecoder, features: Tensor, batch_size: int = _BATCH) -> Tensor:
    """Pictures in 0..1 of any number of features, some at a time."""
    return torch.cat([decoder(part).clamp(0, 1) for part in features.split(batch_size)])


# --- files


def save_decoder(decoder: FeatureDecoder, path: StrPath, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a decoder as safetensors, its data-set mean and the fingerprint of its features' model with it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_decoder(FeatureDecoder((5,), name="mine"), f"{folder}/mine.safetensors")
    ...     load_decoder(f"{folder}/mine.safetensors").name
    'mine'

    Args:
        decoder: to write.
        path: the file; replaced in one step.
        dtype: floating-point type of the stored weights.

    Raises:
        ModelError: the file cannot be written, or a weight is not finite in ``dtype``.
    """
    tensors = {name: tensor.detach().to(dtype) for name, tensor in decoder.state_dict().items()}
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ModelError(f"{path}: cannot be written: {broken} holds values that {dtype} cannot hold")
    # The mean is put in place of entries as it is: in fp32 it stays the one that was measured.
    tensors |= {name: getattr(decoder, name).detach().float() for name in ("mean", "scale")}
    config = {"shape": decoder.shape, "widths": decoder.widths, "name": decoder.name}
    metadata = {"format": _FORMAT, "config": json.dumps(config), "fingerprint": decoder.fingerprint}
    write_safetensors(path, tensors, metadata)


def load_decoder(path: StrPath) -> FeatureDecoder:
    """A decoder in evaluation mode, fp32, that :func:`save_decoder` wrote.

    >>> load_decoder(next(iter(shipped_decoders().values()))).picture_size
    (112, 112)

    Raises:
        ModelError: missing, damaged, or not a decoder's file.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format", "no such entry")
        raise ModelError(f"{path}: not a decoder's file: expected format {_FORMAT!r} in its metadata, got {found!r}")
    try:
        config: dict[str, Any] = json.loads(metadata["config"])
        decoder = FeatureDecoder(
            config["shape"], fingerprint=metadata["fingerprint"], widths=config["widths"], name=str(config["name"])
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged decoder's file: its metadata cannot be used ({error})") from error
    wanted = decoder.state_dict()
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [n for n, t in wanted.items() if tensors[n].shape != t.shape]
    if wrong:
        raise ModelError(
            f"{path}: damaged decoder's file: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"e.g. {wrong[0]}"
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()) or (tensors["scale"] <= 0).any():
        raise ModelError(f"{path}: damaged decoder's file: it holds values that are not finite, or scales of zero")
    decoder.load_state_dict(tensors)
    nn.Module.to(decoder, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return decoder.eval().requires_grad_(False)


def shipped_decoders() -> dict[str, Path]:
    """Decoders that came with the package: fingerprint of the features' model -> file.

    >>> sorted(file.name for file in shipped_decoders().values())
    ['decoder_mobilefacenet_apache2.safetensors', 'decoder_xcos_slim.safetensors']
    """
    return {read_safetensors(file)[1]["fingerprint"]: file for file in sorted(DATA.glob("decoder_*.safetensors"))}
