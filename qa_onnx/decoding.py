"""The loop: prompts become rows of a batch, every step gives each row a token, rows that end make room for others."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np

from qa_onnx.engine import DecodeState, Engine
from qa_onnx.generation import (
    GenerationConfig,
    log_sum_exp,
    make_random,
    repeating_tokens,
    sampling_probabilities,
)
from qa_onnx.grounding import Spans, SpanWriter
from qa_onnx.planner import Group, plan_groups, take_batch
from qa_onnx.prompt import Prompt

REFILL_BELOW = 0.5
"""A batch reads new prompts when no more than this share of its rows, or of its tokens, is still in use."""

FinishReason = Literal["stop", "length", "no_answer"]


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The beginning of an answer that a search has decided on, with the log-probability of each token."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def followed_by(self, token_id: int, logprob: float) -> Prefix:
        """The prefix with one more token."""
        return Prefix(token_ids=(*self.token_ids, token_id), logprobs=(*self.logprobs, logprob))


class Row:
    """One prompt on its way to an answer.

    Attributes:
        prompt: What is read. It holds the tokens of `prefix`, too.
        token_ids: The answer's tokens so far, `prefix` included, without the end-of-text.
        logprobs: The log-probability under the model of each of these, and last of the end-of-text once it came.
        no_answer_probability: Of the end-of-text in place of a first token; 0 where it was not looked at.
        finish_reason: `stop` where the model ended the answer, `length` where tokens or positions did, `no_answer`
            where it ended before its first token; None as long as it goes on.
        alternatives: With `top_k` above 1, the most probable beginnings that were not gone on with.
        cancelled: Set by a caller that does not want the answer any more.
    """

    def __init__(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        *,
        eos_token_id: int,
        max_positions: int,
        spans: Spans | None = None,
        prefix: Prefix | None = None,
        on_token: Callable[[Row], object] | None = None,
    ) -> None:
        """Makes the row of a prompt.

        Args:
            prompt: Of at most `max_positions` tokens, at least one of them in `question_ids`.
            config: How to choose tokens.
            eos_token_id: The token that ends an answer.
            max_positions: How many tokens the model can read.
            spans: What `config.grounded` keeps to.
            prefix: Tokens that the answer begins with. Where they are a whole answer, the row has ended.
            on_token: Is told of each new token, and of the end.
        """
        prefix = prefix or Prefix()
        is_whole = prefix.token_ids[-1:] == (eos_token_id,)
        self.token_ids = list(prefix.token_ids[: -1 if is_whole else None])
        self.logprobs = list(prefix.logprobs)
        self.prompt = Prompt(passage_ids=prompt.passage_ids, question_ids=[*prompt.question_ids, *self.token_ids])
        self.config = config
        self.no_answer_probability = 0.0
        self.finish_reason: FinishReason | None = None
        self.alternatives: list[Prefix] = []
        self.cancelled = False
        self.writer = SpanWriter(spans) if spans is not None else None
        if self.writer:
            for token in self.token_ids:
                self.writer.write(token)
        self._asked = prompt
        self._eos = eos_token_id
        self._most = min(config.max_new_tokens, max_positions - len(prompt) + 1)
        self._random = make_random(config.seed, prompt.ids) if config.samples else None
        self._on_token = on_token
        if is_whole:
            self.finish_reason = "stop" if self.token_ids else "no_answer"
        elif len(self.token_ids) == self._most:
            self.finish_reason = "length"

    @property
    def is_plain(self) -> bool:
        """Whether the most probable token is taken, whatever it is."""
        config = self.config
        return not (
            self.writer
            or self._random
            or config.no_repeat_ngram_size
            or config.top_k > 1
            or (config.no_answer_threshold is not None and not self.token_ids)
        )

    def accept(self, logits: np.ndarray) -> int | None:
        """Takes the next token, of its logits, float32 [V]; None where the answer has ended."""
        normalizer = log_sum_exp(logits)
        is_first = not self.token_ids
        token = self._eos
        if is_first:
            self.no_answer_probability = math.exp(float(logits[self._eos]) - normalizer)
        threshold = self.config.no_answer_threshold if is_first else None
        if threshold is None or self.no_answer_probability <= threshold:
            token = int(logits.argmax()) if self.is_plain else self._choose(logits, normalizer)
        self.logprobs.append(float(logits[token]) - normalizer)
        if token == self._eos:
            self.finish_reason = "no_answer" if is_first else "stop"
        else:
            self.token_ids.append(token)
            if self.writer:
                self.writer.write(token)
            if len(self.token_ids) == self._most:
                self.finish_reason = "length"
        if self._on_token:
            self._on_token(self)
        return token if self.finish_reason is None else None

    def _choose(self, logits: np.ndarray, normalizer: float) -> int:
        """Chooses among the tokens that are allowed."""
        config = self.config
        must_answer = config.no_answer_threshold is not None and not self.token_ids
        if self.writer:
            ids = self.writer.next_ids()
            if self.writer.may_end or (not self.token_ids and not must_answer):
                ids = np.append(ids, self._eos)
            if config.top_k == 1 and self._random is None:
                return int(ids[logits[ids].argmax()])
            scores = np.full_like(logits, -np.inf)
            scores[ids] = logits[ids]
        else:
            scores = logits.copy()
            if must_answer:
                scores[self._eos] = -np.inf
            if config.no_repeat_ngram_size:
                read = self._asked.ids + self.token_ids
                scores[repeating_tokens(read, config.no_repeat_ngram_size)] = -np.inf
        if self._random is not None:
            probabilities = sampling_probabilities(
                scores, temperature=config.temperature, top_k_tokens=config.top_k_tokens, top_p=config.top_p
            )
            return int(self._random.choice(len(probabilities), p=probabilities))
        chosen = int(scores.argmax())
        if config.top_k > 1:
            beginning = Prefix(token_ids=tuple(self.token_ids), logprobs=tuple(self.logprobs))
            best = np.argpartition(-scores, min(config.top_k, len(scores) - 1))[: config.top_k + 1]
            self.alternatives += [
                beginning.followed_by(token, float(logits[token]) - normalizer)
                for token in best.tolist()
                if token != chosen and scores[token] > -np.inf
            ]
        return chosen


class Decoding:
    """Rows that wait and rows of the batch that is computed. One thread at a time may use it."""

    def __init__(self, engine: Engine, *, batch_size: int, oldest_first: bool = False) -> None:
        """Has no rows yet.

        Args:
            engine: Computes the logits.
            batch_size: The most rows computed together; long prompts share a batch's tokens among fewer
                (`Limits.batch_tokens`).
            oldest_first: Every batch that is read holds the row whose turn it is: rows take turns in the order they
                were added, and the second row of a call counts as if it had come with the next call, and so on. So a
                document of many windows does not keep others waiting. Otherwise the order is that which computes least
                padding.
        """
        self._engine = engine
        self._batch_size = batch_size
        self._oldest_first = oldest_first
        self._numbers = count()
        self._calls = count()
        self._turns: dict[int, int] = {}
        """When it is the turn of each waiting row, for `oldest_first`."""
        self._rows: dict[int, Row] = {}
        self._waiting: dict[int, Prompt] = {}
        self._queue: deque[Group] | None = deque()
        """The waiting prompts as groups; None where they changed."""
        self._state: DecodeState | None = None
        self._full = 0
        """Rows of the batch when prompts were read last."""
        self._known: Mapping[tuple[int, ...], np.ndarray] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there are no rows, waiting or computed."""
        return not self._rows

    def add(self, rows: Iterable[Row]) -> None:
        """Rows of one caller, to be answered; they join one of the next steps."""
        for turn, row in enumerate(rows, next(self._calls)):
            number = next(self._numbers)
            self._rows[number] = row
            self._turns[number] = turn
            self._waiting[number] = row.prompt
            self._queue = None

    def step(self) -> list[Row]:
        """Reads waiting prompts if there is room, one batch of them at most, and gives each row of the batch a token.

        Returns:
            The rows that have ended, or were cancelled.
        """
        dropped = self._drop_cancelled()
        if self._waiting and self._has_room():
            self._read()
        state = self._state
        if state is None:
            return dropped
        numbers = state.prompts.tolist()
        tokens = [self._rows[number].accept(logits) for number, logits in zip(numbers, state.logits, strict=True)]
        live = np.array([index for index, token in enumerate(tokens) if token is not None], np.int64)
        ended = [self._rows.pop(number) for number, token in zip(numbers, tokens, strict=True) if token is None]
        if live.size:
            kept = np.array([token for token in tokens if token is not None], np.int64)
            self._state = self._engine.decode_step(state.select(live), kept)
        else:
            self._leave(state)
        return dropped + ended

    def _has_room(self) -> bool:
        if self._state is None:
            return True
        numbers = self._state.prompts.tolist()
        if len(numbers) <= self._full * REFILL_BELOW:
            return True
        tokens = sum(len(self._rows[number].prompt) for number in numbers)
        return (
            len(numbers) <= self._batch_size * REFILL_BELOW
            and tokens <= self._engine.limits.batch_tokens * REFILL_BELOW
        )

    def _read(self) -> None:
        """Prefills the next waiting prompts; the batch goes on with them."""
        if self._queue is None:
            self._queue = plan_groups(self._waiting, max_rows=self._batch_size)
        if self._oldest_first:
            oldest = min(self._waiting, key=self._turns.__getitem__)
            self._queue.rotate(-next(place for place, group in enumerate(self._queue) if oldest in group.prompts))
        carried = self._state
        free = self._batch_size - (0 if carried is None else len(carried.prompts))
        budget = self._engine.limits.batch_tokens * free // self._batch_size
        groups = take_batch(self._queue, self._waiting, max_rows=free, max_tokens=budget)
        self._state = self._engine.prefill(self._waiting, groups, carried=carried, known=self._known)
        if carried is not None:
            carried.grid.give_back()
        for group in groups:
            for number in group.prompts:
                del self._waiting[number], self._turns[number]
        self._known = self._engine.keep_passages(self._state.grid, self._queue)
        self._full = len(self._state.prompts)

    def _drop_cancelled(self) -> list[Row]:
        cancelled = {number for number, row in self._rows.items() if row.cancelled}
        if not cancelled:
            return []
        for number in cancelled & self._waiting.keys():
            del self._waiting[number], self._turns[number]
            self._queue = None
        state = self._state
        if state is not None:
            live = np.flatnonzero([number not in cancelled for number in state.prompts.tolist()])
            if live.size:
                self._state = state.select(live)
            else:
                self._leave(state)
        return [self._rows.pop(number) for number in sorted(cancelled)]

    def _leave(self, state: DecodeState) -> None:
        state.grid.give_back()
        self._state = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The new tokens of one prompt, without the end-of-text, and why they ended."""

    token_ids: list[int]
    finish_reason: FinishReason


def greedy_decode(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int
) -> list[Generation]:
    """Generates the most likely token again and again.

    Args:
        engine: Computes the logits.
        prompts: Each of 1 to `max_positions` tokens, at least one of them in `question_ids`.
        max_new_tokens: The most tokens a row may get; the model's positions may end it earlier.
        batch_size: As of `Decoding`.

    Returns:
        One generation a prompt, in the order given.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    rows = [
        Row(prompt, config, eos_token_id=engine.eos_token_id, max_positions=engine.max_positions) for prompt in prompts
    ]
    decoding = Decoding(engine, batch_size=batch_size)
    decoding.add(rows)
    while not decoding.is_idle:
        decoding.step()
    return [Generation(token_ids=row.token_ids, finish_reason=row.finish_reason or "length") for row in rows]
