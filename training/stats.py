"""What a run will train on, in figures and examples: `--dry-run` and the report show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as compute
from datasets import Dataset
from transformers import GPT2TokenizerFast

from training.data import LengthGroupedSampler
from training.dataset import TrainingData
from training.model import IGNORED
from training.settings import FinetuneConfig
from training.sources import Source

HISTOGRAM_STEPS: tuple[int, ...] = tuple(factor * 10**power for power in range(5) for factor in (1, 2, 5))
MAX_CLASSES, BAR_WIDTH = 30, 40
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class DatasetStats:
    """The training rows in figures.

    Attributes:
        rows: Number of rows.
        questions: Number of questions in them, one for each window of a passage that was cut.
        windows: Number of questions that are asked about a part of a passage.
        left_out: Number of windows without an answer that were not kept.
        tokens: Number of tokens of all rows, without padding.
        counted: Number of tokens that count in the loss.
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


def compute_stats(rows: Dataset, config: FinetuneConfig) -> DatasetStats:
    """Counts what is in the rows, and what padding an epoch of one process's batches adds."""
    lengths = list(rows["length"])
    step = histogram_step(lengths)
    labels = compute.list_flatten(rows.with_format("arrow")["labels"][:])
    return DatasetStats(
        rows=len(rows),
        questions=sum(len(tokens) for tokens in rows["question_tokens"]),
        windows=sum(rows["windows"]),
        left_out=sum(rows["left_out"]),
        tokens=sum(lengths),
        counted=compute.sum(compute.not_equal(labels, IGNORED)).as_py(),
        padding=padding_share(lengths, config=config),
        lengths=count_by_length(lengths, step),
        length_step=step,
    )


def padding_share(lengths: Sequence[int], *, config: FinetuneConfig) -> float:
    """Share of padding in the batches of the first epoch of one process."""
    batch_size, seed, pad_to = config.optimization.batch_size, config.optimization.seed, config.data.pad_to
    order = [lengths[index] for index in LengthGroupedSampler(lengths, batch_rows=batch_size, seed=seed)]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    padded = sum(len(batch) * max(pad_to, *batch) for batch in batches)
    return 1.0 - sum(lengths) / padded


def describe(data: TrainingData, stats: DatasetStats, tokenizer: GPT2TokenizerFast) -> str:
    """The text of `--dry-run`."""
    part = ", without those held out" if data.is_held_out else ""
    lines = [_describe_source(source, part) for source in data.sources] + [_describe_source(data.eval_source)]
    lines += [
        f"rows: {stats.rows} with {stats.questions} questions ({stats.windows} of them about a part of a long passage)"
        f", {stats.tokens} tokens, {stats.counted} of them in the loss; padding: {stats.padding:.1%} of a batch",
        "tokens of a row:",
    ]
    most = max(stats.lengths.values())
    for first, count in stats.lengths.items():
        bar = "=" * round(BAR_WIDTH * count / most)
        lines.append(f"  {first:5}-{first + stats.length_step - 1:<5} {count:7} {bar}")
    for index in range(min(SHOWN, len(data.rows))):
        lines += [f"example {index + 1}, its first question:", *_describe_row(data.rows[index], tokenizer)]
    lines += [
        f"trained on: {data.train_questions} questions, {data.without_answer} of them without an answer, and "
        f"{data.made_without_answer} more without an answer, which were made of them",
        f"windows: of up to {data.windows.window} tokens of a passage, neighbors share {data.windows.stride}; "
        f"{stats.left_out} without an answer left out",
        str(data.overlap),
    ]
    return "\n".join(lines)


def _describe_source(source: Source, part: str = "") -> str:
    figures = source.to_dict()
    return (
        f"{source.name}{part}: {figures['questions']} questions on {figures['passages']} passages, "
        f"{figures['without_answer']} without an answer; bad rows skipped: {figures['bad_rows']}, answers "
        f"repaired: {figures['answers_repaired']}, answers not in their passage: {figures['answers_absent']}"
    )


def _describe_row(row: dict[str, Any], tokenizer: GPT2TokenizerFast) -> list[str]:
    """The text of a row up to its first answer, and which part of it counts in the loss."""
    first = row["passage_tokens"] + row["question_tokens"][0]
    counted = [label for label in row["labels"][row["passage_tokens"] : first] if label != IGNORED]
    decode = tokenizer.backend_tokenizer.decode
    return [
        "  " + decode(row["input_ids"][:first], skip_special_tokens=False).replace("\n", "\n  "),
        f"  in the loss: {decode(counted, skip_special_tokens=False)!r}",
    ]


def histogram_step(values: Sequence[int]) -> int:
    """The least of `HISTOGRAM_STEPS` that puts values into at most `MAX_CLASSES` classes."""
    low, high = min(values), max(values)
    return next(step for step in HISTOGRAM_STEPS if high // step - low // step < MAX_CLASSES)


def count_by_length(values: Sequence[int], step: int) -> dict[int, int]:
    """Counts values in classes of `step`: class's first value to count, gaps included."""
    if not values:
        return {}
    first, last = min(values) // step, max(values) // step
    counts = dict.fromkeys((number * step for number in range(first, last + 1)), 0)
    for value in values:
        counts[value // step * step] += 1
    return counts
