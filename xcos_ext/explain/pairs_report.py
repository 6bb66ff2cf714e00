"""Many pairs on one HTML page: written as it is computed, so that ten thousand pairs take the memory of a hundred.

Of every picture the page holds one small JPEG, of every pair the maps in two bytes a number. Of what is kept in memory
only the pictures' names grow in number; their features lie in a temporary file without a name beside the page.
"""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from xcos_ext.card.calibration import check_threshold
from xcos_ext.devices import module_device
from xcos_ext.io.atomic import check_output, write_atomically
from xcos_ext.io.optional import need
from xcos_ext.io.several import several
from xcos_ext.io.text import printable

from .explanation import ModelCard, features_of_faces
from .page import picture_uri, render
from .pairs_file import ReportPair
from .plotting import RDBU, YLGN
from .regions import PARTS, cell_parts

if TYPE_CHECKING:
    from xcos_ext.faces import Detector
    from xcos_ext.gallery.enroll import ReadPicture
    from xcos_ext.model import XCosModel

__all__ = ["ReportSummary", "write_report"]

_PAIRS = 128  # scored at a time
_THUMBNAIL = 112  # pixels of the longer side
_QUALITY = 72  # of the JPEGs
_FULL = 65535  # a map's number in two bytes


@dataclass
class ReportSummary:
    """What a report holds.

    >>> ReportSummary(pairs=3, compared=2, failed=1).as_dict()["failed"]
    1

    Attributes:
        pairs: all, in the order of the list.
        compared: those with a score.
        failed: the others; each is on the page with the reason.
        genuine, impostor: compared pairs that the list says this of.
        same, different: verdicts; 0 without a threshold.
        false_matches: impostor pairs that are taken for the same person.
        false_non_matches: genuine pairs that are taken for different people.
        identical: pairs of one picture, or of two of which the model keeps the same.
        pictures: different pictures that the list names.
        without_face: those that could not be used.
        several_faces: those with more than one face, of which one was taken.
        not_like_a_face: aligned crops that do not look like a face, and were compared nevertheless.
        threshold: that decided, or None.
        seconds: for everything.
        bytes: of the page.
    """

    pairs: int = 0
    compared: int = 0
    failed: int = 0
    genuine: int = 0
    impostor: int = 0
    same: int = 0
    different: int = 0
    false_matches: int = 0
    false_non_matches: int = 0
    identical: int = 0
    pictures: int = 0
    without_face: int = 0
    several_faces: int = 0
    not_like_a_face: int = 0
    threshold: float | None = None
    seconds: float = 0.0
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class _Spool:
    """Rows of numbers on the disk, in a file that no name leads to, so nothing is left of it whatever happens."""

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        self.close = self._file.close
        self._shape: tuple[int, ...] = ()
        self._rows = 0

    def append(self, rows: np.ndarray) -> range:
        """Add rows [N, ...] of fp32; gives their places."""
        self._shape = rows.shape[1:]
        self._file.write(np.ascontiguousarray(rows, np.float32).tobytes())
        self._rows += len(rows)
        return range(self._rows - len(rows), self._rows)

    def take(self, places: Sequence[int]) -> np.ndarray:
        """Rows by their places [N, ...]; read, not mapped: mapped pages would count as this process's memory."""
        self._file.flush()
        size = 4 * int(np.prod(self._shape))
        rows = b"".join(os.pread(self._file.fileno(), size, place * size) for place in places)
        return np.frombuffer(bytearray(rows), np.float32).reshape(len(places), *self._shape)


def _thumbnail(rgb: np.ndarray) -> str:
    """A small JPEG in base64, without the prefix of a data URI."""
    if max(rgb.shape[:2]) > _THUMBNAIL:
        image = need("PIL.Image", "a page with pictures").fromarray(rgb)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        rgb = np.asarray(image)
    return picture_uri(rgb, "JPEG", quality=_QUALITY, optimize=True).partition(",")[2]


