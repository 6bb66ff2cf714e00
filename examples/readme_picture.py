"""Makes the picture at the top of README: a photograph against a copy of itself with part of the face covered.

    python examples/readme_picture.py WEIGHTS [OUT]

The photograph is scikit-image's `astronaut` (Eileen Collins; NASA, public domain), so nobody's private picture is
shown. The copy is darker, turned by six degrees, and wears a surgical mask drawn over nose, mouth and chin; the map
should say so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    weights = sys.argv[1]
    out = sys.argv[2] if len(sys.argv) == 3 else "docs/images/verify.png"
    from skimage import data  # an example's own need: pip install scikit-image

    photograph = Image.fromarray(np.asarray(data.astronaut()))
    masked = photograph.copy()
    draw = ImageDraw.Draw(masked)
    # Corners in pixels of the 512 x 512 photograph: across the nose, down the cheeks, under the chin.
    draw.polygon([(190, 134), (226, 122), (262, 132), (258, 168), (228, 190), (198, 172)], fill=(170, 196, 206))
    masked = ImageEnhance.Brightness(masked.rotate(6, resample=Image.Resampling.BICUBIC)).enhance(0.75)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "photograph.png", Path(folder) / "with a mask.png"
        photograph.save(first)
        masked.save(second)
        command = [
            sys.executable,
            "-m",
            "xcos_ext",
            "verify",
            str(first),
            str(second),
            "--model",
            weights,
            "--out",
            out,
        ]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    raise SystemExit(main())
