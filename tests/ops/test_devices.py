"""Devices: names, the choice, and every command with --device, on the CPU, on a simulated GPU, and on a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result
from commands import run, strict
from PIL import Image
from simulated_gpu import OnGpu, simulated_gpu

import xcos_ext.ops
from xcos_ext import backbones
from xcos_ext.cli.app import xcos
from xcos_ext.devices import check_device_name, choose_device, module_device
from xcos_ext.io.errors import DeviceError, XCosError

pytestmark = pytest.mark.usefixtures("one_thread")

# --- names and the choice


@pytest.mark.parametrize(
    ("name", "index"), [("auto", None), ("cpu", None), ("cuda", None), ("cuda:0", 0), ("cuda:12", 12)]
)
def test_names_of_devices(name: str, index: int | None) -> None:
    assert check_device_name(name) == index


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:١", "cuda:0 ", "cpu:0", "mps", "cuda:123456789"]
)
def test_wrong_names(name: str) -> None:
    with pytest.raises(DeviceError, match=r"device: expected cpu, cuda, cuda:N or auto, got '"):
        choose_device(name)
    assert issubclass(DeviceError, XCosError)


def test_devices_of_torch_are_names_too() -> None:
    assert choose_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(DeviceError, match="got 'meta'"):
        choose_device(torch.device("meta"))


def test_where_a_module_is() -> None:
    norm = torch.nn.BatchNorm1d(1, affine=False, device="meta")
    assert module_device(norm) == torch.device("meta")
    assert module_device(torch.nn.Identity()) == module_device(None) == torch.device("cpu")


def test_no_gpu_is_the_cpu_without_a_word(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    assert not recwarn.list


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with simulated_gpu(monkeypatch) as device:
        yield device


def broken(*args: Any, **options: Any) -> Any:
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xcos_ext.ops, "build_info", lambda: {"cuda": False, "cuda_architectures": ""})


def other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xcos_ext.ops, "xcos_score", broken)


def broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", broken)


def broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", broken)


OBSTACLES = [
    (without_kernels, "xcos_ext was built without CUDA kernels"),
    (
        other_kernels,
        "built for 90 and do not run on Simulated, compute capability 9.0 (CUDA error: no kernel image",
    ),
    (broken_torch, "torch cannot compute on it (CUDA error: no kernel image is available)"),
    (broken_driver, "torch cannot compute on it (CUDA error: no kernel image is available)"),
]


def test_a_gpu_that_works_is_chosen(gpu: torch.device, recwarn: pytest.WarningsRecorder) -> None:
    assert choose_device() == choose_device("cuda") == choose_device("cuda:0") == choose_device(gpu) == gpu
    assert choose_device("cpu") == torch.device("cpu")
    assert not recwarn.list


@pytest.mark.parametrize(("break_it", "why"), OBSTACLES)
def test_a_gpu_that_cannot_be_used(gpu: torch.device, break_it: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    with pytest.warns(UserWarning, match="the GPU is not used, the CPU computes") as caught:
        assert choose_device() == torch.device("cpu")
    assert len(caught) == 1 and why in str(caught[0].message)
    with pytest.raises(DeviceError) as error:
        choose_device("cuda")
    assert str(error.value).startswith("device: expected a GPU that can be used, got 'cuda': ")
    assert why in str(error.value) and "\n" not in str(error.value)


def test_gpus_that_are_not_there(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="got 'cuda:1': torch sees one GPU, cuda:0"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="got 'cuda:2': torch sees 2 GPUs, cuda:0 to cuda:1"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"got 'cuda': this torch \(.*\) sees no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"this torch \(.*\) was built without CUDA"):
        choose_device("cuda")


# --- the commands


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of 24 people who are mosaics, a list of pairs, weights of a recogniser, and a gallery of the crops."""
    folder = tmp_path_factory.mktemp("devices")
    rng = np.random.default_rng(0)
    for person in range(24):
        mosaic = rng.integers(30, 226, (7, 7, 3))
        (folder / f"faces/p{person:02}").mkdir(parents=True)
        for number in range(2):
            noisy = np.clip(mosaic + rng.integers(-6, 7, mosaic.shape), 0, 255).astype(np.uint8)
            picture = Image.fromarray(noisy).resize((112, 112), Image.Resampling.NEAREST)
            picture.save(folder / f"faces/p{person:02}/{number}.png")
    lines = ["a,b,genuine,fold"]
    for p in range(8):
        lines.append(f"p{p:02}/0.png,p{p:02}/1.png,1,{p // 4}")
        lines.append(f"p{p:02}/0.png,p{(p + 1) % 4 + p // 4 * 4:02}/1.png,0,{p // 4}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    torch.manual_seed(0)
    torch.save(backbones.create("mobilefacenet").state_dict(), folder / "recogniser.pt")
    return folder


@pytest.fixture(scope="module")
def gallery(data: Path) -> Path:
    """In float32, where devices agree to the last digits."""
    return enrolled(data, "gallery", "float32")


@pytest.fixture(scope="module")
def half_gallery(data: Path) -> Path:
    """In float16, as galleries are by default."""
    return enrolled(data, "half-gallery", "float16")


def enrolled(data: Path, name: str, dtype: str) -> Path:
    pytest.importorskip("lance", reason="needs the extra gallery (pylance)")
    result = run("enroll", data / name, data / "faces", "--aligned", "--device", "cpu", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    return data / name


ANN, BOB = "faces/p00/0.png", "faces/p01/1.png"
FAITHFUL = ("evaluate", "faithfulness", "--pairs", "pairs.csv", "--root", "faces", "--aligned", "--count", "2",
            "--bootstrap", "20", "--explainer", "xcos", "--protocol", "region-swap", "--out", "out.json")  # fmt: skip
VERIFICATION = ("evaluate", "verification", "--pairs", "pairs.csv", "--root", "faces", "--aligned", "--bootstrap", "20")
#: Every command with a network or an operator; paths below the data's folder, what is written is called out.*.
COMMANDS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", ANN, BOB, "--aligned", "--out", "out.png"),
    "explain": ("explain", ANN, BOB, "--aligned", "--html", "out.html", "--figure", "out.png"),
    "report": ("report", "pairs.csv", "--root", "faces", "--aligned", "--html", "out.html"),
    "demo": ("demo", "--out", "out.png"),
    "plug": ("plug", "recogniser.pt", "--faces", "faces", "--out", "out.safetensors"),
    "evaluate verification": (*VERIFICATION, "--plot", "out.png"),
    "evaluate faithfulness": FAITHFUL,
    "enroll": ("enroll", "out.gallery", "faces", "--aligned"),
    "search": ("search", "gallery", ANN, BOB, "--aligned"),
    "dedupe": ("dedupe", "gallery", "--out", "out.csv"),
    "bench": (
        "bench",
        "--stage",
        "head",
        "--runtime",
        "eager",
        "--batch",
        "1",
        "--seconds",
        "0.02",
        "--json",
        "out.json",
    ),
}


@pytest.fixture
def inside(data: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The data's folder, entered; what commands write there is deleted."""
    monkeypatch.chdir(data)
    monkeypatch.setattr("xcos_ext.evaluation.faithfulness.measure._TIMED", 3)
    yield data
    import shutil

    for written in data.glob("out.*"):
        shutil.rmtree(written) if written.is_dir() else written.unlink()


def command_of(words: str) -> click.Command:
    found: click.Command = xcos
    for word in words.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
        assert found is not None
    return found


def leaves(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = command_of(path + name)
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path}{name} ")
        else:
            yield path + name, command


def test_the_commands_with_a_device_are_those_here() -> None:
    with_device = {n for n, c in leaves(xcos) if any("--device" in p.opts for p in c.params)}
    assert with_device - {"export tensorrt"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_option(name: str) -> None:
    option = next(p for p in command_of(name).params if "--device" in p.opts)
    assert isinstance(option, click.Option)
    assert option.metavar == "cpu|cuda|cuda:N|auto" and option.show_default
    assert option.default == (("auto",) if name == "bench" else "auto")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_name_is_said_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*COMMANDS[name], "--device", "gpu")
    assert result.exit_code == 2 and not result.stdout and not list(tmp_path.iterdir())
    assert "'--device': expected cpu, cuda, cuda:N or auto, got 'gpu'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_asked_for_is_what_is_tried(
    name: str, inside: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(name: str) -> torch.device:
        asked.append(name)
        raise DeviceError("device: expected another")

    monkeypatch.setattr("xcos_ext.devices.choose_device", choose)
    for options, device in (((), "auto"), (("--device", "cuda:7"), "cuda:7")):
        result = run(*COMMANDS[name], *options)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", "xcos: --device: expected another\n")
        assert asked.pop() == device and not asked
    assert not list(inside.glob("out.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_gpu_that_is_not_there_is_one_line(name: str, inside: Path, gallery: Path) -> None:
    result = run(*COMMANDS[name], "--device", "cuda")
    assert result.exit_code == 2 and not result.stdout and not list(inside.glob("out.*"))
    assert result.stderr.startswith("xcos: --device: expected a GPU that can be used, got 'cuda': this torch")
    assert len(result.stderr.splitlines()) == 1


def test_bench_measures_one_gpu(gpu: torch.device, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xcos_ext.cli.bench import _devices

    assert _devices(("auto", "cpu", "cuda", "cuda:0")) == (("cuda", "cpu"), 0)
    assert _devices(("cpu",)) == (("cpu",), -1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="--device: expected one GPU, got cuda:0 and cuda:1"):
        _devices(("cuda", "cuda:1"))


# --- graphs, by onnxruntime

CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def graph(data: Path) -> Path:
    """The shipped model as a pair graph."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    result = run("export", "onnx", "--out", data / "pair.onnx", "-q")
    assert result.exit_code == 0, result.output
    return data / "pair.onnx"


def graph_score(*options: str) -> float:
    found: float = result_of("verify", ANN, BOB, "--aligned", "--model", "pair.onnx", *options)["score"]
    return found


def test_providers_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from xcos_ext.onnx.session import CPU, providers_on

    monkeypatch.setattr(runtime, "get_available_providers", lambda: list(CPU))
    assert providers_on("auto") == providers_on("cpu") == list(CPU)
    with pytest.raises(DeviceError, match=r"device: expected cpu or auto, .* has no CUDA .*, got 'cuda'"):
        providers_on("cuda")
    with pytest.raises(DeviceError, match="expected cpu, cuda, cuda:N or auto"):
        providers_on("gpu")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: [CUDA, *CPU])
    assert providers_on("cpu") == list(CPU)
    for name, index in (("auto", 0), ("cuda", 0), ("cuda:3", 3)):
        assert providers_on(name) == [(CUDA, {"device_id": index, "use_tf32": 0}), *CPU]


@pytest.mark.thorough
def test_a_graph_without_onnxruntimes_cuda(inside: Path, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert graph_score() == graph_score("--device", "cpu")
    result = run("explain", ANN, BOB, "--aligned", "--model", "pair.onnx", "--device", "cuda:1", "--html", "out.html")
    assert result.exit_code == 2 and not result.stdout and not list(inside.glob("out.*"))
    assert "xcos: --device: expected cpu or auto, for this onnxruntime has no CUDA" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("fails_aloud", [True, False])
def test_a_graph_where_cuda_does_not_start(
    fails_aloud: bool, inside: Path, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime either says so or goes on by the CPU in silence."""
    import onnxruntime

    session = onnxruntime.InferenceSession

    def start(contents: bytes, options: Any, *, providers: list[Any], **more: Any) -> Any:
        if fails_aloud and providers[0] != "CPUExecutionProvider":
            raise RuntimeError("CUDA failure 100: no device")
        return session(contents, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    expected = graph_score("--device", "cpu")
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    why = "CUDA failure 100" if fails_aloud else "CUDAExecutionProvider does not start here"
    arguments = ("verify", ANN, BOB, "--aligned", "--model", "pair.onnx", "--json")
    result = run(*arguments)
    assert strict(result.stdout)["score"] == expected
    assert result.stderr.startswith("xcos: the GPU is not used, the CPU computes: ") and why in result.stderr
    result = run(*arguments, "--device", "cuda")
    assert result.exit_code == 2 and not result.stdout and len(result.stderr.splitlines()) == 1
    assert "--device: expected a GPU that can be used, got 'cuda': " in result.stderr and why in result.stderr


def test_a_recogniser_in_a_graph_is_plugged_on_the_cpu(inside: Path) -> None:
    result = run("plug", "net.onnx", "--faces", "faces", "--out", "out.onnx", "--device", "cuda")
    assert result.exit_code == 2 and not list(inside.glob("out.*"))
    assert result.stderr == (
        "xcos: --device: expected cpu or auto, for an ONNX graph runs on the CPU here, got 'cuda'\n"
    )


# --- results: the same on every device

#: What is compared, in JSON.
RESULTS: dict[str, tuple[str, ...]] = {
    "verify": ("verify", ANN, BOB, "--aligned", "--out", "out.png"),
    "explain": ("explain", ANN, BOB, "--aligned", "--html", "out.html", "--figure", "out.png"),
    "report": ("report", "pairs.csv", "--root", "faces", "--aligned", "--html", "out.html"),
    "plug": ("plug", "recogniser.pt", "--faces", "faces", "--project", "8", "--out", "out.safetensors"),
    "verification": (*VERIFICATION, "--flip", "--attention", "own", "--attention", "corr", "--attention", "symmetric",
                     "--teacher", "recogniser.pt"),
    "faithfulness": (*FAITHFUL, "--protocol", "deletion", "--protocol", "locality", "--protocol", "patch",
                     "--protocol", "identification", "--pixels", "--fill", "blur", "--fill", "mean-face"),
    "faithfulness of a teacher": (*FAITHFUL[:-6], "--explainer", "occlusion", "--protocol", "deletion",
                                  "--teacher", "recogniser.pt", "--only-teacher"),
    "search": ("search", "gallery", ANN, BOB, "--aligned", "--explain", "-k", "3"),
    "search by person": ("search", "gallery", ANN, BOB, "--aligned", "--by-person", "--where", "person <> 'p03'"),
    # Of three: the mean of two probes scores them both alike.
    "search fused": ("search", "gallery", ANN, BOB, "faces/p02/0.png", "--aligned", "--fuse", "mean", "--explain"),
    "search in two stages": ("search", "gallery", ANN, BOB, "--aligned", "--rerank", "10"),
    "dedupe": ("dedupe", "gallery", "--threshold", "0.5", "--out", "out.csv"),
}  # fmt: skip
_TIMES = {"seconds", "seconds_a_pair", "device", "bytes"}  # the page of a report has its seconds on it


def plain(data: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items() if key not in _TIMES}
    return [plain(item) for item in data] if isinstance(data, list) else data


def result_of(*arguments: str) -> Any:
    found: Result = run(*arguments, "--json")
    assert found.exit_code in (0, 1), (found.output, found.exception)
    return plain(strict(found.stdout))


CPU_RESULTS: dict[str, Any] = {}


def on_cpu(name: str) -> Any:
    if name not in CPU_RESULTS:
        CPU_RESULTS[name] = result_of(*RESULTS[name], "--device", "cpu")
    return CPU_RESULTS[name]


def flat(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {k: v for key, item in data.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(data, list):
        return {k: v for i, item in enumerate(data) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: data}


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", RESULTS)
def test_auto_without_a_gpu_is_the_cpu(name: str, inside: Path, gallery: Path) -> None:
    assert result_of(*RESULTS[name]) == on_cpu(name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RESULTS)
def test_nothing_mixes_devices(name: str, inside: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated GPU, which refuses that, results are those of the CPU."""
    expected = on_cpu(name)
    before = OnGpu.operations
    with simulated_gpu(monkeypatch):
        got = result_of(*RESULTS[name])
    assert OnGpu.operations > before + 100
    assert_close(got, expected, 1e-5)


#: Of a gallery in halves; few hits, whose scores lie further apart than roundings.
HALF_RESULTS: dict[str, tuple[str, ...]] = {
    "search": ("search", "half-gallery", ANN, BOB, "--aligned", "--explain", "-k", "2"),
    "search in two stages": ("search", "half-gallery", ANN, BOB, "--aligned", "--rerank", "10", "-k", "2"),
    "dedupe": ("dedupe", "half-gallery", "--threshold", "0.5", "--out", "out.csv"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", HALF_RESULTS)
def test_nothing_mixes_devices_in_half_precision(
    name: str, inside: Path, half_gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ulp of a network's output turns the rounding of a cell, and VNNI computes with 16 bits: as near as halves."""
    expected = result_of(*HALF_RESULTS[name], "--device", "cpu")
    before = OnGpu.operations
    with simulated_gpu(monkeypatch):
        got = result_of(*HALF_RESULTS[name])
    assert OnGpu.operations > before + 100
    assert_close(got, expected, 2**-11)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    a, b = flat(got), flat(expected)
    assert a.keys() == b.keys()
    for path, value in b.items():
        if isinstance(value, float):
            assert a[path] == pytest.approx(value, abs=tolerance), path
        else:
            assert a[path] == value, path


def test_what_is_enrolled_on_a_gpu_is_what_is_enrolled_on_a_cpu(
    inside: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xcos_ext.gallery import Gallery

    with simulated_gpu(monkeypatch):
        assert run("enroll", "out.gallery", "faces", "--aligned", "--dtype", "float32").exit_code == 0
    with Gallery.open("out.gallery") as made, Gallery.open(gallery) as known:
        assert list(made.ids()) == list(known.ids())
        features = (each.templates_at(range(len(each))).features for each in (made, known))
        torch.testing.assert_close(*features, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_the_demo_on_a_simulated_gpu(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_PAIRS": 32, "_GALLERY": 13_000, "_SECONDS": 0.001, "_SHARE": 16}.items():
        monkeypatch.setattr(f"xcos_ext.cli.demo.{name}", value)
    with simulated_gpu(monkeypatch):
        result = run("demo", "--out", "out.png")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "float32, cuda:0; medians" in result.stdout and "results agree: yes" in result.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("name", RESULTS)
def test_on_a_gpu(name: str, inside: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("faithfulness"):
        pytest.skip("ranks of cells turn on the last bits")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = on_cpu(name)
    assert_close(result_of(*RESULTS[name], "--device", "cuda"), expected, 2e-3)


@pytest.mark.cuda
def test_enrolment_and_the_demo_on_a_gpu(inside: Path, gallery: Path) -> None:
    for name in ("enroll", "demo", "evaluate faithfulness"):
        result = run(*COMMANDS[name], "--device", "cuda")
        assert result.exit_code == 0, result.output
    found = result_of("search", "out.gallery", ANN, "--aligned", "-k", "1", "--device", "cuda")
    assert found["probes"][0]["hits"][0]["score"] == pytest.approx(1, abs=1e-2)