class _Report:
    """The state of a report that is being written."""

    def __init__(self, model: XCosModel, threshold: float | None, folder: str) -> None:
        self.model = model
        self.summary = ReportSummary(threshold=threshold)
        grid = features_of_faces(model, [np.zeros((*model.preprocessing.size, 3), np.uint8)])
        self.cells = (int(grid.shape[-2]), int(grid.shape[-1]))
        self.spool = _Spool(folder)
        self.places: dict[str, int] = {}  # picture -> number on the page, in the order of first use
        self.rows: list[int] = []  # number -> row of the spool; -1: no face
        self.why: dict[int, str] = {}
        self.unlike: set[int] = set()  # pictures that do not look like a face

    # --- pictures

    def add_pictures(self, read: list[ReadPicture]) -> Iterator[dict[str, Any]]:
        """Features and thumbnails of the next pictures; their blocks of the page."""
        faces = [face.rgb for _, face, _ in read if face is not None]
        failure = None
        rows: Iterator[int] = iter(())
        if faces:
            try:
                rows = iter(self.spool.append(features_of_faces(self.model, faces).float().cpu().numpy()))
            except MemoryError:
                raise
            except RuntimeError as error:  # a network that fails on these pictures
                failure = f"the model failed: {printable(str(error))}"
        first = len(self.rows)
        reasons: dict[int, str] = {}
        for number, (_, face, why) in enumerate(read, first):
            why, found = why or failure, 0 if face is None else face.found
            self.rows.append(next(rows) if why is None else -1)
            if why is not None:
                self.why[number] = reasons[number] = printable(why)
            self.summary.several_faces += found > 1
            if why is None and found == 0:
                self.summary.not_like_a_face += 1
                self.unlike.add(number)
        self.summary.pictures += len(read)
        self.summary.without_face += len(reasons)
        yield {"kind": "names", "data": {"names": [printable(picture.id) for picture, *_ in read], "why": reasons}}
        yield {"first": first, "jpegs": ["" if face is None else _thumbnail(face.rgb) for _, face, _ in read]}

    # --- pairs

    def add_pairs(self, pairs: list[ReportPair]) -> dict[str, Any]:
        """Scores and maps of some pairs; their block of the page."""
        numbers = [(self.places[pair.a], self.places[pair.b]) for pair in pairs]
        why: dict[int, str] = {}
        for i, both in enumerate(numbers):
            if reasons := dict.fromkeys(self.why[n] for n in both if n in self.why):
                why[i] = "; ".join(reasons)
        usable = [i for i in range(len(pairs)) if i not in why]
        packed = np.zeros((len(pairs), 2, int(np.prod(self.cells))), "<u2")
        shown: list[float | None] = [None] * len(pairs)
        rates: list[float | None] = [None] * len(pairs)
        identical: dict[int, str] = {}
        unlike: list[int] = []
        if usable:
            scored = self._score([[self.rows[numbers[i][side]] for i in usable] for side in (0, 1)])
            for i, score, maps, alike, problem in zip(usable, *scored, strict=True):
                if alike:
                    identical[i] = "same picture" if len(set(numbers[i])) == 1 else "same features"
                if self.unlike.intersection(numbers[i]):
                    unlike.append(i)
                if problem is not None:
                    why[i] = problem
                    continue
                shown[i], packed[i] = float(score), maps
                if self.model.fmr_curve is not None:
                    rate = self.model.fmr_curve.at(float(score))
                    # Below what the calibration resolves: negative, so that one number says both.
                    rates[i] = float(f"{rate.rate if rate.resolved else -rate.rate:.3g}")
                self._count(pairs[i].genuine, float(score))
        self.summary.pairs += len(pairs)
        self.summary.failed += len(why)
        self.summary.identical += len(identical)
        data = {
            "a": [a for a, _ in numbers],
            "b": [b for _, b in numbers],
            "line": [pair.line for pair in pairs],
            "genuine": [None if pair.genuine is None else int(pair.genuine) for pair in pairs],
            "labels": [[printable(label) for label in pair.labels] for pair in pairs],
            "score": shown,
            "fmr": rates,
            "why": why,
            "identical": identical,
            "unlike": unlike,
            "maps": base64.b64encode(packed.tobytes()).decode("ascii"),
        }
        return {"kind": "pairs", "data": data}

    def _score(self, sides: list[list[int]]) -> tuple[np.ndarray, np.ndarray, list[bool], list[str | None]]:
        """Of rows of A and of B: scores fp64 [N], maps uint16 [N, 2, cells], whether the features are equal, and why
        there is no score."""
        import torch

        unique, index = np.unique(sides, return_inverse=True)
        features = torch.from_numpy(self.spool.take(unique.tolist())).to(module_device(self.model))
        with torch.no_grad():
            a, b = features[torch.from_numpy(index.reshape(2, -1)).to(features.device)]
            result = self.model.score(a, b, return_maps=True)
            alike = (a == b).flatten(1).all(1).tolist()
        own = result.score.double().cpu().numpy()
        similarity, attention = (m.double().flatten(1).cpu().numpy() for m in result[1:])
        slack = 64 * float(torch.finfo(result.score.dtype).eps)
        with np.errstate(invalid="ignore"):
            total = attention.sum(1, keepdims=True)
            attention = attention / total
            scores = (attention * similarity).sum(1)
            finite = np.isfinite(own) & np.isfinite(similarity).all(1) & np.isfinite(attention).all(1)
            true = (np.abs(total[:, 0] - 1) <= slack) & (np.abs(scores - own) <= slack)
            maps = np.rint(np.clip(np.stack([(similarity + 1) / 2, attention], 1), 0, 1) * _FULL)
        wrong, sick = "the model gave a score that its maps do not make", "the model gave a result that is not finite"
        problems = [None if ok else wrong if known else sick for ok, known in zip(finite & true, finite, strict=True)]
        return scores, np.nan_to_num(maps).astype("<u2"), alike, problems

    def _count(self, genuine: bool | None, score: float) -> None:
        summary = self.summary
        summary.compared += 1
        summary.genuine += genuine is True
        summary.impostor += genuine is False
        if summary.threshold is not None:
            same = score >= summary.threshold
            summary.same += same
            summary.different += not same
            summary.false_matches += same and genuine is False
            summary.false_non_matches += not same and genuine is True


