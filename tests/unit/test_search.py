"""Best-first search against all answers of a small "model", enumerated."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
from fakes import log_softmax

from qa_onnx import GenerationConfig
from qa_onnx.engine.sampling import Predictions, accept
from qa_onnx.engine.sequence import Prompt, make_sequence
from qa_onnx.search import Candidate, Search

VOCABULARY, END = 6, 5


def logprobs_after(token_ids, sharpness):
    draw = np.random.default_rng(zlib.crc32(bytes(token_ids)))
    return log_softmax(draw.normal(size=VOCABULARY) * sharpness)


def search_all(config, sharpness, seed):
    """Runs a search by hand, with a "model" whose log-probabilities are drawn from the tokens before."""
    prompt = Prompt(prefix_ids=[seed], suffix_ids=[1])

    def make(hypothesis):
        return make_sequence(prompt, config, eos_token_id=END, max_positions=99, hypothesis=hypothesis)

    def read(sequence):
        return Candidate(
            text=" ".join(map(str, sequence.token_ids)),
            start=None,
            token_ids=tuple(sequence.token_ids),
            logprobs=tuple(sequence.logprobs),
            finish_reason=sequence.finish_reason,
        )

    search = Search(make, read, num_answers=config.num_answers)
    waiting, rollouts = list(search.sequences), 0
    while waiting:
        sequence = waiting.pop(0)
        rollouts += 1
        assert sequence.suffix_ids == [1, *sequence.token_ids]
        while not sequence.is_finished:
            logprobs = logprobs_after([seed, 1, *sequence.token_ids], sharpness)
            accept(sequence, Predictions.from_logprobs(logprobs[None], END), 0, eos_token_id=END)
        waiting += search.finish(sequence)
    return search.candidates, rollouts


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_the_most_probable_answers_of_all(seed):
    config = GenerationConfig(num_answers=3, max_new_tokens=3)
    found, rollouts = search_all(config, sharpness=4.0, seed=seed)
    scores = {}
    for length in range(4):
        for tokens in itertools.product(range(END), repeat=length):
            read = [seed, 1]
            logprob = 0.0
            for token in (*tokens, END):
                logprob += logprobs_after(read, 4.0)[token]
                read.append(token)
            scores[" ".join(map(str, tokens))] = logprob
    best = sorted(scores.items(), key=lambda item: -item[1])[:3]
    assert [candidate.text for candidate in found] == [text for text, _ in best]
    assert [candidate.logprob for candidate in found] == pytest.approx([logprob for _, logprob in best])
    assert rollouts <= 1 + 4 * 3


def test_a_search_without_end_stops_and_gives_different_texts():
    found, rollouts = search_all(GenerationConfig(num_answers=3, max_new_tokens=12), sharpness=0.05, seed=1)
    assert rollouts <= 1 + 4 * 3
    assert len({candidate.text for candidate in found}) == len(found) == 3
    assert [candidate.logprob for candidate in found] == sorted((c.logprob for c in found), reverse=True)
