"""The closed-form plug-in: an xCos model from a recogniser with an affine output block, without training."""

from __future__ import annotations

import os

import torch

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.weights import StrPath

from .cells import CellMatrices, cell_matrices, separate, spread_matrix
from .head import ClosedFormHead
from .model import XCosModel
from .statistics import Faces, PlugStatistics, compute_statistics, find_statistics

__all__ = ["DEFAULT_SPREAD", "plug", "plug_statistics"]

#: Sharing between neighbouring cells, in cells: a plateau of both accuracy and localisation (docs/models.md).
DEFAULT_SPREAD = 0.7


def plug_statistics(
    recogniser: Recogniser,
    faces: Faces,
    *,
    project: int | None = None,
    spread: float = DEFAULT_SPREAD,
    note: str = "",
) -> PlugStatistics:
    """Compute the statistics that :func:`plug` centres (and projects) with, to keep them in a file.

    Args:
        recogniser: the network; put into evaluation mode.
        faces: aligned pictures of a few hundred people: uint8 RGB arrays [112, 112, 3] or [N, 112, 112, 3],
            or normalised float tensors [N, 3, 112, 112]; or the network's own maps of them [N, *grid_shape].
        project: also compute this many principal axes per cell.
        spread: the sharing between cells that the axes are for (the mean serves every spread).
        note: where the pictures came from; kept in the file.

    Returns:
        Statistics without thresholds; add them with :func:`dataclasses.replace`.

    Raises:
        ModelError: the output block is not affine.
        ValueError: no or too few faces, or pictures of another size.

    >>> from xcos_ext.backbones import SplitRecogniser
    >>> output = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(147, 8))
    >>> network = SplitRecogniser(torch.nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=8)
    >>> statistics = plug_statistics(network, [torch.randn(20, 3, 112, 112)], project=4)
    >>> statistics.faces, statistics.mean.shape, statistics.basis.shape
    (20, torch.Size([8, 7, 7]), torch.Size([49, 4, 8]))
    """
    recogniser.eval()
    return compute_statistics(recogniser, cell_matrices(recogniser), faces, project=project, spread=spread, note=note)


