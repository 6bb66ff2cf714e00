"""Makes README's two photographs and the picture at its top: a face against a copy with part of it covered.

    python -m recipes.readme_picture [--photographs] [WEIGHTS]

The photograph is scikit-image's `astronaut` (Eileen Collins; NASA, public domain), so nobody's private picture is
shown. The copy is darker, turned by six degrees, and wears a surgical mask drawn over nose, mouth and chin; the map
should say so. ``--photographs`` makes both files anew (pip install scikit-image); without WEIGHTS the shipped model is
used.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "photographs"
FIRST, SECOND = FOLDER / "astronaut.jpg", FOLDER / "astronaut-masked.jpg"


def make_photographs() -> None:
    """Write both photographs."""
    from skimage import data

    photograph = Image.fromarray(np.asarray(data.astronaut()))
    masked = photograph.copy()
    draw = ImageDraw.Draw(masked)
    # Corners in pixels of the 512 x 512 photograph: across the nose, down the cheeks, under the chin.
    draw.polygon([(190, 134), (226, 122), (262, 132), (258, 168), (228, 190), (198, 172)], fill=(170, 196, 206))
    masked = ImageEnhance.Brightness(masked.rotate(6, resample=Image.Resampling.BICUBIC)).enhance(0.75)
    FOLDER.mkdir(exist_ok=True)
    for file, picture in ((FIRST, photograph), (SECOND, masked)):
        picture.save(file, quality=92)


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--photographs"]:
        make_photographs()
        arguments = arguments[1:]
    if len(arguments) > 1:
        print(__doc__, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "xcos_ext", "verify", str(FIRST), str(SECOND), "--out", "docs/images/verify.png"]
    return subprocess.run([*command, *(["--model", arguments[0]] if arguments else [])]).returncode


if __name__ == "__main__":
    raise SystemExit(main())
