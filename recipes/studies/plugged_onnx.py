"""A recogniser in an ONNX file, plugged in closed form, beside its own plain cosine: LFW and CFP.

    python -m recipes.studies.plugged_onnx sface_2021dec_int8bq.onnx --faces celeb112.zip --lfw lfw112.zip \\
        --pairs pairs.txt --cfp cfp_dev.zip --detector yunet.onnx --json benchmarks/results/models/sface.json

The mean and the threshold come from one picture each of the people of ``--faces``, none of whom may be in LFW or CFP.
Both scores are of the same run over the same pictures. CFP's pictures are tight crops, so they are padded by a
quarter of the longer side before the face is looked for; a picture without a face counts as rejected.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from recipes.common import Padded, say, write_json
from xcos_ext.backbones import OnnxRecogniser
from xcos_ext.evaluation import calibrate, evaluate
from xcos_ext.evaluation.datasets import CFP, LFW, PairList
from xcos_ext.faces import PersonFolder, create_detector
from xcos_ext.model import XCosModel, plug


def plugged(recogniser: OnnxRecogniser, faces: Path) -> XCosModel:
    """As ``xcos plug`` makes it: one picture of each person."""
    folder = PersonFolder(faces)
    pictures = [folder.read(folder.of(person)[0]) for person in folder.people]
    model = plug(recogniser, pictures)
    features = torch.cat([model.features_of(pictures[i : i + 32]) for i in range(0, len(pictures), 32)])
    model.set_calibration(calibrate(model, features, list(folder.people), decision_fmr=5e-3, fmrs=(1e-1, 1e-2, 1e-3)))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph")
    for name in ("faces", "lfw", "pairs", "cfp", "detector", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recogniser = OnnxRecogniser(options.graph, threads=options.threads)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model = plugged(recogniser, options.faces)
        with zipfile.ZipFile(options.cfp) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("Protocol/")])
        detector = Padded(create_detector(options.detector))
        lists: dict[str, tuple[PairList, Padded | None]] = {
            "LFW": (LFW(options.lfw, options.pairs), None),
            **{
                f"CFP-{kind}": (CFP(options.cfp, Path(folder, "Protocol/Split", kind)), detector)
                for kind in ("FP", "FF")
            },
        }
        found = {}
        for name, (pairs, finder) in lists.items():
            say(f"{name}: {len(pairs):,} pairs")
            result = evaluate(model, pairs, teacher=recogniser, detector=finder)
            assert model.threshold is not None  # calibrated above
            accepted = result.variants["own"].scores >= model.threshold
            found[name] = {
                "pairs": len(pairs),
                "folds": int(np.unique(pairs.folds).size),
                "failed_pictures": len(result.failures),
                "variants": {key: variant.as_dict() for key, variant in result.variants.items()},
                "at_the_threshold": {
                    "fmr": float(accepted[~pairs.genuine].mean()),
                    "fnmr": float((~accepted[pairs.genuine]).mean()),
                },
            }
            write_json(options.json, {"map": recogniser.tensor, "threshold": model.threshold, "lists": found})


if __name__ == "__main__":
    main()
