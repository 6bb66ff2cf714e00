"""What ``compile_for_inference`` finds on a machine: its candidates beside each other and beside onnxruntime.

    OMP_NUM_THREADS=1 python recipes/studies/inference_choice.py slim mobilefacenet_arcface.pt ir_se_50 \\
        --faces lfw112.zip --batches 1 16 --threads 1 --json benchmarks/results/models/inference.json

Models are files, the shipped model's name, or architectures (with random weights). Every candidate scores the same
pairs, whole: body, 1x1 block, score and maps. They take turns within one run; reported are median and quartiles of the
time, of the times faster than the eager model and than onnxruntime, the largest difference of a score, and which is
chosen. The tables of docs/deploy.md are made of the results (study_tables.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import torch
from harness import in_turns, machine, spread, write_json
from study_tables import inference_case
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.deploy.candidates import DEFAULT_CANDIDATES, DTYPE_NAMES, Candidate, build_candidate
from xcos_ext.deploy.compiled import choose
from xcos_ext.deploy.timing import Spread
from xcos_ext.faces import decode_picture
from xcos_ext.io.models import REGISTRY
from xcos_ext.model import XCosHead, XCosModel, load_model

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PEER = "onnxruntime fp32"
MARGIN = 0.03

Pair = tuple[Tensor, Tensor]


def load(name: str) -> XCosModel:
    """A file, the shipped model, or an architecture with random weights whose batch norms are not the identity."""
    if name in REGISTRY or Path(name).suffix:
        return load_model(name).eval()
    torch.manual_seed(0)
    body = backbones.create(name, output=False)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
    return XCosModel(body, XCosHead(body.grid_shape[0]), name=f"{name}, random weights").eval()


def pairs(model: XCosModel, batch: int, faces: Path | None, device: torch.device) -> Pair:
    """Pairs of faces, or of noise without any."""
    if faces is None:
        torch.manual_seed(0)
        images = torch.randn(2 * batch, 3, *model.preprocessing.size)
    else:
        with zipfile.ZipFile(faces) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            images = model.preprocessing([decode_picture(archive.read(name), name) for name in names[: 2 * batch]])
    return images[:batch].to(device), images[batch:].to(device)


def onnx_session(model: XCosModel, example: Pair, threads: int, folder: Path) -> Callable[[], Tensor]:
    """The whole pair as a graph in onnxruntime."""
    from xcos_ext.deploy import OnnxModel, export_onnx

    export_onnx(model, folder / "pair.onnx", kind="pair")
    session = OnnxModel(folder / "pair.onnx", threads=threads)
    a, b = (side.cpu().numpy() for side in example)
    return lambda: torch.from_numpy(np.asarray(session.pair(a, b).score))


def contenders(
    model: XCosModel, example: Pair, dtypes: list[torch.dtype], options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """Names, simplest first, with what prepares a call that gives scores."""
    device = example[0].device
    shape = (2 * example[0].shape[0], *example[0].shape[1:])

    def scores(make: Callable[[], Candidate]) -> Callable[[], Callable[[], Tensor]]:
        def prepare() -> Callable[[], Tensor]:
            candidate = make()
            return lambda: candidate.pair(*example).score

        return prepare

    kinds = options.candidates or DEFAULT_CANDIDATES[device.type]
    for kind in kinds:
        for dtype in dtypes if kind != "eager" else [torch.float32]:
            name = kind if kind == "eager" else f"{kind} {DTYPE_NAMES[dtype]}"
            yield name, scores(lambda kind=kind, dtype=dtype: build_candidate(kind, model, dtype, shape, device))  # type: ignore[misc]
    if not options.no_onnx:
        yield PEER, lambda: onnx_session(model, example, options.threads, folder)


def measure(model: XCosModel, batch: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of one model and batch size."""
    device = torch.device(options.device)
    model = model.to(device)
    example = pairs(model, batch, options.faces, device)
    dtypes = [DTYPES[name] for name in options.dtypes]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    wanted: Tensor | None = None
    for name, prepare in contenders(model, example, dtypes, options, folder):
        began = time.perf_counter()
        try:
            call = prepare()
            found = call().float().cpu()
        except Exception as failure:  # noted: what does not work on a machine is a result too
            rows[name] = {"problem": f"{type(failure).__name__}: {failure}"[:300]}
            print(f"  {name}: {rows[name]['problem']}", file=sys.stderr)
            continue
        wanted = found if wanted is None else wanted
        rows[name] = {
            "build_seconds": time.perf_counter() - began,
            "error": float((found - wanted).abs().max()),
        }
        calls[name] = call

    samples = in_turns(calls, options.seconds, device)
    for name, taken in samples.items():
        rows[name]["seconds"] = spread(taken)
        for peer, key in (("eager", "times_eager"), (PEER, "times_onnxruntime")):
            if peer in samples:
                rows[name][key] = spread([a / b for a, b in zip(samples[peer], taken, strict=True)])
    ours = {name: Spread.of_ratios(samples["eager"], taken) for name, taken in samples.items() if name != PEER}
    exact = {name: spread for name, spread in ours.items() if name == "eager" or name.endswith("fp32")}
    return {
        "model": model.name,
        "pairs": batch,
        "chosen": {"fp32": choose(exact, MARGIN), "all": choose(ours, MARGIN)},
        "ways": rows,
    }


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["slim"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="pairs a call")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--candidates", nargs="+", help="instead of the usual ones")
    parser.add_argument("--no-onnx", action="store_true", help="without onnxruntime")
    parser.add_argument("--faces", type=Path, help="a zip file of aligned faces")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each model and batch size")
    parser.add_argument("--json", type=Path, help="where the results are kept; cases measured before are replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"cases": []}
    if options.json is not None and options.json.is_file():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    for name in options.models:
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                case = measure(load(name), batch, options, Path(folder))
            case |= {"machine": machine(), "seconds_of_timing": options.seconds}
            kept = [old for old in results["cases"] if (old["model"], old["pairs"]) != (case["model"], case["pairs"])]
            results = {"cases": [*kept, case]}
            print("\n".join(inference_case(case)), flush=True)
            if options.json is not None:
                write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
