"""The runtime's graph: GPT-2 as a decoder with shared prefixes, from the weights of Optimum's plain export.

One graph computes all three phases, because it reads a *packed* batch: the new tokens of all sequences in one
dimension, N, with no padding between them, so that no matmul with a weight matrix computes padding. Only attention
needs a grid, [G, R, T]: G prefixes, R rows (sequences) on each, T new tokens per row. Index inputs map one to the
other, all of them int64:

    input_ids        t0 t1 t2 t3 t4            N = 5 packed tokens: rows of 2 and of 3 tokens, on one prefix
    slot_index       [[[ 0, 0, 1],             the packed token in each slot of the grid [G, R, T], aligned to
                       [ 2, 3, 4]]]            the right; the value in a padded slot is not used
    context_index    [N, H]                    where the heads of each packed token are in attention's output, whose
                                               rows of D are in the order [G, H, R, T]

A row attends to the keys of its prefix [G, H, 1, P, D], which all rows of a group share without a copy, and to its own
[G, H, R, C, D], into which the graph writes the new tokens in place, starting at column `write_index[g]`. Lengths say
what a token may attend to: the first `prefix_lengths[g]` columns of the prefix, and its own columns from
`suffix_starts[g, r]` to the one that it is written to.

The last layer computes only what is needed: keys and values of all tokens, and the rest for the M tokens of
`output_index` (`output_slot_index` [G, R, 1] and `output_context_index` [M, H] are the same for them). ONNX Runtime
runs only the nodes that lead to bound outputs: nothing but keys and values for prefixes, and one of the two ways to
choose a token:

    logprobs [M, V]                                          the log-probability of every token
    token_ids, token_logprobs, eos_logprobs, each [M, 1]     the most probable token, and the end-of-text

The phases, and what the inputs are in each:

    prefill of prefixes     R = 1, P = 0, T = prefix, aligned to the left    write_index 0
    prefill of suffixes     T = suffix                                       write_index T columns before their end
    decode step             T = 1                                            write_index one further each step

The operators of one layer (E is the model's width, D = E / H):

    LayerNormalization -> Gemm [E, 3E] -> Gather into the grid -> TensorScatter -> QK, softmax, PV -> Gather back
    -> Gemm [E, E] -> Add -> LayerNormalization -> Gemm [E, 4E] -> FastGelu -> Gemm [4E, E] -> Add
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper
from transformers import GPT2Config

from export.gpt2 import ACTIVATIONS, GPT2Builder
from export.graph import CONTRIB
from export.weights import INT8_GROUP, OUTPUT_WEIGHTS, TOKEN_EMBEDDING, QuantizedWeight
from qa_onnx.engine.kv_cache import ALIGNMENT, PAST_NAME, PREFIX_NAME, PRESENT_NAME, aligned
from qa_onnx.engine.signature import decoder_inputs, decoder_outputs
from qa_onnx.errors import ParityError

LOWEST = np.finfo(np.float32).min
"""Added to the scores of keys that a token does not attend to. Not infinite: a row of nothing else would give NaN."""


def build_decoder(
    weights: Mapping[str, np.ndarray],
    config: GPT2Config,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    *,
    eos_token_id: int,
    float16: bool = False,
) -> onnx.ModelProto:
    """Builds the graph that the module's docstring describes.

    Args:
        weights: float32 arrays, from `export.weights.extract_weights`.
        config: Of the same model.
        quantized: The matrices to multiply in int8 instead, by their names in `weights` (`wte.weight`, [E, V] here,
            is that of the embedding and of the output layer). The other matmuls stay float32.
        eos_token_id: The token that ends an answer.
        float16: Multiply in float16 and keep keys and values in it. Residual sums, layer norms, softmax and logits stay
            float32: GPT-2's residuals have channels that float16 would round away.

    Raises:
        InvalidInputError: The runtime does not compute a model of this configuration.
        ParityError: The weights do not fit the configuration.
    """
    return _DecoderBuilder(weights, config, quantized or {}, eos_token_id=eos_token_id, float16=float16).checked_model()


class _DecoderBuilder(GPT2Builder):
    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: GPT2Config,
        quantized: Mapping[str, QuantizedWeight],
        *,
        eos_token_id: int,
        float16: bool,
    ) -> None:
        dtype = "float16" if float16 else "float32"
        super().__init__(weights, config, quantized, eos_token_id=eos_token_id, cache_dtype=dtype)
        self.float16 = float16
        self.heads, self.head_size = self.layout.heads, self.layout.head_size

    def build(self) -> onnx.ModelProto:
        self._prepare_indices()
        residual = self._input()
        for layer in range(self.config.n_layer):
            residual = self._layer(layer, residual, is_last=layer == self.config.n_layer - 1)
        self._choice(self._logits(self._layer_norm("ln_f", residual)))
        layout = self.layout
        return self.finish(decoder_inputs(layout), decoder_outputs(layout, self.config.vocab_size))

    def matmul_weight(self, name: str) -> str:
        """A weight in the dtype of the matmuls."""
        self.weight(name)
        if self.float16:
            if np.abs(self.weights[name]).max() > np.finfo(np.float16).max:
                raise ParityError(f"the weight {name!r} is too large for float16; use another precision")
            self.initializers[name] = self.weights[name].astype(np.float16)
        return name

    def to_compute_dtype(self, value: str) -> str:
        """Casts float32 to the dtype of the matmuls."""
        return self.op("Cast", value, to=TensorProto.FLOAT16) if self.float16 else value

    def to_float32(self, value: str) -> str:
        """Casts the result of a matmul to float32."""
        return self.op("Cast", value, to=TensorProto.FLOAT) if self.float16 else value

    def _prepare_indices(self) -> None:
        """Computes what all layers share: indices of rows of D, the shapes of attention, and its bias.

        Arithmetic on shapes stays on the CPU; what depends on an input stays on the device.
        """
        each_head = np.arange(self.heads)
        self.constant("head_rows", [-1, self.head_size])
        self.constant("token_rows", [-1, self.config.n_embd])
        self.constant("one", [1])
        # The matmul with c_attn gives each token 3 H rows of size D: the heads of its query, its key, its value.
        token = self.op("Mul", self.op("Unsqueeze", "slot_index", "one"), self.constant("rows", 3 * self.heads))
        for part, name in enumerate(("query", "key", "value")):
            rows = self.constant(f"{name}_heads", (part * self.heads + each_head).reshape(1, -1, 1, 1))
            self.op("Add", token, rows, name=f"{name}_index")
        # In the last layer keys and values come from a matmul of their own, and queries of the output tokens alone.
        token = self.op("Mul", self.op("Unsqueeze", "slot_index", "one"), self.constant("last_rows", 2 * self.heads))
        for part, name in enumerate(("key", "value")):
            self.op(
                "Add",
                token,
                self.constant(f"last_{name}_heads", (part * self.heads + each_head).reshape(1, -1, 1, 1)),
                name=f"last_{name}_index",
            )
        token = self.op(
            "Mul", self.op("Unsqueeze", "output_slot_index", "one"), self.constant("query_rows", self.heads)
        )
        self.op("Add", token, "query_heads", name="last_query_index")
        groups = self.op("Shape", "slot_index", start=0, end=1)
        rows = self.op("Shape", "slot_index", start=1, end=2)
        width = self.op("Shape", "slot_index", start=2)
        prefix = self.op("Shape", f"{PREFIX_NAME}0.key", start=3, end=4)
        own = self.op("Shape", f"{PAST_NAME}0.key", start=3, end=4)
        heads, size = self.constant("heads", [self.heads]), self.constant("head_size", [self.head_size])
        self.op("Concat", prefix, own, name="key_counts", axis=0)
        self.op("Concat", groups, heads, prefix, size, name="flat_keys", axis=0)
        for name, tokens in (("", width), ("last_", "one")):
            slots = self.op("Mul", rows, tokens)
            self.op("Concat", groups, heads, rows, tokens, size, name=f"{name}query_shape", axis=0)
            self.op("Concat", groups, heads, slots, size, name=f"{name}flat_rows", axis=0)
            self.op("Concat", groups, heads, rows, tokens, prefix, name=f"{name}prefix_scores", axis=0)
            if self.float16:  # rows and tokens in one dimension: cuBLAS takes no arrays of pointers then
                self.op("Concat", groups, heads, "one", slots, prefix, name=f"{name}folded_rows", axis=0)
        if not self.float16:  # in a decode step rows stay apart (`_attention`)
            is_long = self.op("Min", self.op("Sub", width, "one"), "one")
            slots = self.op("Mul", rows, width)
            folded = self.op("Add", "one", self.op("Mul", is_long, self.op("Sub", slots, "one")))
            self.op("Concat", groups, heads, self.op("Div", slots, folded), folded, prefix, name="folded_rows", axis=0)
        self._prepare_bias(groups, rows, width, prefix, own)

    def _prepare_bias(self, groups: str, rows: str, width: str, prefix: str, own: str) -> None:
        """`attention_bias` [G, 1, R, T, P + C]: 0 where a token attends to a key, else `LOWEST`."""
        self.constant("zero", [0])
        # Columns come from a weight: ONNX Runtime would compute a Range of shapes on the CPU, and copy it.
        columns = self.constant("columns", np.arange(2 * aligned(self.config.n_positions) + 8 * ALIGNMENT))
        prefix_columns, own_columns, new_columns = (
            self.op("Slice", columns, "zero", count) for count in (prefix, own, width)
        )
        for name, axes in (("prefix", [1, 2, 3, 4]), ("row", [1, 3, 4]), ("group", [1, 2]), ("token", [1])):
            self.constant(f"{name}_axes", axes)
        length = self.op("Unsqueeze", "prefix_lengths", "prefix_axes")  # [G, 1, 1, 1, 1]
        start = self.op("Unsqueeze", "suffix_starts", "row_axes")  # [G, 1, R, 1, 1]
        written = self.op("Add", self.op("Unsqueeze", "write_index", "one"), new_columns)  # [G, T]
        written = self.op("Unsqueeze", self.op("Unsqueeze", written, "group_axes"), self.constant("last_axis", [4]))
        grid = self.op("Concat", groups, "one", rows, width, prefix, axis=0)
        sees_prefix = self.op("Expand", self.op("Less", prefix_columns, length), grid)
        sees_own = self.op(
            "And", self.op("GreaterOrEqual", own_columns, start), self.op("LessOrEqual", own_columns, written)
        )
        sees = self.op("Concat", sees_prefix, sees_own, axis=-1)
        shown, hidden = self.constant("shown", 0, np.float32), self.constant("hidden", LOWEST, np.float32)
        self.op("Where", sees, shown, hidden, name="attention_bias")
        self.op(
            "Slice",
            "attention_bias",
            self.constant("last", [-1]),
            self.constant("end", [2**31]),
            self.constant("token_axis", [3]),
            name="last_attention_bias",
        )

    def _layer(self, layer: int, residual: str, *, is_last: bool) -> str:
        name = f"h.{layer}"
        hidden = self._layer_norm(f"{name}.ln_1", residual)
        attention = f"{name}.attn.c_attn"
        if is_last:
            self._split_columns(
                attention, {"query": slice(self.config.n_embd), "key_value": slice(self.config.n_embd, None)}
            )
            rows = self.op("Reshape", self._linear(f"{attention}.key_value", hidden), "head_rows")
            key, value = (self.op("Gather", rows, f"last_{part}_index") for part in ("key", "value"))
            hidden, residual = (self.op("Gather", one, "output_index") for one in (hidden, residual))
            rows = self.op("Reshape", self._linear(f"{attention}.query", hidden), "head_rows")
            query = self.op("Gather", rows, "last_query_index")
        else:
            rows = self.op("Reshape", self._linear(attention, hidden), "head_rows")
            query, key, value = (self.op("Gather", rows, f"{part}_index") for part in ("query", "key", "value"))
        context = self._attention(layer, query, key, value, is_last=is_last)
        residual = self.op("Add", residual, self.to_float32(self._linear(f"{name}.attn.c_proj", context)))
        hidden = self._linear(f"{name}.mlp.c_fc", self._layer_norm(f"{name}.ln_2", residual))
        activation = ACTIVATIONS[self.config.activation_function]
        hidden = self.op(activation.op_type, hidden, domain=activation.domain)
        return self.op("Add", residual, self.to_float32(self._linear(f"{name}.mlp.c_proj", hidden)))

    def _attention(self, layer: int, query: str, key: str, value: str, *, is_last: bool) -> str:
        """Attention of one layer: from queries, keys and values [G, H, R, T, D] to each token's context, [N, E]."""
        grid = "last_" if is_last else ""
        scale = self._attention_scale(layer)
        prefix_key, prefix_value = (f"{PREFIX_NAME}{layer}.{part}" for part in ("key", "value"))
        own_key, own_value = (
            self.op(
                "TensorScatter",
                f"{PAST_NAME}{layer}.{part}",
                new,
                "write_index",
                name=f"{PRESENT_NAME}{layer}.{part}",
                axis=-2,
            )
            for part, new in (("key", key), ("value", value))
        )
        # One matmul per prefix for the scores of all its rows: the keys are the same, and packed only once. With a
        # scale other than 1 it takes the same steps for one row as for many.
        prefix_scores = self.op(
            "FusedMatMul",
            self.op("Reshape", query, f"{grid}flat_rows"),
            self.op("Reshape", prefix_key, "flat_keys", allowzero=1),
            domain=CONTRIB,
            transB=1,
            alpha=scale,
        )
        scores = self.op(
            "Concat",
            self.op("Reshape", prefix_scores, f"{grid}prefix_scores", allowzero=1),
            self.op("FusedMatMul", query, own_key, domain=CONTRIB, transB=1, alpha=scale),
            axis=-1,
        )
        biased = self.op("Add", self.to_float32(scores), f"{grid}attention_bias")
        probabilities = self.to_compute_dtype(self.op("Softmax", biased, axis=-1))
        on_prefix, on_own = f"{probabilities}_prefix", f"{probabilities}_own"
        self.nodes.append(helper.make_node("Split", [probabilities, "key_counts"], [on_prefix, on_own], axis=-1))
        # The same for the context, but in float32 not for single tokens: a matmul of one row takes other steps than one
        # of two, and a sequence's numbers must not depend on whether it has neighbors.
        if self.float16 or not is_last:
            on_prefix = self.op("Reshape", on_prefix, f"{grid}folded_rows", allowzero=1)
        context = self.op("Reshape", self.op("MatMul", on_prefix, prefix_value), f"{grid}query_shape")
        context = self.op("Add", context, self.op("MatMul", on_own, own_value))
        index = "output_context_index" if is_last else "context_index"
        context = self.op("Gather", self.op("Reshape", context, "head_rows"), index)
        return self.op("Reshape", context, "token_rows")

    def _layer_norm(self, name: str, hidden: str) -> str:
        return self.to_compute_dtype(super()._layer_norm(name, hidden))

    def _linear(self, name: str, hidden: str) -> str:
        weight, bias = f"{name}.weight", f"{name}.bias"
        if weight not in self.quantized:
            return self.op("Gemm", hidden, self.matmul_weight(weight), self.matmul_weight(bias))
        self._unpack(weight)
        return self.op("Add", self._quantized_matmul(weight, hidden), self.weight(bias))

    def _unpack(self, name: str) -> None:
        """Makes int8 [K, N] of a packed weight; ONNX Runtime does that once, as it loads the graph."""
        width, columns = self.quantized[name].values.shape
        groups = self.op("Transpose", self.packed(name), perm=[1, 3, 0, 2])
        rows = self.op("Reshape", groups, self.constant(f"{name}.shape", [aligned(width, INT8_GROUP), -1]))
        self.constant("origin", [0, 0])
        self.op("Slice", rows, "origin", self.constant(f"{name}.end", [width, columns]), name=name)

    def _quantized_matmul(self, weight: str, hidden: str) -> str:
        """Multiplies in int8 with one scale per row of `hidden`, so that no row depends on the rest of the batch.

        ONNX Runtime's own dynamic quantization has one scale for the whole tensor, so that an answer depends on what
        else is in the batch (its issues 5672, 7037 and 10111). Integer sums are exact in any order.
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
        result = self.op("MatMulIntegerToFloat", values, weight, "unit", scales, "zero_point", domain=CONTRIB)
        return self.op("Mul", result, self.op("Div", magnitude, "largest"))

    def _embedding(self) -> str:
        if TOKEN_EMBEDDING not in self.quantized:
            return self.to_float32(self.op("Gather", self.matmul_weight(TOKEN_EMBEDDING), "input_ids"))
        self._unpack(TOKEN_EMBEDDING)
        self.initializers[f"{TOKEN_EMBEDDING}.scales"] = self.quantized[TOKEN_EMBEDDING].scales
        rows = self.op("Gather", self.op("Transpose", TOKEN_EMBEDDING, perm=[1, 0]), "input_ids")
        scales = self.op("Unsqueeze", self.op("Gather", f"{TOKEN_EMBEDDING}.scales", "input_ids"), "one")
        return self.unsmoothed(self.op("Mul", self.op("Cast", rows, to=TensorProto.FLOAT), scales))

    def _logits(self, hidden: str) -> str:
        tied = OUTPUT_WEIGHTS not in self.weights
        name = TOKEN_EMBEDDING if tied else OUTPUT_WEIGHTS
        if name not in self.quantized:
            return self.to_float32(self.op("Gemm", hidden, self.matmul_weight(name), transB=1))
        if not tied:
            self._unpack(name)
        return self._quantized_matmul(name, hidden)

    def _choice(self, logits: str) -> None:
        """The log-probabilities, and the most probable token of each row (ReduceMax would need cuDNN on CUDA)."""
        self._logprobs(logits)
        self.nodes.append(helper.make_node("TopK", ["logprobs", "one"], ["token_logprobs", "token_ids"], axis=-1))
