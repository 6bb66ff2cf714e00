"""Train the default detector's network (``xcos_ext/data/detector.safetensors``).

    python -m recipes.train_detector label --yunet yunet.onnx --out labels.npz lfw_photos.zip cfp_dev.zip celeb112.zip
    python -m recipes.train_detector train labels.npz --out detector.safetensors lfw_photos.zip cfp_dev.zip celeb112.zip

YuNet is the teacher: what it finds in a photograph with a border of a quarter of the longer side stands in for the
truth. The network sees scenes cut from those photographs, one or several faces of any size, turned by up to 60 degrees,
some of them covered, blurred, dark or cut off; and what is no face: the rest of the photographs, pieces of them put
together anew, faces upside down, generated textures and drawings.

Nobody in lfw_photos' pairs.csv is trained on, nor are 200 other people of LFW and CFP's folds 3 and 4, on which
``recipes/studies/detectors.py`` measures.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.common import Padded, say
from recipes.scenes import drawn_scene, nothing
from xcos_ext.faces import (
    ARCFACE_TEMPLATE,
    PictureTree,
    SmallDetector,
    YuNetDetector,
    apply_transform,
    similarity_transform,
    warp,
)
from xcos_ext.faces.alignment import MIRRORED, compose
from xcos_ext.faces.network import CROP, LAYERS, MIDDLE, STRIDES, crop_transform, features, maps, save_weights
from xcos_ext.faces.pose import pose_of
from xcos_ext.faces.small import _SEARCHES, _SHAPES, _distinct, on_torch
from xcos_ext.training.engine import warmup_cosine
from xcos_ext.training.state import averaged_model

HELD_OUT = 200
_TRAINED = {name: layer for name, layer in LAYERS.items() if name not in ("rough", "read")}
CFP_TRAINED = 100  # the people of folds 1 and 2
UNSURE = 0.6  # faces of a lower score are neither learned nor learned to be none
SMALLEST = 9.0  # pixels of a face that is learned
#: Sizes (square root of the box's area, pixels) that each map learns.
SIZES = ((8.0, 40.0), (30.0, 90.0), (66.0, 400.0))


def paired_people(path: Path) -> set[str]:
    """The people of the archive's pairs.csv; nobody if there is none."""
    with zipfile.ZipFile(path) as archive:
        listings = [archive.read(name).decode("utf-8-sig") for name in archive.namelist() if name.endswith("pairs.csv")]
    rows = [row for listing in listings for row in csv.DictReader(io.StringIO(listing))]
    return {row[side].split("/")[0] for row in rows for side in "ab"}


def held_out(path: Path, seed: int = 1) -> tuple[list[str], list[str]]:
    """The names of an archive's pictures that may be learned from, and those of people held out."""
    names = list(PictureTree(path).names)
    if path.name.startswith("cfp"):
        person = {name: int(name.split("/")[-3]) for name in names}
        return [n for n in names if person[n] <= CFP_TRAINED], [n for n in names if person[n] > CFP_TRAINED]
    if not path.name.startswith("lfw_photos"):
        return names, []
    tested = paired_people(path)
    people = sorted({name.split("/")[-2] for name in names} - tested)
    held = set(np.random.default_rng(seed).permutation(people)[:HELD_OUT].tolist())
    free = [name for name in names if name.split("/")[-2] not in tested | held]
    return free, [name for name in names if name.split("/")[-2] in held]


def labels_of(rgb: np.ndarray, teacher: Padded) -> np.ndarray:
    """What the teacher finds, [F, 15] fp32: box (left, top, width, height), five points, score."""
    faces = teacher.detect(rgb)
    rows = [np.concatenate([f.box, np.asarray(f.landmarks).reshape(-1), [f.score]]) for f in faces]
    return np.array(rows, np.float32).reshape(-1, 15)


