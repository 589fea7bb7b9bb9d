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
from qa_onnx.prompt import Prompt, encode_answers, encode_prompts, fit_prompt
from qa_onnx.squad import Example, GoldAnswer, parse_squad, read_squad
from training.model import IGNORED
from training.starter.sample import generate

Part = Literal["train", "eval"]
LossOn = Literal["answer", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
HUB_SQUAD = "rajpurkar/squad"


def load_examples(source: str, part: Part) -> list[Example]:
    """Loads the examples of `squad` (from the hub), `sample` (generated) or a SQuAD JSON file.

    Raises:
        InvalidInputError: The file is not in SQuAD's format, or the hub cannot be reached.
    """
    if source == "sample":
        split: Literal["train", "heldout"] = "train" if part == "train" else "heldout"
        return parse_squad(generate(split), source="sample")
    if source != "squad":
        return read_squad(source)
    try:
        rows = load_dataset(HUB_SQUAD, split="train" if part == "train" else "validation")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"'squad' could not be loaded from the hub ({error}). Check the connection, or give a SQuAD JSON file, "
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
    """Makes one row of each example: `input_ids`, `labels` and `length`.

    A row is the prompt, the answer and the end-of-text; without an answer the end-of-text follows at once.

    Args:
        examples: One row is made of each, however many gold answers it has.
        tokenizer: From `training.model.load_tokenizer`.
        loss_on: `answer` labels the answer and its end-of-text, `all` every token.
        max_positions: Longer rows lose passage, never question or answer.
    """
    bpe = tokenizer.backend_tokenizer

    def rows_of(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [examples[index] for index in batch["index"]]
        targets = [target_answer(example) for example in chosen]
        answers = encode_answers(bpe, [target.text if target else "" for target in targets])
        prompts = encode_prompts(bpe, [example.question for example in chosen], [example.context for example in chosen])
        rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        for example, target, prompt, answer_ids in zip(chosen, targets, prompts, answers, strict=True):
            closed = [*answer_ids, tokenizer.eos_token_id]
            room = max_positions - len(closed)
            prompt_ids = (prompt if len(prompt) <= room else _cut(bpe, example, target, room)).ids
            rows["input_ids"].append(prompt_ids + closed)
            rows["labels"].append((prompt_ids if loss_on == "all" else [IGNORED] * len(prompt_ids)) + closed)
            rows["length"].append(len(prompt_ids) + len(closed))
        return rows

    index = Dataset.from_dict({"index": range(len(examples))})
    return index.map(rows_of, batched=True, remove_columns=["index"], desc="tokenising")


def _cut(bpe: Tokenizer, example: Example, target: GoldAnswer | None, max_tokens: int) -> Prompt:
    keep = (0, 0)
    if target is not None:
        stands_there = example.context.startswith(target.text, target.start)
        start = target.start if stands_there else max(example.context.find(target.text), 0)
        keep = (start, start + len(target.text))
    try:
        return fit_prompt(bpe, example.question, example.context, keep=keep, max_tokens=max_tokens)
    except PromptTooLongError as error:
        raise PromptTooLongError(f"question {example.id}: {error}") from error


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
