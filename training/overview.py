"""What a run will train on, in figures and examples: `--dry-run` and the report show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute as compute
from datasets import Dataset
from transformers import GPT2TokenizerFast

from training.data import LengthGroupedSampler
from training.model import IGNORED
from training.settings import FinetuneConfig
from training.sources import Source

HISTOGRAM_STEPS = tuple(factor * 10**power for power in range(5) for factor in (1, 2, 5))
MAX_CLASSES, BAR_WIDTH = 30, 40
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The training rows in figures.

    Attributes:
        rows: How many there are.
        questions: How many questions stand in them, one for each window of a passage that was cut.
        windows: How many of these are asked about a part of a passage.
        left_out: How many windows without an answer were not kept.
        tokens: Of all rows, padding left out.
        counted: How many of them count in the loss.
        padding: Share of the tokens of an epoch's batches that is padding.
        lengths: First length of a class of `length_step` tokens to how many rows are in it.
        length_step: Lengths in a class; so many that there are 12 to 30 classes where lengths differ as much.
    """

    rows: int
    questions: int
    windows: int
    left_out: int
    tokens: int
    counted: int
    padding: float
    lengths: dict[int, int]
    length_step: int


def overview_of(rows: Dataset, config: FinetuneConfig) -> Overview:
    """Counts what stands in the rows, and what padding an epoch of one process's batches adds."""
    lengths = list(rows["length"])
    step = histogram_step(lengths)
    labels = compute.list_flatten(rows.with_format("arrow")["labels"][:])
    return Overview(
        rows=len(rows),
        questions=sum(len(tokens) for tokens in rows["question_tokens"]),
        windows=sum(rows["windows"]),
        left_out=sum(rows["left_out"]),
        tokens=sum(lengths),
        counted=compute.sum(compute.not_equal(labels, IGNORED)).as_py(),
        padding=padding_share(lengths, batch_size=config.batch_size, pad_to=config.pad_to, seed=config.seed),
        lengths=by_length(lengths, step),
        length_step=step,
    )


def padding_share(lengths: Sequence[int], *, batch_size: int, pad_to: int, seed: int) -> float:
    """Share of padding in the batches of the first epoch."""
    order = [lengths[index] for index in LengthGroupedSampler(lengths, batch_rows=batch_size, seed=seed)]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    padded = sum(len(batch) * max(pad_to, *batch) for batch in batches)
    return 1.0 - sum(lengths) / padded


def describe(sources: Sequence[Source], rows: Dataset, found: Overview, tokenizer: GPT2TokenizerFast) -> str:
    """The text of `--dry-run`."""
    lines = []
    for source in sources:
        figures = source.to_dict()
        lines.append(
            f"{source.name}: {figures['questions']} questions on {figures['passages']} passages, "
            f"{figures['without_answer']} without an answer; bad rows skipped: {figures['bad_rows']}, answers "
            f"repaired: {figures['answers_repaired']}, answers not in their passage: {figures['answers_absent']}"
        )
    lines.append(
        f"rows: {found.rows} with {found.questions} questions ({found.windows} of them about a part of a long passage)"
        f", {found.tokens} tokens, {found.counted} of them in the loss; padding: {found.padding:.1%} of a batch"
    )
    lines.append("tokens of a row:")
    most = max(found.lengths.values())
    for first, count in found.lengths.items():
        bar = "=" * round(BAR_WIDTH * count / most)
        lines.append(f"  {first:5}-{first + found.length_step - 1:<5} {count:7} {bar}")
    for index in range(min(SHOWN, len(rows))):
        row = rows[index]
        first = row["passage_tokens"] + row["question_tokens"][0]
        counted = [label for label in row["labels"][row["passage_tokens"] : first] if label != IGNORED]
        decode = tokenizer.backend_tokenizer.decode
        lines += [
            f"example {index + 1}, its first question:",
            "  " + decode(row["input_ids"][:first], skip_special_tokens=False).replace("\n", "\n  "),
            f"  in the loss: {decode(counted, skip_special_tokens=False)!r}",
        ]
    return "\n".join(lines)


def histogram_step(values: Sequence[int]) -> int:
    """The least of `HISTOGRAM_STEPS` by which values are in at most `MAX_CLASSES` classes."""
    return next(step for step in HISTOGRAM_STEPS if max(values) // step - min(values) // step < MAX_CLASSES)


def by_length(values: Sequence[int], step: int) -> dict[int, int]:
    """Counts values in classes of `step`: class's first value to count, gaps included."""
    if not values:
        return {}
    first, last = min(values) // step, max(values) // step
    counts = dict.fromkeys((number * step for number in range(first, last + 1)), 0)
    for value in values:
        counts[value // step * step] += 1
    return counts
