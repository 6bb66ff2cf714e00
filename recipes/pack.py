"""One folder with all that a training of the default model reads, small enough to be carried to a GPU.

    python -m recipes.pack recipes/default_model.toml --out .carry

Faces become WebP, at most 16 of a person, people with one picture stay behind unless they are held out, and the paths
of the experiment are those in the folder. ``recipes/train_default.sh`` trains from it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from recipes.common import say
from recipes.student import Experiment
from xcos_ext.faces import PersonFolder
from xcos_ext.io.atomic import write_atomically
from xcos_ext.io.errors import XCosError
from xcos_ext.training.settings import read_toml
from xcos_ext.training.tasks import load_experiment

__all__ = ["packed_faces"]

_MOST = 16  # pictures of a person: some have hundreds, and more people are worth more


def packed_faces(pictures: PersonFolder, held_out: set[str], quality: int) -> bytes:
    """A zip archive of WebP pictures: of people with several, and of those held out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for person in pictures.people:
            keys = pictures.of(person)
            if len(keys) < 2 and person not in held_out:
                continue
            for key in keys[:: max(1, -(-len(keys) // _MOST))]:
                coded = io.BytesIO()
                Image.fromarray(pictures.read(key)).save(coded, "WEBP", quality=quality, method=6)
                archive.writestr(f"{key.rsplit('.', 1)[0]}.webp", coded.getvalue())
    return stream.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment with task = 'recipes.student'")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--quality", type=int, default=40, help="of WebP, 0 to 100 (default 40)")
    parser.add_argument("--megabytes", type=float, default=35, help="that the folder may have (default 35)")
    parser.add_argument("--out", type=Path, required=True, help="folder, made anew")
    options = parser.parse_args(arguments)
    try:
        experiment = load_experiment(options.config, options.assignments)
        if not isinstance(experiment, Experiment) or experiment.data.held_out_list is None:
            raise XCosError(f"{options.config}: expected task = 'recipes.student' and data.held_out_list")
        out: Path = options.out
        out.mkdir(parents=True)
        student, held_out = experiment.student, Path(experiment.data.held_out_list)
        faces = packed_faces(PersonFolder(experiment.data.pictures), set(held_out.read_text().split()), options.quality)
        write_atomically(out / "faces.zip", lambda file: file.write(faces))
        for file in (held_out, *map(Path, student.teachers), Path(student.start)):
            shutil.copyfile(file, out / file.name)
        settings = read_toml(options.config)
        settings["data"] |= {"pictures": "faces.zip", "held_out_list": held_out.name, "cache": "cache"}
        settings["student"] |= {
            "teachers": [Path(file).name for file in student.teachers],
            "start": Path(student.start).name,
        }
        write_atomically(out / "experiment.json", lambda file: file.write(json.dumps(settings, indent=1).encode()))
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        if size > options.megabytes:
            raise XCosError(f"{out}: expected at most {options.megabytes:g} MB, got {size:.1f}; lower --quality")
    except (XCosError, OSError, ValueError) as error:
        say(f"pack: {error}")
        return 2
    say(f"{out}: {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
