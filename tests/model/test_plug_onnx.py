"""`xcos plug` of ONNX recognisers: what it lists, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, trouble
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx_graphs import CHANNELS, DIM, Net, residual

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plug")


@pytest.fixture(scope="module")
def people(folder: Path) -> Path:
    rng = np.random.default_rng(3)
    for i in range(24):
        (folder / "people" / f"p{i:02d}").mkdir(parents=True)
        crop = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(crop).save(folder / "people" / f"p{i:02d}" / "1.png")
    return folder / "people"


@pytest.fixture(scope="module")
def graph(folder: Path) -> Path:
    """Its pictures are pixels of 0..255."""
    net = Net()
    net.add("Sub", net.weight(np.float64(127.5)))
    net.add("Mul", net.weight(np.float64(1 / 128)))
    net.start()
    net.norm(CHANNELS, output="bn")
    net.add("Flatten")
    net.gemm(output="emb")
    return net.save(folder / "recogniser.onnx")


def test_the_maps_are_listed(graph: Path) -> None:
    result = run("plug", graph, "--list")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.match(r"\s+tensor\s+shape\s+made by\s+behind it\s+closed form$", lines[0])
    assert re.match(r"\s+bn\s+6x7x7\s+BatchNormalization\s+2\s+yes$", lines[1])
    assert re.match(r"\*\s+map\s+6x7x7\s+Relu\s+3\s+yes$", lines[2])
    assert lines[-1] == "the graph normalises its pictures itself: x * 0.007812 + -0.9961"
    data = json.loads(run("plug", graph, "--list", "--json").stdout)
    assert [(m["name"], m["chosen"]) for m in data["maps"]] == [("bn", False), ("map", True), ("t2", False)]
    assert data["maps"][0]["shape"] == [CHANNELS, 7, 7] and data["normalisation"]["scale"] == [1 / 128] * 3


def test_names_of_tensors_cannot_write_to_the_terminal(folder: Path) -> None:
    net = Net().start()
    net.add("Identity", output="evil\x1b[2Jname")
    net.add("Flatten")
    net.gemm()
    result = run("plug", net.save(folder / "evil.onnx"), "--list")
    assert result.exit_code == 0 and "\x1b" not in result.output and "evil" in result.output


@pytest.mark.thorough
@pytest.mark.parametrize("tensor", [None, "bn"])
def test_a_pair_graph_is_written(graph: Path, people: Path, tmp_path: Path, tensor: str | None) -> None:
    from xcos_ext.backbones import OnnxRecogniser
    from xcos_ext.deploy import OnnxModel
    from xcos_ext.model import plug

    options = [] if tensor is None else ["--tensor", tensor]
    result = run("plug", graph, "--faces", people, "--out", tmp_path / "m.onnx", "--threshold", "0.4", *options)
    assert result.exit_code == 0, result.output
    assert re.search(rf"^map +{tensor or 'map'} \(6x7x7\)$", result.stdout, re.M)
    assert re.search(rf"^embedding +emb \({DIM}\)$", result.stdout, re.M)
    assert re.search(
        r"^pixels +RGB 0 .. 255, which the graph normalises \(x \* 0.007812 \+ -0.9961\)$", result.stdout, re.M
    )
    written = OnnxModel(tmp_path / "m.onnx")
    assert written.kind == "pair" and written.threshold == 0.4 and written.name == "recogniser+closed-form"
    faces = np.stack([np.asarray(Image.open(people / f"p{i:02d}" / "1.png")) for i in range(24)])
    model = plug(OnnxRecogniser(graph, tensor), faces)
    assert written.fingerprint() == model.fingerprint()
    with torch.no_grad():
        images = model.preprocessing(faces)
        expected = model(images[:12], images[12:]).score.numpy()
    np.testing.assert_allclose(written.pair(faces[:12], faces[12:]).score, expected, atol=1e-4)
    verified = run(
        "verify", *[people / f"p{i:02d}" / "1.png" for i in (0, 1)], "--aligned", "--model", tmp_path / "m.onnx"
    )
    assert verified.exit_code in (0, 1), verified.output


@pytest.mark.thorough
def test_weights_may_become_a_graph_too(people: Path, tmp_path: Path) -> None:
    from xcos_ext import backbones
    from xcos_ext.deploy import OnnxModel

    torch.save(backbones.create("mobilefacenet").state_dict(), tmp_path / "net.pt")
    result = run("plug", tmp_path / "net.pt", "--faces", people, "--out", tmp_path / "m.onnx", "--json")
    assert result.exit_code == 0, result.output
    assert "split" not in json.loads(result.stdout)
    assert OnnxModel(tmp_path / "m.onnx").name == "mobilefacenet+closed-form"


@pytest.mark.thorough
def test_preprocessing_is_told(folder: Path, people: Path, tmp_path: Path) -> None:
    from xcos_ext.cli.plug import preprocessing_of
    from xcos_ext.deploy import OnnxModel

    plain = residual(folder / "plain.onnx")  # does not say which pixels it is for
    assert preprocessing_of(str(plain), None, None, None) is None
    same = preprocessing_of(str(plain), (127.5,) * 3, (127.5,) * 3, 1.0)
    assert same is not None and same.size == (112, 112)
    np.testing.assert_allclose([same.mean, same.std], 0.5)
    raw = preprocessing_of(str(plain), None, None, 1.0)
    assert raw is not None and raw.mean == (0, 0, 0) and raw.std == (1 / 255,) * 3
    split = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    assert run("plug", plain, "--faces", people, "--out", tmp_path / "m.onnx", *split).exit_code == 0
    found = OnnxModel(tmp_path / "m.onnx").preprocessing
    assert found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)


@pytest.mark.thorough
def test_people_who_look_alike_are_pointed_out(folder: Path, people: Path, tmp_path: Path) -> None:
    """A bias outweighs what the pictures add, as it does where their pixels are of another range."""
    net = Net().start()
    net.add("Flatten")
    net.add("Gemm", net.draw(DIM, CHANNELS * 49), net.weight(np.full(DIM, 50.0)), transB=1)
    result = run("plug", net.save(folder / "alike.onnx"), "--faces", people, "--out", tmp_path / "m.onnx")
    assert result.exit_code == 0
    assert "different people have a mean cosine of 1.00, expected about 0: is the preprocessing right" in result.stderr
    assert "Now: RGB -1 .. 1" in result.stderr


def test_trouble(graph: Path, people: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    given = ("--faces", people, "--out", out)
    trouble(run("plug", graph, "--out", out), "Missing option '--faces'")
    trouble(run("plug", graph, "--faces", people), "Missing option '--out'")
    trouble(run("plug", graph, "--faces", people, "--out", tmp_path / "m.safetensors"), "ending in .onnx")
    trouble(run("plug", graph, *given, "--tensor", "nose"), "there is no tensor 'nose'; usable maps: 'bn' 6x7x7")
    trouble(run("plug", graph, *given, "--output", "nose"), "output: there is no tensor 'nose'")
    trouble(run("plug", graph, *given, "--mean", "0.5", "--std", "0.5"), "expected pixels of 0..255")
    trouble(
        run("plug", graph, *given, "--mean", "0.5,0.5"), "'--mean': expected a number or three (R,G,B), got '0.5,0.5'"
    )
    trouble(run("plug", graph, *given, "--std", "x"), "'--std': expected a number, got 'x'")
    trouble(run("plug", graph, *given, "--std", "0"), "--std: expected three positive numbers")
    trouble(run("plug", graph, *given, "--scale", "0"), "--scale: expected a positive number")
    trouble(run("plug", folder / "none.onnx", "--list"), "none.onnx")
    trouble(run("plug", folder / "net.pt", "--list"), "--list is for recognisers in ONNX files")
    trouble(run("plug", folder / "net.pt", *given, "--tensor", "x"), "--tensor is for recognisers in ONNX files")
    (folder / "cut.onnx").write_bytes(graph.read_bytes()[:500])
    trouble(run("plug", folder / "cut.onnx", "--list"), "cut.onnx", "truncated")
    net = Net()
    net.add("Conv", net.draw(CHANNELS, 3, 56, 56), strides=[56, 56])
    net.add("Flatten")
    net.gemm(CHANNELS * 4)
    small = net.save(folder / "small.onnx")
    trouble(run("plug", small, "--list"), "small.onnx: no usable feature map")
    trouble(run("plug", small, *given), "small.onnx: no usable feature map")
    net = Net().start()
    net.add("Flatten")
    net.gemm()
    net.add("Tanh", output="emb")
    curved = net.save(folder / "curved.onnx")
    trouble(run("plug", curved, *given), "not affine over the feature map 'map', or not known to be: Tanh")
    assert not out.exists() and not list(tmp_path.glob(".xcos*"))


@pytest.mark.thorough
@pytest.mark.real_data
def test_the_real_network(shared_data: Path, tmp_path: Path) -> None:
    from xcos_ext.deploy import OnnxModel

    result = run("plug", shared_data / "mobilefacenet_arcface.onnx", "--list")
    assert re.search(r"^\*  grid +512x7x7 +PRelu +4 +yes$", result.stdout, re.M)
    result = run(
        *("plug", shared_data / "mobilefacenet_arcface.onnx", "--faces", shared_data / "lfw112.zip"),
        *("--out", tmp_path / "m.onnx", "--limit", "120", "--json"),
    )
    assert result.exit_code == 0 and result.stderr == "", result.output
    data = json.loads(result.stdout)
    assert data["split"]["map"] == "grid (512x7x7)" and 0.15 < data["threshold"] < 0.35
    assert OnnxModel(tmp_path / "m.onnx").threshold == data["threshold"]


@pytest.mark.thorough
@pytest.mark.real_data
def test_a_network_of_a_model_zoo(shared_data: Path, tmp_path: Path) -> None:
    """SFace of OpenCV's zoo: int8 weights among the inputs, for one picture."""
    from xcos_ext.backbones import OnnxRecogniser
    from xcos_ext.deploy import OnnxModel

    sface = shared_data / "sface_2021dec_int8bq.onnx"
    result = run("plug", sface, "--list")
    assert re.search(r"^\*  conv_14_relu +1024x7x7 +PRelu +5 +yes$", result.stdout, re.M)
    assert "the graph normalises its pictures itself: x * 0.007812 + -0.9961" in result.stdout
    faces = ("--faces", shared_data / "lfw112.zip", "--limit", "20", "--threshold", "0.3")
    result = run("plug", sface, *faces, "--out", tmp_path / "m.onnx")
    assert result.exit_code == 0, result.output
    assert re.search(r"^pixels +RGB 0 .. 255, which the graph normalises", result.stdout, re.M)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)
    # OpenCV's own reader is the peer: version 4, for 5 refuses a graph that lists its weights as inputs.
    cv2 = pytest.importorskip("cv2")
    if cv2.__version__.startswith("4"):
        theirs = cv2.FaceRecognizerSF.create(str(sface), "")
        reader = theirs.feature
    else:
        from recipes.sface import SFace

        network = SFace(str(sface)).eval()

        def reader(bgr: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return network(network.preprocessing([np.ascontiguousarray(bgr[:, :, ::-1])])).numpy()

    expected = np.concatenate([reader(face[:, :, ::-1].copy()) for face in pictures])
    recogniser = OnnxRecogniser(sface, threads=1)
    got = recogniser(recogniser.preprocessing(list(pictures))).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)
    assert OnnxModel(tmp_path / "m.onnx").pair(pictures[:2], pictures[2:]).score.shape == (2,)
