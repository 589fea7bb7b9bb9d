"""How tokens are chosen: the options of a caller, and what they do to the logits of one row.

The options do what the logits processors of transformers of the same purpose do
(https://huggingface.co/docs/transformers/internal/generation_utils), in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qa_onnx.errors import InvalidInputError

DEFAULT_MAX_NEW_TOKENS = 32
DEFAULT_STRIDE = 128


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to answer. The defaults are greedy decoding of free text, one answer a question.

    Attributes:
        max_new_tokens: The most tokens an answer may have.
        grounded: Only answers that stand in the passage, from the start of a word to the end of one.
        top_k: How many different answers a question gets, the most probable first (`Answer.alternatives`).
        no_repeat_ngram_size: No sequence of so many tokens occurs twice in prompt and answer together; 0 is no limit.
        temperature: 0 takes the most probable token; above, tokens are drawn from the logits divided by it.
        top_k_tokens: Draw from the so many most probable tokens; 0 is all of them.
        top_p: Draw from the most probable tokens whose probabilities add up to this (nucleus sampling, Holtzman et
            al., 2019).
        seed: Of the draws; the same seed draws the same answer to the same question, alone and in any batch. None
            draws anew each time.
        no_answer_threshold: From 0 to 1. Where the probability that the passage holds no answer is above it, the
            answer is empty; where it is not, there is one. None takes the bundle's, from `python -m qa_onnx calibrate`;
            where it has none, the answer is empty where that is most probable.
        stride: Tokens that neighbouring windows of a long document share (no more than half a window).

    Raises:
        InvalidInputError: A value out of range, or two options that contradict each other.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    grounded: bool = False
    top_k: int = 1
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_k_tokens: int = 0
    top_p: float = 1.0
    seed: int | None = None
    no_answer_threshold: float | None = None
    stride: int = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("top_k", 1),
            ("no_repeat_ngram_size", 0),
            ("top_k_tokens", 0),
            ("stride", 0),
        ):
            check_whole_number(name, getattr(self, name), least)
        if self.seed is not None:
            check_whole_number("seed", self.seed, 0)
        if not isinstance(self.grounded, bool):
            raise InvalidInputError(f"got grounded {self.grounded!r}; expected True or False")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise InvalidInputError(
                f"got temperature {self.temperature!r}; expected a number of at least 0 (0: greedy)"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InvalidInputError(f"got top_p {self.top_p!r}; expected a number above 0 and at most 1")
        threshold = self.no_answer_threshold
        if threshold is not None and (not _is_number(threshold) or not 0 <= threshold <= 1):
            raise InvalidInputError(
                f"got no_answer_threshold {threshold!r}; expected a probability from 0 to 1, or None"
            )
        if not self.samples and (self.top_k_tokens, self.top_p, self.seed) != (0, 1.0, None):
            raise InvalidInputError(
                "got top_k_tokens, top_p or seed without a temperature; they have no effect on greedy decoding. "
                "Pass a temperature above 0, or leave them out"
            )
        if self.samples and self.top_k > 1:
            raise InvalidInputError(
                f"got top_k {self.top_k} with a temperature; the most probable answers are searched, not drawn. "
                "Leave one of them out"
            )
        if self.grounded and self.no_repeat_ngram_size:
            raise InvalidInputError(
                "got grounded with no_repeat_ngram_size; an answer that stands in the passage repeats it. "
                "Leave one of them out"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


def check_whole_number(name: str, value: object, least: int) -> None:
    """Checks an option.

    Raises:
        InvalidInputError: It is no int of at least `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"got {name} {value!r}; expected a whole number of at least {least}")


def log_sum_exp(logits: np.ndarray) -> float:
    """What to subtract from logits (float32 [V]) to get log-probabilities."""
    top = logits.max()
    return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def repeating_tokens(token_ids: Sequence[int], size: int) -> np.ndarray:
    """The tokens (int64 [N]) that would end a sequence of `size` tokens that occurs in `token_ids` already."""
    if len(token_ids) < size:
        return np.zeros(0, np.int64)
    sequences = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids, np.int64), size)
    last = np.asarray(token_ids[len(token_ids) - size + 1 :], np.int64)
    found: np.ndarray = sequences[(sequences[:, :-1] == last).all(axis=1), -1]
    return found


def sampling_probabilities(scores: np.ndarray, *, temperature: float, top_k_tokens: int, top_p: float) -> np.ndarray:
    """The probabilities (float64 [V]) that a token is drawn with, of its scores (float32 [V], -inf where forbidden)."""
    scores = scores.astype(np.float64) / temperature
    if 0 < top_k_tokens < len(scores):
        scores[scores < np.partition(scores, -top_k_tokens)[-top_k_tokens]] = -np.inf
    probabilities: np.ndarray = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        ascending = probabilities.argsort(kind="stable")
        dropped = ascending[:-1][probabilities[ascending].cumsum()[:-1] <= 1 - top_p]
        probabilities[dropped] = 0
        probabilities /= probabilities.sum()
    return probabilities


def make_random(seed: int | None, prompt_ids: Sequence[int]) -> np.random.Generator:
    """The source of a row's draws. It depends on seed and prompt alone, not on what else is in the batch."""
    if seed is None:
        return np.random.default_rng()
    digest = hashlib.sha256(np.asarray(prompt_ids, np.int64).tobytes()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
