"""Where training examples come from: whatever `qa_onnx` reads, and the generated `sample`; and what was found there."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.json_text import shown
from qa_onnx.data.reader import Split, read_examples
from qa_onnx.data.rows import MAX_ROWS_NAMED, check_skipped, skipped_lines
from qa_onnx.data.squad import parse_squad
from training.answers import locate
from training.starter.sample import generate, with_unanswerable

Part = Literal["train", "eval"]
SAMPLES = ("sample", "sample_v2")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The examples of one source, and what was found in them.

    Attributes:
        name: As given.
        examples: Its questions, bad rows left out.
        sha256: Of the examples.
        bad_rows: What is wrong with each row that was skipped.
        repaired: Answers that stand elsewhere than `answer_start` says, or in other white space, case or characters.
        absent_answers: Each answer that does not occur in its passage, with its place. They are trained on where the
            passage fits into one window.
    """

    name: str
    examples: tuple[Example, ...]
    sha256: str
    bad_rows: tuple[str, ...] = ()
    repaired: int = 0
    absent_answers: tuple[str, ...] = ()

    @property
    def absent(self) -> int:
        """Number of answers that do not occur in their passage."""
        return len(self.absent_answers)

    def warnings(self) -> list[str]:
        """What a user has to know, a line each."""
        lines = skipped_lines(self.bad_rows)
        if self.repaired:
            lines.append(
                f"{self.name}: {self.repaired} answers stand elsewhere than answer_start says, or in other "
                "white space, case or characters; repaired"
            )
        if self.absent_answers:
            lines += self.absent_answers[:MAX_ROWS_NAMED]
            lines.append(f"{self.name}: {self.absent} answers do not occur in their passage; trained on as they are")
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
    if not skip_bad_rows:
        check_skipped(bad_rows, len(examples))
    checked = [_repair_answers(example) for example in examples]
    kept = tuple(example for example, _, _ in checked)
    return Source(
        name=name,
        examples=kept,
        sha256=hash_examples(kept),
        bad_rows=tuple(bad_rows),
        repaired=sum(repaired for _, repaired, _ in checked),
        absent_answers=tuple(problem for _, _, absent in checked for problem in absent),
    )


def hash_examples(examples: Iterable[Example]) -> str:
    """The SHA-256 of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        content = asdict(example)
        del content["place"]  # the same data in another file is the same data
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def apply_weight(source: Source, weight: float, seed: int) -> list[Example]:
    """The source's examples `weight` times over; a fraction is a random part, in the source's order."""
    times, fraction = divmod(weight, 1.0)
    part = round(fraction * len(source.examples))
    chosen = sorted(random.Random(seed).sample(range(len(source.examples)), part))
    return [*source.examples * int(times), *(source.examples[index] for index in chosen)]


def _repair_answers(example: Example) -> tuple[Example, int, list[str]]:
    """The example with its answers where they occur, how many were elsewhere, and what is wrong with absent ones.

    Their texts stay as they are, for evaluation.
    """
    answers: list[GoldAnswer] = []
    repaired = 0
    absent: list[str] = []
    for answer in example.answers:
        is_right = answer.start >= 0 and example.context.startswith(answer.text, answer.start)
        found = None if is_right else locate(example.context, answer.text, answer.start)
        repaired += found is not None
        if found is None and not is_right:
            absent.append(f"{example.place}: answer {shown(answer.text)} does not occur in its passage")
        answers.append(answer if found is None else replace(answer, start=found.start))
    return replace(example, answers=tuple(answers)), repaired, absent
