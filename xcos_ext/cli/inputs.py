"""What commands are given: devices, models, galleries, lists of pairs. Each is checked before it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from xcos_ext.io.errors import DeviceError, ModelError, XCosError
from xcos_ext.io.text import display_name

from .console import note, notes_for_warnings

if TYPE_CHECKING:
    import torch

    from xcos_ext.backbones import Recogniser
    from xcos_ext.deploy import OnnxModel
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.faces import Detector
    from xcos_ext.gallery import Gallery
    from xcos_ext.model import XCosModel

Network = TypeVar("Network", "XCosModel", "Recogniser")


def check_model_path(path: str | None) -> str:
    """A weights file that is there, before torch is imported for it: one that is named, or the shipped model's.

    Raises:
        ModelError: it is not a readable regular file.
    """
    from xcos_ext.io.shipped import readable_file, weights_file

    return str(readable_file(weights_file(path), "a weights file"))


def is_graph(path: str) -> bool:
    """Whether a model's file is called an ONNX graph."""
    return path.lower().endswith(".onnx")


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` names, tried; warnings are turned into notes.

    Raises:
        DeviceError: it cannot be used.
    """
    from xcos_ext.devices import choose_device

    with notes_for_warnings():
        return choose_device(name)


def load(path: str, device: str = "cpu") -> XCosModel:
    """Load a model, where ``--device`` says; warnings are turned into notes."""
    from xcos_ext.model import load_model

    return _loaded(load_model, path, device)


def load_recogniser(path: str, device: str) -> Recogniser:
    """Load a recogniser, where ``--device`` says; warnings are turned into notes."""
    from xcos_ext.model import load_recogniser

    return _loaded(load_recogniser, path, device)


def _loaded(loader: Callable[[str], Network], path: str, device: str) -> Network:
    """Loading is thousands of tiny operations. On one thread they take half a second; on several, each waits for the
    slowest, and on a busy machine that was seen to take half a minute."""
    place = chosen_device(device)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with notes_for_warnings():
            return loader(path).to(place)
    finally:
        torch.set_num_threads(threads)


def load_either(path: str, device: str) -> XCosModel | OnnxModel:
    """Load a model in torch, or a pair graph, for which torch is not imported, where ``--device`` says.

    Raises:
        DeviceError: the device cannot be used.
        ModelError: a file that cannot be used, or a graph of another kind.
    """
    if not is_graph(path):
        return load(path, device)
    graph = _graph(path, device)
    if graph.kind != "pair":
        raise ModelError(
            f"{display_name(path)}: expected a graph of kind 'pair' (xcos export onnx --kind pair), got {graph.kind!r}"
        )
    return graph


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
        note(f"the GPU is not used, the CPU computes: {error}")
        return graph


def described(model: Any, path: str) -> dict[str, Any]:
    """A model as commands print it in JSON."""
    return {"name": model.name, "file": display_name(path), "fingerprint": model.fingerprint()}


def detector_maker(name: str, aligned: bool) -> Callable[[], Detector] | None:
    """Makes detectors, one for each thread; None: the pictures are aligned crops.

    Raises:
        ValueError: no such detector. That is said here, and not by a thread.
    """
    if aligned:
        return None
    from xcos_ext.faces import create_detector

    create_detector(name)
    return partial(create_detector, name)


def open_gallery(path: str, model: XCosModel | None = None) -> Gallery:
    """Open a gallery; for a model, to add to it or to search it."""
    from xcos_ext.io.optional import gallery_package

    gallery_package("lance")
    from xcos_ext.gallery import Gallery

    return Gallery.open(path, model)


def opened_pairs(
    pairs: str,
    root: str | None,
    list_format: str | None,
    folds: Sequence[int] | None,
    detector: str,
    aligned: bool,
    *plots: str | None,
) -> tuple[PairList, Detector | None]:
    """A list of pairs, or some of its folds, and what finds the faces of its pictures; None where these are aligned
    crops.

    Raises:
        OutputError: a figure that would be drawn over one of the pictures.
        XCosError: a fold that is not there.
    """
    from xcos_ext.evaluation.datasets import open_pairs
    from xcos_ext.io.atomic import check_apart

    listed = open_pairs(pairs, root, format=list_format)
    files = ((key, listed.file(key)) for key in listed.keys)
    drawn = {"--plot" + " (2)" * number: path for number, path in enumerate(plots) if path is not None}
    check_apart(drawn, ((f"the picture {display_name(key)}", file) for key, file in files if file is not None))
    if folds is not None:
        numbers = listed.fold_numbers()
        for number in folds:
            if number not in numbers:
                raise XCosError(f"--folds: expected some of {', '.join(map(str, numbers))}, got {number}")
        listed = listed.of_folds([numbers[number] for number in folds])
    if aligned or listed.aligned:
        return listed, None
    from xcos_ext.faces import create_detector

    return listed, create_detector(detector)


def write_text(path: str, text: str) -> None:
    """Write a file, atomically."""
    from xcos_ext.io.atomic import write_atomically

    write_atomically(path, lambda file: file.write(text.encode()))