def label(arguments: argparse.Namespace) -> None:
    """Write what the teacher says of every picture of the archives."""
    teacher = Padded(YuNetDetector(arguments.yunet, min_score=0.3))
    known: dict[str, Any] = {}
    for archive in arguments.archives:
        tree, started = PictureTree(archive), time.monotonic()
        names = sorted(set().union(*held_out(archive)))[:: 3 if archive.name.startswith("celeb") else 1]
        for i, name in enumerate(names):
            known[f"{archive.name}/{name}"] = labels_of(tree.read(name), teacher)
            if i % 200 == 0:
                say(f"{archive.name}: {i} of {len(names)}, {time.monotonic() - started:.0f} s")
        np.savez_compressed(arguments.out, **known)


# --- scenes


class Photograph(NamedTuple):
    """A picture and the teacher's faces in it, as :func:`labels_of` gives them."""

    rgb: np.ndarray
    faces: np.ndarray


class Scene(NamedTuple):
    """What the network sees, uint8 [S, S, 3]; faces [F, 17]: middle, width, height, five points, yaw, pitch, weight.

    The weight is 1 for a face, 0 for what is neither learned as one nor as none.
    """

    rgb: np.ndarray
    faces: np.ndarray


def placed(faces: np.ndarray, matrix: np.ndarray, degrees: float) -> np.ndarray:
    """The teacher's faces after a similarity transform that turns by ``degrees``, as in a :class:`Scene`."""
    if not len(faces):
        return np.zeros((0, 17), np.float32)
    scale = float(np.sqrt(np.linalg.det(matrix[:, :2])))
    middle = apply_transform(matrix, faces[:, :2] + faces[:, 2:4] / 2)
    sides = faces[:, 2:4] * scale
    cosine, sine = np.cos(np.deg2rad(degrees)) ** 2, np.sin(np.deg2rad(degrees)) ** 2
    # The box around the ellipse in the upright box.
    sides = np.sqrt(
        np.stack(
            [sides[:, 0] ** 2 * cosine + sides[:, 1] ** 2 * sine, sides[:, 0] ** 2 * sine + sides[:, 1] ** 2 * cosine],
            1,
        )
    )
    points = np.stack([apply_transform(matrix, face[4:14].reshape(5, 2)) for face in faces])
    pose = np.deg2rad([pose_of(face)[:2] for face in points])
    # A face that lies or stands on its head is none; in between nobody knows.
    down = points[:, 3:].mean(1) - points[:, :2].mean(1)
    roll = np.abs(np.rad2deg(np.arctan2(-down[:, 0], down[:, 1])))
    sure = (faces[:, 14] >= UNSURE) & (roll <= 65) & (np.sqrt(sides.prod(1)) >= SMALLEST)
    rows = np.concatenate([middle, sides, points.reshape(-1, 10), pose, sure[:, None]], 1)
    return rows[roll <= 110].astype(np.float32)


