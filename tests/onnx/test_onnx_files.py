"""ONNX files from anywhere are read whole, or refused with the reason; nothing outside their folder is opened."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xcos_ext.io.errors import ModelError
from xcos_ext.onnx.files import contents_hash, metadata, onnx_hash, read_onnx

WEIGHTS = np.arange(4, dtype=np.float32).tobytes()


def small(weights: np.ndarray | None = None) -> onnx.ModelProto:
    """y = x + w."""
    weights = np.arange(4, dtype=np.float32) if weights is None else weights
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.fixture
def outside(tmp_path):
    """``outside(location, ...)``: a model whose weights lie in a file of their own."""

    def make(location="w.bin", *, offset=0, length=16, data=WEIGHTS, folder=None):
        proto = small()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        file = tmp_path / "model" / "m.onnx"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(proto.SerializeToString())
        if data is not None:
            ((folder or file.parent) / os.path.basename(location)).write_bytes(data)
        return file

    return make


def test_reads_a_model(tmp_path):
    onnx.save(small(), tmp_path / "m.onnx")
    assert numpy_helper.to_array(read_onnx(tmp_path / "m.onnx").graph.initializer[0]).tolist() == [0, 1, 2, 3]


def test_reads_weights_beside_it(outside):
    proto = read_onnx(outside())
    tensor = proto.graph.initializer[0]
    assert tensor.data_location == TensorProto.DEFAULT and not tensor.external_data
    assert numpy_helper.to_array(tensor).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("location", ["../w.bin", "a/../../w.bin", "/etc/hostname", "..\\w.bin", "", "w\0.bin"])
def test_weights_elsewhere_are_refused(location, outside, tmp_path):
    file = outside(location, data=None)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    with pytest.raises(
        ModelError, match=r"m\.onnx: tensor 'w': external data (outside the model's folder|without a location)"
    ):
        read_onnx(file)
    with pytest.raises(ModelError, match="external data"):
        onnx_hash(file)


def test_a_link_that_leaves_the_folder_is_refused(outside, tmp_path):
    file = outside(data=None)
    (tmp_path / "secret").write_bytes(bytes(16))
    (file.parent / "w.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside the model's folder"):
        read_onnx(file)


def test_weights_that_all_name_the_same_bytes_fill_no_memory(outside, tmp_path):
    file = outside(length=1 << 30)
    os.truncate(file.parent / "w.bin", 1 << 30)  # takes no space on the disk
    proto = onnx.load_model(str(file), load_external_data=False)
    proto.graph.initializer.extend([proto.graph.initializer[0]] * 2)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx: expected weights of at most 2 GiB, got 3,221,225,472 bytes"):
        read_onnx(file)


def test_a_model_that_is_itself_a_link_is_read_from_where_it_lies(outside, tmp_path):
    file = outside()
    (tmp_path / "link.onnx").symlink_to(file)
    assert len(read_onnx(tmp_path / "link.onnx").graph.initializer) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": None}, r"external data is missing: there is no file 'w\.bin' beside the model"),
        ({"data": bytes(8)}, r"external data is cut off: 'w\.bin' has 8 bytes, 16 are needed"),
        ({"offset": -4}, "expected an offset and a length of at least 0"),
        ({"offset": "many"}, "damaged external data"),
        ({"offset": 12}, "is cut off"),
        ({"length": 8}, "damaged, or not a valid ONNX graph|cut off"),
    ],
)
def test_damaged_external_data(settings, said, outside):
    with pytest.raises(ModelError, match=said):
        read_onnx(outside(**settings))


def test_external_data_inside_a_subgraph_is_checked_too(tmp_path):
    inner = helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0])
    inner.ClearField("float_data")
    inner.data_location = TensorProto.EXTERNAL
    entry = inner.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=inner)],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated_files(share, tmp_path):
    data = small(np.zeros((200, 4), np.float32)[:1]).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"m\.onnx: (damaged or truncated|truncated|damaged)"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 not a graph", "not an ONNX file"),
        (b"{}", "not an ONNX file"),
        (b"\x00" * 64, "not an ONNX file"),
        (os.urandom(4096), "not an ONNX file"),
    ],
)
def test_other_files(contents, said, tmp_path):
    (tmp_path / "m.onnx").write_bytes(contents)
    with pytest.raises(ModelError, match=said):
        read_onnx(tmp_path / "m.onnx")


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_onnx(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="got a directory"):
        read_onnx(tmp_path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        read_onnx(tmp_path / "pipe.onnx")
    with pytest.raises(ModelError, match=r"cannot be read|no such file"):
        read_onnx("\0")


def test_an_invalid_graph_is_refused(tmp_path):
    proto = small()
    proto.graph.node[0].op_type = "Nonsense"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="not a valid ONNX graph"):
        read_onnx(tmp_path / "m.onnx")


def test_the_hash_covers_weights_beside_the_file(outside):
    before = onnx_hash(outside())
    assert before == onnx_hash(outside())
    assert before != onnx_hash(outside(data=np.arange(1, 5, dtype=np.float32).tobytes()))


def test_the_hash_of_the_contents_ignores_notes_only():
    proto = small()
    before = contents_hash(proto)
    helper.set_model_props(proto, {"note": "x"})
    proto.producer_name = "someone"
    assert contents_hash(proto) == before
    assert contents_hash(small(np.array([0, 1, 2, 4], np.float32))) != before
    proto.graph.node[0].op_type = "Sub"
    assert contents_hash(proto) != before


def test_notes_that_are_no_text_are_none() -> None:
    whole = onnx.ModelProto()
    onnx.helper.set_model_props(whole, {"kind": "pair", "named": "x"})
    damaged = onnx.ModelProto()
    damaged.ParseFromString(whole.SerializeToString().replace(b"named", b"n\xff\xfeed"))
    assert metadata(damaged) == {"kind": "pair"}
