"""Training rows: where examples come from, how they are tokenised, cut and padded into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from transformers import GPT2TokenizerFast

from qa_onnx.errors import InvalidInputError, PromptTooLongError
from qa_onnx.generation import DEFAULT_MAX_NEW_TOKENS, DEFAULT_STRIDE
from qa_onnx.prompt import encode_answers
from qa_onnx.squad import Example, GoldAnswer, parse_squad, read_squad
from qa_onnx.windows import Window, encode_windows
from training.model import IGNORED
from training.starter.sample import generate, with_unanswerable

Part = Literal["train", "eval"]
LossOn = Literal["answer", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
HUB_DATASETS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}


def load_examples(source: str, part: Part) -> list[Example]:
    """Loads examples: `squad` or `squad_v2` from the hub, `sample` or `sample_v2` (generated), or a SQuAD file.

    Raises:
        InvalidInputError: The file is not in SQuAD's format, or the hub cannot be reached.
    """
    if source in ("sample", "sample_v2"):
        data = generate("train" if part == "train" else "heldout")
        return parse_squad(data if source == "sample" else with_unanswerable(data), source=source)
    if source not in HUB_DATASETS:
        return read_squad(source)
    try:
        rows = load_dataset(HUB_DATASETS[source], split="train" if part == "train" else "validation")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{source!r} could not be loaded from the hub ({error}). Check the connection, or give a SQuAD JSON file, "
            "or 'sample'"
        ) from error
    return [
        Example(
            id=row["id"],
            title=row["title"],
            context=row["context"],
            question=row["question"],
            answers=tuple(
                GoldAnswer(text=text, start=start)
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ),
        )
        for row in rows
    ]


def target_answer(example: Example) -> GoldAnswer | None:
    """The answer to train on: the one most annotators gave, the first among equals; None where there is none."""
    if not example.answers:
        return None
    text, _ = Counter(answer.text for answer in example.answers).most_common(1)[0]
    return next(answer for answer in example.answers if answer.text == text)


def tokenize(
    examples: Sequence[Example], tokenizer: GPT2TokenizerFast, *, loss_on: LossOn, max_positions: int
) -> Dataset:
    """Makes one row of each example, or of each window of a long one: `input_ids`, `labels` and `length`.

    A row is the prompt, the answer and the end-of-text; without an answer the end-of-text follows at once. So it does
    in windows that the answer is not in.

    Args:
        examples: However many gold answers they have, one is trained on (`target_answer`).
        tokenizer: From `training.model.load_tokenizer`.
        loss_on: `answer` labels the answer and its end-of-text, `all` every token.
        max_positions: Passages that are too long are cut into the windows that `qa_onnx` reads them in.

    Raises:
        PromptTooLongError: A question or an answer leaves no room for a window.
    """
    bpe = tokenizer.backend_tokenizer

    def rows_of(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [examples[index] for index in batch["index"]]
        rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        for example, windows in zip(chosen, _windows(chosen, bpe, max_positions), strict=True):
            for prompt_ids, answer_ids in windows:
                closed = [*answer_ids, tokenizer.eos_token_id]
                rows["input_ids"].append(prompt_ids + closed)
                rows["labels"].append((prompt_ids if loss_on == "all" else [IGNORED] * len(prompt_ids)) + closed)
                rows["length"].append(len(prompt_ids) + len(closed))
                if len(prompt_ids) + len(closed) > max_positions:
                    raise PromptTooLongError(
                        f"question {example.id}: its prompt and answer have {len(prompt_ids) + len(closed)} tokens; "
                        f"the model has {max_positions} positions. Shorten the question or the answer"
                    )
        return rows

    index = Dataset.from_dict({"index": range(len(examples))})
    return index.map(rows_of, batched=True, remove_columns=["index"], desc="tokenising")


def _windows(
    examples: Sequence[Example], bpe: Tokenizer, max_positions: int
) -> list[list[tuple[list[int], list[int]]]]:
    """The prompt and the answer of each window of each example; a window without the answer has none."""
    targets = [target_answer(example) for example in examples]
    answers = encode_answers(bpe, [target.text if target else "" for target in targets])
    # Windows leave room for an answer as long as the model may give later, or as this one with its end-of-text.
    rooms = [max(DEFAULT_MAX_NEW_TOKENS, len(answer_ids) + 2) for answer_ids in answers]
    windows: list[list[Window]] = [[] for _ in examples]
    for room in sorted(set(rooms)):
        chosen = [index for index, needed in enumerate(rooms) if needed == room]
        encoded = encode_windows(
            bpe,
            [examples[index].question for index in chosen],
            [examples[index].context for index in chosen],
            max_positions=max_positions,
            max_new_tokens=room,
            stride=max(DEFAULT_STRIDE, room),
        )
        for index, parts in zip(chosen, encoded, strict=True):
            windows[index] = parts
    return [
        _answered(example, target, answer_ids, parts)
        for example, target, answer_ids, parts in zip(examples, targets, answers, windows, strict=True)
    ]


def _answered(
    example: Example, target: GoldAnswer | None, answer_ids: list[int], windows: Sequence[Window]
) -> list[tuple[list[int], list[int]]]:
    if target is None:
        return [(window.prompt.ids, []) for window in windows]
    stands_there = example.context.startswith(target.text, target.start)
    start = target.start if stands_there else example.context.find(target.text)
    if start < 0 or len(windows) == 1:  # in words of its own
        return [(windows[0].prompt.ids, answer_ids)]
    end = start + len(target.text)
    holds = [window.start <= start and end <= window.start + len(window.text) for window in windows]
    if not any(holds):
        raise PromptTooLongError(
            f"question {example.id}: its answer of {len(answer_ids)} tokens is in none of the windows of its passage "
            "whole; shorten it"
        )
    return [
        (window.prompt.ids, answer_ids if has_answer else []) for window, has_answer in zip(windows, holds, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads rows on the right to the longest of their batch."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes `input_ids`, `attention_mask` and `labels`, each int64 [B, T]."""

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            tensors = [torch.tensor(values, dtype=torch.long) for values in lists]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        input_ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(input_ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in input_ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
