"""Questions without an answer among those to train on: made until they are a share of the questions."""

from __future__ import annotations

from collections.abc import Sequence

from qa_onnx.data.example import Example
from qa_onnx.data.pairs import unanswerable_pairs
from qa_onnx.errors import InvalidInputError


def make_unanswerable(parts: Sequence[Sequence[Example]], share: float, *, seed: int) -> list[Example]:
    """Makes questions without an answer, `share` of each source's number; those that it has already count.

    Each is a question that is asked about another passage of its source (`qa_onnx.data.pairs.unanswerable_pairs`). A
    source where no such pair can be made, such as one of a single passage, is left out where another one gives some.

    Args:
        parts: The questions to train on of each source.
        share: Questions without an answer to have for each question, from 0 to 1.
        seed: Of the pairs.

    Raises:
        InvalidInputError: Some are wanted, and none can be made.
    """
    made: list[Example] = []
    problem: InvalidInputError | None = None
    for examples in parts:
        wanted = round(share * len(examples)) - sum(not example.answers for example in examples)
        try:
            made += unanswerable_pairs(examples, wanted, seed=seed)
        except InvalidInputError as error:
            problem = error
    if problem is not None and not made:
        raise InvalidInputError(f"--no-answer-share {share}: {problem}. Or train without them, --no-answer-share 0")
    return made
