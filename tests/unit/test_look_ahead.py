"""Look-ahead: drafts are copies from the prefix, change no token whatever they are, and are made where they pay."""

from __future__ import annotations

import pytest
from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx import GenerationConfig
from qa_onnx.engine.look_ahead import MAX_DRAFT, MAX_SEQUENCES, PAUSE, LookAhead, find_draft
from qa_onnx.engine.scheduler import Scheduler
from qa_onnx.engine.sequence import Prompt, make_sequence

MAX_POSITIONS = 99


def sequence_of(prefix, suffix, tokens=(), *, max_new_tokens=50):
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    prompt = Prompt(prefix_ids=list(prefix), suffix_ids=list(suffix))
    sequence = make_sequence(prompt, config, eos_token_id=0, max_positions=MAX_POSITIONS)
    sequence.token_ids += tokens
    return sequence


@pytest.mark.parametrize(
    ("prefix", "tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [4, 5, 6, 7, 8]),
        ([1, 2, 3], [2], [3]),
        ([1, 2, 3], [3], []),  # nothing is behind it
        ([1, 2, 3], [9], []),
        ([5, 3, 7, 2, 3, 8, 1, 2, 3, 9], [1, 2, 3], [9]),
        ([5, 3, 7, 2, 3, 8], [1, 2, 3], [8]),  # two of the three occur
        ([5, 3, 7, 6, 8], [1, 2, 3], [7, 6, 8]),
        ([3], [3], []),
        ([], [3], []),
        ([1, 2, 3], [], []),
    ],
)
def test_a_draft_is_what_comes_after_the_last_tokens_in_the_prefix(prefix, tokens, draft):
    assert find_draft(sequence_of(prefix, [90], tokens)) == draft[:MAX_DRAFT]


def test_of_several_places_the_one_with_the_questions_rare_tokens_is_taken():
    filler = [1] * 26
    prefix = [7, 50, *filler, 7, 51, 30, *filler, 7, 52]
    assert find_draft(sequence_of(prefix, [30, 1, 1, 1], [7]))[0] == 51
    assert find_draft(sequence_of(prefix, [8], [7]))[0] == 50


@pytest.mark.parametrize(("left", "size"), [(0, 0), (1, 1), (4, 4), (20, MAX_DRAFT)])
def test_a_draft_is_no_longer_than_the_answer_may_be(left, size):
    sequence = sequence_of(range(1, 30), [90], [2], max_new_tokens=1 + left)
    assert len(find_draft(sequence)) == size


def test_a_draft_does_not_go_beyond_the_models_positions():
    prefix, suffix = list(range(1, 61)), [61] * 30
    sequence = sequence_of(prefix, suffix, [2])
    sequence.token_ids += [3] * (sequence.tokens_left - 3)
    assert not sequence.scores_end
    computed = len(sequence) + len(sequence.token_ids) + len(find_draft(sequence))
    assert computed <= MAX_POSITIONS


class Drafts:
    """Proposes given drafts, one after the other."""

    def __init__(self, drafts):
        self.drafts, self.observed = drafts, []

    def propose(self, sequences):
        proposed = [self.drafts[index % len(self.drafts)] if self.drafts else [] for index in range(len(sequences))]
        self.drafts = self.drafts[1:] + self.drafts[:1]
        return [
            draft[: sequence.tokens_left - (not sequence.scores_end)]
            for draft, sequence in zip(proposed, sequences, strict=True)
        ]

    def observe(self, drafts, accepted, seconds):
        self.observed.append((drafts, accepted))
        assert seconds >= 0


TOKENS = st.lists(st.integers(1, 4), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    answers=st.lists(TOKENS, min_size=1, max_size=6),
    drafts=st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=4),
    batch_size=st.integers(1, 4),
    max_new_tokens=st.integers(1, 12),
)
def test_no_draft_changes_a_token(answers, drafts, batch_size, max_new_tokens):
    def run(look_ahead):
        engine = FakeEngine(vocab_size=20, max_positions=MAX_POSITIONS)
        scheduler = Scheduler(engine, batch_size=batch_size, look_ahead=look_ahead)
        sequences = [sequence_of([9], answer, max_new_tokens=max_new_tokens) for answer in answers]
        told = []
        for index, sequence in enumerate(sequences):
            sequence.on_token = lambda one, index=index: told.append((index, len(one.token_ids), one.finish_reason))
        scheduler.add(sequences)
        while not scheduler.is_idle:
            scheduler.step()
        results = [(one.token_ids, one.logprobs, one.finish_reason, one.error) for one in sequences]
        return results, sorted(told, key=lambda one: one[0]), engine.stats

    plain, plain_told, plain_stats = run(None)
    got, told, stats = run(Drafts(drafts))
    assert got == plain
    assert told == plain_told  # each token, in order
    if len(answers) <= batch_size:  # else others join at other steps, and it may be one more
        assert stats.decode_steps <= plain_stats.decode_steps
    assert stats.decode_tokens == plain_stats.decode_tokens


