"""The runtime's graph for processors with kernels (`qa_onnx.kernels`): what `export/decoder.py` computes, faster.

Between the matmuls of the plain graph, values are written to memory and read again many times: norms, scales, biases,
activations, masks, padded grids. Here each of these chains is fused into an operator (domain `qa_onnx`, in
`qa_onnx/kernels/native`):

    Linear       activation(norm(x) @ weight + bias) + residual, rows rounded to the weight's type as they are read
    Unpack       rows of the token embedding, from the packed weight of the output layer
    SharedAttention    attention of packed tokens to shared prefixes and to their sequences' own columns

A layer has five of these operators. In float32, the matmuls are ONNX Runtime's own. There is no grid: attention reads a
table,

    segments int64 [S, 5]    group, row, first packed token, number of tokens, column of the first one

and the cache stores the keys of 16 columns together, transposed, so that a dot product reads them sequentially.
Weights are those of the plain graph, in the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper
from transformers import GPT2Config

from export.gpt2 import ACTIVATIONS, GPT2Builder
from export.weights import BFLOAT16_GROUP, OUTPUT_WEIGHTS, TOKEN_EMBEDDING, QuantizedWeight, pack_weight
from qa_onnx.engine.kv_cache import PAST_NAME, PREFIX_NAME, PRESENT_NAME
from qa_onnx.engine.signature import decoder_inputs, decoder_outputs
from qa_onnx.kernels import DOMAIN


def build_kernel_decoder(
    weights: Mapping[str, np.ndarray],
    config: GPT2Config,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    *,
    eos_token_id: int,
    bfloat16: bool = False,
) -> onnx.ModelProto:
    """Builds the graph; arguments and errors are those of `export.decoder.build_decoder`.

    Args:
        weights: float32 arrays, by name.
        config: Of the same model.
        quantized: The matrices to multiply in int8.
        eos_token_id: The token that ends an answer.
        bfloat16: Multiply the other matrices in bfloat16. Sums, norms, attention and residuals stay float32.
    """
    builder = _KernelBuilder(weights, config, quantized or {}, eos_token_id=eos_token_id, bfloat16=bfloat16)
    return builder.checked_model()


class _KernelBuilder(GPT2Builder):
    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: GPT2Config,
        quantized: Mapping[str, QuantizedWeight],
        *,
        eos_token_id: int,
        bfloat16: bool,
    ) -> None:
        super().__init__(weights, config, quantized, eos_token_id=eos_token_id)
        self.bfloat16 = bfloat16

    def build(self) -> onnx.ModelProto:
        residual = self._input()
        for layer in range(self.config.n_layer):
            residual = self._layer(layer, residual, is_last=layer == self.config.n_layer - 1)
        self._logprobs(self._logits(residual))
        outputs = decoder_outputs(self.layout, self.config.vocab_size, has_kernels=True)
        return self.finish(decoder_inputs(self.layout, has_kernels=True), outputs, DOMAIN)

    def _custom(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(
            helper.make_node(op_type, inputs, outputs, name=f"{outputs[0]}/{op_type}", domain=DOMAIN, **attributes)
        )

    def _kind(self, weight: str) -> str | None:
        """The dtype of a matmul, which ends its operator's name; None for ONNX Runtime's own operator."""
        return "Int8" if weight in self.quantized else "BFloat16" if self.bfloat16 else None

    def packed(self, name: str) -> str:
        if name in self.quantized:
            return super().packed(name)
        matrix = self.weights[name].T if name in (TOKEN_EMBEDDING, OUTPUT_WEIGHTS) else self.weights[name]
        self.used.add(name)
        self.initializers[f"{name}.packed"] = pack_weight(matrix.astype(ml_dtypes.bfloat16), BFLOAT16_GROUP)
        return f"{name}.packed"

    def _multiply(
        self,
        weight: str,
        hidden: str,
        *,
        columns: int,
        bias: str = "",
        norm: str | None = None,
        residual: str = "",
        activation: int = 0,
    ) -> str:
        """`activation(norm(hidden) @ weight + bias) + residual` as one operator."""
        kind = self._kind(weight)
        scale, shift = (self.weight(f"{norm}.weight"), self.weight(f"{norm}.bias")) if norm else ("", "")
        scales = sums = ""
        if kind == "Int8":
            scales, sums = f"{weight}.scales", f"{weight}.sums"
            self.initializers[scales] = self.quantized[weight].scales
            self.initializers[sums] = self.quantized[weight].values.sum(axis=0, dtype=np.int32)
        output = f"Linear_{len(self.nodes)}"
        self._custom(
            f"Linear{kind}",
            [hidden, scale, shift, self.packed(weight), scales, sums, bias, residual],
            [output],
            columns=columns,
            activation=activation,
            epsilon=self.config.layer_norm_epsilon,
        )
        return output

    def _fused(
        self, name: str, hidden: str, *, norm: str | None = None, residual: str = "", activates: bool = False
    ) -> str:
        """A linear layer with norm, activation and residual: one operator, or several in float32."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        if self._kind(weight) is not None:
            number = ACTIVATIONS[self.config.activation_function].kernel if activates else 0
            columns = self.weights[weight].shape[1]
            return self._multiply(
                weight,
                hidden,
                columns=columns,
                bias=self.weight(bias),
                norm=norm,
                residual=residual,
                activation=number,
            )
        if norm is not None:
            hidden = self._layer_norm(norm, hidden)
        hidden = self.op("Gemm", hidden, self.weight(weight), self.weight(bias))
        if activates:
            activation = ACTIVATIONS[self.config.activation_function]
            hidden = self.op(activation.op_type, hidden, domain=activation.domain)
        return self.op("Add", residual, hidden) if residual else hidden

    def _layer(self, layer: int, residual: str, *, is_last: bool) -> str:
        name = f"h.{layer}"
        attention, width = f"{name}.attn.c_attn", self.config.n_embd
        if is_last:  # keys and values of all tokens, queries of those whose next token is wanted
            self._split_columns(attention, {"query": slice(width), "key_value": slice(width, None)})
            key_value = self._fused(f"{attention}.key_value", residual, norm=f"{name}.ln_1")
            residual = self.op("Gather", residual, "output_index")
            query = self._fused(f"{attention}.query", residual, norm=f"{name}.ln_1")
        else:
            query = key_value = self._fused(attention, residual, norm=f"{name}.ln_1")
        context = f"context_{layer}"
        self._custom(
            "SharedAttention",
            [
                *(query, key_value, "segments", "prefix_lengths", "suffix_starts"),
                *(f"{cache}{layer}.{part}" for cache in (PREFIX_NAME, PAST_NAME) for part in ("key", "value")),
                *(["output_index"] if is_last else []),
            ],
            [context, *(f"{PRESENT_NAME}{layer}.{part}" for part in ("key", "value"))],
            key_offset=0 if is_last else width,
            scale=self._attention_scale(layer),
        )
        residual = self._fused(f"{name}.attn.c_proj", context, residual=residual)
        hidden = self._fused(f"{name}.mlp.c_fc", residual, norm=f"{name}.ln_2", activates=True)
        return self._fused(f"{name}.mlp.c_proj", hidden, residual=residual)

    def _embedding(self) -> str:
        kind = self._kind(TOKEN_EMBEDDING)
        if kind is None:
            return self.op("Gather", self.weight(TOKEN_EMBEDDING), "input_ids")
        scales = ""
        if kind == "Int8":
            scales = f"{TOKEN_EMBEDDING}.scales"
            self.initializers[scales] = self.quantized[TOKEN_EMBEDDING].scales
        packed = self.packed(TOKEN_EMBEDDING)
        self._custom(f"Unpack{kind}", ["input_ids", packed, scales], ["token_embeddings"], width=self.config.n_embd)
        return self.unsmoothed("token_embeddings")

    def _logits(self, hidden: str) -> str:
        name = TOKEN_EMBEDDING if OUTPUT_WEIGHTS not in self.weights else OUTPUT_WEIGHTS
        if self._kind(name) is None:
            return self.op("Gemm", self._layer_norm("ln_f", hidden), self.weight(name), transB=1)
        return self._multiply(name, hidden, columns=self.config.vocab_size, norm="ln_f")
