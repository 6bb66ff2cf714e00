"""Fit the constants of the default detector's alignment (``xcos_ext.faces.CascadeAlignment``).

    python examples/fit_cascade_alignment.py lfw_photos.zip --yunet yunet.onnx

YuNet's landmarks stand in for the truth. People named in the archive's pairs.csv are left out, so that the pairs stay
unseen; every photograph is turned by a random angle, because posed portraits are more upright than snapshots. The
confidence is fitted to true and false candidates in the same photographs, upright and turned over, and to generated
textures, all of whose candidates are false. Prints the constants, ready to be pasted, and how well they do on
photographs that were not used, beside the present ones.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile

import cv2
import numpy as np
from PIL import Image

from xcos_ext.faces import (
    ARCFACE_TEMPLATE,
    CascadeAlignment,
    CascadeDetector,
    YuNetDetector,
    apply_transform,
    choose_face,
    similarity_transform,
)
from xcos_ext.faces.alignment import compose, invert
from xcos_ext.faces.cascade import Cues, evidence

Sample = tuple[Cues, np.ndarray]  # cues, and the transform from their coordinates to the true template


def turned(rgb: np.ndarray, degrees: float) -> np.ndarray:
    height, width = rgb.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(rgb, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def photographs(path: str, count: int, roll: float, seed: int) -> list[np.ndarray]:
    """``count`` photographs of different people outside pairs.csv, each turned at random."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path) as archive:
        listing = next(name for name in archive.namelist() if name.endswith("pairs.csv"))
        lines = archive.read(listing).decode().splitlines()[1:]
        unseen = {part.split("/")[0] for line in lines for part in line.split(",")[:2]}
        people: dict[str, list[str]] = {}
        for name in archive.namelist():
            if name.endswith(".jpg") and name.split("/")[-2] not in unseen:
                people.setdefault(name.split("/")[-2], []).append(name)
        chosen = rng.permutation(sorted(people))[:count]
        pictures = []
        for person in chosen:
            name = people[person][rng.integers(len(people[person]))]
            rgb = np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            pictures.append(turned(rgb, rng.normal(0, roll)))
    return pictures


def samples(
    pictures: list[np.ndarray], yunet: YuNetDetector, alignment: CascadeAlignment | None = None
) -> list[Sample]:
    """Cues of each photograph's face as the detector's second pass sees them."""
    detector = CascadeDetector(alignment=alignment)
    result = []
    for rgb in pictures:
        truth, found = yunet.detect(rgb), detector.detect(rgb)
        if not truth or not found:
            continue
        best, face = choose_face(truth, rgb.shape[:2]), choose_face(found, rgb.shape[:2])
        assert best.landmarks is not None and face.landmarks is not None
        to_template = similarity_transform(best.landmarks, ARCFACE_TEMPLATE)
        start = similarity_transform(face.landmarks, ARCFACE_TEMPLATE)
        correction = compose(to_template, invert(start))
        if rms(correction, np.eye(2, 3)) > 15:  # another face
            continue
        result.append((detector.cues(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), start), correction))
    return result


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two transforms of the template, in template pixels."""
    difference = apply_transform(a, ARCFACE_TEMPLATE) - apply_transform(b, ARCFACE_TEMPLATE)
    return float(np.sqrt((difference**2).sum(1).mean()))


def spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation, estimated so that a few outliers do not count."""
    return 1.4826 * np.median(np.abs(values - np.median(values, 0)), 0)


