"""Where an answer occurs in its passage: as it is, or in other white space, case or characters."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from qa_onnx.data.example import GoldAnswer

QUOTES, DOUBLE_QUOTES = "\u2018\u2019\u201a\u201b\u00b4\u2032`", "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
SAME_CHARACTERS = str.maketrans(
    dict.fromkeys(QUOTES, "'") | dict.fromkeys(DOUBLE_QUOTES, '"') | dict.fromkeys(DASHES, "-")
)
"""Quotes and dashes that people and programs write for one another; NFKC leaves them apart."""


def locate(context: str, text: str, start: int) -> GoldAnswer | None:
    """Finds an answer in its passage, without white space around it, as it is trained on.

    It is looked for as it is; then with any white space, Unicode form, quotes and dashes; then, as whole words, in any
    case; then without white space, as tokenized texts have too much of it. Of several places whole words come first,
    then the nearest to `start`.

    Args:
        context: The passage.
        text: The answer.
        start: The character at which it should start; those of other programs may count bytes or UTF-16.

    Returns:
        The passage's own characters and where they start; None where it stands nowhere.
    """
    bare = text.strip()
    leading = len(text) - len(text.lstrip())
    if context.startswith(text, start) and start >= 0:
        return GoldAnswer(text=bare, start=start + leading)
    for place in (start + leading, start, *(() if context.isascii() else _characters(context, start))):
        if place >= 0 and context.startswith(bare, place):
            return GoldAnswer(text=bare, start=place)
    spans = [found.span() for found in re.finditer(re.escape(bare), context)]
    for fold_case, keep_space in ((False, True), (True, True), (True, False)):
        spans = spans or _spans(context, bare, fold_case, keep_space)
    if not spans:
        return None
    first, last = min(spans, key=lambda span: (not _is_whole(context, *span), abs(span[0] - start)))
    return GoldAnswer(text=context[first:last], start=first)


def _characters(context: str, start: int) -> list[int]:
    """The characters that begin at a byte in UTF-8 and at a unit in UTF-16."""
    if not 0 <= start <= 4 * len(context):
        return []
    return [
        len(context.encode(encoding)[: start * size].decode(encoding, errors="ignore"))
        for encoding, size in (("utf-8", 1), ("utf-16-le", 2))
    ]


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether a span neither begins nor ends inside a word."""
    return not any(text[place - 1 : place].isalnum() and text[place : place + 1].isalnum() for place in (start, end))


def _spans(context: str, text: str, fold_case: bool, keep_space: bool) -> list[tuple[int, int]]:
    """Where a normalized text occurs in a normalized passage, as spans of the passage itself."""
    wanted = _normalized(text, fold_case, keep_space)[0].strip()
    if not wanted:
        return []
    normalized, starts, ends = _normalized(context, fold_case, keep_space)
    spans = []
    for found in re.finditer(re.escape(wanted), normalized):
        first, last = found.span()
        begins = first == 0 or starts[first - 1] != starts[first]
        is_apart = last == len(starts) or starts[last - 1] != starts[last]
        span = starts[first], ends[last - 1]
        # `US` is not in `because`; scripts without case are not written in words that white space parts.
        if begins and is_apart and (not fold_case or _is_whole(context, *span)):
            spans.append(span)
    return spans


@lru_cache(maxsize=8)
def _normalized(text: str, fold_case: bool, keep_space: bool) -> tuple[str, list[int], list[int]]:
    """A text in one form, and the first character and the one behind the last that each of its characters is from."""
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    start = 0
    while start < len(text):
        is_space, end = text[start].isspace(), start + 1
        while end < len(text) and (text[end].isspace() if is_space else _continues(text[end])):
            end += 1
        piece = " " * keep_space if is_space else _one_form(text[start:end], fold_case)
        if piece != " " or pieces[-1:] != [" "]:
            starts += [start] * len(piece)
            ends += [end] * len(piece)
            pieces += [piece] if piece else []
        start = end
    return "".join(pieces), starts, ends


def _continues(character: str) -> bool:
    """Whether a character may become one with those before it: accents, vowel signs, and Korean vowels and finals."""
    return character >= "\u0300" and ("\u1160" <= character <= "\u11ff" or unicodedata.category(character)[0] == "M")


def _one_form(characters: str, fold_case: bool) -> str:
    form = unicodedata.normalize("NFKC", characters.translate(SAME_CHARACTERS)).translate(SAME_CHARACTERS)
    if fold_case:
        form = unicodedata.normalize("NFKC", form.casefold())
    return form if form.isascii() else "".join(one for one in form if unicodedata.category(one) != "Cf")
