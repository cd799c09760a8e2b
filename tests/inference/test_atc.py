"""What Ascend's compiler does not document to take is named before it is tried."""

import pytest

from groundingdino.inference.atc import atc_command, atc_problems

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
