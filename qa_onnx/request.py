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
from qa_onnx.scores import ScoreCalibration
from qa_onnx.search import Candidate, Search
from qa_onnx.text.constraint import SpanConstraint, Spans, find_span
from qa_onnx.text.prompt import decode
from qa_onnx.text.windows import Window, answer_logprobs, weigh_windows

CERTAIN = 0.99
"""A window of several whose probability of no answer is above this is not searched further."""
NO_ANSWER = Candidate(text="", start=None, token_ids=(), logprobs=(0.0,), finish_reason="no_answer")


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
        calibration: ScoreCalibration | None = None,
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
            calibration: Makes scores of the model's probabilities; None leaves them as they are.
            on_text: Called with each new piece of the answer's text. Only where one sequence decides on it: one window,
                one answer.
        """
        self._windows = windows
        self._config = config
        self._calibration = calibration or ScoreCalibration()
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._max_positions = max_positions
        self._on_text = on_text if len(windows) == 1 and config.num_answers == 1 else None
        self._searches: dict[Sequence, Search] = {}
        self._window_config = config
        if len(windows) > 1 and config.no_answer_threshold is not None:  # all windows together decide then
            threshold = max(config.no_answer_threshold, CERTAIN)
            self._window_config = replace(config, no_answer_threshold=threshold)
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
        """The most probable answer, once all sequences have ended."""
        found = [(window, candidate) for window, search in enumerate(self._all) for candidate in search.candidates]
        weights, no_answer_probability = weigh_windows(
            self._windows, [search.no_answer_probability for search in self._all]
        )
        # Of equal texts that of the window in which it is most probable tells where it is.
        found.sort(key=lambda pair: weights[pair[0]] + pair[1].logprob)
        of_text = {candidate.text: (window, candidate) for window, candidate in found}
        logprobs = answer_logprobs((candidate.text, weights[window] + candidate.logprob) for window, candidate in found)
        ranked = sorted(logprobs, key=lambda text: -logprobs[text])
        if len(self._windows) > 1:  # a window without the answer says so; that is no reason to doubt the one with it
            ranked.sort(key=lambda text: not text)
            threshold = self._config.no_answer_threshold
            if threshold is not None and no_answer_probability > threshold:
                of_text[""], logprobs[""] = (0, NO_ANSWER), math.log(no_answer_probability)
                ranked = ["", *filter(None, ranked)]
        answers = [
            self._to_answer(*of_text[text], logprobs[text], no_answer_probability)
            for text in ranked[: self._config.num_answers]
        ]
        return replace(answers[0], alternatives=tuple(answers[1:]))

    def _to_answer(self, window: int, candidate: Candidate, logprob: float, no_answer_probability: float) -> Answer:
        start = None if candidate.start is None else self._windows[window].start + candidate.start
        return Answer(
            text=candidate.text,
            score=self._calibration.score(logprob) if candidate.text else no_answer_probability,
            logprob=min(0.0, logprob),
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
                self._window_config,
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
