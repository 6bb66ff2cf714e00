"""Heads and templates that the tests of the all-pairs functions share."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from networks import randomised
from torch import Tensor

from xcos_ext.faces.folders import PersonFolder
from xcos_ext.model import XCosAttention, XCosHead, load_recogniser
from xcos_ext.ops.templates import AttentionParameters, Templates, result_dtype

# Options of XCosAttention that change what the kernels compute.
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"symmetric": False},
    "warm": {"symmetric": False, "temperature": 0.4},
    "min-shift": {"symmetric": False, "normalize": "min-shift"},
    "symmetric": {"symmetric": True, "temperature": 2.0},
    "symmetric min-shift": {"symmetric": True, "normalize": "min-shift"},
    "residual": {"symmetric": False, "residual": True, "temperature": 1.7},
    "symmetric residual": {"residual": True, "symmetric": True},
}

F64 = torch.float64

# Scores of stored templates against the eager network in fp64: what storing costs.
EAGER_ATOL = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,  # logits of some tens, of 144 terms each, and their softmax
    torch.float16: 3e-3,  # half an ulp, 2^-11, of every unit feature and of projections of some units
    torch.bfloat16: 2e-2,  # half an ulp is 2^-8
}

# Scores against the fp64 reference on the very same stored values: what computing costs. Half-precision templates may
# be computed with in 16 bits of their own (fixed point for learned attention, bfloat16 products for fixed one), finer
# than bfloat16 stores them: some ten steps of 2^-14 of the largest projection in logits, far less in scores.
PAIRS_ATOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-3,
}

# The mean of the same errors over many pairs.
PAIRS_MEAN = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


@functools.cache
def real_features(data: Path, faces: int) -> tuple[XCosHead, Tensor]:
    """An untrained head in fp64 and its F [N, 32, 7, 7] of LFW faces through MobileFaceNet's body.

    The batch norms' statistics are those of the faces, as training leaves them; so logits differ from pair to pair.
    """
    pictures = PersonFolder(data / "lfw112.zip")
    network = load_recogniser(data / "mobilefacenet_arcface.pt")
    torch.manual_seed(5)
    built = randomised(XCosHead(512, 32, attention=XCosAttention(symmetric=False)))
    assert isinstance(built, XCosHead)
    norms = [module for module in built.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    with torch.no_grad():
        grid = network.grid(network.preprocessing([pictures.read(key) for key in pictures.keys[:faces]])).double()
        built.train()(grid, grid.flip(0))
        built.eval()
        return built, built.features(grid)


def attention(kind: str = "softmax", channels: int = 32, hidden: int = 16) -> XCosAttention:
    """fp64, evaluation mode, batch norms and slopes away from their neutral values."""
    net = XCosAttention(channels, hidden, **KINDS[kind])
    if net.residual:  # its last layer starts at zero
        net.attention[3].reset_parameters()
    module = randomised(net)
    assert isinstance(module, XCosAttention)
    return module


def head(kind: str = "softmax", channels: int = 32, hidden: int = 16) -> XCosHead:
    module = randomised(XCosHead(8, channels, attention=attention(kind, channels, hidden)))
    assert isinstance(module, XCosHead)
    return module


def features(faces: int, channels: int = 32, grid: tuple[int, int] = (7, 7), dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(faces, channels, *grid, dtype=F64).to(dtype)


def eager(module: XCosHead | XCosAttention, a: Tensor, b: Tensor) -> Tensor:
    """Scores [P, G] of the eager network, pair by pair."""
    p, g = len(a), len(b)
    first, second = a.repeat_interleave(g, 0), b.repeat(p, 1, 1, 1)
    if isinstance(module, XCosHead):
        return module.score(first, second).view(p, g)
    similarity = torch.nn.functional.cosine_similarity(first, second, dim=1)
    return (module(first, second) * similarity).sum((1, 2)).view(p, g)


def random_parameters(kind: str = "softmax", hidden: int = 16, dtype: torch.dtype = F64) -> AttentionParameters:
    options = {name: value for name, value in KINDS[kind].items() if name != "residual"}
    return AttentionParameters(
        weight=(torch.randn(hidden, 3, 3, dtype=F64) / hidden**0.5).to(result_dtype(dtype)),
        slope=torch.tensor([0.2], dtype=result_dtype(dtype)),
        **options,
    )


def random_templates(
    faces: int,
    role: str = "probe",
    *,
    parameters: AttentionParameters | str = "uniform",
    channels: int = 32,
    grid: tuple[int, int] = (7, 7),
    dtype: torch.dtype = F64,
) -> Templates:
    """Templates of any shape, without a network behind them."""
    t = Templates.from_features(features(faces, channels, grid), dtype=dtype)
    if isinstance(parameters, str):
        return dataclasses.replace(t, attention=parameters, role=role)
    layers, cells = parameters.orders + (role == "both"), grid[0] * grid[1]
    return dataclasses.replace(
        t,
        attention=parameters,
        role=role,
        projection=torch.randn(faces, layers, parameters.hidden, cells, dtype=F64).to(dtype),
        bias=torch.randn(faces, layers, cells, dtype=F64).to(result_dtype(dtype)),
    )


def sides(
    probes: int,
    gallery: int,
    kind: str = "softmax",
    *,
    hidden: int = 16,
    dtype: torch.dtype = F64,
    device: str = "cpu",
    **shape: Any,
) -> tuple[Templates, Templates]:
    """Random probes and gallery with learned attention."""
    parameters = random_parameters(kind, hidden, dtype)
    p = random_templates(probes, "probe", parameters=parameters, dtype=dtype, **shape)
    g = random_templates(gallery, "gallery", parameters=parameters, dtype=dtype, **shape)
    return p.to(device), g.to(device)


NAMES = ("features", "projection", "bias")


def leaves(probes: Templates, gallery: Templates, dtype: torch.dtype | None = None) -> tuple[Any, Any, list[Tensor]]:
    """Both sides with fresh leaves that require gradients, optionally in another dtype, and these eight leaves:
    features, projection and bias of the probes and of the gallery, weight, slope."""
    if dtype is not None:
        probes, gallery = probes.to(dtype), gallery.to(dtype)
    old = probes.parameters
    weight, slope = (t.detach().clone().requires_grad_() for t in (old.weight, old.slope))
    parameters = dataclasses.replace(old, weight=weight, slope=slope)
    made, tensors = [], []
    for side in (probes, gallery):
        parts = {name: getattr(side, name).detach().clone().requires_grad_() for name in NAMES}
        tensors += list(parts.values())
        made.append(dataclasses.replace(side, attention=parameters, **parts))
    return made[0], made[1], [*tensors, weight, slope]
