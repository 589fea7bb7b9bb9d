"""The runtime's graph: GPT-2 as a decoder over shared passages, from the weights of Optimum's plain export.

One graph does all three phases, because it reads a *packed* batch: the new tokens of all rows in one dimension, N, with
no padding between them, so that every product with a weight matrix is as small as it can be. Only attention needs a
grid, [G, R, T]: G passages, R rows (questions) on each, T new tokens a row. Two index inputs lead between the two:

    input_ids        t0 t1 t2 t3 t4            N = 5 packed tokens: a row of 2 and a row of 3, on one passage
    slot_index       [[[ 0, 0, 1],             the packed token in each slot of the grid [G, R, T]; padded on the left,
                       [ 2, 3, 4]]]            what stands in a padded slot does not matter
    token_index      [ 1, 2, 3, 4, 5]          the slot of each packed token

A row attends to its passage's keys [G, H, 1, P, D], which its neighbours share without a copy, and to its own
[G, H, R, C, D], into which the graph writes the new tokens in place, at column `write_index[g]`. `attention_bias` masks
both. Only the tokens of `output_index` go through the last layer's feed-forward part and the output layer: all of a
question's tokens but the last stop at their keys and values, and a passage's tokens, with an empty `output_index`, do
so too. The three phases, and where `write_index` points in each:

    prefill of passages     R = 1, P = 0, T = passage    T columns before the last    output_index empty
    prefill of questions    T = question                 T columns before their end    output_index: the last tokens
    decode step             T = 1                        one further each step

What one layer's products share (E is the model's width, D = E / H):

    LayerNormalization -> Gemm [E, 3E] -> Gather into the grid -> TensorScatter -> QK, softmax, PV -> Gather back
    -> Gemm [E, E] -> Add -> LayerNormalization -> Gemm [E, 4E] -> FastGelu -> Gemm [4E, E] -> Add
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import GPT2Config

from qa_onnx.errors import InvalidInputError, ParityError
from qa_onnx.kv_cache import PASSAGE_PREFIX, PAST_PREFIX, PRESENT_PREFIX

OPSET, CONTRIB_OPSET, IR_VERSION = 24, 1, 11
CONTRIB = "com.microsoft"
TOKEN_EMBEDDING, POSITION_EMBEDDING, OUTPUT_WEIGHTS = "wte.weight", "wpe.weight", "lm_head.weight"


@dataclass(frozen=True)
class Activation:
    """The operator that computes an `activation_function` of GPT-2's configuration."""

    op_type: str
    domain: str = ""


ACTIVATIONS = {
    "gelu_new": Activation("FastGelu", CONTRIB),
    "gelu_pytorch_tanh": Activation("FastGelu", CONTRIB),
    "gelu": Activation("Gelu"),
    "relu": Activation("Relu"),
}


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight matrix in int8, one scale a column: `values * scales` is float32 [K, N].

    Attributes:
        values: int8 [K, N].
        scales: float32 [N].
    """

    values: np.ndarray
    scales: np.ndarray


def weights_of(plain: onnx.ModelProto) -> dict[str, np.ndarray]:
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


def build_decoder(
    weights: Mapping[str, np.ndarray],
    config: GPT2Config,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    *,
    half: bool = False,
) -> onnx.ModelProto:
    """Builds the graph that the module's description tells of.

    Args:
        weights: From `weights_of`.
        config: Of the same model.
        quantized: The matrices to multiply in int8 instead, by their names in `weights` (`wte.weight`, [E, V] here,
            stands for the embedding and the output layer alike). The other products stay float32.
        half: Multiply in float16 and keep keys and values in it. Residual sums, layer norms, softmax and logits stay
            float32: GPT-2's residuals have channels that float16 would round away.

    Raises:
        InvalidInputError: The configuration asks for something that the runtime does not compute.
        ParityError: The weights are not those of that configuration.
    """
    if config.activation_function not in ACTIVATIONS:
        raise InvalidInputError(
            f"the model's activation_function is {config.activation_function!r}; "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )
    if config.add_cross_attention:
        raise InvalidInputError("the model has cross-attention; expected a GPT-2 that reads one text")
    builder = _Builder(weights, config, quantized or {}, half=half)
    model = builder.build()
    unused = sorted(weights.keys() - builder.used)
    if unused:
        raise ParityError(f"the export has weights that the runtime does not use: {', '.join(unused)}")
    return model


def save_decoder(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph, and its weights beside it in `{path}_data`, which ONNX Runtime maps into memory as it loads.

    Weights inside of the graph would be in memory two or three times until they are loaded.
    """
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}_data")


