"""One archive of faces from LFW, CelebA and CFP, and the list of those who are tested on and never trained on.

    python -m recipes.gather --lfw lfw112.zip --pairs pairs.txt --celeb celeb112.zip --cfp cfp_dev.zip \\
        --detector yunet.onnx --judge mobilefacenet_arcface.pt --out data

Writes ``faces.zip`` (``<set>-<person>/<picture>``, aligned 112x112) and ``held_out.txt``: people of LFW's last folds
and of CFP's folds 3 and 4. Who is in another set under another name must not be trained on either: a person to train
on whose mean embedding has a cosine of 0.4 or more with that of somebody held out of another set is left out.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.common import Padded, say
from xcos_ext.backbones import Recogniser
from xcos_ext.faces import PersonFolder, PictureTree, create_detector, extract_face
from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import PictureError, XCosError
from xcos_ext.model import load_recogniser
from xcos_ext.training.data import people_of_folds

__all__ = ["CFP_TESTED", "LFW_TESTED", "doubles"]

LFW_TESTED = (7, 8)  # folds of the pairs file
CFP_TESTED = range(101, 201)  # people of folds 3 and 4
_ALIKE = 0.4  # cosine of mean embeddings from which two names may be one person
_PICTURES = 4  # of a person that are looked at for that

Read = Callable[[], tuple[bytes, np.ndarray]]


def aligned_pictures(archive: Path, name: str) -> Iterator[tuple[str, str, Read]]:
    """Person, file name and how to read it, of an archive of crops."""
    folder = PersonFolder(archive)

    def reader(key: str) -> Read:
        return lambda: (folder.contents(key), folder.read(key))

    for person in folder.people:
        for key in folder.of(person):
            yield f"{name}-{person}", key.split("/", 1)[1], reader(key)


def cfp_pictures(archive: Path, detector: Path) -> Iterator[tuple[str, str, Read]]:
    """The same of CFP's photographs, found and aligned; without a face there is no picture."""
    tree, finder = PictureTree(archive), Padded(create_detector(detector))

    def reader(path: str) -> Read:
        def read() -> tuple[bytes, np.ndarray]:
            crop = extract_face(tree.read(path), finder, name=path).rgb
            stream = io.BytesIO()
            Image.fromarray(crop).save(stream, "PNG")
            return stream.getvalue(), crop

        return read

    for path in tree.names:
        _, _, person, kind, file = path.split("/")
        yield f"cfp-{person}", f"{kind}-{Path(file).stem}.png", reader(path)


def doubles(
    embeddings: Tensor, people: Sequence[str], held_out: set[str], alike: float = _ALIKE
) -> dict[str, tuple[str, float]]:
    """People to train on who may be somebody held out of another set.

    Args:
        embeddings: [N, D] at unit length, of pictures.
        people: whose each is, ``<set>-<person>``.
        held_out: names of those who are tested on.
        alike: least cosine of two means.

    Returns:
        name -> the most similar held-out person of another set, and the cosine.

    >>> doubles(torch.eye(3)[[0, 0, 1]], ["lfw-Ann", "cfp-007", "lfw-Bob"], {"cfp-007"})
    {'lfw-Ann': ('cfp-007', 1.0)}
    """
    names, numbers = np.unique(list(people), return_inverse=True)
    means = torch.zeros(len(names), embeddings.shape[1]).index_add_(0, torch.from_numpy(numbers), embeddings)
    means = F.normalize(means)
    tested = torch.tensor([name in held_out for name in names])
    sets = np.array([name.split("-", 1)[0] for name in names])
    found = {}
    own = np.flatnonzero(tested.numpy())
    for index in np.flatnonzero(~tested.numpy()):
        others = own[sets[own] != sets[index]]
        if len(others):
            best, place = (means[others] @ means[index]).max(0)
            if best >= alike:
                found[str(names[index])] = str(names[others[int(place)]]), round(float(best), 3)
    return found


@torch.no_grad()
def embedded(recogniser: Recogniser, crops: Sequence[np.ndarray]) -> Tensor:
    """Embeddings at unit length [N, D]."""
    made = [
        recogniser.embed(recogniser.grid(recogniser.preprocessing(crops[i : i + 64]))) for i in range(0, len(crops), 64)
    ]
    return F.normalize(torch.cat(made))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("lfw", "pairs", "celeb", "cfp", "detector", "judge", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        held_out = {f"lfw-{person}" for person in people_of_folds(options.pairs, LFW_TESTED)}
        held_out |= {f"cfp-{number:03d}" for number in CFP_TESTED}
        judge = load_recogniser(options.judge)
        people: list[str] = []
        waiting: list[np.ndarray] = []
        embeddings: list[Tensor] = []
        looked_at: dict[str, int] = {}
        pictures = io.BytesIO()
        with zipfile.ZipFile(pictures, "w", zipfile.ZIP_STORED) as archive:
            for source in (
                aligned_pictures(options.lfw, "lfw"),
                aligned_pictures(options.celeb, "celeb"),
                cfp_pictures(options.cfp, options.detector),
            ):
                for person, file, read in source:
                    try:
                        contents, crop = read()
                    except PictureError as error:
                        say(f"left out: {error}")
                        continue
                    archive.writestr(f"{person}/{file}", contents)
                    looked_at[person] = looked_at.get(person, 0) + 1
                    if looked_at[person] <= _PICTURES:
                        people.append(person)
                        waiting.append(crop)
                    if len(waiting) == 512:
                        embeddings.append(embedded(judge, waiting))
                        waiting.clear()
                        say(f"{len(people)} pictures looked at")
        if waiting:
            embeddings.append(embedded(judge, waiting))
        found = doubles(torch.cat(embeddings), people, held_out)
        for name, (other, cosine) in found.items():
            say(f"{name}: left out, may be {other} ({cosine})")
        options.out.mkdir(parents=True, exist_ok=True)
        kept = io.BytesIO()
        with zipfile.ZipFile(pictures) as whole, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as archive:
            for name in whole.namelist():
                if name.split("/", 1)[0] not in found:
                    archive.writestr(name, whole.read(name))
        write_atomically(options.out / "faces.zip", lambda file: file.write(kept.getvalue()))
        listed = "".join(f"{person}\n" for person in sorted(held_out))
        write_atomically(options.out / "held_out.txt", lambda file: file.write(listed.encode()))
    except (XCosError, OSError, ValueError) as error:
        say(f"gather: {error}")
        return 2
    say(f"{len(found)} people left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
