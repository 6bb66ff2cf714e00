"""Recognisers from any torch network, split at a named layer."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcos_ext import backbones
from xcos_ext.backbones import from_layer
from xcos_ext.deploy import for_inference
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import XCosHead, XCosModel, cell_matrices, plug

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = nn.Conv2d(cin, cout, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + self.down(x))


class Timmlike(nn.Module):
    """Stem, stages, forward_features and forward_head, as the networks of timm are built."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.stages = nn.Sequential(Block(8, 12), Block(12, 16))
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Module()
        self.head.flatten = nn.Flatten(1)
        self.head.fc = nn.Linear(16 * 49, 10)
        self.neck = nn.BatchNorm1d(10)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.neck(self.head.fc(self.head.flatten(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Functional(nn.Module):
    """Pooling, reshaping and normalisation by functions."""

    def __init__(self, unit: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, 16)
        self.act = nn.PReLU(6)
        self.proj = nn.Conv2d(6, 9, 1)
        self.unit = unit

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        x = self.act(self.conv(images))
        x = F.adaptive_avg_pool2d(self.proj(x), 1)
        x = x.view(x.size(0), -1) * scale
        return F.normalize(x) if self.unit else x


class Unfollowable(nn.Module):
    """Decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, 16)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 49, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.bn(self.conv(x)).relu()
        except Exception:  # as some networks do; what ends the forward at the layer is none
            raise AssertionError("reached") from None
        return self.fc(x.flatten(1)) if x.sum() > -1 else self.fc(-x.flatten(1))


class PartlyFollowable(nn.Module):
    """One submodule decides by values; the rest can be followed around it."""

    def __init__(self) -> None:
        super().__init__()

        class Gate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Conv2d(6, 6, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = self.inner(x)
                return y if y.abs().sum() > 0 else x

        self.conv = nn.Conv2d(3, 6, 16, 16)
        self.gate = Gate()
        self.last = nn.Conv2d(6, 5, 1)
        self.fc = nn.Linear(5 * 49, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.gate(self.conv(x)).relu()).flatten(1))


class Skipped(nn.Module):
    """A connection leads around the layer `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 16, 16), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.unused = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6 * 49, 8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.fc(self.c(self.c(self.b(a) + a)).flatten(1))


def settled(net: nn.Module) -> nn.Module:
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight, 1, 0.2)
    return net.eval()


NETWORKS: dict[str, tuple[Any, str, tuple[int, int, int]]] = {
    "stages": (Timmlike, "stages", (16, 7, 7)),
    "a block": (Timmlike, "stages.1", (16, 7, 7)),
    "norm": (Timmlike, "norm", (16, 7, 7)),
    "functional": (Functional, "act", (6, 7, 7)),
    "partly": (PartlyFollowable, "gate", (6, 7, 7)),
    "iresnet": (lambda: backbones.create("iresnet18"), "layer4", (512, 7, 7)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", NETWORKS)
def test_both_halves_make_the_whole(name: str) -> None:
    make, layer, shape = NETWORKS[name]
    net = settled(make())
    images = torch.randn(2, 3, 112, 112)
    recogniser = from_layer(net, layer)
    with torch.no_grad():
        grid = recogniser.grid(images)
        assert grid.shape == (2, *recogniser.grid_shape) == (2, *shape)
        torch.testing.assert_close(recogniser.embed(grid), net(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recogniser(images), net(images), rtol=1e-5, atol=1e-5)
    assert recogniser.embedding_size == net(images).shape[1] and recogniser.reason is None
    shared = {id(p) for p in recogniser.parameters()}
    assert shared == {id(p) for p in net.parameters()}


@pytest.mark.parametrize("name", ["stages", "functional", "partly"])
def test_gradients_flow_to_images_and_weights(name: str) -> None:
    make, layer, _ = NETWORKS[name]
    net = settled(make())
    images = torch.randn(2, 3, 112, 112, requires_grad=True)
    from_layer(net, layer)(images).square().sum().backward()
    found = [images.grad, *(p.grad for p in net.parameters())]
    again = images.detach().clone().requires_grad_()
    net.zero_grad()
    net(again).square().sum().backward()
    for one, other in zip(found, [again.grad, *(p.grad for p in net.parameters())], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stages", "norm", "functional"])
def test_plugged_model_embeds_trains_folds_and_makes_templates(name: str) -> None:
    make, layer, _ = NETWORKS[name]
    net = settled(make())
    faces = torch.randn(6, 3, 112, 112)
    model = plug(from_layer(net, layer), [faces])
    with torch.no_grad():
        features = model.features(faces)
        torch.testing.assert_close(model.head.embedding(features), net(faces), rtol=1e-4, atol=1e-4)
        score = model(faces[:3], faces[3:]).score
        fast = for_inference(model)
        torch.testing.assert_close(fast(faces[:3], faces[3:]).score, score, rtol=1e-4, atol=1e-4)
        templates = model.templates(features)
        assert len(templates) == 6
    cells = cell_matrices(from_layer(net, layer))
    grid = from_layer(net, layer).grid(faces).double()
    expected = torch.einsum("dchw,nchw->nd", cells.matrices, grid) + cells.constant
    torch.testing.assert_close(expected.float(), net(faces), rtol=1e-4, atol=1e-4)
    trained = XCosModel(from_layer(net, layer).train(), XCosHead(model.backbone.grid_shape[0]))
    trained(faces[:3], faces[3:]).score.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.backbone.body.parameters())


@pytest.mark.thorough
def test_export_of_the_followed_form(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from xcos_ext.deploy import OnnxModel, export_onnx

    model = plug(from_layer(settled(Timmlike()), "stages"), [torch.randn(6, 3, 112, 112)])
    export_onnx(model, tmp_path / "pair.onnx")
    a, b = (torch.randn(3, 3, 112, 112).clamp(-1, 1) for _ in "ab")
    with torch.no_grad():
        expected = model(a, b).score.numpy()
    got = OnnxModel(tmp_path / "pair.onnx").pair(a.numpy(), b.numpy()).score
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_copy_is_independent() -> None:
    recogniser = from_layer(settled(Timmlike()), "stages")
    other = copy.deepcopy(recogniser)
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(other(images), recogniser(images))
    with torch.no_grad():
        other.body.get_parameter("stem.0.weight").zero_()
    assert fingerprint_weights(other) != fingerprint_weights(recogniser)


def test_the_default_layer_is_in_front_of_batch_norm() -> None:
    net = settled(Timmlike())
    maps = backbones.feature_maps(net)
    assert [(m.name, m.chosen) for m in maps][:2] == [("norm", False), ("stages", True)]
    assert all(m.affine is (m.name in ("norm", "stages")) for m in maps)
    assert maps[1].shape == (16, 7, 7) and maps[1].op == "Sequential" and maps[1].distance == 4
    assert from_layer(net).layer == "stages"
    assert "stages.0" in {m.name for m in maps} and "stages.1.bn2" not in {m.name for m in maps}
    modes = {n: p.training for n, p in net.train().named_modules()}
    backbones.feature_maps(net, torch.zeros(1, 3, 112, 112))
    assert {n: p.training for n, p in net.named_modules()} == modes


@pytest.mark.thorough
def test_iresnet_gives_the_same_as_the_class_of_the_package() -> None:
    net = settled(backbones.create("iresnet18"))
    assert [m.name for m in backbones.feature_maps(net) if m.chosen] == ["layer4"]
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(from_layer(net).grid(images), net.grid(images))


# --- networks that cannot be followed


def test_a_network_that_decides_by_values_gives_its_map() -> None:
    net = settled(Unfollowable())
    recogniser = from_layer(net, "bn")
    images = torch.randn(2, 3, 112, 112, requires_grad=True)
    grid = recogniser.grid(images)
    torch.testing.assert_close(grid, net.bn(net.conv(images)))
    grid.sum().backward()
    assert images.grad is not None and not recogniser.traceable
    assert not net.bn._forward_hooks  # nothing is left behind
    with pytest.raises(RuntimeError, match=r"no output block behind layer 'bn': torch.fx cannot follow the network"):
        recogniser(images)
    with pytest.raises(ModelError, match="no output block"):
        plug(recogniser, centre=False)
    model = XCosModel(recogniser, XCosHead(6)).eval()
    with torch.no_grad():
        score = model(images, images.flip(0)).score
        torch.testing.assert_close(for_inference(model)(images, images.flip(0)).score, score)
    assert {m.name for m in backbones.feature_maps(net)} == {"conv", "bn"}
    assert all(m.affine is None for m in backbones.feature_maps(net))


def test_an_output_block_may_be_given() -> None:
    net = settled(Unfollowable())
    recogniser = from_layer(net, "bn", output=lambda grid: net.fc(grid.relu().flatten(1)))
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(recogniser(images), net(images))
    with pytest.raises(ModelError, match="output: a function that does not work in fp64; give a module"):
        plug(recogniser, centre=False)
    block = nn.Sequential(nn.Flatten(), net.fc)
    model = plug(from_layer(net, "bn", output=block), centre=False)
    torch.testing.assert_close(model.embedding(images), net.fc(net.bn(net.conv(images)).flatten(1)))


def test_weights_on_both_sides_of_the_layer_stay_as_they_are() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.act, self.fc = (
                nn.Conv2d(3, 6, 16, 16),
                nn.Conv2d(6, 6, 1),
                nn.ReLU(),
                nn.Linear(6 * 49, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.mix(self.act(self.mix(self.conv(x)))).flatten(1))

    net = Shared().eval()
    model = plug(from_layer(net, "act"), centre=False)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(model.embedding(images), net(images))
    assert {id(p) for p in model.backbone.parameters()} == {id(p) for p in net.parameters()}


def test_threads_do_not_stop_each_other() -> None:
    net = settled(Unfollowable())
    recogniser = from_layer(net, "bn")
    images = torch.randn(1, 3, 112, 112)
    wrong: list[str] = []

    def work(whole: bool) -> None:
        with torch.no_grad():
            for _ in range(30):
                made = net(images) if whole else recogniser.grid(images)
                if made.dim() != (2 if whole else 4):
                    wrong.append(str(made.shape))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- refusals


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 28, 28)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


class TwoOutputs(Timmlike):
    def forward(self, x: Tensor) -> Any:
        grid = self.forward_features(x)
        return self.forward_head(grid), grid


def test_layers_that_do_not_do() -> None:
    with pytest.raises(ModelError, match="Timmlike: layer: there is no submodule 'layer4'; usable maps: 'norm' 16x7x7"):
        from_layer(Timmlike(), "layer4")
    with pytest.raises(ModelError, match="layer: the network does not call it"):
        from_layer(Skipped(), "unused")
    with pytest.raises(ModelError, match="layer: 'c' is called more often than once"):
        from_layer(Skipped(), "c")
    with pytest.raises(ModelError, match=r"expected a map \[N, C, H, W\], 'norm' gives \[2, 16, 8\]"):
        from_layer(Tokens(), "norm")
    with pytest.raises(ModelError, match="Linear: it fails for a picture"):
        from_layer(nn.Linear(3, 3))
    with pytest.raises(ModelError, match="Timmlike: it fails for a picture"):
        from_layer(Timmlike(), "head.fc", input_size=(96, 96))
    with pytest.raises(TypeError, match="module: expected a torch module, got str"):
        from_layer("resnet50", "layer4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output: expected a module or a function, got int"):
        from_layer(Timmlike(), "stages", output=3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"output: expected an embedding \[N, D\], got \[2, 16, 7, 7\]"):
        from_layer(Timmlike(), "stages", output=nn.Identity())


def test_a_connection_around_the_layer_leaves_no_output_block() -> None:
    recogniser = from_layer(settled(Skipped()), "b")
    assert recogniser.embedding_size is None and "joins in what leads around it" in str(recogniser.reason)
    with pytest.raises(RuntimeError, match="no output block behind layer 'b': add"):
        recogniser(torch.zeros(1, 3, 112, 112))
    assert {m.name for m in backbones.feature_maps(Skipped())} == {"a"}


def test_several_outputs_need_an_output_block() -> None:
    net = settled(TwoOutputs())
    assert "more than one tensor" in str(from_layer(net, "stages").reason)
    recogniser = from_layer(net, "stages", output=net.forward_head)
    images = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(recogniser(images), net(images)[0])


def test_a_normalised_embedding_has_no_closed_form() -> None:
    recogniser = from_layer(settled(Functional(unit=True)), "act")
    assert recogniser.embedding_size == 9
    with pytest.raises(ModelError, match="not affine"):
        plug(recogniser, centre=False)


def test_other_picture_sizes() -> None:
    recogniser = from_layer(Functional(), "act", input_size=(128, 96))
    assert recogniser.grid_shape == (6, 8, 6) and recogniser.preprocessing.size == (128, 96)


def test_feature_maps_takes_files_or_modules() -> None:
    with pytest.raises(TypeError, match="network: expected an ONNX file or a torch module, got int"):
        backbones.feature_maps(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output: for ONNX files only"):
        backbones.feature_maps(Timmlike(), output="x")
