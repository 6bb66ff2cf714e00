"""Exported graphs compute what the model computes, in standard operators, whatever the head, type and batch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from exported import HEADS, model, pictures

import xcos_ext
from xcos_ext.backbones.onnx_recogniser import OnnxRecogniser
from xcos_ext.card.card import INPUTS, OUTPUTS
from xcos_ext.deploy import OnnxModel, export_onnx
from xcos_ext.evaluation.datasets import LFW
from xcos_ext.io.atomic import OutputError
from xcos_ext.io.errors import ModelError
from xcos_ext.model import load_model, plug

#: Absolute, for scores, S and W: fp32 rounding of sums in another order; half the mantissa of a whole network.
CLOSE = {torch.float32: 5e-6, torch.float16: 2e-2}
BATCHES = (1, 2, 17)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(head, kind, dtype)``: an exported model, made once."""
    folder, made = tmp_path_factory.mktemp("graphs"), {}

    def get(head, kind="pair", dtype=torch.float32):
        key = (head, kind, dtype)
        if key not in made:
            made[key] = folder / f"{len(made)}.onnx"
            export_onnx(model(head), made[key], kind=kind, dtype=dtype)
        return made[key]

    return get


def assert_close(got, wanted, dtype=torch.float32):
    for name, ours, theirs in zip(OUTPUTS["pair"], got, wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=CLOSE[dtype], err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head", HEADS)
def test_a_pair_graph_agrees_with_torch(head, dtype, exported):
    network, graph = model(head), OnnxModel(exported(head, "pair", dtype), threads=1)
    for count in BATCHES:
        a, b = pictures(count, 1), pictures(count, 2)
        with torch.no_grad():
            assert_close(graph.pair(a.numpy(), b.numpy()), network(a, b), dtype)


@pytest.mark.thorough
@pytest.mark.parametrize("head", HEADS)
def test_templates_and_their_scores_agree_with_torch(head, exported):
    network = model(head)
    embed, score = (OnnxModel(exported(head, kind), threads=1) for kind in ("template", "score"))
    for count in BATCHES:
        a, b = pictures(count, 3), pictures(count, 4)
        flat = [embed.templates(side.numpy()) for side in (a, b)]
        assert flat[0].shape == (count, embed.card.layout.size)
        with torch.no_grad():
            assert_close(score.score(*flat), network(a, b))


@pytest.mark.thorough
@pytest.mark.parametrize("head", HEADS)
def test_templates_of_a_graph_serve_the_operators(head, exported):
    network, graph = model(head), OnnxModel(exported(head, "template"), threads=1)
    images = pictures(5, 5)
    flat = graph.templates(images.numpy())
    with torch.no_grad():
        features = network.features(images)
        wanted = xcos_ext.xcos_matrix(network.templates(features), network.templates(features, role="gallery"))
        probes, gallery = graph.as_templates(flat), graph.as_templates(flat, "gallery")
        torch.testing.assert_close(xcos_ext.xcos_matrix(probes, gallery), wanted, rtol=0, atol=5e-6)
        # They fit templates of the model itself, and the other way round.
        mixed = xcos_ext.xcos_matrix(probes, network.templates(features, role="gallery"))
        torch.testing.assert_close(mixed, wanted, rtol=0, atol=5e-6)
        if probes.learned:
            both = graph.as_templates(flat, "both")
            torch.testing.assert_close(xcos_ext.xcos_matrix(both, both), wanted, rtol=0, atol=5e-6)


@pytest.mark.thorough
@pytest.mark.real_data
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_shipped_model_agrees_on_faces(dtype, tmp_path, shared_data):
    network = load_model()
    export_onnx(network, tmp_path / "pair.onnx", dtype=dtype)
    graph = OnnxModel(tmp_path / "pair.onnx", threads=1)
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=(6,))
    faces = np.stack([lfw.read(key) for key in (lfw.keys[i] for i in (*lfw.first[:17], *lfw.second[:17]))])
    with torch.no_grad():
        wanted = network(network.preprocessing(faces[:17]), network.preprocessing(faces[17:34]))
    assert_close(graph.pair(faces[:17], faces[17:34]), wanted, dtype)


@pytest.mark.thorough
@pytest.mark.real_data
def test_a_recogniser_s_own_graph_is_joined_with_the_head_s(tmp_path, shared_data):
    recogniser = OnnxRecogniser(shared_data / "mobilefacenet_arcface.onnx")
    lfw = LFW(shared_data / "lfw112.zip", shared_data / "pairs.txt", folds=(6,))
    faces = np.stack([lfw.read(key) for key in lfw.keys[:40]])
    network = plug(recogniser, list(faces), threshold=0.25)
    with torch.no_grad():
        wanted = network(network.preprocessing(faces[:3]), network.preprocessing(faces[3:6]))
    graphs = {}
    for kind in ("pair", "template", "score"):
        export_onnx(network, tmp_path / f"{kind}.onnx", kind=kind)
        graphs[kind] = OnnxModel(tmp_path / f"{kind}.onnx", threads=1)
    assert_close(graphs["pair"].pair(faces[:3], faces[3:6]), wanted)
    flat = [graphs["template"].templates(side) for side in (faces[:3], faces[3:6])]
    assert_close(graphs["score"].score(*flat), wanted)
    assert graphs["pair"].fingerprint() == network.fingerprint()
    with pytest.raises(ValueError, match="dtype: expected float32 for a backbone that is an ONNX graph itself"):
        export_onnx(network, tmp_path / "half.onnx", dtype=torch.float16)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["pair", "template", "score"])
