"""An ONNX file in the form that ATC, the compiler that makes an Ascend .om file of it, is documented to take.

ATC's parser looks an operator up by opset and name. What is registered stands in the open sources of CANN's operators:
`REGISTER_CUSTOM_OP` in */framework/*onnx_plugin.cpp of ops-nn e5c3fa93, ops-math c4193324 and ops-cv 6ae87653 (August
2026). `OPERATORS` are ONNX's own among them, and Constant, which the parser itself knows; none of them is registered
for a later opset than `MAX_OPSET`, and no Gelu at all. That ATC takes a file that passes has not been tried: it comes
with CANN.
"""

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

MAX_OPSET = 18
IR_VERSION = 8  # of ONNX's file format, from the time of that opset
OPERATORS = frozenset(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip Compress Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace Det Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor
    Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GRU HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax LpNormalization LpPool LRN LSTM MatMul Max MaxPool MaxRoiPool MaxUnpool Mean
    MeanVarianceNormalization Min Mod Mul Multinomial Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
    Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)


def rewrite(path: Path, tokens: int) -> str:
    """Replace an exported file by its `atc_form`; the command that compiles it for captions of `tokens` tokens.

    The file itself takes captions of any length: the command fixes it. ValueError with the problems that are left.
    """
    import onnx

    model = atc_form(onnx.load(path))
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else tokens for dim in dims)
    problems = atc_problems(model, sized=shapes.keys())
    if problems:
        raise ValueError(f"{path.name}: {'; '.join(problems)}")
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    return atc_command(path.name, shapes)


def atc_form(model: Any) -> Any:
    """`model`, an onnx.ModelProto of opset 19 or 20, changed in place to `MAX_OPSET`, and computing the same.

    GridSample's mode goes back to its old name, and Gelu becomes the operators that define it. Of the other operators
    that the later opsets changed only the types are new (onnx.checker, called on the file, says where not).
    """
    from onnx import TensorProto, helper

    nodes = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "GridSample" and attribute.name == "mode" and attribute.s == b"linear":
                attribute.s = b"bilinear"
        nodes += _gelu(node) if node.op_type == "Gelu" else [node]
    factors = {"atc_root_half": math.sqrt(0.5), "atc_half": 0.5, "atc_one": 1.0}
    if len(nodes) > len(model.graph.node):
        model.graph.initializer.extend(
            helper.make_tensor(name, TensorProto.FLOAT, (), [value]) for name, value in factors.items()
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx"):
            each.version = min(each.version, MAX_OPSET)
    model.ir_version = min(model.ir_version, IR_VERSION)
    return model


def _gelu(node: Any) -> list[Any]:
    """x * (0.5 * (1 + erf(x * sqrt(0.5)))) in float32. ValueError for Gelu's other definition."""
    from onnx import helper

    if any(attribute.s not in (b"", b"none") for attribute in node.attribute):
        raise ValueError(f"{node.name}: Gelu by tanh has no form for ATC here")
    (x,), (out,) = node.input, node.output
    steps = [("Mul", (x, "atc_root_half")), ("Erf", ()), ("Add", ("atc_one",)), ("Mul", ("atc_half",)), ("Mul", (x,))]
    made: list[Any] = []
    for number, (name, inputs) in enumerate(steps):
        result = out if number == len(steps) - 1 else f"{out}_atc_{number}"
        operands = [*(made[-1].output if made else ()), *inputs]
        made.append(helper.make_node(name, operands, [result], name=f"{node.name}_{number}"))
    return made


def atc_problems(model: Any, sized: Collection[str] = ()) -> list[str]:
    """One line for each thing that ATC does not take; `model` is an onnx.ModelProto. Empty: none found.

    `sized` are the inputs whose sizes the command will name.
    """
    problems = []
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if opset > MAX_OPSET:
        problems.append(f"opset {opset}: ATC takes up to {MAX_OPSET}")
    used = {(node.domain, node.op_type) for node in _nodes(model.graph.node)}
    local = {(function.domain, function.name) for function in model.functions}
    used |= {(node.domain, node.op_type) for function in model.functions for node in _nodes(function.node)}
    unknown = sorted(name for domain, name in used - local if domain not in ("", "ai.onnx") or name not in OPERATORS)
    if unknown:
        problems.append(f"operators that ATC does not list: {', '.join(unknown)}")
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in sized and any(not dim.HasField("dim_value") for dim in dims):
            sizes = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)
            problems.append(f"input {value.name} has no fixed size ({sizes}): give ATC one with --input_shape")
    return problems


def _nodes(nodes: Iterable[Any]) -> Iterable[Any]:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def atc_command(file: str, input_shapes: dict[str, tuple[int, ...]], soc: str = "Ascend910B3") -> str:
    """The command that compiles `file` for these input sizes."""
    shapes = ";".join(f"{name}:{','.join(map(str, sizes))}" for name, sizes in input_shapes.items())
    out = file.removesuffix(".onnx")
    return f'atc --framework=5 --model={file} --output={out} --input_shape="{shapes}" --soc_version={soc}'
