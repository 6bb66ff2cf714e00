"""Backbones: registry, public parameter names, shapes, equality with the ONNX export of real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xcos_ext import backbones
from xcos_ext.faces import PersonFolder
from xcos_ext.model import load_recogniser

BODY_UNITS = {50: 24, 100: 49, 152: 50}
RECOGNISERS = tuple(name for name in backbones.available() if name != "slim")  # with an output block


def on_meta(name: str, **options: object) -> backbones.Recogniser:
    with torch.device("meta"):
        return backbones.create(name, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECOGNISERS)
def test_map_and_embedding_shapes(name: str) -> None:
    net = on_meta(name).eval()
    images = torch.empty(2, 3, 112, 112, device="meta")
    assert net.architecture == name
    assert net.grid(images).shape == (2, *net.grid_shape) == (2, 512, 7, 7)
    assert net(images).shape == (2, net.embedding_size)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECOGNISERS)
def test_without_output_block(name: str) -> None:
    whole, body = on_meta(name), on_meta(name, output=False)
    assert body.embedding_size is None
    rest = set(whole.state_dict()) - set(body.state_dict())
    assert rest and all(key.startswith(whole.output_prefixes) for key in rest)
    assert not any(key.startswith(whole.output_prefixes) for key in body.state_dict())
    with pytest.raises(RuntimeError, match="without its output block"):
        body(torch.empty(1, 3, 112, 112, device="meta"))


def test_the_default_models_body_has_no_embedding() -> None:
    net = on_meta("slim").eval()
    images = torch.empty(2, 3, 112, 112, device="meta")
    assert net.grid(images).shape == (2, *net.grid_shape) == (2, 512, 7, 7)
    assert sum(p.numel() for p in net.parameters()) < 1_300_000
    with pytest.raises(RuntimeError, match="without its output block"):
        net(images)


@pytest.mark.parametrize("depth", BODY_UNITS)
def test_irse_public_names(depth: int) -> None:
    state = on_meta(f"ir_se_{depth}").state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert len({key.split(".")[1] for key in shapes if key.startswith("body.")}) == BODY_UNITS[depth]
    expected = {
        "input_layer.0.weight": (64, 3, 3, 3),
        "input_layer.1.running_var": (64,),
        "input_layer.2.weight": (64,),
        "body.0.res_layer.0.weight": (64,),
        "body.0.res_layer.1.weight": (64, 64, 3, 3),
        "body.0.res_layer.2.weight": (64,),
        "body.0.res_layer.3.weight": (64, 64, 3, 3),
        "body.0.res_layer.4.bias": (64,),
        "body.0.res_layer.5.fc1.weight": (4, 64, 1, 1),
        "body.0.res_layer.5.fc2.weight": (64, 4, 1, 1),
        "body.3.shortcut_layer.0.weight": (128, 64, 1, 1),
        "body.3.shortcut_layer.1.running_mean": (128,),
        "output_layer.0.weight": (512,),
        "output_layer.3.weight": (512, 25088),
        "output_layer.3.bias": (512,),
        "output_layer.4.running_var": (512,),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    # A unit that keeps the number of channels has a shortcut without parameters.
    assert "body.0.shortcut_layer.0.weight" not in shapes


def test_ir_has_no_channel_attention() -> None:
    assert not any(".fc1." in key for key in on_meta("ir_50").state_dict())


def test_strides_subsample_the_shortcut() -> None:
    unit = on_meta("ir_se_50").body[0]
    assert unit(torch.empty(1, 64, 112, 112, device="meta")).shape == (1, 64, 56, 56)


def test_registry_errors() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of ir_100, .*, got 'resnet'"):
        backbones.create("resnet")
    with pytest.raises(ValueError, match="name: 'mobilefacenet' is already registered"):
        backbones.register("mobilefacenet", backbones.MobileFaceNet)
    with pytest.raises(ValueError, match=r"depth: expected one of \[50, 100, 152\], got 34"):
        backbones.IRSE(34)


def test_split_recogniser() -> None:
    net = backbones.SplitRecogniser(
        nn.Conv2d(3, 4, 16, 16),
        nn.Sequential(nn.Flatten(), nn.Linear(196, 9)),
        grid_shape=(4, 7, 7),
        embedding_size=9,
    )
    images = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(net(images), net.output(net.body(images)))


@pytest.mark.real_data
@pytest.mark.parametrize("file", ["mobilefacenet_arcface.pt", "mobilefacenet_apache2.pt"])
def test_real_state_dicts_have_exactly_our_keys(shared_data: Path, file: str) -> None:
    state = torch.load(shared_data / file, map_location="cpu", weights_only=True)
    name = "mobilefacenet" if "arcface" in file else "mobilefacenet_relu"
    net = backbones.create(name)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.real_data
def test_mobilefacenet_equals_its_onnx_export(shared_data: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pictures = PersonFolder(shared_data / "lfw112.zip")
    faces = np.stack([pictures.read(key) for key in pictures.keys[:: len(pictures) // 6][:6]])
    session = onnxruntime.InferenceSession(str(shared_data / "mobilefacenet_arcface.onnx"))
    grid, embedding = session.run(["grid", "emb"], {"x": faces.transpose(0, 3, 1, 2).astype(np.float32)})
    net = load_recogniser(shared_data / "mobilefacenet_arcface.pt")
    with torch.no_grad():
        ours = net.grid(net.preprocessing(faces))
        # The export has batch norm folded: equal up to fp32 rounding through some 50 layers.
        np.testing.assert_allclose(ours.numpy(), grid, atol=2e-5 * np.abs(grid).max())
        np.testing.assert_allclose(net.embed(ours).numpy(), embedding, atol=2e-5 * np.abs(embedding).max())
