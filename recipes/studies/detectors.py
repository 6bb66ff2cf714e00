"""Measure face detectors on photographs of people whom the default one was not trained on.

    python -m recipes.studies.detectors lfw_photos.zip cfp_dev.zip --labels labels.npz --yunet yunet.onnx \\
        --detector small --detector yunet.onnx --json benchmarks/results/faces/detectors.json

The truth is what YuNet says of a photograph with a border of a quarter of its longer side (``label`` of
``recipes/train_detector.py``), so YuNet's own row says how much its answers depend on borders and turns. A face is
found
if the middle of the one that would be taken lies within half its size of the teacher's. Errors of the five points are
in per cent of the distance between the eyes, and of the size of the face, which a profile has too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import machine

from recipes.common import Padded, say, write_json
from recipes.scenes import nothing
from recipes.train_detector import UNSURE, held_out
from xcos_ext.faces import (
    LIKELY,
    Detector,
    PictureTree,
    YuNetDetector,
    align_face,
    choose_face,
    create_detector,
    face_likelihood,
)

Truth = list[tuple[np.ndarray, np.ndarray]]  # a picture, and the teacher's face of it: box, points, score


def truth_of(archive: Path, labels: Any, most: int | None, part: str = "") -> Truth:
    """Held-out pictures, and the face that would be taken by the teacher."""
    tree, found = PictureTree(archive), []
    names = [name for name in held_out(archive)[1] if part in name and f"{archive.name}/{name}" in labels]
    for name in names if most is None else names[:: max(1, len(names) // most)]:
        faces = labels[f"{archive.name}/{name}"]
        faces = faces[faces[:, 14] >= UNSURE]
        if len(faces):
            merit = faces[:, 2] * faces[:, 3] * faces[:, 14]
            found.append((tree.read(name), faces[merit.argmax()]))
    return found


def measure(detector: Detector, truth: Truth, turns: int = 0) -> dict[str, float]:
    """How many faces are found, and how far their points are from the teacher's, in pictures turned a quarter
    ``turns`` times."""
    missed, seconds, eyes, sizes = 0, [], [], []
    for rgb, face in truth:
        height, width = rgb.shape[:2]
        points, box = face[4:14].reshape(5, 2).astype(np.float64), face[:4].astype(np.float64)
        middle = (box[:2] + box[2:] / 2)[None]
        for _ in range(turns):  # np.rot90: counter-clockwise
            points, middle = (np.stack([p[:, 1], width - 1 - p[:, 0]], 1) for p in (points, middle))
            height, width = width, height
        seen = np.ascontiguousarray(np.rot90(rgb, turns))
        begin = time.perf_counter()
        faces = detector.detect(seen)
        seconds.append(time.perf_counter() - begin)
        size = float(np.sqrt(box[2] * box[3]))
        if faces:
            one = choose_face(faces, seen.shape[:2])
            where = np.array(one.box[:2]) + np.array(one.box[2:]) / 2
        if not faces or np.hypot(*(where - middle[0])) > 0.5 * size:
            missed += 1
            continue
        error = np.linalg.norm(np.asarray(one.landmarks) - points, axis=1).mean()
        eyes.append(100 * error / np.linalg.norm(points[0] - points[1]))
        sizes.append(100 * error / size)
    return {
        "pictures": len(truth),
        "missed": missed,
        "error_eyes": float(np.median(eyes)),
        "error_eyes_90": float(np.quantile(eyes, 0.9)),
        "error_size": float(np.median(sizes)),
        "error_size_90": float(np.quantile(sizes, 0.9)),
        "milliseconds": 1e3 * float(np.median(seconds)),
    }


def refused(detector: Detector, count: int) -> dict[str, int]:
    """Of generated pictures without a face, which no training has seen."""
    rng = np.random.default_rng(20_261_129)
    empty = [not detector.detect(nothing(int(rng.integers(120, 700)), rng)) for _ in range(count)]
    return {"pictures": count, "refused": sum(empty)}


def timed(detector: Detector, truth: Truth) -> dict[str, float]:
    """Milliseconds for photographs of 640 pixels, median and quartiles, the machine to itself."""
    seconds = []
    for rgb, _ in truth:
        factor = 640 / max(rgb.shape[:2])
        photograph = cv2.resize(rgb, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        begin = time.perf_counter()
        detector.detect(photograph)
        seconds.append(1e3 * (time.perf_counter() - begin))
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high, "pictures": len(seconds)}


def likely(truth: Truth, change: Callable[[np.ndarray], np.ndarray] = np.asarray) -> dict[str, int]:
    """Crops aligned by the teacher's points, changed, that look like a face."""
    crops = [change(align_face(rgb, face[4:14].reshape(5, 2))) for rgb, face in truth]
    found = [face_likelihood(np.ascontiguousarray(crop)) >= LIKELY for crop in crops]
    return {"pictures": len(found), "faces": sum(found)}


