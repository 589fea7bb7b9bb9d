"""A sequence: one prompt on its way to its new tokens. State only; `sampling.py` and `scheduler.py` change it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from qa_onnx.config import GenerationConfig

FinishReason = Literal["stop", "length", "no_answer"]


class Constraint(Protocol):
    """Which tokens may come next (`qa_onnx.text.constraint`)."""

    @property
    def may_end(self) -> bool:
        """Whether the tokens so far may be the whole answer."""

    def allowed_ids(self, tokens_left: int) -> np.ndarray:
        """The tokens, int64 [N], ascending, that may come next where so many are left, that one included."""

    def append(self, token_id: int) -> None:
        """Takes the next token, one of `allowed_ids`."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The tokens of one prompt, in two parts: what it shares with other prompts on the same context, and its own."""

    prefix_ids: list[int]
    suffix_ids: list[int]

    @property
    def ids(self) -> list[int]:
        """All tokens of the prompt, in order."""
        return self.prefix_ids + self.suffix_ids

    def __len__(self) -> int:
        return len(self.prefix_ids) + len(self.suffix_ids)


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """The beginning of an answer that a search has decided on, with the log-probability of each token."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class Alternative(NamedTuple):
    """A token that a sequence did not take; see `Sequence.hypothesis`.

    Attributes:
        logprob: Of the tokens before it and of itself, together.
        length: Number of tokens before it.
        token_id: The token.
        token_logprob: Its log-probability.
    """

    logprob: float
    length: int
    token_id: int
    token_logprob: float


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and its new tokens.

    Attributes:
        prefix_ids: The prompt's first tokens, which it shares with other prompts on the same context; may be empty.
        suffix_ids: The prompt's other tokens, at least one, and behind them the tokens of a hypothesis.
        config: How to choose tokens.
        max_new_tokens: Maximum number of new tokens, that of `config` or fewer where the model's positions end.
        token_ids: The new tokens so far, those of a hypothesis included, without the end-of-text.
        begun: How many of these a hypothesis began with; they are the last of `suffix_ids`, too.
        logprobs: The log-probability under the model of each of `token_ids`, and at the end of the end-of-text.
        no_answer_probability: Probability of the end-of-text in place of a first token; 0 where it was not computed.
        scores_end: Whether an answer that `max_new_tokens` ends is read once more, for the probability of its end. Not
            where the model's positions end there, nor with `ignore_eos`.
        finish_reason: `stop` where the model ended the answer, `length` where tokens or positions ended it,
            `no_answer` where it ended before its first token; None while it runs.
        alternatives: With `num_answers` above 1, the most probable tokens that were not taken, in order.
        constraint: The tokens that may come next; None is any.
        random: Source of the draws; None takes the most probable token.
        on_token: Called with the sequence after each new token, and at its end.
        error: What went wrong with this sequence alone; it has ended then.
    """

    prefix_ids: tuple[int, ...] = ()
    suffix_ids: SequenceOf[int]
    config: GenerationConfig
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    begun: int = 0
    logprobs: list[float] = field(default_factory=list)
    no_answer_probability: float = 0.0
    scores_end: bool = True
    finish_reason: FinishReason | None = None
    alternatives: list[Alternative] = field(default_factory=list)
    constraint: Constraint | None = None
    random: np.random.Generator | None = None
    on_token: Callable[[Sequence], object] | None = None
    error: Exception | None = None

    def __len__(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prefix_ids) + len(self.suffix_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finish_reason is not None or self.error is not None

    @property
    def tokens_left(self) -> int:
        """How many more tokens it may get."""
        return self.max_new_tokens - len(self.token_ids)

    def hypothesis(self, alternative: Alternative) -> Hypothesis:
        """The beginning of another answer: this one's, up to an alternative."""
        before = alternative.length
        return Hypothesis(
            token_ids=(*self.token_ids[:before], alternative.token_id),
            logprobs=(*self.logprobs[:before], alternative.token_logprob),
        )

    @property
    def needs_logprobs(self) -> bool:
        """Whether the choice of its next token needs more than the most probable one and the end-of-text."""
        config = self.config
        return self.tokens_left > 0 and bool(
            self.constraint is not None
            or self.random is not None
            or config.no_repeat_ngram_size
            or config.num_answers > 1
            or (config.no_answer_threshold is not None and not self.token_ids)
        )


def make_sequence(
    prompt: Prompt,
    config: GenerationConfig,
    *,
    eos_token_id: int,
    max_positions: int,
    constraint: Constraint | None = None,
    random: np.random.Generator | None = None,
    hypothesis: Hypothesis | None = None,
    on_token: Callable[[Sequence], object] | None = None,
) -> Sequence:
    """Makes the sequence of a prompt.

    Args:
        prompt: Of at most `max_positions` tokens, at least one of them in `suffix_ids`.
        config: How to choose tokens.
        eos_token_id: The token that ends an answer.
        max_positions: How many tokens the model can read.
        constraint: See `Sequence`; it has not seen the tokens of `hypothesis` yet.
        random: See `Sequence`.
        hypothesis: Tokens that the answer begins with. Where they are a whole answer, the sequence has ended.
        on_token: See `Sequence`.
    """
    hypothesis = hypothesis or Hypothesis()
    is_whole = hypothesis.token_ids[-1:] == (eos_token_id,)
    token_ids = list(hypothesis.token_ids[: -1 if is_whole else None])
    if constraint is not None:
        for token in token_ids:
            constraint.append(token)
    max_new_tokens = min(config.max_new_tokens, max_positions - len(prompt) + 1)
    sequence = Sequence(
        prefix_ids=tuple(prompt.prefix_ids),
        suffix_ids=[*prompt.suffix_ids, *token_ids],
        config=config,
        max_new_tokens=max_new_tokens,
        scores_end=not config.ignore_eos and len(prompt) + max_new_tokens <= max_positions,
        token_ids=token_ids,
        begun=len(token_ids),
        logprobs=list(hypothesis.logprobs),
        constraint=constraint,
        random=random,
        on_token=on_token,
    )
    if is_whole:
        sequence.finish_reason = "stop" if token_ids else "no_answer"
    elif not sequence.tokens_left and not sequence.scores_end:
        sequence.finish_reason = "length"
    return sequence
