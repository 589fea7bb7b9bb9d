"""How long contexts are read: window and stride, as given or chosen from the passages that are trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenizers import Tokenizer

from qa_onnx.config import DEFAULT_MAX_NEW_TOKENS, DEFAULT_STRIDE, MIN_WINDOW_TOKENS
from qa_onnx.data.example import Example
from qa_onnx.errors import InvalidInputError
from qa_onnx.text.prompt import PASSAGE_TEMPLATE, encode, encode_answers
from qa_onnx.text.windows import WindowSettings
from training.data import target_answer

HELD_SHARE = 0.99
WINDOW_STEP, MIN_WINDOW = 64, 128
QUESTION_ROOM = 96
"""Positions that a chosen window leaves for question and answer. Of SQuAD the longest take 66 tokens together."""


def select_windows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    window: int | None,
    stride: int | None,
    max_positions: int,
    least: int = 0,
) -> WindowSettings:
    """Window and stride of a training: those that are given, or else those that fit its examples.

    Args:
        examples: What is trained on.
        tokenizer: Of the model, prepared by `qa_onnx.text.prompt.prepare_tokenizer`.
        window: In tokens; None chooses one (`choose_window`).
        stride: In tokens; None is `DEFAULT_STRIDE`, or a quarter of the window where that is less.
        max_positions: Maximum number of tokens of prompt and answer together.
        least: The window that the model read before this training: short passages do not make it shorter.

    Raises:
        InvalidInputError: A window or stride that is too small, or a window that leaves no room for an answer.
    """
    if window is None:
        contexts = list(dict.fromkeys(example.context for example in examples))
        passages = encode(tokenizer, [PASSAGE_TEMPLATE.format(context=context) for context in contexts])
        lengths = {context: len(passage) for context, passage in zip(contexts, passages, strict=True)}
        targets = [(example.context, target) for example in examples if (target := target_answer(example)) is not None]
        answers = encode_answers(tokenizer, [target.text for _, target in targets])
        least = max([least, *(2 * len(answer) + WINDOW_STEP for answer in answers)])
        for context, target in targets:  # an answer in other words can only be trained on with the whole passage
            if not context.startswith(target.text, target.start):
                least = max(least, lengths[context])
        window = choose_window(list(lengths.values()), least, max_positions=max_positions)
        if window < MIN_WINDOW_TOKENS:  # so few positions that what does not fit says so
            return WindowSettings()
    settings = WindowSettings(window=window, stride=min(DEFAULT_STRIDE, window // 4) if stride is None else stride)
    room, needed = max_positions - window, min(DEFAULT_MAX_NEW_TOKENS, max_positions // 4)
    if room < needed:
        raise InvalidInputError(
            f"got --window {window}, which leaves {max(room, 0)} of {max_positions} positions for question and answer; "
            f"expected at least {needed}. Take a smaller window, or leave --window out to have one chosen"
        )
    return settings


def choose_window(passages: Sequence[int], least: int, *, max_positions: int) -> int:
    """The window that fits some passages: long enough for nearly all of them, so that few are cut, and not longer.

    A model answers best in windows as long as the passages that it learned from. It is the smallest multiple of
    `WINDOW_STEP` that holds `HELD_SHARE` of the passages, at least `MIN_WINDOW`, and at most what leaves
    `QUESTION_ROOM`, or half of the positions where that is more.

    Args:
        passages: Tokens of each, those of the prompt's `Context:` included.
        least: Tokens that a window has to hold, too: twice the longest answer, so that it is whole in one of
            overlapping windows, and each passage whose answer does not occur in it.
        max_positions: See `select_windows`.
    """
    held = sorted(passages)[math.ceil(HELD_SHARE * len(passages)) - 1]
    wanted = max(held, least, MIN_WINDOW)
    return min(-(-wanted // WINDOW_STEP) * WINDOW_STEP, max(max_positions - QUESTION_ROOM, max_positions // 2))
