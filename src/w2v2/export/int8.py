"""A graph for onnxruntime on a CPU: linear layers and convolutions in 8 bits, attention by one kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnx import GraphProto, ModelProto, NodeProto

HIGHEST = 63
"""Weights take 7 of the 8 bits: processors without VNNI add products in 16 bits, which larger ones would overflow."""


def quantize(path: Path, to: Path, heads: int) -> None:
    """Weights of linear layers and of all convolutions but the first in 8 bits, one scale for each output.

    Inputs are quantised as they come; the first convolution, of single samples, and the grouped one of the positions
    stay in float32, as do the products of attention, which is computed in parts that stay in a processor's cache.

    Args:
        path: a graph in float32 of a model with so many heads.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    fuse_attention(model, heads)
    quantize_convolutions(model.graph)
    quantize_dynamic(
        model,
        to,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=path.with_name(path.name + ".data").exists(),
    )


def fuse_attention(model: ModelProto, heads: int) -> None:
    """Put onnxruntime's operator in the place of softmax, the products around it, and what lays out heads for them."""
    from onnx import helper, numpy_helper

    graph, domain = model.graph, "com.microsoft"
    makers = {name: node for node in graph.node for name in node.output}
    users = {name: node for node in graph.node for name in node.input}  # of what one node uses alone

    def laid_out(name: str) -> str:
        """(B, T, heads, D) that a factor was made of."""
        node = makers[name]
        return node.input[0] if _attribute(node, "perm", None) == [0, 2, 1, 3] else laid_out(node.input[0])

    instead: dict[str, list[NodeProto]] = {}
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        scores, mixed = makers[softmax.input[0]], users[softmax.output[0]]
        name, out = softmax.output[0], users[mixed.output[0]].output[0]  # (B, T, heads, D)
        parts = [f"{name}.{i}" for i in range(4)]
        instead[out] = [
            *(
                helper.make_node("Reshape", [laid_out(factor), "attention.rows"], [part])
                for factor, part in zip((*scores.input, mixed.input[1]), parts, strict=False)
            ),
            helper.make_node("MultiHeadAttention", parts[:3], parts[3:], domain=domain, num_heads=heads),
            helper.make_node("Reshape", [parts[3], "attention.heads"], [out]),
        ]
    for name, shape in (("rows", [0, 0, -1]), ("heads", [0, 0, heads, -1])):
        graph.initializer.append(numpy_helper.from_array(np.array(shape), f"attention.{name}"))
    model.opset_import.append(helper.make_opsetid(domain, 1))
    nodes = [new for old in graph.node for new in instead.get(old.output[0], [old])]
    needed, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if needed & {*node.output}:
            kept.append(node)
            needed |= {*node.input}
    del graph.node[:]
    graph.node.extend(reversed(kept))


def quantize_convolutions(graph: GraphProto) -> None:
    """Write each convolution of many channels as a product, in 8 bits, of frames laid side by side.

    onnxruntime's convolutions are slower in 8 bits than in float32, its products much faster. Frames are quantised
    before they are laid side by side, so that there is a quarter to copy.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        weight = weights.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or weight.dims[1] == 1 or _attribute(node, "group", 1) != 1:
            graph.node.append(node)
            continue
        graph.initializer.remove(weight)
        graph.node.extend(_product(graph, node, numpy_helper.to_array(weight)))


def _product(graph: GraphProto, node: NodeProto, weight: npt.NDArray[np.float32]) -> list[NodeProto]:
    """(B, C, T) -> (B, C', T') with a weight (C', C, K)."""
    from onnx import TensorProto, helper, numpy_helper

    [out], kernel = node.output, weight.shape[2]
    matrix = weight.transpose(2, 1, 0).reshape(-1, len(weight))  # (K * C, C')
    scales = np.abs(matrix).max(0) / HIGHEST

    def constant(values: Any, dtype: type = np.int64) -> str:
        name = f"{out}.constant.{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def make(operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"{out}.{len(nodes)}.{i}" for i in range(outputs)]
        nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names

    nodes: list[NodeProto] = []
    stride, pads = _attribute(node, "strides", [1])[0], _attribute(node, "pads", [0, 0])
    [x] = make("Transpose", node.input[0], perm=[0, 2, 1])
    if any(pads):
        [x] = make("Pad", x, constant([0, pads[0], 0, 0, pads[1], 0]))
    x, scale, zero = make("DynamicQuantizeLinear", x, outputs=3)
    taps: list[str] = []
    for tap in range(kernel):
        end = tap + 1 - kernel or np.iinfo(np.int64).max  # the last window's
        taps += make("Slice", x, *(constant([value]) for value in (tap, end, 1, stride)))
    [x] = make("Concat", *taps, axis=-1)
    [x] = make("MatMulInteger", x, constant(np.round(matrix / np.where(scales > 0, scales, 1)), np.int8), zero)
    [x] = make("Cast", x, to=TensorProto.FLOAT)
    [x] = make("Mul", x, *make("Mul", scale, constant(scales, np.float32)))
    if len(node.input) > 2:
        [x] = make("Add", x, node.input[2])
    return [*nodes, helper.make_node("Transpose", [x], [out], perm=[0, 2, 1])]


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