def fit(data: list[Sample], roll_sd: float) -> CascadeAlignment:
    scale = [float(np.sqrt(np.linalg.det(g[:, :2]))) for _, g in data]
    widths: dict[str, list[float]] = {}
    heights: dict[str, list[float]] = {}
    eyes: dict[str, list[np.ndarray]] = {}
    mouths: list[np.ndarray] = []
    for (cues, g), s in zip(data, scale, strict=True):
        for name, centre, width, _ in cues.boxes:
            widths.setdefault(name, []).append(width * s)
            heights.setdefault(name, []).append(apply_transform(g, centre[None])[0, 1])
        for side, found in enumerate(cues.eyes):
            for name, at in found:
                offset = apply_transform(g, at[None])[0] - ARCFACE_TEMPLATE[side]
                if np.linalg.norm(offset) < 12:  # an eye, not an eyebrow
                    eyes.setdefault(name, []).append(offset * [-1 if side == 0 else 1, 1])
        mouths.extend(apply_transform(g, at[None])[0] for at in cues.mouth)
    alignment = CascadeAlignment(
        box_width={name: round(float(np.median(v)), 2) for name, v in widths.items()},
        box_y={name: round(float(np.median(v)), 2) for name, v in heights.items()},
        eye={
            name: (round(float(m[0]), 2), round(float(m[1]), 2)) for name, v in eyes.items() for m in [np.median(v, 0)]
        },
        mouth_y=round(float(np.median(mouths, 0)[1]), 2),
    )
    box, width_error, mouth = [], [], []
    eye: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for (cues, g), s in zip(data, scale, strict=True):
        if cues.boxes:
            centre = np.median([c - [0, alignment.box_y[n] - 63.5] for n, c, *_ in cues.boxes], 0)
            box.append(apply_transform(g, centre[None])[0] - [56, 63.5])
            width_error.append(s / np.median([alignment.box_width[n] / w for n, _, w, _ in cues.boxes]) - 1)
        for side, found in enumerate(cues.eyes):
            if found:
                at = np.mean([p - np.array(alignment.eye[n]) * [-1 if side == 0 else 1, 1] for n, p in found], 0)
                eye[min(len(found), 2) - 1].append(apply_transform(g, at[None])[0] - ARCFACE_TEMPLATE[side])
        if cues.mouth:
            mouth.append(apply_transform(g, np.mean(cues.mouth, 0)[None])[0] - [56, alignment.mouth_y])

    def pair(values: list[np.ndarray]) -> tuple[float, float]:
        x, y = spread(np.array(values))
        return round(float(x), 2), round(float(y), 2)

    return CascadeAlignment(
        box_width=alignment.box_width,
        box_y=alignment.box_y,
        eye=alignment.eye,
        mouth_y=alignment.mouth_y,
        box_sd=pair(box),
        scale_sd=round(float(spread(np.array(width_error))), 3),
        roll_sd=roll_sd,
        eye_sd=(pair(eye[0]), pair(eye[1])),
        mouth_sd=pair(mouth),
    )


def texture(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """Smooth noise of all scales: full of blobs that cascades take for faces."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for octave in range(1, 8):
        noise = rng.standard_normal((2**octave, 2**octave))
        total += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) / octave
    total = (total - total.min()) / (total.max() - total.min())
    return np.repeat((255 * total).astype(np.uint8)[:, :, None], 3, axis=2)


def candidates(pictures: list[np.ndarray], yunet: YuNetDetector | None) -> tuple[np.ndarray, np.ndarray]:
    """Evidence [N, 6] and truth [N] of every candidate; without ``yunet`` all of them are false."""
    detector = CascadeDetector()
    rows, true = [], []
    for rgb in pictures:
        faces = [face.landmarks for face in yunet.detect(rgb)] if yunet is not None else []
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        starts = [start for roll in (0.0, 90.0, 180.0) for start in detector.candidates(grey, roll=roll)]
        for start in starts:
            fit = compose(detector.fit(detector.cues(grey, start)), start)
            cues = detector.cues(grey, fit)
            distance = min(
                (rms(compose(fit, invert(similarity_transform(f, ARCFACE_TEMPLATE))), np.eye(2, 3)) for f in faces),
                default=np.inf,
            )
            if 10 < distance < 40:  # partly on a face: neither true nor false
                continue
            rows.append(evidence(cues))
            true.append(distance <= 10)
    return np.array(rows).reshape(-1, 6), np.array(true, bool)


def fit_confidence(rows: np.ndarray, true: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Weights of a logistic regression with a small penalty, both kinds counting the same (Newton's method)."""
    share = np.where(true, 0.5 / true.sum(), 0.5 / (~true).sum()) * len(true)
    penalty = ridge * np.diag([0.0, *[1.0] * (rows.shape[1] - 1)])
    weights = np.zeros(rows.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(rows @ weights, -30, 30)))
        gradient = rows.T @ (share * (p - true)) + penalty @ weights
        hessian = (rows * (share * p * (1 - p))[:, None]).T @ rows + penalty + 1e-9 * np.eye(len(weights))
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights


def report(name: str, data: list[Sample], alignment: CascadeAlignment) -> None:
    detector = CascadeDetector(alignment=alignment)
    error = np.array([rms(detector.fit(cues), g) for cues, g in data])
    print(f"{name:>24}: mean {error.mean():.2f}, median {np.median(error):.2f}, 95 % {np.quantile(error, 0.95):.2f}")