class Scenes(torch.utils.data.IterableDataset[tuple[Tensor, list[Tensor]]]):
    """Batches without end: pictures uint8 [N, S, S, 3] and for each map its targets (see :func:`targets`)."""

    def __init__(self, photographs: list[Photograph], weights: np.ndarray, batch: int, seed: int) -> None:
        self.photographs, self.weights, self.batch, self.seed = photographs, weights, batch, seed

    def __iter__(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        cv2.setNumThreads(1)
        worker = torch.utils.data.get_worker_info()
        self.rng = np.random.default_rng([self.seed, 0 if worker is None else worker.id])
        while True:
            side = int(self.rng.choice([160, 256], p=[0.8, 0.2]))
            scenes = [self.scene(side) for _ in range(max(1, self.batch * 160**2 // side**2))]
            rgb = torch.from_numpy(np.stack([scene.rgb for scene in scenes]))
            marks = [targets(scene.faces, side) for scene in scenes]
            yield rgb, [torch.from_numpy(np.stack(level)) for level in zip(*marks, strict=True)]

    def scene(self, side: int) -> Scene:
        """One picture, spoilt."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.58:
            scene = self.cut(side)
        elif kind < 0.76:  # several, side by side
            across = int(rng.integers(2, 4))
            small = -(-side // across)
            rgb, faces = np.zeros((side, side, 3), np.uint8), []
            for i in range(across * across):
                x, y = small * (i % across), small * (i // across)
                part = self.cut(small) if rng.random() < 0.8 else Scene(nothing(small, rng), np.zeros((0, 17)))
                rgb[y : y + small, x : x + small] = part.rgb[: side - y, : side - x]
                shift = np.zeros(17)
                shift[[0, 4, 6, 8, 10, 12]], shift[[1, 5, 7, 9, 11, 13]] = x, y
                faces.append(part.faces + shift)
            scene = Scene(rgb, np.concatenate(faces))
        elif kind < 0.80:
            rgb, found = drawn_scene(side, rng)
            scene = Scene(rgb, placed(found, np.eye(2, 3), 0.0))
        elif kind < 0.90:
            rgb = in_pieces(self.cut(side).rgb, int(rng.integers(8, max(9, side // 6))), rng)
            scene = Scene(rgb, np.zeros((0, 17)))
        else:
            scene = Scene(nothing(side, rng), np.zeros((0, 17)))
        return Scene(spoilt(scene.rgb, rng), scene.faces.astype(np.float32))

    def cut(self, side: int) -> Scene:
        """Part of a photograph around one of its faces, or somewhere."""
        rng = self.rng
        photograph = self.photographs[int(rng.choice(len(self.photographs), p=self.weights))]
        rgb, faces = photograph
        turn = rng.random()
        degrees = float(
            rng.normal(0, 12) if turn < 0.6 else rng.uniform(-62, 62) if turn < 0.88 else rng.uniform(-180, 180)
        )
        face = faces[int(rng.integers(len(faces)))]
        size = float(np.sqrt(face[2] * face[3]))
        # Of all sizes; half of them of those that the points are read from in the end.
        low, high = (SMALLEST, 0.95 * side) if rng.random() < 0.5 or side < 120 else (50.0, min(130.0, 0.95 * side))
        wanted = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        scale = wanted / size
        if min(rgb.shape[:2]) * scale < 0.5 * side and rng.random() < 0.7:  # a small face, but in a whole picture
            scale = max(scale, 0.5 * side / min(rgb.shape[:2]))
        margin = 0.35 * min(size * scale, side)
        to = rng.uniform(margin, side - margin, 2)
        a, b = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
        matrix = np.array([[a, -b, 0], [b, a, 0]])
        matrix[:, 2] = to - matrix[:, :2] @ (face[:2] + face[2:4] / 2)
        border = rng.random()
        mode = cv2.BORDER_REPLICATE if border < 0.2 else cv2.BORDER_CONSTANT
        outside = (128, 128, 128) if border < 0.7 else tuple(int(v) for v in rng.integers(0, 256, 3))
        if scale < 0.6:
            shrink = max(scale * 1.3, 0.05)
            size_now = (max(1, round(rgb.shape[1] * shrink)), max(1, round(rgb.shape[0] * shrink)))
            small = cv2.resize(rgb, size_now, interpolation=cv2.INTER_AREA)
            factor = np.array([size_now[0] / rgb.shape[1], size_now[1] / rgb.shape[0]])
            inner = np.hstack([np.diag(1 / factor), (0.5 / factor - 0.5)[:, None]])
            use = np.hstack([matrix[:, :2] @ inner[:, :2], (matrix[:, :2] @ inner[:, 2] + matrix[:, 2])[:, None]])
        else:
            small, use = rgb, matrix
        seen = cv2.warpAffine(small, use, (side, side), flags=cv2.INTER_LINEAR, borderMode=mode, borderValue=outside)
        found = placed(faces, matrix, degrees)
        if rng.random() < 0.5:
            seen = np.ascontiguousarray(seen[:, ::-1])
            found[:, 0] = side - 1 - found[:, 0]
            points = found[:, 4:14].reshape(-1, 5, 2)[:, MIRRORED]
            points[:, :, 0] = side - 1 - points[:, :, 0]
            found[:, 4:14] = points.reshape(-1, 10)
            found[:, 14] *= -1
        return Scene(seen, found)


def in_pieces(rgb: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
    """A picture cut into squares that are put together anew."""
    side = len(rgb)
    places = [(y, x) for y in range(0, side - step + 1, step) for x in range(0, side - step + 1, step)]
    made = rgb.copy()
    for (y, x), k in zip(places, rng.permutation(len(places)), strict=True):
        v, u = places[k]
        made[y : y + step, x : x + step] = rgb[v : v + step, u : u + step]
    return made


def spoilt(rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, colour, blur, noise, compression, and things in front."""
    side = len(rgb)
    if rng.random() < 0.15:  # a hand, a mask, a pole
        w, h = rng.uniform(0.03, 0.3, 2) * side
        shape = cv2.boxPoints(((*rng.uniform(0, side, 2).tolist(),), (w, h), float(rng.uniform(0, 180))))
        rgb = cv2.fillPoly(
            rgb.copy(), [np.rint(shape).astype(np.int32)], tuple(int(v) for v in rng.integers(0, 256, 3))
        )
    if rng.random() < 0.25:
        small = int(side * rng.uniform(0.4, 1))
        rgb = cv2.resize(cv2.resize(rgb, (small, small), interpolation=cv2.INTER_AREA), (side, side))
    if rng.random() < 0.15:
        rgb = cv2.GaussianBlur(rgb, (0, 0), float(rng.uniform(0.4, 2.0)))
    levels = np.arange(256, dtype=np.float32) / 255
    if rng.random() < 0.7:
        levels = levels ** float(2 ** rng.normal(0, 0.6))
        levels = (levels - 0.5) * float(rng.uniform(0.4, 1.3)) + 0.5 + float(rng.normal(0, 0.1))
    table = np.repeat(np.clip(255 * levels, 0, 255)[:, None], 3, 1)
    if rng.random() < 0.4:
        table = np.clip(table * rng.normal(1, 0.12, 3), 0, 255)
    rgb = cv2.LUT(rgb, np.rint(table).astype(np.uint8)[None])
    if rng.random() < 0.2:
        rgb = np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[:, :, None], 3, 2)
    if rng.random() < 0.2:  # light from one side
        slope = rng.normal(0, 0.5, 2)
        line = np.linspace(-1, 1, side, dtype=np.float32)
        light = np.clip(1 + slope[0] * line[None] + slope[1] * line[:, None], 0.1, None)
        rgb = np.clip(rgb * light[:, :, None], 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        noise = rng.standard_normal(rgb.shape, dtype=np.float32) * float(rng.uniform(2, 14))
        rgb = np.clip(rgb + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        coded = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 75))])[1]
        rgb = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    return np.ascontiguousarray(rgb)


def targets(faces: np.ndarray, side: int) -> list[np.ndarray]:
    """What each map should say, [H, W, 18] fp32: 1 (a face), 0 (none) or -1 (nobody knows); the face's 16 numbers in
    pixels as in a :class:`Scene`, and its size."""
    levels = []
    for stride, (low, high) in zip(STRIDES, SIZES, strict=True):
        cells = -(-side // stride)
        at = np.arange(cells) * stride
        level = np.zeros((cells, cells, 18), np.float32)
        nearest = np.full((cells, cells), np.inf)
        for face in faces:
            size = float(np.sqrt(max(face[2] * face[3], 1.0)))
            apart = np.hypot(at[None] - face[0], at[:, None] - face[1])
            level[..., 0][(apart < 0.5 * size) & (level[..., 0] == 0)] = -1
            if face[16] and low <= size < high:
                here = (apart < max(0.2 * size, 0.75 * stride)) & (apart / size < nearest)
                nearest[here] = apart[here] / size
                level[here] = [1, *face[:16], size]
        levels.append(level)
    return levels


# --- training


class DetectorNetwork(nn.Module):
    """:func:`~xcos_ext.faces.network.maps` with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, (inputs, outputs, kernel, stride, groups) in _TRAINED.items():
            last = name == "out"
            layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=last)
            self.layers[name.replace(".", "_")] = layer if last else nn.Sequential(layer, nn.BatchNorm2d(outputs))
        nn.init.zeros_(self.layers["out"].weight)  # type: ignore[arg-type]
        nn.init.constant_(self.layers["out"].bias[:1], -4.6)  # type: ignore[index]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps of pictures uint8 [N, H, W, 3]."""

        def convolution(name: str, x: Tensor, relu: bool) -> Tensor:
            y = self.layers[name.replace(".", "_")](x)
            return y.relu() if relu else y

        x = pixels.permute(0, 3, 1, 2).float() / 64 - 2
        return maps(x.contiguous(memory_format=torch.channels_last), convolution, on_torch({})[1])

    def folded(self) -> dict[str, Tensor]:
        """Weights and biases with the normalisation inside."""
        found: dict[str, Tensor] = {}
        for name in _TRAINED:
            layer: Any = self.layers[name.replace(".", "_")]
            if name == "out":
                weight, bias = layer.weight, layer.bias
            else:
                norm = layer[1]
                factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight, bias = layer[0].weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
            found |= {f"{name}.weight": weight.detach().clone(), f"{name}.bias": bias.detach().clone()}
        return found


# --- the second reading


def upright_crop(
    photograph: Photograph, rng: np.random.Generator, rough: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A crop that is off as a reading of the points is, or as (``rough``) what was proposed; or its mirror image. And
    the points in it as the teacher says them, from its middle."""
    faces = photograph.faces[photograph.faces[:, 14] >= UNSURE]
    face = faces[int(rng.integers(len(faces)))] if rng.random() < 0.2 else faces[(faces[:, 2] * faces[:, 3]).argmax()]
    truth = face[4:14].reshape(5, 2).astype(np.float64)
    wide = float(rng.choice([1.5, 2.5, 3.5])) if rough else 1.0
    scale, angle = float(np.exp(rng.normal(0, 0.06 * wide))), np.deg2rad(rng.normal(0, 4 * wide))
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    linear, mean = np.array([[a, -b], [b, a]]), ARCFACE_TEMPLATE.mean(0)
    off = np.hstack([linear, (mean + rng.normal(0, 3 * wide, 2) - linear @ mean)[:, None]])
    start = similarity_transform(truth, ARCFACE_TEMPLATE)
    if rough and rng.random() < 0.5:  # as from a box alone
        shape = _SHAPES[int(rng.integers(3))] if rng.random() < 0.3 else _SHAPES[_nearest_shape(face)]
        start = similarity_transform(face[:2] + face[2:4] / 2 + shape * np.sqrt(face[2] * face[3]), ARCFACE_TEMPLATE)
    matrix = compose(crop_transform(), compose(off, start))
    crop = warp(photograph.rgb, matrix, (CROP, CROP), extend=True)
    truth = apply_transform(matrix, truth)
    if rng.random() < 0.5:
        crop, truth = crop[:, ::-1], truth[list(MIRRORED)] * (-1, 1) + (CROP - 1, 0)
    crop = np.ascontiguousarray(crop)
    if rng.random() < 0.15:  # a mask, a scarf
        low, high = truth[2, 1] + rng.normal(0, 4), truth[3:, 1].max() + rng.uniform(10, 26)
        left, right = truth[:, 0].min() - rng.uniform(4, 18), truth[:, 0].max() + rng.uniform(4, 18)
        shape = [(left, low), (truth[2, 0], low - rng.uniform(0, 8)), (right, low), (right - 8, high), (left + 8, high)]
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        crop = cv2.fillPoly(crop.copy(), [np.rint(shape).astype(np.int32)], colour)
    return spoilt(crop, rng) if rng.random() < 0.4 else crop, truth - CROP / 2


def _nearest_shape(face: np.ndarray) -> int:
    """Which of the detector's mean shapes is nearest to a face's points."""
    points = (face[4:14].reshape(5, 2) - face[:2] - face[2:4] / 2) / np.sqrt(face[2] * face[3])
    return int(np.linalg.norm(_SHAPES - points, axis=2).mean(1).argmin())


def features_of(weights: dict[str, Tensor], crops: list[np.ndarray]) -> np.ndarray:
    """What the second reading sees of the middle of upright crops, [N, inputs * kernel * kernel] fp32."""
    kept: list[Tensor] = []
    around = slice(MIDDLE - LAYERS["read"][2] // 2, MIDDLE + LAYERS["read"][2] // 2 + 1)
    with torch.inference_mode():
        for begin in range(0, len(crops), 64):
            pixels = torch.from_numpy(np.stack(crops[begin : begin + 64])).permute(0, 3, 1, 2).float() / 64 - 2
            kept.append(features(pixels, *on_torch(weights))[:, :, around, around].flatten(1))
    return torch.cat(kept).numpy()


def solved_points(
    weights: dict[str, Tensor],
    photographs: list[Photograph],
    count: int,
    rng: np.random.Generator,
    rough: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight [10, features] and bias [10] that read the points: least squares with a small penalty."""
    size = LAYERS["read"][0] * LAYERS["read"][2] ** 2 + 1
    gram, moment = np.zeros((size, size)), np.zeros((size, 10))
    for begin in range(0, count, 512):
        drawn = [
            upright_crop(photographs[(begin + i) % len(photographs)], rng, rough)
            for i in range(min(512, count - begin))
        ]
        x = features_of(weights, [crop for crop, _ in drawn]).astype(np.float64)
        x = np.hstack([x, np.ones((len(x), 1))])
        gram += x.T @ x
        moment += x.T @ np.stack([truth.reshape(-1) for _, truth in drawn])
    penalty = np.full(size, 300.0)
    penalty[-1] = 0
    solved = np.linalg.solve(gram + np.diag(penalty), moment)
    return solved[:-1].T, solved[-1]


def proposals(detector: SmallDetector, rgb: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the first reading proposes, upright and turned: points [5, 2], and the crop that the second would see."""
    for searches in (_SEARCHES[0] + _SEARCHES[1], _SEARCHES[2]):
        rows = _distinct(np.concatenate([detector._search(rgb, search) for search in searches]))[:10]
        boxes = rows[:, None, 1:3] + _SHAPES[len(rows) % 3] * np.sqrt(rows[:, 3] * rows[:, 4])[:, None, None]
        starts = np.concatenate([rows[:, 5:15].reshape(-1, 5, 2), boxes[:6]])
        for points in detector._step("read", rgb, detector._step("rough", rgb, starts)[0])[0]:
            try:
                matrix = compose(crop_transform(), similarity_transform(points, ARCFACE_TEMPLATE))
            except ValueError:
                continue
            yield points, warp(rgb, matrix, (CROP, CROP), extend=True)


def judged(detector: SmallDetector, photographs: list[Photograph], rng: np.random.Generator) -> tuple[Any, Any]:
    """Crops that are faces, and crops that are none: what the first reading proposes in photographs and in pictures of
    nothing, aligned crops with nothing around them, and faces turned over."""
    faces, none = [], []
    for photograph in photographs:
        truths = photograph.faces[:, 4:14].reshape(-1, 5, 2)
        sizes = np.sqrt(photograph.faces[:, 2] * photograph.faces[:, 3])
        for points, crop in proposals(detector, photograph.rgb):
            off = np.linalg.norm(points - truths, axis=2).mean(1) / sizes
            best = int(off.argmin())
            apart = np.linalg.norm(points.mean(0) - truths.mean(1), axis=1) / sizes
            if off[best] < 0.15 and photograph.faces[best, 14] >= UNSURE:
                faces.append(crop)
            elif apart.min() > 0.6 or (off[best] > 0.35 and photograph.faces[best, 14] >= UNSURE):
                none.append(crop)
        # Profiles are few, and half of what the first reading proposes there is off: more of them.
        turned_aside = abs(pose_of(truths[int(sizes.argmax())])[0]) > 35
        for _ in range(6 if turned_aside else 2):
            crop, _ = upright_crop(photograph, rng)
            faces.append(crop)
        faces.append(np.pad(crop[8:-8, 8:-8], ((8, 8), (8, 8), (0, 0)), mode="edge"))
        turned = np.ascontiguousarray(np.rot90(crop, int(rng.integers(1, 4))))
        none += [turned, np.ascontiguousarray(in_pieces(crop, 32, rng))] if rng.random() < 0.3 else [turned]
    for _ in range(2 * len(photographs) // 3):
        picture = nothing(int(rng.integers(120, 500)), rng)
        none += [crop for _, crop in proposals(detector, picture)]
        none.append(nothing(CROP, rng))
    return faces, none


def reading_layers(
    weights: dict[str, Tensor], photographs: list[Photograph], arguments: argparse.Namespace
) -> dict[str, Tensor]:
    """The layers that read the points and judge, linear in the features around the middle of an upright crop: solved
    once the network is trained, the points by least squares, the verdict by logistic regression."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(arguments.seed)
    inputs, outputs, kernel, _, _ = LAYERS["read"]
    mixed = [photographs[i] for i in rng.permutation(len(photographs))]
    weight, bias = np.zeros((outputs, inputs * kernel**2)), np.zeros(outputs)
    weight[:10], bias[:10] = solved_points(weights, mixed, arguments.crops, rng)
    rough = solved_points(weights, mixed, arguments.crops, rng, rough=True)

    def layers() -> dict[str, Tensor]:
        found = {}
        for name, (w, b) in {"rough": rough, "read": (weight, bias)}.items():
            found[f"{name}.weight"] = torch.from_numpy(w.reshape(-1, inputs, kernel, kernel)).float().contiguous()
            found[f"{name}.bias"] = torch.from_numpy(b).float()
        return found

    save_weights(arguments.out, weights | layers(), {})
    whole = [photograph for photograph in mixed if photograph.rgb.shape[:2] != (112, 112)]
    faces, none = judged(SmallDetector(weights=arguments.out), whole[: arguments.judged], rng)
    say(f"{len(faces)} crops of faces, {len(none)} of none")
    x = features_of(weights, faces + none)
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    regression = LogisticRegression(C=arguments.penalty, max_iter=300, class_weight="balanced")
    regression.fit((x - mean) / deviation, np.arange(len(x)) < len(faces))
    weight[10] = regression.coef_[0] / deviation
    bias[10] = float(regression.intercept_[0]) - float(weight[10] @ mean)
    return layers()


def losses(outputs: list[Tensor], marks: list[Tensor]) -> dict[str, Tensor]:
    """Focal loss of the verdict (Lin et al., ICCV 2017, gamma 2), and the errors of box, points and pose."""
    verdict = box = points = pose = torch.zeros(())
    count = torch.zeros(())
    for stride, found, mark in zip(STRIDES, outputs, marks, strict=True):
        found = found.permute(0, 2, 3, 1).float()
        logit, state = found[..., 0], mark[..., 0]
        wrong = torch.where(state > 0, (-logit).sigmoid(), logit.sigmoid())
        entropy = F.binary_cross_entropy_with_logits(logit, (state > 0).float(), reduction="none")
        balance = torch.where(state > 0, 0.5, 0.5)
        verdict = verdict + (balance * wrong**2 * entropy * (state >= 0)).sum()
        here = state > 0
        if not here.any():
            continue
        rows, truth = found[here], mark[here]
        _, y, x = here.nonzero(as_tuple=True)
        centre = torch.stack([x, y], 1) * stride
        size = truth[:, 17:]
        count = count + len(rows)
        middle = (rows[:, 1:3] * stride + centre - truth[:, 1:3]) / size
        sides = rows[:, 3:5] - (truth[:, 3:5] / stride).log()
        box = box + middle.abs().sum() + 0.5 * sides.abs().sum()
        five = (rows[:, 5:15].view(-1, 5, 2) * stride + centre[:, None] - truth[:, 5:15].view(-1, 5, 2)) / size[:, None]
        points = points + five.abs().sum() / 5
        pose = pose + (rows[:, 15:17] - truth[:, 15:17]).abs().sum()
    count = count.clamp(min=1)
    return {"verdict": verdict / count, "box": box / count, "points": points / count, "pose": pose / count}


def train(arguments: argparse.Namespace) -> None:
    """Train, and write the weights."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    with np.load(arguments.labels, allow_pickle=False) as kept:
        known = dict(kept)
    photographs, weights = [], []
    for archive in arguments.archives:
        tree = PictureTree(archive)
        names = [name for name in held_out(archive)[0] if f"{archive.name}/{name}" in known]
        for name in names:
            faces = known[f"{archive.name}/{name}"]
            if (faces[:, 14] >= UNSURE).any():
                photographs.append(Photograph(tree.read(name), faces))
                weights.append(archive.name.startswith("cfp") * 2.0 + 1.0 + ("profile" in name) * 3.0)
    say(f"{len(photographs)} photographs")
    chances = np.array(weights) / np.sum(weights)
    scenes = torch.utils.data.DataLoader(
        Scenes(photographs, chances, arguments.batch, arguments.seed), batch_size=None, num_workers=arguments.workers
    )
    network = DetectorNetwork().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arguments.resume is not None:
        network.load_state_dict(torch.load(arguments.resume, weights_only=True))
    average = averaged_model(network, 0.998)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=arguments.rate
    )
    smooth: dict[str, float] = {}
    started = time.monotonic()
    for step, (pixels, marks) in zip(range(arguments.steps), scenes, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * warmup_cosine(step, arguments.steps, warmup=200)
        parts = losses(network(pixels), marks)
        loss = parts["verdict"] + parts["box"] + 6 * parts["points"] + 0.3 * parts["pose"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        average.update_parameters(network)
        for name, part in parts.items():
            smooth[name] = smooth.get(name, part.item()) * 0.98 + 0.02 * part.item()
        if step % 100 == 0 or step == arguments.steps - 1:
            text = ", ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            say(f"{step} of {arguments.steps}, {time.monotonic() - started:.0f} s: {text}")
        if step % 1000 == 999 or step == arguments.steps - 1:
            torch.save(average.module.state_dict(), arguments.out.with_suffix(".pt"))
    notes = {
        "data": f"{len(photographs)} photographs of {', '.join(path.name for path in arguments.archives)}",
        "teacher": "YuNet (face_detection_yunet_2023mar.onnx, MIT)",
        "training": json.dumps({k: getattr(arguments, k) for k in ("steps", "batch", "rate", "crops", "seed")}),
    }
    trained: Any = average.module
    made: dict[str, Tensor] = trained.folded()
    save_weights(arguments.out, made | reading_layers(made, photographs, arguments), notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    labelling = commands.add_parser("label", help="write what the teacher says")
    labelling.add_argument("--yunet", required=True, type=Path)
    training = commands.add_parser("train", help="train on what label wrote")
    training.add_argument("labels", type=Path)
    training.add_argument("--steps", type=int, default=30_000)
    training.add_argument("--batch", type=int, default=32, help="scenes of 160 x 160 pixels (default %(default)s)")
    training.add_argument("--rate", type=float, default=3e-3)
    training.add_argument("--crops", type=int, default=40_000, help="that the points are learned from")
    training.add_argument("--judged", type=int, default=10_000, help="photographs whose proposals are judged, at most")
    training.add_argument("--penalty", type=float, default=0.003, help="C of the verdict's logistic regression")
    training.add_argument("--workers", type=int, default=1)
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--resume", type=Path, help="start from a state that an earlier run left beside --out (.pt)")
    for command in (labelling, training):
        command.add_argument("--out", required=True, type=Path)
        command.add_argument("archives", type=Path, nargs="+")
    arguments = parser.parse_args()
    {"label": label, "train": train}[arguments.command](arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
