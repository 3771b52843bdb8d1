"""A graph with the products of linear layers and convolutions in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def quantize(path: Path, to: Path) -> None:
    """Weights of linear layers and of all convolutions but the first in 8 bits, one scale for each output.

    Inputs are quantised as they come; the first convolution, of single samples, and the grouped one of the positions
    stay in float32. Weights take 7 of the 8 bits: processors without VNNI add products in 16 bits, which larger ones
    would overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    products(model.graph)
    quantize_dynamic(
        model,
        to,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=path.with_name(path.name + ".data").exists(),
    )


def products(graph: GraphProto) -> None:
    """Write each convolution of many channels as a product of frames laid side by side.

    onnxruntime's convolutions are slower in 8 bits than in float32, its products much faster.
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
        kernel = numpy_helper.to_array(weight)  # (C', C, K)
        matrix = np.ascontiguousarray(kernel.transpose(2, 1, 0).reshape(-1, len(kernel)))  # (K * C, C')
        graph.initializer.append(numpy_helper.from_array(matrix, f"{node.output[0]}.matrix"))
        graph.initializer.remove(weight)
        graph.node.extend(_product(graph, node, kernel.shape[2]))


def _product(graph: GraphProto, node: NodeProto, kernel: int) -> Iterator[NodeProto]:
    """(B, C, T) -> (B, C', T') by the matrix that stands in the graph."""
    from onnx import helper, numpy_helper

    out = node.output[0]

    def constant(*values: int) -> str:
        name = f"{out}.constant.{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    stride, pads = _attribute(node, "strides", [1])[0], _attribute(node, "pads", [0, 0])
    x = f"{out}.frames"
    yield helper.make_node("Transpose", [node.input[0]], [x], perm=[0, 2, 1])
    if any(pads):
        yield helper.make_node("Pad", [x, constant(0, pads[0], 0, 0, pads[1], 0)], [f"{out}.padded"])
        x = f"{out}.padded"
    taps = [f"{out}.tap.{tap}" for tap in range(kernel)]
    for tap, name in enumerate(taps):
        end = tap + 1 - kernel or np.iinfo(np.int64).max  # the last window's
        limits = [constant(tap), constant(end), constant(1), constant(stride)]
        yield helper.make_node("Slice", [x, *limits], [name])
    yield helper.make_node("Concat", taps, [f"{out}.windows"], axis=-1)
    product = f"{out}.product"
    yield helper.make_node("MatMul", [f"{out}.windows", f"{out}.matrix"], [product])
    if len(node.input) > 2:
        yield helper.make_node("Add", [product, node.input[2]], [f"{out}.biased"])
        product = f"{out}.biased"
    yield helper.make_node("Transpose", [product], [out], perm=[0, 2, 1])


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
