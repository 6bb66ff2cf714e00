"""From five landmarks to the upright 112x112 crop that face recognisers are trained on."""

from __future__ import annotations

import numpy as np

from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.optional import need

from .detector import check_picture

__all__ = [
    "ARCFACE_TEMPLATE",
    "MIRRORED",
    "align_face",
    "apply_transform",
    "checked_landmarks",
    "similarity_transform",
    "template_for",
    "warp",
]

#: Where the ArcFace family expects, on 112x112 pixels (x, y): the eye on the picture's left, the one on its right, the
#: tip of the nose, and the left and right corners of the mouth.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
ARCFACE_TEMPLATE.setflags(write=False)
#: The order of a mirrored face's landmarks.
MIRRORED = (1, 0, 2, 4, 3)


#: How far, in distances from eyes to mouth, eyes or corners of the mouth may seem to have changed places, as they may
#: in a profile, where they all but coincide. The most that any of 1,806 faces had that were found in CFP's profiles and
#: LFW's photographs, upright and turned, was 0.016.
_PROFILE = 0.1


def checked_landmarks(points: object, argument: str = "landmarks", *, upright: bool = False) -> np.ndarray:
    """Five points that a face can have in the template's order, whichever way it leans.

    With left and right exchanged, or x and y, the face would be a mirror image, onto which no rotation leads: it
    would be cut out wrongly, or its parts get each other's names.

    Args:
        points: [5, 2], (x, y) in the order of :data:`ARCFACE_TEMPLATE`.
        argument: its name in messages.
        upright: they lie in an aligned crop: the eyes above the mouth, and apart.

    Returns:
        fp64 [5, 2].

    Raises:
        ValueError: another shape, values that are not finite, or another order.
        TypeError: an array with a mask.

    >>> checked_landmarks(ARCFACE_TEMPLATE[[1, 0, 2, 4, 3]])
    Traceback (most recent call last):
    ValueError: landmarks: expected (x, y) of the left eye, the right eye, the nose and the left and right corner of \
the mouth, left and right as in the picture, got eyes the other way round: [[73.5, 51.5], [38.3, 51.7]]
    """
    refuse_masked(**{argument: points})
    try:
        found = np.array(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected five points [5, 2], got {type(points).__name__}") from error
    if found.shape != (5, 2) or not np.isfinite(found).all():
        raise ValueError(f"{argument}: expected five finite points [5, 2], got shape {list(found.shape)}")
    eyes, mouth = found[:2], found[3:]
    x, y = mouth.mean(0) - eyes.mean(0)
    down = float(np.hypot(x, y))
    if upright and np.hypot(*(eyes[1] - eyes[0])) <= 0.02 * down:
        raise ValueError(f"{argument}: expected two eyes apart, got {eyes[0].tolist()} and {eyes[1].tolist()}")
    wrong = [
        (f"{name} the other way round", pair)
        for name, pair in (("eyes", eyes), ("corners of the mouth", mouth))
        if (pair[1] - pair[0]) @ (y, -x) < -_PROFILE * down**2
    ]
    if upright and y <= 0:
        wrong.append(("eyes that are not above the mouth", found[[0, 1, 3, 4]]))
    if wrong:
        what, pair = wrong[0]
        raise ValueError(
            f"{argument}: expected (x, y) of the left eye, the right eye, the nose and the left and right corner of "
            f"the mouth, left and right as in the picture, got {what}: {pair.round(1).tolist()}"
        )
    return found


def template_for(size: tuple[int, int]) -> np.ndarray:
    """The template for crops of another size (height, width): pixel centres are at whole coordinates.

    >>> template_for((224, 224))[0]
    array([ 77.0892, 103.8926])
    """
    scale = np.array([size[1], size[0]], dtype=np.float64) / 112
    return (ARCFACE_TEMPLATE + 0.5) * scale - 0.5


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, uniform scale and shift that best map points to points: least squares, never a reflection.

    With points as complex numbers that is ``a z + b``, and regression gives both.

    Args:
        source: [N, 2], N >= 2, not all the same point.
        target: [N, 2].

    Returns:
        [2, 3] fp64, for :func:`apply_transform` and :func:`warp`.

    Raises:
        ValueError: other shapes, values that are not finite, or coinciding source points.

    >>> matrix = similarity_transform([[0, 0], [1, 0]], [[5, 5], [5, 7]])  # a quarter turn, twice as large
    >>> apply_transform(matrix, [[0, 1]])
    array([[3., 5.]])
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.ndim != 2 or source.shape[1] != 2 or len(source) < 2 or source.shape != target.shape:
        raise ValueError(f"source, target: expected [N, 2] with N >= 2, got {source.shape} and {target.shape}")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("source, target: expected finite coordinates")
    s, t = (points - points.mean(0) for points in (source, target))
    s, t = s @ (1, 1j), t @ (1, 1j)
    spread = float(np.vdot(s, s).real)
    if spread <= 1e-12 * len(source) * max(1.0, float(np.abs(source).max()) ** 2):
        raise ValueError("source: all points are the same")
    factor = np.vdot(s, t) / spread
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.hstack([linear, (target.mean(0) - linear @ source.mean(0))[:, None]])


def apply_transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points [N, 2] by an affine [2, 3] matrix.

    >>> apply_transform(np.array([[2, 0, 1], [0, 2, 0]]), [[3, 4]])
    array([[7., 8.]])
    """
    return np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: np.ndarray) -> np.ndarray:
    """Inverse of an affine [2, 3] matrix."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.hstack([linear, (-linear @ matrix[:, 2])[:, None]])


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The affine [2, 3] matrix that applies ``inner`` first."""
    return np.hstack([outer[:, :2] @ inner[:, :2], (outer[:, :2] @ inner[:, 2] + outer[:, 2])[:, None]])


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], *, extend: bool = False) -> np.ndarray:
    """Resample a picture by a similarity transform.

    When it shrinks the picture to less than half, the pixels are first averaged over whole blocks, because
    bilinear sampling alone would skip most of them (a face of 1,000 pixels would reach the network as noise).

    Args:
        image: uint8 [H, W] or [H, W, 3].
        matrix: [2, 3], picture coordinates to output coordinates.
        size: (height, width) of the output.
        extend: repeat the border pixels outside the picture; otherwise it is black there.

    Returns:
        uint8 [height, width] or [height, width, 3].

    >>> picture = np.arange(16, dtype=np.uint8).reshape(4, 4)
    >>> warp(picture, np.array([[1.0, 0, -1], [0, 1, -2]]), (2, 2))
    array([[ 9, 10],
           [13, 14]], dtype=uint8)
    """
    cv2 = need("cv2", "face alignment")
    height, width = size
    corners = np.array([[-1, -1], [width, -1], [-1, height], [width, height]], np.float64)
    inside = apply_transform(invert(matrix), corners)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    block = max(1, int(1 / scale))
    # Only the part that is seen is touched: OpenCV's warp is limited to 32,767 pixels a side, and averaging costs.
    limits = np.array([image.shape[1], image.shape[0]])
    low = np.clip(np.floor(inside.min(0)).astype(int) - 2 * block, 0, limits)
    high = np.clip(np.ceil(inside.max(0)).astype(int) + 2 * block + 1, 0, limits)
    if (high <= low).any():  # entirely outside
        low = np.clip(low, 0, limits - 1)
        high = low + 1
        if not extend:
            return np.zeros((height, width, *image.shape[2:]), np.uint8)
    part = np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]])
    to_part = np.array([[1.0, 0.0, low[0]], [0.0, 1.0, low[1]]])  # part coordinates -> picture coordinates
    if block > 1:
        shrunk = np.maximum((high - low) // block, 1)
        ratio = (high - low) / shrunk
        part = cv2.resize(part, (int(shrunk[0]), int(shrunk[1])), interpolation=cv2.INTER_AREA)
        to_part[:, 2] += (ratio - 1) / 2
        to_part[0, 0], to_part[1, 1] = ratio
    border = cv2.BORDER_REPLICATE if extend else cv2.BORDER_CONSTANT
    return cv2.warpAffine(
        part, compose(matrix, to_part), (width, height), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=0
    )


def align_face(rgb: np.ndarray, landmarks: np.ndarray, size: tuple[int, int] = (112, 112)) -> np.ndarray:
    """Cut out a face, upright and to scale.

    Args:
        rgb: uint8 [H, W, 3].
        landmarks: five points (x, y) [5, 2] in the order of :data:`ARCFACE_TEMPLATE`; they may lie outside the picture.
        size: (height, width) of the crop.

    Returns:
        uint8 RGB [height, width, 3]; black where the picture ends.

    Raises:
        ValueError: other shapes or types, landmarks in another order, or landmarks that all coincide.

    >>> photograph = np.zeros((300, 200, 3), np.uint8)
    >>> align_face(photograph, 2 * ARCFACE_TEMPLATE).shape
    (112, 112, 3)
    """
    check_picture(rgb)
    return warp(rgb, similarity_transform(checked_landmarks(landmarks), template_for(size)), size)
