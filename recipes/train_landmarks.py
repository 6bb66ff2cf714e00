"""Train the network of the default detector's landmarks (``xcos_ext/data/landmarks.safetensors``).

    python -m recipes.train_landmarks lfw_photos.zip --yunet yunet.onnx --bf16 --out landmarks.safetensors

YuNet is the teacher: what it reads in a photograph stands in for the truth. The network sees a face as a rough box
shows it: turned, shifted and scaled at random, more widely than the cascades' boxes scatter, then nearly upright, as on
its second reading; darker, blurred, noisy, partly covered or cut off by the picture's edge. It also learns what is no
face, from the cascades' own false boxes, generated textures, faces upside down and everything around faces.

Nobody in the archive's pairs.csv (``a,b,same`` with pictures ``<person>/<picture>``) is trained on, nor are the people
held out for the error that is printed and kept with the weights: the distance to YuNet's points over the distance
between its eyes, for the whole detector and for readings from wild boxes. ``--labels`` keeps what the teacher and the
cascades said, so that another training starts at once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from xcos_ext.faces import ARCFACE_TEMPLATE, CascadeDetector, PersonFolder, YuNetDetector, apply_transform, choose_face
from xcos_ext.faces.alignment import compose, similarity_transform, warp
from xcos_ext.faces.cascade import SEARCHES, CascadeBoxes
from xcos_ext.faces.landmark_network import LandmarkNetwork
from xcos_ext.faces.landmarks import CROP_CENTRE, CROP_SIDE, MIRRORED, LandmarkReader, crop_transform, save_network
from xcos_ext.training.engine import warmup_cosine
from xcos_ext.training.state import averaged_model

POINTS = ("left eye", "right eye", "nose", "left mouth", "right mouth")
SMALLEST = 10.0  # pixels between the eyes: smaller faces say too little about where their points are
ON_FACE, OFF_FACE = 20.0, 40.0  # template pixels between a box and a face: on it, on something else
FAILED = 0.10  # of the distance between the eyes
# How photographs are changed for the table: text, degrees, scale.
AS_THEY_ARE = ("as they are", 0.0, 1.0)
CHANGED = (
    ("turned by 10°", 10.0, 1.0),
    ("turned by 20°", 20.0, 1.0),
    ("turned by 30°", 30.0, 1.0),
    ("half as large", 0.0, 0.5),
    ("1.5 times as large", 0.0, 1.5),
)
CASCADE_BOXES = 600  # photographs in which the cascades' boxes are looked at, upright and turned over
TEXTURES = 60


# --- what is trained on


class Photograph(NamedTuple):
    """A picture with its faces.

    Attributes:
        rgb: uint8 [H, W, 3].
        faces: the teacher's landmarks, fp64 [F, 5, 2].
        wrong: transforms to the template of boxes that the cascades drew around something else, [K, 2, 3].
    """

    rgb: np.ndarray
    faces: np.ndarray
    wrong: np.ndarray


def texture(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """Smooth noise of all scales: full of blobs that cascades take for faces."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for octave in range(1, 8):
        noise = rng.standard_normal((2**octave, 2**octave))
        total += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) / octave
    total = (total - total.min()) / (total.max() - total.min())
    return np.repeat((255 * total).astype(np.uint8)[:, :, None], 3, axis=2)


def paired_people(path: str) -> set[str]:
    """The people of the archive's or folder's pairs.csv; nobody if there is none."""
    if Path(path).is_dir():
        listings = [file.read_text(encoding="utf-8-sig") for file in Path(path).rglob("pairs.csv")]
    else:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("pairs.csv")]
            listings = [archive.read(name).decode("utf-8-sig") for name in names]
    rows = [row for listing in listings for row in csv.DictReader(io.StringIO(listing))]
    return {row[side].split("/")[0] for row in rows for side in "ab"}


def distance(start: np.ndarray, landmarks: np.ndarray) -> float:
    """Root mean square distance of a face's points from where a box puts them, in template pixels."""
    return float(np.sqrt(((apply_transform(start, landmarks) - ARCFACE_TEMPLATE) ** 2).sum(1).mean()))