def write_report(
    path: str | os.PathLike[str],
    model: XCosModel,
    pairs: Iterable[ReportPair],
    read: Callable[[str], np.ndarray],
    *,
    detector: Callable[[], Detector] | None = None,
    policy: str = "prominent",
    strict: bool = False,
    threshold: float | None = None,
    title: str = "Pairs of faces",
    label_names: Sequence[str] = (),
    file: str | None = None,
    batch_size: int = 32,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> ReportSummary:
    """Compare many pairs and write them, with pictures and maps, on one HTML page.

    The page sorts by score, by the distance to the threshold and by the S, W or contribution of any cell; it filters
    and searches, and shows some pairs at a time. A pair whose picture cannot be used is listed with the reason. The
    page is written to a temporary file that takes the name when it is complete.

    >>> import xcos_ext
    >>> pairs, face = [ReportPair("a.jpg", "b.jpg")], np.full((112, 112, 3), 90, np.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/pairs.html", xcos_ext.load_model(), pairs, lambda name: face).compared
    1

    Args:
        path: the page, ``.html``.
        model: in evaluation mode.
        pairs: gone through twice, e.g. :class:`PairsFile` or a list.
        read: gives a picture by its name, uint8 RGB [H, W, 3], or raises PictureError; called from threads.
        detector: makes a face detector for each thread; None: the pictures are aligned crops.
        policy, strict: which of several faces, and whether aligned crops must look like one; see
            :func:`xcos_ext.faces.extract_face`.
        threshold: instead of the model's.
        title: of the page.
        label_names: of the pairs' labels.
        file: that the model was loaded from.
        batch_size: pictures per forward pass.
        threads: that read pictures and find faces.
        progress: is told (pairs done, all).

    Returns:
        :class:`ReportSummary`.

    Raises:
        OutputError: the page cannot be written.
        ValueError: a model in training mode, no pairs, or a threshold that is not finite.
    """
    from xcos_ext.gallery.enroll import Picture, read_faces

    started = time.monotonic()
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode; call .eval() first")
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size, threads: expected at least 1, got {batch_size}, {threads}")
    several(label_names, "label_names", ordered=True)
    target = check_output(path, (".html", ".htm"))
    given = check_threshold(threshold) is not None
    threshold = threshold if given else model.threshold
    if detector is not None:
        detector()  # fails here rather than in a thread; and OpenCV cannot be imported by several threads at once
    report = _Report(model, threshold, os.path.dirname(target))
    try:
        total = 0
        for pair in pairs:
            total += 1
            for name in (pair.a, pair.b):
                report.places.setdefault(name, len(report.places))
        if not total:
            raise ValueError("pairs: expected at least one, got none")

        def made() -> Generator[dict[str, Any], None, None]:
            pictures = (Picture(name, partial(read, name)) for name in report.places)
            size = model.preprocessing.size
            how: Any = {"policy": policy, "strict": strict, "threads": threads}
            reading: Any = read_faces(pictures, size, detector, **how)  # type: ignore[arg-type]
            with contextlib.closing(reading) as faces:
                source = iter(pairs)
                done = 0
                while chunk := list(islice(source, _PAIRS)):
                    wanted = 1 + max(report.places[name] for pair in chunk for name in (pair.a, pair.b))
                    while len(report.rows) < wanted:
                        yield from report.add_pictures(list(islice(faces, min(batch_size, wanted - len(report.rows)))))
                    yield report.add_pairs(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
            report.summary.seconds = time.monotonic() - started

        blocks = made()
        page = render(
            "report",
            title=title,
            decided=threshold is not None,
            settings=_settings(report, ModelCard.of(model, file))
            | {"given": given, "labels": [printable(name) for name in label_names]},
            blocks=blocks,
            summary=report.summary,
        )

        def write(stream: BinaryIO) -> None:
            with contextlib.closing(blocks):  # its threads end with it, also where the disk is full
                for piece in page:
                    stream.write(piece.encode("utf-8"))
            report.summary.bytes = stream.tell()

        write_atomically(target, write)
    finally:
        report.spool.close()
    return report.summary


def _settings(report: _Report, card: ModelCard) -> dict[str, Any]:
    from xcos_ext import __version__

    curve = report.model.fmr_curve
    return {
        "cells": report.cells,
        "parts": cell_parts(report.cells, report.model.preprocessing.size).ravel().tolist(),
        "part_names": PARTS,
        "threshold": report.summary.threshold,
        "rdbu": RDBU,
        "ylgn": YLGN,
        "model": card.as_dict() | {"attention": card.attention_in_words},
        "calibration": None if curve is None else curve.sample,
        "version": __version__,
    }
