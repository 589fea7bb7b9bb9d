"""The scheduler when sequences, the engine or memory fail: only those concerned end, and nothing is left over."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulers import (
    assert_answered,
    assert_nothing_is_left,
    engine_of,
    run,
    scheduler_of,
    scripts,
    sequence_of,
)

from qa_onnx import GenerationConfig, OutOfMemoryError
from qa_onnx.engine.scheduler import generate
from qa_onnx.engine.sequence import Prompt


class FailingConstraint:
    """Allows all tokens; fails at a given call of a method."""

    may_end = True

    def __init__(self, method, call):
        self.method, self.left = method, call

    def allowed_ids(self, tokens_left):
        self._count("allowed_ids")
        return np.arange(1, 20)

    def append(self, _):
        self._count("append")

    def _count(self, method):
        self.left -= method == self.method
        if self.left == 0:
            raise KeyError(method)


def fail_at_token(count):
    def on_token(sequence):
        if len(sequence.token_ids) == count:
            raise KeyError("on_token")

    return on_token


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        lambda count: {"on_token": fail_at_token(count)},
        lambda count: {"constraint": FailingConstraint("allowed_ids", count)},
        lambda count: {"constraint": FailingConstraint("append", count)},
    ],
    ids=["on_token", "allowed_ids", "append"],
)
def test_an_error_of_one_sequence_ends_only_that(options, count):
    engine, scheduler = scheduler_of()
    others = [sequence_of(6), sequence_of(8)]
    bad = sequence_of(10, **options(count))
    scheduler.add([others[0], bad, others[1]])
    scheduler.add(waiting := [sequence_of(2) for _ in range(3)])
    ended = run(scheduler)
    assert Counter(ended) == Counter([*others, bad, *waiting])
    assert isinstance(bad.error, KeyError)
    assert len(bad.token_ids) <= count
    assert_answered([*others, *waiting])
    assert_nothing_is_left(engine, scheduler)


def test_an_error_at_the_last_token_is_an_error_too():
    def on_token(sequence):
        if sequence.finish_reason is not None:
            raise KeyError

    engine, scheduler = scheduler_of()
    bad = sequence_of(2, on_token=on_token)
    scheduler.add([bad])
    assert run(scheduler) == [bad]
    assert isinstance(bad.error, KeyError)
    assert_nothing_is_left(engine, scheduler)


def fail_once(engine, method, error, *, at=1):
    """Has the `at`-th call of an engine's method fail."""
    original, calls = getattr(engine, method), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(*arguments, **options)

    setattr(engine, method, call)


@pytest.mark.parametrize(("method", "at"), [("prefill", 1), ("prefill", 2), ("decode_step", 1), ("decode_step", 3)])
def test_an_error_of_the_engine_ends_only_its_batch(method, at):
    engine, scheduler = scheduler_of(batch_size=4)
    error = RuntimeError("the device was lost")
    fail_once(engine, method, error, at=at)
    first = [sequence_of(length) for length in (1, 2, 9, 9)]
    scheduler.add(first)
    waiting = [sequence_of(5, prefix=2) for _ in range(6)]
    scheduler.add(waiting)
    ended = run(scheduler)
    assert Counter(ended) == Counter([*first, *waiting])
    failed = [sequence for sequence in ended if sequence.error is not None]
    assert 1 <= len(failed) <= 4  # no more than a batch
    assert {sequence.error for sequence in failed} == {error}
    assert_answered(sequence for sequence in ended if sequence.error is None)
    assert any(sequence.error is None for sequence in waiting)
    later = [sequence_of(3) for _ in range(3)]
    scheduler.add(later)
    run(scheduler)
    assert_answered(later)
    assert_nothing_is_left(engine, scheduler)


@settings(deadline=None)
@given(script=scripts, batch_size=st.integers(1, 9), failures=st.sets(st.integers(1, 40)))
def test_whatever_fails_every_sequence_ends_once_and_nothing_is_left(script, batch_size, failures):
    engine, scheduler = scheduler_of(batch_size=batch_size)
    calls = []

    def fail_sometimes(original):
        def call(*arguments, **options):
            calls.append(1)
            if len(calls) in failures:
                raise (OutOfMemoryError if len(calls) % 2 else RuntimeError)("failed")
            return original(*arguments, **options)

        return call

    engine.prefill, engine.decode_step = fail_sometimes(engine.prefill), fail_sometimes(engine.decode_step)
    added, aborted, ended = [], set(), Counter()
    for action, value in script:
        if action == "step":
            for _ in range(value):
                ended.update(scheduler.step())
        elif action == "abort":
            alive = [sequence for sequence in added if not ended[sequence]]
            if alive:
                aborted.add(alive[value % len(alive)])
                scheduler.abort(alive[value % len(alive)])
        else:
            call = [sequence_of(length, prefix=prefix) for length, prefix in value]
            added += call
            scheduler.add(call, is_bulk=action == "add bulk")
    ended.update(run(scheduler))
    assert ended == Counter(added)
    assert_answered(sequence for sequence in added if sequence not in aborted and sequence.error is None)
    assert_nothing_is_left(engine, scheduler)