def teach(rgb: np.ndarray, yunet: YuNetDetector) -> np.ndarray:
    """The teacher's landmarks of all faces that are large enough, the prominent one first: [F, 5, 2]."""
    faces = [face for face in yunet.detect(rgb) if face.landmarks is not None]
    if not faces:
        return np.zeros((0, 5, 2))
    first = choose_face(faces, rgb.shape[:2])
    faces.sort(key=lambda face: face is not first)
    points = np.array([face.landmarks for face in faces])
    return points[np.linalg.norm(points[:, 0] - points[:, 1], axis=1) >= SMALLEST]


def false_boxes(rgb: np.ndarray, faces: np.ndarray, cascades: CascadeBoxes) -> np.ndarray:
    """What the cascades take for a face, upright and turned over, but is none: [K, 2, 3]."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    starts = [start for roll in (0.0, 90.0, 180.0) for start in cascades.find(grey, SEARCHES[1], roll)]
    wrong = [start for start in starts if all(distance(start, face) > OFF_FACE for face in faces)]
    return np.array(wrong).reshape(-1, 2, 3)


class Labels:
    """What the teacher and the cascades say of pictures, kept in a file if there is one.

    Args:
        file: .npz to read and to write, or None.
        yunet: path of the teacher's network.
    """

    def __init__(self, file: str | None, yunet: str) -> None:
        self.file = None if file is None else Path(file)
        self.known: dict[str, np.ndarray] = {}
        if self.file is not None and self.file.is_file():
            with np.load(self.file, allow_pickle=False) as kept:
                self.known = dict(kept)
        self.yunet, self.cascades = YuNetDetector(yunet), CascadeBoxes()

    def faces(self, key: str, rgb: np.ndarray) -> np.ndarray:
        return self._kept("faces " + key, lambda: teach(rgb, self.yunet))

    def wrong(self, key: str, rgb: np.ndarray, faces: np.ndarray) -> np.ndarray:
        return self._kept("wrong " + key, lambda: false_boxes(rgb, faces, self.cascades))

    def _kept(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def save(self) -> None:
        if self.file is not None:
            temporary = self.file.with_name(f".{self.file.name}.tmp.npz")
            np.savez_compressed(temporary, **self.known)  # type: ignore[arg-type]
            temporary.replace(self.file)


@contextlib.contextmanager
def bar(text: str, total: int, **fields: str) -> Iterator[Callable[..., None]]:
    """A progress bar; the function that it gives advances it by one and sets fields of the text."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=2) as progress:
        task = progress.add_task("", total=total, **fields)  # type: ignore[arg-type]
        yield lambda **new: progress.update(task, advance=1, **new)


def read(folder: PersonFolder, keys: Sequence[str], labels: Labels, boxes: int) -> list[Photograph]:
    """Photographs with faces in them; in the first ``boxes`` of them the cascades' false boxes too."""
    photographs = []
    with bar("teacher", len(keys)) as advance:
        for index, key in enumerate(keys):
            rgb = folder.read(key)
            faces = labels.faces(key, rgb)
            wrong = labels.wrong(key, rgb, faces) if index < boxes else np.zeros((0, 2, 3))
            if len(faces):
                photographs.append(Photograph(rgb, faces, wrong))
            advance()
    return photographs


# --- augmentation


def similarity(degrees: float, scale: float, shift: Sequence[float] | np.ndarray) -> np.ndarray:
    """Turn and scale about the middle of the crop, then shift; template coordinates, [2, 3]."""
    a, b = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    linear = np.array([[a, -b], [b, a]])
    middle = np.array(CROP_CENTRE)
    return np.hstack([linear, (middle + np.asarray(shift) - linear @ middle)[:, None]])


def jitter(rng: np.random.Generator, wide: bool) -> np.ndarray:
    """How a box or a first reading is off."""
    if wide:
        degrees = rng.uniform(-35, 35) if rng.random() < 0.5 else rng.normal(0, 12)
        return similarity(degrees, float(np.exp(rng.normal(0, 0.13))), rng.normal(0, 6.5, 2))
    return similarity(rng.normal(0, 3.5), float(np.exp(rng.normal(0, 0.04))), rng.normal(0, 2.0, 2))


