"""Training rows: how examples are tokenised, cut, packed, kept, put in order and padded into batches."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer
from torch.utils.data import Sampler
from transformers import GPT2TokenizerFast

from qa_onnx.config import DEFAULT_MAX_NEW_TOKENS
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import PromptTooLongError
from qa_onnx.text.prompt import encode_answers
from qa_onnx.text.windows import Window, WindowSettings, encode_windows
from training.answers import locate
from training.model import IGNORED

LossOn = Literal["answer", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)
MIN_PACKED_TOKENS = 256
"""Questions of so many tokens are packed behind a passage however short it is."""
ROWS_VERSION = 3
"""To be raised when other rows are made of the same examples: kept rows of other versions are not used."""
NO_ANSWER_WINDOWS = 2
POOL_BATCHES = 50


def target_answer(example: Example) -> GoldAnswer | None:
    """The answer to train on: the one most annotators gave; None where there is none.

    Among equals one that occurs in the passage comes first. Such an answer is in the passage's own characters
    (`locate`), whatever each annotator wrote.
    """
    found = [(locate(example.context, answer.text, answer.start), answer) for answer in example.answers]
    counts = Counter((located or given).text for located, given in found)
    best = max(found, key=lambda pair: (counts[(pair[0] or pair[1]).text], pair[0] is not None), default=(None, None))
    return best[0] or best[1]


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How examples become rows.

    Attributes:
        loss_on: `answer` labels the answer and its end-of-text, `all` every token.
        text_loss_share: Share of the other tokens, drawn once for each row, that `answer` labels, too, as in
            language-model training.
        max_positions: Maximum number of tokens of prompt and answer together.
        windows: Size and overlap of the windows in which `qa_onnx` reads passages that are too long.
        no_answer_windows: Of the windows without the answer so many are kept for each with it, drawn by `seed`, so that
            those of a long document do not outweigh the answers; of a question without an answer so many, at least one.
        seed: See `no_answer_windows`.
        packing: One row for several questions of one passage (see `Collator`).
    """

    loss_on: LossOn = "answer"
    text_loss_share: float = 0.0
    max_positions: int = 1024
    windows: WindowSettings = field(default_factory=WindowSettings)
    no_answer_windows: int = NO_ANSWER_WINDOWS
    seed: int = 0
    packing: bool = False


def tokenize(examples: Sequence[Example], tokenizer: GPT2TokenizerFast, settings: RowSettings) -> Dataset:
    """Makes rows of examples, one for each window of a passage and each question, or all questions packed.

    A row is the passage, then the question, the answer and the end-of-text; without an answer the end-of-text follows
    at once. So it does in windows that the answer is not in, of which some are kept (`RowSettings`). An answer that
    does not stand in its passage is trained on where the passage is one window. A packed row has several questions
    with their answers, one behind the other.

    Args:
        examples: However many gold answers they have, one is trained on (`target_answer`).
        tokenizer: From `training.model.load_tokenizer`.
        settings: How.

    Returns:
        `input_ids` and `labels` (`IGNORED` where a token does not count), `length`, how many tokens they are,
        `passage_tokens`, how many of them are the passage, `question_tokens`, how many each question has with its
        answer, `windows`, how many of the questions are asked about a part of a passage, and `left_out`, how many
        windows of theirs without an answer were not kept.

    Raises:
        PromptTooLongError: A question or an answer leaves no room for a window, or an answer is in none of several.
    """
    bpe = tokenizer.backend_tokenizer
    order: Sequence[int] = range(len(examples))
    if settings.packing:  # questions of one passage side by side, wherever they stood
        first: dict[str, int] = {}
        for index, example in enumerate(examples):
            first.setdefault(example.context, index)
        order = sorted(order, key=lambda index: first[examples[index].context])

    def make_rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [examples[index] for index in batch["index"]]
        try:
            windows = _windows(chosen, bpe, settings)
        except PromptTooLongError as error:
            problems = (too_long(example, tokenizer, settings) for example in chosen)
            raise PromptTooLongError(next(filter(None, problems))) from error
        asked = []
        for example, parts in zip(chosen, windows, strict=True):
            kept = _select_windows(example, [bool(answer_ids) for _, answer_ids in parts], settings)
            left_out = len(parts) - len(kept)
            for prompt, answer_ids in (parts[index] for index in kept):
                closed = [*answer_ids, tokenizer.eos_token_id]
                asked.append(TokenizedQuestion(prompt, closed, is_window=len(parts) > 1, left_out=left_out))
                left_out = 0
        rows = [_row(row, settings) for row in (_pack(asked) if settings.packing else ([one] for one in asked))]
        return {name: [row[name] for row in rows] for name in rows[0]}

    index = Dataset.from_dict({"index": list(order)})
    return index.map(make_rows, batched=True, remove_columns=["index"], desc="tokenising")


