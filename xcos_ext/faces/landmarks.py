"""Five landmarks and a verdict for every rough box: the network of :mod:`.landmark_network` on pictures.

The weights that come with the package were distilled from YuNet by ``recipes/train_landmarks.py``; docs/verify.md
explains and measures.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from xcos_ext.io.errors import ModelError
from xcos_ext.io.shipped import DATA

from .alignment import ARCFACE_TEMPLATE, apply_transform, compose, invert, similarity_transform, warp

if TYPE_CHECKING:
    from .landmark_network import LandmarkNetwork

__all__ = ["CROP_CENTRE", "CROP_SIDE", "MIRRORED", "LandmarkReader", "crop_transform", "load_network"]

_WEIGHTS = DATA / "landmarks.safetensors"
_FORMAT, _VERSION = "xcos_ext.landmarks", "1"

#: The square that the network sees, in coordinates of the template: centre (x, y) and side.
CROP_CENTRE = (56.0, 66.0)
CROP_SIDE = 112.0
#: The order of a mirrored face's landmarks.
MIRRORED = (1, 0, 2, 4, 3)

_HOPELESS = 0.02  # not worth a second reading
_PLAUSIBLE = (0.25, 4.0)  # a first reading's size against its box; beyond, it is no face


def crop_transform(size: int) -> np.ndarray:
    """From the template to a crop of ``size`` pixels a side, [2, 3]; pixel centres are at whole coordinates."""
    zoom = size / CROP_SIDE
    return np.array(
        [[zoom, 0, (size - 1) / 2 - zoom * CROP_CENTRE[0]], [0, zoom, (size - 1) / 2 - zoom * CROP_CENTRE[1]]]
    )


class LandmarkReader:
    """Reads landmarks twice: roughly in the box, then in the upright crop that the first reading gives and in its
    mirror image. Not thread-safe.

    Args:
        weights: a file of ``recipes/train_landmarks.py``; None for the one that comes with the package.

    Raises:
        ModelError: the file is missing, damaged, or of another network.

    >>> landmarks, scores = LandmarkReader().read(np.zeros((64, 64), np.uint8), np.eye(2, 3)[None])
    >>> landmarks.shape, bool(scores[0] < 0.5)
    ((1, 5, 2), True)
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        try:
            self._network = load_network(_WEIGHTS if weights is None else weights)
        except ModelError as error:
            if weights is not None:
                raise
            raise ModelError(f"{error}; the file comes with xcos_ext: install the package again") from error
        self._to_crop = crop_transform(self._network.size)

    def read(self, grey: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Landmarks of faces that are roughly known.

        Args:
            grey: the picture, uint8 [H, W].
            starts: roughly from the picture to the template, [N, 2, 3]; from a box, say.

        Returns:
            landmarks fp64 [N, 5, 2], (x, y) in pixels of the picture in the order of
            :data:`~xcos_ext.faces.ARCFACE_TEMPLATE`; scores [N] in [0, 1], the probability that it is a face. Where it
            is none, the score is low and the landmarks mean nothing; they are finite nevertheless.
        """
        starts = np.asarray(starts, np.float64).reshape(-1, 2, 3)
        matrices = np.array([compose(self._to_crop, start) for start in starts]).reshape(-1, 2, 3)
        landmarks, scores = self._look(grey, matrices, mirror=False)
        refined = {}
        for i in np.flatnonzero(scores >= _HOPELESS):
            upright = _upright(landmarks[i], starts[i])
            if upright is None:
                scores[i] = 0
            else:
                refined[i] = compose(self._to_crop, upright)
        if refined:
            chosen = list(refined)
            landmarks[chosen], scores[chosen] = self._look(grey, np.array(list(refined.values())), mirror=True)
        return landmarks, scores

    def _look(self, grey: np.ndarray, matrices: np.ndarray, *, mirror: bool) -> tuple[np.ndarray, np.ndarray]:
        """One reading in each crop, or the mean of two with its mirror image."""
        import torch

        size = self._network.size
        if not len(matrices):
            return np.zeros((0, 5, 2)), np.zeros(0)
        crops = np.stack([warp(grey, matrix, (size, size), extend=True) for matrix in matrices])
        if mirror:
            crops = np.concatenate([crops, crops[:, :, ::-1]])
        with torch.inference_mode():
            found, logits, _ = self._network(torch.from_numpy(crops)[:, None])
        points, scores = found.double().numpy(), logits.double().sigmoid().numpy()
        if mirror:
            direct, mirrored = points[: len(matrices)], points[len(matrices) :, MIRRORED]
            mirrored[..., 0] = size - 1 - mirrored[..., 0]
            points = (direct + mirrored) / 2
            scores = scores.reshape(2, -1).mean(0)
        return np.stack([apply_transform(invert(m), p) for m, p in zip(matrices, points, strict=True)]), scores


def _upright(landmarks: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """The transform from the picture to the template by a first reading; None if it makes no sense."""
    try:
        upright = similarity_transform(landmarks, ARCFACE_TEMPLATE)
    except ValueError:  # all points in one place
        return None
    change = float(np.sqrt(np.linalg.det(upright[:, :2]) / np.linalg.det(start[:, :2])))
    return upright if _PLAUSIBLE[0] < change < _PLAUSIBLE[1] else None


def load_network(path: str | os.PathLike[str]) -> LandmarkNetwork:
    """The network of a weights file, in evaluation mode.

    Raises:
        ModelError: the file is missing, damaged, or of another network.
    """
    import torch

    from xcos_ext.io.weights import read_safetensors

    from .landmark_network import LandmarkNetwork

    tensors, metadata = read_safetensors(path)
    found = (metadata.get("xcos_format"), metadata.get("version"))
    if found != (_FORMAT, _VERSION):
        raise ModelError(f"{path}: expected landmark weights of version {_VERSION}, got {found[0]!r} of {found[1]!r}")
    try:
        # The caller's random numbers stay as they are, and his default device and dtype are his.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            network = LandmarkNetwork(**json.loads(metadata["network"])).float()
        network.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path}: landmark weights that do not fit their network ({reason:.200})") from error
    if not all(bool(t.isfinite().all()) for t in network.state_dict().values()):
        raise ModelError(f"{path}: expected finite landmark weights, got NaN or infinity")
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_network(path: str | os.PathLike[str], network: LandmarkNetwork, notes: dict[str, str]) -> None:
    """Write weights that :func:`load_network` reads: fp16 safetensors, with ``notes`` among its metadata.

    Raises:
        OutputError: the file cannot be written; no partial file is left.
    """
    from xcos_ext.io.weights import write_safetensors

    tensors = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    shape = json.dumps({"size": network.size, "width": network.width})
    write_safetensors(path, tensors, {**notes, "xcos_format": _FORMAT, "version": _VERSION, "network": shape})
