"""Who is in front of the camera? Says a name whenever it changes.

xcos enroll people.xcos photos/            # photos/<person>/<picture>
python examples/camera.py people.xcos      # or --source film.mp4
"""

from __future__ import annotations

import argparse
import time

import cv2

import xcos_ext


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", help="of xcos enroll")
    parser.add_argument("--source", default="0", help="number of a camera, or a film (default %(default)s)")
    parser.add_argument("--fpir", type=float, help="how often a stranger may be given a name, e.g. 0.01")
    options = parser.parse_args()
    camera = cv2.VideoCapture(int(options.source) if options.source.isdecimal() else options.source)
    if not camera.isOpened():
        parser.error(f"--source: expected a camera or a film that can be opened, got {options.source!r}")
    said = None
    started = time.monotonic()
    with xcos_ext.Gallery.open(options.gallery) as gallery:
        while True:
            there, bgr = camera.read()
            if not there:
                return 0
            try:
                found = gallery.find(bgr[:, :, ::-1].copy(), 1, by="person", fpir=options.fpir)
                best = found[0][0]
                known = found.threshold is not None and best.score >= found.threshold
                name = f"{best.person or best.id} ({best.score:.2f})" if known else "a stranger"
            except xcos_ext.PictureError:
                name = "nobody"
            if name.partition(" (")[0] != said:
                said = name.partition(" (")[0]
                print(f"{time.monotonic() - started:6.1f} s  {name}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
