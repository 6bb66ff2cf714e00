"""What a teacher says about many altered faces, written down once, for students to learn from any number of times."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recipes.mixing import mixed, warped
from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import XCosError
from xcos_ext.model import XCosModel
from xcos_ext.training.augment import AugmentConfig, augmented
from xcos_ext.training.data import Pictures, file_lock, normalised
from xcos_ext.training.settings import SETTINGS
from xcos_ext.training.task import derived_seed

__all__ = ["Answers", "Bank", "BankConfig", "open_bank", "teacher_answers"]

_BLOCK = 64  # pictures of one forward pass, and of one step of the generator
_NOTED = 50  # blocks between two notes of how far it is
_VERSION = 1  # of the recipe in _draw


@dataclass(frozen=True, config=SETTINGS)
class BankConfig:
    """The bank of altered faces.

    Attributes:
        size: faces in it.
        seed: of the alterations.
        hints: names of the teacher's modules whose outputs are kept too, for the student's inner maps to imitate.
        amp: the teacher computes in bfloat16, which on processors with it takes less than half the time and moves its
            maps by one per cent.
    """

    size: int = Field(default=60_000, ge=1)
    seed: int = Field(default=0, ge=0)
    hints: tuple[str, ...] = ()
    amp: bool = True


@dataclasses.dataclass
class Bank:
    """Altered faces and the teacher's words on them; memory-mapped.

    Attributes:
        images: uint8 RGB [N, 3, H, W].
        first: int64 [N], picture that each was made of.
        second: int64 [N], the one that was mixed in, where one was; both are of the same group of people.
        features: fp16 [N, K, h, w], the teacher's grid feature.
        embeddings: fp16 [N, D], the teacher's embedding, not of unit length.
        hints: name of a module to its output, fp16 [N, ...].
    """

    images: Tensor
    first: Tensor
    second: Tensor
    features: Tensor
    embeddings: Tensor
    hints: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)


class Answers(NamedTuple):
    """What a teacher says of pictures, as they are and mirrored.

    Attributes:
        features: fp16 [2, N, K, h, w], grid features.
        embeddings: fp32 [2, N, D], at unit length.
    """

    features: Tensor
    embeddings: Tensor


@torch.no_grad()
def teacher_answers(
    teacher: XCosModel,
    pictures: Pictures,
    folder: Path,
    *,
    amp: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """What a teacher says of the pictures themselves: read if it is there, else computed and written.

    Args:
        teacher: a plugged recogniser in evaluation mode.
        pictures: of the size that it expects.
        folder: of the file, 6 kB a picture.
        amp: the teacher computes in bfloat16.
        progress: called with pictures done and pictures in all.

    Raises:
        XCosError: the folder cannot be written.
    """
    file = folder / f"answers-{teacher.fingerprint()}-{pictures.fingerprint}-{int(amp)}.safetensors"
    recogniser = teacher.backbone
    try:
        with file_lock(folder):
            if not file.is_file():
                made: dict[str, list[Tensor]] = {"features": [], "embeddings": []}
                for view in range(2):
                    for start in range(0, len(pictures), _BLOCK):
                        images = pictures.images[start : start + _BLOCK]
                        images = images.flip(3) if view else images
                        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                            grid = recogniser.grid(normalised(recogniser, images))  # type: ignore[union-attr, operator, arg-type]
                        made["features"].append(teacher.head.features(grid.float()).half())
                        made["embeddings"].append(F.normalize(recogniser.embed(grid.float()).float()))  # type: ignore[union-attr, operator]
                        if progress is not None:
                            progress(view * len(pictures) + start + len(images), 2 * len(pictures))
                whole = {
                    name: torch.cat(parts).view(2, len(pictures), *parts[0].shape[1:]) for name, parts in made.items()
                }
                write_atomically(file, lambda stream: stream.write(save(whole)))
            return Answers(**load_file(file))
    except OSError as error:
        raise XCosError(f"{file}: cannot be written or read: {error.strerror or error}") from error


def open_bank(
    teacher: XCosModel,
    pictures: Pictures,
    groups: Tensor,
    config: BankConfig,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """The bank of a teacher and pictures: read if it is there, else made; what was interrupted is taken up again.
    Of several processes one makes it, the others wait.

    Args:
        teacher: a plugged recogniser in evaluation mode.
        pictures: of the size that it expects.
        groups: int64 [P], group of each person; faces are mixed within a group only, so that people can be held out
            group by group without losing anything.
        config: of the bank.
        folder: in which the bank's own folder lies: about 50 kB a face, and the hints.
        progress: called with faces done and faces in all.

    Raises:
        XCosError: the folder cannot be written.
    """
    if teacher.training:
        raise ValueError("teacher: expected evaluation mode, got training mode")
    identity = [
        teacher.fingerprint(),
        pictures.fingerprint,
        hashlib.sha256(groups.numpy().tobytes()).hexdigest(),
        json.dumps(dataclasses.asdict(config), sort_keys=True),
        json.dumps(dataclasses.asdict(AugmentConfig()), sort_keys=True),
        str(_VERSION),
    ]
    place = folder / f"bank-{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:16]}"
    try:
        with file_lock(folder):
            if not place.is_dir():
                part = place.with_name(f"{place.name}.part")
                part.mkdir(parents=True, exist_ok=True)
                _make(teacher, pictures, groups, config, part, progress)
                os.replace(part, place)
        return _read(place, config.hints)
    except OSError as error:
        raise XCosError(f"{place}: the bank cannot be written or read: {error.strerror or error}") from error


def _names(hints: Sequence[str]) -> dict[str, str]:
    """Kind of array -> file."""
    return {name: f"{name}.npy" for name in ("images", "pictures", "features", "embeddings")} | {
        f"hint {name}": f"hint-{name}.npy" for name in hints
    }


def _read(place: Path, hints: Sequence[str]) -> Bank:
    # copy-on-write: torch wants writable memory
    arrays = {kind: torch.from_numpy(np.load(place / file, mmap_mode="c")) for kind, file in _names(hints).items()}
    first, second = arrays["pictures"].unbind(1)
    return Bank(
        arrays["images"],
        first,
        second,
        arrays["features"],
        arrays["embeddings"],
        {name: arrays[f"hint {name}"] for name in hints},
    )


def _draw(
    pictures: Pictures, members: Sequence[Tensor], groups: Tensor, seed: int, start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Altered faces uint8 [count, 3, H, W] and what they were made of, int64 [count, 2]: by the arguments alone."""
    epoch, total = start // len(pictures), len(pictures)
    places = torch.arange(start, start + count)
    orders = {
        number: torch.randperm(total, generator=torch.Generator().manual_seed(derived_seed(seed, 0, number)))
        for number in range(epoch, (start + count - 1) // total + 1)
    }
    first = torch.stack([orders[int(p) // total][int(p) % total] for p in places])
    generator = torch.Generator().manual_seed(derived_seed(seed, 1, start))
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    same = [members[int(group)] for group in groups[pictures.people[first]]]
    second = torch.stack([own[int(u * len(own))] for own, u in zip(same, uniform, strict=True)])
    faces = warped(mixed(pictures.images[first].float(), pictures.images[second].float(), generator), generator)
    images = augmented(faces.clamp(0, 255).round().to(torch.uint8), AugmentConfig(), generator)
    return images, torch.stack((first, second), 1)


@torch.no_grad()
def _make(
    teacher: XCosModel,
    pictures: Pictures,
    groups: Tensor,
    config: BankConfig,
    place: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    recogniser = teacher.backbone
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, made: caught.__setitem__(name, made)

    hooks = [recogniser.get_submodule(name).register_forward_hook(catch(name)) for name in config.hints]
    order = groups[pictures.people].argsort(stable=True)
    counts = torch.bincount(groups[pictures.people], minlength=int(groups.max()) + 1)
    members = order.split(counts.tolist())
    count = place / "done"
    done = int(count.read_text()) if count.is_file() else 0
    arrays: dict[str, np.memmap[Any, Any]] = {}
    files = _names(config.hints)
    try:
        for start in range(done, config.size, _BLOCK):
            size = min(_BLOCK, config.size - start)
            images, made_of = _draw(pictures, members, groups, config.seed, start, size)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.amp):
                grid = recogniser.grid(normalised(recogniser, images))  # type: ignore[union-attr, operator, arg-type]
            grid = grid.float()
            block: Mapping[str, Tensor] = {
                "images": images,
                "pictures": made_of,
                "features": teacher.head.features(grid).half(),
                "embeddings": recogniser.embed(grid).half(),  # type: ignore[union-attr, operator]
                **{f"hint {name}": caught[name].half() for name in config.hints},
            }
            for kind, values in block.items():
                if kind not in arrays:
                    file, shape = place / files[kind], (config.size, *values.shape[1:])
                    mode = "r+" if start > 0 else "w+"
                    arrays[kind] = np.lib.format.open_memmap(
                        file, mode, values.numpy().dtype, shape if mode == "w+" else None
                    )
                arrays[kind][start : start + size] = values.numpy()
            if (start // _BLOCK) % _NOTED == _NOTED - 1 or start + size == config.size:
                for array in arrays.values():
                    array.flush()
                count.write_text(str(start + size))
            if progress is not None:
                progress(start + size, config.size)
    finally:
        for hook in hooks:
            hook.remove()
