"""The scheduler on a fake engine: who is computed when, what aborts and errors end, and that nothing is left over."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fakes import FakeEngine
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_onnx import GenerationConfig, OutOfMemoryError
from qa_onnx.engine.scheduler import Scheduler, generate
from qa_onnx.engine.sequence import Prompt, make_sequence

PREFIXES = ([], [11, 12], [13] * 20)


def engine_of(**options):
    return FakeEngine(**{"vocab_size": 20, "max_positions": 99} | options)


def sequence_of(tokens, *, prefix=0, **options):
    """A sequence whose answer is `tokens`, or tokens 1, 1... of a number of them."""
    tokens = [1] * tokens if isinstance(tokens, int) else tokens
    config = GenerationConfig(max_new_tokens=50)
    prompt = Prompt(prefix_ids=PREFIXES[prefix], suffix_ids=tokens)
    return make_sequence(prompt, config, eos_token_id=0, max_positions=99, **options)


def scheduler_of(engine=None, *, batch_size=4):
    engine = engine or engine_of()
    return engine, Scheduler(engine, batch_size=batch_size)


def run(scheduler, *, steps=10_000):
    """Steps until nothing is left; what ended, in order."""
    ended = []
    for _ in range(steps):
        if scheduler.is_idle:
            return ended
        ended += scheduler.step()
    raise AssertionError(f"not idle after {steps} steps")


def assert_answered(sequences):
    for sequence in sequences:
        assert (sequence.token_ids, sequence.finish_reason, sequence.error) == (sequence.suffix_ids, "stop", None)


def assert_nothing_is_left(engine, scheduler):
    assert scheduler.is_idle
    assert (scheduler.waiting, scheduler.running) == (0, 0)
    assert engine.batches == []
    assert engine.prefix_cache._pins == {}
    assert engine.prefix_cache._pinned_bytes == 0
    assert engine.prefix_cache.stats().nbytes == 0


lengths = st.integers(1, 12)
calls = st.lists(st.tuples(lengths, st.integers(0, 2)), min_size=1, max_size=25)
scripts = st.lists(
    st.one_of(
        st.tuples(st.just("add"), calls),
        st.tuples(st.just("add bulk"), calls),
        st.tuples(st.just("abort"), st.integers(0, 10**6)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(script=scripts, batch_size=st.integers(1, 20))
def test_every_sequence_ends_exactly_once_whatever_is_aborted(script, batch_size):
    engine, scheduler = scheduler_of(batch_size=batch_size)
    added, aborted, ended = [], set(), Counter()

    def step():
        alive = [sequence for sequence in added if not ended[sequence]]
        assert scheduler.waiting + scheduler.running == len(alive)
        ended.update(scheduler.step())
        assert scheduler.running <= batch_size
        assert all(ended[sequence] for sequence in aborted)

    for action, value in script:
        if action == "abort":
            alive = [sequence for sequence in added if not ended[sequence]]
            if alive:
                aborted.add(alive[value % len(alive)])
                scheduler.abort(alive[value % len(alive)])
        elif action == "step":
            for _ in range(value):
                step()
        else:
            call = [sequence_of(length, prefix=prefix) for length, prefix in value]
            added += call
            scheduler.add(call, is_bulk=action == "add bulk")
    for _ in range(10_000):
        if scheduler.is_idle:
            break
        step()
    assert ended == Counter(added)
    assert_answered(sequence for sequence in added if sequence not in aborted)
    assert_nothing_is_left(engine, scheduler)
    assert max(engine.sequence_counts, default=0) <= batch_size


# -- first come, first served ------------------------------------------------------------------------------------------


class Turns:
    """The turns of sequences that wait, as the scheduler's description tells them: the call's number, then one more."""

    def __init__(self, engine, scheduler):
        self.scheduler = scheduler
        self.calls = 0
        self.waiting = {}
        self.left_out_first = []
        """For each prefill, whether it left out the sequence whose turn it was (an error there would end its batch)."""
        self._prefill = engine.prefill
        engine.prefill = self.prefill

    def add(self, call):
        self.waiting |= {sequence: turn for turn, sequence in enumerate(call, self.calls)}
        self.calls += 1
        self.scheduler.add(call)

    def abort(self, sequence):
        del self.waiting[sequence]
        self.scheduler.abort(sequence)

    def prefill(self, groups, *, carried=None):
        taken = [sequence for group in groups for sequence in group.sequences]
        first = min(self.waiting, key=self.waiting.get)  # of equal turns the one that came first
        self.left_out_first.append(first not in taken)
        for sequence in taken:
            del self.waiting[sequence]
        return self._prefill(groups, carried=carried)


@settings(deadline=None)
@given(script=scripts, batch_size=st.integers(1, 20))
@example(  # more sequences of one prefix than the batch has slots for
    script=[("add", [(12, 0)] * 2), ("step", 1), ("add", [(1, 1)] * 5), ("add", [(1, 1)]), ("step", 30)],
    batch_size=4,
)
def test_every_prefill_holds_the_sequence_whose_turn_it_is(script, batch_size):
    engine, scheduler = scheduler_of(batch_size=batch_size)
    turns = Turns(engine, scheduler)
    for action, value in script:
        if action == "step":
            for _ in range(value):
                scheduler.step()
        elif action == "abort":
            if turns.waiting:
                turns.abort(list(turns.waiting)[value % len(turns.waiting)])
        else:
            turns.add([sequence_of(length, prefix=prefix) for length, prefix in value])
    run(scheduler)
    assert turns.left_out_first == [False] * len(engine.prefills)
    assert_nothing_is_left(engine, scheduler)


def test_a_call_of_many_sequences_does_not_keep_the_next_call_waiting():
    _, scheduler = scheduler_of(batch_size=2)
    document = [sequence_of(1, prefix=2) for _ in range(100)]
    scheduler.add(document)
    scheduler.add([question := sequence_of(1)])
    for _ in range(3):
        scheduler.step()
    assert question.is_finished
    assert sum(sequence.is_finished for sequence in document) < 10


@settings(deadline=None, max_examples=50)
@given(
    batch_size=st.integers(1, 8),
    callers=st.integers(1, 6),
    call_size=st.integers(1, 3),
    bulk_length=lengths,
    caller_length=lengths,
    prefixes=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_bulk_work_and_callers_both_make_progress_while_the_other_is_supplied(
    batch_size, callers, call_size, bulk_length, caller_length, prefixes
):
    """Callers that each ask again once they are answered, and bulk work that never runs out."""
    engine, scheduler = scheduler_of(batch_size=batch_size)
    waiting = {True: set(), False: set()}  # True for bulk
    without, longest = Counter(), Counter()
    running = set()
    asking = [set() for _ in range(callers)]
    bulk_prefix, caller_prefix = prefixes
    original = engine.prefill

    def prefill(groups, *, carried=None):
        taken = {sequence for group in groups for sequence in group.sequences}
        for kind, sequences in waiting.items():
            without[kind] = without[kind] + 1 if sequences and not sequences & taken else 0
            longest[kind] = max(longest[kind], without[kind])
            sequences -= taken
        running.update(taken)
        return original(groups, carried=carried)

    engine.prefill = prefill
    while len(engine.prefills) < 30 * (callers + 1):
        if len(waiting[True]) < 3 * batch_size:
            work = [sequence_of(bulk_length, prefix=bulk_prefix) for _ in range(5 * batch_size)]
            waiting[True].update(work)
            scheduler.add(work, is_bulk=True)
        for own in asking:
            if not own:
                own |= {sequence_of(caller_length, prefix=caller_prefix) for _ in range(call_size)}
                waiting[False].update(own)
                scheduler.add(list(own))
        for sequence in scheduler.step():
            running.remove(sequence)
            for own in asking:
                own.discard(sequence)
    # In a round each caller has its turns, then bulk work has; a prefill is of one turn at least.
    assert longest[True] <= callers * call_size + 1
    assert longest[False] <= 2


# -- aborts ------------------------------------------------------------------------------------------------------------


def test_aborting_a_running_sequence_frees_its_slot():
    engine, scheduler = scheduler_of(batch_size=2)
    running = [sequence_of(40), sequence_of(40)]
    scheduler.add(running)
    scheduler.step()
    scheduler.add([waiting := sequence_of(2)])
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    scheduler.abort(running[0])
    assert scheduler.step() == [running[0]]
    assert (scheduler.running, scheduler.waiting) == (2, 0)
    assert waiting.token_ids == [1, 1]
    scheduler.abort(running[1])
    assert set(run(scheduler)) == {running[1], waiting}
    assert running[0].error is None
    assert_nothing_is_left(engine, scheduler)


def test_aborting_waiting_sequences_frees_what_they_take():
    engine, scheduler = scheduler_of(batch_size=1)
    scheduler.add([sequence_of(5)])
    scheduler.step()
    waiting = [sequence_of(5, prefix=2) for _ in range(3)]
    scheduler.add(waiting)
    assert engine.prefix_cache._pins == {tuple(PREFIXES[2]): 3}
    for sequence in waiting:
        scheduler.abort(sequence)
    assert Counter(scheduler.step()) == Counter(waiting)
    assert scheduler.waiting == 0
    assert engine.prefix_cache._pins == {}
    run(scheduler)
    assert len(engine.prompts) == 1
    assert_nothing_is_left(engine, scheduler)


def test_aborting_all_that_run_frees_the_batch_at_once():
    engine, scheduler = scheduler_of()
    sequences = [sequence_of(40) for _ in range(4)]
    scheduler.add(sequences)
    scheduler.step()
    for sequence in sequences:
        scheduler.abort(sequence)
    assert Counter(scheduler.step()) == Counter(sequences)
    assert_nothing_is_left(engine, scheduler)


# -- errors ------------------------------------------------------------------------------------------------------------


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


# -- memory ------------------------------------------------------------------------------------------------------------


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


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_raises_the_first_error():
    engine = engine_of()
    fail_once(engine, "prefill", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        generate(engine, [Prompt(prefix_ids=[], suffix_ids=[1])], GenerationConfig(), batch_size=1)


def test_a_prompt_is_pinned_while_it_waits():
    engine, scheduler = scheduler_of(batch_size=1)
    scheduler.add([sequence_of(3, prefix=1), sequence_of(3, prefix=1), sequence_of(3, prefix=2)])
    assert engine.prefix_cache._pins == {tuple(PREFIXES[1]): 2, tuple(PREFIXES[2]): 1}
    scheduler.step()
    assert sum(engine.prefix_cache._pins.values()) == 2
    run(scheduler)
    assert_nothing_is_left(engine, scheduler)
