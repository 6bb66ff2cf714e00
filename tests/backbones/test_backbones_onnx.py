"""Recognisers in ONNX files: where they may be split, both halves, what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xcos_ext import backbones
from xcos_ext.backbones import OnnxRecogniser, feature_maps
from xcos_ext.card import ARCFACE, Preprocessing
from xcos_ext.deploy import for_inference
from xcos_ext.io.errors import ModelError
from xcos_ext.io.fingerprint import fingerprint_weights
from xcos_ext.model import XCosHead, XCosModel, cell_matrices, plug, save_model

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper = onnx.helper

from onnx_graphs import CHANNELS, DIM, FLOAT, Net, images, quantised, residual, whole  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# --- output blocks


def standard(net: Net) -> None:
    net.norm(CHANNELS)
    net.add("Dropout")
    net.add("Flatten")
    net.gemm()
    net.norm(DIM)


def by_reshape(net: Net) -> None:
    net.add("Reshape", net.weight(np.array([0, -1])))
    net.add("MatMul", net.draw(CHANNELS * 49, DIM))
    net.add("Add", net.draw(DIM))


def by_shape(net: Net) -> None:
    """As traced from ``x.view(x.size(0), -1)``."""
    grid = net.last
    net.add("Shape")
    net.add("Gather", net.weight(np.array(0)), axis=0)
    net.add("Unsqueeze", net.weight(np.array([0])))
    shape = net.add("Concat", ".", net.weight(np.array([-1])), axis=0)
    net.nodes.append(helper.make_node("Reshape", [grid, shape], ["f"]))
    net.last = "f"
    net.gemm()


def by_slice(net: Net) -> None:
    grid = net.last
    net.add("Shape")
    one, none = net.weight(np.array([1])), net.weight(np.array([0]))
    net.add("Slice", none, one)
    shape = net.add("Concat", net.weight(np.array([-1])), axis=0)
    net.nodes.append(helper.make_node("Reshape", [grid, shape], ["f"]))
    net.last = "f"
    net.gemm()


def by_number_of_pictures(net: Net) -> None:
    """As torch.export writes ``x.view(x.size(0), -1)``: the number is asked of the pictures."""
    grid = net.last
    net.nodes.append(helper.make_node("Shape", ["x"], ["number"], start=0, end=1))
    net.last = "number"
    shape = net.add("Concat", ".", net.weight(np.array([-1])), axis=0)
    net.nodes.append(helper.make_node("Reshape", [grid, shape], ["f"]))
    net.last = "f"
    net.gemm()


def by_first_of_shape(net: Net) -> None:
    grid = net.last
    net.nodes.append(helper.make_node("Shape", ["x"], ["shape"]))
    net.last = "shape"
    net.add("Gather", net.weight(np.array([0])))
    shape = net.add("Concat", ".", net.weight(np.array([CHANNELS * 49])), axis=0)
    net.nodes.append(helper.make_node("Reshape", [grid, shape], ["f"]))
    net.last = "f"
    net.gemm()


def pooled(net: Net) -> None:
    net.add("GlobalAveragePool")
    net.add("Squeeze", net.weight(np.array([2, 3])))
    net.gemm(CHANNELS)


def depthwise(net: Net) -> None:
    net.add("Conv", net.draw(CHANNELS, 1, 7, 7), net.draw(CHANNELS), group=CHANNELS)
    net.norm(CHANNELS)
    net.add("Conv", net.draw(DIM, CHANNELS, 1, 1))  # and the embedding stays [N, D, 1, 1]


def padded(net: Net) -> None:
    net.add("Conv", net.draw(4, CHANNELS, 3, 3), pads=[1, 0, 0, 1], strides=[2, 2])
    net.add("AveragePool", kernel_shape=[2, 2], strides=[1, 1], pads=[1, 1, 1, 1])
    net.add("ReduceMean", axes=[3], keepdims=0)
    net.add("ReduceSum", net.weight(np.array([2])), keepdims=0)
    net.add("Unsqueeze", net.weight(np.array([1])))
    net.add("Flatten")


def scaled(net: Net) -> None:
    net.add("Mul", net.weight(np.linspace(0.5, 2, CHANNELS).reshape(1, -1, 1, 1)))
    net.add("Sub", net.weight(np.float64(0.25)))
    net.add("Div", net.weight(np.array([2.0])))
    net.add("Transpose", perm=[0, 2, 3, 1])
    net.add("Reshape", net.weight(np.array([0, -1])))
    net.add("Neg")
    net.gemm()


def two_ways(net: Net) -> None:
    """Two linear branches of the map that are added and joined."""
    grid = net.last
    a = net.add("Conv", net.draw(4, CHANNELS, 1, 1))
    net.last = grid
    b = net.add("Conv", net.draw(4, CHANNELS, 1, 1))
    net.nodes.append(helper.make_node("Add", [a, b], ["sum"]))
    net.nodes.append(helper.make_node("Concat", ["sum", a], ["joined"], axis=1))
    net.last = "joined"
    net.add("Flatten")
    net.gemm(8 * 49)


BLOCKS: dict[str, Callable[[Net], None]] = {
    f.__name__: f
    for f in (
        standard,
        by_reshape,
        by_shape,
        by_slice,
        by_number_of_pictures,
        by_first_of_shape,
        pooled,
        depthwise,
        padded,
        scaled,
        two_ways,
    )
}


@pytest.mark.parametrize("name", BLOCKS)
def test_both_halves_make_the_whole_and_have_exact_cells(name: str, tmp_path: Path) -> None:
    net = Net().start()
    BLOCKS[name](net)
    path = net.save(tmp_path / "net.onnx")
    recogniser = OnnxRecogniser(path, None if name not in ("padded", "two_ways") else "map", threads=1)
    assert recogniser.tensor == "map" and recogniser.obstacle is None and recogniser.input == "x"
    given = images()
    grid = recogniser.grid(torch.from_numpy(given))
    assert grid.shape == (3, *recogniser.grid_shape) == (3, CHANNELS, 7, 7)
    expected = whole(path, given).reshape(3, -1)
    np.testing.assert_allclose(recogniser.embed(grid).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert recogniser.embedding_size == expected.shape[1]
    nobody = torch.zeros(0, 3, 112, 112)
    assert recogniser(nobody).shape == recogniser.embed(grid[:0].requires_grad_()).shape == (0, expected.shape[1])
    cells = cell_matrices(recogniser)
    made = torch.einsum("dchw,nchw->nd", cells.matrices, grid.double()) + cells.constant
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert {p.dtype for p in recogniser.parameters()} == {torch.float32}


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_old_opsets(opset: int, tmp_path: Path) -> None:
    net = Net(opset=opset).start()
    net.norm(CHANNELS)
    net.add("ReduceMean", axes=[2, 3])
    net.add(
        "Squeeze", *([net.weight(np.array([2, 3]))] if opset > 12 else []), **({} if opset > 12 else {"axes": [2, 3]})
    )
    net.gemm(CHANNELS)
    recogniser = OnnxRecogniser(net.save(tmp_path / "net.onnx"))
    assert recogniser.obstacle is None and recogniser.opset == opset
    expected = whole(tmp_path / "net.onnx", images())
    np.testing.assert_allclose(recogniser(torch.from_numpy(images())).numpy(), expected, rtol=1e-4, atol=1e-5)


def unit_by_division(net: Net) -> None:
    """As exported from torch.nn.functional.normalize."""
    vector = net.last
    net.add("ReduceL2", axes=[1], keepdims=1)
    net.add("Clip", net.weight(np.float64(1e-12)))
    length = net.last
    net.nodes.append(helper.make_node("Shape", [vector], ["shape"]))
    net.nodes.append(helper.make_node("Expand", [length, "shape"], ["lengths"]))
    net.nodes.append(helper.make_node("Div", [vector, "lengths"], ["unit"]))
    net.last = "unit"


def unit_by_operator(net: Net) -> None:
    net.add("LpNormalization", axis=1, p=2, output="unit")


@pytest.mark.parametrize("divide", [unit_by_division, unit_by_operator])
def test_a_final_division_by_the_length_is_left_out(divide: Callable[[Net], None], tmp_path: Path) -> None:
    net = Net().start()
    net.add("Flatten")
    vector = net.gemm()
    divide(net)
    path = net.save(tmp_path / "net.onnx", "unit")
    recogniser = OnnxRecogniser(path)
    assert recogniser.output == vector and recogniser.obstacle is None
    with torch.no_grad():
        made = torch.nn.functional.normalize(recogniser(torch.from_numpy(images())))
    np.testing.assert_allclose(made.numpy(), whole(path, images()), atol=1e-5)
    plug(recogniser, centre=False)


def test_a_division_by_something_else_is_refused(tmp_path: Path) -> None:
    net = Net().start()
    net.add("Flatten")
    vector = net.gemm()
    net.add("ReduceL2", axes=[1], keepdims=1)
    net.add("Sqrt")
    net.nodes.append(helper.make_node("Div", [vector, net.last], ["odd"]))
    with pytest.raises(ModelError, match="output: 'odd' is divided by something else than its length"):
        OnnxRecogniser(net.save(tmp_path / "net.onnx", "odd"))


@pytest.mark.parametrize(
    ("op", "settings"), [("Tanh", {}), ("LeakyRelu", {"alpha": 0.2}), ("Softmax", {"axis": 1})], ids=lambda v: str(v)
)
def test_other_output_blocks_run_but_have_no_cells(op: str, settings: dict[str, Any], tmp_path: Path) -> None:
    net = Net().start()
    net.add("Flatten")
    net.gemm()
    net.add(op, output="emb", **settings)
    recogniser = OnnxRecogniser(net.save(tmp_path / "net.onnx"))
    assert recogniser.obstacle == f"{op} (which makes 'emb')"
    expected = whole(tmp_path / "net.onnx", images())
    np.testing.assert_allclose(recogniser(torch.from_numpy(images())).numpy(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=rf"not affine over the feature map 'map', or not known to be: {op}"):
        plug(recogniser, centre=False)
    assert recogniser(torch.zeros(0, 3, 112, 112)).shape == (0, expected.shape[1])
    # a trained head needs the map alone
    assert XCosModel(recogniser, XCosHead(CHANNELS)).eval().features(torch.from_numpy(images())).shape == (3, 32, 7, 7)
    inner = OnnxRecogniser(tmp_path / "net.onnx", output=net.nodes[-2].output[0])
    assert inner.obstacle is None


def test_the_list_says_what_the_plug_in_finds(tmp_path: Path) -> None:
    """Whether the block can be computed shows when it is."""
    net = Net().start()
    net.add("Conv", net.draw(CHANNELS, CHANNELS, 3, 3), auto_pad="SAME_UPPER")
    net.add("Flatten")
    net.gemm()
    path = net.save(tmp_path / "net.onnx")
    recogniser, maps = OnnxRecogniser(path, "map"), {m.name: m.affine for m in feature_maps(path)}
    assert recogniser.obstacle == "Conv (which makes 't2'): its padding is not explicit"
    assert not maps["map"] and maps["t2"]


def test_a_product_of_two_branches_is_not_affine(tmp_path: Path) -> None:
    net = Net().start()
    net.add("Flatten")
    vector = net.gemm()
    net.nodes.append(helper.make_node("Mul", [vector, vector], ["square"]))
    assert OnnxRecogniser(net.save(tmp_path / "net.onnx", "square")).obstacle == "Mul (which makes 'square')"


# --- maps


def test_maps_are_listed_from_the_output_on(tmp_path: Path) -> None:
    maps = feature_maps(residual(tmp_path / "net.onnx"))
    assert [(m.name, m.op, m.distance, m.chosen) for m in maps] == [
        ("bn", "BatchNormalization", 2, False),
        ("joined", "Add", 3, True),
        ("map", "Relu", 5, False),
        ("t0", "Conv", 6, False),
    ]
    assert all(m.shape == (CHANNELS, 7, 7) for m in maps) and [m.affine for m in maps] == [True, True, True, False]
    recogniser = OnnxRecogniser(tmp_path / "net.onnx")
    assert recogniser.tensor == "joined" and OnnxRecogniser(tmp_path / "net.onnx", "bn").tensor == "bn"
    given = torch.from_numpy(images())
    for tensor in ("bn", "joined", "map", "t0"):
        torch.testing.assert_close(
            OnnxRecogniser(tmp_path / "net.onnx", tensor)(given), recogniser(given), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("nose", r"tensor: there is no tensor 'nose'; usable maps: 'bn' 6x7x7, 'joined' 6x7x7"),
        (
            "inner",
            r"tensor: the output does not depend on 'inner' alone: Add \(which makes 'joined'\) also takes 'map'",
        ),
        ("side", r"tensor: 'side' does not lead to the output 'emb'"),
        (
            "flat",
            r"tensor: expected a square map \[N, C, H, W\] of 4 to 16 cells a side, 'flat' is of shape \[2, 294\]",
        ),
        ("emb", r"tensor: expected a square map"),
    ],
)
def test_tensors_that_do_not_do(tensor: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"net.onnx: {message}"):
        OnnxRecogniser(residual(tmp_path / "net.onnx"), tensor)


def test_a_graph_without_a_usable_map(tmp_path: Path) -> None:
    net = Net()
    net.add("Conv", net.draw(CHANNELS, 3, 56, 56), strides=[56, 56])
    net.add("Flatten")
    net.gemm(CHANNELS * 4, output="emb")
    path = net.save(tmp_path / "net.onnx")
    assert feature_maps(path) == []
    with pytest.raises(ModelError, match="no usable feature map: none of 4x4 to 16x16 cells that the output 'emb'"):
        OnnxRecogniser(path)


def test_shapes_that_cannot_be_inferred_are_found_by_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = residual(tmp_path / "net.onnx")
    expected = feature_maps(path)

    def fail(*args: Any, **how: Any) -> None:
        raise RuntimeError("inference")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert feature_maps(path) == expected


def test_free_picture_sizes_are_those_of_the_preprocessing(tmp_path: Path) -> None:
    net = Net().start()
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.gemm(CHANNELS)
    path = net.save(tmp_path / "net.onnx", size=("h", "w"))
    assert OnnxRecogniser(path).grid_shape == (CHANNELS, 7, 7)
    large = OnnxRecogniser(path, preprocessing=Preprocessing(size=(128, 128)))
    assert large.grid_shape == (CHANNELS, 8, 8)


def test_several_outputs(tmp_path: Path) -> None:
    net = Net().start()
    net.add("Flatten")
    net.gemm(output="emb")
    net.save(tmp_path / "map.onnx", "map", "emb")
    assert OnnxRecogniser(tmp_path / "map.onnx").output == "emb"
    net.norm(DIM, output="logits")
    net.save(tmp_path / "two.onnx", "emb", "logits")
    with pytest.raises(ModelError, match=r"expected one output \[N, D\], the embedding, got 'emb' \[2, 5\], 'logits'"):
        OnnxRecogniser(tmp_path / "two.onnx")
    assert OnnxRecogniser(tmp_path / "two.onnx", output="emb").output == "emb"
    with pytest.raises(ModelError, match="output: there is no tensor 'nose'"):
        OnnxRecogniser(tmp_path / "two.onnx", output="nose")
    with pytest.raises(ModelError, match=r"output: expected \[N, D\], 'map' is|no usable feature map"):
        OnnxRecogniser(tmp_path / "two.onnx", output="map")


# --- batches and types


@pytest.mark.parametrize("settings", [{}, {"allowzero": 1}], ids=["plain", "allowzero"])
def test_a_fixed_number_of_pictures_is_made_free(settings: dict[str, int], tmp_path: Path) -> None:
    net = Net(batch=1).start()
    net.add("Reshape", net.weight(np.array([1, CHANNELS * 49])), **settings)
    net.gemm()
    path = net.save(tmp_path / "net.onnx")
    recogniser = OnnxRecogniser(path)
    given = images(4)
    expected = np.concatenate([whole(path, image[None]) for image in given])
    np.testing.assert_allclose(recogniser(torch.from_numpy(given)).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert recogniser(torch.zeros(0, 3, 112, 112)).shape == (0, DIM)


def for_one_picture(**settings: Any) -> Net:
    """Its first operators cannot take two."""
    net = Net(**settings)
    net.add("Expand", net.weight(np.array([1, 3, 112, 112])))
    net.add("Reshape", net.weight(np.array([3, 112, 112])))
    net.add("Unsqueeze", *([net.weight(np.array([0]))] if net.opset > 12 else []), **({} if net.opset > 12 else ZERO))
    return net.start()


ZERO = {"axes": [0]}


@pytest.mark.parametrize(
    ("batch", "opset", "op"), [(1, 17, "Gemm"), (1, 11, "Gemm"), (2, 17, "Gemm"), ("n", 17, "Gemm"), (1, 17, "Softmax")]
)
def test_a_graph_for_one_picture_runs_one_by_one(batch: Any, opset: int, op: str, tmp_path: Path) -> None:
    """Also where the file says that any number will do, and behind the map."""
    if batch == 2:
        net = Net(batch=2)
        net.add("Reshape", net.weight(np.array([6, 112, 112])))
        net.add("Reshape", net.weight(np.array([-1, 3, 112, 112])))
        net.add("Add", net.weight(np.zeros((2, 1, 1, 1))))
        net.start()
    else:
        net = for_one_picture(batch=batch, opset=opset)
    net.add("Reshape", net.weight(np.array([batch if batch == 2 else 1, CHANNELS * 49])))
    net.gemm()
    if op != "Gemm":
        net.add(op)
        net.add("Add", net.weight(np.zeros((1, DIM))))
        net.add("Expand", net.weight(np.array([1, DIM])))
        net.add("Reshape", net.weight(np.array([DIM])))
        net.add("Reshape", net.weight(np.array([1, -1])))
    path = net.save(tmp_path / "net.onnx")
    recogniser = OnnxRecogniser(path)
    assert recogniser.tensor == "map" and (recogniser.obstacle is None) is (op == "Gemm")
    assert [m.name for m in feature_maps(path) if m.chosen] == ["map"]
    given = images(3)
    alone = [whole(path, image[None].repeat(batch if batch == 2 else 1, 0))[:1] for image in given]
    np.testing.assert_allclose(recogniser(torch.from_numpy(given)).numpy(), np.concatenate(alone), rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(recogniser))
    assert torch.equal(again(torch.from_numpy(given)), recogniser(torch.from_numpy(given)))


@pytest.mark.thorough
@pytest.mark.parametrize("opset", [17, 11])
def test_a_graph_for_one_picture_is_exported_for_any_number(opset: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from xcos_ext.deploy import OnnxModel, export_onnx

    net = for_one_picture(batch=1, opset=opset)
    net.add("Flatten")
    net.gemm()
    model = plug(OnnxRecogniser(net.save(tmp_path / "net.onnx")), [torch.from_numpy(images(8))])
    export_onnx(model, tmp_path / "pair.onnx")
    a, b = torch.from_numpy(images(6)).chunk(2)
    with torch.no_grad():
        expected = model(a, b).score.numpy()
    np.testing.assert_allclose(OnnxModel(tmp_path / "pair.onnx").pair(a.numpy(), b.numpy()).score, expected, atol=1e-5)


def test_pictures_that_influence_each_other_are_refused(tmp_path: Path) -> None:
    net = Net()
    net.add("ReduceMean", axes=[0], keepdims=1, output="mean")
    net.nodes.append(helper.make_node("Sub", ["x", "mean"], ["centred"]))
    net.last = "centred"
    net.start()
    net.add("Flatten")
    net.gemm()
    with pytest.raises(ModelError, match="'map' of a picture depends on the other pictures of the batch"):
        OnnxRecogniser(net.save(tmp_path / "net.onnx"))


def test_half_precision(tmp_path: Path) -> None:
    net = Net(dtype=np.float16).start()
    standard(net)
    recogniser = OnnxRecogniser(net.save(tmp_path / "net.onnx"))
    given = images()
    made = recogniser(torch.from_numpy(given))
    assert made.dtype == torch.float32 and recogniser.body_dtype == "float16"
    np.testing.assert_allclose(made.numpy(), whole(tmp_path / "net.onnx", given.astype(np.float16)), atol=0.03)
    body = recogniser.body_proto()
    onnx.checker.check_model(body, full_check=True)
    session = runtime.InferenceSession(body.SerializeToString(), providers=["CPUExecutionProvider"])
    grid = session.run(None, {session.get_inputs()[0].name: given})[0]
    # onnxruntime computes half precision on a CPU in fp32, and rounds where it pleases
    np.testing.assert_allclose(grid, recogniser.grid(torch.from_numpy(given)).numpy(), atol=5e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            [("x", FLOAT, [1, 112, 112, 3])],
            r"input 'x': expected pictures \[N, 3, height, width\], got \[1, 112, 112, 3\]",
        ),
        (
            [("x", onnx.TensorProto.UINT8, ["n", 3, 112, 112])],
            "input 'x': expected float or float16 pictures, got uint8",
        ),
        (
            [("x", FLOAT, ["n", 3, 112, 112]), ("y", FLOAT, [1])],
            "expected a graph with one input, the pictures, got 'x', 'y'",
        ),
        ([("x", FLOAT, ["n", "h", "w", 3])], r"expected pictures \[N, 3, height, width\], got \[\?, \?, \?, 3\]"),
        ([("x", FLOAT, ["n", 3, 112])], r"expected pictures \[N, 3, height, width\], got \[\?, 3, 112\]"),
    ],
)
def test_other_inputs_are_refused(inputs: list[Any], message: str, tmp_path: Path) -> None:
    net = Net()
    net.add("Cast", to=FLOAT)
    if len(inputs) > 1:
        net.add("Add", "y")
    path = net.save(tmp_path / "net.onnx", inputs=[helper.make_tensor_value_info(*i) for i in inputs])
    with pytest.raises(ModelError, match=message):
        OnnxRecogniser(path)


@pytest.mark.parametrize(("ir_version", "made"), [(3, False), (8, False), (8, True)])
def test_weights_among_the_inputs_and_in_int8(ir_version: int, made: bool, tmp_path: Path) -> None:
    path = quantised(ir_version, tmp_path / "net.onnx", made=made)
    maps = {m.name: m for m in feature_maps(path)}
    assert maps["map"].chosen and maps["map"].affine and maps["bn"].affine
    recogniser = OnnxRecogniser(path)
    assert (recogniser.input, recogniser.tensor, recogniser.output, recogniser.obstacle) == ("x", "map", "emb", None)
    given = images()
    proto = onnx.load(path)
    del proto.graph.input[1:]
    onnx.save(proto, tmp_path / "one_input.onnx")
    expected = np.concatenate([whole(tmp_path / "one_input.onnx", image[None]) for image in given])
    np.testing.assert_allclose(recogniser(torch.from_numpy(given)).numpy(), expected, rtol=1e-4, atol=1e-5)
    plug(recogniser, [torch.from_numpy(given)])


# --- what the input means


def normalising(*steps: tuple[str, Any]) -> Net:
    net = Net()
    for op, value in steps:
        net.add(op, net.weight(np.asarray(value, np.float64)))
    net.start()
    net.add("Flatten")
    net.gemm()
    return net


RAW = Preprocessing(mean=(0, 0, 0), std=(1 / 255,) * 3)
UNIT = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([("Sub", 127.5), ("Mul", 1 / 128)], RAW),
        ([("Div", 255.0), ("Sub", 0.5), ("Div", 0.5)], RAW),
        ([("Mul", 1 / 255)], RAW),
        ([("Sub", IMAGENET_MEAN), ("Div", np.full((1, 3, 1, 1), 0.225))], UNIT),
        ([("Mul", [2.0]), ("Add", -1.0)], UNIT),
        ([], ARCFACE),
    ],
)
def test_the_preprocessing_follows_from_the_graph(steps: list[Any], expected: Preprocessing, tmp_path: Path) -> None:
    recogniser = OnnxRecogniser(normalising(*steps).save(tmp_path / "net.onnx"))
    assert recogniser.preprocessing == expected
    assert (recogniser.normalisation is None) is (not steps)


def test_batch_norm_of_the_pictures_counts_too(tmp_path: Path) -> None:
    net = Net()
    values = ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [127.0, 115.0, 104.0], [5000.0, 4800.0, 4900.0])
    net.add("BatchNormalization", *(net.weight(np.array(v)) for v in values), epsilon=2e-5)
    net.start()
    net.add("Flatten")
    net.gemm()
    found = OnnxRecogniser(net.save(tmp_path / "net.onnx"))
    assert found.preprocessing == RAW and found.normalisation is not None
    np.testing.assert_allclose(found.normalisation.scale, 1 / np.sqrt(np.array(values[3])), rtol=1e-6)


def test_pixels_that_the_graph_is_not_for_are_refused(tmp_path: Path) -> None:
    path = normalising(("Sub", 127.5), ("Mul", 1 / 128)).save(tmp_path / "net.onnx")
    with pytest.raises(
        ModelError, match=r"preprocessing: expected pixels of 0..255, which the graph normalises itself"
    ):
        OnnxRecogniser(path, preprocessing=ARCFACE)
    assert OnnxRecogniser(path, preprocessing=RAW).preprocessing == RAW
    with pytest.raises(ValueError, match=r"preprocessing: expected pictures of \(112, 112\)"):
        OnnxRecogniser(path, preprocessing=Preprocessing(size=(96, 96)))


# --- as a backbone


@pytest.fixture
def recogniser(tmp_path: Path) -> OnnxRecogniser:
    return OnnxRecogniser(residual(tmp_path / "net.onnx"), threads=1)


def test_copies_compute_the_same(recogniser: OnnxRecogniser) -> None:
    given = torch.from_numpy(images())
    for other in (copy.deepcopy(recogniser), pickle.loads(pickle.dumps(recogniser))):
        assert torch.equal(other(given), recogniser(given))
        assert fingerprint_weights(other) == fingerprint_weights(recogniser)


def test_fingerprints_tell_bodies_apart(tmp_path: Path) -> None:
    def of(seed: int, name: str) -> str:
        net = Net(seed=seed).start()
        net.random = np.random.default_rng(7)  # the same output block behind another body
        net.add("Flatten")
        net.gemm()
        return fingerprint_weights(OnnxRecogniser(net.save(tmp_path / name)))

    assert of(0, "a.onnx") == of(0, "b.onnx") != of(1, "c.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    proto.producer_name, proto.graph.doc_string = "another tool", "saved again"
    onnx.save(proto, tmp_path / "d.onnx")
    assert fingerprint_weights(OnnxRecogniser(tmp_path / "d.onnx")) == of(0, "a.onnx")


def test_gradients_stop_at_the_graph(recogniser: OnnxRecogniser) -> None:
    given = torch.from_numpy(images()).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients to its pictures"):
        recogniser.grid(given)
    with torch.no_grad():
        recogniser.grid(given)
    with pytest.raises(RuntimeError, match="cannot be traced"):
        torch.fx.symbolic_trace(recogniser)
    model = XCosModel(recogniser, XCosHead(CHANNELS))
    model(given.detach(), given.detach().flip(0)).score.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_other_types_of_images(recogniser: OnnxRecogniser) -> None:
    given = torch.from_numpy(images())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        made = recogniser.grid(given.to(dtype))
        assert made.dtype == dtype
        torch.testing.assert_close(made.float(), recogniser.grid(given.to(dtype).float()), rtol=1e-2, atol=1e-2)


@pytest.mark.thorough
def test_a_plugged_model_scores_folds_and_exports(recogniser: OnnxRecogniser, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from xcos_ext.deploy import OnnxModel, export_onnx

    faces = torch.from_numpy(images(8))
    model = plug(recogniser, [faces], threshold=0.3)
    with torch.no_grad():
        features = model.features(faces)
        torch.testing.assert_close(model.head.embedding(features), recogniser(faces), rtol=1e-4, atol=1e-5)
        expected = model(faces[:4], faces[4:])
        torch.testing.assert_close(for_inference(model)(faces[:4], faces[4:]).score, expected.score)
    with pytest.raises(ModelError, match="its backbone is an ONNX graph, which a safetensors file cannot hold"):
        save_model(model, tmp_path / "m.safetensors")
    card = export_onnx(model, tmp_path / "pair.onnx")
    assert card.threshold == 0.3
    got = OnnxModel(tmp_path / "pair.onnx").pair(images(8)[:4], images(8)[4:])
    for made, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(made, wanted.numpy(), atol=1e-5)


@pytest.mark.thorough
def test_a_graph_that_torch_wrote(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(3)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.PReLU(8))
            self.unit = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.PReLU(8))
            self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.PReLU(12))
            self.norm = nn.BatchNorm2d(12)
            self.fc = nn.Linear(12 * 49, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = self.down(x + self.unit(x))
            return nn.functional.normalize(self.fc(self.norm(x).view(x.size(0), -1)))

    net = Small().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        net, (torch.randn(2, 3, 112, 112),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "net.onnx"))
    recogniser = OnnxRecogniser(tmp_path / "net.onnx")
    given = torch.from_numpy(images())
    split = backbones.from_layer(net, "down")
    assert recogniser.obstacle is None
    with torch.no_grad():
        torch.testing.assert_close(recogniser.grid(given), split.grid(given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nn.functional.normalize(recogniser(given)), net(given), rtol=1e-4, atol=1e-4)


def test_a_branch_that_reads_from_outside_is_seen(tmp_path: Path) -> None:
    """The two graphs of an If have no inputs: what they use of the whole graph is part of what leads to the output."""
    net = Net().start()
    net.add("Flatten", output="flat")
    vector = net.gemm()
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Add", [vector, vector], [f"{name}_sum"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_sum", FLOAT, ["n", DIM])],
        )
        for name in ("then", "else")
    }
    net.nodes.append(helper.make_node("If", [net.weight(np.array(True))], ["emb"], **branches))
    recogniser = OnnxRecogniser(net.save(tmp_path / "net.onnx", "emb"))
    assert recogniser.tensor == "map" and recogniser.obstacle == "If (which makes 'emb')"
    expected = whole(tmp_path / "net.onnx", images())
    np.testing.assert_allclose(recogniser(torch.from_numpy(images())).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = residual(tmp_path / "net.onnx")
    given = torch.from_numpy(images())
    expected = OnnxRecogniser(path)(given)
    onnx.save(
        onnx.load(path), tmp_path / "beside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert (tmp_path / "weights.bin").stat().st_size > 0
    torch.testing.assert_close(OnnxRecogniser(tmp_path / "beside.onnx")(given), expected)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"beside.onnx"):
        OnnxRecogniser(tmp_path / "beside.onnx")


# --- files and arguments


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.onnx: no such file"):
        OnnxRecogniser(tmp_path / "none.onnx")
    contents = residual(tmp_path / "net.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ModelError, match=r"cut.onnx"):
        OnnxRecogniser(tmp_path / "cut.onnx")
    with pytest.raises(ModelError, match=r"cut.onnx"):
        feature_maps(tmp_path / "cut.onnx")


def test_operators_that_onnxruntime_lacks(tmp_path: Path) -> None:
    net = Net().start()
    net.nodes[0].domain, net.nodes[0].op_type = "vendor", "FastConv"
    net.add("Flatten")
    net.gemm()
    with pytest.raises(ModelError, match=r"net.onnx"):
        OnnxRecogniser(net.save(tmp_path / "net.onnx"))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads(threads: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads: expected an integer of at least 1 or None"):
        OnnxRecogniser(tmp_path / "net.onnx", threads=threads)


# --- real data


@pytest.mark.thorough
@pytest.mark.real_data
def test_the_real_network_scores_as_its_weights_do(shared_data: Path) -> None:
    """MobileFaceNet as ONNX, batch norms folded by its exporter, against its state dict: plugged on the same faces."""
    from xcos_ext.faces import PersonFolder
    from xcos_ext.model import load_recogniser

    folder = PersonFolder(shared_data / "lfw112.zip")
    people = folder.people[:: len(folder.people) // 40][:40]
    faces = [folder.read(folder.of(person)[0]) for person in people]
    graph = OnnxRecogniser(shared_data / "mobilefacenet_arcface.onnx", threads=1)
    assert (graph.tensor, graph.output, graph.grid_shape, graph.embedding_size) == ("grid", "emb", (512, 7, 7), 128)
    assert graph.preprocessing == RAW and graph.obstacle is None
    ours = plug(graph, faces)
    theirs = plug(load_recogniser(shared_data / "mobilefacenet_arcface.pt"), faces)
    with torch.no_grad():
        pairs = [[model.preprocessing(part) for part in (faces[:20], faces[20:])] for model in (ours, theirs)]
        got, expected = ours(*pairs[0]), theirs(*pairs[1])
        torch.testing.assert_close(ours.embedding(pairs[0][0]), theirs.embedding(pairs[1][0]), rtol=1e-4, atol=1e-4)
    for name in ("score", "similarity", "attention"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-5)
