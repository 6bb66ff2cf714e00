"""A backbone's graph and a head's become one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from xcos_ext.io.errors import ModelError
from xcos_ext.onnx.splice import with_body

OPSET = helper.make_opsetid("", 18)


def model(inputs: list[str], output: str, node: onnx.NodeProto, *opsets: onnx.OperatorSetIdProto) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, None, None]) for name in (*inputs, output)
    ]
    made = helper.make_model(helper.make_graph([node], "g", values[:-1], values[-1:]), opset_imports=[OPSET, *opsets])
    made.metadata_props.append(onnx.StringStringEntryProto(key="author", value=node.op_type))
    return made


def head() -> onnx.ModelProto:
    return model(["image_a", "image_b"], "difference", helper.make_node("Sub", ["image_a", "image_b"], ["difference"]))


def body(domain: str = "", *opsets: onnx.OperatorSetIdProto) -> onnx.ModelProto:
    pool = helper.make_node("AveragePool", ["x"], ["map"], kernel_shape=[2, 2], strides=[2, 2], domain=domain)
    return model(["x"], "map", pool, *opsets)


@pytest.mark.parametrize(
    "listed", [[], [helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("com.microsoft", 1)]]
)
def test_one_graph_of_one_opset_whatever_the_body_lists_and_notes(listed: list[onnx.OperatorSetIdProto]) -> None:
    made = with_body(head(), body("", *listed), ["image_a", "image_b"], (4, 4))
    onnx.checker.check_model(made, full_check=True)
    assert list(made.opset_import) == [OPSET] and [value.name for value in made.graph.input] == ["image_a", "image_b"]
    assert {entry.key: entry.value for entry in made.metadata_props} == {"author": "Sub"}
    a, b = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 4)).astype(np.float32)
    (found,) = ReferenceEvaluator(made).run(None, {"image_a": a, "image_b": b})
    np.testing.assert_allclose(found, (a - b).reshape(1, 3, 2, 2, 2, 2).mean((3, 5)), rtol=1e-5, atol=1e-6)


def test_operators_of_others_are_refused() -> None:
    with pytest.raises(ModelError, match=r"operators that are not ONNX's own \(com\.microsoft\)"):
        with_body(
            head(), body("com.microsoft", helper.make_opsetid("com.microsoft", 1)), ["image_a", "image_b"], (4, 4)
        )