def plug(
    recogniser: Recogniser,
    faces: Faces | None = None,
    *,
    statistics: PlugStatistics | StrPath | None = None,
    project: int | None = None,
    centre: bool = True,
    spread: float = DEFAULT_SPREAD,
    threshold: float | None = None,
    name: str | None = None,
) -> XCosModel:
    """Turn a recogniser into an explainable model without training.

    In evaluation mode the output block is affine over the 7x7 map x, so emb = sum_ij M_ij x_ij + c. The cell
    feature is F_ij = sum_kl G_ij,kl M_kl x_kl - mean_ij with G a small Gaussian that shares between
    neighbouring cells, W_ij is proportional to |F_ij(A)| |F_ij(B)|, and the score sum W S = sum F(A).F(B) /
    sum |F(A)| |F(B)|.

    Args:
        recogniser: a network with an output block, e.g. ``backbones.create("ir_se_50")`` with weights loaded,
            or a :class:`~xcos_ext.backbones.SplitRecogniser` around one of yours. It becomes the model's
            backbone and is put into evaluation mode; M is taken from its present weights, so plug again after
            training.
        faces: aligned pictures to compute the mean (and the axes) from: uint8 RGB arrays [112, 112, 3] or
            [N, 112, 112, 3], or normalised float tensors [N, 3, 112, 112]. Some hundred different people.
        statistics: the same, computed earlier: a file or a :class:`PlugStatistics`. Refused if it belongs to
            other weights. With neither, the statistics shipped for well-known weights are used if they fit.
        project: keep this many principal axes of every cell (32 gives the usual 32x7x7 template), or None for
            the embedding's full length.
        centre: subtract the mean. Without it no faces are needed, at some cost in accuracy.
        spread: standard deviation of G in cells. 0 keeps every cell on its own, large values approach the
            plain cosine; the default gains accuracy and localisation over 0 (figures in docs/models.md).
        threshold: the decision threshold; by default the one of the statistics, if they have one for this
            form.
        name: the model's name; by default made from the architecture.

    Returns:
        A model in evaluation mode on the recogniser's device.

    Raises:
        ModelError: the output block is not affine, no statistics are known, or they do not fit.
        TypeError: not a recogniser.
        ValueError: bad ``project`` or ``spread``, or too few faces.

    >>> from xcos_ext.backbones import SplitRecogniser
    >>> output = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(147, 8))
    >>> network = SplitRecogniser(torch.nn.AvgPool2d(16), output, grid_shape=(3, 7, 7), embedding_size=8)
    >>> model = plug(network, [torch.randn(20, 3, 112, 112)])
    >>> model.name, model.features(torch.randn(2, 3, 112, 112)).shape
    ('custom+closed-form', torch.Size([2, 8, 7, 7]))
    """
    if not isinstance(recogniser, Recogniser):
        raise TypeError(
            f"recogniser: expected a Recogniser, got {type(recogniser).__name__}; wrap other networks in "
            "xcos_ext.backbones.SplitRecogniser(body, output)"
        )
    if faces is not None and statistics is not None:
        raise ValueError("faces, statistics: give one of them, not both")
    if project is not None and project < 1:
        raise ValueError(f"project: expected a positive integer or None, got {project}")
    sharing = spread_matrix(recogniser.grid_shape[1:], spread)
    recogniser.eval()
    cells = cell_matrices(recogniser)
    known: PlugStatistics | None = None
    if faces is not None:
        known = compute_statistics(recogniser, cells, faces, project=project, spread=spread)
    elif statistics is not None or centre or project is not None:
        known = _known_statistics(recogniser, cells, statistics, project, spread)
    # A depthwise output block needs one [D, C] matrix instead of one per cell.
    weight, scale = separate(cells.matrices) or (cells.matrices.flatten(2).permute(2, 0, 1), None)
    mean = known.mean.double() if known is not None and centre else None
    if mean is not None and sharing is not None:
        mean = (mean.flatten(1) @ sharing.T).view_as(mean)
    basis = known.basis[:, :project] if known is not None and known.basis is not None and project is not None else None
    parameter = next(iter(recogniser.parameters()))
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    tensors = {"scale": scale, "spread": sharing, "mean": mean, "basis": basis}
    head = ClosedFormHead(
        weight.to(dtype).contiguous(),
        constant=cells.constant.to(dtype),
        grid_shape=recogniser.grid_shape,
        **{name: None if tensor is None else tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
    )
    calibration = None if known is None else known.calibration(centre=centre, spread=spread, project=project)
    model = XCosModel(
        recogniser,
        head.to(parameter.device),
        name=name or f"{recogniser.architecture}+closed-form{'' if project is None else f'-{project}'}",
    )
    if calibration is not None:
        model.set_calibration(calibration)
    if threshold is not None:
        model.threshold = threshold
    return model.eval()


def _known_statistics(
    recogniser: Recogniser,
    cells: CellMatrices,
    statistics: PlugStatistics | StrPath | None,
    project: int | None,
    spread: float,
) -> PlugStatistics:
    """Those given, or those shipped for these weights, if they fit."""
    fingerprint = fingerprint_weights(recogniser)
    if statistics is None:
        found, origin = find_statistics(fingerprint), "the shipped statistics"
        if found is None:
            raise ModelError(
                f"{recogniser.architecture}: no statistics are known for these weights ({fingerprint}); pass "
                "faces= (some hundred aligned pictures) or statistics=, or centre=False"
            )
        known = found
    elif isinstance(statistics, PlugStatistics):
        known, origin = statistics, "statistics"
    elif not isinstance(statistics, str | os.PathLike):
        raise TypeError(f"statistics: expected a path or PlugStatistics, got {type(statistics).__name__}")
    else:
        known, origin = PlugStatistics.load(statistics), os.fspath(statistics)
    if known.fingerprint != fingerprint:
        raise ModelError(
            f"{origin}: these statistics belong to weights {known.fingerprint}, the recogniser's are {fingerprint}"
        )
    expected = (cells.matrices.shape[0], *cells.matrices.shape[2:])
    if tuple(known.mean.shape) != expected:
        raise ModelError(f"{origin}: mean: expected {list(expected)}, got {list(known.mean.shape)}")
    if project is not None:
        axes = 0 if known.basis is None else known.basis.shape[1]
        if axes < project:
            raise ModelError(
                f"{origin}: project={project} needs that many axes per cell, the statistics have {axes}; "
                "pass faces= to compute them"
            )
        if known.basis_spread != spread:
            raise ModelError(
                f"{origin}: the axes were computed for spread={known.basis_spread}, not {spread}; pass "
                "faces= or that spread"
            )
    return known
