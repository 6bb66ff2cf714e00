"""insightface's iresnets: the public layout against a construction of its own, loading, the closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from xcos_ext import backbones
from xcos_ext.card.preprocessing import ARCFACE
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import ClosedFormHead, load_model, load_recogniser, plug, save_model

State = dict[str, Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


def public_state(depth: int, embedding: int = 512, draw: Callable[..., Tensor] = torch.randn) -> State:
    """Random weights under the names, and in the shapes, that the public files have."""
    state: State = {}

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * draw(size)
        state[f"{name}.bias"] = 0.1 * draw(size)
        state[f"{name}.running_mean"] = 0.1 * draw(size)
        state[f"{name}.running_var"] = 1 + 0.3 * draw(size).abs()
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name: str, cout: int, cin: int, size: int) -> None:
        state[f"{name}.weight"] = draw(cout, cin, size, size) * (1 / (cin * size * size)) ** 0.5

    def slope(name: str, size: int) -> None:
        state[f"{name}.weight"] = 0.25 + 0.05 * draw(size)

    conv("conv1", 64, 3, 3)
    norm("bn1", 64)
    slope("prelu", 64)
    cin = 64
    for stage, (units, cout) in enumerate(zip(PLANS[depth], (64, 128, 256, 512), strict=True), 1):
        for unit in range(units):
            path = f"layer{stage}.{unit}"
            norm(f"{path}.bn1", cin)
            conv(f"{path}.conv1", cout, cin, 3)
            norm(f"{path}.bn2", cout)
            slope(f"{path}.prelu", cout)
            conv(f"{path}.conv2", cout, cout, 3)
            norm(f"{path}.bn3", cout)
            if unit == 0:
                conv(f"{path}.downsample.0", cout, cin, 1)
                norm(f"{path}.downsample.1", cout)
            cin = cout
    norm("bn2", 512)
    state["fc.weight"] = draw(embedding, 512 * 49) / 160
    state["fc.bias"] = 0.1 * draw(embedding)
    norm("features", embedding)
    return state


def oracle(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """Map before ``bn2`` and embedding, straight from the weights."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scaled = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    def prelu(name: str, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * state[f"{name}.weight"].view(1, -1, 1, 1))

    x = prelu("prelu", norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in range(1, 5):
        unit = 0
        while f"layer{stage}.{unit}.conv1.weight" in state:
            path, stride = f"layer{stage}.{unit}", 2 if unit == 0 else 1
            y = F.conv2d(norm(f"{path}.bn1", x), state[f"{path}.conv1.weight"], padding=1)
            y = prelu(f"{path}.prelu", norm(f"{path}.bn2", y))
            y = norm(f"{path}.bn3", F.conv2d(y, state[f"{path}.conv2.weight"], stride=stride, padding=1))
            if unit == 0:
                x = norm(f"{path}.downsample.1", F.conv2d(x, state[f"{path}.downsample.0.weight"], stride=2))
            x, unit = x + y, unit + 1
    grid = x
    flat = norm("bn2", grid).flatten(1)
    return grid, norm("features", flat @ state["fc.weight"].T + state["fc.bias"])


def constants(depth: int) -> State:
    """The layout without the space: every tensor is one number, expanded."""
    with torch.device("meta"):
        shapes = public_state(depth)
    return {key: torch.ones((), dtype=value.dtype, device="cpu").expand(value.shape) for key, value in shapes.items()}


@pytest.fixture(scope="module")
def small() -> State:
    torch.manual_seed(0)
    return public_state(18)


@pytest.mark.thorough
@pytest.mark.parametrize("depth", PLANS)
def test_names_and_shapes_are_the_public_ones(depth: int) -> None:
    with torch.device("meta"):
        expected = public_state(depth)
        net = backbones.create(f"iresnet{depth}")
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert net.architecture == f"iresnet{depth}" and isinstance(net, backbones.IResNet)
    norms = [m for m in net.modules() if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    assert {m.eps for m in norms} == {1e-5}


@pytest.mark.thorough
def test_map_and_embedding_are_those_of_the_formulas(tmp_path: Path, small: State) -> None:
    torch.save(small, tmp_path / "backbone.pth")
    net = load_recogniser(tmp_path / "backbone.pth")
    assert net.architecture == "iresnet18" and net.preprocessing == ARCFACE and not net.training
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        grid, embedding = oracle(small, images)
        torch.testing.assert_close(net.grid(images), grid, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(images), embedding, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [34, 100])
def test_the_depth_is_told_from_the_keys(tmp_path: Path, depth: int) -> None:
    torch.save(constants(depth), tmp_path / "net.pth")
    net = load_recogniser(tmp_path / "net.pth")
    assert net.architecture == f"iresnet{depth}" and net.embedding_size == 512


@pytest.mark.thorough
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"epoch": 3, "global_step": 9, "state_dict_backbone": s, "state_dict_softmax_fc": {}},
        lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"head.kernel": torch.zeros(512, 10)},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    ],
    ids=["nested", "module", "training", "margin-head", "no-counters", "fp16"],
)
def test_files_as_they_are_found(tmp_path: Path, wrap: Callable[[State], Any], small: State) -> None:
    torch.save(wrap(small), tmp_path / "net.pth")
    net = load_recogniser(tmp_path / "net.pth")
    assert net.architecture == "iresnet18"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    torch.testing.assert_close(net.state_dict()["fc.weight"], small["fc.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.thorough
def test_the_closed_form_sums_to_the_embedding_and_is_kept(tmp_path: Path, small: State) -> None:
    narrow = small | {k: v[:24] for k, v in small.items() if k.startswith(("fc.", "features.")) and v.dim()}
    save_file({k: v.contiguous() for k, v in narrow.items()}, tmp_path / "net.safetensors")
    with pytest.warns(UserWarning, match="no statistics are known for these iresnet18 weights"):
        assert isinstance(load_model(tmp_path / "net.safetensors").head, ClosedFormHead)
    net = load_recogniser(tmp_path / "net.safetensors")
    assert net.embedding_size == 24
    images = torch.randn(4, 3, 112, 112)
    model = plug(net, [images], threshold=0.2)
    with torch.no_grad():
        features = model.features(images)
        _, expected = oracle(narrow, images)
        torch.testing.assert_close(model.head.embedding(features), expected, rtol=1e-4, atol=1e-4)
        save_model(model, tmp_path / "model.safetensors", dtype=torch.float16)
        again = load_model(tmp_path / "model.safetensors")
    assert again.architecture == "iresnet18" and again.threshold == 0.2
    assert again.backbone.embedding_size == 24
    with torch.no_grad():
        torch.testing.assert_close(again(images, images).score, model(images, images).score, rtol=1e-2, atol=1e-2)


def test_a_body_alone_is_kept_too(tmp_path: Path) -> None:
    from xcos_ext.model import XCosHead, XCosModel

    model = XCosModel(backbones.create("iresnet18", output=False), XCosHead()).eval()
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert again.backbone.embedding_size is None
    assert fingerprint_weights(again) == fingerprint_weights(model)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("features.running_mean"), "keys do not fit iresnet18: 1 missing: features.running_mean"),
        (lambda s: s.pop("layer3.1.bn3.weight"), "1 missing: layer3.1.bn3.weight"),
        (lambda s: s.update({"layer1.0.se.weight": torch.ones(1)}), "1 unexpected: layer1.0.se.weight"),
        (
            lambda s: s.update({"conv1.weight": torch.ones(64, 1, 3, 3)}),
            r"of another shape: conv1.weight \(expected \[64, 3, 3, 3\], got \[64, 1, 3, 3\]\)",
        ),
        (
            lambda s: s.update({f"layer2.2.{k[9:]}": v for k, v in s.items() if k.startswith("layer2.1.")}),
            r"an iresnet with 2-3-2-2 residual units in its stages; known are 2-2-2-2 \(18\), 3-4-6-3 \(34\)",
        ),
        (lambda s: s.update({"fc.bias": torch.full((512,), float("nan"))}), "fc.bias: 512 values are NaN or infinite"),
        (lambda s: s.update({"fc.weight": torch.ones(512)}), r"of another shape: fc.weight"),
    ],
    ids=["missing", "missing-inner", "unexpected", "shape", "depth", "nan", "flat"],
)
def test_wrong_keys_are_named(tmp_path: Path, edit: Callable[[State], object], message: str) -> None:
    state = constants(18)
    edit(state)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=rf"net.pth: .*{message}"):
        load_recogniser(tmp_path / "net.pth")


def test_other_residual_networks_are_not_taken_for_one(tmp_path: Path) -> None:
    """torchvision's names are alike; its units have no activation with weights."""
    state = {k: v for k, v in constants(18).items() if "prelu" not in k and "bn3" not in k}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"no known layout .* iresnet 18/34/50/100/200"):
        load_recogniser(tmp_path / "net.pth")


def test_other_depths() -> None:
    with pytest.raises(ValueError, match=r"depth: expected one of \[18, 34, 50, 100, 200\], got 101"):
        backbones.IResNet(101)
