"""An exported graph at work in onnxruntime, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xcos_ext.card.card import INPUTS, Kind, OnnxCard
from xcos_ext.io.arrays import refuse_masked
from xcos_ext.io.errors import ModelError
from xcos_ext.io.optional import need
from xcos_ext.io.several import several
from xcos_ext.onnx.files import contents_hash, metadata, read_onnx
from xcos_ext.onnx.session import CPU, Provider, check_threads, run_graph, session_of

if TYPE_CHECKING:
    from xcos_ext.ops.templates import Role, Templates

__all__ = ["OnnxModel", "PairMaps"]


class PairMaps(NamedTuple):
    """Attributes: score [N], similarity and attention [N, H, W], fp32."""

    score: np.ndarray
    similarity: np.ndarray
    attention: np.ndarray


class OnnxModel:
    """A graph of :func:`export_onnx`, run by onnxruntime; needs neither torch nor the model that it was made of.

    Args:
        path: the graph.
        threads: that one run uses; None: as onnxruntime decides.
        providers: onnxruntime's execution providers, best first, by name or (name, options); None: the CPU.

    Attributes:
        card: the file's metadata.
        kind, name, preprocessing, threshold, fmr_curve: the card's own.
        batch_size: the batch that the graph is for, so that others are run in parts of it; None: any.

    Raises:
        ModelError: a file that cannot be read as a graph, one without xcos_ext's metadata, one whose graph was
            changed after it was written, or one that onnxruntime cannot load.
        ValueError: a number of threads below 1, or a provider that this onnxruntime does not have.
        MissingPackageError: onnx or onnxruntime is not installed.
    """

    #: A graph is always in evaluation mode.
    training = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
    ) -> None:
        check_threads(threads)
        runtime = need("onnxruntime", "running an ONNX graph", extra="onnx")
        proto = read_onnx(path)
        where, notes = os.fspath(path), metadata(proto)
        opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
        self.card = card = OnnxCard.from_metadata(notes, opset, where)
        self.kind, self.name, self.preprocessing = card.kind, card.name, card.preprocessing
        self.threshold, self.fmr_curve = card.threshold, card.fmr_curve
        if notes.get("xcos.sha256") != contents_hash(proto):
            raise ModelError(f"{where}: the graph is not the one that was written: its checksum differs")
        expected = INPUTS[self.kind]
        if tuple(value.name for value in proto.graph.input) != expected:
            raise ModelError(f"{where}: damaged: expected inputs {', '.join(expected)} of a {self.kind} graph")
        dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
        self.batch_size: int | None = None if dim.dim_param else dim.dim_value
        chosen = CPU if providers is None else list(several(providers, "providers", ordered=True))
        known = runtime.get_available_providers()
        missing = [name for name in (one if isinstance(one, str) else one[0] for one in chosen) if name not in known]
        if missing:
            raise ValueError(f"providers: expected some of {', '.join(known)}, got {', '.join(missing)}")
        self._session, self._where = session_of(proto, where, threads, chosen), where
        self._made_from = partial(type(self), os.path.abspath(where), threads=threads, providers=providers)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also in another process, reads the file for itself."""
        return self._made_from, ()

    def fingerprint(self) -> str:
        """Of the model that the graph was made of."""
        return self.card.fingerprint

    def pair(self, images_a: np.ndarray, images_b: np.ndarray) -> PairMaps:
        """Score, S and W of N pairs of faces.

        Args:
            images_a: the first faces: aligned crops uint8 RGB [N, height, width, 3], which are normalised here, or
                fp32 [N, 3, height, width] that went through :attr:`preprocessing`.
            images_b: the second faces, as many.

        Raises:
            RuntimeError: a graph of another kind.
            TypeError, ValueError: another dtype or shape, or pixels that were not normalised.
        """
        self._need("pair")
        a, b = self._images(images_a, "images_a"), self._images(images_b, "images_b")
        if len(a) != len(b):
            raise ValueError(f"images_b: expected {len(a)} images like images_a, got {len(b)}")
        return PairMaps(*self._run(images_a=a, images_b=b))

    def templates(self, images: np.ndarray) -> np.ndarray:
        """Flat templates [N, T], fp32, of N faces; arguments and errors as for :meth:`pair`."""
        self._need("template")
        found: np.ndarray = self._run(images=self._images(images, "images"))[0]
        return found

    def score(self, templates_a: np.ndarray, templates_b: np.ndarray) -> PairMaps:
        """Score, S and W of N pairs of flat templates [N, T], fp32.

        Raises:
            RuntimeError: a graph of another kind.
            TypeError, ValueError: another dtype or shape.
        """
        self._need("score")
        given = {"templates_a": templates_a, "templates_b": templates_b}
        refuse_masked(**given)
        for name, value in given.items():
            if not isinstance(value, np.ndarray) or value.dtype != np.float32:
                raise TypeError(
                    f"{name}: expected a float32 array, got {getattr(value, 'dtype', type(value).__name__)}"
                )
            if value.ndim != 2 or value.shape[1] != self.card.layout.size:
                raise ValueError(f"{name}: expected [N, {self.card.layout.size}], got {list(value.shape)}")
        if len(templates_a) != len(templates_b):
            raise ValueError(f"templates_b: expected {len(templates_a)} templates, got {len(templates_b)}")
        return PairMaps(*self._run(**given))

    def as_templates(self, templates: np.ndarray, role: Role = "probe") -> Templates:
        """Flat templates as :class:`xcos_ext.Templates`, for galleries and all-pairs operators (this needs torch).

        Args:
            templates: [N, T], from a graph of kind ``"template"``.
            role: ``"probe"``, ``"gallery"`` or ``"both"``.
        """
        from .flat_templates import from_flat

        return from_flat(self.card, templates, role)

    def compare(self, a: np.ndarray, b: np.ndarray) -> tuple[PairMaps, float]:
        """Two aligned crops, uint8 RGB [height, width, 3]: the maps of (A, B), and the score of (B, A)."""
        maps = self.pair(a[None], b[None])
        turned = maps if self.card.symmetric else self.pair(b[None], a[None])
        return maps, float(turned.score[0])

    def _need(self, kind: Kind) -> None:
        if self.kind != kind:
            raise RuntimeError(f"model: expected a graph of kind {kind!r}, got {self.kind!r}")

    def _images(self, images: np.ndarray, argument: str) -> np.ndarray:
        height, width = self.preprocessing.size
        refuse_masked(**{argument: images})
        if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
            raise TypeError(
                f"{argument}: expected a uint8 or float32 array, got {getattr(images, 'dtype', type(images).__name__)}"
            )
        if images.dtype == np.uint8:
            if images.ndim != 4 or images.shape[1:] != (height, width, 3):
                raise ValueError(f"{argument}: expected uint8 [N, {height}, {width}, 3], got {list(images.shape)}")
            return self.preprocessing.array(images)
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(f"{argument}: expected float32 [N, 3, {height}, {width}], got {list(images.shape)}")
        if images.size:
            self.preprocessing.check_normalised(
                float(images.min()),
                float(images.max()),
                argument,
                "give uint8 crops, or call preprocessing.array(faces)",
            )
        return images

    def _run(self, **given: np.ndarray) -> list[Any]:
        name, count = next((name, len(value)) for name, value in given.items())
        if count == 0:
            raise ValueError(f"{name}: expected at least one, got an empty batch")
        size = self.batch_size or count
        if size == count:
            return run_graph(self._session, {k: np.ascontiguousarray(v) for k, v in given.items()}, self._where)
        # A last part that is too small sees its last one again.
        rows = np.minimum(np.arange(count + -count % size), count - 1).reshape(-1, size)
        parts = [run_graph(self._session, {k: v[i] for k, v in given.items()}, self._where) for i in rows]
        return [np.concatenate(values)[:count] for values in zip(*parts, strict=True)]

    def __repr__(self) -> str:
        return (
            f"OnnxModel(kind={self.kind!r}, name={self.name!r}, dtype={self.card.dtype!r}, threshold={self.threshold})"
        )
