"""The first calls: are two pictures the same person, and why; templates of pictures; models and detectors by name."""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import DeviceError, ModelError, XCosError
from xcos_ext.io.text import display_name

if TYPE_CHECKING:
    import numpy as np

    from xcos_ext.deploy import OnnxModel
    from xcos_ext.explain import Explanation
    from xcos_ext.faces import AlignedFace, Detector
    from xcos_ext.model import XCosModel
    from xcos_ext.ops.templates import Templates

__all__ = ["open_model", "represent", "verify", "verify_many"]

_BATCH = 32  # pairs


def verify(
    a: Any,
    b: Any,
    *,
    model: Any = None,
    detector: Any = None,
    device: str = "auto",
    threshold: float | None = None,
    policy: str = "prominent",
    strict: bool = False,
    max_pixels: int | None = None,
) -> Explanation:
    """Are the faces of two pictures the same person's, and why?

    Args:
        a, b: each a path, a Pillow picture, uint8 RGB [H, W, 3], or a face of :func:`xcos_ext.faces.read_face`.
        model: a name (``xcos models list``), a file or an address, as :func:`xcos_ext.load_model` takes them, a pair
            graph (``.onnx``), or a model that is loaded. None: the one that comes with the package.
        detector: ``"small"`` (None), ``"yunet"``, a YuNet file, or any :class:`xcos_ext.faces.Detector`;
            ``"aligned"``: the pictures are aligned crops already.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: CUDA if it works; of a model that is not loaded yet.
        threshold: instead of the model's: the same person if score >= threshold.
        policy: which of several faces, see :func:`xcos_ext.faces.choose_face`.
        strict: refuse aligned crops that do not look like a face.
        max_pixels: larger pictures are refused; None: :data:`xcos_ext.faces.MAX_PIXELS`.

    Returns:
        :class:`~xcos_ext.explain.Explanation`: true in an ``if`` where it is the same person; ``score``, ``threshold``,
        ``same``, ``fmr``, maps; ``.figure()``, ``.to_html()``, ``.to_json()``; in a notebook it shows itself.

    Raises:
        PictureError: a picture that cannot be read or has no face.
        ModelError: a model or a detector that cannot be used.
        XCosError: the model knows no threshold, and none was given.
        DeviceError: a device that cannot be used.
        TypeError, ValueError: other arguments.

    >>> import numpy as np
    >>> crop = np.full((112, 112, 3), 90, np.uint8)
    >>> verify(crop, crop, detector="aligned").same
    True
    """
    return compare(
        a, b, model=model, detector=detector, device=device, threshold=threshold, policy=policy, strict=strict,
        max_pixels=max_pixels,
    )  # fmt: skip


def compare(
    a: Any,
    b: Any,
    *,
    model: Any,
    detector: Any,
    device: str,
    threshold: float | None,
    policy: str,
    strict: bool,
    max_pixels: int | None,
    needs_threshold: bool = True,
) -> Explanation:
    """:func:`verify`, also without a threshold and so without a verdict."""
    from xcos_ext.card.calibration import check_threshold
    from xcos_ext.explain.explanation import explain_pairs

    check_threshold(threshold)
    if _is_named(model):
        model = model_file(model)  # a typing error should not cost the seconds that loading torch takes
    pictures = [_read(one, name, max_pixels) for one, name in ((a, "a"), (b, "b"))]
    find = _detector(detector)
    loaded, file = _model(model, device)
    if needs_threshold:
        _decides(loaded, threshold, file)
    faces = [_face(one, find, loaded, policy, strict) for one in pictures]
    with _usable_results(loaded, file):
        return explain_pairs(loaded, [(faces[0], faces[1])], threshold, file)[0]


