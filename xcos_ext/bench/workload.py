"""What is measured on: a model, generated crops and features, a photograph, and what is made of these on the way."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xcos_ext.deploy import for_inference
from xcos_ext.deploy.graphs import BodyGraph
from xcos_ext.model import XCosModel

if TYPE_CHECKING:
    from xcos_ext.faces import Detector
    from xcos_ext.ops.templates import Templates

__all__ = ["TORCH_DTYPES", "Workload", "default_picture", "once"]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FEATURES_AT_ONCE = 1000
#: What belongs to one batch size.
_OF_A_BATCH = ("images", "features", "reference", "compiled", "engine")

F = TypeVar("F", bound=Callable[..., Any])


def default_picture() -> Path | None:
    """The photograph of this package's checkout; None where the package is installed without it.

    >>> picture = default_picture()
    >>> picture is None or picture.name
    'astronaut.jpg'
    """
    file = Path(__file__).resolve().parents[2] / "examples" / "photographs" / "astronaut.jpg"
    return file if file.is_file() else None


def once(make: F) -> F:
    """A method whose result is made when it is first asked for; a failure is raised again, not tried again."""

    @functools.wraps(make)
    def kept(self: Workload, *args: Any, **kwargs: Any) -> Any:
        name = (make.__name__, *args, *kwargs.values())
        if name not in self._made:
            try:
                # Not as inference tensors, whoever asks: compiled code would copy those in every call.
                with torch.inference_mode(False), torch.no_grad():
                    self._made[name] = make(self, *args, **kwargs)
            except Exception as error:
                self._made[name] = error
        if isinstance(self._made[name], Exception):
            raise self._made[name]
        return self._made[name]

    return kept  # type: ignore[return-value]


class Workload:
    """A model with the inputs that all runtimes get. A context manager: its folder of made files goes at the end.

    >>> from xcos_ext.model import XCosHead, XCosModel
    >>> model = XCosModel(nn.Conv2d(3, 32, 16, 16), XCosHead(32, attention="norm")).eval()
    >>> with Workload(model) as workload:
    ...     workload.images(4, "cpu").shape, workload.features(4, "cpu").shape
    (torch.Size([4, 3, 112, 112]), torch.Size([4, 32, 7, 7]))

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
        detector: str = "small",
        gallery: int = 20_000,
        seed: int = 0,
    ) -> None:
        if model.training:
            raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
        self.model = model
        self.picture = picture
        self.detector_name = detector
        self.faces = 0  # found in the photograph, once somebody has looked
        self.gallery_size = gallery
        self.seed = seed
        self._made: dict[Any, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="xcos-bench-")
        #: For files that runtimes make: graphs, engines.
        self.folder = Path(self._folder.name)

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, *error: object) -> None:
        self._made.clear()
        self._folder.cleanup()

    def forget(self) -> None:
        """Let go of what belongs to one batch size; models, graphs and the gallery stay."""
        self._made = {name: made for name, made in self._made.items() if name[0] not in _OF_A_BATCH}

    # --- models

    @once
    def on(self, device: str) -> XCosModel:
        """The model as it is."""
        return self.model if device == "cpu" else copy.deepcopy(self.model).to(device)

    @once
    def eager(self, device: str, dtype: str) -> XCosModel:
        """The model as it is, its backbone in another type; the head computes in fp32 in any case."""
        model = self.on(device)
        if dtype == "fp32":
            return model
        typed = copy.copy(model)
        typed._modules = dict(model._modules)
        typed.backbone = BodyGraph(model, TORCH_DTYPES[dtype]).to(device).requires_grad_(False).eval()
        return typed

    @once
    def folded(self, device: str, dtype: str) -> XCosModel:
        """The model as :func:`xcos_ext.deploy.for_inference` makes it."""
        return for_inference(self.on(device), TORCH_DTYPES[dtype])

    @once
    def compiled(self, device: str, dtype: str, batch: int, pairs: bool, seconds: float) -> Any:
        """What ``compile_for_inference`` finds in some seconds, for pairs of faces or for single ones."""
        from xcos_ext.deploy.compiled import compile_for_inference

        images = self.images(batch, device)
        example = (images, self.images(batch, device, 1)) if pairs else images
        return compile_for_inference(self.on(device), example, dtypes=(TORCH_DTYPES[dtype],), seconds=seconds)

    @once
    def graph_file(self, kind: str, dtype: str) -> str:
        """The model as an ONNX graph."""
        from xcos_ext.deploy import export_onnx

        path = str(self.folder / f"{kind}-{dtype}.onnx")
        export_onnx(self.model, path, kind=kind, dtype=TORCH_DTYPES[dtype])  # type: ignore[arg-type]
        return path

    @once
    def session(self, kind: str, dtype: str, device: str) -> Any:
        """The graph in onnxruntime, on as many threads as torch has."""
        from xcos_ext.deploy import OnnxModel

        providers: list[Any] | None = None
        if device == "cuda":
            providers = [("CUDAExecutionProvider", {"device_id": torch.cuda.current_device()}), "CPUExecutionProvider"]
        return OnnxModel(self.graph_file(kind, dtype), threads=torch.get_num_threads(), providers=providers)

    @once
    def engine(self, kind: str, dtype: str, device: str, batch: int) -> Any:
        """The graph as a TensorRT engine: kernels for this very batch, as exact or inexact in fp32 as torch's."""
        from xcos_ext.deploy import TrtRunner, build_engine

        path = self.graph_file(kind, dtype)
        plan, tf32 = f"{path.removesuffix('.onnx')}-{batch}.plan", torch.backends.cudnn.allow_tf32
        build_engine(path, plan, profiles=[(batch,) * 3], tf32=tf32, device=device)
        return TrtRunner(plan, device=device)

    # --- inputs

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000 + place)

    @once
    def images(self, batch: int, device: str, side: int = 0) -> Tensor:
        """Crops [N, 3, height, width], normalised: smooth noise in the range that the model's preprocessing gives."""
        preprocessing = self.model.preprocessing
        coarse = torch.rand(batch, 3, 14, 14, generator=self._generator(side))
        pixels = nn.functional.interpolate(coarse, size=preprocessing.size, mode="bilinear")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        return ((pixels - mean) / std).contiguous().to(device)

    @once
    def features(self, batch: int, device: str, side: int = 0) -> Tensor:
        """F [N, C, H, W] of :meth:`images`."""
        return self.on(device).features(self.images(batch, device, side)).contiguous()

    @once
    def reference(self, batch: int, device: str) -> NDArray[np.float64]:
        """Scores [N] of the pairs of :meth:`images`, by the model as it is."""
        scores = self.on(device)(self.images(batch, device), self.images(batch, device, 1)).score
        return scores.double().cpu().numpy()  # type: ignore[no-any-return]

    @once
    def templates(self, count: int, device: str, dtype: str, role: str) -> Templates:
        """Templates of generated features: directions at random, lengths as the model's features have them."""
        from xcos_ext.ops.templates import Templates

        known = self.features(1, device)
        scale = float(known.norm(dim=1).mean()) or 1.0
        generator = self._generator(2 if role == "probe" else 3)
        parts = []
        for start in range(0, count, _FEATURES_AT_ONCE):
            drawn = torch.randn(min(_FEATURES_AT_ONCE, count - start), *known.shape[1:], generator=generator)
            features = (drawn / drawn.norm(dim=1, keepdim=True) * scale).to(device)
            parts.append(self.on(device).templates(features, role, TORCH_DTYPES[dtype]))  # type: ignore[arg-type]
        return Templates.cat(parts)

    # --- pictures

    @once
    def pixels(self) -> NDArray[np.uint8]:
        """The photograph, uint8 RGB [H, W, 3].

        Raises:
            PictureError: it cannot be read, or there is none.
        """
        from xcos_ext.faces import read_picture
        from xcos_ext.io.errors import PictureError

        if self.picture is None:
            raise PictureError("needs a photograph of a face, which the package brings none of: give one by --picture")
        return read_picture(self.picture)

    @once
    def detector(self) -> Detector:
        """Finds faces."""
        from xcos_ext.faces import create_detector

        return create_detector(self.detector_name)

    @once
    def landmarks(self) -> NDArray[np.float64]:
        """Five points [5, 2] of the photograph's most prominent face.

        Raises:
            PictureError: it shows none.
        """
        from xcos_ext.faces import choose_face, display_name
        from xcos_ext.io.errors import PictureError

        pixels, name = self.pixels(), display_name(self.picture or "")
        faces = self.detector().detect(pixels)
        self.faces = len(faces)
        face = choose_face(faces, (pixels.shape[0], pixels.shape[1]), name=name) if faces else None
        if face is None or face.landmarks is None:
            raise PictureError(f"{name}: no face found, so that there is nothing to align")
        return face.landmarks
