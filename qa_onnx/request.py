"""One question on its way: a search in each window of its passage, and the answer made of what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from qa_onnx.answer import Answer
from qa_onnx.decoding import Prefix, Row
from qa_onnx.generation import GenerationConfig
from qa_onnx.grounding import Spans, find_span
from qa_onnx.search import Candidate, Search
from qa_onnx.windows import Window


class Request:
    """A question, the rows that answer it, and the answer once they have ended."""

    def __init__(
        self,
        windows: Sequence[Window],
        config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        eos_token_id: int,
        max_positions: int,
        spans_of: Callable[[str], Spans],
        on_text: Callable[[str], object] | None = None,
    ) -> None:
        """Makes the first rows.

        Args:
            windows: Of the question, from `encode_windows`.
            config: How to answer.
            tokenizer: Makes text of tokens.
            eos_token_id: The token that ends an answer.
            max_positions: How many tokens the model can read.
            spans_of: The spans of a window's text, for grounded decoding.
            on_text: Is told of the answer's text as it grows. Only where one row decides on it: one window, one answer.
        """
        self._windows = windows
        self._config = config
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._max_positions = max_positions
        self._on_text = on_text if len(windows) == 1 and config.top_k == 1 else None
        self._searches: dict[Row, Search] = {}
        self._finished: list[Search] = []
        self._all = [self._search(window, spans_of(window.text) if config.grounded else None) for window in windows]

    @property
    def rows(self) -> list[Row]:
        """The rows that are to be decoded now."""
        return list(self._searches)

    @property
    def is_done(self) -> bool:
        """Whether all rows have ended."""
        return not self._searches

    def finished(self, row: Row) -> list[Row]:
        """Takes a row that has ended; returns those to decode next."""
        search = self._searches.pop(row)
        rows = search.finished(row)
        self._searches |= dict.fromkeys(rows, search)
        return rows

    def cancel(self) -> None:
        """Tells all rows that nobody waits for them."""
        for row in self._searches:
            row.cancelled = True

    def answer(self) -> Answer:
        """The best answer of all windows, once all rows have ended."""
        found: dict[str, tuple[int, Candidate]] = {}
        for window, search in enumerate(self._all):
            for candidate in search.candidates:
                known = found.get(candidate.text)
                if known is None or known[1].logprob < candidate.logprob:
                    found[candidate.text] = (window, candidate)
        no_answer_probability = min(search.no_answer_probability for search in self._all)
        # A window without the answer says so; that is no reason to doubt the one with it.
        ranked = sorted(found.values(), key=lambda pair: (len(self._all) > 1 and not pair[1].text, -pair[1].logprob))
        answers = [
            self._to_answer(window, candidate, no_answer_probability)
            for window, candidate in ranked[: self._config.top_k]
        ]
        return replace(answers[0], alternatives=tuple(answers[1:]))

    def _to_answer(self, window: int, candidate: Candidate, no_answer_probability: float) -> Answer:
        start = None if candidate.start is None else self._windows[window].start + candidate.start
        return Answer(
            text=candidate.text,
            score=math.exp(candidate.logprob),
            mean_logprob=candidate.logprob / len(candidate.logprobs),
            start=start,
            end=None if start is None else start + len(candidate.text),
            no_answer_probability=no_answer_probability,
            finish_reason=candidate.finish_reason,
            prompt_tokens=sum(len(window.prompt) for window in self._windows),
            new_tokens=candidate.new_tokens,
            window=window,
            windows=len(self._windows),
        )

    def _search(self, window: Window, spans: Spans | None) -> Search:
        def make_row(prefix: Prefix | None) -> Row:
            return Row(
                window.prompt,
                self._config,
                eos_token_id=self._eos,
                max_positions=self._max_positions,
                spans=spans,
                prefix=prefix,
                on_token=None if self._on_text is None else tell,
            )

        def span_and_text(row: Row) -> tuple[tuple[int, int] | None, str]:
            if row.writer is not None:
                span = row.writer.span()
                return span, window.text[span[0] : span[1]] if span else ""
            text: str = self._tokenizer.decode(row.token_ids).strip()
            return find_span(text, window.text), text

        def read(row: Row) -> Candidate:
            assert row.finish_reason is not None
            span, text = span_and_text(row)
            return Candidate(
                text=text,
                start=span[0] if span else None,
                new_tokens=len(row.token_ids),
                logprobs=tuple(row.logprobs),
                finish_reason=row.finish_reason,
            )

        told = 0

        def tell(row: Row) -> None:
            """Tells what is certain of the text: whole characters, and white space only once something follows."""
            nonlocal told
            text = span_and_text(row)[1]
            if row.finish_reason is None:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
            if self._on_text and len(text) > told:
                self._on_text(text[told:])
                told = len(text)

        search = Search(make_row, read, top_k=self._config.top_k)
        self._searches |= dict.fromkeys(search.rows, search)
        return search