def verify_many(
    pairs: Iterable[tuple[Any, Any]],
    *,
    model: Any = None,
    detector: Any = None,
    device: str = "auto",
    threshold: float | None = None,
    policy: str = "prominent",
    strict: bool = False,
    progress: bool | None = None,
) -> Iterator[Explanation | None]:
    """:func:`verify` for many pairs, some at a time: in order, as they are asked for.

    Args:
        pairs: of pictures, as :func:`verify` takes them. Of 32 pairs every path is read once.
        model, detector, device, threshold, policy, strict: as of :func:`verify`.
        progress: a bar on standard error; None: where that is a terminal.

    Yields:
        An explanation for each pair; None where a picture cannot be used, with a warning that says why.

    Raises:
        As :func:`verify`, but for the pictures.

    >>> import numpy as np
    >>> crop = np.full((112, 112, 3), 90, np.uint8)
    >>> [bool(e) for e in verify_many([(crop, crop)], detector="aligned")]
    [True]
    """
    from xcos_ext.card.calibration import check_threshold
    from xcos_ext.explain.explanation import explain_pairs
    from xcos_ext.faces import AlignedFace, detector_maker
    from xcos_ext.gallery.enroll import Picture, read_faces

    check_threshold(threshold)
    make = detector_maker(detector)
    loaded, file = _model(model, device)
    _decides(loaded, threshold, file)
    source = iter(_tracked(pairs) if (sys.stderr.isatty() if progress is None else progress) else pairs)
    number = 0
    while window := list(islice(source, _BATCH)):
        keys: list[tuple[Any, Any]] = []
        wanted: dict[Any, Picture] = {}
        faces: dict[Any, AlignedFace] = {}
        for pair in window:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"pairs[{number}]: expected two pictures, got {type(pair).__name__}")
            sides = []
            for side, given in zip("ab", pair, strict=True):
                path = isinstance(given, (str, bytes, os.PathLike))
                key = os.fspath(given) if path else id(given)
                name = display_name(given) if path else f"pairs[{number}].{side}"
                if isinstance(given, AlignedFace):
                    faces[key] = _fitting(given, loaded, name)
                else:
                    wanted.setdefault(key, Picture(name, functools.partial(_pixels, given, name)))
                sides.append(key)
            keys.append((sides[0], sides[1]))
            number += 1
        size = loaded.preprocessing.size
        done = read_faces(list(wanted.values()), size, make, policy=policy, strict=strict)
        failures = []
        for key, (_, face, why) in zip(wanted, done, strict=True):
            if face is None:
                failures.append(str(why))
            else:
                faces[key] = face
        for why in failures:  # now, because decoders in threads hush the warnings of all threads meanwhile
            warnings.warn(why, stacklevel=2)
        usable = [pair for pair in keys if pair[0] in faces and pair[1] in faces]
        with _usable_results(loaded, file):
            explained = iter(explain_pairs(loaded, [(faces[x], faces[y]) for x, y in usable], threshold, file))
        for pair in keys:
            yield next(explained) if pair[0] in faces and pair[1] in faces else None


def represent(
    pictures: Any,
    *,
    model: Any = None,
    detector: Any = None,
    device: str = "auto",
    role: str = "probe",
    policy: str = "prominent",
    strict: bool = False,
) -> Templates:
    """Templates of the faces of pictures: what is stored, searched and scored.

    Args:
        pictures: one picture as :func:`verify` takes it, or a list of N.
        model, detector, device, policy, strict: as of :func:`verify`; a pair graph gives no templates.
        role: ``"probe"``, ``"gallery"`` or ``"both"``, see :class:`xcos_ext.Templates`.

    Returns:
        :class:`xcos_ext.Templates` [N], for :func:`xcos_ext.xcos_matrix`, :func:`xcos_ext.xcos_topk` and galleries.

    Raises:
        As :func:`verify`.

    >>> import numpy as np, xcos_ext
    >>> crop = np.full((112, 112, 3), 90, np.uint8)
    >>> probe, gallery = (represent(crop, detector="aligned", role=role) for role in ("probe", "gallery"))
    >>> xcos_ext.xcos_matrix(probe, gallery).shape
    torch.Size([1, 1])
    """
    import torch

    given = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    if not given:
        raise ValueError("pictures: expected at least one, got none")
    read = [_read(one, f"pictures[{i}]" if len(given) > 1 else "pictures", None) for i, one in enumerate(given)]
    find = _detector(detector)
    loaded: Any
    loaded, file = _model(model, device)
    if not hasattr(loaded, "features_of"):
        raise ModelError(f"{file or loaded.name}: expected a model in torch, which gives templates, got a pair graph")
    crops = [_face(one, find, loaded, policy, strict).rgb for one in read]
    with torch.no_grad():
        templates: Templates = loaded.templates(loaded.features_of(crops), role)
        return templates


