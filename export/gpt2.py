"""What the two decoder graphs of a bundle share: GPT-2's weights, its configuration, its inputs and outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from transformers import GPT2Config

from export.graph import CONTRIB, GraphBuilder
from export.weights import (
    INT8_GROUP,
    POSITION_EMBEDDING,
    TOKEN_EMBEDDING,
    QuantizedWeight,
    pack_weight,
)
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.errors import InvalidInputError, ParityError


@dataclass(frozen=True)
class Activation:
    """The operators of an `activation_function` of GPT-2's configuration.

    Attributes:
        kernel: Its number in `qa_onnx/kernels/native/kernels.h`.
        op_type: ONNX Runtime's operator.
        domain: The operator's domain.
    """

    kernel: int
    op_type: str
    domain: str = ""


ACTIVATIONS = {
    "gelu_new": Activation(1, "FastGelu", CONTRIB),
    "gelu_pytorch_tanh": Activation(1, "FastGelu", CONTRIB),
    "gelu": Activation(2, "Gelu"),
    "relu": Activation(3, "Relu"),
}


class GPT2Builder(GraphBuilder, ABC):
    """Builds a decoder graph of GPT-2; a subclass chooses the operators of a layer.

    Attributes:
        weights: float32 arrays, from `export.weights.extract_weights`.
        config: Of the same model.
        quantized: The matrices to multiply in int8, by their names in `weights` (`wte.weight`, [E, V] here, is that of
            the embedding and of the output layer).
        eos_token_id: The token that ends an answer.
        layout: Of the KV cache.
        used: The names of the weights that the graph uses.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        config: GPT2Config,
        quantized: Mapping[str, QuantizedWeight],
        *,
        eos_token_id: int,
        cache_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.weights, self.config, self.quantized = dict(weights), config, dict(quantized)
        self.eos_token_id = eos_token_id
        self.layout = CacheLayout(
            layers=config.n_layer,
            heads=config.n_head,
            head_size=config.n_embd // config.n_head,
            dtype=cache_dtype,
        )
        self.used: set[str] = set()

    @abstractmethod
    def build(self) -> onnx.ModelProto:
        """Adds all nodes; returns the model."""

    @abstractmethod
    def _embedding(self) -> str:
        """The embeddings of the tokens, float32 [N, E]."""

    def checked_model(self) -> onnx.ModelProto:
        """Builds the model, and checks that the runtime can compute it and that it uses all weights.

        Raises:
            InvalidInputError: The runtime does not compute a model of this configuration.
            ParityError: The weights do not fit the configuration.
        """
        given, config = set(self.weights), self.config
        if config.activation_function not in ACTIVATIONS:
            raise InvalidInputError(
                f"the model's activation_function is {config.activation_function!r}; "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )
        if config.add_cross_attention:
            raise InvalidInputError("the model has cross-attention; expected a GPT-2 that reads one text")
        model = self.build()
        unused = sorted(given - self.used)
        if unused:
            raise ParityError(f"the export has weights that the runtime does not use: {', '.join(unused)}")
        return model

    def weight(self, name: str) -> str:
        """A weight in float32."""
        if name not in self.weights:
            raise ParityError(f"the export has no weight {name!r}, which the model's configuration asks for")
        self.used.add(name)
        self.initializers[name] = self.weights[name]
        return name

    def packed(self, name: str) -> str:
        """An int8 weight as it is stored (`pack_weight`)."""
        self.used.add(name)
        self.initializers[f"{name}.packed"] = pack_weight(self.quantized[name].values, INT8_GROUP)
        return f"{name}.packed"

    def _split_columns(self, name: str, parts: Mapping[str, slice]) -> None:
        """Replaces a linear layer by layers of some of its columns, `{name}.{part}`."""
        if f"{name}.weight" not in self.weights or f"{name}.bias" not in self.weights:
            return  # `weight` reports it
        weight, bias = self.weights.pop(f"{name}.weight"), self.weights.pop(f"{name}.bias")
        self.used |= {f"{name}.weight", f"{name}.bias"}
        quantized = self.quantized.pop(f"{name}.weight", None)
        for part, chosen in parts.items():
            self.weights[f"{name}.{part}.weight"] = np.ascontiguousarray(weight[:, chosen])
            self.weights[f"{name}.{part}.bias"] = bias[chosen]
            if quantized is not None:
                self.quantized[f"{name}.{part}.weight"] = quantized.columns(chosen)

    def _attention_scale(self, layer: int) -> float:
        """The factor of a layer's attention scores."""
        scale = self.layout.head_size**-0.5 if self.config.scale_attn_weights else 1.0
        return float(scale / (layer + 1) if self.config.scale_attn_by_inverse_layer_idx else scale)

    def _input(self) -> str:
        """The residual before the first layer: embeddings of tokens and positions."""
        positions = self.op("Gather", self.weight(POSITION_EMBEDDING), "position_ids")
        return self.op("Add", self._embedding(), positions)

    def _layer_norm(self, name: str, hidden: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", hidden, scale, bias, epsilon=self.config.layer_norm_epsilon)

    def unsmoothed(self, rows: str) -> str:
        """Undoes in embeddings the smoothing of the output layer's weight, of which they are rows."""
        smoothing = self.quantized[TOKEN_EMBEDDING].smoothing if TOKEN_EMBEDDING in self.quantized else None
        if smoothing is None:
            return rows
        return self.op("Mul", rows, self.constant(f"{TOKEN_EMBEDDING}.unsmoothed", 1 / smoothing, np.float32))

    def _logprobs(self, logits: str) -> None:
        """Adds the log-probabilities of all tokens, and that of the end-of-text."""
        self.op("LogSoftmax", logits, name="logprobs", axis=-1)
        self.op("Gather", "logprobs", self.constant("eos_token_id", [self.eos_token_id]), name="eos_logprobs", axis=1)
