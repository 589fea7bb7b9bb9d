"""Which waiting sequences are prefilled together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from qa_onnx.engine.kv_cache import ALIGNMENT, aligned
from qa_onnx.engine.sequence import Sequence

MAX_GROUP_ROWS = 16
"""Maximum number of sequences of one group; a prefix that more sequences share is in several groups."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sequences that share a prefix.

    Attributes:
        prefix_ids: The prefix's tokens; may be empty.
        sequences: At least one.
    """

    prefix_ids: tuple[int, ...]
    sequences: list[Sequence]

    @property
    def suffix_width(self) -> int:
        """Tokens of the longest suffix."""
        return max(len(sequence.suffix_ids) for sequence in self.sequences)


def plan_groups(sequences: Iterable[Sequence], *, max_rows: int) -> deque[Group]:
    """Groups sequences by prefix.

    Groups of about the same size (1, 2, up to 4, up to 8...) follow each other, longer prefixes first, and groups that
    share a prefix are neighbors: what is prefilled together is of similar size, and little of attention is padding.

    Args:
        sequences: In any order.
        max_rows: Maximum number of sequences of a batch, and so of a group.
    """
    members_of: dict[tuple[int, ...], list[Sequence]] = {}
    for sequence in sequences:
        members_of.setdefault(sequence.prefix_ids, []).append(sequence)
    limit = min(MAX_GROUP_ROWS, max_rows)
    size_of = {prefix: -(-len(members) // -(-len(members) // limit)) for prefix, members in members_of.items()}
    return deque(
        Group(prefix_ids=prefix, sequences=members_of[prefix][first : first + size_of[prefix]])
        for prefix in sorted(members_of, key=lambda prefix: (-_size_class(size_of[prefix]), -len(prefix)))
        for first in range(0, len(members_of[prefix]), size_of[prefix])
    )


def sort_by_likeness(groups: Iterable[Group], first: Sequence) -> deque[Group]:
    """The group of a sequence, which leads it, and behind it the others, of similar size and prefix length first."""
    groups = list(groups)
    lead = next(group for group in groups if first in group.sequences)
    size, length = _size_class(len(lead.sequences)), len(lead.prefix_ids)

    def unlikeness(group: Group) -> tuple[bool, int, int]:
        return (
            group is not lead,
            abs(_size_class(len(group.sequences)) - size),
            abs(len(group.prefix_ids) - length),
        )

    queue = deque(sorted(groups, key=unlikeness))
    queue[0] = replace(lead, sequences=[first, *(one for one in lead.sequences if one is not first)])
    return queue


def _size_class(size: int) -> int:
    """1, 2, up to 4, up to 8... sequences."""
    return (size - 1).bit_length()


def take_batch(*queues: deque[Group], max_rows: int, max_tokens: int, max_row_scores: int) -> list[Group]:
    """Takes the next groups off the fronts of queues, as many as fit together but at least one sequence.

    Of a first group of too many sequences a part is taken, and the rest stays at the front.

    Args:
        queues: From `plan_groups`, the first one not empty; the others fill what room it leaves.
        max_rows: Maximum number of sequences to take.
        max_tokens: Maximum number of tokens to take, counted as the KV cache holds them: each prefix as wide as the
            longest, and each sequence as wide as the longest suffix.
        max_row_scores: Maximum of rows of a group x tokens of a suffix x columns that they attend to, which is the
            memory that one group's attention takes.
    """

    def scores_per_row(prefix_width: int, suffix_width: int) -> int:
        return aligned(suffix_width) * (aligned(prefix_width) + aligned(suffix_width) + ALIGNMENT)

    first = queues[0][0]
    fitting = min(
        max_rows,
        max((max_tokens - len(first.prefix_ids)) // first.suffix_width, 1),
        max(max_row_scores // scores_per_row(len(first.prefix_ids), first.suffix_width), 1),
    )
    if len(first.sequences) > fitting:
        queues[0][0] = replace(first, sequences=first.sequences[fitting:])
        return [replace(first, sequences=first.sequences[:fitting])]
    batch: list[Group] = []
    count = rows = prefix_width = suffix_width = 0
    for queue in queues:
        while queue:
            group = queue[0]
            count += len(group.sequences)
            prefix_width = max(prefix_width, len(group.prefix_ids))
            suffix_width = max(suffix_width, group.suffix_width)
            rows = max(rows, len(group.sequences))
            scores = rows * scores_per_row(prefix_width, suffix_width)
            tokens = (len(batch) + 1) * prefix_width + count * suffix_width
            if batch and (count > max_rows or tokens > max_tokens or scores > max_row_scores):
                return batch
            batch.append(queue.popleft())
    return batch
