"""What an installed wheel must do, run outside the source folder: python wheel_smoke.py FOLDER_OF_PHOTOGRAPHS"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import xcos_ext


def main() -> int:
    photographs = sorted(Path(sys.argv[1]).resolve().glob("*.jpg"))
    os.chdir(tempfile.mkdtemp())
    place = Path(xcos_ext.__file__).resolve()
    assert "site-packages" in place.parts, f"this is not an installed package: {place}"
    info = xcos_ext.build_info()

    a, b = (torch.randn(4, 32, 7, 7, requires_grad=True) for _ in range(2))
    logits = torch.randn(4, 7, 7)
    score = xcos_ext.xcos_score(a, b, logits, logits=True)
    score.sum().backward()
    wanted = xcos_ext.reference.xcos_score(a, b, logits, logits=True)
    assert torch.allclose(score, wanted, atol=1e-5) and a.grad is not None and bool(a.grad.isfinite().all())
    assert xcos_ext.load_model().features(torch.zeros(1, 3, 112, 112)).shape == (1, 32, 7, 7)

    e = xcos_ext.verify(photographs[0], photographs[0])
    assert e and e.identical == "pictures" and e.a.details["faces"] == 1, e
    listed = subprocess.run(
        [sys.executable, "-m", "xcos_ext", "models", "list"], capture_output=True, text=True, check=True
    )
    assert "sface" in listed.stdout
    print(
        f"xcos_ext {xcos_ext.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"{info['isa']}, CUDA code for {info['cuda_architectures'] or 'none'}: good"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
