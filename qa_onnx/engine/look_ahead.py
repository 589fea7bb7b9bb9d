"""Look-ahead: of answers that repeat their context, several tokens are verified in one decode step.

A decode step of few sequences takes about as long as reading the weights does, whether each of them gets one token or
five. Where the last tokens of a sequence occur in its prefix, the tokens behind them there are a draft of what comes
next (prompt lookup decoding: https://github.com/apoorvumang/prompt-lookup-decoding). The step computes the draft, too,
and the model's own choices are accepted as far as the draft agrees with them (speculative decoding, Leviathan et al.,
2023, https://arxiv.org/abs/2211.17192). As long as the model's numbers are finite, what is accepted does not depend on
the draft: a bad one costs time only.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from qa_onnx.engine.sequence import Sequence

MAX_DRAFT = 5
MAX_NGRAM = 3
MAX_SEQUENCES = 8
"""With more sequences than this, the matmuls take the time of a step, and a draft costs what it may save."""
DECAY = 0.98
"""Weight of a step's time after each step that follows it."""
DRAFT_DECAY = 0.95
"""The same of a draft's accepted tokens."""
PAUSE = 64
"""Steps without drafts after drafts were not worth their time, before they are tried again; twice as many each time.

As often, while they are worth it, a step goes without, or nobody would know what that takes.
"""
MAX_PAUSE = 16 * PAUSE
MAX_TIMES_EXPECTED = 2
"""A step that took longer than this many times what was expected counts as this: something else held it up."""


def find_draft(sequence: Sequence) -> list[int]:
    """The tokens that may come after a sequence's last one, at most `MAX_DRAFT`: a copy from its prefix.

    They follow the longest match of its last tokens, of at most `MAX_NGRAM`; of several places, the one with most of
    the question's rare tokens around it. Empty where its last token does not occur, or it gets no more tokens.
    """
    size = min(MAX_DRAFT, sequence.tokens_left - (0 if sequence.scores_end else 1))
    if size <= 0 or not sequence.token_ids or not sequence.prefix_ids:
        return []
    prefix = np.array(sequence.prefix_ids)
    last = sequence.token_ids[-MAX_NGRAM:]
    ends = np.flatnonzero(prefix[:-1] == last[-1]) + 1  # where the draft begins
    for length in range(2, len(last) + 1):
        longer = ends[ends >= length]
        longer = longer[prefix[longer - length] == last[-length]]
        if not len(longer):
            break
        ends = longer
    if not len(ends):
        return []
    start = ends[0] if len(ends) == 1 else _likeliest(prefix, ends, sequence.suffix_ids)
    draft: list[int] = prefix[start : start + size].tolist()
    return draft


def _likeliest(prefix: np.ndarray, places: np.ndarray, question: SequenceOf[int], reach: int = 24) -> int:
    """The place with most of the question's tokens within `reach`, rare ones counting more."""
    tokens, counts = np.unique(prefix, return_counts=True)
    weights = np.where(np.isin(tokens, np.asarray(question)), 1 / counts, 0)[np.searchsorted(tokens, prefix)]
    sums = np.concatenate([[0], np.cumsum(weights)])
    near = sums[np.minimum(places + reach, len(prefix))] - sums[np.maximum(places - reach, 0)]
    return int(places[near.argmax()])


class LookAhead:
    """Decides by measurement whether drafts are worth their time.

    The time of a step is taken to be a line in its number of tokens, fitted to recent steps (least squares, older ones
    count less, outliers are clipped). Drafts are worth it where they are expected to give more tokens a second.
    """

    def __init__(self) -> None:
        """Has measured nothing yet."""
        self._sums = np.zeros(5)
        """Of weights, tokens, seconds, tokens squared, and tokens times seconds."""
        self._accepted = 1.0
        """Mean number of a draft's tokens that were accepted."""
        self._pause = 0
        """Steps that are left without drafts."""
        self._next_pause = PAUSE
        self._until_plain = 0
        """Steps with drafts until one without."""

    def propose(self, sequences: SequenceOf[Sequence]) -> list[list[int]]:
        """A draft for each sequence; all of them are empty where they are not worth their time."""
        none: list[list[int]] = [[] for _ in sequences]
        if len(sequences) > MAX_SEQUENCES:
            return none
        if self._pause > 1:
            self._pause -= 1
            return none
        drafts = [find_draft(sequence) for sequence in sequences]
        if not any(drafts):
            return none
        if not self._until_plain:
            self._until_plain = PAUSE
            return none
        self._until_plain -= 1
        is_trial, self._pause = self._pause == 1, 0
        if self._is_worth_it(drafts):
            self._next_pause = PAUSE
        elif not is_trial:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, MAX_PAUSE)
            return none
        return drafts

    def observe(self, drafts: SequenceOf[SequenceOf[int]], accepted: SequenceOf[int], seconds: float) -> None:
        """Takes in what a step took, and how many tokens of each draft were accepted."""
        if len(drafts) > MAX_SEQUENCES:
            return
        tokens = len(drafts) + sum(map(len, drafts))
        if self._sums.any():
            fixed, each = self._fit()
            seconds = min(seconds, MAX_TIMES_EXPECTED * (fixed + each * tokens))
        self._sums = DECAY * self._sums + np.array([1, tokens, seconds, tokens**2, tokens * seconds])
        for draft, count in zip(drafts, accepted, strict=True):
            if draft:
                self._accepted += (1 - DRAFT_DECAY) * (count - self._accepted)

    def _is_worth_it(self, drafts: SequenceOf[SequenceOf[int]]) -> bool:
        fixed, each = self._fit()
        plain, more = len(drafts), sum(map(len, drafts))
        gained = self._accepted * sum(bool(draft) for draft in drafts)
        return (fixed + each * (plain + more)) * plain <= (fixed + each * plain) * (plain + gained)

    def _fit(self) -> tuple[float, float]:
        """Seconds of a step, and of each of its tokens: none where all steps had the same number of them."""
        weight, tokens, seconds, squares, products = self._sums
        spread = weight * squares - tokens**2
        if spread < 1e-6:
            return (seconds / weight, 0.0) if weight else (1.0, 0.0)
        each = max((weight * products - tokens * seconds) / spread, 0.0)
        return max((seconds - each * tokens) / weight, 0.0), each
