from __future__ import annotations

import math

import numpy as np
import pytest
from fakes import log_softmax
from hypothesis import given
from hypothesis import strategies as st

from qa_onnx import EngineError, GenerationConfig
from qa_onnx.engine.sampling import Predictions, accept, make_random, repeating_tokens, repeats, sampling_probabilities
from qa_onnx.engine.sequence import Prompt, make_sequence

VOCABULARY, END = 6, 5


def sequence_of(prompt_ids=(1,), **options):
    prompt = Prompt(prefix_ids=[], suffix_ids=list(prompt_ids))
    return make_sequence(prompt, GenerationConfig(**options), eos_token_id=END, max_positions=99)


def predictions_of(*scores):
    return Predictions.from_logprobs(log_softmax(np.array([scores], np.float32)), END)


@pytest.mark.parametrize(
    ("ids", "size", "banned"),
    [
        ([1, 2, 1], 2, {2}),
        ([1, 2, 1, 3, 1], 2, {2, 3}),
        ([1, 2, 3, 1, 2], 3, {3}),
        ([1, 2], 3, set()),
        ([1, 2], 1, {1, 2}),
        ([1, 1], 2, {1}),
        ([], 2, set()),
    ],
)
def test_tokens_that_would_repeat_an_ngram(ids, size, banned):
    assert set(repeating_tokens(ids, size).tolist()) == banned


def test_draws_depend_on_seed_and_prompt_alone():
    def draws(seed, ids):
        return make_random(seed, ids).random(4).tolist()

    assert draws(1, [1, 2]) == draws(1, [1, 2])
    assert len({tuple(draws(seed, ids)) for seed in (1, 2) for ids in ([1, 2], [2, 1])}) == 4
    assert draws(None, [1]) != draws(None, [1])


def test_probabilities_of_a_draw_are_normalized_and_bear_large_scores():
    scores = np.array([1000.0, 1001.0, -1000.0, -np.inf], np.float32)
    probabilities = sampling_probabilities(scores, temperature=1.0, top_k=0, top_p=1.0)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[1] == pytest.approx(1 / (1 + math.exp(-1)))
    assert probabilities[3] == 0


@pytest.mark.parametrize(
    ("options", "left"),
    [({"top_k": 2}, [1, 3]), ({"top_p": 0.5}, [3]), ({"top_p": 0.7}, [1, 3]), ({"top_k": 3, "top_p": 0.65}, [1, 3])],
)
def test_top_k_and_top_p_keep_the_most_probable(options, left):
    scores = np.log(np.array([0.1, 0.25, 0.05, 0.6], np.float32))
    probabilities = sampling_probabilities(scores, temperature=1.0, **{"top_k": 0, "top_p": 1.0} | options)
    assert np.flatnonzero(probabilities).tolist() == left
    assert probabilities.sum() == pytest.approx(1)


def test_a_tiny_temperature_takes_the_most_probable_token():
    scores = np.log(np.array([0.1, 0.25, 0.05, 0.6], np.float32))
    assert sampling_probabilities(scores, temperature=1e-300, top_k=0, top_p=1.0).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("threshold", "reason"), [(0.0, "no_answer"), (1.0, "length")])
def test_a_threshold_decides_on_no_answer_alone(threshold, reason):
    sequence = sequence_of(no_answer_threshold=threshold, max_new_tokens=1)
    assert sequence.needs_logprobs
    scores = np.zeros(VOCABULARY)
    scores[END] = 3.0
    accept(sequence, predictions_of(*scores), 0, eos_token_id=END)
    if not sequence.is_finished:  # one more run, for the probability of the end
        accept(sequence, predictions_of(*scores), 0, eos_token_id=END)
    assert sequence.finish_reason == reason
    assert sequence.no_answer_probability == pytest.approx(math.exp(3) / (math.exp(3) + 5))


def test_an_answer_that_is_cut_counts_the_probability_of_its_end():
    sequence = sequence_of(max_new_tokens=2)
    for _ in range(2):
        accept(sequence, predictions_of(0, 4, 0, 0, 0, 0), 0, eos_token_id=END)
    assert (sequence.token_ids, sequence.is_finished) == ([1, 1], False)
    accept(sequence, predictions_of(0, 4, 0, 0, 0, 1), 0, eos_token_id=END)
    assert (sequence.token_ids, sequence.finish_reason) == ([1, 1], "length")
    end = log_softmax(np.array([0, 4, 0, 0, 0, 1.0]))[END]
    assert sequence.logprobs[2:] == [pytest.approx(end, abs=1e-5)]


