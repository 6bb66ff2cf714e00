"""All pairs of a gallery's faces against each other, a block of probes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcos_ext.devices import module_device
from xcos_ext.ops.templates import AttentionParameters, Templates
from xcos_ext.ops.xcos_matrix import AllPairs
from xcos_ext.ops.xcos_topk import score_blocks

from .hits import Duplicate, Duplicates, within_one
from .layout import Layout, iter_slices
from .snapshot import Snapshot
from .stream import Tile, stream
from .tiles import TileCache, gather

__all__ = ["as_probes", "find_duplicates", "symmetric"]

#: Faces that meet the whole gallery together.
PROBES = 4096


def symmetric(layout: Layout) -> bool:
    """Whether a pair's two orders have one score."""
    return not isinstance(layout.attention, AttentionParameters) or layout.attention.symmetric


def as_probes(layout: Layout, faces: Templates, model: Any) -> Templates:
    """Stored faces of a gallery as the first of their pairs, made by its model where they cannot be had otherwise."""
    if not isinstance(layout.attention, AttentionParameters):
        return faces.as_probe()
    if layout.attention.symmetric:
        # Order 0 of a gallery face is (-v), order 1 (u); of a probe (u), (-v): the same parts the other way around.
        assert faces.projection is not None and faces.bias is not None
        return Templates(
            faces.features,
            faces.norms,
            faces.grid,
            faces.attention,
            role="probe",
            projection=faces.projection.flip(1),
            bias=faces.bias.flip(1),
        )
    # F is the unit cells times their norms, up to the rounding of storage.
    cells = faces.features.to(faces.norms.dtype) * faces.norms.unsqueeze(2)
    features = cells.transpose(1, 2).unflatten(2, layout.grid)
    return getattr(model, "head", model).templates(features, "probe", layout.dtype)


def find_duplicates(
    snapshot: Snapshot, cache: TileCache, model: Any, threshold: float, tick: Callable[[int, int], None]
) -> Duplicates:
    """All pairs of the gallery's faces that reach a threshold; see :meth:`xcos_ext.gallery.Gallery.dedupe`."""
    layout, device = snapshot.layout, module_device(model)
    both = not symmetric(layout)
    total = snapshot.rows * (snapshot.rows - 1) // (1 if both else 2)
    scored = 0
    best: dict[tuple[int, int], float] = {}  # of two places, the earlier first
    for part in iter_slices(snapshot.rows, PROBES):
        places = snapshot.places_of(np.arange(part.start, part.stop))
        with torch.inference_mode():
            probes = as_probes(layout, gather(snapshot, cache, places).to(device), model)
            own = torch.from_numpy(places).to(device)
            for tile in stream(snapshot, cache, device, begin=0 if both else int(places[0])):
                for i, j, score in _alike(probes, own, tile, threshold, both):
                    pair = (min(i, j), max(i, j))
                    best[pair] = max(score, best.get(pair, -math.inf))
                scored = min(scored + len(places) * len(tile.templates), total)
                tick(scored, total)
    tick(total, total)
    return _grouped(snapshot, best, threshold, total)


def _alike(
    probes: Templates, places: Tensor, tile: Tile, threshold: float, both_orders: bool
) -> Iterator[tuple[int, int, float]]:
    """(place of the probe, place of the face, score) of the pairs that reach the threshold; each once, where a pair's
    orders score alike."""
    pairs = AllPairs("gallery.dedupe", probes, tile.templates, "own")
    for block, part in score_blocks(len(probes), len(tile.templates), pairs.dtype, probes.device):
        scores = pairs.scores(block, part)
        own = places[block].unsqueeze(1)
        others = torch.arange(tile.first + part.start, tile.first + part.stop, device=probes.device)
        found = (scores >= threshold) & (others != own if both_orders else others > own)
        if tile.excluded is not None:
            found &= ~tile.excluded[part]
        row, column = found.nonzero(as_tuple=True)
        yield from zip(own[row, 0].tolist(), others[column].tolist(), scores[row, column].tolist(), strict=True)


def _grouped(snapshot: Snapshot, best: dict[tuple[int, int], float], threshold: float, compared: int) -> Duplicates:
    """Pairs with their labels, and the groups that they make up."""
    places = np.unique(np.array(list(best), np.int64).reshape(-1))
    labels = snapshot.labels(places, ("id", "person"))
    ids, persons = labels["id"], labels["person"]
    positions = snapshot.positions(places).tolist()
    at = {place: i for i, place in enumerate(places.tolist())}
    pairs = []
    root = list(range(len(places)))  # of each face's group: its first face

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for (one, two), score in sorted(best.items()):
        i, j = at[one], at[two]
        pairs.append(
            Duplicate((positions[i], positions[j]), (ids[i], ids[j]), (persons[i], persons[j]), within_one(score))
        )
        low, high = sorted((find(i), find(j)))
        root[high] = low
    groups: dict[int, list[str]] = {}
    for i, name in enumerate(ids):
        groups.setdefault(find(i), []).append(name)
    return Duplicates(pairs, list(groups.values()), threshold, compared, snapshot.version)
