"""Compute the small statistics file that the closed-form plug-in needs for a recogniser.

    python -m recipes.plug_statistics --weights net.pt --pictures faces.zip --out net-statistics.safetensors

Pictures are aligned 112x112 crops, ``<person>/<picture>``, in a folder or zip archive; one of each person is
used. Keep people out on whom figures will be reported: ``--pairs`` leaves out everyone named in a pairs file
in LFW's format, ``--exclude`` everyone listed in a text file, one name per line. Thresholds are taken from
all impostor pairs among the people used. Give the result to ``xcos_ext.model.plug(..., statistics=...)`` or
``xcos_ext.load_model(..., statistics=...)``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from recipes.closed_forms import iterate_pictures
from xcos_ext.evaluation import calibrate
from xcos_ext.evaluation.datasets import read_pairs
from xcos_ext.faces import PersonFolder
from xcos_ext.io.text import composed
from xcos_ext.model import DEFAULT_SPREAD, Form, load_recogniser, plug, plug_statistics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="the recogniser's state dict")
    parser.add_argument("--pictures", required=True, help="aligned crops: folder or zip archive")
    parser.add_argument("--out", required=True, type=Path, help="statistics file to write (.safetensors)")
    parser.add_argument("--pairs", help="leave out everyone in this pairs file")
    parser.add_argument("--exclude", type=Path, help="leave out everyone in this list of names")
    parser.add_argument("--project", type=int, help="also compute this many principal axes per cell")
    parser.add_argument("--spread", type=float, default=DEFAULT_SPREAD, help="sharing between cells, in cells")
    parser.add_argument("--source", default="", help="where the pictures come from, noted in the file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    source = options.source
    pictures = PersonFolder(options.pictures)
    excluded: set[str] = set()
    if options.pairs is not None:
        excluded |= {name for pair in read_pairs(options.pairs) for name in (pair.person_a, pair.person_b)}
    if options.exclude is not None:
        excluded |= set(composed(options.exclude.read_text(encoding="utf-8-sig")).splitlines())
    people = [person for person in pictures.people if person not in excluded]
    keys = [pictures.of(person)[0] for person in people]
    print(f"{len(people)} of {len(pictures.people)} people, one picture each", file=sys.stderr)

    recogniser = load_recogniser(options.weights)
    with torch.no_grad():
        batches = [recogniser.preprocessing(batch) for batch in iterate_pictures(pictures, keys)]
        statistics = plug_statistics(
            recogniser,
            batches,
            project=options.project,
            spread=options.spread,
            note=f"one picture each of {len(people)} people{f' of {source}' if source else ''}",
        )
        grids = torch.cat([recogniser.grid(batch) for batch in batches])
        forms: list[tuple[bool, float, int | None]] = [
            (centre, spread, None) for centre in (True, False) for spread in dict.fromkeys((options.spread, 0.0))
        ]
        if options.project is not None:
            forms.append((True, options.spread, options.project))
        calibrations = {}
        for centre, spread, project in forms:
            model = plug(recogniser, statistics=statistics, centre=centre, spread=spread, project=project)
            features = torch.cat([model.head.features(part) for part in grids.split(64)])
            found = calibrations[Form(centre, spread, project)] = calibrate(model, features, people)
            print(
                f"centre={centre} spread={spread:g} project={project}: threshold {found.threshold:.4f}, "
                "at FMR "
                + ", ".join(f"{rate:g}: {threshold:.4f}" for rate, threshold in found.fmr.items())
                + f" ({found.impostor_pairs} impostor pairs)",
                file=sys.stderr,
            )
    dataclasses.replace(statistics, calibrations=calibrations).save(options.out)
    print(
        f"{options.out}: {options.out.stat().st_size} bytes, weights {statistics.fingerprint}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
