"""The engine's loop against a fake session: a "model" whose next token depends on exactly the tokens it attends to.

The fake keeps, as keys of its only layer, the tokens it has read and their positions. Its next token is a checksum of
what a token attends to, so a wrong mask, position, slot, row order or cache changes the answer.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx.decoding import greedy_decode
from qa_onnx.engine import Engine
from qa_onnx.kv_cache import CacheLayout, CachePool, KVCache, PassageCache
from qa_onnx.prompt import Prompt
from qa_onnx.session import Limits

VOCABULARY, END = 50, 0
LAYOUT = CacheLayout(layers=1, heads=1, head_size=2)
PASSAGES = ([], [3], list(range(1, 20)), [7] * 16, list(range(40, 5, -1)))


class FakeValue:
    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array


class FakeSession:
    """`provider` "cuda" stands for a device of its own: its values are copies, which only `numpy` brings back."""

    def __init__(self, provider="cpu"):
        self.provider = provider
        self.limits = Limits(prefill_tokens=48, batch_tokens=300)
        self.token_counts, self.row_counts, self.grids = [], [], []

    def to_device(self, array):
        return FakeValue(array if self.provider == "cpu" else array.copy())

    def run(self, inputs, *, in_place):
        ids, positions, slots = inputs["input_ids"], inputs["position_ids"], inputs["slot_index"]
        assert ids.dtype == positions.dtype == slots.dtype == np.int64
        assert in_place["present.0.key"] is inputs["past_key_values.0.key"]
        new = np.stack([ids, positions], axis=-1).astype(np.float32)
        own, passages = in_place["present.0.key"].array, inputs["passage.0.key"].array
        for group, column in enumerate(inputs["write_index"].tolist()):
            own[group, 0, :, column : column + slots.shape[2]] = new[slots[group]]
        keys = np.concatenate([np.broadcast_to(passages, (*own.shape[:3], passages.shape[3], 2)), own], axis=3)
        visible = inputs["attention_bias"] == 0
        read = []
        for token, slot in enumerate(inputs["token_index"].tolist()):
            group, row, place = np.unravel_index(slot, slots.shape)
            read.append(keys[group, 0, row][visible[group, 0, row, place]])
            assert read[-1][-1].tolist() == new[token].tolist()
        logits = np.zeros((len(inputs["output_index"]), VOCABULARY), np.float32)
        for row, token in enumerate(inputs["output_index"].tolist()):
            logits[row, self.next_token(read[token])] = 1.0
        self.token_counts.append(len(ids))
        self.row_counts.append(len(logits))
        self.grids.append(slots.shape)
        return {"logits": FakeValue(logits)}

    @staticmethod
    def next_token(read):
        tokens, positions = read[:, 0], read[:, 1]
        assert positions.tolist() == list(range(len(positions)))
        checksum = zlib.crc32(tokens.astype(np.int64).tobytes())
        return END if checksum % 7 == 0 else 1 + checksum % (VOCABULARY - 1)


def engine_of(session, max_positions=80, cache_bytes=0):
    return Engine(
        session,
        layout=LAYOUT,
        eos_token_id=END,
        max_positions=max_positions,
        passage_cache=PassageCache(cache_bytes),
    )


def expected(prompt, max_new_tokens, max_positions=80):
    tokens = list(prompt.ids)
    for _ in range(min(max_new_tokens, max_positions - len(prompt) + 1)):
        read = np.stack([tokens, range(len(tokens))], axis=-1)
        token = FakeSession.next_token(read)
        if token == END:
            return tokens[len(prompt) :], "stop" if len(tokens) > len(prompt) else "no_answer"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


def asked(*question_ids, passage=()):
    return Prompt(passage_ids=list(passage), question_ids=list(question_ids))


def alone(count):
    return [asked(token) for token in range(1, count + 1)]


prompts_of_any_lengths = st.lists(
    st.builds(
        Prompt,
        passage_ids=st.sampled_from(PASSAGES),
        question_ids=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=14,
)


@settings(deadline=None)
@given(
    prompts=prompts_of_any_lengths,
    max_new_tokens=st.integers(1, 40),
    batch_size=st.integers(1, 15),
    provider=st.sampled_from(["cpu", "cuda"]),
    cache_bytes=st.sampled_from([0, 300, 10**6]),
)
def test_a_row_gets_the_same_tokens_in_any_batch(prompts, max_new_tokens, batch_size, provider, cache_bytes):
    engine = engine_of(FakeSession(provider), cache_bytes=cache_bytes)
    for _ in range(2):  # the second time some passages are remembered
        generations = greedy_decode(engine, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        got = [(generation.token_ids, generation.finish_reason) for generation in generations]
        assert got == [expected(prompt, max_new_tokens) for prompt in prompts]


def test_the_expected_tokens_hold_both_ways_of_ending():
    assert {expected(prompt, 8)[1] for prompt in alone(VOCABULARY - 1)} == {"stop", "length", "no_answer"}


def test_finished_rows_leave_the_batch():
    session = FakeSession()
    prompts = alone(14)
    greedy_decode(engine_of(session), prompts, max_new_tokens=10, batch_size=14)
    outcomes = [expected(prompt, 10) for prompt in prompts]
    needed = [len(tokens) + (reason != "length") for tokens, reason in outcomes]
    assert session.row_counts == [sum(runs > step for runs in needed) for step in range(max(needed))]


def test_others_take_the_places_of_finished_rows():
    """12 questions, 4 at a time: with refilling, fewer steps than three batches one after the other take."""
    prompts = alone(12)
    session = FakeSession()
    greedy_decode(engine_of(session), prompts, max_new_tokens=16, batch_size=4)
    steps = len(session.row_counts)
    batches = []
    for first in range(0, 12, 4):
        session = FakeSession()
        greedy_decode(engine_of(session), prompts[first : first + 4], max_new_tokens=16, batch_size=4)
        batches.append(len(session.row_counts))
    assert steps < sum(batches)
    assert max(session.row_counts) <= 4


def test_no_run_computes_padding_and_a_passage_is_read_once():
    prompts = [asked(*range(1, 2 + row), passage=PASSAGES[row % 3 + 2]) for row in range(9)]
    session = FakeSession()
    engine = engine_of(session, cache_bytes=10**6)
    greedy_decode(engine, prompts, max_new_tokens=1, batch_size=9)
    questions = sum(len(prompt.question_ids) for prompt in prompts)
    assert sum(session.token_counts) == sum(len(passage) for passage in PASSAGES[2:]) + questions
    session.token_counts.clear()
    greedy_decode(engine, prompts, max_new_tokens=1, batch_size=9)
    assert sum(session.token_counts) == questions


def test_a_batch_keeps_to_the_tokens_that_its_memory_has_room_for():
    prompts = [asked(*range(1, 31)) for _ in range(40)]
    session = FakeSession()
    greedy_decode(engine_of(session), prompts, max_new_tokens=1, batch_size=10**9)
    assert max(rows * groups for groups, rows, _ in session.grids) * 30 <= session.limits.batch_tokens


@pytest.mark.parametrize(("length", "tokens"), [(8, 1), (7, 2), (5, 4)])
def test_a_row_ends_when_its_positions_are_used_up(length, tokens):
    candidates = (asked(*[first] * length) for first in range(1, VOCABULARY))
    prompt = next(prompt for prompt in candidates if expected(prompt, 9, 8)[1] == "length")
    engine = engine_of(FakeSession(), max_positions=8)
    generation = greedy_decode(engine, [prompt, asked(1)], max_new_tokens=9, batch_size=2)[0]
    assert (len(generation.token_ids), generation.finish_reason) == (tokens, "length")


def test_no_prompts_are_no_work():
    session = FakeSession()
    assert greedy_decode(engine_of(session), [], max_new_tokens=3, batch_size=2) == []
    assert session.row_counts == []


def test_the_passage_cache_keeps_to_its_bytes_and_forgets_what_was_used_longest_ago():
    cache = PassageCache(100)
    for name in (1, 2):
        cache.put((name,), np.zeros(10, np.float32))
    cache.get((1,))
    cache.put((3,), np.zeros(10, np.float32))
    assert [cache.get((name,)) is None for name in (1, 2, 3)] == [False, True, False]
    assert (len(cache), cache.nbytes) == (2, 80)
    cache.put((4,), np.zeros(26, np.float32))
    assert (cache.get((4,)), cache.nbytes) == (None, 80)


def test_a_passage_cache_of_no_bytes_keeps_nothing():
    cache = PassageCache(0)
    cache.put((1,), np.zeros(1, np.float32))
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_cache_names_its_layers_as_the_graph_does():
    array = CachePool(CacheLayout(layers=2, heads=3, head_size=4)).take(groups=2, rows=5, columns=6)
    assert array.shape == (4, 2, 3, 5, 6, 4)
    names = list(KVCache(FakeSession(), array).named("past."))
    assert names == ["past.0.key", "past.0.value", "past.1.key", "past.1.value"]


def test_memory_that_was_given_back_is_used_again_and_the_largest_is_kept():
    pool = CachePool(LAYOUT)
    sizes = {"groups": 3, "rows": 1}
    arrays = [pool.take(columns=columns, **sizes) for columns in range(1, CachePool.MAX_FREE + 2)]
    assert all((array == 0).all() for array in arrays)
    for array in arrays:
        pool.give_back(array)
    assert np.shares_memory(pool.take(columns=1, **sizes), arrays[1])  # the smallest was let go
    assert np.shares_memory(pool.take(columns=len(arrays), **sizes), arrays[-1])
    assert not any(np.shares_memory(pool.take(columns=9, **sizes), array) for array in arrays)
