"""The engine's loop against a fake session: a "model" whose next token depends on exactly the real tokens it is given.

The fake keeps, as keys of its only layer, the tokens it has read. Its next token is a checksum of a row's real tokens
in order of their positions, so a wrong mask, position, row order or cache changes the answer.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx.engine import Engine, pad_left, position_ids_of
from qa_onnx.kv_cache import KVCache

VOCABULARY, END = 50, 0


class FakeValue:
    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array

    def shape(self):
        return list(self.array.shape)


class FakeSession:
    input_names = ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key")
    output_names = ("logits", "present.0.key")

    def __init__(self):
        self.batch_sizes = []

    def to_device(self, array):
        return FakeValue(array)

    def select_rows(self, value, rows):
        return FakeValue(value.array[rows])

    def run(self, inputs):
        ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
        assert ids.dtype == mask.dtype == positions.dtype == np.int64
        assert positions.shape == ids.shape
        new = np.stack([ids, positions], axis=-1).astype(np.float32)[:, None]
        present = np.concatenate([inputs["past_key_values.0.key"].array, new], axis=2)
        assert mask.shape == (len(ids), present.shape[2])
        logits = np.zeros((len(ids), VOCABULARY), np.float32)
        for row, (keys, real) in enumerate(zip(present[:, 0], mask.astype(bool), strict=True)):
            logits[row, self.next_token(keys[real])] = 1.0
        self.batch_sizes.append(len(ids))
        return {"logits": FakeValue(logits), "present.0.key": FakeValue(present)}

    @staticmethod
    def next_token(read):
        tokens, positions = read[:, 0], read[:, 1]
        assert positions.tolist() == list(range(len(positions)))
        checksum = zlib.crc32(tokens.astype(np.int64).tobytes())
        return END if checksum % 7 == 0 else 1 + checksum % (VOCABULARY - 1)


def engine_of(session, max_positions=64):
    return Engine(session, heads=1, head_size=2, eos_token_id=END, max_positions=max_positions)


def expected(prompt, max_new_tokens, max_positions=64):
    tokens = list(prompt)
    for _ in range(min(max_new_tokens, max_positions - len(prompt) + 1)):
        read = np.stack([tokens, range(len(tokens))], axis=-1)
        token = FakeSession.next_token(read)
        if token == END:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


prompts_of_any_lengths = st.lists(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40), min_size=1, max_size=12
)


@settings(deadline=None)
@given(prompts=prompts_of_any_lengths, max_new_tokens=st.integers(1, 20))
def test_a_row_gets_the_same_tokens_in_any_batch(prompts, max_new_tokens):
    generations = engine_of(FakeSession()).greedy_decode(prompts, max_new_tokens=max_new_tokens)
    got = [(generation.token_ids, generation.finish_reason) for generation in generations]
    assert got == [expected(prompt, max_new_tokens) for prompt in prompts]


def test_the_expected_tokens_hold_both_ways_of_ending():
    reasons = {expected([token], 8)[1] for token in range(1, VOCABULARY)}
    assert reasons == {"stop", "length"}


def test_finished_rows_leave_the_batch():
    prompts = [[token] for token in range(1, 30)]
    session = FakeSession()
    engine_of(session).greedy_decode(prompts, max_new_tokens=10)
    lengths = [len(expected(prompt, 10)[0]) for prompt in prompts]
    stopped_early = [expected(prompt, 10)[1] == "stop" for prompt in prompts]
    needed = [length + 1 if stopped else length for length, stopped in zip(lengths, stopped_early, strict=True)]
    assert session.batch_sizes == [sum(runs > step for runs in needed) for step in range(max(needed))]


@pytest.mark.parametrize(("length", "tokens"), [(8, 1), (7, 2), (5, 4)])
def test_a_row_ends_when_its_positions_are_used_up(length, tokens):
    prompt = next([first] * length for first in range(1, VOCABULARY) if expected([first] * length, 9, 8)[1] == "length")
    generation = engine_of(FakeSession(), max_positions=8).greedy_decode([prompt, [1]], max_new_tokens=9)[0]
    assert (len(generation.token_ids), generation.finish_reason) == (tokens, "length")


def test_padding_is_on_the_left_and_positions_count_real_tokens():
    input_ids, attention_mask = pad_left([[5, 6], [7, 8, 9]], pad_id=0)
    assert input_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert position_ids_of(attention_mask).tolist() == [[0, 0, 1], [0, 1, 2]]


def test_the_cache_knows_its_shape_and_its_bytes():
    cache = KVCache(FakeSession(), {"past_key_values.0.key": FakeValue(np.zeros((3, 4, 5, 2), np.float32))})
    assert cache.shape == (3, 4, 5, 2)
    assert cache.nbytes == 3 * 4 * 5 * 2 * 4
    assert cache.select_rows([2, 0]).shape == (2, 4, 5, 2)
