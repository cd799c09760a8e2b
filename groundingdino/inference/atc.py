"""What stands between an ONNX file and ATC, the compiler that makes an Ascend .om file of it.

The list of operators is CANN's "supported ONNX operators" of version 8.0 (hiascend.com, AI framework operator support).
That ATC takes a file that passes has not been tried: it comes with CANN.
"""

from collections.abc import Iterable
from typing import Any

MAX_OPSET = 18  # as remembered of CANN 8; not checked against its pages
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
    Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TfIdfVectorizer
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)


def atc_problems(model: Any) -> list[str]:
    """One line for each thing that ATC does not document to take; `model` is an onnx.ModelProto. Empty: none found."""
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
        if any(not dim.HasField("dim_value") for dim in dims):
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
