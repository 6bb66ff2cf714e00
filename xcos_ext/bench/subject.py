"""What is measured on: a model, generated crops and features, a photograph, and files made of the model on the way."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xcos_ext.backbones.recogniser import Recogniser
from xcos_ext.deploy import for_inference
from xcos_ext.model import XCosModel

if TYPE_CHECKING:
    from xcos_ext.faces import Detector
    from xcos_ext.ops.templates import Templates

__all__ = ["TORCH_DTYPES", "Subject", "default_picture"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FEATURES_AT_ONCE = 1000
#: Kinds of things made for one batch size.
_OF_A_BATCH = ("images", "features", "reference", "compiled", "engine")


def default_picture() -> Path | None:
    """The photograph of this package's checkout; None where the package is installed without it."""
    file = Path(__file__).resolve().parents[2] / "examples" / "photographs" / "astronaut.jpg"
    return file if file.is_file() else None


class _Typed(nn.Module):
    """A backbone that computes in a type of its own: fp32 map out, whatever it is inside."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).to(dtype)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype)
        grid = self.backbone.grid(images) if isinstance(self.backbone, Recogniser) else self.backbone(images)
        return grid.to(torch.float32)


class Subject:
    """A model with the inputs that all runtimes get. A context manager: its folder of made files goes at the end.

    Args:
        model: in evaluation mode, on the CPU.
        picture: a JPEG, or another picture file, that shows a face; None: stages of pictures have no input.
        detector: as :func:`xcos_ext.faces.create_detector` takes it.
        gallery: faces that are searched.
        seed: of the generated inputs.

    Raises:
        ValueError: a model in training mode.
    """

    def __init__(
        self,
        model: XCosModel,
        *,
        picture: str | os.PathLike[str] | None = None,
        detector: str = "cascade",
        gallery: int = 20_000,
        seed: int = 0,
    ) -> None:
        if model.training:
            raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
        self.model = model
        self.picture = picture
        self.detector_name = detector
        self.gallery_size = gallery
        self.seed = seed
        self._made: dict[Any, Any] = {}
        self._failed: dict[Any, Exception] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._made.clear()
        self._failed.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def folder(self) -> Path:
        """For files that runtimes make: graphs, engines."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="xcos-bench-")
        return Path(self._folder.name)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made when it is first asked for; a failure is raised again, not tried again."""
        if name in self._failed:
            raise self._failed[name]
        if name not in self._made:
            try:
                # Not as inference tensors, whoever asks: compiled code would copy those in every call.
                with torch.inference_mode(False), torch.no_grad():
                    self._made[name] = make()
            except Exception as error:
                self._failed[name] = error
                raise
        return self._made[name]

    def forget(self) -> None:
        """Let go of what belongs to one batch size; models, graphs and the gallery stay."""
        for made in (self._made, self._failed):
            for name in [name for name in made if name[0] in _OF_A_BATCH]:
                del made[name]

    # --- models

    def on(self, device: str) -> XCosModel:
        """The model as it is."""
        if device == "cpu":
            return self.model
        found: XCosModel = self.once(("model", device), lambda: copy.deepcopy(self.model).to(device))
        return found

    def eager(self, device: str, dtype: str) -> XCosModel:
        """The model as it is, its backbone in another type; the head computes in fp32 in any case."""
        model = self.on(device)
        if dtype == "fp32":
            return model

        def make() -> XCosModel:
            typed = copy.copy(model)
            typed._modules = dict(model._modules)
            typed.backbone = _Typed(model.backbone, TORCH_DTYPES[dtype]).requires_grad_(False).eval()
            return typed

        found: XCosModel = self.once(("eager", device, dtype), make)
        return found

    def folded(self, device: str, dtype: str) -> XCosModel:
        """The model as :func:`xcos_ext.model.for_inference` makes it."""
        found: XCosModel = self.once(
            ("folded", device, dtype), lambda: for_inference(self.on(device), TORCH_DTYPES[dtype])
        )
        return found

    # --- inputs

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000 + place)

    def images(self, batch: int, device: str, side: int = 0) -> Tensor:
        """Crops [N, 3, height, width], normalised: smooth noise in the range that the model's preprocessing gives."""

        def make() -> Tensor:
            preprocessing = self.model.preprocessing
            coarse = torch.rand(batch, 3, 14, 14, generator=self._generator(side))
            pixels = nn.functional.interpolate(coarse, size=preprocessing.size, mode="bilinear")
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
            return ((pixels - mean) / std).contiguous().to(device)

        found: Tensor = self.once(("images", batch, device, side), make)
        return found

    def features(self, batch: int, device: str, side: int = 0) -> Tensor:
        """F [N, C, H, W] of :meth:`images`."""

        def make() -> Tensor:
            return self.on(device).features(self.images(batch, device, side)).contiguous()

        found: Tensor = self.once(("features", batch, device, side), make)
        return found

    def reference(self, batch: int, device: str) -> NDArray[np.float64]:
        """Scores [N] of the pairs of :meth:`images`, by the model as it is."""

        def make() -> NDArray[np.float64]:
            scores = self.on(device)(self.images(batch, device), self.images(batch, device, 1)).score
            return scores.double().cpu().numpy()  # type: ignore[no-any-return]

        found: NDArray[np.float64] = self.once(("reference", batch, device), make)
        return found

    def templates(self, count: int, device: str, dtype: str, role: str) -> Templates:
        """Templates of generated features: directions at random, lengths as the model's features have them."""
        from xcos_ext.ops.templates import Templates

        def make() -> Templates:
            shape = self.features(1, device).shape[1:]
            scale = float(self.features(1, device).norm(dim=1).mean()) or 1.0
            generator = self._generator(2 if role == "probe" else 3)
            model, parts = self.on(device), []
            for start in range(0, count, _FEATURES_AT_ONCE):
                drawn = torch.randn(min(_FEATURES_AT_ONCE, count - start), *shape, generator=generator)
                features = (drawn / drawn.norm(dim=1, keepdim=True) * scale).to(device)
                parts.append(model.templates(features, role, TORCH_DTYPES[dtype]))  # type: ignore[arg-type]
            return Templates.cat(parts)

        found: Templates = self.once(("templates", count, device, dtype, role), make)
        return found

    # --- pictures

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The photograph, uint8 RGB [H, W, 3].

        Raises:
            PictureError: it cannot be read.
            ValueError: there is none.
        """
        from xcos_ext.faces import read_picture

        if self.picture is None:
            raise ValueError("there is no photograph to measure with; name one with --picture")
        return read_picture(self.picture)

    @cached_property
    def detector(self) -> Detector:
        """Finds faces."""
        from xcos_ext.faces import create_detector

        return create_detector(self.detector_name)

    @cached_property
    def landmarks(self) -> NDArray[np.float64]:
        """Five points [5, 2] of the photograph's most prominent face.

        Raises:
            PictureError: it shows none.
        """
        from xcos_ext.faces import choose_face, display_name
        from xcos_ext.io.errors import PictureError

        pixels, name = self.pixels, display_name(self.picture or "")
        faces = self.detector.detect(pixels)
        face = choose_face(faces, (pixels.shape[0], pixels.shape[1]), name=name) if faces else None
        if face is None or face.landmarks is None:
            raise PictureError(f"{name}: no face found, so that there is nothing to align")
        return face.landmarks
