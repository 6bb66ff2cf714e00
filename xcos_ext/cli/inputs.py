"""What commands are given: devices, models, galleries, lists of pairs. Each is checked before it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xcos_ext.io.errors import XCosError
from xcos_ext.io.text import display_name

from .console import notes_for_warnings

if TYPE_CHECKING:
    import torch

    from xcos_ext.backbones import Recogniser
    from xcos_ext.evaluation.datasets import PairList
    from xcos_ext.faces import Detector
    from xcos_ext.gallery import Gallery
    from xcos_ext.model import XCosModel


def check_model_path(path: str | None) -> str:
    """A weights file that is there, before torch is imported for it: see :func:`xcos_ext.api.model_file`."""
    from xcos_ext.api import model_file

    return str(model_file(path))


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
    """Load a model in torch, where ``--device`` says; warnings are turned into notes."""
    from xcos_ext.api import on_one_thread
    from xcos_ext.model import load_model

    with notes_for_warnings():
        model: XCosModel = on_one_thread(lambda: load_model(path), device)
        return model


def load_recogniser(path: str, device: str) -> Recogniser:
    """Load a recogniser, where ``--device`` says; warnings are turned into notes."""
    from xcos_ext.api import on_one_thread
    from xcos_ext.model import load_recogniser

    with notes_for_warnings():
        recogniser: Recogniser = on_one_thread(lambda: load_recogniser(path), device)
        return recogniser


def described(model: Any, path: str) -> dict[str, Any]:
    """A model as commands print it in JSON."""
    return {"name": model.name, "file": display_name(path), "fingerprint": model.fingerprint()}


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
