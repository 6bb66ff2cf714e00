"""What all pairs of a batch cost a training step: through ``xcos_matrix``, and in plain torch.

``recipes/studies/train_step.py`` measures it; figures are in docs/training.md.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from xcos_ext import reference
from xcos_ext.model import XCosAttention, XCosHead
from xcos_ext.training.losses import all_pairs, make_loss

__all__ = ["IMPLEMENTATIONS", "Cost", "compare", "embedded_once", "every_pair", "pair_bytes", "saved_bytes"]


def pair_bytes(head: XCosHead, cells: int) -> int:
    """Bytes that plain autograd keeps of one pair in fp32, embeddings computed once per face.

    With h hidden channels: the attention's input (2 h), what its first convolution, batch norm and activation return
    (h each), what the second ones return (1 each) and the softmax, and the cell's cosine, for each cell.
    """
    hidden = 0 if head.attention is None else head.attention.hidden
    return 4 * cells * (2 * hidden + 3 * hidden + 4)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that ``run`` keeps for its backward pass, memory that several share counted once."""
    kept: dict[int, tuple[Tensor, int]] = {}  # the tensors too: freed memory could come back under its old address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept.values())


def every_pair(head: XCosHead, features: Tensor) -> Tensor:
    """The scores of :func:`all_pairs` as one writes them first: the head in plain torch on a list of B * B pairs."""
    assert head.attention is not None
    count = len(features)
    first, second = features.repeat_interleave(count, 0), features.repeat(count, 1, 1, 1)
    scores = reference.xcos_score(first, second, head.attention(first, second))
    assert isinstance(scores, Tensor)
    return scores.view(count, count)


def embedded_once(head: XCosHead, features: Tensor) -> Tensor:
    """The same with care: embeddings once per face, cosines as one product; the attention still sees every pair."""
    assert head.attention is not None and head.attention.fusable
    count = len(features)
    embedded = head.attention.embed(features)
    pairs = torch.cat((embedded.repeat_interleave(count, 0), embedded.repeat(count, 1, 1, 1)), 1)
    logits = head.attention.attention(pairs).flatten(1) / head.attention.temperature
    unit = F.normalize(features.flatten(2), dim=1)
    similarity = torch.einsum("pci,gci->pgi", unit, unit)
    return (logits.softmax(1).view_as(similarity) * similarity).sum(2)


IMPLEMENTATIONS: dict[str, Callable[[XCosHead, Tensor], Tensor]] = {
    "xcos_matrix": all_pairs,
    "eager, embedded once": embedded_once,
    "eager, every pair": every_pair,
}


class Cost(NamedTuple):
    """One way's step: seconds of each repetition, peak memory above what was there before [bytes], scores, gradient."""

    seconds: list[float]
    peak: int
    scores: np.ndarray
    gradient: np.ndarray


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}")


def measure(way: str, state: bytes, loss: str, pictures: int, threads: int, repeats: int) -> Cost:
    """Forward, loss and backward of one way; run in a process of its own, whose peak nothing else has raised."""
    torch.set_num_threads(threads)
    tensors = load(state)
    grids = tensors.pop("grids").float()
    head = XCosHead(grids.shape[1], attention=XCosAttention(symmetric=False)).eval()
    head.load_state_dict(tensors)
    people = torch.arange(len(grids)) // pictures  # who they really are does not matter for the cost
    compute_loss = make_loss(loss)

    def step(count: int) -> Tensor:
        head.zero_grad(set_to_none=True)
        scores = IMPLEMENTATIONS[way](head, head.features(grids[:count]))
        compute_loss(scores, people[:count]).backward()
        return scores.detach()

    step(2 * pictures)  # libraries loaded, threads started
    with contextlib.suppress(OSError):  # forget an earlier peak; where that is forbidden, it was a small one
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    scores = step(len(grids))
    peak = max(0, _resident("VmHWM") - before)
    gradient = head.conv1x1[0].weight.grad
    assert isinstance(gradient, Tensor)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(len(grids))
        seconds.append(time.perf_counter() - start)
    return Cost(seconds, peak, scores.numpy(), gradient.numpy().copy())


def compare(
    head: XCosHead, grids: Tensor, loss: str, pictures: int, *, rounds: int = 3, repeats: int = 5
) -> dict[str, Cost]:
    """One step of each way on the same faces, each in fresh processes; in turns, so that other load meets them all."""
    state = save({**{name: t.contiguous() for name, t in head.state_dict().items()}, "grids": grids.contiguous()})
    costs: dict[str, Cost] = {}
    for _ in range(rounds):
        for way in IMPLEMENTATIONS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cost = pool.apply(measure, (way, state, loss, pictures, torch.get_num_threads(), repeats))
            known = costs.get(way, cost._replace(seconds=[]))
            costs[way] = cost._replace(seconds=known.seconds + cost.seconds, peak=max(known.peak, cost.peak))
    return costs
