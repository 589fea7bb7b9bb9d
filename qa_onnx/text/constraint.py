"""Constrained decoding of extractive answers: which tokens continue a span of the context.

A byte-level BPE has many ways to spell a text, and spells a word one way after a space and another after a bracket. So
the constraint follows the bytes of the context, not its tokens. With the context `(led by Rollo)` and ` Ro` so far,
the text is at the `|`:

    ( l e d   b y   R o | l l o )        may continue with `l`, `ll`, `llo`, `llo)`, may not end

A span starts where a word starts and ends where one ends. Where few tokens are left, only those are allowed from which
the end of a word can still be reached.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache, cached_property

import numpy as np
from tokenizers import Tokenizer, models

from qa_onnx.errors import InvalidInputError
from qa_onnx.text.prompt import decode, encode

_SAMPLE = " The 7 words,\n Zoë's \ufb01\u00b2"
_BYTES_OF_UTF8 = {*range(0xC0), *range(0xC2, 0xF5)}


def check_byte_level(tokenizer: Tokenizer) -> TokenBytes:
    """Checks that a tokenizer spells text byte by byte, as GPT-2's does: extractive answers follow these bytes.

    Tokens of a SentencePiece, WordPiece or Unigram tokenizer are no bytes, and could not spell a span of a context.

    Returns:
        The bytes of its tokens.

    Raises:
        InvalidInputError: It is not a byte-level BPE, has no tokens for some bytes, or changes the text that it reads.
    """
    steps = (tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    given = f"the tokenizer ({', '.join(type(step).__name__ for step in steps if step is not None)})"
    expected = "expected a byte-level BPE such as GPT-2's. Take a model with such a tokenizer"
    if not isinstance(tokenizer.model, models.BPE):
        raise InvalidInputError(f"{given} does not spell the bytes of a text; {expected}")
    tokens = TokenBytes(tokenizer)
    missing = _BYTES_OF_UTF8 - {spelled[0] for spelled in tokens.bytes_of.values() if len(spelled) == 1}
    if missing:
        raise InvalidInputError(
            f"{given} has no token for {len(missing)} of the 256 bytes, such as {min(missing):#04x}, and would drop "
            f"them from a text; {expected}"
        )
    ids = encode(tokenizer, [_SAMPLE])[0].ids
    spelled, decoded = b"".join(tokens.bytes_of.get(token_id, b"") for token_id in ids), decode(tokenizer, ids)
    if (spelled, decoded) != (_SAMPLE.encode(), _SAMPLE):
        raise InvalidInputError(f"{given} reads {_SAMPLE!r} as {decoded!r}; {expected}")
    return tokens


class TokenBytes:
    """The bytes of every token of a byte-level BPE, and the tokens that a text may begin with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes the tokens that spell text. Added ones, such as the end-of-text, spell none."""
        byte_of = _bytes_of_characters()
        added = tokenizer.get_added_tokens_decoder()
        self.bytes_of: dict[int, bytes] = {
            token_id: bytes(byte_of[character] for character in token)
            for token, token_id in tokenizer.get_vocab().items()
            if token_id not in added and all(character in byte_of for character in token)
        }
        self._ids = {spelled: token_id for token_id, spelled in self.bytes_of.items()}
        self._prefixes = {spelled[:length] for spelled in self._ids for length in range(1, len(spelled))}

    def beginnings(self, text: bytes, start: int = 0) -> list[int]:
        """The tokens that `text` may begin with at `start`, shortest first."""
        found = []
        for end in range(start + 1, len(text) + 1):
            piece = text[start:end]
            if piece in self._ids:
                found.append(self._ids[piece])
            if piece not in self._prefixes:
                break
        return found


class Spans:
    """The spans of one context that may be answers."""

    def __init__(self, context: str, tokens: TokenBytes) -> None:
        """Finds where words start and end in a context."""
        self.context = context
        self._tokens = tokens
        self._starts, self._ends = word_boundaries(context)
        # Nothing may be written behind the last place to end at, so every span that was begun can be ended.
        self._text = context[: max(self._ends, default=0)].encode()
        offsets = np.cumsum([0, *(len(character.encode()) for character in context)]).tolist()
        self._character_at = {offset: index for index, offset in enumerate(offsets)}
        self._start_bytes = [offsets[start] for start in self._starts]
        self._sorted_ends = [offsets[end] for end in self._ends]
        self._end_bytes = frozenset(self._sorted_ends)
        self._tokens_to_end: dict[int, int] = {}
        self._first_ids: dict[int, np.ndarray] = {}
        self._beginnings: dict[int, list[int]] = {}

    def count(self, at_most: int) -> int:
        """How many different texts the spans have; counting stops at `at_most`."""
        texts: set[str] = set()
        for start in self._starts:
            for end in self._ends:
                if end > start:
                    texts.add(self.context[start:end])
                    if len(texts) >= at_most:
                        return at_most
        return len(texts)

    def can_end(self, place: int, tokens: int) -> bool:
        """Whether the end of a word can be reached from a place, as a byte offset, with so many more tokens."""
        if tokens < 0:
            return False
        end = self._sorted_ends[bisect_left(self._sorted_ends, place)]
        return end - place <= tokens or self._distance(place, end) <= tokens

    def _distance(self, place: int, end: int) -> int:
        """The least number of tokens from a place to the end of the word that it is in."""
        known = self._tokens_to_end
        known[end] = 0
        for start in range(end - 1, place - 1, -1):
            if start not in known:
                steps = (len(self._tokens.bytes_of[token]) for token in self.beginnings(start))
                known[start] = 1 + min((known[start + step] for step in steps if start + step <= end), default=end)
        return known[place]

    def beginnings(self, place: int) -> list[int]:
        """The tokens that the text may go on with at a place."""
        if place not in self._beginnings:
            self._beginnings[place] = self._tokens.beginnings(self._text, place)
        return self._beginnings[place]

    def first_ids(self, tokens_left: int) -> np.ndarray:
        """The tokens (int64 [N], ascending) of a space and the beginning of a word, as `SpanConstraint.allowed_ids`."""
        if tokens_left not in self._first_ids:
            self._first_ids[tokens_left] = _sorted_ids(
                token
                for token, places in self._first_tokens.items()
                if any(self._can_begin(token, place, tokens_left - 1) for place in places)
            )
        return self._first_ids[tokens_left]

    def _can_begin(self, token: int, place: int, tokens: int) -> bool:
        """Whether the end of a word can be reached behind a first token: a space alone is no word yet."""
        if len(self._tokens.bytes_of[token]) > 1:
            return self.can_end(place, tokens)
        return any(
            self.can_end(place + len(self._tokens.bytes_of[following]), tokens - 1)
            for following in self.beginnings(place)
        )

    @cached_property
    def _first_tokens(self) -> dict[int, list[int]]:
        """For each token that an answer may begin with, the byte offsets that the text may stand at behind it."""
        after: dict[int, list[int]] = {}
        for start in self._start_bytes:
            text = b" " + self._text[start : start + 128]
            for token in self._tokens.beginnings(text):
                after.setdefault(token, []).append(start - 1 + len(self._tokens.bytes_of[token]))
        return after


class SpanConstraint:
    """The tokens of an answer so far, and where in the context they may be. Answers begin with a space."""

    def __init__(self, spans: Spans) -> None:
        """Has no tokens yet."""
        self._spans = spans
        self._places: list[int] = []
        self._written = -1
        """Bytes behind the space; -1 before the first token."""

    @property
    def may_end(self) -> bool:
        """Whether the tokens so far are a whole span."""
        return self._written > 0 and any(place in self._spans._end_bytes for place in self._places)

    def allowed_ids(self, tokens_left: int) -> np.ndarray:
        """The tokens (int64 [N], ascending) that continue a span which can be ended with the tokens that are left.

        There are none where all of them have to end here, or where no word has so few tokens.
        """
        if self._written < 0:
            return self._spans.first_ids(tokens_left)
        spans = self._spans
        return _sorted_ids(
            token
            for place in self._places
            for token in spans.beginnings(place)
            if spans.can_end(place + len(spans._tokens.bytes_of[token]), tokens_left - 1)
        )

    def append(self, token_id: int) -> None:
        """Takes the next token, one of `allowed_ids`."""
        spans = self._spans
        spelled = spans._tokens.bytes_of[token_id]
        if self._written < 0:
            self._places = spans._first_tokens[token_id]
        else:
            self._places = [place + len(spelled) for place in self._places if spans._text.startswith(spelled, place)]
        self._written += len(spelled)

    def span(self) -> tuple[int, int] | None:
        """Start and end character of the tokens so far, where they occur first; None without a whole character.

        Text that was cut short is cut back to the last end of a word in it, or else to its last whole character.
        """
        if self._written <= 0:
            return None
        spans = self._spans
        ends = [place for place in self._places if place in spans._end_bytes]
        end = min(ends or self._places)
        start = end - self._written
        if not ends:
            inside = range(start + 1, end + 1)
            whole = [place for place in inside if place in spans._end_bytes]
            end = max(whole or [place for place in inside if place in spans._character_at], default=start)
        return (spans._character_at[start], spans._character_at[end]) if end > start else None


def _sorted_ids(token_ids: Iterable[int]) -> np.ndarray:
    return np.array(sorted(set(token_ids)), np.int64)


def word_boundaries(text: str) -> tuple[list[int], list[int]]:
    """Where words start and where they end in a text, as characters.

    Symbols are words of their own, and so are the characters of scripts that put no spaces between words. Combining
    marks, joiners and what they join belong to what stands before them.
    """
    starts, ends = [], []
    kinds = [_kind(character) for character in text]
    before = " "
    for index, kind in enumerate(kinds):
        joined = kind == "m" or (before == kind == "w") or (index > 0 and text[index - 1] == "\N{ZERO WIDTH JOINER}")
        if not joined or before == " ":
            if before != " ":
                ends.append(index)
            if kind != " ":
                starts.append(index)
        before = "w" if kind == "m" and before == "w" else kind
    if before != " ":
        ends.append(len(text))
    return starts, ends


def find_span(text: str, context: str) -> tuple[int, int] | None:
    """Where a text stands first in a context as whole words, or else at all: start and end character."""
    if not text:
        return None
    first = context.find(text)
    if first < 0:
        return None
    start = first
    while start >= 0:
        end = start + len(text)
        if _is_boundary(context, start) and _is_boundary(context, end):
            return start, end
        start = context.find(text, start + 1)
    return first, first + len(text)


def _is_boundary(text: str, index: int) -> bool:
    return index in (0, len(text)) or not (
        _kind(text[index - 1]) == "w" == _kind(text[index]) or _kind(text[index]) == "m"
    )


@cache
def _kind(character: str) -> str:
    """Of a character: `w` part of a word, `s` a word or symbol of its own, `m` a mark on what is before, or a space."""
    if character.isspace():
        return " "
    if character.isascii():
        return "w" if character.isalnum() or character == "_" else "s"
    category = unicodedata.category(character)
    if (
        category[0] == "M"
        or character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    ):
        return "m"
    if category[0] not in "LN":
        return "s"
    spaceless = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
    return "s" if unicodedata.name(character, "").startswith(spaceless) else "w"


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level BPE's tokens stands for (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others: Sequence[int] = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
