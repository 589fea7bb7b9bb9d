"""The scheduler: sequences wait, run in a batch that is stepped, and make room for others (continuous batching)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from time import perf_counter

from qa_onnx.config import GenerationConfig
from qa_onnx.engine.batch import Batch
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.look_ahead import LookAhead
from qa_onnx.engine.planner import Group, plan_groups, sort_by_likeness, take_batch
from qa_onnx.engine.sampling import Predictions, accept
from qa_onnx.engine.sequence import FinishReason, Prompt, Sequence, make_sequence
from qa_onnx.errors import OutOfMemoryError

REFILL_BELOW = 0.5
"""Prompts join a batch when no more than this share of its sequences, or of its tokens, is still running."""


class Scheduler:
    """Sequences that wait and sequences that run. One thread at a time may use it.

    Callers are served first come, first served: every prefill holds the sequence whose turn it is, and others that go
    well with it. The second sequence of a call counts as if it had come with the next call, and so on, so that a long
    document does not keep others waiting. Bulk work (`answer_batch`) is planned for throughput instead, and takes turns
    with the callers as one of them.
    """

    def __init__(self, engine: Engine, *, batch_size: int, look_ahead: LookAhead | None = None) -> None:
        """Has no sequences yet.

        Args:
            engine: Computes the batches.
            batch_size: Maximum number of sequences computed together; long prompts share a batch's tokens among fewer
                (`Engine.max_batch_tokens`).
            look_ahead: Proposes drafts for the decode steps of few sequences; None is one token a step.
        """
        self._engine = engine
        self._batch_size = batch_size
        self._look_ahead = look_ahead if engine.can_verify_drafts else None
        self._calls = count()
        self._callers: dict[Sequence, int] = {}
        """Waiting sequences of callers, with the turn of each."""
        self._bulk: dict[Sequence, None] = {}
        """Waiting sequences of bulk work, in order; all of it has one turn."""
        self._bulk_turn = 0
        self._plans: dict[bool, deque[Group] | None] = {False: None, True: None}
        """The waiting sequences of callers and of bulk work (True) as groups; None where they changed."""
        self._aborted: dict[Sequence, None] = {}
        self._batch: Batch | None = None
        self._full = 0
        """Sequences of the batch when the last ones joined."""
        self._is_short_of_memory = False

    @property
    def waiting(self) -> int:
        """Number of sequences that wait."""
        return len(self._callers) + len(self._bulk)

    @property
    def running(self) -> int:
        """Number of sequences that run."""
        return 0 if self._batch is None else len(self._batch.sequences)

    @property
    def batch_size(self) -> int:
        """Maximum number of sequences computed together; lower than it was given once a batch found no memory."""
        return self._batch_size

    @property
    def is_idle(self) -> bool:
        """Whether there are no sequences."""
        return not self.waiting and self._batch is None

    def add(self, sequences: Iterable[Sequence], *, is_bulk: bool = False) -> None:
        """Adds the sequences of one call, not finished ones; they join one of the next steps."""
        turn = next(self._calls)
        added = list(sequences)
        if is_bulk:
            if not self._bulk:
                self._bulk_turn = turn
            self._bulk |= dict.fromkeys(added)
        else:
            self._callers |= zip(added, count(turn))
        for sequence in added:
            self._engine.prefix_cache.pin(sequence.prefix_ids)
        self._plans[is_bulk] = None

    def abort(self, sequence: Sequence) -> None:
        """Drops a sequence at the next step, whether it waits or runs; one that has ended stays ended."""
        self._aborted[sequence] = None

    def step(self) -> list[Sequence]:
        """Prefills waiting sequences if there is room, one batch of them at most, and gives each running one a token.

        Returns:
            The sequences that have ended: finished, aborted, or failed (`Sequence.error`). An error of a sequence ends
            only that; an error of the engine ends the batch that it happened in.
        """
        ended = self._drop_aborted()
        if self.waiting and self._has_room():
            ended += self._prefill()
        if self._batch is not None:
            ended += self._decode()
        return ended

    def _has_room(self) -> bool:
        if self._batch is None:
            return True
        if self._is_short_of_memory:
            return False
        running = self._batch.sequences
        if len(running) <= self._full * REFILL_BELOW:
            return True
        return (
            len(running) <= self._batch_size * REFILL_BELOW
            and sum(map(len, running)) <= self._engine.max_batch_tokens * REFILL_BELOW
        )

    def _prefill(self) -> list[Sequence]:
        """Prefills the next waiting sequences; the batch continues with them."""
        carried = self._batch
        free = self._batch_size - self.running
        budget = self._engine.max_batch_tokens * free // self._batch_size
        groups = take_batch(
            *self._queues(), max_rows=free, max_tokens=budget, max_row_scores=self._engine.max_row_scores
        )
        taken = [sequence for group in groups for sequence in group.sequences]
        try:
            batch, predictions = self._engine.prefill(groups, carried=carried)
        except OutOfMemoryError as error:
            return self._make_room(taken, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the callers of this batch
            self._leave_waiting(taken)
            return self._fail_running(error) + _fail(taken, error)
        self._leave_waiting(taken)
        self._batch, self._full = batch, len(batch.sequences)
        return self._accept(predictions, [[]] * len(taken))[0]

    def _queues(self) -> list[deque[Group]]:
        """The waiting sequences as groups, of callers and of bulk work: first those whose turn it is."""
        callers, bulk = self._plan(self._callers, is_bulk=False), self._plan(self._bulk, is_bulk=True)
        if not callers:
            return [bulk]
        first = min(self._callers, key=self._callers.__getitem__)
        callers = self._plans[False] = sort_by_likeness(callers, first)
        if not bulk or self._callers[first] < self._bulk_turn:
            return [callers, bulk]
        self._bulk_turn = next(self._calls)
        return [bulk, callers]

    def _plan(self, sequences: Iterable[Sequence], *, is_bulk: bool) -> deque[Group]:
        plan = self._plans[is_bulk]
        if plan is None:
            plan = self._plans[is_bulk] = plan_groups(sequences, max_rows=self._batch_size)
        return plan

    def _decode(self) -> list[Sequence]:
        """Gives each running sequence a token, or several where a draft of them is right."""
        assert self._batch is not None
        sequences = self._batch.sequences
        started = perf_counter()
        drafts: list[list[int]] = [[]] * len(sequences)
        if self._look_ahead is not None:
            drafts = self._look_ahead.propose(sequences)
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        try:
            predictions = self._engine.decode_step(self._batch, tokens, drafts)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the callers of this batch
            return self._fail_running(error)
        ended, accepted = self._accept(predictions, drafts)
        if self._look_ahead is not None:
            self._look_ahead.observe(drafts, accepted, perf_counter() - started)
        return ended

    def _accept(self, predictions: Predictions, drafts: list[list[int]]) -> tuple[list[Sequence], list[int]]:
        """Gives the first sequences of the batch, those with a draft, even an empty one, their next tokens.

        Args:
            predictions: Of each sequence one, and one more for each token of its draft.
            drafts: As `Engine.decode_step` computed them; the tokens that the model chose, too, are appended.

        Returns:
            The sequences that have ended, and how many tokens of each draft were right.
        """
        assert self._batch is not None
        sequences = self._batch.sequences
        right = [0] * len(drafts)
        first = 0
        for index, draft in enumerate(drafts):
            sequence = sequences[index]
            self._accept_next(sequence, predictions, first)
            while not sequence.is_finished and draft[right[index] :][:1] == sequence.token_ids[-1:]:
                right[index] += 1
                self._accept_next(sequence, predictions, first + right[index])
            first += 1 + len(draft)
        if any(right):
            self._engine.append_drafts(self._batch, right)
        ended = [sequence for sequence in sequences if sequence.is_finished]
        self._keep([index for index, sequence in enumerate(sequences) if not sequence.is_finished])
        return ended, right

    def _accept_next(self, sequence: Sequence, predictions: Predictions, index: int) -> None:
        try:
            accept(sequence, predictions, index, eos_token_id=self._engine.eos_token_id)
            if sequence.on_token is not None:
                sequence.on_token(sequence)
        except Exception as error:  # noqa: BLE001 - it goes to the caller of this sequence
            sequence.error = error

    def _keep(self, indices: list[int]) -> None:
        """Keeps some of the running sequences; the batch's memory is free when there are none."""
        assert self._batch is not None
        if indices:
            self._batch.keep(indices)
            return
        self._engine.release(self._batch)
        self._batch, self._is_short_of_memory = None, False

    def _drop_aborted(self) -> list[Sequence]:
        if not self._aborted:
            return []
        aborted, self._aborted = self._aborted, {}
        dropped = [sequence for sequence in aborted if sequence in self._callers or sequence in self._bulk]
        if dropped:
            self._leave_waiting(dropped)
            self._plans = {False: None, True: None}
        if self._batch is not None:
            running = self._batch.sequences
            dropped += [sequence for sequence in running if sequence in aborted]
            self._keep([index for index, sequence in enumerate(running) if sequence not in aborted])
        return dropped

    def _leave_waiting(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            del (self._callers if sequence in self._callers else self._bulk)[sequence]
            self._engine.prefix_cache.unpin(sequence.prefix_ids)

    def _make_room(self, taken: list[Sequence], error: OutOfMemoryError) -> list[Sequence]:
        """After a prefill that found no memory: the next one is half as large, or waits for the batch to end."""
        self._plans = {False: None, True: None}
        self._engine.release_memory()
        if len(taken) > 1:
            self._batch_size = max(len(taken) // 2 + self.running, 1)
            return []
        if self._batch is not None:
            self._is_short_of_memory = True
            return []
        self._leave_waiting(taken)
        told = OutOfMemoryError(
            f"there is no memory for a batch of one prompt of {len(taken[0])} tokens ({error}). Lower "
            "max_batch_bytes or prefix_cache_bytes in EngineConfig, raise memory_limit, or free memory of the device"
        )
        told.__cause__ = error
        return _fail(taken, told)

    def _fail_running(self, error: Exception) -> list[Sequence]:
        """Ends the batch with an error."""
        if self._batch is None:
            return []
        running = self._batch.sequences
        self._keep([])
        return _fail(running, error)


def _fail(sequences: list[Sequence], error: Exception) -> list[Sequence]:
    for sequence in sequences:
        sequence.error = error
    return sequences


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The new tokens of one prompt, without the end-of-text, and why they ended."""

    token_ids: list[int]
    finish_reason: FinishReason


def generate(
    engine: Engine, prompts: Iterable[Prompt], config: GenerationConfig, *, batch_size: int
) -> list[Generation]:
    """Generates from some prompts, each as if it were alone.

    Args:
        engine: Computes the batches.
        prompts: Each of 1 to `max_positions` tokens, at least one of them in `suffix_ids`.
        config: How to choose tokens.
        batch_size: As of `Scheduler`.

    Returns:
        One generation per prompt, in the order given.

    Raises:
        Exception: The first error of a sequence.
    """
    sequences = [
        make_sequence(prompt, config, eos_token_id=engine.eos_token_id, max_positions=engine.max_positions)
        for prompt in prompts
    ]
    scheduler = Scheduler(engine, batch_size=batch_size)
    scheduler.add(sequences, is_bulk=True)
    while not scheduler.is_idle:
        for sequence in scheduler.step():
            if sequence.error is not None:
                raise sequence.error
    return [
        Generation(token_ids=sequence.token_ids, finish_reason=sequence.finish_reason or "length")
        for sequence in sequences
    ]