def too_long(example: Example, tokenizer: GPT2TokenizerFast, settings: RowSettings) -> str | None:
    """What is wrong with an example that no window holds with its answer; None where one does."""
    try:
        _windows([example], tokenizer.backend_tokenizer, settings)
    except PromptTooLongError as error:
        return str(error).replace("question 0 ", f"question {example.id} ")
    return None


def cached_rows(
    examples: Sequence[Example], tokenizer: GPT2TokenizerFast, settings: RowSettings, *, cache_dir: Path | None = None
) -> Dataset:
    """Makes rows as `tokenize` does, or takes those that were made before of the same examples, tokenizer and settings.

    Args:
        examples: See `tokenize`.
        tokenizer: See `tokenize`.
        settings: See `tokenize`.
        cache_dir: Where rows are kept, as Arrow files; None is `qa_onnx` in the cache of `datasets`.
    """
    directory = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "qa_onnx"
    digest = hashlib.sha256(json.dumps([ROWS_VERSION, asdict(settings)]).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for example in examples:
        digest.update(json.dumps([example.context, example.question, *map(asdict, example.answers)]).encode())
    kept = directory / digest.hexdigest()
    if not kept.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=directory, prefix="unfinished-"))
        try:
            tokenize(examples, tokenizer, settings).save_to_disk(made)
            if not kept.is_dir():  # another process may have been faster
                made.rename(kept)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return load_from_disk(str(kept))


@dataclass(frozen=True)
class TokenizedQuestion:
    """A question with its answer and end-of-text, about a passage or a window of one.

    Attributes:
        prompt: Of the question and the passage or window.
        closed: The answer's tokens and the end-of-text.
        is_window: Whether the passage is a part of a longer one.
        left_out: How many windows were not kept; counted at the question's first one.
    """

    prompt: Prompt
    closed: list[int]
    is_window: bool
    left_out: int

    def __len__(self) -> int:
        """Tokens behind the passage."""
        return len(self.prompt.suffix_ids) + len(self.closed)


def _pack(asked: Sequence[TokenizedQuestion]) -> list[list[TokenizedQuestion]]:
    """Puts questions of one passage together, as long as they are not longer than the passage, or than 256 tokens."""
    passages: dict[tuple[int, ...], list[list[TokenizedQuestion]]] = {}
    for question in asked:
        rows = passages.setdefault(tuple(question.prompt.prefix_ids), [[]])
        room = max(MIN_PACKED_TOKENS, len(question.prompt.prefix_ids))
        if rows[-1] and sum(map(len, rows[-1])) + len(question) > room:
            rows.append([])
        rows[-1].append(question)
    return [row for rows in passages.values() for row in rows]


def _row(asked: Sequence[TokenizedQuestion], settings: RowSettings) -> dict[str, Any]:
    prefix_ids = asked[0].prompt.prefix_ids
    input_ids, counts = list(prefix_ids), [False] * len(prefix_ids)
    firsts = []
    for question in asked:
        firsts.append(len(input_ids))
        input_ids += question.prompt.suffix_ids + question.closed
        counts += [False] * len(question.prompt.suffix_ids) + [True] * len(question.closed)
    share = 1.0 if settings.loss_on == "all" else settings.text_loss_share
    if share:
        draw = random.Random(zlib.crc32(repr(input_ids).encode()))
        counts = [counted or draw.random() < share for counted in counts]
        for first in firsts[1:]:  # what stands before a later question's first token is not what it follows
            counts[first] = False
    return {
        "input_ids": input_ids,
        "labels": [token if counted else IGNORED for token, counted in zip(input_ids, counts, strict=True)],
        "length": len(input_ids),
        "passage_tokens": len(prefix_ids),
        "question_tokens": [len(question) for question in asked],
        "windows": sum(question.is_window for question in asked),
        "left_out": sum(question.left_out for question in asked),
    }


def _select_windows(example: Example, has_answer: Sequence[bool], settings: RowSettings) -> list[int]:
    """Which windows of an example are trained on, in their order."""
    answered = [index for index, has in enumerate(has_answer) if has]
    others = [index for index, has in enumerate(has_answer) if not has]
    most = settings.no_answer_windows * len(answered) if answered else max(settings.no_answer_windows, 1)
    draw = random.Random(zlib.crc32(f"{settings.seed} {example.question} {example.context}".encode()))
    return sorted(answered + (draw.sample(others, most) if len(others) > most else others))


