"""Graph passes: from Optimum's plain export to the graph that the runtime runs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qa_onnx.errors import ParityError

_LAST = np.array(-1, np.int64)


def keep_last_logits(model: onnx.ModelProto) -> None:
    """Computes logits of the last position only, in place: `logits` becomes float32 [B, V] instead of [B, T, V].

    Greedy decoding looks at nothing else, and the output layer is the widest product of a small GPT-2. The output
    weights are the token embedding; where the export wrote them a second time, transposed, the copy goes.

    Raises:
        ParityError: The graph does not end in the product of hidden states and output weights.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    product = producers["logits"]
    if product.op_type != "MatMul":
        raise ParityError(f"the export computes its logits by {product.op_type}; expected MatMul. Report this model")
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    hidden, weight = product.input
    transpose = producers.get(weight)
    if transpose is not None and transpose.op_type == "Transpose" and transpose.input[0] in initializers:
        weight, is_transposed = transpose.input[0], True
        graph.node.remove(transpose)
    else:
        weight, is_transposed = _shared_embedding(graph, initializers, weight)
    index = list(graph.node).index(product)
    graph.node.remove(product)
    graph.initializer.append(numpy_helper.from_array(_LAST, "qa_onnx.last_position"))
    graph.node.insert(
        index, helper.make_node("Gather", [hidden, "qa_onnx.last_position"], ["qa_onnx.last_hidden"], axis=1)
    )
    graph.node.insert(
        index + 1,
        helper.make_node(
            "Gemm", ["qa_onnx.last_hidden", weight], ["logits"], name="qa_onnx.logits", transB=int(is_transposed)
        ),
    )
    shape = next(output for output in graph.output if output.name == "logits").type.tensor_type.shape
    del shape.dim[1]


def _shared_embedding(
    graph: onnx.GraphProto, initializers: dict[str, onnx.TensorProto], weight: str
) -> tuple[str, bool]:
    """Finds the embedding that the output weights [E, V] are a transposed copy of, and drops the copy.

    Returns:
        The weights to use, and whether they are transposed ([V, E]).
    """
    if weight not in initializers:
        raise ParityError(f"the output weights {weight!r} are not stored in the graph. Report this model")
    values = numpy_helper.to_array(initializers[weight])
    for name, tensor in initializers.items():
        if list(tensor.dims) == list(values.shape[::-1]) and np.array_equal(numpy_helper.to_array(tensor).T, values):
            graph.initializer.remove(initializers[weight])
            return name, True
    return weight, False