def report_rolls(pictures: list[np.ndarray], yunet: YuNetDetector, rolls: list[float]) -> None:
    """Faces found in photographs turned by fixed angles, either way; the truth is YuNet's before the turn."""
    detector = CascadeDetector()
    print("| turned by | faces found | median distance, template pixels | wrong (over 8) | false faces |")
    print("|---|---|---|---|---|")
    for roll in rolls:
        distances, missed, false = [], 0, 0
        for i, rgb in enumerate(pictures):
            degrees = roll if i % 2 else -roll
            height, width = rgb.shape[:2]
            landmarks = choose_face(yunet.detect(rgb), (height, width)).landmarks
            assert landmarks is not None
            matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
            truth = similarity_transform(apply_transform(matrix, landmarks), ARCFACE_TEMPLATE)
            faces = detector.detect(turned(rgb, degrees))
            if not faces:
                missed += 1
                continue
            errors = sorted(
                rms(compose(similarity_transform(face.landmarks, ARCFACE_TEMPLATE), invert(truth)), np.eye(2, 3))
                for face in faces
                if face.landmarks is not None
            )
            distances.append(errors[0])
            false += len(errors) - 1
        wrong = sum(distance > 8 for distance in distances)
        found = f"{len(pictures) - missed} of {len(pictures)}"
        print(f"| {roll:g}° | {found} | {np.median(distances):.2f} | {wrong} | {false} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="archive <folder>/<person>/<picture>.jpg with <folder>/pairs.csv")
    parser.add_argument("--yunet", required=True, help="YuNet network (.onnx)")
    parser.add_argument("--count", type=int, default=600, help="people; two thirds to fit, one third to check")
    parser.add_argument("--roll", type=float, default=8.0, help="standard deviation of the turn, degrees")
    parser.add_argument("--roll-sd", type=float, default=0.12, help="the constant roll_sd, which is chosen, not fitted")
    parser.add_argument("--textures", type=int, default=60, help="generated pictures without faces")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-rolls", type=float, nargs="+", metavar="DEGREES", help="do not fit, try turned heads")
    arguments = parser.parse_args()
    if arguments.check_rolls is not None:
        upright = photographs(arguments.photographs, arguments.count, 0.0, arguments.seed)
        report_rolls(upright, YuNetDetector(arguments.yunet), arguments.check_rolls)
        return 0
    pictures = photographs(arguments.photographs, arguments.count, arguments.roll, arguments.seed)
    yunet = YuNetDetector(arguments.yunet)
    data = samples(pictures, yunet)
    cut = 2 * len(data) // 3
    fitted = fit(data[:cut], arguments.roll_sd)
    print(fitted)
    print(f"distance to YuNet's transform, template pixels, {len(data) - cut} photographs not fitted to:")
    report("box alone", [(Cues(cues.boxes, ([], []), []), g) for cues, g in data[cut:]], fitted)
    report("fitted", data[cut:], fitted)
    report("present constants", data[cut:], CascadeAlignment())
    rows, true = candidates(pictures[: len(pictures) // 2], yunet)
    noise, none = candidates([texture(seed) for seed in range(arguments.textures)], None)
    rows, true = np.vstack([rows, noise]), np.concatenate([true, none])
    rng = np.random.default_rng(arguments.seed)
    used = rng.random(len(true)) < 0.5
    fitted_weights = fit_confidence(rows[used], true[used])
    print(f"confidence: {tuple(round(float(w), 2) for w in fitted_weights)}")
    for text, weights in (("fitted", fitted_weights), ("present constants", np.array(CascadeAlignment().confidence))):
        p = 1 / (1 + np.exp(-rows[~used] @ weights))
        yes, no = p[true[~used]], p[~true[~used]]
        print(
            f"{text:>24}: {len(yes)} true candidates, 1st/5th percentile {np.quantile(yes, 0.01):.3f}/"
            f"{np.quantile(yes, 0.05):.3f}, below 0.5: {(yes < 0.5).sum()}; {len(no)} false ones, 95th/99th percentile "
            f"{np.quantile(no, 0.95):.3f}/{np.quantile(no, 0.99):.3f}, above 0.5: {(no > 0.5).sum()}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