# --- pictures


def _pixels(given: Any, name: str, max_pixels: int | None = None) -> np.ndarray:
    from xcos_ext.faces import MAX_PIXELS, picture_of

    return picture_of(given, name, max_pixels=max_pixels or MAX_PIXELS)


def _read(given: Any, argument: str, max_pixels: int | None) -> AlignedFace | tuple[str, np.ndarray]:
    """A face as it came, or a picture's name and pixels."""
    from xcos_ext.faces import AlignedFace

    if isinstance(given, AlignedFace):
        return given
    name = display_name(given) if isinstance(given, (str, bytes, os.PathLike)) else argument
    return name, _pixels(given, argument, max_pixels)


def _face(
    read: AlignedFace | tuple[str, np.ndarray],
    detector: Detector | None,
    model: XCosModel | OnnxModel,
    policy: str,
    strict: bool,
) -> AlignedFace:
    from xcos_ext.faces import extract_face

    if not isinstance(read, tuple):
        return _fitting(read, model, read.name)
    name, rgb = read
    return extract_face(rgb, detector, name=name, policy=policy, size=model.preprocessing.size, strict=strict)


def _fitting(face: AlignedFace, model: XCosModel | OnnxModel, name: str) -> AlignedFace:
    """A face of the size that the model expects."""
    size = model.preprocessing.size
    if face.rgb.shape[:2] != size:
        got = f"{face.rgb.shape[1]} x {face.rgb.shape[0]}"
        raise ValueError(f"{name}: expected a face of {size[1]} x {size[0]} pixels for this model, got {got}")
    return face


_OWN = threading.local()  # detectors keep working memory: each thread has its own


def _detector(spec: Any) -> Detector | None:
    """A detector; those that are named are kept for the next call."""
    from xcos_ext.faces import detector_maker

    if spec is not None and not isinstance(spec, (str, os.PathLike)):
        made = detector_maker(spec)
        return None if made is None else made()
    known: dict[Any, Any] = _OWN.__dict__
    if spec not in known:
        make = detector_maker(spec)
        known[spec] = None if make is None else make()
    found: Detector | None = known[spec]
    return found


def _tracked(pairs: Iterable[Any]) -> Iterable[Any]:
    """The pairs, with a bar on standard error of how many have been taken."""
    from xcos_ext.io.optional import need

    console = need("rich.console", "a progress bar").Console(stderr=True)
    total = len(pairs) if isinstance(pairs, Sized) else None
    tracked: Iterable[Any] = need("rich.progress", "a progress bar").track(pairs, "comparing", total, console=console)
    return tracked


# --- models


def _is_named(spec: Any) -> bool:
    """Whether a model has to be loaded."""
    return spec is None or isinstance(spec, (str, os.PathLike))


@contextmanager
def _usable_results(model: XCosModel | OnnxModel, file: str | None) -> Iterator[None]:
    """Says which model it is whose results make no explanation."""
    try:
        yield
    except XCosError:
        raise
    except ValueError as error:
        raise XCosError(f"{file or model.name}: the model gave an unusable result ({error})") from error


def _decides(model: XCosModel | OnnxModel, threshold: float | None, file: str | None) -> None:
    if model.threshold is None and threshold is None:
        raise XCosError(
            f"{file or model.name}: the model knows no decision threshold; give one (threshold=, --threshold), or make "
            "a model that has one with xcos plug"
        )


