"""Questions without an answer, made of questions with one: each is asked about another passage."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qa_onnx.data.example import Example
from qa_onnx.errors import InvalidInputError

SUFFIX = "@other-passage"
"""Of the ids of such questions; a second one on the same question ends with `@other-passage-2`."""


def unanswerable_pairs(examples: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """Pairs questions with passages that do not answer them, for training and for measuring thresholds.

    A question is asked about another passage of the same article (`title`); where the article has no passage that will
    do, or the title is empty, about any other passage of the examples. A passage will do where none of the question's
    gold answers occurs in it, in any case and white space, and where the same question is not asked about it. Questions
    are drawn without replacement, and again, about further passages, once all of them were drawn.

    Args:
        examples: Of one source. Those without answers give passages, and no questions.
        count: How many pairs to make; there are fewer where the examples do not give as many.
        seed: Of the draw. The same examples and seed give the same pairs.

    Returns:
        Examples without answers, in the order in which their questions were drawn, with ids that are unique among
        themselves and the given ones.

    Raises:
        InvalidInputError: No pair can be made: there is one passage only, or no question whose answers are not in all.
    """
    if count <= 0:
        return []
    draw = random.Random(seed)
    passages = _Passages(examples)
    ids = {example.id for example in examples}
    used: set[tuple[str, str]] = set()
    pairs: list[Example] = []
    drawn = [example for example in examples if example.answers]
    while drawn and len(pairs) < count:
        draw.shuffle(drawn)
        paired = []
        for example in drawn:
            if len(pairs) == count:
                break
            question = normalized(example.question)
            for context in passages.others(example, draw):
                if (question, context) not in used:
                    used.add((question, context))
                    pairs.append(_pair(example, context, passages.titles[context], ids))
                    paired.append(example)
                    break
        drawn = paired  # a question that found no passage finds none later
    if not pairs:
        raise InvalidInputError(
            f"got {len(examples)} questions on {len(passages.titles)} different passages; expected at least two "
            "passages, one of them without the answer to a question on the other, to make questions without an answer"
        )
    return pairs


class _Passages:
    """The distinct passages of some examples, all of them and by title, and what is asked about each."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.titles: dict[str, str] = {}
        self._asked: dict[str, set[str]] = {}
        self._by_title: dict[str, list[str]] = {}
        for example in examples:
            if example.context not in self.titles:
                self.titles[example.context] = example.title
                self._by_title.setdefault(example.title, []).append(example.context)
            self._asked.setdefault(example.context, set()).add(normalized(example.question))
        self._all = list(self.titles)
        self._normalized = {context: normalized(context) for context in self._all}

    def others(self, example: Example, draw: random.Random) -> Iterator[str]:
        """The passages that do not answer a question, those of its article first, each group from a drawn place on."""
        answers = [normalized(answer.text) for answer in example.answers]
        question, own = normalized(example.question), self._normalized[example.context]
        article = self._by_title.get(example.title, []) if example.title.strip() else []
        for group in (article, self._all):
            first = draw.randrange(len(group)) if group else 0
            for index in range(len(group)):
                context = group[(first + index) % len(group)]
                text = self._normalized[context]
                is_other = text != own and question not in self._asked[context]
                if is_other and not any(answer in text for answer in answers):
                    yield context


def _pair(example: Example, context: str, title: str, ids: set[str]) -> Example:
    name, number = f"{example.id}{SUFFIX}", 1
    while name in ids:
        number += 1
        name = f"{example.id}{SUFFIX}-{number}"
    ids.add(name)
    return replace(example, id=name, title=title, context=context, answers=())


def normalized(text: str) -> str:
    """A text in the form in which passages and questions are compared: one case, and single spaces."""
    return " ".join(text.split()).casefold()
