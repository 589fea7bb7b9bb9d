"""A scheduler on a fake engine, and scripts of what it is given."""

from __future__ import annotations

from fakes import FakeEngine
from hypothesis import strategies as st

from qa_onnx import GenerationConfig
from qa_onnx.engine.scheduler import Scheduler
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