def spoil(crop: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """Light, blur, noise, compression, covered and missing parts.

    Args:
        crop: uint8 RGB [S, S, 3].
        rng: draws.
        other: uint8 grey [S, S], something else to cover parts with.

    Returns:
        uint8 grey [S, S].
    """
    size = len(crop)
    colour = rng.dirichlet((3.0, 5.9, 1.1)) if rng.random() < 0.5 else np.array((0.299, 0.587, 0.114))
    x: np.ndarray = crop.astype(np.float32) @ colour.astype(np.float32)
    if rng.random() < 0.3:  # few pixels
        small = int(rng.integers(size // 5, size))
        x = cv2.resize(cv2.resize(x, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    if rng.random() < 0.15:
        x = cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.4, 2.0)))
    if rng.random() < 0.1:  # motion
        kernel = np.zeros((7, 7), np.float32)
        angle = rng.uniform(0, np.pi)
        step = np.array([np.cos(angle), np.sin(angle)]) * 3
        cv2.line(
            kernel, tuple(np.rint(3 - step).astype(int).tolist()), tuple(np.rint(3 + step).astype(int).tolist()), 1.0
        )
        x = cv2.filter2D(x, -1, kernel / kernel.sum())
    if rng.random() < 0.5:
        x = 255 * np.clip(x / 255, 0, 1) ** float(2 ** rng.normal(0, 0.6))
    if rng.random() < 0.3:  # light from one side
        slope = rng.normal(0, 0.5, 2)
        line = np.linspace(-1, 1, size, dtype=np.float32)
        x = x * np.clip(1 + slope[0] * line[None] + slope[1] * line[:, None], 0.1, None).astype(np.float32)
    if rng.random() < 0.5:
        x = (x - 128) * float(rng.uniform(0.3, 1.4)) + 128 + float(rng.normal(0, 30))
    if rng.random() < 0.3:
        x = x + rng.normal(0, rng.uniform(2, 14), x.shape).astype(np.float32)
    x = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        coded = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(12, 70))])[1]
        x = np.asarray(cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE))
    if rng.random() < 0.3:  # a hand, a mask, dark glasses
        w, h = rng.uniform(0.12, 0.5, 2) * size
        cx, cy = rng.uniform(0, size, 2)
        mask = np.zeros((size, size), np.uint8)
        box = ((float(cx), float(cy)), (float(w), float(h)), float(rng.uniform(0, 180)))
        if rng.random() < 0.5:
            cv2.ellipse(mask, box, 1, -1)
        else:
            cv2.fillPoly(mask, [np.rint(cv2.boxPoints(box)).astype(np.int32)], 1)
        x = np.where(mask > 0, other if rng.random() < 0.5 else np.uint8(rng.integers(0, 256)), x)
    if rng.random() < 0.15:  # the picture ends
        cut = int(rng.integers(1, int(0.4 * size)))
        turns = int(rng.integers(4))
        x = np.rot90(x, turns).copy()
        x[:, :cut] = x[:, cut : cut + 1] if rng.random() < 0.5 else 0
        x = np.rot90(x, -turns)
    return np.ascontiguousarray(x)


class Batch(NamedTuple):
    """Crops uint8 [N, 1, S, S]; points fp32 [N, 5, 2] in their pixels (zeros: no face); is it a face, 0 or 1 [N]."""

    crops: Tensor
    points: Tensor
    face: Tensor