def _model(spec: Any, device: str) -> tuple[XCosModel | OnnxModel, str | None]:
    """A model, and the file that it is from; those that are named are kept for the next call."""
    if not _is_named(spec):
        if not hasattr(spec, "preprocessing") or not hasattr(spec, "threshold"):
            raise TypeError(f"model: expected a name, a file or a model, got {type(spec).__name__}")
        if spec.training:
            raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
        return spec, None
    file = model_file(spec)
    there = file.stat()
    if _is_own_graph(file):
        return _pair_graph(file, device), display_name(file)
    # The device is tried in every call.
    return _kept(str(file), _place(device), there.st_mtime_ns, there.st_size), display_name(file)


def model_file(spec: str | os.PathLike[str] | None) -> Path:
    """The readable file of a model, fetched if it has to be, before torch is imported for it.

    Raises:
        ModelError: no such name or file, or it cannot be fetched.
    """
    from xcos_ext.io.models import local_file
    from xcos_ext.io.shipped import readable_file

    return readable_file(local_file(spec, "model", "recogniser"), "a weights file")


@functools.lru_cache(maxsize=4)
def _kept(file: str, place: str, changed: int, size: int) -> XCosModel:
    """A model in torch from a file as it was changed last."""
    model: XCosModel = _placed(lambda: _load_model(file), place)
    return model


def _load_model(file: str) -> Any:
    from xcos_ext.model import load_model

    return load_model(file)


def open_model(spec: str | os.PathLike[str] | None = None, device: str = "auto") -> XCosModel | OnnxModel:
    """Load a model where it shall run: in torch, or a pair graph (``xcos export onnx``), which needs no torch.

    Args:
        spec: as of :func:`verify`.
        device: as of :func:`verify`.

    Raises:
        DeviceError: the device cannot be used.
        ModelError: a file that cannot be used, or a graph of another kind.

    >>> open_model(device="cpu").name
    'xcos-slim'
    """
    file = model_file(spec)
    if _is_own_graph(file):
        return _pair_graph(file, device)
    return on_one_thread(lambda: _load_model(str(file)), device)


def _pair_graph(file: Path, device: str) -> OnnxModel:
    graph = _graph(str(file), device)
    if graph.kind != "pair":
        raise ModelError(
            f"{display_name(file)}: expected a graph of kind 'pair' (xcos export onnx --kind pair), got {graph.kind!r}"
        )
    return graph


def on_one_thread(load: Callable[[], Any], device: str) -> Any:
    """Load a network, where ``device`` says.

    Raises:
        DeviceError: the device cannot be used; nothing is loaded then.
    """
    return _placed(load, _place(device))


def _place(device: str) -> str:
    """The torch device that a name stands for, tried."""
    from xcos_ext.devices import choose_device

    return str(choose_device(device))


def _placed(load: Callable[[], Any], place: str) -> Any:
    """Loading is thousands of tiny operations: on one thread they take half a second; on several, each waits for the
    slowest, and on a busy machine that was seen to take half a minute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return load().to(place)
    finally:
        torch.set_num_threads(threads)


def _is_own_graph(file: Path) -> bool:
    """Whether a file is a graph that this package wrote, and not a recogniser's or weights."""
    return file.suffix.lower() == ".onnx" and b"xcos.sha256" in file.read_bytes()


def _graph(path: str, device: str) -> OnnxModel:
    from xcos_ext.deploy import OnnxModel
    from xcos_ext.onnx.session import CPU, providers_on

    providers = providers_on(device)
    if providers == list(CPU):
        return OnnxModel(path)
    try:
        return OnnxModel(path, providers=providers)
    except ModelError as error:
        if device != "auto":
            raise DeviceError(f"device: expected a GPU that can be used, got {device!r}: {error}") from error
        graph = OnnxModel(path)  # a file that is wrong is said here
        warnings.warn(f"the GPU is not used, the CPU computes: {error}", stacklevel=2)
        return graph
