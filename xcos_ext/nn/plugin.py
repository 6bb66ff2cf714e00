"""The closed-form plug-in: an xCos model from any recogniser with an affine output block, without training."""

from __future__ import annotations

import torch
from torch import Tensor

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.errors import ModelError

from .cells import CellMatrices, cell_matrices, separate
from .files import StrPath
from .fingerprint import fingerprint_weights
from .head import ClosedFormHead
from .model import XCosModel
from .statistics import (
    Calibration,
    Faces,
    PlugStatistics,
    compute_statistics,
    find_statistics,
    load_or_pass,
)

__all__ = ["plug", "plug_statistics"]


def plug_statistics(
    recogniser: Recogniser,
    faces: Faces,
    *,
    project: int | None = None,
    batch_size: int = 32,
    note: str = "",
) -> PlugStatistics:
    """Compute the statistics that :func:`plug` centres (and projects) with, to keep them in a file.

    Args:
        recogniser: the network; put into evaluation mode.
        faces: aligned pictures of a few hundred people: uint8 RGB arrays [112, 112, 3] or [N, 112, 112, 3], or
            normalised float tensors [N, 3, 112, 112].
        project: also compute this many principal axes per cell.
        batch_size: pictures per forward pass.
        note: where the pictures came from; kept in the file.

    Returns:
        Statistics without thresholds; add them with :func:`dataclasses.replace`.

    Raises:
        ModelError: the output block is not affine.
        ValueError: no or too few faces, or pictures of another size.
    """
    recogniser.eval()
    return compute_statistics(
        recogniser,
        cell_matrices(recogniser),
        faces,
        fingerprint=fingerprint_weights(recogniser),
        project=project,
        batch_size=batch_size,
        note=note,
    )


def plug(
    recogniser: Recogniser,
    faces: Faces | None = None,
    *,
    statistics: PlugStatistics | StrPath | None = None,
    project: int | None = None,
    centre: bool = True,
    threshold: float | None = None,
    batch_size: int = 32,
    name: str | None = None,
) -> XCosModel:
    """Turn a recogniser into an explainable model without training.

    In evaluation mode the output block is affine over the 7x7 map x, so emb = sum_ij M_ij x_ij + c. The cell
    feature is F_ij = M_ij x_ij - mean_ij, W_ij is proportional to |F_ij(A)| |F_ij(B)|, and the score
    sum W S = sum F(A).F(B) / sum |F(A)| |F(B)|.

    Args:
        recogniser: a network with an output block, e.g. ``backbones.create("ir_se_50")`` with weights loaded, or
            a :class:`~xcos_ext.backbones.SplitRecogniser` around one of yours. It becomes the model's backbone
            and is put into evaluation mode; M is taken from its present weights, so plug again after training.
        faces: aligned pictures to compute the mean (and the axes) from: uint8 RGB arrays [112, 112, 3] or
            [N, 112, 112, 3], or normalised float tensors [N, 3, 112, 112]. Some hundred different people.
        statistics: the same, computed earlier: a file or a :class:`PlugStatistics`. Refused if it belongs to
            other weights. With neither, the statistics shipped for well-known weights are used if they fit.
        project: keep this many principal axes of every cell (32 gives the usual 32x7x7 template), or None for the
            embedding's full length.
        centre: subtract the mean. Without it no faces are needed, at some cost in accuracy.
        threshold: the decision threshold; by default the one of the statistics, if they have one for this form.
        batch_size: pictures per forward pass over ``faces``.
        name: the model's name; by default made from the architecture.

    Returns:
        A model in evaluation mode on the recogniser's device.

    Raises:
        ModelError: the output block is not affine, no statistics are known, or they do not fit.
        TypeError: not a recogniser.
        ValueError: bad ``project``, or too few faces.
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
    recogniser.eval()
    cells = cell_matrices(recogniser)
    known: PlugStatistics | None = None
    if faces is not None or statistics is not None or centre or project is not None:
        known = _statistics(recogniser, cells, faces, statistics, project, batch_size)
    head = _head(recogniser, cells, known if centre else None, _basis(known, project))
    calibration = _calibration(known, project, centre)
    if threshold is None and calibration is not None:
        threshold = calibration.threshold
    device = next(iter(recogniser.parameters())).device
    model = XCosModel(
        recogniser,
        head.to(device),
        threshold=threshold,
        name=name or f"{recogniser.architecture}+closed-form{'' if project is None else f'-{project}'}",
        fmr_thresholds=None if calibration is None else calibration.fmr,
    )
    return model.eval()


def _statistics(
    recogniser: Recogniser,
    cells: CellMatrices,
    faces: Faces | None,
    statistics: PlugStatistics | StrPath | None,
    project: int | None,
    batch_size: int,
) -> PlugStatistics:
    fingerprint = fingerprint_weights(recogniser)
    if faces is not None:
        return compute_statistics(
            recogniser, cells, faces, fingerprint=fingerprint, project=project, batch_size=batch_size
        )
    if statistics is not None:
        known, origin = load_or_pass(statistics)
        if known.fingerprint != fingerprint:
            raise ModelError(
                f"{origin}: these statistics belong to weights {known.fingerprint}, the recogniser's are {fingerprint}"
            )
    else:
        found = find_statistics(fingerprint)
        if found is None:
            raise ModelError(
                f"{recogniser.architecture}: no statistics are known for these weights ({fingerprint}); pass faces= "
                "(some hundred aligned pictures) or statistics=, or centre=False"
            )
        known, origin = found, "the shipped statistics"
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
    return known


def _basis(known: PlugStatistics | None, project: int | None) -> Tensor | None:
    if known is None or known.basis is None or project is None:
        return None
    return known.basis[:, :project].double()


def _calibration(known: PlugStatistics | None, project: int | None, centre: bool) -> Calibration | None:
    if known is None:
        return None
    if project is None:
        return known.calibrations.get("centred" if centre else "uncentred")
    # Thresholds of the projected form hold for the number of axes that they were computed with.
    if not centre or known.basis is None or known.basis.shape[1] != project:
        return None
    return known.calibrations.get("projected")


def _head(
    recogniser: Recogniser, cells: CellMatrices, centring: PlugStatistics | None, basis: Tensor | None
) -> ClosedFormHead:
    matrices = cells.matrices
    dim, channels, height, width = matrices.shape
    mean = None if centring is None else centring.mean.double()
    constant: Tensor | None = cells.constant
    scale: Tensor | None = None
    if basis is None:
        # A depthwise output block needs one [D, C] matrix instead of 49.
        separated = separate(matrices)
        if separated is None:
            weight = matrices.flatten(2).permute(2, 0, 1)
        else:
            weight, scale = separated
    else:
        weight = torch.bmm(basis, matrices.flatten(2).permute(2, 0, 1))
        if mean is not None:
            flat_mean = mean.flatten(1).T.unsqueeze(2)  # [P, D, 1]
            mean = torch.bmm(basis, flat_mean).squeeze(2).T.reshape(-1, height, width)
        constant = None
    return ClosedFormHead(
        weight.float().contiguous(),
        scale=None if scale is None else scale.float().contiguous(),
        mean=None if mean is None else mean.float().contiguous(),
        constant=None if constant is None else constant.float(),
        grid_shape=(channels, height, width),
    )
