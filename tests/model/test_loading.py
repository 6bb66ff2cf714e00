"""Weights files: every layout in, strict keys, nothing executed, one clear error for everything that is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xcos_ext import backbones
from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.io.shipped import default_weights
from xcos_ext.model import (
    ClosedFormHead,
    XCosAttention,
    XCosHead,
    XCosModel,
    load_model,
    load_recogniser,
    plug,
    save_model,
)

State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def mobilefacenet_state(name: str = "mobilefacenet") -> State:
    return backbones.create(name).state_dict()


def constants(module: backbones.Recogniser | XCosHead, prefix: str = "") -> State:
    """A state dict of ones that takes no space: every tensor is an expanded scalar, in the file as well."""
    return {
        prefix + key: torch.ones((), dtype=value.dtype).expand(value.shape)
        for key, value in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def official() -> State:
    """A checkpoint in the published layout."""
    with torch.device("meta"):
        net, head = backbones.create("ir_se_50"), XCosHead()
    state = constants(net, "backbone.") | constants(net, "backbone_target.")
    for key, value in constants(head).items():
        state[f"backbone.{key}" if key.startswith("conv1x1.") else key] = value
    state["head.kernel"] = torch.ones(()).expand(1568, 9999)
    return state


# --- layouts


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mobilefacenet", "mobilefacenet_relu"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_recognisers(tmp_path: Path, name: str, suffix: str) -> None:
    net = backbones.create(name).eval()
    path = tmp_path / f"net{suffix}"
    save_file(net.state_dict(), path) if suffix == ".safetensors" else torch.save(net.state_dict(), path)
    loaded = load_recogniser(path)
    assert loaded.architecture == name and not loaded.training
    assert fingerprint_weights(loaded) == fingerprint_weights(net)
    with pytest.warns(UserWarning, match="no statistics are known for these"):
        model = load_model(path)
    assert isinstance(model.head, ClosedFormHead) and model.threshold is None and model.head.mean is None
    assert model.preprocessing == net.preprocessing


def test_irse_recogniser_by_depth(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = backbones.create("ir_50")
    torch.save(constants(net), tmp_path / "net.pt")
    loaded = load_recogniser(tmp_path / "net.pt")
    assert loaded.architecture == "ir_50" and loaded.embedding_size == 512


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"head.kernel": torch.randn(128, 10)},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    ],
    ids=["nested", "module", "nested-module", "margin-head", "no-counters", "fp16"],
)
def test_wrapped_state_dicts(tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    torch.save(wrap(mobilefacenet_state()), tmp_path / "net.pt")
    loaded = load_recogniser(tmp_path / "net.pt")
    assert loaded.architecture == "mobilefacenet"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".ckpt", ""])
def test_the_name_does_not_matter(tmp_path: Path, suffix: str) -> None:
    torch.save(mobilefacenet_state(), tmp_path / f"a{suffix}")
    save_file(mobilefacenet_state(), tmp_path / f"b{suffix}")
    for name in "ab":
        assert load_recogniser(tmp_path / f"{name}{suffix}").architecture == "mobilefacenet"


def test_embedding_size_is_read_from_the_weights(tmp_path: Path) -> None:
    torch.save(backbones.create("mobilefacenet", embedding_size=512).state_dict(), tmp_path / "net.pt")
    assert load_recogniser(tmp_path / "net.pt").embedding_size == 512


@pytest.mark.thorough
@pytest.mark.parametrize("parts", ["everything", "released", "smallest", "module"])
def test_official_xcos_checkpoint(tmp_path: Path, official: State, parts: str) -> None:
    state = dict(official)
    if parts == "released":  # the published files lack the margin head
        del state["head.kernel"]
    elif parts == "smallest":
        unused = ("backbone_target.", "head.", "backbone.output_layer.")
        state = {k: v for k, v in state.items() if not k.startswith(unused)}
    elif parts == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": state} if parts != "smallest" else state, tmp_path / "xcos.pth")
    model = load_model(tmp_path / "xcos.pth")
    assert model.architecture == "ir_se_50" and isinstance(model.head, XCosHead) and not model.training
    assert model.head.attention is not None and model.head.attention.config() == XCosAttention(symmetric=False).config()


@pytest.mark.thorough
def test_official_weights_land_where_they_belong(tmp_path: Path, official: State) -> None:
    torch.manual_seed(5)
    body, head = backbones.create("ir_se_50", output=False), XCosHead(attention=XCosAttention(symmetric=False))
    state = official | {f"backbone.{k}": v for k, v in body.state_dict().items()}
    for key, value in head.state_dict().items():
        state[f"backbone.{key}" if key.startswith("conv1x1.") else key] = value
    torch.save({"state_dict": state}, tmp_path / "xcos.pth")
    model = load_model(tmp_path / "xcos.pth")
    expected = XCosModel(body, head).eval()
    assert model.fingerprint() == expected.fingerprint()
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        features = model.features(image)
        torch.testing.assert_close(features, head.conv1x1(body.grid(image)))
    pair = torch.randn(2, 32, 7, 7)
    torch.testing.assert_close(model.score(pair, pair.flip(0)), head.score(pair, pair.flip(0)))


# --- our own files


def closed_form() -> XCosModel:
    net = backbones.create("mobilefacenet")
    model = plug(net, [torch.randn(6, 3, 112, 112)], threshold=0.31, name="mine", project=4)
    model.fmr_thresholds = {1e-3: 0.4, 0.1: 0.2}
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed-form model in a file."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_model(closed_form(), path)
    return path


OWN: dict[str, Callable[[], XCosModel]] = {
    "closed-form": closed_form,
    "not-centred": lambda: plug(backbones.create("mobilefacenet_relu", embedding_size=64), centre=False),
    "learned": lambda: XCosModel(
        backbones.create("mobilefacenet", output=False),
        XCosHead(attention=XCosAttention(temperature=2, symmetric=True)),
        threshold=0.1,
    ).eval(),
    "uniform": lambda: XCosModel(
        backbones.create("mobilefacenet", output=False), XCosHead(512, 8, attention="uniform")
    ).eval(),
}


@pytest.mark.parametrize("kind", OWN)
def test_own_files_round_trip(tmp_path: Path, kind: str) -> None:
    model = OWN[kind]()
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_model(path)
    assert loaded.fingerprint() == model.fingerprint()
    assert (loaded.threshold, loaded.name, loaded.fmr_thresholds, loaded.preprocessing) == (
        model.threshold,
        model.name,
        model.fmr_thresholds,
        model.preprocessing,
    )
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        for got, want in zip(loaded(images, images.flip(0)), model(images, images.flip(0)), strict=True):
            assert torch.equal(got, want)


def test_save_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(OWN["uniform"](), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"model.safetensors: cannot be written: .*No space left"):
        save_model(OWN["learned"](), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_save_refusals(tmp_path: Path) -> None:
    model = OWN["uniform"]()
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(model, tmp_path / "missing" / "model.safetensors")
    with pytest.raises(OutputError, match="it is a directory"):
        save_model(model, tmp_path)
    with pytest.raises(ModelError, match=r"'custom'.* is not in the registry"):
        save_model(XCosModel(torch.nn.Conv2d(3, 512, 16, 16), model.head), tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match="model: expected an XCosModel, got Linear"):
        save_model(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "99"}, "model format '99'; this version of xcos_ext reads '1'"),
        ({"architecture": "vit"}, "architecture 'vit' is not in the registry"),
        ({"kind": "magic"}, "expected 'learned' or 'closed-form', got 'magic'"),
        ({"head": "{"}, "damaged metadata"),
        ({"head": "{}"}, "damaged metadata"),
        ({"head": '{"grid_shape": [512, 7, 8]}'}, "damaged metadata"),
        ({"threshold": "NaN"}, "damaged metadata"),
        ({"preprocessing": '{"std": [0, 0, 0]}'}, "damaged metadata"),
        ({"preprocessing": '{"std": [1e-320, 1, 1]}'}, "damaged metadata"),
        ({"head": "[" * 100_000}, "damaged metadata"),
        ({"fmr_curve": "[" * 100_000}, "damaged metadata"),
        ({"embedding_size": "64"}, "of another shape: backbone.linear.weight"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_own_files_with_wrong_metadata(tmp_path: Path, saved: Path, change: dict[str, str], message: str) -> None:
    path = tmp_path / "model.safetensors"
    with safe_open(str(saved), "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(saved), path, metadata | change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


# --- strict keys


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("conv_45.project.bn.bias"), r"1 missing: conv_45.project.bn.bias$"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("conv_4.")],
            r"\d+ missing: conv_4.\S+, \S+, \S+, \S+, \.\.\.$",
        ),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"1 unexpected: extra.weight$"),
        (
            lambda s: s.update({"conv1.conv.weight": torch.zeros(64, 3, 5, 5)}),
            r"1 of another shape: conv1.conv.weight \(expected \[64, 3, 3, 3\], got \[64, 3, 5, 5\]\)$",
        ),
    ],
    ids=["missing", "many-missing", "unexpected", "shape"],
)
def test_wrong_keys_are_named(tmp_path: Path, edit: Callable[[State], object], message: str) -> None:
    state = dict(mobilefacenet_state())
    edit(state)
    path = tmp_path / "net.pt"
    torch.save(state, path)
    with pytest.raises(ModelError, match=rf"{path}: keys do not fit mobilefacenet: {message}"):
        load_model(path)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("attention.attention.3.weight"), "1 missing: attention.attention.3.weight"),
        (lambda s: s.pop("backbone.conv1x1.0.bias"), "1 missing: backbone.conv1x1.0.bias"),
        (lambda s: s.pop("backbone_target.input_layer.0.weight"), "1 missing: backbone_target.input_layer"),
        (lambda s: s.update({"backbone.conv2x2.weight": torch.ones(1)}), "1 unexpected: backbone.conv2x2"),
        (
            lambda s: s.update({"attention.embedding_net.0.weight": torch.ones(16, 64, 3, 3)}),
            r"attention.embedding_net.0.weight \(expected \[16, 32, 3, 3\], got \[16, 64, 3, 3\]\)",
        ),
        (lambda s: s.update({"head.kernel": torch.ones(512, 10)}), r"head.kernel: expected \[1568, classes\]"),
        (lambda s: [s.pop(k) for k in list(s) if ".body.23." in k], "with 23 residual units"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("backbone.body")],
            r"without backbone.body.\*: the backbone is missing",
        ),
    ],
    ids=["attention", "conv1x1", "teacher", "unexpected", "shape", "kernel", "depth", "no-body"],
)
def test_wrong_official_keys_are_named(
    tmp_path: Path, official: State, edit: Callable[[State], object], message: str
) -> None:
    state = dict(official)
    edit(state)
    path = tmp_path / "xcos.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


# --- bad files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain", "beside", "nested"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, how: str) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    payload = Payload(ran)
    if how == "zip":
        torch.save(payload, path)
    elif how == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    elif how == "plain":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif how == "beside":
        torch.save(mobilefacenet_state() | {"x": payload}, path)
    else:
        torch.save({"state_dict": mobilefacenet_state(), "config": payload}, path)
    with pytest.raises(ModelError, match=r"evil.pt: refused, because the pickle could run code") as caught:
        load_model(path)
    assert "posix.system" in str(caught.value) or "os.system" in str(caught.value)
    assert not ran.exists()
    # The payload is real: an unsafe reader would have run it.
    if how == "plain":
        pickle.loads(path.read_bytes())
        assert ran.exists()


def test_a_model_saved_otherwise_is_told_how_to_save(tmp_path: Path) -> None:
    model = XCosModel(backbones.create("slim", output=False), XCosHead(512, 32, attention="norm"))
    for what in (model, model.state_dict()):
        torch.save(what, tmp_path / "model.pt")
        with pytest.raises(ModelError, match=r"xcos_ext\.model\.save_model\(model, \.\.\.\)"):
            load_model(tmp_path / "model.pt")


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"refused.*torch.nn.modules.linear.Linear.*Expected a plain state dict"):
        load_model(tmp_path / "net.pt")


def test_missing_directory_empty(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing.pt: no such file"):
        load_model(tmp_path / "nothing.pt")
    with pytest.raises(ModelError, match="expected a weights file, got a directory"):
        load_model(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ModelError, match=r"empty.pt: the file is empty"):
        load_model(tmp_path / "empty.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [1, 7, 9, 100, 0.5, 0.99])
def test_truncated(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"net{suffix}"
    state = mobilefacenet_state()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ModelError, match=r"damaged or truncated|not a weights file"):
        load_model(path)


def test_flipped_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        with pytest.raises(ModelError):
            load_model(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("face.pt", b"\xff\xd8\xff\xe0" + bytes(100), "not a weights file"),
        ("notes.pt", b"epoch,loss\n1,2\n", "not a weights file"),
        ("net.onnx", b"\x08\x07\x12\x07pytorch", "truncated, or not an ONNX file"),
        ("net.safetensors", b"garbage garbage garbage", "damaged or truncated safetensors"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / name)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ModelError, match="damaged or truncated PyTorch file"):
        load_model(tmp_path / "photos.pt")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, r"holds no weights \(keys: none\)"),
        ({"epoch": 3, "loss": 0.1}, r"holds no weights \(keys: epoch, loss\)"),
        ([torch.zeros(1)], r"expected a state dict \(names to tensors\), got list"),
        (torch.zeros(3), "expected a state dict"),
        ({"fc.weight": torch.zeros(2, 2)}, r"no known layout \(1 tensors, first: fc.weight\); supported are"),
        ({"state_dict": {"a": 3}}, "'a': expected a tensor, got int"),
        ({"a": torch.zeros(3).to_sparse()}, "a: expected a plain dense tensor"),
    ],
    ids=["empty", "no-tensors", "list", "tensor", "unknown", "not-a-tensor", "sparse"],
)
def test_not_the_weights_of_a_known_network(tmp_path: Path, contents: object, message: str) -> None:
    torch.save(contents, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=rf"x.pt: {message}"):
        load_model(tmp_path / "x.pt")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    state = mobilefacenet_state()
    state["linear.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x.pt: linear.weight: 3 values are NaN or infinite"):
        load_model(tmp_path / "x.pt")
    state = mobilefacenet_state()
    state["bn.running_var"][5] = -1
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x.pt: bn.running_var: negative variance"):
        load_model(tmp_path / "x.pt")


def test_weights_of_a_small_file_fill_no_memory(tmp_path: Path) -> None:
    for name, value in (("expanded", torch.zeros(()).expand(10**12)), ("deep", torch.zeros([1] * 70))):
        torch.save({"input_layer.0.weight": value}, tmp_path / f"{name}.pt")
        with pytest.raises(ModelError, match=rf"{name}\.pt: .*expected"):
            load_model(tmp_path / f"{name}.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(70 << 20))
    with pytest.raises(ModelError, match=r"bomb\.pt: .* got one of [\d,]+ bytes that unpacks"):
        load_model(tmp_path / "bomb.pt")


@pytest.mark.thorough
def test_misused_options(tmp_path: Path, official: State) -> None:
    torch.save(official, tmp_path / "xcos.pth")
    with pytest.raises(ValueError, match="only for recognisers"):
        load_model(tmp_path / "xcos.pth", project=32)
    for path in (tmp_path / "xcos.pth", default_weights()):
        with pytest.raises(ModelError, match="an xCos model, not a recogniser; use load_model"):
            load_recogniser(path)
    torch.save(mobilefacenet_state(), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="project=32 needs statistics"):
        load_model(tmp_path / "net.pt", project=32)


def test_a_start_does_not_import_the_compiler() -> None:
    """It takes longer than everything else; the mark that it would set is set by hand."""
    from xcos_ext.model.head import _exporting

    @torch.compiler.assume_constant_result
    def marked() -> bool:
        return True

    assert vars(_exporting) == vars(marked)
    code = "import sys, xcos_ext; xcos_ext.load_model(); print({'torch._dynamo', 'sympy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
