"""A context as tokens, and its parts where it is too long: computed once for all questions about it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

from tokenizers import Tokenizer

from qa_onnx.text.prompt import PASSAGE_TEMPLATE, encode, encode_passages

WORD, SENTENCE, PARAGRAPH = 1, 2, 3
SENTENCE_ENDS = tuple(".!?\u3002\uff01\uff1f")
WORD_LETTERS = 6


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a document.

    Attributes:
        start: The character of the document at which it starts.
        text: Its text.
        prefix_ids: Its tokens in a prompt.
        words: Its words (`words_of`).
    """

    start: int
    text: str
    prefix_ids: list[int]
    words: set[str]


class Document:
    """A context.

    Attributes:
        text: Its text.
        prefix_ids: Its tokens in a prompt.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, prefix_ids: list[int]) -> None:
        """Takes what `encode_passages` returned for the text."""
        self._tokenizer = tokenizer
        self.text, self.prefix_ids = text, prefix_ids
        self._parts: dict[tuple[int, int], list[Part]] = {}

    def cut(self, max_tokens: int, stride: int) -> list[Part]:
        """Parts of at most `max_tokens` tokens (with the template's) that share about `stride`."""
        if (max_tokens, stride) not in self._parts:
            found = _cut(self._tokenizer, self.text, max_tokens, stride)
            encoded = encode_passages(self._tokenizer, [text for _, text in found])
            self._parts[max_tokens, stride] = [
                Part(start=start, text=text, prefix_ids=prefix_ids, words=words_of(text))
                for (start, text), prefix_ids in zip(found, encoded, strict=True)
            ]
        return self._parts[max_tokens, stride]


class Documents:
    """The contexts of the last calls, so that the next question about one of them finds it tokenized. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, *, max_characters: int) -> None:
        """Keeps none yet.

        Args:
            tokenizer: From `qa_onnx.text.prompt.load_tokenizer`, or any that went through `prepare_tokenizer`.
            max_characters: How many characters the contexts that are kept may have together.
        """
        self._tokenizer = tokenizer
        self._room = max_characters
        self._kept: OrderedDict[str, Document] = OrderedDict()
        self._lock = Lock()

    def get(self, contexts: Iterable[str]) -> dict[str, Document]:
        """The document of each distinct context; those that are not there are tokenized together.

        Raises:
            InvalidInputError: The tokenizer fails, or makes no tokens of a context.
        """
        distinct = list(dict.fromkeys(contexts))
        with self._lock:
            found = {context: self._kept[context] for context in distinct if context in self._kept}
            for context in found:
                self._kept.move_to_end(context)
        missing = [context for context in distinct if context not in found]
        if not missing:
            return found
        encoded = encode_passages(self._tokenizer, missing)
        made = {
            context: Document(self._tokenizer, context, prefix_ids)
            for context, prefix_ids in zip(missing, encoded, strict=True)
        }
        self._keep(made)
        return found | made

    def _keep(self, made: dict[str, Document]) -> None:
        """Keeps documents; the least recently used ones go where there is no room."""
        with self._lock:
            for context, document in made.items():
                if context not in self._kept:  # another thread may have made it, too
                    self._kept[context] = document
                    self._room -= len(context)
            while self._room < 0:
                dropped, _ = self._kept.popitem(last=False)
                self._room += len(dropped)


def words_of(text: str) -> set[str]:
    """The words of a text in lower case, cut to their first letters: inflections are alike."""
    return {word[:WORD_LETTERS] for word in re.findall(r"\w+", text.lower())}


def _cut(tokenizer: Tokenizer, context: str, max_tokens: int, stride: int) -> list[tuple[int, str]]:
    """Cuts a document into parts of at most `max_tokens` tokens (with the template's) that share about `stride`.

    Cuts are at the end of paragraphs, of sentences or of words, so that a part is read as it was written and has the
    document's own tokens.
    """
    label = PASSAGE_TEMPLATE.index("{")
    (encoding,) = encode(tokenizer, [PASSAGE_TEMPLATE.format(context=context)])
    total, offsets = len(encoding.ids), encoding.offsets  # each access makes a new list
    first_characters = [max(first - label, 0) for first, _ in offsets] + [len(context)]
    ranks = [
        SENTENCE if index in (0, total) else _rank_of_cut(context, first)
        for index, first in enumerate(first_characters)
    ]
    template = next((index for index, (_, last) in enumerate(offsets) if last > label), 0)
    parts: list[tuple[int, str]] = []
    begin = template
    while True:
        size = max_tokens - template
        while True:
            end = min(begin + size, total)
            end = total if end == total else _back_to_cut(ranks, begin + (end - begin) * 3 // 4, end)
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
        shared = end - stride
        begin = max(_back_to_cut(ranks, max(shared - stride, begin + (shared - begin) * 3 // 4), shared), begin + 1)


def _rank_of_cut(context: str, place: int) -> int:
    """How good a character is to cut before: `PARAGRAPH`, `SENTENCE`, `WORD`, or 0 inside of a word."""
    # A token with a space before its word may count the space or not; a part starts behind it in both cases.
    start = place
    while start < len(context) and context[start].isspace():
        start += 1
    end = place
    while end > 0 and context[end - 1].isspace():
        end -= 1
    if start == end:
        return 0
    if "\n" in context[end:start]:
        return PARAGRAPH
    return SENTENCE if context[end - 1 : end] in SENTENCE_ENDS else WORD


def _back_to_cut(ranks: Sequence[int], begin: int, end: int) -> int:
    """The best place to cut at, behind `begin` and up to `end`, the last among equals; `end` where all are in words."""
    return max(range(end, begin, -1), key=ranks.__getitem__, default=end)
