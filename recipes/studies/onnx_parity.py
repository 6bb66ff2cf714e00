"""How exactly exported graphs compute what the models compute: differences on real faces, and verdicts that change.

    python recipes/studies/onnx_parity.py --lfw ../shared/data/lfw112.zip --pairs ../shared/data/pairs.txt \\
        slim ../shared/data/mobilefacenet_arcface.pt --json benchmarks/results/models/onnx.json

Every model is exported in fp32 and fp16, as a pair graph and as a template and a score graph. onnxruntime scores pairs
of LFW with them in batches of 1, 2 and 17; the largest absolute difference from torch's fp32 in score, S and W is kept.
All pairs of the folds are then scored by the pair graph, and verdicts at the model's threshold compared. Needs the
``onnx`` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import machine, write_json

from xcos_ext.deploy import OnnxModel, export_onnx
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.model import XCosModel, load_model

BATCHES = (1, 2, 17)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
MAPS = ("score", "similarity", "attention")


def pictures(lfw: LFW, indices: np.ndarray) -> np.ndarray:
    """uint8 [N, 112, 112, 3] of keys."""
    return np.stack([lfw.read(lfw.keys[i]) for i in indices])


def in_torch(model: XCosModel, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Score, S and W of pairs."""
    with torch.inference_mode():
        found = model(model.preprocessing(a), model.preprocessing(b))
    return [values.numpy() for values in found]


def measure(name: str, lfw: LFW, batch: int) -> list[dict[str, Any]]:
    """Rows of one model."""
    model = load_model(name)
    rows = []
    sides = pictures(lfw, lfw.first), pictures(lfw, lfw.second)
    wanted = [
        np.concatenate(parts)
        for parts in zip(
            *(in_torch(model, *(s[i : i + batch] for s in sides)) for i in range(0, len(lfw), batch)), strict=True
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for label, dtype in DTYPES.items():
            graphs = {}
            for kind in ("pair", "template", "score"):
                file = Path(folder) / f"{kind}-{label}.onnx"
                export_onnx(model, file, kind=kind, dtype=dtype)
                graphs[kind] = OnnxModel(file)
            for count in BATCHES:
                a, b = (side[:count] for side in sides)
                flat = [graphs["template"].templates(side) for side in (a, b)]
                for kind, found in (("pair", graphs["pair"].pair(a, b)), ("templates", graphs["score"].score(*flat))):
                    errors = [float(np.abs(x - y[:count]).max()) for x, y in zip(found, wanted, strict=True)]
                    rows.append(
                        {"model": model.name, "dtype": label, "graph": kind, "batch": count}
                        | dict(zip(MAPS, errors, strict=True))
                    )
            every = np.concatenate(
                [graphs["pair"].pair(*(s[i : i + batch] for s in sides)).score for i in range(0, len(lfw), batch)]
            )
            changed = (every >= model.threshold) != (wanted[0] >= model.threshold)
            rows.append(
                {
                    "model": model.name,
                    "dtype": label,
                    "graph": "pair",
                    "batch": "all",
                    "pairs": len(lfw),
                    "score": float(np.abs(every - wanted[0]).max()),
                    "median": float(np.median(np.abs(every - wanted[0]))),
                    "changed": int(changed.sum()),
                    "bytes": (Path(folder) / f"pair-{label}.onnx").stat().st_size,
                }
            )
    return rows


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--lfw", required=True, help="aligned crops: a folder or zip archive")
    parser.add_argument("--pairs", required=True, help="LFW's pairs.txt")
    parser.add_argument("--folds", type=int, nargs="+", default=[7, 8], help="numbered from 1")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    lfw = LFW(options.lfw, options.pairs, folds=tuple(fold - 1 for fold in options.folds))
    rows = [row for name in options.models for row in measure(name, lfw, options.batch)]
    for row in rows:
        print(json.dumps(row))
    if options.json is not None:
        import onnxruntime

        data = {"machine": machine(), "onnxruntime": onnxruntime.__version__, "folds": options.folds, "rows": rows}
        write_json(options.json, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
