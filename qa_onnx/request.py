"""One question on its way: a search in each window of its context, and the answer made of what they find."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from tokenizers import Tokenizer

from qa_onnx.answer import Answer
from qa_onnx.config import GenerationConfig
from qa_onnx.engine.sampling import make_random
from qa_onnx.engine.sequence import Hypothesis, Sequence, make_sequence
from qa_onnx.search import Candidate, Search
from qa_onnx.text.constraint import SpanConstraint, Spans, find_span
from qa_onnx.text.prompt import decode
from qa_onnx.text.windows import Window


class Request:
    """A question, the sequences that answer it, and the answer once they have ended."""

    def __init__(
        self,
        windows: SequenceOf[Window],
        config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        eos_token_id: int,
        max_positions: int,
        find_spans: Callable[[str], Spans],
        on_text: Callable[[str], object] | None = None,
    ) -> None:
        """Makes the first sequences.

        Args:
            windows: Of the question, from `encode_windows`.
            config: How to answer.
            tokenizer: Makes text of tokens.
            eos_token_id: The token that ends an answer.
            max_positions: How many tokens the model can read.
            find_spans: The spans of a window's text, for extractive answers.
            on_text: Called with each new piece of the answer's text. Only where one sequence decides on it: one window,
                one answer.
        """
        self._windows = windows
        self._config = config
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._max_positions = max_positions
        self._on_text = on_text if len(windows) == 1 and config.num_answers == 1 else None
        self._searches: dict[Sequence, Search] = {}
        self._all = [self._search(window, find_spans(window.text) if config.extractive else None) for window in windows]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that are to be decoded now."""
        return list(self._searches)

    @property
    def is_done(self) -> bool:
        """Whether all sequences have ended."""
        return not self._searches

    def finish(self, sequence: Sequence) -> list[Sequence]:
        """Takes a sequence that has ended; returns those to decode next."""
        search = self._searches.pop(sequence)
        following = search.finish(sequence)
        self._searches |= dict.fromkeys(following, search)
        return following

    def answer(self) -> Answer:
        """The best answer of all windows, once all sequences have ended."""
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
            for window, candidate in ranked[: self._config.num_answers]
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
            token_ids=candidate.token_ids,
            window=window,
            windows=len(self._windows),
        )

    def _search(self, window: Window, spans: Spans | None) -> Search:
        def make(hypothesis: Hypothesis | None) -> Sequence:
            return make_sequence(
                window.prompt,
                self._config,
                eos_token_id=self._eos,
                max_positions=self._max_positions,
                constraint=SpanConstraint(spans) if spans is not None else None,
                random=make_random(self._config.seed, window.prompt.ids) if self._config.samples else None,
                hypothesis=hypothesis,
                on_token=None if self._on_text is None else tell,
            )

        def span_and_text(sequence: Sequence) -> tuple[tuple[int, int] | None, str]:
            if isinstance(sequence.constraint, SpanConstraint):
                span = sequence.constraint.span()
                return span, window.text[span[0] : span[1]] if span else ""
            text = decode(self._tokenizer, sequence.token_ids).strip()
            return find_span(text, window.text), text

        def read(sequence: Sequence) -> Candidate:
            assert sequence.finish_reason is not None
            span, text = span_and_text(sequence)
            return Candidate(
                text=text,
                start=span[0] if span else None,
                token_ids=tuple(sequence.token_ids),
                logprobs=tuple(sequence.logprobs),
                finish_reason=sequence.finish_reason,
            )

        told = 0

        def tell(sequence: Sequence) -> None:
            """Tells what is certain of the text: whole characters, and white space only once something follows."""
            nonlocal told
            text = span_and_text(sequence)[1]
            if sequence.finish_reason is None:
                text = text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()
            if self._on_text and len(text) > told:
                self._on_text(text[told:])
                told = len(text)

        search = Search(make, read, num_answers=self._config.num_answers)
        self._searches |= dict.fromkeys(search.sequences, search)
        return search
