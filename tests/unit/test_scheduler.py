"""The scheduler on a fake engine: who is computed when, and what aborts end."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedulers import (
    PREFIXES,
    assert_answered,
    assert_nothing_is_left,
    lengths,
    run,
    scheduler_of,
    scripts,
    sequence_of,
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


def test_a_prompt_is_pinned_while_it_waits():
    engine, scheduler = scheduler_of(batch_size=1)
    scheduler.add([sequence_of(3, prefix=1), sequence_of(3, prefix=1), sequence_of(3, prefix=2)])
    assert engine.prefix_cache._pins == {tuple(PREFIXES[1]): 2, tuple(PREFIXES[2]): 1}
    scheduler.step()
    assert sum(engine.prefix_cache._pins.values()) == 2
    run(scheduler)
    assert_nothing_is_left(engine, scheduler)
