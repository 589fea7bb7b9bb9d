"""Questions that are not trained on: held out by passage, and told from others that the training data has, too."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qa_onnx.data.example import Example
from qa_onnx.data.pairs import normalized
from qa_onnx.errors import InvalidInputError
from training.sources import Source, hash_examples

DEFAULT_EVAL = "10%"
HELDOUT_NAME = "heldout.jsonl"
PERCENTAGE = re.compile(r"\d+(?:\.\d+)?|\.\d+")


def parse_share(given: str) -> float | None:
    """The share that `--eval 10%` asks for, from 0 to 1; None where it names a source.

    A text that ends with `%` and has no directory in it is a percentage; a file of such a name is `./10%`.

    Raises:
        InvalidInputError: It ends with `%` and is no percentage between 0 and 100.
    """
    if not given.strip().endswith("%") or "/" in given:
        return None
    number = given.strip().removesuffix("%").strip()
    share = float(number) / 100 if PERCENTAGE.fullmatch(number) else 0.0
    if not 0 < share < 1:
        raise InvalidInputError(
            f"got --eval {given}; expected a percentage of the questions above 0 % and below 100 %, such as "
            f"{DEFAULT_EVAL}, or a source; a file of that name is ./{given.strip()}"
        )
    return share


def hold_out(sources: Sequence[Source], given: str, *, seed: int) -> tuple[list[Source], Source]:
    """Parts the questions of some sources by passage: all questions on a passage are on one side.

    Passages are the same where they differ in white space and case only. Which ones are held out follows from them and
    the seed, not from the order of rows: as many as are needed for the share of the questions, at least one, not all.

    Args:
        sources: Of training questions.
        given: The percentage, as of `--eval`.
        seed: Of the choice.

    Returns:
        The sources without the questions held out, of which one may have none left, and a source of these. Their ids
        are made unique.

    Raises:
        InvalidInputError: All questions are on one passage.
    """
    share = parse_share(given)
    assert share is not None, "the caller has checked it"
    counts = Counter(normalized(example.context) for source in sources for example in source.examples)
    total = counts.total()
    if len(counts) < 2:
        raise InvalidInputError(
            f"--eval {given} holds out by passage, and all {total} questions are on one passage; expected at least two "
            "passages, or a source of other questions, --eval FILE"
        )
    order = sorted(counts, key=lambda passage: hashlib.sha256(f"{seed} {passage}".encode()).digest())
    held: set[str] = set()
    questions = 0
    for passage in order[:-1]:
        if held and questions >= share * total:
            break
        held.add(passage)
        questions += counts[passage]
    trained: list[Source] = []
    kept: list[Example] = []
    for source in sources:
        examples: list[Example] = []
        for example in source.examples:
            (kept if normalized(example.context) in held else examples).append(example)
        trained.append(replace(source, examples=tuple(examples), sha256=hash_examples(examples)))
    heldout = _with_unique_ids(kept)
    return trained, Source(
        name=f"{given.strip()} of the questions, held out by passage", examples=heldout, sha256=hash_examples(heldout)
    )


def to_json_lines(examples: Sequence[Example]) -> str:
    """Examples as flat rows of JSON lines, which `qa_onnx.data.reader.read_examples` reads as the same examples."""
    rows = [
        {
            "id": example.id,
            "title": example.title,
            "context": example.context,
            "question": example.question,
            "answers": [answer.text for answer in example.answers],
            "answer_start": [answer.start for answer in example.answers],
        }
        for example in examples
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What questions to evaluate share with the training data, compared by text, not by id.

    Attributes:
        total: Questions to evaluate.
        same_question: How many of them are trained on, about the same passage.
        same_passage: How many others are about a passage that is trained on.
    """

    total: int
    same_question: int
    same_passage: int

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.same_question or self.same_passage)

    def __str__(self) -> str:
        """A sentence for the console, the report and the model card."""
        if not self:
            return f"None of the {self.total} questions to evaluate is about a passage that is trained on."
        return (
            f"Of the {self.total} questions to evaluate, {self.same_question} are trained on and "
            f"{self.same_passage} others are about passages that are trained on."
        )


def measure_overlap(trained: Sequence[Example], evaluated: Sequence[Example]) -> Overlap:
    """Compares each question to evaluate with those trained on, and its passage with theirs.

    White space and case make no difference.
    """
    passages = {normalized(example.context) for example in trained}
    asked = {(normalized(example.context), normalized(example.question)) for example in trained}
    keys = [(normalized(example.context), normalized(example.question)) for example in evaluated]
    same_question = sum(key in asked for key in keys)
    return Overlap(
        total=len(keys),
        same_question=same_question,
        same_passage=sum(passage in passages for passage, _ in keys) - same_question,
    )


def _with_unique_ids(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples, of which the second of an id is called `ID-2`, and so on."""
    taken = {example.id for example in examples}
    seen: set[str] = set()
    named = []
    for example in examples:
        name, number = example.id, 1
        while name in seen or (number > 1 and name in taken):
            number += 1
            name = f"{example.id}-{number}"
        seen.add(name)
        named.append(replace(example, id=name))
    return tuple(named)
