"""Pictures per second of a model's body: as it is, made ready for inference, and in onnxruntime.

    python recipes/studies/embed_pictures.py [WEIGHTS ...] --threads 2 --json benchmarks/results/models/embed.json

Without WEIGHTS the shipped model is measured. Contenders take turns within one run; what is reported is the median and
the quartiles of pictures per second, and of each contender's ratio to onnxruntime on the same network, batch and number
of threads. Needs onnxruntime and onnx.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import in_turns, write_json
from torch import Tensor, nn

from xcos_ext.deploy import for_inference
from xcos_ext.deploy.inference import has_fast_bfloat16
from xcos_ext.model import XCosModel, load_model


class Features(nn.Module):
    """Images to grid features."""

    def __init__(self, model: XCosModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.features(images)


def onnx_session(model: XCosModel, images: Tensor, threads: int) -> Callable[[], Any]:
    """The same network in onnxruntime, its batch norms folded by the runtime's own optimiser."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "features.onnx"
        torch.onnx.export(
            Features(model).eval(), (images,), str(file), dynamo=False, opset_version=17, input_names=["images"]
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {"images": images.numpy()}
    return lambda: session.run(None, given)[0]


def measure(path: str | None, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """Figures of one model."""
    model = load_model(path)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, *model.preprocessing.size)
    ready, half = for_inference(model), for_inference(model, torch.bfloat16)
    contenders: dict[str, Callable[[], Any]] = {
        "onnxruntime": onnx_session(model, images, threads),
        "torch": lambda: model.features(images),
        "for_inference fp32": lambda: ready.features(images),
        "for_inference bf16": lambda: half.features(images),
    }
    with torch.inference_mode():
        wanted = model.features(images).numpy()
        errors = {
            name: float(np.linalg.norm(np.asarray(run()) - wanted) / np.linalg.norm(wanted))
            for name, run in contenders.items()
        }
        rates = {name: batch / np.array(taken) for name, taken in in_turns(contenders, seconds).items()}
    peer = rates["onnxruntime"]
    return {
        "model": model.name,
        "fingerprint": model.fingerprint(),
        "contenders": {
            name: {
                "pictures_per_second": np.percentile(values, (25, 50, 75)).tolist(),
                "times_onnxruntime": np.percentile(values / peer, (25, 50, 75)).tolist(),
                "relative_error": errors[name],
            }
            for name, values in rates.items()
        },
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", help="models or recognisers; default: the shipped model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each model")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "torch": torch.__version__,
        "threads": options.threads,
        "batch": options.batch,
        "fast_bfloat16": has_fast_bfloat16(),
        "models": [
            measure(path, options.threads, options.batch, options.seconds) for path in options.weights or [None]
        ],
    }
    print("| model | contender | pictures/s | times onnxruntime | error |\n|---|---|---|---|---|")
    for model in result["models"]:
        for name, figures in model["contenders"].items():
            low, middle, high = figures["pictures_per_second"]
            a, b, c = figures["times_onnxruntime"]
            print(
                f"| {model['model']} | {name} | {middle:.0f} ({low:.0f} – {high:.0f}) | {b:.2f} ({a:.2f} – {c:.2f}) | "
                f"{figures['relative_error']:.1e} |"
            )
    if options.json is not None:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
