"""Detection, alignment and verification end to end on pairs of photographs: right verdicts per detector.

    python -m recipes.verify_photo_pairs lfw_photos.zip --model net.pt --detector small --detector yunet.onnx

The archive holds ``<folder>/<person>/<picture>`` and ``<folder>/pairs.csv`` with a header and rows ``a,b,same``
(pictures relative to the folder; same is 1 or 0). A picture without a face counts as wrong. Each wrong pair is named.
The mean scores of both kinds tell more than 120 verdicts do: alignment that is off costs genuine pairs their
similarity. ``--turn`` and ``--scale`` change every picture first, every other one the other way.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcos_ext.faces import PictureTree, create_detector, extract_face, warp
from xcos_ext.io.errors import PictureError
from xcos_ext.io.optional import need
from xcos_ext.model import XCosModel, load_model


def read_pairs(archive: zipfile.ZipFile) -> tuple[str, list[tuple[str, str, bool]]]:
    """The folder in the archive, and its pairs."""
    listing = next((name for name in archive.namelist() if name.endswith("pairs.csv")), None)
    if listing is None:
        raise SystemExit(f"{archive.filename}: no pairs.csv in it")
    rows = csv.DictReader(io.StringIO(archive.read(listing).decode("utf-8-sig")))
    return listing[: -len("pairs.csv")], [(row["a"], row["b"], row["same"] == "1") for row in rows]


def changed(rgb: np.ndarray, degrees: float, scale: float) -> np.ndarray:
    """Turned and scaled about the middle; the border is repeated."""
    if degrees == 0 and scale == 1:
        return rgb
    import cv2

    height, width = rgb.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    return warp(rgb, matrix, (height, width), extend=True)


def interval(right: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return middle - half, middle + half


@torch.no_grad()
def evaluate(
    pictures: PictureTree,
    folder: str,
    pairs: list[tuple[str, str, bool]],
    spec: str,
    model: XCosModel,
    threshold: float,
    degrees: float,
    scale: float,
) -> dict[str, Any]:
    detector = create_detector(spec)
    features: dict[str, torch.Tensor] = {}
    without: list[str] = []
    seconds = []
    for index, name in enumerate(sorted({name for a, b, _ in pairs for name in (a, b)})):
        other = bool(index % 2)
        read = pictures.read(pictures.find(folder + name) or folder + name)
        rgb = changed(read, -degrees if other else degrees, 1 / scale if other else scale)
        start = time.perf_counter()
        try:
            face = extract_face(rgb, detector, name=name, size=model.preprocessing.size)
        except PictureError:
            without.append(name)
            continue
        finally:
            seconds.append(time.perf_counter() - start)
        features[name] = model.features(model.preprocessing([face.rgb]))
    wrong: list[dict[str, Any]] = []
    scores: dict[bool, list[float]] = {True: [], False: []}
    for a, b, same in pairs:
        if a in features and b in features:
            score = model.score(features[a], features[b])
            assert isinstance(score, torch.Tensor)
            value = float(score)
            scores[same].append(value)
            if (value >= threshold) != same:
                wrong.append({"a": a, "b": b, "same": same, "score": value})
        else:
            wrong.append({"a": a, "b": b, "same": same, "score": None})
    right = len(pairs) - len(wrong)
    return {
        "detector": spec if spec == "small" else Path(spec).name,
        "pairs": len(pairs),
        "right": right,
        "interval_95": interval(right, len(pairs)),
        "mean_genuine": float(np.mean(scores[True])),
        "mean_impostor": float(np.mean(scores[False])),
        "photographs": len(seconds),
        "without_face": without,
        "median_ms": 1e3 * float(np.median(seconds)),
        "wrong": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="zip archive with pairs.csv")
    parser.add_argument("--model", required=True, help="weights, as for xcos verify")
    parser.add_argument("--detector", action="append", help="'small' or a YuNet .onnx; may be repeated")
    parser.add_argument("--threshold", type=float, help="by default the model's")
    parser.add_argument("--turn", type=float, default=0.0, metavar="DEGREES", help="turn pictures, alternately")
    parser.add_argument("--scale", type=float, default=1.0, help="scale pictures by this and its inverse, alternately")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if not arguments.scale > 0:
        parser.error(f"--scale: expected a positive number, got {arguments.scale}")
    need("cv2", "face detection").setNumThreads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    threshold = model.threshold if arguments.threshold is None else arguments.threshold
    if threshold is None:
        parser.error("the model knows no threshold; give --threshold")
    with zipfile.ZipFile(arguments.photographs) as archive:
        folder, pairs = read_pairs(archive)
    pictures = PictureTree(arguments.photographs)
    results = [
        evaluate(pictures, folder, pairs, spec, model, threshold, arguments.turn, arguments.scale)
        for spec in arguments.detector or ["small"]
    ]
    if arguments.json:
        print(json.dumps({"model": model.name, "threshold": threshold, "results": results}, indent=2))
        return 0
    print(f"{model.name}, threshold {threshold:.4f}, {len(pairs)} pairs ({sum(s for *_, s in pairs)} genuine)\n")
    print(
        "| detector | right verdicts | 95 % interval | mean genuine score | mean impostor score "
        "| photographs without a face | ms per photograph |"
    )
    print("|---|---|---|---|---|---|---|")
    for r in results:
        low, high = r["interval_95"]
        print(
            f"| {r['detector']} | {r['right']} of {r['pairs']} ({100 * r['right'] / r['pairs']:.1f} %) "
            f"| {100 * low:.1f} to {100 * high:.1f} % | {r['mean_genuine']:.4f} | {r['mean_impostor']:.4f} "
            f"| {len(r['without_face'])} of {r['photographs']} | {r['median_ms']:.0f} |"
        )
    for r in results:
        for pair in r["wrong"]:
            kind = "genuine" if pair["same"] else "impostor"
            score = "no face" if pair["score"] is None else f"score {pair['score']:.3f}"
            print(f"\n{r['detector']}: wrong on the {kind} pair {pair['a']} and {pair['b']}: {score}", end="")
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