def shuffled(crop: np.ndarray) -> np.ndarray:
    """Cut into 4 x 4 parts and put together anew."""
    parts = crop.reshape(4, 28, 4, 28, 3).swapaxes(1, 2).reshape(16, 28, 28, 3)
    order = np.random.default_rng(int(crop.sum())).permutation(16)
    return parts[order].reshape(4, 4, 28, 28, 3).swapaxes(1, 2).reshape(112, 112, 3)


def crops_of(sets: dict[str, Truth], count: int) -> dict[str, dict[str, int]]:
    """How many aligned crops look like a face to :func:`~xcos_ext.faces.face_likelihood`: some that are, some not."""
    faces = sets["LFW"]
    rng = np.random.default_rng(20_261_130)
    empty = [face_likelihood(nothing(112, rng)) >= LIKELY for _ in range(count)]
    return {
        **{kind: likely(truth) for kind, truth in sets.items()},
        "generated": {"pictures": count, "faces": sum(empty)},
        "upside down": likely(faces, lambda crop: crop[::-1, ::-1]),
        "on their side": likely(faces, lambda crop: np.rot90(crop)),
        "in 4x4 parts, shuffled": likely(faces, shuffled),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lfw", type=Path)
    parser.add_argument("cfp", type=Path)
    parser.add_argument("--labels", type=Path, required=True, help="of recipes.train_detector label")
    parser.add_argument("--detector", action="append", help="may be repeated (default: small)")
    parser.add_argument("--most", type=int, help="pictures of each kind, for a first look")
    parser.add_argument("--textures", type=int, default=1000)
    parser.add_argument("--weights", type=Path, help="of the small detector, instead of the package's")
    parser.add_argument("--only-time", action="store_true", help="measure the time again, with the machine to itself")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    import torch

    torch.set_num_threads(1)
    with np.load(options.labels, allow_pickle=False) as kept:
        labels = dict(kept)
    sets = {
        "CFP frontal": truth_of(options.cfp, labels, options.most, "/frontal/"),
        "CFP profile": truth_of(options.cfp, labels, options.most, "/profile/"),
        "LFW": truth_of(options.lfw, labels, options.most),
    }
    results: dict[str, Any] = {}
    for name in options.detector or ["small"]:
        detector: Any = create_detector(name)
        if options.weights is not None and name == "small":
            from xcos_ext.faces import SmallDetector

            detector = SmallDetector(weights=options.weights)
        if options.only_time:
            results[Path(name).name] = {"640 pixels": timed(detector, sets["LFW"][:60])}
            continue
        row: dict[str, Any] = {kind: measure(detector, truth) for kind, truth in sets.items()}
        if isinstance(detector, YuNetDetector):
            row["CFP profile, bordered"] = measure(Padded(detector), sets["CFP profile"])
        mixed = [pair for truth in sets.values() for pair in truth[:: max(1, len(truth) // 70)]]
        row |= {f"turned by {90 * turns}": measure(detector, mixed, turns) for turns in (1, 2, 3)}
        row["textures"] = refused(detector, options.textures)
        row["640 pixels"] = timed(detector, sets["LFW"][:60])
        results[Path(name).name] = row
        say(f"{name}: {row}")
    report: dict[str, Any] = {"rows": {}}
    if options.json is not None and options.json.is_file():
        report = json.loads(options.json.read_text())  # rows of detectors that this version does not have stay
    for name, row in results.items():
        report["rows"][name] = report["rows"].get(name, {}) | row
    report["machine"] = machine()
    if not options.only_time:
        report["crops"] = crops_of(sets, options.textures)
    say(json.dumps(report["rows"]))
    if options.json is not None:
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