class Sampler:
    """Draws batches; the same for the same seed.

    Args:
        photographs: what is trained on.
        size: of the network's crops.
        seed: of all draws.
    """

    def __init__(self, photographs: list[Photograph], size: int, seed: int) -> None:
        self.photographs, self.size = photographs, size
        self.upright = [[similarity_transform(face, ARCFACE_TEMPLATE) for face in p.faces] for p in photographs]
        self.wrong = [(i, j) for i, p in enumerate(photographs) for j in range(len(p.wrong))]
        self.textures = [texture(i) for i in range(TEXTURES)]
        self.rng = np.random.default_rng(seed)
        self.to_crop = crop_transform(size)

    def draw(self, count: int, faces: float = 0.65) -> Batch:
        """``count`` samples, of which the share ``faces`` are faces."""
        crops = np.empty((count, 1, self.size, self.size), np.uint8)
        points = np.zeros((count, 5, 2), np.float32)
        face = np.arange(count) < round(faces * count)
        other = self._grey(*self._nothing())
        for i in range(count):
            rgb, start, landmarks = self._face() if face[i] else (*self._nothing(), np.zeros((5, 2)))
            matrix = compose(self.to_crop, start)
            crop = warp(rgb, matrix, (self.size, self.size), extend=bool(self.rng.random() < 0.8))
            at = apply_transform(matrix, landmarks)
            if self.rng.random() < 0.5:
                crop = crop[:, ::-1]
                at = at[list(MIRRORED)]
                at[:, 0] = self.size - 1 - at[:, 0]
            crops[i, 0] = spoil(crop, self.rng, other)
            if face[i]:
                points[i] = at
            else:
                other = crops[i, 0]
        return Batch(torch.from_numpy(crops), torch.from_numpy(points), torch.from_numpy(face).float())

    def _grey(self, rgb: np.ndarray, start: np.ndarray) -> np.ndarray:
        matrix = compose(self.to_crop, start)
        return cv2.cvtColor(warp(rgb, matrix, (self.size, self.size), extend=True), cv2.COLOR_RGB2GRAY)

    def _face(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        i = int(self.rng.integers(len(self.photographs)))
        j = int(self.rng.integers(len(self.upright[i])))
        start = compose(jitter(self.rng, wide=bool(self.rng.random() < 0.6)), self.upright[i][j])
        return self.photographs[i].rgb, start, self.photographs[i].faces[j]

    def _nothing(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        kind = rng.random()
        if kind < 0.4 and self.wrong:
            i, j = self.wrong[rng.integers(len(self.wrong))]
            return self.photographs[i].rgb, compose(jitter(rng, False), self.photographs[i].wrong[j])
        if kind < 0.5:
            return self._anywhere(self.textures[rng.integers(len(self.textures))])
        i = int(rng.integers(len(self.photographs)))
        photograph = self.photographs[i]
        if kind < 0.8:  # a face, but not as a box shows one: upside down, too large, too small, beside it
            away = rng.uniform(0, 2 * np.pi)
            off = (
                similarity(rng.uniform(85, 275), float(np.exp(rng.normal(0, 0.2))), rng.normal(0, 8, 2)),
                similarity(rng.normal(0, 15), float(rng.uniform(2.2, 4.0)), rng.normal(0, 20, 2)),
                similarity(rng.normal(0, 15), float(rng.uniform(0.2, 0.42)), rng.normal(0, 10, 2)),
                similarity(rng.normal(0, 15), 1.0, (60 * np.cos(away), 60 * np.sin(away))),
            )[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))]
            return photograph.rgb, compose(off, self.upright[i][0])
        for _ in range(20):
            rgb, start = self._anywhere(photograph.rgb)
            if all(distance(start, face) > 1.3 * OFF_FACE for face in photograph.faces):
                return rgb, start
        return self._anywhere(self.textures[0])

    def _anywhere(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        height, width = rgb.shape[:2]
        scale = CROP_SIDE / np.exp(rng.uniform(np.log(30), np.log(0.8 * min(height, width))))
        turn = similarity(rng.uniform(0, 360), float(scale), (0, 0))[:, :2]
        at = rng.uniform(0, 1, 2) * [width, height]
        return rgb, np.hstack([turn, (np.array(CROP_CENTRE) - turn @ at)[:, None]])


# --- training


def loss_of(network: LandmarkNetwork, batch: Batch, focus: float) -> Tensor:
    """Distance over the distance between the eyes, cross-entropy of the verdict, and of each heat map to a small blob.

    The blob (Nibali et al., "Numerical Coordinate Regression with Convolutional Neural Networks", 2018, section 4.2)
    keeps heat maps to one place; ``focus`` is its weight.
    """
    points, logit, heat = network(batch.crops)
    is_face = batch.face > 0
    wanted = batch.points[is_face]
    eyes = (wanted[:, 0] - wanted[:, 1]).norm(dim=1)[:, None]
    off = (points.float()[is_face] - wanted).norm(dim=2) / eyes
    verdict = F.binary_cross_entropy_with_logits(logit.float(), batch.face)
    cells = torch.arange(heat.shape[-1]) * 4 + 1.5
    blob = torch.exp(-((cells - wanted[..., None]) ** 2) / (2 * 4.0**2))  # [N, 5, 2, cells], one cell wide
    target = blob[:, :, 1, :, None] * blob[:, :, 0, None, :]
    inside = target.sum((2, 3)) > 1.0
    target = target / target.sum((2, 3), keepdim=True).clamp_min(1e-6)
    spread = -(target * heat.float()[is_face].clamp_min(1e-8).log()).sum((2, 3))
    return off.mean() + 0.1 * verdict + focus * (spread * inside).mean()


def train(network: LandmarkNetwork, sampler: Sampler, arguments: argparse.Namespace) -> nn.Module:
    """The average of the weights over the end of the training, in evaluation mode."""
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}], lr=arguments.rate
    )
    average = averaged_model(network, 0.998)
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    smooth = 0.0
    with bar("training: loss {task.fields[loss]}", arguments.steps, loss="-") as advance:
        for step in range(arguments.steps):
            for group in optimiser.param_groups:
                group["lr"] = arguments.rate * warmup_cosine(step, arguments.steps, warmup=100)
            batch = sampler.draw(arguments.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = loss_of(network, batch, arguments.focus)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            average.update_parameters(network)
            now = loss.item()
            smooth = now if step == 0 else smooth + 0.02 * (now - smooth)
            advance(loss=f"{smooth:.4f}")
    network.load_state_dict(average.module.state_dict())
    return network.eval()


# --- how far from the teacher


def normalised(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance of each point over the distance between the teacher's eyes, [..., 5]."""
    eyes = np.linalg.norm(truth[..., 0, :] - truth[..., 1, :], axis=-1)
    return np.linalg.norm(found - truth, axis=-1) / eyes[..., None]


def describe(errors: np.ndarray) -> dict[str, float]:
    """Per cent, of errors [N, 5]: mean per point, and over faces the mean, median, 90th percentile and failures."""
    each = errors.mean(1)
    summary = {name: value for name, value in zip(POINTS, errors.mean(0), strict=True)}
    summary |= {"mean": each.mean(), "median": np.median(each), "90th percentile": np.quantile(each, 0.9)}
    return {name: round(100 * float(value), 3) for name, value in summary.items()} | {
        "failures": round(100 * float((each > FAILED).mean()), 2),
        "faces": len(errors),
    }


def wild_errors(reader: LandmarkReader, photographs: list[Photograph], seed: int, each: int = 2) -> np.ndarray:
    """Errors [N, 5] of readings that start from boxes as wide off as in training."""
    rng = np.random.default_rng(seed)
    errors = []
    for photograph in photographs:
        upright = similarity_transform(photograph.faces[0], ARCFACE_TEMPLATE)
        starts = np.array([compose(jitter(rng, True), upright) for _ in range(each)])
        landmarks, _ = reader.read(cv2.cvtColor(photograph.rgb, cv2.COLOR_RGB2GRAY), starts)
        errors.append(normalised(landmarks, photograph.faces[:1]))
    return np.concatenate(errors)


def turned(rgb: np.ndarray, degrees: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned about its middle and scaled, and the transform."""
    height, width = rgb.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    return warp(rgb, matrix, (height, width), extend=True), matrix


def detector_errors(
    detector: CascadeDetector, photographs: list[Photograph], degrees: float = 0.0, scale: float = 1.0
) -> tuple[np.ndarray, int, int]:
    """Errors [N, 5] of the whole detector on each photograph's prominent face; faces not found; boxes on no face.

    Photographs are turned by ``degrees``, every other one the other way, and scaled first.
    """
    errors, missed, false = [], 0, 0
    for index, photograph in enumerate(photographs):
        rgb, matrix = turned(photograph.rgb, degrees if index % 2 else -degrees, scale)
        truth = np.array([apply_transform(matrix, face) for face in photograph.faces])
        found = np.array([face.landmarks for face in detector.detect(rgb)]).reshape(-1, 5, 2)
        # From every box to every face [F, G].
        apart = np.array([normalised(found, face).mean(1) for face in truth])
        near = apart < 0.5
        false += int((~near.any(0)).sum())
        if near[0].any():
            errors.append(normalised(found[apart[0].argmin()], truth[0]))
        else:
            missed += 1
    return np.array(errors).reshape(-1, 5), missed, false


def report(
    detector: CascadeDetector, photographs: list[Photograph], changes: Sequence[tuple[str, float, float]]
) -> list[dict[str, float]]:
    """The whole detector's errors after each change, printed as a table and returned."""
    columns = ("photographs", "not found", "false boxes", "mean", "median", "90th percentile", "over 10 %", *POINTS)
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    summaries = []
    for text, degrees, scale in changes:
        errors, missed, false = detector_errors(detector, photographs, degrees, scale)
        s = describe(errors)
        points = " | ".join(f"{s[name]:.2f}" for name in POINTS)
        print(
            f"| {text} | {missed} of {len(photographs)} | {false} | {s['mean']:.2f} | {s['median']:.2f} "
            f"| {s['90th percentile']:.2f} | {s['failures']:.1f} % | {points} |",
            flush=True,
        )
        summaries.append({**s, "not found": missed, "false boxes": false})
    return summaries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder or archive of <person>/<picture>, best with a pairs.csv")
    parser.add_argument("--yunet", required=True, help="the teacher, YuNet (.onnx)")
    parser.add_argument("--out", help="weights to write (.safetensors)")
    parser.add_argument("--check", metavar="WEIGHTS", help="do not train: measure these weights, 'package' for ours")
    parser.add_argument("--labels", help=".npz that keeps the teacher's words from run to run")
    parser.add_argument("--held-out", type=int, default=200, help="people for the error (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--focus", type=float, default=0.01, help="weight of the heat maps' shape (default %(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=80, help="side of the network's crops, pixels (default %(default)s)"
    )
    parser.add_argument("--width", type=int, default=16, help="channels of its first layer (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; faster on processors that have it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)

    folder = PersonFolder(arguments.photographs)
    tested = paired_people(arguments.photographs)
    people = [str(person) for person in rng.permutation([p for p in folder.people if p not in tested])]
    if len(people) <= arguments.held_out:
        parser.error(f"--held-out: expected fewer than the {len(people)} people outside the pairs")
    held, rest = people[: arguments.held_out], people[arguments.held_out :]
    labels = Labels(arguments.labels, arguments.yunet)
    held_out = read(folder, [folder.of(person)[0] for person in held], labels, 0)
    if arguments.check is not None:
        weights = None if arguments.check == "package" else arguments.check
        labels.save()
        report(CascadeDetector(landmarks=weights), held_out, (AS_THEY_ARE, *CHANGED))
        return 0
    keys = [str(key) for key in rng.permutation([key for person in rest for key in folder.of(person)])]
    photographs = read(folder, keys, labels, CASCADE_BOXES)
    labels.save()

    sampler = Sampler(photographs, arguments.size, arguments.seed)
    print(
        f"{sum(len(p.faces) for p in photographs)} faces in {len(photographs)} photographs, "
        f"{len(sampler.wrong)} false boxes; {len(held_out)} photographs of people held out"
    )
    network = LandmarkNetwork(arguments.size, arguments.width)
    train(network, sampler, arguments)
    if arguments.out is not None:
        notes = {
            "data": f"{folder.path.name}: {len(photographs)} photographs; {len(tested)} people of "
            f"pairs.csv and {len(held)} others left out",
            "teacher": Path(arguments.yunet).name,
            "training": json.dumps({k: getattr(arguments, k) for k in ("steps", "batch", "rate", "focus", "seed")}),
        }
        save_network(arguments.out, network, notes)
        wild = describe(wild_errors(LandmarkReader(arguments.out), held_out, arguments.seed))
        print(f"from wild boxes, per cent of the distance between the eyes: {wild}")
        notes["error_wild_boxes"] = json.dumps(wild)
        save_network(arguments.out, network, notes)
        notes["error"] = json.dumps(report(CascadeDetector(landmarks=arguments.out), held_out, (AS_THEY_ARE,))[0])
        save_network(arguments.out, network, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
