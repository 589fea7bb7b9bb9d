"""The weights of a GPT-2: read out of Optimum's export, in int8, and in the order that kernels read them in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from qa_onnx.engine.kv_cache import aligned
from qa_onnx.errors import ParityError

PANEL, INT8_GROUP, BFLOAT16_GROUP = 16, 4, 2
"""Columns that lie together in a packed weight, and values of one column (`pack_weight`)."""
TOKEN_EMBEDDING, POSITION_EMBEDDING, OUTPUT_WEIGHTS = "wte.weight", "wpe.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight matrix in int8, one scale a column: `values * scales` is float32 [K, N].

    Attributes:
        values: int8 [K, N].
        scales: float32 [N].
        smoothing: float32 [K], what the rows were multiplied by before they were rounded; None where they were not.
    """

    values: np.ndarray
    scales: np.ndarray
    smoothing: np.ndarray | None = None

    def columns(self, chosen: slice) -> QuantizedWeight:
        """Some of the columns."""
        return replace(self, values=np.ascontiguousarray(self.values[:, chosen]), scales=self.scales[chosen])


def pack_weight(matrix: np.ndarray, group: int) -> np.ndarray:
    """Lays a matrix [K, N] out for the kernels, which both graphs of a bundle share.

    Panels of `PANEL` columns follow each other, and in each the groups of K: [N / 16, K / group, 16, group], with zeros
    where K or N is not a multiple. So a kernel reads a weight from its start to its end, and `group` products of a
    column are added up in one lane of a vector.
    """
    width, columns = matrix.shape
    padded = np.zeros((aligned(width, group), aligned(columns, PANEL)), matrix.dtype)
    padded[:width, :columns] = matrix
    blocks = padded.reshape(len(padded) // group, group, padded.shape[1] // PANEL, PANEL)
    return np.ascontiguousarray(blocks.transpose(2, 0, 3, 1))


def extract_weights(plain: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Reads a GPT-2's weights out of Optimum's plain export.

    Returns:
        float32 arrays by their PyTorch names without `transformer.`, and `lm_head.weight` [V, E] where the output
        weights are not the token embedding.

    Raises:
        ParityError: The graph does not end in the product of hidden states and output weights.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    weights = {}
    for node in plain.graph.node:
        # Of equal tensors Optimum keeps one, which the others stand for; the modules, `/transformer/h.0/ln_1/...`,
        # still tell whose they are.
        module = ".".join(node.name.split("/")[2:-1])
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
        if node.op_type == "Gather" and node.input[0].startswith("transformer."):
            weights[f"{module}.weight"] = stored[node.input[0]]
        if node.op_type in ("Gemm", "LayerNormalization"):
            weights[f"{module}.weight"], weights[f"{module}.bias"] = (stored[name] for name in node.input[1:])
    producers = {name: node for node in plain.graph.node for name in node.output}
    product = producers["logits"]
    if product.op_type != "MatMul":
        raise ParityError(f"the export computes its logits by {product.op_type}; expected MatMul. Report this model")
    output = product.input[1]
    transpose = producers.get(output)
    if transpose is not None and transpose.op_type == "Transpose":
        head = stored.get(transpose.input[0])
    else:
        head = stored[output].T if output in stored else None
    if head is None:
        raise ParityError(f"the output weights {output!r} are not stored in the graph. Report this model")
    if not np.array_equal(head, weights[TOKEN_EMBEDDING]):
        weights[OUTPUT_WEIGHTS] = head
    return weights
