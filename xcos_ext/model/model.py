"""A backbone and a head joined into a model of explainable face similarity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xcos_ext.backbones.recogniser import Recogniser, in_type_of
from xcos_ext.card.calibration import Calibration, FMRCurve, check_threshold
from xcos_ext.card.preprocessing import ARCFACE, Preprocessing
from xcos_ext.devices import module_device
from xcos_ext.io.fingerprint import fingerprint_state
from xcos_ext.io.several import several
from xcos_ext.ops import XCosScore
from xcos_ext.ops.templates import Role, Templates

from .head import ClosedFormHead, XCosHead

__all__ = ["Preprocessing", "XCosModel"]


class XCosModel(nn.Module):
    """Images in, explainable similarity out: ``score = sum_ij W_ij * S_ij``.

    ``F = head.features(backbone.grid(images))`` is computed once per face and can be stored; pairs are scored
    from F.

    Args:
        backbone: a :class:`xcos_ext.backbones.Recogniser`, or any module that maps images to the head's
            input.
        head: :class:`XCosHead` (trained) or :class:`ClosedFormHead` (from :func:`plug`).
        preprocessing: pixel normalisation; by default the backbone's own.
        threshold: decision threshold: two faces are the same person if score >= threshold. None: unknown.
        name: for reports.
        fmr_thresholds: thresholds at stated false match rates, e.g. ``{1e-3: 0.31}``.
        fmr_curve: the false match rate at any score. :meth:`set_calibration` sets it, ``threshold`` and
            ``fmr_thresholds`` from one sample. All three are of the scores that the head gives when they are set, and
            unknown once it compares cells differently (:meth:`Head.set_matching`).

    Raises:
        TypeError: a threshold, also one that is set later, that is no number.
        ValueError: one that is not finite.

    >>> model = XCosModel(nn.Conv2d(3, 64, 16, 16), XCosHead(64, 32)).eval()
    >>> score, similarity, attention = model(torch.randn(2, 3, 112, 112), torch.randn(2, 3, 112, 112))
    >>> score.shape, attention.shape
    (torch.Size([2]), torch.Size([2, 7, 7]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: XCosHead | ClosedFormHead,
        *,
        preprocessing: Preprocessing | None = None,
        threshold: float | None = None,
        name: str = "xcos",
        fmr_thresholds: Mapping[float, float] | None = None,
        fmr_curve: FMRCurve | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        if preprocessing is None:
            preprocessing = backbone.preprocessing if isinstance(backbone, Recogniser) else ARCFACE
        self.preprocessing: Preprocessing = preprocessing
        self._calibration: dict[str, tuple[Any, Any]] = {}  # name -> (value, how cells were compared)
        self.threshold = threshold
        self.name = name
        self.fmr_thresholds = dict(fmr_thresholds or {})
        self.fmr_curve = fmr_curve

    def _calibrated(self, name: str) -> Any:
        value, matching = self._calibration[name]
        return value if matching == self.head.matching else None

    @property
    def threshold(self) -> float | None:
        """The decision threshold; None: unknown."""
        found: float | None = self._calibrated("threshold")
        return found

    @threshold.setter
    def threshold(self, threshold: float | None) -> None:
        self._calibration["threshold"] = check_threshold(threshold), self.head.matching

    @property
    def fmr_thresholds(self) -> dict[float, float]:
        """Thresholds at stated false match rates; empty: unknown."""
        found: dict[float, float] | None = self._calibrated("fmr_thresholds")
        return {} if found is None else found

    @fmr_thresholds.setter
    def fmr_thresholds(self, thresholds: dict[float, float]) -> None:
        self._calibration["fmr_thresholds"] = thresholds, self.head.matching

    @property
    def fmr_curve(self) -> FMRCurve | None:
        """The false match rate at any score; None: unknown."""
        found: FMRCurve | None = self._calibrated("fmr_curve")
        return found

    @fmr_curve.setter
    def fmr_curve(self, curve: FMRCurve | None) -> None:
        self._calibration["fmr_curve"] = curve, self.head.matching

    def set_calibration(self, calibration: Calibration) -> None:
        """Take the decision threshold, the thresholds at false match rates and the curve of a calibration."""
        self.threshold = calibration.threshold
        self.fmr_thresholds = dict(calibration.fmr)
        self.fmr_curve = calibration.curve

    @property
    def architecture(self) -> str:
        """The backbone's registry name, or ``"custom"``."""
        return self.backbone.architecture if isinstance(self.backbone, Recogniser) else "custom"

    def _check_images(self, images: Tensor, argument: str) -> None:
        height, width = self.preprocessing.size
        if not isinstance(images, Tensor):
            raise TypeError(
                f"{argument}: expected a tensor [N, 3, {height}, {width}], got {type(images).__name__}; "
                "call model.preprocessing(faces) first"
            )
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(f"{argument}: expected [N, 3, {height}, {width}], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"{argument}: expected normalised floating-point images, got {images.dtype}; "
                "call model.preprocessing(faces) first"
            )
        if self._looks_at_pixels(images):
            least, most = (float(end) for end in torch.aminmax(images.detach()))
            self.preprocessing.check_normalised(least, most, argument, "call model.preprocessing(faces) first")

    def _looks_at_pixels(self, images: Tensor) -> bool:
        """Whether the range of pixels is checked: where users' own pictures come in, and looking costs next to nothing.

        That is evaluation on the CPU (10 microseconds a picture, of milliseconds). On a GPU the host would have to wait
        for it, training augments pictures as it likes, networks that are trained through this one draw what they draw,
        and no graph may depend on values.
        """
        return (
            not self.training
            and not torch.compiler.is_compiling()
            and type(images) in (Tensor, nn.Parameter)  # no stand-ins without values
            and images.device.type == "cpu"
            and images.shape[0] > 0
            and not images.requires_grad
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
        )

    def _grid(self, images: Tensor, argument: str) -> Tensor:
        self._check_images(images, argument)
        images = in_type_of(self.backbone, images)
        made: Tensor = self.backbone.grid(images) if isinstance(self.backbone, Recogniser) else self.backbone(images)
        return made

    def features(self, images: Tensor) -> Tensor:
        """Grid feature F of each face.

        Args:
            images: [N, 3, height, width], normalised by ``preprocessing``; of any floating-point type, they are
                brought to that of the backbone's weights. N may be 0.

        Returns:
            F [N, C, 7, 7]: C = 32 for a trained head, the embedding's length for closed-form cells.

        Raises:
            ValueError: a wrong shape, or, in evaluation mode on the CPU, pixels far outside what ``preprocessing``
                gives, such as 0..255.
            TypeError: not a tensor, or one of integers.
        """
        return self.head.features(self._grid(images, "images"))

    def features_of(self, pictures: Sequence[NDArray[np.uint8]], batch_size: int = 32) -> Tensor:
        """Grid features of aligned pictures, some at a time, on the model's device.

        Args:
            pictures: N >= 0, uint8 RGB [height, width, 3], of the size that ``preprocessing`` expects.
            batch_size: pictures per forward pass.

        Returns:
            F [N, C, 7, 7].

        Raises:
            TypeError, ValueError: pictures of another type or size, or a batch of none.
        """
        pictures = list(several(pictures, "pictures", "pictures", ordered=True))
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        device = module_device(self)
        parts = (pictures[i : i + batch_size] for i in range(0, max(1, len(pictures)), batch_size))
        return torch.cat([self.features(self.preprocessing(part).to(device)) for part in parts])

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[False] = ...) -> Tensor: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: Literal[True]) -> XCosScore: ...

    @overload
    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool) -> Tensor | XCosScore: ...

    def score(self, features_a: Tensor, features_b: Tensor, *, return_maps: bool = False) -> Tensor | XCosScore:
        """Similarity of two batches of grid features.

        Args:
            features_a: F of the first faces [N, C, H, W].
            features_b: F of the second faces, same shape.
            return_maps: also return the cell maps.

        Returns:
            Scores [N], or ``XCosScore(score [N], similarity [N, H, W], attention [N, H, W])``.
        """
        return self.head.score(features_a, features_b, return_maps=return_maps)

    def templates(self, features: Tensor, role: Role = "probe", dtype: torch.dtype | None = None) -> Templates:
        """Templates of faces for all-pairs scoring, search and training: :func:`xcos_ext.xcos_matrix`, ``xcos_topk``.

        Args:
            features: F [N, C, H, W], from :meth:`features`.
            role: ``"probe"`` for the first face of the pairs, ``"gallery"`` for the second, ``"both"`` for either.
            dtype: how to store them: float16, bfloat16, float32 or float64; None: as ``features``.

        Returns:
            :class:`xcos_ext.Templates`.

        Raises:
            RuntimeError: the head is in training mode, matches cells with their neighbourhoods, or was altered so that
                all-pairs scoring would answer otherwise; see :meth:`XCosHead.templates`.
            ValueError: a wrong shape or role.
            TypeError: not a tensor, or a dtype that is not floating-point.
        """
        return self.head.templates(features, role, dtype)

    def forward(self, images_a: Tensor, images_b: Tensor) -> XCosScore:
        """Two batches of images [N, 3, height, width] -> score [N], similarity and attention [N, H, W]."""
        maps: XCosScore = self.head(self._grid(images_a, "images_a"), self._grid(images_b, "images_b"))
        return maps

    def embedding(self, images: Tensor) -> Tensor:
        """The recogniser's own embedding [N, D], for the plain cosine beside the explainable score.

        Raises:
            RuntimeError: the backbone has no output block.
        """
        self._check_images(images, "images")
        if not isinstance(self.backbone, Recogniser):
            raise RuntimeError("backbone: it is not a Recogniser, so it has no embedding")
        return self.backbone(images)

    def fingerprint(self) -> str:
        """Short hash of all that stored features depend on: parameters, kind of head, preprocessing."""
        extra = json.dumps([self.head.kind, self.head.config(), asdict(self.preprocessing)], sort_keys=True)
        return fingerprint_state(self.state_dict(), extra=extra)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, threshold={self.threshold}"
