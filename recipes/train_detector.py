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
from xcos_ext.faces import PictureTree, YuNetDetector, apply_transform
from xcos_ext.faces.alignment import MIRRORED
from xcos_ext.faces.network import LAYERS, STRIDES, maps, save_weights
from xcos_ext.faces.pose import pose_of
from xcos_ext.training.engine import warmup_cosine
from xcos_ext.training.state import averaged_model

HELD_OUT = 200
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
        elif kind < 0.90:  # pieces of a photograph, put together anew
            rgb = self.cut(side).rgb
            step = int(rng.integers(8, max(9, side // 6)))
            tiles = [
                rgb[y : y + step, x : x + step]
                for y in range(0, side - step + 1, step)
                for x in range(0, side - step + 1, step)
            ]
            rgb = rgb.copy()
            for i, j in enumerate(rng.permutation(len(tiles))):
                across = (side - step) // step + 1
                rgb[i // across * step :][:step, i % across * step :][:, :step] = tiles[j]
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
        wanted = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(0.95 * side))))
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
        for name, (inputs, outputs, kernel, stride, groups) in LAYERS.items():
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

        def twice(x: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(x, scale_factor=2.0)[..., : like.shape[2], : like.shape[3]]

        x = pixels.permute(0, 3, 1, 2).float() / 64 - 2
        return maps(x.contiguous(memory_format=torch.channels_last), convolution, twice)

    def folded(self) -> dict[str, Tensor]:
        """Weights and biases with the normalisation inside."""
        found: dict[str, Tensor] = {}
        for name in LAYERS:
            layer: Any = self.layers[name.replace(".", "_")]
            if name == "out":
                weight, bias = layer.weight, layer.bias
            else:
                norm = layer[1]
                factor = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight, bias = layer[0].weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
            found |= {f"{name}.weight": weight.detach().clone(), f"{name}.bias": bias.detach().clone()}
        return found


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
        loss = parts["verdict"] + parts["box"] + 4 * parts["points"] + 0.3 * parts["pose"]
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
                "training": json.dumps({k: getattr(arguments, k) for k in ("steps", "batch", "rate", "seed")}),
            }
            now: Any = average.module
            save_weights(arguments.out, now.folded(), notes)


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