def _windows(
    examples: Sequence[Example], bpe: Tokenizer, settings: RowSettings
) -> list[list[tuple[Prompt, list[int]]]]:
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
            max_positions=settings.max_positions,
            max_new_tokens=room,
            settings=replace(settings.windows, stride=max(settings.windows.stride, room)),
        )
        for index, parts in zip(chosen, encoded, strict=True):
            windows[index] = parts
    answered = [
        _add_answers(example, target, answer_ids, parts)
        for example, target, answer_ids, parts in zip(examples, targets, answers, windows, strict=True)
    ]
    for example, prompts in zip(examples, answered, strict=True):
        longest = max(len(prompt) + len(answer_ids) + 1 for prompt, answer_ids in prompts)
        if longest > settings.max_positions:
            raise PromptTooLongError(
                f"question {example.id}: its prompt and answer have {longest} tokens; the model has "
                f"{settings.max_positions} positions. Shorten the question or the answer"
            )
    return answered


def _add_answers(
    example: Example, target: GoldAnswer | None, answer_ids: list[int], windows: Sequence[Window]
) -> list[tuple[Prompt, list[int]]]:
    if target is None:
        return [(window.prompt, []) for window in windows]
    if len(windows) == 1:  # in words of its own, maybe
        return [(windows[0].prompt, answer_ids)]
    start, end = target.start, target.start + len(target.text)
    if start < 0 or not example.context.startswith(target.text, start):
        raise PromptTooLongError(
            f"question {example.id}: its answer stands nowhere in its passage, and in none of that's {len(windows)} "
            "windows; shorten the passage, or give an answer that stands there"
        )
    holds = [window.start <= start and end <= window.start + len(window.text) for window in windows]
    if not any(holds):
        raise PromptTooLongError(
            f"question {example.id}: its answer of {len(answer_ids)} tokens is in none of the windows of its passage "
            "whole; shorten it"
        )
    return [
        (window.prompt, answer_ids if has_answer else []) for window, has_answer in zip(windows, holds, strict=True)
    ]


class LengthGroupedSampler(Sampler[int]):
    """Rows in a random order in which batches hold rows of like length; the longest of all come first.

    So a batch that is too large for the memory shows at the first step. The order follows from seed and epoch alone, so
    that a resumed run and several processes have the same one.
    """

    def __init__(self, lengths: Sequence[int], *, batch_rows: int, seed: int) -> None:
        """Takes the rows' lengths in tokens, and how many rows all processes together take at a step."""
        self.plot_lengths = np.asarray(lengths)
        self._batch_rows = batch_rows
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0; accelerate calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.plot_lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self._seed, self._epoch])
        order = draw.permutation(len(self.plot_lengths))
        pool = POOL_BATCHES * self._batch_rows
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        grouped = np.concatenate([part[np.argsort(-self.plot_lengths[part], kind="stable")] for part in pools])
        batches = [grouped[start : start + self._batch_rows] for start in range(0, len(grouped), self._batch_rows)]
        last = [batches.pop()] if len(batches[-1]) < self._batch_rows else []  # the short one stays the last
        batches = [batches[index] for index in draw.permutation(len(batches))]
        if batches:
            longest = max(range(len(batches)), key=lambda index: int(self.plot_lengths[batches[index]].max()))
            batches.insert(0, batches.pop(longest))
        for batch in batches + last:
            yield from batch.tolist()


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads rows on the right to the longest of their batch, and keeps packed questions apart.

    Each question of a packed row sees the passage and itself, and its positions continue those of the passage, so
    that it computes what it would compute in a row of its own:

        passage     p p p p . . . .      positions 0 1 2 3
        question 1  x x x x q . . .                4 5
                    x x x x q q . .
        question 2  x x x x . . q .                4 5
                    x x x x . . q q

    Attributes:
        pad_token_id: What to pad `input_ids` with.
        packing: Whether the rows are packed.
        pad_to: Pad to so many tokens at least.
    """

    pad_token_id: int
    packing: bool = False
    pad_to: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes `input_ids` and `labels`, int64 [B, T], and an `attention_mask`: int64 [B, T], or bool [B, 1, T, T].

        Packed rows also get `position_ids`, int64 [B, T].
        """
        width = max(self.pad_to, *(len(row["input_ids"]) for row in rows))

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([values + [value] * (width - len(values)) for values in lists])

        input_ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(input_ids, self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        if not self.packing:
            return {**batch, "attention_mask": padded([[1] * len(ids) for ids in input_ids], 0)}
        positions, segments = [], []
        for row in rows:
            passage = row["passage_tokens"]
            positions.append(list(range(passage)))
            segments.append([0] * passage)
            for segment, tokens in enumerate(row["question_tokens"], 1):
                positions[-1] += range(passage, passage + tokens)
                segments[-1] += [segment] * tokens
        segment = padded(segments, -1)
        sees = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        return {
            **batch,
            "position_ids": padded(positions, 0),
            "attention_mask": (sees & torch.ones(width, width, dtype=torch.bool).tril())[:, None],
        }
