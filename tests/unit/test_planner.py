from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qa_onnx.config import GenerationConfig
from qa_onnx.engine.planner import MAX_GROUP_ROWS, plan_groups, take_batch
from qa_onnx.engine.sequence import Sequence

sequences = st.lists(
    st.builds(
        Sequence,
        prefix_ids=st.integers(0, 5).map(lambda length: (9,) * length * 7),
        suffix_ids=st.integers(1, 30).map(lambda length: [8] * length),
        config=st.just(GenerationConfig()),
        max_new_tokens=st.just(32),
    ),
    max_size=60,
)


@given(sequences=sequences, max_rows=st.integers(1, 40))
def test_every_sequence_is_in_one_group_of_its_prefix(sequences, max_rows):
    groups = plan_groups(sequences, max_rows=max_rows)
    grouped = [sequence for group in groups for sequence in group.sequences]
    assert (len(grouped), set(grouped)) == (len(sequences), set(sequences))
    for group in groups:
        assert 1 <= len(group.sequences) <= min(max_rows, MAX_GROUP_ROWS)
        assert all(sequence.prefix_ids == group.prefix_ids for sequence in group.sequences)
        assert group.suffix_width == max(len(sequence.suffix_ids) for sequence in group.sequences)


@given(sequences=sequences, max_rows=st.integers(1, 40))
def test_the_groups_of_a_prefix_are_neighbors_and_as_few_as_can_be(sequences, max_rows):
    groups = list(plan_groups(sequences, max_rows=max_rows))
    order = [group.prefix_ids for group in groups]
    changes = sum(left != right for left, right in pairwise(order))
    assert changes == max(len(set(order)) - 1, 0)
    sharing = Counter(sequence.prefix_ids for sequence in sequences)
    limit = min(max_rows, MAX_GROUP_ROWS)
    assert Counter(order) == {prefix: -(-count // limit) for prefix, count in sharing.items()}


def aligned(width):
    return -(-width // 16) * 16


@given(
    sequences=sequences,
    others=sequences,
    max_rows=st.integers(1, 40),
    max_tokens=st.integers(1, 500),
    max_row_scores=st.integers(1, 30_000),
)
def test_batches_take_every_sequence_once_and_keep_the_limits(sequences, others, max_rows, max_tokens, max_row_scores):
    queues = plan_groups(sequences, max_rows=16), plan_groups(others, max_rows=16)
    taken = []
    while any(queues):
        first = queues if queues[0] else queues[::-1]
        head = first[0][0].prefix_ids
        batch = take_batch(*first, max_rows=max_rows, max_tokens=max_tokens, max_row_scores=max_row_scores)
        members = [sequence for group in batch for sequence in group.sequences]
        width = max(len(sequence.suffix_ids) for sequence in members)
        prefix_width = max(len(group.prefix_ids) for group in batch)
        tokens = len(batch) * prefix_width + len(members) * width
        rows = max(len(group.sequences) for group in batch)
        columns = aligned(prefix_width) + aligned(width) + 16  # and those of the first new tokens
        assert batch[0].prefix_ids == head
        assert 1 <= len(members) <= max_rows
        assert tokens <= max_tokens or len(members) == 1
        assert rows * aligned(width) * columns <= max_row_scores or len(members) == 1
        taken += members
    everything = sequences + others
    assert (len(taken), set(taken)) == (len(everything), set(everything))


def test_what_room_the_first_queue_leaves_the_others_fill():
    def sequence(length, prefix):
        return Sequence(prefix_ids=(9,) * prefix, suffix_ids=[8] * length, config=GenerationConfig(), max_new_tokens=32)

    callers, bulk = [sequence(5, 7)], [sequence(5, 14), sequence(5, 21)]
    queues = [plan_groups(call, max_rows=4) for call in (callers, bulk)]
    batch = take_batch(*queues, max_rows=2, max_tokens=1000, max_row_scores=10**6)
    assert [group.sequences for group in batch] == [callers, [bulk[1]]]
    assert [len(queue) for queue in queues] == [0, 1]
