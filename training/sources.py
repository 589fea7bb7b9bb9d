"""Where training examples come from: whatever `qa_onnx` reads, and the generated `sample`; and what was found there."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.reader import Split, read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import InvalidInputError
from training.answers import locate
from training.starter.sample import generate, with_unanswerable

Part = Literal["train", "eval"]
SAMPLES = ("sample", "sample_v2")
MAX_NAMED_ROWS = 5


@dataclass(frozen=True, kw_only=True)
class Source:
    """The examples of one source, and what was found in them.

    Attributes:
        name: As given.
        examples: Its questions, bad rows left out.
        sha256: Of the examples.
        bad_rows: What is wrong with each row that was skipped.
        repaired: Answers that stand elsewhere than `answer_start` says, or in other white space, case or characters.
        absent: Answers that do not stand in their passage. They are trained on where that fits into one window.
    """

    name: str
    examples: tuple[Example, ...]
    sha256: str
    bad_rows: tuple[str, ...] = ()
    repaired: int = 0
    absent: int = 0

    def warnings(self) -> list[str]:
        """What a user has to know, a line each."""
        lines = []
        if self.bad_rows:
            more = len(self.bad_rows) - MAX_NAMED_ROWS
            lines += [f"skipped: {row}" for row in self.bad_rows[:MAX_NAMED_ROWS]]
            lines += [f"skipped: {more} more of {self.name}"] if more > 0 else []
        if self.repaired:
            lines.append(
                f"{self.name}: {self.repaired} answers stand elsewhere than answer_start says, or in other "
                "white space, case or characters; repaired"
            )
        if self.absent:
            lines.append(f"{self.name}: {self.absent} answers do not stand in their passage; trained on as they are")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The source in figures, ready for JSON."""
        return {
            "name": self.name,
            "questions": len(self.examples),
            "passages": len({example.context for example in self.examples}),
            "without_answer": sum(not example.answers for example in self.examples),
            "bad_rows": len(self.bad_rows),
            "answers_repaired": self.repaired,
            "answers_absent": self.absent,
            "sha256": self.sha256,
        }


def load_source(
    name: str, part: Part, *, columns: Mapping[str, str] | None = None, skip_bad_rows: bool = False
) -> Source:
    """Loads the examples of one source.

    Args:
        name: `sample` or `sample_v2` (generated), or whatever `qa_onnx.data.reader.read_examples` reads; of the hub and
            of folders with splits it is `train` or `validation`.
        part: Which of the two splits.
        columns: What the fields of a row are called, where not by their own names.
        skip_bad_rows: Leave bad rows out, instead of ending with the first.

    Raises:
        InvalidInputError: A bad row, no row at all, a file that cannot be read, a hub that cannot be reached.
    """
    bad_rows: list[str] = []
    if name in SAMPLES:
        data = generate("train" if part == "train" else "heldout")
        examples = parse_squad(data if name == "sample" else with_unanswerable(data), source=name)
    else:
        split: Split = "train" if part == "train" else "validation"
        # Several questions of one id are no harm in training; in evaluation answers are kept by id.
        examples = read_examples(name, split=split, columns=columns, skipped=bad_rows, unique_ids=part == "eval")
    if bad_rows and not skip_bad_rows:
        others = f" ({len(bad_rows)} of {len(bad_rows) + len(examples)} rows are bad)" if len(bad_rows) > 1 else ""
        raise InvalidInputError(f"{bad_rows[0]}{others}. Mend it, or leave such rows out with --skip-bad-rows")
    checked = [_checked(example) for example in examples]
    kept = tuple(example for example, _, _ in checked)
    return Source(
        name=name,
        examples=kept,
        sha256=sha256_of(kept),
        bad_rows=tuple(bad_rows),
        repaired=sum(repaired for _, repaired, _ in checked),
        absent=sum(absent for _, _, absent in checked),
    )


def sha256_of(examples: Iterable[Example]) -> str:
    """The SHA-256 of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example)).encode())
    return digest.hexdigest()


def weighted(source: Source, weight: float, seed: int) -> list[Example]:
    """The source's examples `weight` times over; a fraction is a random part, in the source's order."""
    times, fraction = divmod(weight, 1.0)
    part = round(fraction * len(source.examples))
    chosen = sorted(random.Random(seed).sample(range(len(source.examples)), part))
    return [*source.examples * int(times), *(source.examples[index] for index in chosen)]


def _checked(example: Example) -> tuple[Example, int, int]:
    """The example with its answers where they stand, how many were elsewhere, and how many stand nowhere.

    Their texts stay as they are, for evaluation.
    """
    answers: list[GoldAnswer] = []
    repaired = absent = 0
    for answer in example.answers:
        is_right = answer.start >= 0 and example.context.startswith(answer.text, answer.start)
        found = None if is_right else locate(example.context, answer.text, answer.start)
        repaired += found is not None
        absent += found is None and not is_right
        answers.append(answer if found is None else replace(answer, start=found.start))
    return replace(example, answers=tuple(answers)), repaired, absent
