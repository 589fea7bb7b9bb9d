"""What an export starts from: the PyTorch model, its tokenizer and windows, and the questions that it is checked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from export.parity import NEW_TOKENS, random_prompts
from qa_onnx.checkpoint import load_checkpoint
from qa_onnx.checkpoint.windows import read_windows
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_sources
from qa_onnx.engine.sequence import Prompt
from qa_onnx.files import public_name
from qa_onnx.text.prompt import encode_prompts
from qa_onnx.text.windows import WindowSettings

VERIFY_CONTEXTS, VERIFY_QUESTIONS = 64, 256


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        name: Of the model, as it may be published.
        model: float32, on the CPU, in evaluation mode.
        tokenizer: Of the model.
        windows: How the model was trained to read long contexts.
        examples: The questions of `--verify`; may be none.
        examples_name: The names of their files.
    """

    name: str
    model: GPT2LMHeadModel
    tokenizer: GPT2TokenizerFast
    windows: WindowSettings
    examples: list[Example]
    examples_name: str

    @property
    def config(self) -> GPT2Config:
        """The model's configuration."""
        return self.model.config

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def weight_bytes(self) -> int:
        """Size of the model's weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    @property
    def cache_shape(self) -> dict[str, int]:
        """Layers, heads and head size, as `CacheLayout` and the manifest name them."""
        config = self.config
        return {"layers": config.n_layer, "heads": config.n_head, "head_size": config.n_embd // config.n_head}

    def manifest_values(self) -> dict[str, Any]:
        """What the manifest says about the model."""
        return {
            "eos_token_id": self.eos_token_id,
            "max_positions": self.config.n_positions,
            "vocab_size": self.config.vocab_size,
            "source_model": self.name,
            "windows": asdict(self.windows),
            **self.cache_shape,
        }


def load_source(name: str, verify: Sequence[str | Path], columns: Mapping[str, str] | None) -> Source:
    """Loads a model and the questions that it is checked on; arguments are those of `export.to_onnx.export`.

    Raises:
        InvalidInputError: The model or the questions cannot be loaded, or its windows do not fit into the model.
    """
    examples = read_sources(verify, columns=columns) if verify else []
    model, tokenizer = load_checkpoint(name)
    windows = read_windows(name)
    windows.check_fit(model.config.n_positions)
    return Source(
        name=public_name(name),
        model=model,
        tokenizer=tokenizer,
        windows=windows,
        examples=examples,
        examples_name=", ".join(Path(path).name for path in verify),
    )


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What the parity gate and the comparison of precisions run on.

    Attributes:
        tokenizer: The bundle's.
        examples: The questions on the first contexts whose prompts fit into the gate.
        prompts: Of these questions, in their order.
        gate_prompts: Prompts of random tokens, and the first question on each context.
        gate_source: Where `gate_prompts` come from, for the report.
    """

    tokenizer: Tokenizer
    examples: list[Example]
    prompts: list[Prompt]
    gate_prompts: list[Prompt]
    gate_source: str


def choose_checks(source: Source, tokenizer: Tokenizer) -> Checks:
    """Chooses the questions and prompts that a model's graphs are checked on."""
    config = source.config
    contexts = set(list(dict.fromkeys(example.context for example in source.examples))[:VERIFY_CONTEXTS])
    examples = [example for example in source.examples if example.context in contexts][:VERIFY_QUESTIONS]
    questions, passages = [one.question for one in examples], [one.context for one in examples]
    longest = config.n_positions - NEW_TOKENS + 1
    pairs = [
        (example, prompt)
        for example, prompt in zip(examples, encode_prompts(tokenizer, questions, passages), strict=True)
        if len(prompt) <= longest
    ]
    prompts = [prompt for _, prompt in pairs]
    gate_prompts = random_prompts(config.vocab_size, config.n_positions)
    gate_source = f"{len(gate_prompts)} of random tokens"
    if source.examples_name:
        first_on_context = list({tuple(prompt.prefix_ids): prompt for prompt in reversed(prompts)}.values())[::-1]
        gate_prompts += first_on_context
        gate_source += f", {len(first_on_context)} of {source.examples_name}"
    return Checks(
        tokenizer=tokenizer,
        examples=[example for example, _ in pairs],
        prompts=prompts,
        gate_prompts=gate_prompts,
        gate_source=gate_source,
    )
