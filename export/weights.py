"""The weights of a GPT-2: extracted from Optimum's export, quantized, and packed for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from qa_onnx.engine.kv_cache import aligned
from qa_onnx.errors import ParityError

PANEL, INT8_GROUP, BFLOAT16_GROUP = 16, 4, 2
"""Adjacent columns of a packed weight, and adjacent values of one column in int8 and bfloat16 (`pack_weight`)."""
TOKEN_EMBEDDING, POSITION_EMBEDDING, OUTPUT_WEIGHTS = "wte.weight", "wpe.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight matrix in int8 with one scale per column: `values * scales` is float32 [K, N].

    Attributes:
        values: int8 [K, N].
        scales: float32 [N].
        smoothing: float32 [K], the factors of the rows before rounding; None without smoothing.
    """

    values: np.ndarray
    scales: np.ndarray
    smoothing: np.ndarray | None = None

    def columns(self, chosen: slice) -> QuantizedWeight:
        """Some of the columns."""
        return replace(self, values=np.ascontiguousarray(self.values[:, chosen]), scales=self.scales[chosen])


def pack_weight(matrix: np.ndarray, group: int) -> np.ndarray:
    """Packs a matrix [K, N] for the kernels; both graphs of a bundle share the packed weight.

    The layout is [N / 16, K / group, 16, group]: panels of `PANEL` columns, in each the groups of K, padded with zeros.
    A kernel reads a weight sequentially, and adds up `group` products of a column in one lane of a vector.
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
        ParityError: The graph does not end in the matmul of hidden states and output weights.
    """
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    weights = {}
    for node in plain.graph.node:
        # Optimum stores equal tensors once, under one name; the module in the node's name, such as
        # `/transformer/h.0/ln_1/...`, says which weight it is.
        module = ".".join(node.name.split("/")[2:-1])
        if node.op_type == "Identity" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
        if node.op_type == "Gather" and node.input[0].startswith("transformer."):
            weights[f"{module}.weight"] = stored[node.input[0]]
        if node.op_type in ("Gemm", "LayerNormalization"):
            weights[f"{module}.weight"], weights[f"{module}.bias"] = (stored[name] for name in node.input[1:])
    producers = {name: node for node in plain.graph.node for name in node.output}
    logits = producers["logits"]
    if logits.op_type != "MatMul":
        raise ParityError(f"the export computes its logits by {logits.op_type}; expected MatMul. Report this model")
    output = logits.input[1]
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
