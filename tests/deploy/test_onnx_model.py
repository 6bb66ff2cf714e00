"""Graphs at work in onnxruntime: what they are given, what they refuse, and that torch is not needed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from exported import model, pictures
from PIL import Image

from xcos_ext.card.calibration import FMRCurve
from xcos_ext.card.preprocessing import IMAGENET
from xcos_ext.cli.app import xcos
from xcos_ext.deploy import OnnxModel, export_onnx
from xcos_ext.explain import explain
from xcos_ext.io.errors import ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pair.onnx, template.onnx, score.onnx of one model, and four pictures of faces-to-be."""
    made = tmp_path_factory.mktemp("graphs")
    network = model("published")
    network.fmr_curve = FMRCurve((0.1, 0.2, 0.3), (0.5, 0.1, 0.01), (0.6, 0.2, 0.03), 0.001, 1000, 40)
    for kind in ("pair", "template", "score"):
        export_onnx(network, made / f"{kind}.onnx", kind=kind)
    for i in range(4):
        rgb = ((pictures(1, i)[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        Image.fromarray(rgb).save(made / f"{i}.png")
    return made


@pytest.fixture(scope="module")
def network():
    return model("published")


@pytest.fixture(scope="module")
def faces(folder):
    return [np.array(Image.open(folder / f"{i}.png")) for i in range(4)]


@pytest.mark.thorough
def test_the_card_is_the_model_s(folder, network):
    graph = OnnxModel(folder / "pair.onnx")
    card = graph.card
    assert (graph.kind, graph.name, graph.threshold) == ("pair", network.name, network.threshold)
    assert graph.fingerprint() == network.fingerprint() and graph.preprocessing == network.preprocessing
    assert card.fmr_thresholds == network.fmr_thresholds and card.fmr_curve.pairs == 1000
    assert (card.attention, card.symmetric, card.dtype, card.opset) == ("learned", False, "float32", 18)
    assert "published" in repr(graph)
    assert pickle.loads(pickle.dumps(graph)).card == card


@pytest.mark.thorough
def test_crops_and_normalised_pictures_give_the_same(folder, faces, network):
    graph = OnnxModel(folder / "pair.onnx", threads=1)
    a, b = np.stack(faces[:2]), np.stack(faces[2:])
    found = graph.pair(a, b)
    normalised = [network.preprocessing(side).numpy() for side in (a, b)]
    again = graph.pair(*normalised)
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
    with torch.no_grad():
        wanted = network(*map(torch.from_numpy, normalised))
    np.testing.assert_allclose(found.score, wanted.score.numpy(), atol=5e-6)


def test_explanations_equal_those_of_the_model(folder, faces, network):
    graph = OnnxModel(folder / "pair.onnx")
    ours, theirs = explain(graph, *faces[:2]), explain(network, *faces[:2])
    assert ours.score == pytest.approx(theirs.score, abs=5e-6)
    assert ours.exchanged == pytest.approx(theirs.exchanged, abs=5e-6)
    np.testing.assert_allclose(ours.contribution, theirs.contribution, atol=5e-6)
    assert ours.model.fingerprint == theirs.model.fingerprint and ours.model.attention == "learned"
    assert explain(graph, faces[0], faces[0]).identical == "pictures"


@pytest.mark.thorough
def test_a_fixed_batch_explains_one_pair_too(tmp_path, faces):
    network = model()
    export_onnx(network, tmp_path / "g.onnx", dynamic_batch=False, batch_size=3)
    found = explain(OnnxModel(tmp_path / "g.onnx"), *faces[:2])
    assert found.score == pytest.approx(explain(network, *faces[:2]).score, abs=5e-6)


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not to be imported")
sys.meta_path.insert(0, Blocked())
from xcos_ext.cli import main
sys.exit(main())
"""


@pytest.mark.process
@pytest.mark.parametrize("command", ["verify", "explain"])
def test_the_command_line_needs_no_torch_for_a_graph(command, folder):
    arguments = [command, "--aligned", "--json", "--model", str(folder / "pair.onnx")]
    arguments += [str(folder / "0.png"), str(folder / "1.png")]
    done = subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    said = json.loads(done.stdout)
    assert said["model"]["name"] == "test published" and len(said["contribution"]) == 7


def test_verify_says_what_is_wrong_with_a_graph(folder, tmp_path):
    pictures = [str(folder / "0.png"), str(folder / "1.png")]

    def said(path):
        result = CliRunner().invoke(xcos, ["verify", "--aligned", "--model", str(path), *pictures], prog_name="xcos")
        assert result.exit_code == 2
        return result.stderr

    assert "expected a graph of kind 'pair'" in said(folder / "score.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "pair.onnx").read_bytes()[:5000])
    assert "cut.onnx: damaged or truncated" in said(tmp_path / "cut.onnx")
    assert "none.onnx: no such file" in said(tmp_path / "none.onnx")


def changed(folder, tmp_path, change):
    proto = onnx.load(folder / "pair.onnx")
    change(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    return tmp_path / "m.onnx"


def test_a_changed_graph_is_refused(folder, tmp_path):
    def flip(proto):
        data = bytearray(proto.graph.initializer[0].raw_data)
        data[5] ^= 1
        proto.graph.initializer[0].raw_data = bytes(data)

    with pytest.raises(ModelError, match=r"m\.onnx: the graph is not the one that was written: its checksum differs"):
        OnnxModel(changed(folder, tmp_path, flip))

    def swap(proto):
        node = next(node for node in proto.graph.node if node.op_type == "Add")
        node.op_type = "Sub"

    with pytest.raises(ModelError, match="checksum differs"):
        OnnxModel(changed(folder, tmp_path, swap))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("xcos.format", None, "without xcos_ext's metadata"),
        ("xcos.version", "2", "graph format '2'; this version of xcos_ext reads '1'"),
        ("xcos.kind", "quintuple", "damaged metadata"),
        ("xcos.threshold", "NaN", "threshold is not finite"),
        ("xcos.threshold", "__import__('os')", "damaged metadata"),
        ("xcos.templates", '{"grid": [7, 0], "channels": 32, "hidden": 16}', "damaged metadata"),
        ("xcos.templates", "[]", "damaged metadata"),
        ("xcos.templates", "[" * 100_000, "damaged metadata"),
        ("xcos.preprocessing", '{"size": [112, 112], "std": [0, 1, 1]}', "damaged metadata"),
        ("xcos.fmr_curve", '{"scores": []}', "damaged metadata"),
        ("xcos.fmr_thresholds", '{"0.1": 0.5, "0.01": 0.1}', "damaged metadata"),
        ("xcos.pair_weights", None, "damaged metadata"),
        ("xcos.sha256", "0", "checksum differs"),
    ],
)
def test_damaged_metadata(name, value, said, folder, tmp_path):
    def change(proto):
        notes = {entry.key: entry.value for entry in proto.metadata_props}
        notes[name] = value or ""
        onnx.helper.set_model_props(proto, notes)

    with pytest.raises(ModelError, match=f"m.onnx: .*{said}"):
        OnnxModel(changed(folder, tmp_path, change))


def test_another_preprocessing_is_noticed(folder):
    graph = OnnxModel(folder / "pair.onnx")
    good = pictures(1).numpy()
    with pytest.raises(
        ValueError, match=r"images_b: expected pixels normalised to -1 \.\. 1, got 0 \.\. 255; give uint8"
    ):
        graph.pair(good, np.where(good > 0, 255, 0).astype(np.float32))
    with pytest.raises(ValueError, match=r"images_a: expected float32 \[N, 3, 112, 112\], got \[1, 3, 96, 112\]"):
        graph.pair(good[:, :, 16:], good)
    with pytest.raises(ValueError, match=r"images_a: expected uint8 \[N, 112, 112, 3\], got \[112, 112, 3\]"):
        graph.pair(np.zeros((112, 112, 3), np.uint8), good)
    with pytest.raises(TypeError, match="images_a: expected an array without a mask"):
        graph.pair(np.ma.masked_array(good), good)
    with pytest.raises(TypeError, match="images_a: expected a uint8 or float32 array, got float64"):
        graph.pair(good.astype(np.float64), good)
    with pytest.raises(TypeError, match=r"images_a: expected a uint8 or float32 array, got torch\.float32"):
        graph.pair(torch.from_numpy(good), good)


@pytest.mark.thorough
def test_the_model_s_own_preprocessing_is_kept(tmp_path):
    network = model("norm")
    network.preprocessing = IMAGENET
    export_onnx(network, tmp_path / "g.onnx", kind="template")
    assert OnnxModel(tmp_path / "g.onnx").preprocessing == IMAGENET


def test_batches_that_do_not_fit(folder):
    graph, score = OnnxModel(folder / "pair.onnx"), OnnxModel(folder / "score.onnx")
    with pytest.raises(ValueError, match="images_b: expected 2 images like images_a, got 1"):
        graph.pair(pictures(2).numpy(), pictures(1).numpy())
    with pytest.raises(ValueError, match="expected at least one, got an empty batch"):
        graph.pair(pictures(1).numpy()[:0], pictures(1).numpy()[:0])
    size = score.card.layout.size
    with pytest.raises(ValueError, match=rf"templates_b: expected \[N, {size}\], got \[1, 3\]"):
        score.score(np.zeros((1, size), np.float32), np.zeros((1, 3), np.float32))
    with pytest.raises(TypeError, match="templates_a: expected a float32 array, got float64"):
        score.score(np.zeros((1, size)), np.zeros((1, size)))
    with pytest.raises(ValueError, match="templates_b: expected 1 templates, got 2"):
        score.score(np.zeros((1, size), np.float32), np.zeros((2, size), np.float32))
    with pytest.raises(RuntimeError, match="model: expected a graph of kind 'template', got 'pair'"):
        graph.templates(pictures(1).numpy())


def test_bad_settings(folder):
    with pytest.raises(ValueError, match="threads: expected an integer of at least 1 or None, got 0"):
        OnnxModel(folder / "pair.onnx", threads=0)
    with pytest.raises(ValueError, match=r"providers: expected some of .*CPUExecutionProvider.*, got Quantum"):
        OnnxModel(folder / "pair.onnx", providers=["Quantum"])
    with pytest.raises(TypeError, match="providers: expected a sequence of texts, got one text, 'CPUExe"):
        OnnxModel(folder / "pair.onnx", providers="CPUExecutionProvider")


def test_flat_templates_of_another_length_are_refused(folder):
    graph = OnnxModel(folder / "template.onnx")
    with pytest.raises(ValueError, match=r"templates: expected \[N, \d+\], got \[2, 5\]"):
        graph.as_templates(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="role: expected"):
        graph.as_templates(np.zeros((2, graph.card.layout.size), np.float32), "judge")


def test_xcos_export_onnx(tmp_path, folder):
    runner = CliRunner()
    out = tmp_path / "g.onnx"
    result = runner.invoke(xcos, ["export", "onnx", "--kind", "score", "--out", str(out), "--json"], prog_name="xcos")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["kind"] == "score" and said["bytes"] == out.stat().st_size and said["opset"] == 18
    assert OnnxModel(out).name == "xcos-slim"

    def refused(*arguments):
        result = runner.invoke(xcos, ["export", "onnx", *map(str, arguments)], prog_name="xcos")
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
        return result.stderr

    assert "opset: expected 18 to" in refused("--out", out, "--opset", 9)
    assert "expected a file ending in .onnx" in refused("--out", tmp_path / "g.bin")
    assert "it is an ONNX graph already" in refused("--out", out, "--model", folder / "pair.onnx")
    assert "there is no folder" in refused("--out", tmp_path / "a" / "g.onnx")
