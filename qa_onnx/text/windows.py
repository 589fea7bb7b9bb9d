"""Documents of any length: overlapping windows, each of which fits into the model's positions with its question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import PromptTooLongError
from qa_onnx.text.prompt import PASSAGE_TEMPLATE, QUESTION_LABEL, encode, encode_prompts

MIN_WINDOW_TOKENS = 16
RESERVE_STEP = 64
"""What a window leaves to question and answer is a multiple of this, so that questions of like length share windows."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a document with its prompt.

    Attributes:
        start: The character of the document at which the part starts.
        text: The part; the whole document where that fits.
        prompt: It and the question as tokens.
    """

    start: int
    text: str
    prompt: Prompt


def encode_windows(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_positions: int,
    max_new_tokens: int,
    stride: int,
) -> list[list[Window]]:
    """Tokenises prompts, and cuts documents that are too long into windows. Questions and answers are never cut.

    A document is cut where its question and an answer of `max_new_tokens` (of a quarter of the positions at most) would
    not fit behind it.

    Args:
        tokenizer: From `load_tokenizer`, or any that went through `prepare_tokenizer`.
        questions: One question each.
        contexts: The document of each question, in the same order.
        max_positions: How many tokens prompt and answer may have together.
        max_new_tokens: The most tokens of an answer.
        stride: Tokens that neighbouring windows share, though no more than half a window.

    Returns:
        The windows of each question, in the document's order.

    Raises:
        InvalidInputError: As from `encode_prompts`.
        PromptTooLongError: A question leaves no room for a window of `MIN_WINDOW_TOKENS` tokens.
    """
    prompts = encode_prompts(tokenizer, questions, contexts)
    room = min(max_new_tokens, max_positions // 4) - 1  # the last token is not read
    (label,) = encode(tokenizer, [QUESTION_LABEL])
    cut: dict[tuple[str, int], list[tuple[int, str]]] = {}
    windows: list[list[Window]] = []
    for index, (question, context, prompt) in enumerate(zip(questions, contexts, prompts, strict=True)):
        if len(prompt) + room <= max_positions:
            windows.append([Window(start=0, text=context, prompt=prompt)])
            continue
        needed = len(label.ids) + len(prompt.suffix_ids) + room
        budget = max_positions - -(-needed // RESERVE_STEP) * RESERVE_STEP
        if budget < max_positions // 2:
            budget = max_positions - needed
        if budget < MIN_WINDOW_TOKENS:
            raise PromptTooLongError(
                f"question {index} has {len(prompt.suffix_ids)} tokens; with an answer of {room + 1} it leaves "
                f"{max(budget, 0)} of the model's {max_positions} positions to the context, and a window has at least "
                f"{MIN_WINDOW_TOKENS}. Shorten the question, or lower max_new_tokens"
            )
        if (context, budget) not in cut:
            cut[context, budget] = _cut(tokenizer, context, budget, min(stride, budget // 2))
        parts = cut[context, budget]
        encoded = encode_prompts(tokenizer, [question] * len(parts), [text for _, text in parts])
        windows.append(
            [Window(start=start, text=text, prompt=part) for (start, text), part in zip(parts, encoded, strict=True)]
        )
    return windows


def _cut(tokenizer: Tokenizer, context: str, max_tokens: int, stride: int) -> list[tuple[int, str]]:
    """Cuts a document into parts of at most `max_tokens` tokens (with the template's) that share about `stride`.

    Cuts are at the start of words where there are any, so that a part has the document's own tokens.
    """
    label = PASSAGE_TEMPLATE.index("{")
    (encoding,) = encode(tokenizer, [PASSAGE_TEMPLATE.format(context=context)])
    total, offsets = len(encoding.ids), encoding.offsets  # each access makes a new list
    first_characters = [max(first - label, 0) for first, _ in offsets] + [len(context)]
    # A token with a space before its word may count the space or not; a part starts behind it in both cases.
    can_cut = [
        index == 0 or index == total or context[first : first + 1].isspace() or context[first - 1 : first].isspace()
        for index, first in enumerate(first_characters)
    ]
    template = next((index for index, (_, last) in enumerate(offsets) if last > label), 0)
    parts: list[tuple[int, str]] = []
    begin = template
    while True:
        size = max_tokens - template
        while True:
            end = min(begin + size, total)
            end = _back_to_cut(can_cut, begin, end)
            start, stop = first_characters[begin], first_characters[end]
            while start < stop and context[start].isspace():
                start += 1
            text = context[start:stop].rstrip() if stop < len(context) else context[start:stop]
            (encoded,) = encode(tokenizer, [PASSAGE_TEMPLATE.format(context=text)])
            tokens = len(encoded.ids)
            if tokens <= max_tokens:
                break
            size -= tokens - max_tokens  # a word that was cut has other tokens than whole
        if text.strip():
            parts.append((start, text))
        if end == total:
            return parts
        begin = max(_back_to_cut(can_cut, begin, end - stride), begin + 1)


def _back_to_cut(can_cut: Sequence[bool], begin: int, end: int) -> int:
    """The last place up to `end` to cut at, in the last quarter from `begin`; `end` itself where there is none."""
    for index in range(end, begin + (end - begin) * 3 // 4, -1):
        if can_cut[index]:
            return index
    return end
