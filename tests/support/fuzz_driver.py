"""Hostile arguments to every operator, and damaged files to everything that reads one, at random.

    python tests/support/fuzz_driver.py --calls 20000 --files 4000 --seed 0

Calls: a right call of an operator in which none, one or two arguments are replaced: by other types, shapes, dtypes,
layouts and devices, by NaN, infinity and zeros, by numbers out of range. It must give what plain torch gives, or one
error (RuntimeError, TypeError, ValueError) that names the operator and an argument. Files: one right file of each kind,
with bytes flipped, zeroed, cut off, repeated or put in. Reading it must succeed or raise one of our errors.

All of it runs in child processes, so that a crash, a hang or a gigabyte too many is a finding with its seed and not the
end. Exit status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import xcos_ext
from xcos_ext import reference
from xcos_ext.io.errors import XCosError
from xcos_ext.ops.xcos_head import HeadParameters

SECONDS = 60  # that one case may take
MEMORY = 8 << 30  # bytes that a child may take beyond what it has

# ------------------------------------------------------------------ calls

Arguments = dict[str, Any]


def _maps(random_: random.Random, **how: Any) -> torch.Tensor:
    """A right feature map, in one of many layouts."""
    n, c, h, w = how.get("shape", (2, 8, 3, 4))
    dtype = how.get("dtype", torch.float32)
    made = torch.randn(n, c, h, w).to(dtype)
    form = random_.randrange(6)
    if form == 1:
        made = made.contiguous(memory_format=torch.channels_last)
    elif form == 2:
        made = made[:1].expand(n, c, h, w)
    elif form == 3:
        made = torch.randn(2 * n, c + 1, h + 2, w).to(dtype)[::2, 1:, 1:-1]
    elif form == 4:
        made = torch.randn(n, c, w, h).to(dtype).transpose(2, 3)
    elif form == 5:
        made = made.requires_grad_()
    return made


def _hostile(random_: random.Random, value: Any) -> Any:
    """Something in the place of a right argument."""
    plain: list[Callable[[], Any]] = [
        lambda: None,
        lambda: "norm",
        lambda: b"x",
        lambda: [],
        lambda: {},
        lambda: object(),
        lambda: 0,
        lambda: -1,
        lambda: 3,
        lambda: 2**63,
        lambda: True,
        lambda: 1e-300,
        lambda: float("nan"),
        lambda: float("inf"),
        lambda: -float("inf"),
        lambda: 1j,
        lambda: torch.tensor(1.0),
        lambda: np.float64("nan"),
    ]
    if not isinstance(value, torch.Tensor):
        return random_.choice(plain)()
    tensor = value.detach()
    shape = tensor.shape
    tensors: list[Callable[[], Any]] = [
        lambda: tensor[:0],
        lambda: tensor[:, :0] if tensor.dim() > 1 else tensor[:0],
        lambda: tensor[..., :0],
        lambda: tensor[0] if len(tensor) else tensor,
        lambda: tensor[None],
        lambda: tensor[:1],
        lambda: tensor.flatten(),
        lambda: tensor.to(random_.choice([torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn])),
        lambda: tensor.to(random_.choice([torch.float16, torch.bfloat16, torch.float64])),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.full(shape, random_.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1e30, 1e-30])),
        lambda: torch.where(torch.rand(shape) < 0.1, float("nan"), tensor),
        lambda: torch.zeros(1).expand(shape),
        lambda: torch.zeros(1).expand(2**20, *shape[1:]) if tensor.dim() == 4 else tensor,
        lambda: tensor.flip(-1) if tensor.dim() else tensor,
        lambda: torch._neg_view(tensor) if tensor.is_floating_point() else tensor,
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        lambda: tensor.numpy(),
        lambda: tensor.numpy()[..., ::-1],
        lambda: tensor.numpy().astype(object),
        lambda: tensor.numpy().astype(">f4"),
        lambda: tensor.tolist(),
    ]
    return random_.choice(tensors + tensors + plain)()


def _layer(out: int, given: int) -> xcos_ext.HeadLayer:
    norm = [torch.rand(out) + 0.1 for _ in range(4)]
    return xcos_ext.HeadLayer(torch.randn(out, given, 3, 3) / 8, torch.randn(out), *norm, torch.rand(1))


def _head(random_: random.Random, arguments: Arguments) -> HeadParameters:
    parameters = HeadParameters(_layer(16, 8), _layer(16, 32), _layer(1, 16))
    if random_.random() < 0.3:
        index = random_.randrange(3)
        layer = parameters[index]
        name = random_.choice(layer._fields)  # type: ignore[union-attr]
        changed = layer._replace(**{name: _hostile(random_, getattr(layer, name))})  # type: ignore[union-attr]
        parameters = parameters._replace(**{parameters._fields[index]: changed})
        arguments["changed"] = True
    return parameters


def _templates(random_: random.Random, count: int, kind: str) -> xcos_ext.Templates:
    features = _maps(random_, shape=(count, 8, 3, 4)).detach()
    if kind != "learned":
        return xcos_ext.Templates.from_features(features, attention=kind)  # type: ignore[arg-type]
    torch.manual_seed(0)
    attention = xcos_ext.XCosAttention(8, 4).eval().requires_grad_(False)
    return attention.templates(features, "both")


def _faces(random_: random.Random) -> Arguments:
    kind = random_.choice(["uniform", "norm", "learned"])
    return {"probes": _templates(random_, 3, kind), "gallery": _templates(random_, 5, kind), "attention": "own"}


def right_arguments(name: str, random_: random.Random) -> Arguments:
    """Arguments of an operator that it must take."""
    if name in ("xcos_matrix", "xcos_topk", "xcos_maps"):
        found = _faces(random_)
        if name == "xcos_topk":
            found |= {"k": random_.choice([1, 4, 9]), "min_score": None, "exclude": None, "first_index": 0}
            if random_.random() < 0.5:
                found["exclude"] = torch.randint(-1, 5, (3, 2)) if random_.random() < 0.5 else torch.rand(3, 5) < 0.3
        if name == "xcos_maps":
            found |= {"index_pairs": torch.randint(0, 3, (4, 2)), "threshold": random_.choice([None, 0.2])}
        return found
    if name == "templates":
        return {"features": _maps(random_), "dtype": None, "attention": "norm"}
    found = {"a": _maps(random_), "b": _maps(random_), "eps": 1e-6}
    if name == "grid_match":
        found |= {"radius": random_.choice([0, 1, 2]), "match": random_.choice(["best", "soft"]), "temperature": 0.1}
        found |= {"symmetric": random_.random() < 0.5}
    if name == "xcos_score":
        given = random_.choice([None, "norm", "map", "maps"])
        logits = given in ("map", "maps") and random_.random() < 0.5
        attention = {"map": torch.randn(3, 4), "maps": torch.randn(2, 3, 4)}.get(given or "", given)
        found |= {
            "attention": attention,
            "logits": logits,
            "temperature": 0.7 if logits else 1.0,
            "return_maps": random_.random() < 0.5,
        }
    if name == "xcos_head":
        found = {key: value.detach() if key in "ab" else value for key, value in found.items()}
        found |= {"temperature": 1.0, "symmetric": random_.random() < 0.5, "return_maps": random_.random() < 0.5}
    return found


OPERATORS: dict[str, Callable[..., Any]] = {
    "grid_cosine": xcos_ext.grid_cosine,
    "grid_match": xcos_ext.grid_match,
    "xcos_score": xcos_ext.xcos_score,
    "xcos_head": xcos_ext.xcos_head,
    "xcos_matrix": xcos_ext.xcos_matrix,
    "xcos_topk": xcos_ext.xcos_topk,
    "xcos_maps": xcos_ext.xcos_maps,
    "templates": xcos_ext.Templates.from_features,
}


def _same(found: Any, wanted: Any) -> str | None:
    """How two results differ; None: they do not."""
    if isinstance(wanted, tuple):
        return next(filter(None, (_same(*both) for both in zip(found, wanted, strict=True))), None)
    if wanted is None:
        return None if found is None else f"{found!r}, expected None"
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if found.is_meta:
        return None if found.shape == wanted.shape else f"shape {list(found.shape)}, expected {list(wanted.shape)}"
    try:
        torch.testing.assert_close(found.detach(), wanted.detach(), atol=2e-3, rtol=2e-3, equal_nan=True)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def call(seed: int) -> tuple[str, str | None]:
    """One call: what came of it, and what is wrong about that."""
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    name = random_.choice(list(OPERATORS))
    arguments = right_arguments(name, random_)
    hostile = random_.sample(list(arguments), random_.choice([0, 1, 1, 1, 2]))
    for key in hostile:
        arguments[key] = _hostile(random_, arguments[key])
    extra: Arguments = {}
    if name == "xcos_head":
        arguments["parameters"] = _head(random_, extra)
        hostile += list(extra)
    try:
        found = OPERATORS[name](**arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        text = str(error)
        where = "Templates.from_features" if name == "templates" else name
        if not hostile:
            return "right call refused", f"{name}: {text}"
        if not text.startswith(f"{where}: ") and "eager" not in text:
            return "foreign error", f"{name}({', '.join(hostile)}): {type(error).__name__}: {text.splitlines()[0]}"
        return "refused", None
    except XCosError as error:
        return "refused", None if hostile else f"{name}: {error}"
    except Exception as error:  # the finding
        return "foreign exception", f"{name}({', '.join(hostile)}): {type(error).__name__}: {error}"
    if name == "templates" or any(isinstance(v, np.ndarray) for v in arguments.values()):
        return "result", None
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    if any(t.numel() > 10**7 or t.is_meta for t in tensors):
        return "result", None
    if any(t.is_floating_point() and not (t.detach().abs() < 1e15).all() for t in tensors):
        return "result", None  # beyond the range in which sums are defined
    if any(isinstance(value, float) and 0 < value < 1e-30 for value in arguments.values()):
        return "result", None  # plain torch divides by what is 0 in fp32; the kernels take the largest, or give 0
    try:
        wanted = getattr(reference, name)(**arguments)
    except Exception as error:
        return "reference failed", f"{name}({', '.join(hostile)}): {type(error).__name__}: {error}"
    different = _same(found, wanted)
    return "result", f"{name}({', '.join(hostile)}): {different}" if different else None


# ------------------------------------------------------------------ files


def damaged(data: bytes, random_: random.Random) -> bytes:
    """A file as a bad disk, a bad copy or somebody hostile leaves it."""
    size = len(data)
    # The start and the end hold most of what decides how a file is read.
    place = random_.choice(
        [random_.randrange(size), random_.randrange(min(size, 400)), size - 1 - random_.randrange(min(size, 400))]
    )
    length = min(random_.choice([1, 1, 2, 4, 16, 300]), size - place)
    changed = bytearray(data)
    kind = random_.randrange(7)
    if kind == 0:
        return bytes(changed[:place])
    if kind == 1:
        changed[place : place + length] = bytes(length)
    elif kind == 2:
        changed[place : place + length] = b"\xff" * length
    elif kind == 3:
        changed[place : place + length] = random_.randbytes(length)
    elif kind == 4:
        changed[place:place] = changed[place : place + length]
    elif kind == 5:
        del changed[place : place + length]
    else:
        changed[place] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _encoded(form: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.add.outer(np.arange(40), np.arange(48))[..., None] * np.array([1, 2, 3]) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(stream, form)
    return stream.getvalue()


def make_files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """One right file of each kind, and what reads it."""
    from exported import model as small_model

    from xcos_ext.backbones import OnnxRecogniser
    from xcos_ext.bench.results import read_report
    from xcos_ext.deploy import OnnxModel, export_onnx
    from xcos_ext.evaluation.datasets import open_pairs
    from xcos_ext.explain.pairs_file import PairsFile
    from xcos_ext.explain.reconstruction.decoder import load_decoder, shipped_decoders
    from xcos_ext.faces import PictureTree, YuNetDetector, read_picture
    from xcos_ext.gallery import Gallery
    from xcos_ext.model import save_model
    from xcos_ext.training.tasks import load_experiment

    found: dict[str, tuple[Path, Callable[[Path], Any]]] = {}

    def add(name: str, data: bytes, read: Callable[[Path], Any]) -> None:
        (folder / name).write_bytes(data)
        found[name] = folder / name, read

    for form in ("png", "jpeg", "webp", "gif", "tiff", "bmp", "ppm", "jpeg2000", "tga", "avif"):
        with contextlib.suppress(KeyError, OSError):
            add(f"picture.{form}", _encoded(form), read_picture)

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as pack:
        for person in ("ann", "bob"):
            for number in (1, 2):
                pack.writestr(f"{person}/{number}.png", _encoded("png"))

    def every_picture(path: Path) -> None:
        tree = PictureTree(path)
        for name in tree.names:
            tree.read(name)

    add("faces.zip", archive.getvalue(), every_picture)
    good = folder / "good.zip"
    good.write_bytes(archive.getvalue())
    add(
        "pairs.csv",
        b"a,b,genuine,fold\nann/1.png,ann/2.png,1,0\nann/1.png,bob/1.png,0,0\n",
        lambda p: (list(PairsFile(p)), open_pairs(p, good, format="csv")),
    )
    add("pairs.txt", b"1\t1\nann\t1\t2\nann\t1\tbob\t1\n", lambda p: open_pairs(p, good, format="lfw"))
    add("experiment.toml", (Path(__file__).parents[2] / "recipes" / "model.toml").read_bytes(), load_experiment)

    torch.manual_seed(0)
    model = small_model()
    save_model(small_model(slim=True), folder / "model.safetensors")
    found["model.safetensors"] = folder / "model.safetensors", xcos_ext.load_model
    state = {key: value for key, value in xcos_ext.backbones.create("slim").state_dict().items()}
    torch.save(state, folder / "recogniser.pt")
    found["recogniser.pt"] = folder / "recogniser.pt", xcos_ext.load_model
    decoder = min(shipped_decoders().values(), key=lambda path: path.stat().st_size)
    add("decoder.safetensors", decoder.read_bytes(), load_decoder)
    export_onnx(model, folder / "pair.onnx")
    found["pair.onnx"] = folder / "pair.onnx", OnnxModel
    found["recogniser.onnx"] = folder / "pair.onnx", OnnxRecogniser
    found["yunet.onnx"] = folder / "pair.onnx", YuNetDetector
    report = next((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"), None)
    for file in sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json")):
        with contextlib.suppress(XCosError):
            read_report(file)
            report = file
            break
    assert report is not None
    add("bench.json", report.read_bytes(), read_report)

    faces = xcos_ext.Templates.from_features(torch.randn(6, 8, 3, 3))
    with Gallery.create(folder / "people", faces) as gallery:
        gallery.add([f"face-{i}" for i in range(6)], faces, persons=["ann", "bob", None] * 2)
        gallery.search(faces, k=2)

    def look(part: Path, path: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "people"
            shutil.copytree(folder / "people", copy)
            (copy / part).write_bytes(path.read_bytes())
            with Gallery.open(copy) as opened:
                list(opened.ids())
                opened.verify()
                assert len(opened.search(faces, k=2)) == 6

    for file in sorted(path for path in (folder / "people").rglob("*") if path.is_file() and path.stat().st_size):
        part = file.relative_to(folder / "people")
        found[f"gallery: {part}"] = file, functools.partial(look, part)
    return found


def read(seed: int, files: dict[str, tuple[Path, Callable[[Path], Any]]], folder: Path) -> tuple[str, str | None]:
    """One damaged file: what came of reading it, and what is wrong about that."""
    random_ = random.Random(seed)
    name = random_.choice(list(files))
    source, reader = files[name]
    target = folder / f"damaged{source.suffix}"
    target.write_bytes(damaged(source.read_bytes(), random_))
    try:
        reader(target)
    except XCosError as error:
        return ("refused", None) if str(error) else ("empty message", name)
    except Exception as error:
        ours = type(error) in (FileNotFoundError, ValueError) and str(target) in str(error)
        return ("refused", None) if ours else ("foreign exception", f"{name}: {type(error).__name__}: {error}"[:300])
    return "read", None


# ------------------------------------------------------------------ processes


def child(kind: str, first: int, count: int) -> None:
    """Run cases, a line of JSON each: before it begins, and when it has ended."""
    faulthandler.enable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        files = make_files(Path(place)) if kind == "files" else {}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for seed in range(first, first + count):
            print(json.dumps({"begin": seed}), flush=True)
            signal.alarm(SECONDS)
            outcome, wrong = call(seed) if kind == "calls" else read(seed, files, Path(place))
            signal.alarm(0)
            print(json.dumps({"outcome": outcome, "wrong": wrong}), flush=True)


def run(kind: str, first: int, count: int) -> Iterator[tuple[int, str, str | None]]:
    """Outcomes of ``count`` cases by seed; a child that dies is a finding, and another goes on behind it."""
    end = first + count
    while first < end:
        command = [sys.executable, __file__, "--child", kind, str(first), str(end - first)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ORT_LOGGING_LEVEL": "4"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            current: int | None = None
            for line in process.stdout:
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    if "begin" in told:
                        current = told["begin"]
                    elif current is not None:
                        yield current, told["outcome"], told["wrong"]
                        first, current = current + 1, None
            status = process.wait()
            if status and current is None:
                raise RuntimeError(f"the {kind} could not begin: {process.stderr.read()[-2000:]}")
            if current is not None:
                how = "hangs" if status == -signal.SIGALRM else f"ended with {status}"
                yield current, how, f"{kind} {current}: {process.stderr.read()[-1500:]}"
                first = current + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), int(options.child[2]))
        return 0
    findings = 0
    for kind, count in (("calls", options.calls), ("files", options.files)):
        begin, outcomes, wrongs = time.time(), Counter[str](), Counter[str]()
        for seed, outcome, wrong in run(kind, options.seed, count):
            outcomes[outcome] += 1
            if wrong is not None:
                wrongs[wrong] += 1
                if wrongs[wrong] == 1:
                    print(f"  {kind[:-1]} {seed}: {outcome}: {wrong}", flush=True)
        findings += sum(wrongs.values())
        told = ", ".join(f"{n:,} {what}" for what, n in outcomes.most_common())
        print(f"{count:,} {kind} in {time.time() - begin:.0f} s: {told}; findings: {sum(wrongs.values())}", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
