from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qa_onnx.planner import MAX_GROUP_ROWS, plan_groups, take_batch
from qa_onnx.prompt import Prompt

prompts = st.lists(
    st.builds(
        Prompt,
        passage_ids=st.integers(0, 5).map(lambda length: [9] * length * 7),
        question_ids=st.integers(1, 30).map(lambda length: [8] * length),
    ),
    max_size=60,
).map(lambda prompts: dict(enumerate(prompts)))


@given(prompts=prompts, max_rows=st.integers(1, 40))
def test_every_prompt_is_in_one_group_of_its_passage(prompts, max_rows):
    groups = plan_groups(prompts, max_rows=max_rows)
    assert sorted(index for group in groups for index in group.prompts) == list(range(len(prompts)))
    for group in groups:
        assert 1 <= len(group.prompts) <= min(max_rows, MAX_GROUP_ROWS)
        assert all(tuple(prompts[index].passage_ids) == group.passage_ids for index in group.prompts)


@given(prompts=prompts, max_rows=st.integers(1, 40))
def test_the_groups_of_a_passage_are_neighbours_and_as_few_as_can_be(prompts, max_rows):
    groups = list(plan_groups(prompts, max_rows=max_rows))
    order = [group.passage_ids for group in groups]
    changes = sum(left != right for left, right in pairwise(order))
    assert changes == max(len(set(order)) - 1, 0)
    asked = Counter(tuple(prompt.passage_ids) for prompt in prompts.values())
    most = min(max_rows, MAX_GROUP_ROWS)
    assert Counter(order) == {passage: -(-count // most) for passage, count in asked.items()}


@given(prompts=prompts, max_rows=st.integers(1, 40), max_tokens=st.integers(1, 500))
def test_batches_take_every_prompt_once_and_keep_the_limits(prompts, max_rows, max_tokens):
    queue = plan_groups(prompts, max_rows=16)
    taken = []
    while queue:
        batch = take_batch(queue, prompts, max_rows=max_rows, max_tokens=max_tokens)
        rows = [index for group in batch for index in group.prompts]
        width = max(len(prompts[index].question_ids) for index in rows)
        tokens = len(batch) * max(len(group.passage_ids) for group in batch) + len(rows) * width
        assert 1 <= len(rows) <= max_rows
        assert tokens <= max_tokens or len(rows) == 1
        taken += rows
    assert sorted(taken) == list(range(len(prompts)))