def limit_sequences(engine, limit):
    """Gives the engine memory for a number of sequences; what each prefill asked for is noted."""
    original, asked = engine.prefill, []

    def prefill(groups, *, carried=None):
        count = sum(len(group.sequences) for group in groups) + (len(carried.sequences) if carried else 0)
        asked.append(count)
        if count > limit:
            raise OutOfMemoryError("Failed to allocate memory for requested buffer")
        return original(groups, carried=carried)

    engine.prefill = prefill
    return asked


def test_a_prefill_without_memory_is_tried_again_with_half_the_batch():
    engine, scheduler = scheduler_of(batch_size=16)
    asked = limit_sequences(engine, 3)
    sequences = [sequence_of(3) for _ in range(16)]
    scheduler.add(sequences, is_bulk=True)
    run(scheduler)
    assert_answered(sequences)
    assert asked[:4] == [16, 8, 4, 2]
    assert scheduler.batch_size == 2
    assert engine.memory_releases == 3
    assert_nothing_is_left(engine, scheduler)


def test_without_memory_for_one_sequence_only_that_fails_and_the_message_names_the_option():
    engine, scheduler = scheduler_of()
    original = engine.prefill

    def prefill(groups, *, carried=None):
        if any(len(sequence) > 20 for group in groups for sequence in group.sequences):
            raise OutOfMemoryError("Failed to allocate memory for requested buffer")
        return original(groups, carried=carried)

    engine.prefill = prefill
    sequences = [sequence_of(3), sequence_of(3, prefix=2), sequence_of(4)]
    scheduler.add(sequences)
    assert Counter(run(scheduler)) == Counter(sequences)
    assert_answered([sequences[0], sequences[2]])
    with pytest.raises(OutOfMemoryError, match=r"one prompt of 23 tokens .Failed to allocate.*max_batch_bytes"):
        raise sequences[1].error
    assert isinstance(sequences[1].error.__cause__, OutOfMemoryError)
    assert_nothing_is_left(engine, scheduler)


def test_a_sequence_without_memory_waits_for_the_end_of_the_batch():
    engine, scheduler = scheduler_of(batch_size=4)
    asked = limit_sequences(engine, 1)
    scheduler.add([first := sequence_of(8)])
    scheduler.step()
    scheduler.add([second := sequence_of(2)])
    run(scheduler)
    assert_answered([first, second])
    assert asked == [1, 2, 1]  # not tried at each step
    assert_nothing_is_left(engine, scheduler)


@settings(deadline=None)
@given(script=scripts, batch_size=st.integers(1, 20), limit=st.integers(1, 6))
def test_with_memory_for_one_sequence_all_are_answered(script, batch_size, limit):
    engine, scheduler = scheduler_of(batch_size=batch_size)
    limit_sequences(engine, limit)
    added = []
    for action, value in script:
        if action == "step":
            for _ in range(value):
                scheduler.step()
        elif action != "abort":
            call = [sequence_of(length, prefix=prefix) for length, prefix in value]
            added += call
            scheduler.add(call, is_bulk=action == "add bulk")
    run(scheduler)
    assert_answered(added)
    assert_nothing_is_left(engine, scheduler)


def test_a_decode_step_without_memory_ends_its_batch_alone():
    engine, scheduler = scheduler_of(batch_size=2)
    fail_once(engine, "decode_step", OutOfMemoryError("no room to grow"))
    sequences = [sequence_of(4) for _ in range(4)]
    scheduler.add(sequences)
    run(scheduler)
    assert [sequence.error is not None for sequence in sequences] == [True, True, False, False]
    assert_answered(sequences[2:])
    assert_nothing_is_left(engine, scheduler)


def test_generate_raises_the_first_error():
    engine = engine_of()
    fail_once(engine, "prefill", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        generate(engine, [Prompt(prefix_ids=[], suffix_ids=[1])], GenerationConfig(), batch_size=1)