class _Builder:
    """Adds node after node; every method returns the name of what it computes."""

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: GPT2Config,
        quantized: Mapping[str, QuantizedWeight],
        *,
        half: bool,
    ) -> None:
        self.weights, self.config, self.quantized, self.half = weights, config, quantized, half
        self.type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.heads, self.head_size = config.n_head, config.n_embd // config.n_head
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.used: set[str] = set()

    def build(self) -> onnx.ModelProto:
        self._prepare_indices()
        positions = self.op("Gather", self.weight(POSITION_EMBEDDING), "position_ids")
        residual = self.op("Add", self._embedding(), positions)
        for layer in range(self.config.n_layer):
            residual = self._layer(layer, residual, is_last=layer == self.config.n_layer - 1)
        self._output_layer(self._layer_norm("ln_f", residual))
        initializers = [numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = helper.make_graph(self.nodes, "qa_onnx", self._inputs(), self._outputs(), initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qa_onnx")

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output; `name` is the output's, made up where none is given."""
        output = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", domain=domain, **attributes)
        )
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        self.initializers[name] = np.asarray(value, dtype)
        return name

    def weight(self, name: str) -> str:
        """A weight in float32."""
        if name not in self.weights:
            raise ParityError(f"the export has no weight {name!r}, which the model's configuration asks for")
        self.used.add(name)
        self.initializers[name] = self.weights[name]
        return name

    def factor(self, name: str) -> str:
        """A weight in the type that products are computed in."""
        self.weight(name)
        if self.half:
            if np.abs(self.weights[name]).max() > np.finfo(np.float16).max:
                raise ParityError(f"the weight {name!r} is too large for float16; use another precision")
            self.initializers[name] = self.weights[name].astype(np.float16)
        return name

    def narrow(self, value: str) -> str:
        """A float32 value in the type that products are computed in."""
        return self.op("Cast", value, to=self.type) if self.half else value

    def widen(self, value: str) -> str:
        """The result of a product in float32."""
        return self.op("Cast", value, to=TensorProto.FLOAT) if self.half else value

    # -- the parts of a layer ------------------------------------------------------------------------------------------

    def _prepare_indices(self) -> None:
        """What all layers share: rows of head size D in the packed batch and in the grid, and the shapes between."""
        each_head = np.arange(self.heads)
        self.constant("head_rows", [-1, self.head_size])
        self.constant("token_rows", [-1, self.config.n_embd])
        self.constant("one", [1])
        grid = self.op("Shape", "slot_index", start=1)  # R, T
        slots = self.op("ReduceProd", grid, keepdims=1)
        # The product with c_attn gives each token 3 H rows of size D: the heads of its query, its key, its value.
        token = self.op("Mul", self.op("Unsqueeze", "slot_index", "one"), self.constant("rows", 3 * self.heads))
        for part, name in enumerate(("query", "key", "value")):
            rows = self.constant(f"{name}_heads", (part * self.heads + each_head).reshape(1, -1, 1, 1))
            self.op("Add", token, rows, name=f"{name}_index")
        # Attention leaves rows of size D in the order [G, H, R, T]; a token collects those of its heads.
        group, slot = self.op("Div", "token_index", slots), self.op("Mod", "token_index", slots)
        heads, size = self.constant("heads", [self.heads]), self.constant("head_size", [self.head_size])
        first = self.op("Mul", self.op("Mul", group, heads), slots)
        head_offset = self.op("Mul", self.constant("head_column", each_head.reshape(1, -1)), slots)
        self.op("Add", self.op("Unsqueeze", self.op("Add", first, slot), "one"), head_offset, name="context_index")
        past = self.op("Shape", f"{PASSAGE_PREFIX}0.key", start=3, end=4)
        own = self.op("Shape", f"{PAST_PREFIX}0.key", start=3, end=4)
        self.op("Concat", past, own, name="key_counts", axis=0)
        # Rows and new tokens of a passage in one dimension; in a decode step the rows stay apart (`_attention`).
        groups = self.op("Shape", "slot_index", start=0, end=1)
        width = self.op("Shape", "slot_index", start=2)
        self.op("Concat", groups, heads, grid, size, name="query_shape", axis=0)
        self.op("Concat", groups, heads, slots, size, name="flat_rows", axis=0)
        self.op("Concat", groups, heads, past, size, name="flat_keys", axis=0)
        self.op("Concat", groups, heads, grid, past, name="passage_scores", axis=0)
        is_long = self.op("Min", self.op("Sub", width, "one"), "one")
        folded = self.op("Add", "one", self.op("Mul", is_long, self.op("Sub", slots, "one")))
        self.op("Concat", groups, heads, self.op("Div", slots, folded), folded, past, name="folded_rows", axis=0)

    def _layer(self, layer: int, residual: str, *, is_last: bool) -> str:
        name = f"h.{layer}"
        qkv = self._linear(f"{name}.attn.c_attn", self._layer_norm(f"{name}.ln_1", residual))
        context = self._attention(layer, qkv)
        if is_last:
            context, residual = (self.op("Gather", value, "output_index") for value in (context, residual))
        residual = self.op("Add", residual, self.widen(self._linear(f"{name}.attn.c_proj", context)))
        hidden = self._linear(f"{name}.mlp.c_fc", self._layer_norm(f"{name}.ln_2", residual))
        activation = ACTIVATIONS[self.config.activation_function]
        hidden = self.op(activation.op_type, hidden, domain=activation.domain)
        return self.op("Add", residual, self.widen(self._linear(f"{name}.mlp.c_proj", hidden)))

    def _attention(self, layer: int, qkv: str) -> str:
        """Attention of one layer: from the product with c_attn, [N, 3E], to the context of each token, [N, E]."""
        scale = self.head_size**-0.5 if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        passage_key, passage_value = (f"{PASSAGE_PREFIX}{layer}.{part}" for part in ("key", "value"))
        head_rows = self.op("Reshape", qkv, "head_rows")
        query, key, value = (self.op("Gather", head_rows, f"{part}_index") for part in ("query", "key", "value"))
        own_key, own_value = (
            self.op(
                "TensorScatter",
                f"{PAST_PREFIX}{layer}.{part}",
                new,
                "write_index",
                name=f"{PRESENT_PREFIX}{layer}.{part}",
                axis=-2,
            )
            for part, new in (("key", key), ("value", value))
        )
        # One product a passage for the scores of all its rows: the keys are the same, and packed only once. With a
        # scale other than 1 it takes the same steps for one row as for many.
        passage_scores = self.op(
            "FusedMatMul",
            self.op("Reshape", query, "flat_rows"),
            self.op("Reshape", passage_key, "flat_keys", allowzero=1),
            domain=CONTRIB,
            transB=1,
            alpha=scale,
        )
        scores = self.op(
            "Concat",
            self.op("Reshape", passage_scores, "passage_scores", allowzero=1),
            self.op("FusedMatMul", query, own_key, domain=CONTRIB, transB=1, alpha=scale),
            axis=-1,
        )
        probabilities = self.narrow(self.op("Softmax", self.op("Add", self.widen(scores), "attention_bias"), axis=-1))
        on_passage, on_own = f"{probabilities}_passage", f"{probabilities}_own"
        self.nodes.append(helper.make_node("Split", [probabilities, "key_counts"], [on_passage, on_own], axis=-1))
        # The same for the context, but not in a decode step: a product of one row takes other steps than one of two,
        # and a question's numbers must not depend on whether it has neighbours.
        folded = self.op("MatMul", self.op("Reshape", on_passage, "folded_rows", allowzero=1), passage_value)
        context = self.op("Add", self.op("Reshape", folded, "query_shape"), self.op("MatMul", on_own, own_value))
        context = self.op("Gather", self.op("Reshape", context, "head_rows"), "context_index")
        return self.op("Reshape", context, "token_rows")

    def _layer_norm(self, name: str, hidden: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.narrow(self.op("LayerNormalization", hidden, scale, bias, epsilon=self.config.layer_norm_epsilon))

    def _linear(self, name: str, hidden: str) -> str:
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight not in self.quantized:
            return self.op("Gemm", hidden, self.factor(weight), self.factor(bias))
        self.initializers[weight] = self.quantized[weight].values
        self.used.add(weight)
        return self.op("Add", self._quantized_product(weight, hidden), self.weight(bias))

    def _quantized_product(self, weight: str, hidden: str) -> str:
        """Multiplies in int8 with one scale a row of `hidden`, so that no row depends on its neighbours.

        ONNX Runtime's own dynamic quantisation has one scale for the whole tensor, which makes an answer depend on
        what else is in the batch (its issues 5672, 7037 and 10111). Integer sums are exact in any order.
        """
        self.constant("unit", 1.0, np.float32)
        self.constant("zero_point", 128, np.uint8)
        self.constant("largest", 127.0, np.float32)
        self.constant("smallest", 1e-20, np.float32)  # a row of zeros has no scale of its own
        scales = f"{weight}.scales"
        self.initializers[scales] = self.quantized[weight].scales
        highest = self.op("ReduceMax", hidden, "one", keepdims=1)
        lowest = self.op("Neg", self.op("ReduceMin", hidden, "one", keepdims=1))
        magnitude = self.op("Max", highest, lowest, "smallest")
        scaled = self.op("Mul", hidden, self.op("Div", "largest", magnitude))
        values = self.op("QuantizeLinear", scaled, "unit", "zero_point")
        product = self.op("MatMulIntegerToFloat", values, weight, "unit", scales, "zero_point", domain=CONTRIB)
        return self.op("Mul", product, self.op("Div", magnitude, "largest"))

    def _embedding(self) -> str:
        if TOKEN_EMBEDDING not in self.quantized:
            return self.widen(self.op("Gather", self.factor(TOKEN_EMBEDDING), "input_ids"))
        # Stored once, [V, E]; ONNX Runtime transposes it for the output layer as it loads.
        self.used.add(TOKEN_EMBEDDING)
        self.initializers[f"{TOKEN_EMBEDDING}.rows"] = np.ascontiguousarray(self.quantized[TOKEN_EMBEDDING].values.T)
        self.initializers[f"{TOKEN_EMBEDDING}.scales"] = self.quantized[TOKEN_EMBEDDING].scales
        rows = self.op("Gather", f"{TOKEN_EMBEDDING}.rows", "input_ids")
        scales = self.op("Unsqueeze", self.op("Gather", f"{TOKEN_EMBEDDING}.scales", "input_ids"), "one")
        return self.op("Mul", self.op("Cast", rows, to=TensorProto.FLOAT), scales)

    def _output_layer(self, hidden: str) -> None:
        tied = OUTPUT_WEIGHTS not in self.weights
        name = TOKEN_EMBEDDING if tied else OUTPUT_WEIGHTS
        if name not in self.quantized:
            logits = self.op("Gemm", hidden, self.factor(name), transB=1)
            self.op("Identity", self.widen(logits), name="logits")
            return
        if tied:
            self.op("Transpose", f"{name}.rows", name=name, perm=[1, 0])
        else:
            self.used.add(name)
            self.initializers[name] = self.quantized[name].values
        self.op("Identity", self._quantized_product(name, hidden), name="logits")

    # -- inputs and outputs --------------------------------------------------------------------------------------------

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        shapes: dict[str, list[str | int]] = {
            "input_ids": ["N"],
            "position_ids": ["N"],
            "slot_index": ["G", "R", "T"],
            "token_index": ["N"],
            "output_index": ["M"],
            "write_index": ["G"],
        }
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in shapes.items()]
        bias = helper.make_tensor_value_info("attention_bias", TensorProto.FLOAT, ["B", 1, "R", "T", "P + C"])
        return [*inputs, bias, *self._cache(PASSAGE_PREFIX, 1, "P"), *self._cache(PAST_PREFIX, "R", "C")]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["M", self.config.vocab_size])
        return [logits, *self._cache(PRESENT_PREFIX, "R", "C")]

    def _cache(self, prefix: str, rows: str | int, columns: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                f"{prefix}{layer}.{part}", self.type, ["G", self.heads, rows, columns, self.head_size]
            )
            for layer in range(self.config.n_layer)
            for part in ("key", "value")
        ]
