"""The engine against a fake runtime: a "model" whose next token depends on exactly the tokens it attends to."""

from __future__ import annotations

import pytest
from fake_engines import MODES, PREFIXES, engine_of, expected, generate_all, prompt_of, prompts_alone
from fake_onnxruntime import VOCABULARY, make_sessions
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx.engine.sequence import Prompt

prompts_of_any_lengths = st.lists(
    st.builds(
        Prompt,
        prefix_ids=st.sampled_from(PREFIXES),
        suffix_ids=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None)
@given(
    prompts=prompts_of_any_lengths,
    max_new_tokens=st.integers(1, 40),
    batch_size=st.integers(1, 15),
    prefix_cache_bytes=st.sampled_from([0, 3000, 10**6]),
    threshold=st.sampled_from([None, 1.0]),
)
def test_a_sequence_gets_the_same_tokens_in_any_batch(
    mode, prompts, max_new_tokens, batch_size, prefix_cache_bytes, threshold
):
    engine = engine_of(make_sessions(mode), prefix_cache_bytes=prefix_cache_bytes)
    answers = [expected(prompt, max_new_tokens, threshold=threshold) for prompt in prompts]
    for _ in range(2):  # the second time some prefixes are in the prefix cache
        got = generate_all(engine, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, threshold=threshold)
        assert got == answers


def test_the_expected_tokens_hold_all_ways_of_ending_and_long_answers():
    outcomes = [expected(prompt, 40) for prompt in prompts_alone(VOCABULARY - 1)]
    assert {reason for _, reason in outcomes} == {"stop", "length", "no_answer"}
    assert max(len(tokens) for tokens, _ in outcomes) == 40  # more than one column step, of either mode


def test_finished_sequences_leave_the_batch():
    sessions = make_sessions()
    prompts = prompts_alone(14)
    generate_all(engine_of(sessions), prompts, max_new_tokens=10, batch_size=14)
    outcomes = [expected(prompt, 10) for prompt in prompts]
    needed = [len(tokens) + 1 for tokens, _ in outcomes]  # one run more gives the end or its probability
    assert sessions[0].sequence_counts == [sum(runs > step for runs in needed) for step in range(max(needed))]


def test_others_take_the_slots_of_finished_sequences():
    """12 prompts, 4 at a time: with refilling, fewer steps than three batches one after the other take."""
    prompts = prompts_alone(12)
    sessions = make_sessions()
    generate_all(engine_of(sessions), prompts, max_new_tokens=16, batch_size=4)
    steps = len(sessions[0].sequence_counts)
    batches = []
    for first in range(0, 12, 4):
        alone = make_sessions()
        generate_all(engine_of(alone), prompts[first : first + 4], max_new_tokens=16, batch_size=4)
        batches.append(len(alone[0].sequence_counts))
    assert steps < sum(batches)
    assert max(sessions[0].sequence_counts) <= 4


def test_no_run_computes_padding_and_a_prefix_is_read_once():
    prompts = [prompt_of(*range(1, 2 + row), prefix=PREFIXES[row % 3 + 2]) for row in range(9)]
    sessions = make_sessions()
    engine = engine_of(sessions, prefix_cache_bytes=10**6)
    generate_all(engine, prompts, max_new_tokens=1, batch_size=9, ignore_eos=True)
    suffixes = sum(len(prompt.suffix_ids) for prompt in prompts)
    assert sum(sessions[0].token_counts) == sum(len(prefix) for prefix in PREFIXES[2:]) + suffixes
    sessions[0].token_counts.clear()
    generate_all(engine, prompts, max_new_tokens=1, batch_size=9, ignore_eos=True)
    assert sum(sessions[0].token_counts) == suffixes


def test_a_prefix_of_more_sequences_than_a_group_is_computed_once():
    prompts = [prompt_of(1 + row, prefix=PREFIXES[2]) for row in range(40)]
    sessions = make_sessions(max_batch_tokens=10**4)
    engine = engine_of(sessions)
    generate_all(engine, prompts, max_new_tokens=1, batch_size=40, ignore_eos=True)
    assert sum(sessions[0].token_counts) == len(PREFIXES[2]) + 40


def test_a_prefix_that_sequences_wait_for_is_computed_once_without_a_prefix_cache():
    prompts = [prompt_of(1 + row, prefix=PREFIXES[2]) for row in range(9)]
    sessions = make_sessions()
    engine = engine_of(sessions, prefix_cache_bytes=0)
    generate_all(engine, prompts, max_new_tokens=1, batch_size=2, ignore_eos=True)
    assert sum(sessions[0].token_counts) == len(PREFIXES[2]) + 9
    assert engine.prefix_cache.stats().entries == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("length", "tokens"), [(8, 1), (7, 2), (5, 4)])
def test_a_sequence_ends_when_its_positions_are_used_up(mode, length, tokens):
    candidates = (prompt_of(*[first] * length) for first in range(1, VOCABULARY))
    prompt = next(prompt for prompt in candidates if expected(prompt, 9, max_positions=8)[1] == "length")
    engine = engine_of(make_sessions(mode), max_positions=8)
    token_ids, finish_reason = generate_all(engine, [prompt, prompt_of(1)], max_new_tokens=9, batch_size=2)[0]
    assert (len(token_ids), finish_reason) == (tokens, "length")


def test_no_prompts_are_no_work():
    sessions = make_sessions()
    assert generate_all(engine_of(sessions), [], max_new_tokens=3, batch_size=2) == []
    assert sessions[0].sequence_counts == []


def test_stats_count_what_is_computed():
    prompts = [prompt_of(1 + row, prefix=PREFIXES[2]) for row in range(4)]
    sessions = make_sessions()
    engine = engine_of(sessions, prefix_cache_bytes=10**6)
    generate_all(engine, prompts, max_new_tokens=8, batch_size=4)
    assert (engine.stats.prefills, engine.stats.prefill_tokens) == (1, len(PREFIXES[2]) + 4)
    assert engine.stats.decode_steps == len(sessions[0].sequence_counts) - 1
    assert engine.stats.decode_tokens == sum(sessions[0].sequence_counts[1:])
    assert engine.stats.cuda_graphs == 0
