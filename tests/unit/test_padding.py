"""Padded batches for PyTorch."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from training.padding import pad_left, plan_batches

lengths_and_limits = {
    "lengths": st.lists(st.integers(1, 60), max_size=50),
    "max_rows": st.integers(1, 9),
    "max_tokens": st.integers(1, 200),
}


@given(**lengths_and_limits)
def test_every_prompt_is_in_one_batch_longest_first(lengths, max_rows, max_tokens):
    order = [index for batch in plan_batches(lengths, max_rows=max_rows, max_tokens=max_tokens) for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


@given(**lengths_and_limits)
def test_batches_keep_the_limits_and_a_longer_prompt_is_alone(lengths, max_rows, max_tokens):
    for batch in plan_batches(lengths, max_rows=max_rows, max_tokens=max_tokens):
        padded = len(batch) * max(lengths[index] for index in batch)
        assert 1 <= len(batch) <= max_rows
        assert padded <= max_tokens or len(batch) == 1


@given(**lengths_and_limits)
def test_a_batch_ends_only_where_one_more_would_break_a_limit(lengths, max_rows, max_tokens):
    for batch, _ in pairwise(plan_batches(lengths, max_rows=max_rows, max_tokens=max_tokens)):
        assert len(batch) == max_rows or (len(batch) + 1) * lengths[batch[0]] > max_tokens


def test_prompts_of_one_length_keep_their_order():
    assert plan_batches([5, 7, 5, 7], max_rows=3, max_tokens=100) == [[1, 3, 0], [2]]


def test_padding_is_on_the_left():
    input_ids, attention_mask = pad_left([[5, 6], [7, 8, 9]], pad_id=0)
    assert input_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