@pytest.mark.parametrize(("prompt", "options"), [(98, {}), (1, {"ignore_eos": True})])
def test_an_end_that_cannot_be_read_is_not_waited_for(prompt, options):
    sequence = sequence_of([1] * prompt, max_new_tokens=2, **options)
    while not sequence.is_finished:
        accept(sequence, predictions_of(0, 4, 0, 0, 0, 0), 0, eos_token_id=END)
    assert (len(sequence.token_ids), len(sequence.logprobs), sequence.finish_reason) == (2, 2, "length")


@pytest.mark.parametrize(
    ("token_ids", "is_repetition"),
    [
        ([1] * 5, False),
        ([1] * 6, True),
        ([9, 1, 1, 1, 1, 1, 1], True),
        ([1, 2, 1, 2], False),
        ([1, 2, 1, 2, 1, 2], True),
        ([1, 2, 3] * 2, False),
        ([7, *[1, 2, 3] * 3], True),
        ([1, 2, 3] * 3 + [4], False),
        ([], False),
    ],
)
def test_repetitions_are_found_at_the_end(token_ids, is_repetition):
    assert repeats(token_ids) == is_repetition


def test_only_the_first_token_of_a_threshold_needs_all_log_probabilities():
    sequence = sequence_of(no_answer_threshold=0.5, max_new_tokens=9)
    accept(sequence, predictions_of(0, 4, 0, 0, 0, 0), 0, eos_token_id=END)
    assert sequence.token_ids == [1]
    assert not sequence.needs_logprobs


def test_a_token_its_log_probability_and_the_end_are_noted():
    sequence = sequence_of()
    accept(sequence, predictions_of(0, 4, 0, 0, 0, 0), 0, eos_token_id=END)
    accept(sequence, predictions_of(0, 0, 2, 0, 0, 3), 0, eos_token_id=END)
    assert (sequence.token_ids, sequence.finish_reason) == ([1], "stop")
    first, last = 4 - math.log(math.exp(4) + 5), 3 - math.log(math.exp(3) + math.exp(2) + 4)
    assert sequence.logprobs == pytest.approx([first, last])
    assert sequence.no_answer_probability == pytest.approx(1 / (math.exp(4) + 5))


def test_ignore_eos_continues_to_the_last_token():
    sequence = sequence_of(ignore_eos=True, max_new_tokens=2)
    for _ in range(2):
        assert not sequence.is_finished
        accept(sequence, predictions_of(0, 0, 0, 0, 0, 3), 0, eos_token_id=END)
    assert (sequence.token_ids, sequence.finish_reason) == ([END, END], "length")


@pytest.mark.parametrize("largest", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_an_error(largest):
    logprobs = np.full((1, VOCABULARY), largest, np.float32)
    with pytest.raises(EngineError, match="log-probabilities are not numbers"):
        accept(sequence_of(), Predictions.from_logprobs(logprobs, END), 0, eos_token_id=END)


@given(
    scores=st.lists(
        st.lists(st.floats(-20, 20, width=32), min_size=VOCABULARY, max_size=VOCABULARY), min_size=1, max_size=6
    ),
    cut=st.integers(0, 6),
)
def test_predictions_are_concatenated_and_selected(scores, cut):
    logprobs = log_softmax(np.array(scores, np.float32))
    whole = Predictions.from_logprobs(logprobs, END)
    assert whole.token_ids.tolist() == logprobs.argmax(axis=1).tolist()
    assert whole.token_logprobs.tolist() == logprobs.max(axis=1).tolist()
    assert whole.eos_logprobs.tolist() == logprobs[:, END].tolist()
    parts = [Predictions.from_logprobs(part, END) for part in (logprobs[:cut], logprobs[cut:]) if len(part)]
    order = np.arange(len(scores))[::-1]
    for name in ("token_ids", "token_logprobs", "eos_logprobs", "logprobs"):
        assert np.array_equal(getattr(Predictions.concatenate(parts), name), getattr(whole, name))
        assert np.array_equal(getattr(whole.select(order), name), getattr(whole, name)[::-1])
