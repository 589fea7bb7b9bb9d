"""What runners of `bench.peers` do with prompts and with the tokens they get for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from bench.settings import Settings
from qa_onnx.engine.sequence import Prompt
from qa_onnx.text.prompt import load_tokenizer

END_OF_TEXT = "<|endoftext|>"


def load_model_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer of the model that is measured."""
    return load_tokenizer(str(Path(settings.directory) / "model" / "tokenizer.json"))


def group_by_prefix(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Indices of prompts with the same context, group after group."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.prefix_ids), []).append(index)
    return list(groups.values())


def cut_at_end(row: list[int], end: int, settings: Settings) -> list[int]:
    """New tokens up to the end-of-text, if that ends an answer."""
    return row[: row.index(end)] if settings.stops and end in row else row