def test_graphs_are_standard_and_tell_nothing_of_the_machine(kind, dtype, exported):
    proto = onnx.load(exported("symmetric", kind, dtype))
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in proto.opset_import] == [""]
    assert not proto.functions
    assert tuple(value.name for value in proto.graph.input) == INPUTS[kind]
    assert tuple(value.name for value in proto.graph.output) == OUTPUTS[kind]
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b"site-packages" not in proto.SerializeToString() and b"stack_trace" not in proto.SerializeToString()
    # The exporter leaves no batch norm, which runtimes would have to fold themselves.
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}


def test_the_head_of_a_half_precision_graph_is_fp32(exported):
    proto = onnx.shape_inference.infer_shapes(onnx.load(exported("symmetric", dtype=torch.float16)))
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    half = onnx.TensorProto.FLOAT16
    sensitive = [n for n in proto.graph.node if n.op_type in ("Softmax", "ReduceSum", "Sqrt", "Div", "MatMul", "Log")]
    assert sensitive
    for node in sensitive:
        assert all(types.get(name, onnx.TensorProto.FLOAT) != half for name in (*node.input, *node.output)), node.name
    convolutions = [n for n in proto.graph.node if n.op_type == "Conv"]
    assert any(types.get(name) == half for n in convolutions for name in n.input)
    assert sum(node.op_type == "Cast" for node in proto.graph.node) == 2


def test_a_fixed_batch_is_kept_and_met(tmp_path):
    network = model()
    export_onnx(network, tmp_path / "g.onnx", dynamic_batch=False, batch_size=2)
    graph = OnnxModel(tmp_path / "g.onnx")
    assert graph.batch_size == 2
    for count in (1, 2, 5):  # in parts of two
        a, b = pictures(count), pictures(count, 9)
        with torch.no_grad():
            expected = network(a, b)
        for got, wanted in zip(graph.pair(a.numpy(), b.numpy()), expected, strict=True):
            assert got.shape == tuple(wanted.shape)
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(opset, tmp_path):
    card = export_onnx(model(), tmp_path / "g.onnx", kind="score", opset=opset)
    assert card.opset == opset
    assert onnx.load(tmp_path / "g.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [17, 11, 0, -1, 1000, 18.5, True])
def test_opsets_that_cannot_be_written(opset, tmp_path):
    with pytest.raises(ValueError, match=r"opset: expected 18 to \d+ .*, got"):
        export_onnx(model(), tmp_path / "g.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    network = model()
    with pytest.raises(TypeError, match="model: expected an XCosModel, got Linear"):
        export_onnx(torch.nn.Linear(1, 1), tmp_path / "g.onnx")
    with pytest.raises(ValueError, match="kind: expected 'pair', 'template' or 'score', got 'triple'"):
        export_onnx(network, tmp_path / "g.onnx", kind="triple")
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32 or torch.float16, got torch.bfloat16"):
        export_onnx(network, tmp_path / "g.onnx", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="batch_size: expected an integer of at least 1, got 0"):
        export_onnx(network, tmp_path / "g.onnx", batch_size=0)
    with pytest.raises(OutputError, match=r"expected a file ending in \.onnx"):
        export_onnx(network, tmp_path / "g.pb")
    with pytest.raises(OutputError, match="there is no folder"):
        export_onnx(network, tmp_path / "no" / "g.onnx")
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        export_onnx(model().train(), tmp_path / "g.onnx")
    network.head.set_matching(1)
    with pytest.raises(ValueError, match="compares cells in their places, got radius 1"):
        export_onnx(network, tmp_path / "g.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_model_that_half_precision_cannot_hold_is_refused(tmp_path):
    network = model()
    with torch.no_grad():
        network.backbone.body[1].weight.mul_(1e6)
    with pytest.raises(ModelError, match=r"its graph in float16 is off by .* may not fit into float16"):
        export_onnx(network, tmp_path / "g.onnx", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_the_model_is_left_as_it_was(tmp_path):
    network = model("published")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    export_onnx(network, tmp_path / "g.onnx", kind="score", dtype=torch.float16)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == flags


@pytest.mark.thorough
def test_progress_is_told(tmp_path):
    steps: list[str] = []
    export_onnx(model(), tmp_path / "g.onnx", kind="score", progress=steps.append)
    assert steps == ["tracing", "checking", "writing"]


@pytest.mark.thorough
def test_degenerate_faces(exported):
    """Cells without features, and NaN, come out as from the operator."""
    graph = OnnxModel(exported("norm", "score"))
    empty = np.zeros((2, graph.card.layout.size), np.float32)
    found = graph.score(empty, empty)
    assert np.array_equal(found.score, [0, 0]) and np.allclose(found.attention, 1 / 49)
    empty[1, 3] = np.nan
    found = graph.score(empty, empty)
    assert found.score[0] == 0 and np.isnan(found.score[1])
