"""The most probable answers to one prompt: best-first search over hypotheses.

Greedy decoding of a sequence leaves, at every token, the hypotheses that it did not continue. The most probable of
these is continued next, greedily again, and so on. What a hypothesis leads to is never more probable than itself; so
once the wanted number of answers is more probable than every hypothesis left, no better ones exist.
(Best-first search of this kind: Meister et al., "Best-First Beam Search", 2020.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qa_onnx.engine.sampling import ALTERNATIVES_PER_ANSWER
from qa_onnx.engine.sequence import Alternative, FinishReason, Hypothesis, Sequence

ROLLOUTS_PER_ANSWER = 4
"""Maximum number of hypotheses that are continued for each answer that is asked for. A model that is unsure of
everything would otherwise be searched for ever; the answers found by then are returned."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A whole answer to one prompt.

    Attributes:
        text: The answer, without white space around it.
        start: The character of the window's text at which it occurs; None where it does not.
        token_ids: Its tokens, without the end-of-text.
        logprobs: Of each token, and of the end-of-text where that came.
        finish_reason: Why it ended.
    """

    text: str
    start: int | None
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    @property
    def logprob(self) -> float:
        """Log-probability of the answer under the model."""
        return sum(self.logprobs)


class Search:
    """The answers to one prompt, as sequences of them end. With `num_answers` 1 it is the one sequence."""

    def __init__(
        self,
        make_sequence: Callable[[Hypothesis | None], Sequence],
        read: Callable[[Sequence], Candidate],
        *,
        num_answers: int,
    ) -> None:
        """Has no answer yet.

        Args:
            make_sequence: Makes the sequence that continues a hypothesis; None is the first sequence.
            read: The answer of a sequence that has ended.
            num_answers: How many different texts are wanted.
        """
        self._make_sequence = make_sequence
        self._read = read
        self._num_answers = num_answers
        self._found: dict[str, Candidate] = {}
        self._alternatives: list[tuple[Alternative, Sequence]] = []
        """Tokens not taken, the least probable first, with the sequences that did not take them."""
        self._rollouts_left = ROLLOUTS_PER_ANSWER * num_answers
        self.no_answer_probability = 0.0
        self.sequences = [make_sequence(None)]
        """The sequences that run or wait."""

    @property
    def candidates(self) -> list[Candidate]:
        """The answers found, the most probable first, at most `num_answers`."""
        return sorted(self._found.values(), key=lambda candidate: -candidate.logprob)[: self._num_answers]

    def finish(self, sequence: Sequence) -> list[Sequence]:
        """Takes what a sequence found; returns the sequences to decode next: none while others run, or at the end."""
        self.no_answer_probability = max(self.no_answer_probability, sequence.no_answer_probability)
        self.sequences.remove(sequence)
        self._add(self._read(sequence))
        self._alternatives += [(alternative, sequence) for alternative in sequence.alternatives]
        self._alternatives.sort(key=_logprob)
        del self._alternatives[: -ALTERNATIVES_PER_ANSWER * self._num_answers]
        if self.sequences:
            return []
        while (
            self._alternatives
            and len(self.sequences) < min(self._num_answers, self._rollouts_left)
            and self._is_worth_it()
        ):
            alternative, parent = self._alternatives.pop()
            sequence = self._make_sequence(parent.hypothesis(alternative))
            if sequence.is_finished:
                self._add(self._read(sequence))
            else:
                self.sequences.append(sequence)
        self._rollouts_left -= len(self.sequences)
        return list(self.sequences)

    def _is_worth_it(self) -> bool:
        candidates = self.candidates
        return len(candidates) < self._num_answers or _logprob(self._alternatives[-1]) > candidates[-1].logprob

    def _add(self, candidate: Candidate) -> None:
        known = self._found.get(candidate.text)
        if known is None or known.logprob < candidate.logprob:
            self._found[candidate.text] = candidate


def _logprob(found: tuple[Alternative, Sequence]) -> float:
    return found[0].logprob
