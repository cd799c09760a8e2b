"""What Ascend's compiler does not document to take is named before it is tried."""

import numpy as np
import pytest

from groundingdino.inference.atc import atc_command, atc_form, atc_problems

onnx = pytest.importorskip("onnx", reason="needs the extra export")
helper = onnx.helper


def model(*operators: str, opset: int = 17, size=(1, 3, 8, 8), domain: str = ""):
    value = helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, size)
    nodes = [helper.make_node(name, ["pixels"], [f"out{i}"], domain=domain) for i, name in enumerate(operators)]
    graph = helper.make_graph(nodes, "graph", [value], [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("own", 1)])


def test_a_static_graph_of_listed_operators_has_no_problem():
    assert atc_problems(model("GridSample", "LayerNormalization", "TopK")) == []


def test_a_late_opset_an_unknown_operator_and_an_open_size_are_each_one_line():
    inner = model("Gelu").graph
    found = model("Abs", opset=20, size=("batch", 3, 8, 8))
    found.graph.node.append(helper.make_node("If", ["pixels"], ["out"], then_branch=inner, else_branch=inner))
    assert atc_problems(found) == [
        "opset 20: ATC takes up to 18",
        "operators that ATC does not list: Gelu",
        "input pixels has no fixed size (batch, 3, 8, 8): give ATC one with --input_shape",
    ]


def test_operators_of_other_domains_are_named():
    assert atc_problems(model("Abs", domain="own")) == ["operators that ATC does not list: Abs"]


def test_the_command_names_every_input():
    command = atc_command("out/model.onnx", {"pixels": (1, 3, 800, 1333), "token_ids": (1, 12)})
    assert '--input_shape="pixels:1,3,800,1333;token_ids:1,12"' in command and "--output=out/model " in command


def test_the_form_for_atc_computes_the_same_with_listed_operators():
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    names = {"pixels": (1, 2, 5, 6), "grid": (1, 3, 4, 2)}
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name, size in names.items()]
    nodes = [
        helper.make_node("GridSample", ["pixels", "grid"], ["sampled"], mode="linear", padding_mode="zeros"),
        helper.make_node("Gelu", ["sampled"], ["out"], name="activation"),
    ]
    outputs = [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, (1, 2, 3, 4))]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    given = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(size).astype(np.float32) for name, size in names.items()}

    def answer():
        return onnxruntime.InferenceSession(given.SerializeToString()).run(None, values)[0]

    expected = answer()
    assert len(atc_problems(given)) == 2
    assert atc_problems(atc_form(given)) == []
    onnx.checker.check_model(given, full_check=True)
    np.testing.assert_allclose(answer(), expected, rtol=1e-5, atol=1e-6)


def test_gelu_by_tanh_is_refused():
    given = model("Abs", opset=20)
    given.graph.node.append(helper.make_node("Gelu", ["pixels"], ["out"], name="activation", approximate="tanh"))
    with pytest.raises(ValueError, match="activation: Gelu by tanh"):
        atc_form(given)


def test_only_the_mode_of_gridsample_goes_back_to_its_old_name():
    given = model(opset=20)
    nodes = [helper.make_node(name, ["pixels"], [name], mode="linear") for name in ("GridSample", "Resize")]
    given.graph.node.extend(nodes)
    modes = [node.attribute[0].s for node in atc_form(given).graph.node]
    assert modes == [b"bilinear", b"linear"]
