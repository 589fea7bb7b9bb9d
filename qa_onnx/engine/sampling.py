"""The choice of a sequence's next token, from log-probabilities and the sequence's state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from qa_onnx.engine.sequence import Alternative, Sequence
from qa_onnx.errors import EngineError

ALTERNATIVES_PER_ANSWER = 8
"""Number of tokens not taken that a sequence keeps for each answer asked for; twice as many as a search continues."""
REPEATED_TOKENS = 6
"""An extractive answer does not go on with a block that has been repeated to so many tokens, where it can end."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the model says of the next token of B sequences, as far as it was asked for.

    Attributes:
        token_ids: int64 [B], the most probable token.
        token_logprobs: float32 [B], its log-probability.
        eos_logprobs: float32 [B], the log-probability of the end-of-text.
        logprobs: float32 [B, V], the log-probabilities of all tokens; None where no sequence needs them.
    """

    token_ids: np.ndarray
    token_logprobs: np.ndarray
    eos_logprobs: np.ndarray
    logprobs: np.ndarray | None = None

    @classmethod
    def from_logprobs(cls, logprobs: np.ndarray, eos_token_id: int) -> Predictions:
        """Predictions of log-probabilities, float32 [B, V]."""
        token_ids = logprobs.argmax(axis=1)
        return cls(
            token_ids=token_ids,
            token_logprobs=logprobs[np.arange(len(logprobs)), token_ids],
            eos_logprobs=logprobs[:, eos_token_id],
            logprobs=logprobs,
        )

    @classmethod
    def empty(cls) -> Predictions:
        """Predictions of no sequence."""
        return cls(token_ids=np.zeros(0, np.int64), token_logprobs=np.zeros(0), eos_logprobs=np.zeros(0))

    @classmethod
    def concatenate(cls, parts: SequenceOf[Predictions]) -> Predictions:
        """The predictions of several runs, one after the other. All of them have `logprobs`, or none."""
        if len(parts) == 1:
            return parts[0]
        some = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            token_logprobs=np.concatenate([part.token_logprobs for part in parts]),
            eos_logprobs=np.concatenate([part.eos_logprobs for part in parts]),
            logprobs=np.concatenate(some) if some else None,
        )

    def select(self, indices: np.ndarray) -> Predictions:
        """Those of some sequences (int64 [N])."""
        return Predictions(
            token_ids=self.token_ids[indices],
            token_logprobs=self.token_logprobs[indices],
            eos_logprobs=self.eos_logprobs[indices],
            logprobs=None if self.logprobs is None else self.logprobs[indices],
        )


def accept(sequence: Sequence, predictions: Predictions, index: int, *, eos_token_id: int) -> None:
    """Gives a sequence its next token, or ends it.

    Args:
        sequence: Not finished.
        predictions: Of a batch.
        index: The sequence's place in it.
        eos_token_id: The token that ends an answer.

    Raises:
        EngineError: The log-probabilities are not numbers.
    """
    config = sequence.config
    is_first = not sequence.token_ids
    token, logprob = int(predictions.token_ids[index]), float(predictions.token_logprobs[index])
    if not math.isfinite(logprob):
        raise EngineError(
            f"the model's log-probabilities are not numbers: the largest is {logprob}. Its weights are damaged, or too "
            "large for the precision; export the model again"
        )
    if not sequence.tokens_left:
        sequence.logprobs.append(float(predictions.eos_logprobs[index]))
        sequence.finish_reason = "length"
        return
    if is_first:
        sequence.no_answer_probability = math.exp(float(predictions.eos_logprobs[index]))
    threshold = config.no_answer_threshold if is_first else None
    if threshold is not None and sequence.no_answer_probability > threshold:
        token, logprob = eos_token_id, float(predictions.eos_logprobs[index])
    elif sequence.needs_logprobs:
        assert predictions.logprobs is not None
        logprobs = predictions.logprobs[index]
        token = _choose(sequence, logprobs, eos_token_id)
        logprob = float(logprobs[token])
    sequence.logprobs.append(logprob)
    if token == eos_token_id and not config.ignore_eos:
        sequence.finish_reason = "no_answer" if is_first else "stop"
        return
    sequence.token_ids.append(token)
    if sequence.constraint is not None:
        sequence.constraint.append(token)
    if not sequence.tokens_left and not sequence.scores_end:
        sequence.finish_reason = "length"


def _choose(sequence: Sequence, logprobs: np.ndarray, eos_token_id: int) -> int:
    """Chooses among the tokens that are allowed, of log-probabilities float32 [V]."""
    config = sequence.config
    must_answer = config.no_answer_threshold is not None and not sequence.token_ids
    if sequence.constraint is not None:
        ids = sequence.constraint.allowed_ids(sequence.tokens_left)
        if sequence.constraint.may_end and repeats(sequence.token_ids):
            ids = ids[:0]
        if sequence.constraint.may_end or (not sequence.token_ids and not (must_answer and len(ids))):
            ids = np.append(ids, eos_token_id)
        if config.num_answers == 1 and sequence.random is None:
            return int(ids[logprobs[ids].argmax()])
        scores = np.full_like(logprobs, -np.inf)
        scores[ids] = logprobs[ids]
    else:
        scores = logprobs.copy()
        if must_answer:
            scores[eos_token_id] = -np.inf
        if config.no_repeat_ngram_size:
            read = [*sequence.prefix_ids, *sequence.suffix_ids, *sequence.token_ids[sequence.begun :]]
            scores[repeating_tokens(read, config.no_repeat_ngram_size)] = -np.inf
    if sequence.random is not None:
        probabilities = sampling_probabilities(
            scores, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        return int(sequence.random.choice(len(probabilities), p=probabilities))
    chosen = int(scores.argmax())
    if config.num_answers > 1:
        before, length = sum(sequence.logprobs), len(sequence.token_ids)
        best = np.argpartition(-scores, min(config.num_answers, len(scores) - 1))[: config.num_answers + 1]
        best = np.union1d(best, eos_token_id)  # a whole answer, however many beginnings are more probable
        limit = ALTERNATIVES_PER_ANSWER * config.num_answers
        least = sequence.alternatives[-1].logprob - before if len(sequence.alternatives) == limit else -np.inf
        best = best[(best != chosen) & (scores[best] > least)]
        if len(best):
            sequence.alternatives += [
                Alternative(before + logprob, length, token, logprob)
                for token, logprob in zip(best.tolist(), logprobs[best].tolist(), strict=True)
            ]
            sequence.alternatives.sort(reverse=True)
            del sequence.alternatives[limit:]
    return chosen


def repeats(token_ids: SequenceOf[int]) -> bool:
    """Whether tokens end with the same block several times over: `REPEATED_TOKENS` of them, in three copies or more."""
    for size in range(1, len(token_ids) // 3 + 1):
        length = size * max(3, -(-REPEATED_TOKENS // size))
        tail = token_ids[-length:]
        if len(tail) == length and all(tail[place] == tail[place - size] for place in range(size, length)):
            return True
    return False


def repeating_tokens(token_ids: SequenceOf[int], size: int) -> np.ndarray:
    """The tokens (int64 [N]) that would end an n-gram of `size` tokens that occurs in `token_ids` already."""
    if len(token_ids) < size:
        return np.zeros(0, np.int64)
    ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids, np.int64), size)
    last = np.asarray(token_ids[len(token_ids) - size + 1 :], np.int64)
    found: np.ndarray = ngrams[(ngrams[:, :-1] == last).all(axis=1), -1]
    return found


def sampling_probabilities(scores: np.ndarray, *, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The probabilities (float64 [V]) of a draw, of log-probabilities (float32 [V], -inf where forbidden)."""
    with np.errstate(over="ignore"):  # a tiny temperature takes the most probable token
        scores = (scores.astype(np.float64) - scores.max()) / temperature
    if 0 < top_k < len(scores):
        scores[scores < np.partition(scores, -top_k)[-top_k]] = -np.inf
    probabilities: np.ndarray = np.exp(scores)
    probabilities /= probabilities.sum()
    if top_p < 1:
        ascending = probabilities.argsort(kind="stable")
        dropped = ascending[:-1][probabilities[ascending].cumsum()[:-1] <= 1 - top_p]
        probabilities[dropped] = 0
        probabilities /= probabilities.sum()
    return probabilities


def make_random(seed: int | None, prompt_ids: SequenceOf[int]) -> np.random.Generator:
    """The source of a sequence's draws. It depends on seed and prompt alone, not on what else is in the batch."""
    if seed is None:
        return np.random.default_rng()
    digest = hashlib.sha256(np.asarray(prompt_ids, np.int64).tobytes()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])