class Copies:
    """Proposes what `find_draft` finds, whatever it costs."""

    def propose(self, sequences):
        return [find_draft(sequence) for sequence in sequences]

    def observe(self, *_):
        pass


def test_right_drafts_save_steps():
    engine = FakeEngine(vocab_size=20, max_positions=MAX_POSITIONS)
    scheduler = Scheduler(engine, batch_size=4, look_ahead=Copies())
    sequences = [sequence_of([5, 1, 2, 3, 4, 6], [1, 2, 3, 4]), sequence_of([5, 1, 2, 7], [1, 2, 3])]
    scheduler.add(sequences)
    while not scheduler.is_idle:
        scheduler.step()
    assert [sequence.token_ids for sequence in sequences] == [[1, 2, 3, 4], [1, 2, 3]]
    assert engine.stats.decode_steps == 2  # of the first sequence one: its end is told with its tokens
    assert engine.stats.accepted_draft_tokens == 3 + 1


def test_an_error_after_a_right_token_ends_the_sequence_and_no_other():
    engine = FakeEngine(vocab_size=20, max_positions=MAX_POSITIONS)
    scheduler = Scheduler(engine, batch_size=4, look_ahead=Drafts([[2, 3]]))
    broken, whole = sequence_of([], [1, 2, 3]), sequence_of([], [1, 2, 3])
    broken.on_token = lambda one: 1 / 0 if len(one.token_ids) == 2 else None
    scheduler.add([broken, whole])
    while not scheduler.is_idle:
        scheduler.step()
    assert isinstance(broken.error, ZeroDivisionError)
    assert (whole.token_ids, whole.finish_reason) == ([1, 2, 3], "stop")


def simulate(seconds_of, accepts, *, steps, sequences=1):
    """Steps of sequences that always have a draft; returns the steps with drafts, tokens and seconds."""
    look_ahead = LookAhead()
    running = [sequence_of(range(1, 30), [90], [3]) for _ in range(sequences)]
    drafted, tokens, seconds = [], 0, 0.0
    for step in range(steps):
        drafts = look_ahead.propose(running)
        accepted = [accepts if draft else 0 for draft in drafts]
        taken = seconds_of(len(drafts) + sum(map(len, drafts)))
        look_ahead.observe(drafts, accepted, taken)
        if any(drafts):
            drafted.append(step)
        tokens += sequences + sum(accepted)
        seconds += taken
    return drafted, tokens, seconds


@pytest.mark.parametrize("sequences", [1, 3, MAX_SEQUENCES])
def test_drafts_are_made_where_a_step_takes_no_longer_with_them(sequences):
    drafted, _, _ = simulate(lambda tokens: 1 + 0.001 * tokens, 2, steps=200, sequences=sequences)
    assert 194 <= len(drafted) < 200  # now and then it measures what a step takes without


@pytest.mark.parametrize("every", [7, 10, 33])
def test_steps_that_something_else_holds_up_do_not_end_drafts(every):
    """Another process on the cores, a collection of garbage: a step now and then takes twenty times as long."""
    counted = iter(range(10**6))

    def seconds_of(tokens):
        return (1 + 0.05 * tokens) * (20 if next(counted) % every == 3 else 1)

    drafted, _, _ = simulate(seconds_of, 2, steps=1_000)
    assert len(drafted) > 900


@pytest.mark.parametrize("sequences", [1, 4, MAX_SEQUENCES])
@pytest.mark.parametrize(("each", "accepts"), [(0.2, 0), (1.0, 1), (5.0, 3)])
def test_where_drafts_cost_more_than_they_give_little_is_lost(sequences, each, accepts):
    steps = 60 * PAUSE

    def seconds_of(tokens):
        return 1 + each * tokens

    drafted, tokens, seconds = simulate(seconds_of, accepts, steps=steps, sequences=sequences)
    rate, plain_rate = tokens / seconds, sequences / seconds_of(sequences)
    assert drafted
    assert drafted[-1] > steps // 2  # it is tried again now and then: another context may be copied from
    assert rate > 0.98 * plain_rate


def test_a_batch_of_many_sequences_has_no_drafts():
    drafted, _, _ = simulate(lambda tokens: 1.0, 3, steps=50, sequences=MAX_SEQUENCES + 1)
    assert not drafted
