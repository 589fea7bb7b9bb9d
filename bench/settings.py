"""The settings of a benchmark's runner, and what it returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a runner.

    Attributes:
        directory: Made by `bench.models.prepare`.
        questions, contexts: The texts, one context per question.
        max_new_tokens: Maximum number of tokens of an answer.
        stops: Whether end-of-text ends an answer; else every answer has `max_new_tokens`.
        threads: CPU threads.
        batch_size: Maximum number of questions in a batch of qa_onnx, which it is loaded with.
        prefix_cache: Whether qa_onnx keeps the prefixes of contexts from one request to the next.
    """

    directory: str
    questions: list[str]
    contexts: list[str]
    max_new_tokens: int
    stops: bool
    threads: int
    batch_size: int = 64
    prefix_cache: bool = False

    def to_json(self) -> str:
        """For the command line of a runner."""
        return json.dumps(asdict(self))


Answer = Callable[[Sequence[str], Sequence[str], int], Any]
"""Answers questions with their contexts, in batches of at most the given size.

A function `prepare`, if it has one as an attribute, is called before each request and not timed.
"""
Loaded = tuple[Answer, Callable[[Any], Tokens]]
"""A loaded runner, and what takes the new tokens out of its answers."""
