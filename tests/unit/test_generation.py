from __future__ import annotations

import dataclasses
import itertools
import math
import zlib

import numpy as np
import pytest

from qa_onnx import GenerationConfig, InvalidInputError
from qa_onnx.decoding import Row
from qa_onnx.generation import log_sum_exp, make_random, repeating_tokens
from qa_onnx.prompt import Prompt
from qa_onnx.search import Candidate, Search

VOCABULARY, END = 6, 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "got max_new_tokens 0; expected a whole number of at least 1"),
        ({"top_k": 0}, "got top_k 0"),
        ({"top_k": True}, "got top_k True"),
        ({"no_repeat_ngram_size": -1}, "got no_repeat_ngram_size -1; expected a whole number of at least 0"),
        ({"stride": -1}, "got stride -1"),
        ({"temperature": -0.1}, "got temperature -0.1; expected a number of at least 0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"temperature": math.inf}, "got temperature inf"),
        ({"temperature": "1"}, "got temperature '1'"),
        ({"temperature": 1.0, "top_p": 0.0}, "got top_p 0.0; expected a number above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "got top_p 1.1"),
        ({"temperature": 1.0, "top_k_tokens": -1}, "got top_k_tokens -1"),
        ({"temperature": 1.0, "seed": -1}, "got seed -1"),
        ({"no_answer_threshold": 1.1}, "got no_answer_threshold 1.1; expected a probability"),
        ({"no_answer_threshold": -0.1}, "got no_answer_threshold -0.1"),
        ({"grounded": 1}, "got grounded 1; expected True or False"),
        ({"top_p": 0.9}, "without a temperature; they have no effect"),
        ({"top_k_tokens": 5}, "without a temperature"),
        ({"seed": 1}, "without a temperature"),
        ({"temperature": 1.0, "top_k": 2}, "got top_k 2 with a temperature"),
        ({"grounded": True, "no_repeat_ngram_size": 2}, "got grounded with no_repeat_ngram_size"),
    ],
)
def test_options_out_of_range_or_at_odds_are_refused_when_made(options, words):
    with pytest.raises(InvalidInputError) as caught:
        GenerationConfig(**options)
    assert words in str(caught.value)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().top_k = 2


def test_log_sum_exp_normalises_and_bears_large_logits():
    logits = np.array([1000.0, 1001.0, -1000.0], np.float32)
    probabilities = np.exp(logits.astype(np.float64) - log_sum_exp(logits))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[1] == pytest.approx(1 / (1 + math.exp(-1)))


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
def test_tokens_that_would_repeat_a_sequence(ids, size, banned):
    assert set(repeating_tokens(ids, size).tolist()) == banned


def test_draws_depend_on_seed_and_prompt_alone():
    def draws(seed, ids):
        return make_random(seed, ids).random(4).tolist()

    assert draws(1, [1, 2]) == draws(1, [1, 2])
    assert len({tuple(draws(seed, ids)) for seed in (1, 2) for ids in ([1, 2], [2, 1])}) == 4
    assert draws(None, [1]) != draws(None, [1])


def logits_after(token_ids, sharpness):
    draw = np.random.default_rng(zlib.crc32(bytes(token_ids)))
    return (draw.normal(size=VOCABULARY) * sharpness).astype(np.float32)


def log_probabilities(token_ids, sharpness):
    logits = logits_after(token_ids, sharpness)
    return logits.astype(np.float64) - log_sum_exp(logits)


def search_all(config, sharpness, seed):
    """Runs a search by hand, with a "model" whose logits are drawn from the tokens before."""
    prompt = Prompt(passage_ids=[seed], question_ids=[1])

    def make_row(prefix):
        return Row(prompt, config, eos_token_id=END, max_positions=99, prefix=prefix)

    def read(row):
        return Candidate(
            text=" ".join(map(str, row.token_ids)),
            start=None,
            new_tokens=len(row.token_ids),
            logprobs=tuple(row.logprobs),
            finish_reason=row.finish_reason,
        )

    search = Search(make_row, read, top_k=config.top_k)
    waiting, rollouts = list(search.rows), 0
    while waiting:
        row = waiting.pop(0)
        rollouts += 1
        tokens = [seed, 1, *row.token_ids]
        while (token := row.accept(logits_after(tokens, sharpness))) is not None:
            tokens.append(token)
        waiting += search.finished(row)
    return search.candidates, rollouts


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_the_most_probable_answers_of_all(seed):
    config = GenerationConfig(top_k=3, max_new_tokens=3)
    found, rollouts = search_all(config, sharpness=4.0, seed=seed)
    scores = {}
    for length in range(4):
        for tokens in itertools.product(range(END), repeat=length):
            read = [seed, 1]
            logprob = 0.0
            for token in (*tokens, END)[:3]:
                logprob += log_probabilities(read, 4.0)[token]
                read.append(token)
            scores[" ".join(map(str, tokens))] = logprob
    best = sorted(scores.items(), key=lambda item: -item[1])[:3]
    assert [candidate.text for candidate in found] == [text for text, _ in best]
    assert [candidate.logprob for candidate in found] == pytest.approx([logprob for _, logprob in best])
    assert rollouts <= 1 + 4 * 3


def test_a_search_without_end_stops_and_gives_different_texts():
    found, rollouts = search_all(GenerationConfig(top_k=3, max_new_tokens=12), sharpness=0.05, seed=1)
    assert rollouts <= 1 + 4 * 3
    assert len({candidate.text for candidate in found}) == len(found) == 3
    assert [candidate.logprob for candidate in found] == sorted((c.logprob for c in found), reverse=True)


@pytest.mark.parametrize(("threshold", "reason"), [(0.0, "no_answer"), (1.0, "length")])
def test_a_threshold_decides_on_no_answer_alone(threshold, reason):
    row = Row(
        Prompt(passage_ids=[], question_ids=[1]),
        GenerationConfig(no_answer_threshold=threshold, max_new_tokens=1),
        eos_token_id=END,
        max_positions=9,
    )
    logits = np.zeros(VOCABULARY, np.float32)
    logits[END] = 3.0
    assert row.accept(logits) is None
    assert row.finish_reason == reason
    assert row.no_answer_probability == pytest.approx(math.exp(3) / (math.exp(3) + 5))
