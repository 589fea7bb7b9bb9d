"""A checkpoint's `config.json`: the fields that say what a GPT-2 computes, checked; no other field is used."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from qa_onnx.checkpoint.files import CONFIG_NAME, read_json
from qa_onnx.errors import InvalidInputError

MAX_LAYERS, MAX_MASK_BYTES = 1000, 2**33
"""transformers' GPT-2 keeps a causal mask of one byte per pair of positions in each layer."""
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")
"""Of `activation_function`: those that `export.decoder` can build."""
ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")
REFUSED_FIELDS = {
    "add_cross_attention": "it reads a second text",
    "is_encoder_decoder": "it reads a second text",
    "pruned_heads": "some of its attention heads are cut out",
    "quantization_config": "its weights are quantized",
    "compression_config": "its weights are compressed",
    "transformers_weights": "its weights are in another file",
}
"""Fields of a configuration that change what a model computes, and cannot be left out."""
SAME_FIELDS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""transformers' common names of fields of GPT-2."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The fields of a GPT-2's `config.json` that say what it computes, with transformers' names and defaults.

    Raises:
        InvalidInputError: A value is of another type, out of range, or asks for what the runtime does not compute.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise _wrong(name, value, f"a whole number from 1 to {2**31 - 1:,}")
        for name, least, most in (
            ("layer_norm_epsilon", 1e-12, 1.0),
            ("resid_pdrop", 0.0, 0.99),
            ("embd_pdrop", 0.0, 0.99),
            ("attn_pdrop", 0.0, 0.99),
            ("initializer_range", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise _wrong(name, value, f"a number from {least:g} to {most:g}")
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise _wrong(field.name, getattr(self, field.name), "true or false")
        if self.activation_function not in ACTIVATIONS:
            raise _wrong("activation_function", self.activation_function, f"one of {', '.join(ACTIVATIONS)}")
        if self.n_embd % self.n_head:
            raise _wrong("n_head", self.n_head, f"a divisor of n_embd, {self.n_embd}")
        if self.n_layer > MAX_LAYERS:
            raise _wrong("n_layer", self.n_layer, f"at most {MAX_LAYERS}")
        if self.n_layer * self.n_positions**2 > MAX_MASK_BYTES:
            raise _wrong("n_positions", self.n_positions, "fewer; their attention masks would take more than 8 GiB")

    @property
    def attention(self) -> str:
        """The implementation of transformers that computes these settings: `sdpa` ignores all but the usual scaling."""
        is_usual = self.scale_attn_weights and not (
            self.scale_attn_by_inverse_layer_idx or self.reorder_and_upcast_attn
        )
        return "sdpa" if is_usual else "eager"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight by its name without `transformer.`; matrices are stored [in, out]."""
        width, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, width),
            "wpe.weight": (self.n_positions, width),
        }
        for layer in range(self.n_layer):
            for name, rows, columns in (
                ("attn.c_attn", width, 3 * width),
                ("attn.c_proj", width, width),
                ("mlp.c_fc", width, inner),
                ("mlp.c_proj", inner, width),
            ):
                shapes[f"h.{layer}.{name}.weight"] = (rows, columns)
                shapes[f"h.{layer}.{name}.bias"] = (columns,)
            shapes |= {f"h.{layer}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        return shapes | {f"ln_f.{part}": (width,) for part in ("weight", "bias")}


def read_settings(folder: Path) -> ModelSettings:
    """Reads `config.json` as data: the fields of `ModelSettings`, and none of the others.

    Raises:
        InvalidInputError: It is not there, not JSON, or of a model that is not a plain GPT-2.
    """
    config = read_json(folder, CONFIG_NAME)
    if config is None:
        raise InvalidInputError(f"{CONFIG_NAME} is not there; expected a directory that training.finetune wrote")
    if config.get("model_type") != "gpt2":
        raise InvalidInputError(f"it is a {config.get('model_type')!r} model; expected a GPT-2 ('gpt2')")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(name in ARCHITECTURES for name in architectures):
        raise InvalidInputError(
            f"its architectures are {architectures!r:.200}, whose own head or code would be lost; expected "
            f"{ARCHITECTURES[0]!r}, a language model, since answers are generated as text. Fine-tune one of these; or, "
            f"where it computes the same, write that name into {CONFIG_NAME}"
        )
    for name, reason in REFUSED_FIELDS.items():
        if config.get(name):
            raise InvalidInputError(
                f"{CONFIG_NAME} has {name}: {reason}; expected a plain GPT-2 with weights of its own"
            )
    for common, name in SAME_FIELDS.items():
        if common in config and config.setdefault(name, config[common]) != config[common]:
            raise InvalidInputError(
                f"{CONFIG_NAME} has {name} {config[name]!r} and {common} {config[common]!r}, which mean the same; "
                "expected one of them"
            )
    known = {field.name: config[field.name] for field in fields(ModelSettings) if field.name in config}
    missing = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"} - known.keys()
    if missing:
        raise InvalidInputError(f"{CONFIG_NAME} has no {', '.join(sorted(missing))}; expected the sizes of a GPT-2")
    return ModelSettings(**known)


def _wrong(name: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(f"{CONFIG_NAME} has {name} {value!r:.100}; expected {expected}")
