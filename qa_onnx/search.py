"""The most probable answers to one prompt: best-first search over beginnings of answers.

Greedy decoding of a row leaves, at every token, the beginnings that it did not go on with. The most probable of these
is gone on with next, greedily again, and so forth. What a beginning leads to is never more probable than the beginning
itself; so once the wanted number of answers is more probable than every beginning left, no better ones exist.
(Best-first search of this kind: Meister et al., "Best-First Beam Search", 2020.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qa_onnx.decoding import FinishReason, Prefix, Row

ROLLOUTS_EACH = 4
"""The most beginnings that are gone on with for each answer that is asked for. A model that is unsure of everything
would otherwise be searched for ever; the answers found by then are returned."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A whole answer to one prompt.

    Attributes:
        text: The answer, without white space around it.
        start: The character of the row's passage at which it stands; None where it does not.
        new_tokens: How many tokens it has, without the end-of-text.
        logprobs: Of each token, and of the end-of-text where that came.
        finish_reason: Why it ended.
    """

    text: str
    start: int | None
    new_tokens: int
    logprobs: tuple[float, ...]
    finish_reason: FinishReason

    @property
    def logprob(self) -> float:
        """Log-probability of the answer under the model."""
        return sum(self.logprobs)


class Search:
    """The answers to one prompt, as rows of them end. With `top_k` 1 it is the one row."""

    def __init__(
        self, make_row: Callable[[Prefix | None], Row], read: Callable[[Row], Candidate], *, top_k: int
    ) -> None:
        """Has no answer yet.

        Args:
            make_row: Makes the row that goes on with a beginning; None is the first row.
            read: What a row that has ended says.
            top_k: How many different texts are wanted.
        """
        self._make_row = make_row
        self._read = read
        self._top_k = top_k
        self._found: dict[str, Candidate] = {}
        self._beginnings: list[Prefix] = []
        self._rollouts_left = ROLLOUTS_EACH * top_k
        self.no_answer_probability = 0.0
        self.rows = [make_row(None)]
        """The rows under way."""

    @property
    def candidates(self) -> list[Candidate]:
        """The answers found, the most probable first, at most `top_k`."""
        return sorted(self._found.values(), key=lambda candidate: -candidate.logprob)[: self._top_k]

    def finished(self, row: Row) -> list[Row]:
        """Takes what a row found; returns the rows to decode next, none where the search goes on or is over."""
        self.no_answer_probability = max(self.no_answer_probability, row.no_answer_probability)
        self.rows.remove(row)
        self._add(self._read(row))
        self._beginnings += row.alternatives
        if self.rows or row.cancelled:
            return []
        self._beginnings.sort(key=lambda beginning: sum(beginning.logprobs))
        while self._beginnings and len(self.rows) < min(self._top_k, self._rollouts_left) and self._is_worth_it():
            beginning = self._beginnings.pop()
            row = self._make_row(beginning)
            if row.finish_reason:
                self._add(self._read(row))
            else:
                self.rows.append(row)
        self._rollouts_left -= len(self.rows)
        return list(self.rows)

    def _is_worth_it(self) -> bool:
        candidates = self.candidates
        return len(candidates) < self._top_k or sum(self._beginnings[-1].logprobs) > candidates[-1].logprob

    def _add(self, candidate: Candidate) -> None:
        known = self._found.get(candidate.text)
        if known is None or known.logprob < candidate.logprob:
            self._found[candidate.text] = candidate
