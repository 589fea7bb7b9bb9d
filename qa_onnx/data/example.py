"""A question with its passage and its gold answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GoldAnswer:
    """A gold answer and the character of the passage at which it starts."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its passage.

    Attributes:
        id: Its name in predictions.
        title: Of its article; may be empty.
        context: The passage.
        question: The question.
        answers: Its gold answers; empty where the passage does not answer it (SQuAD v2.0).
        place: Where it was read, such as `rows.csv: line 7`, for messages; equal examples may have different places.
    """

    id: str
    title: str
    context: str
    question: str
    answers: tuple[GoldAnswer, ...]
    place: str = field(default="", compare=False, repr=False)
