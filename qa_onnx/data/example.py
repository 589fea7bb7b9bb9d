"""A question with its passage and its gold answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GoldAnswer:
    """A gold answer and the character of the passage at which it starts."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its passage. `answers` is empty where the passage does not answer it (SQuAD v2.0)."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[GoldAnswer, ...]
