"""A batch: groups of sequences that share a prefix, and where their tokens are in the KV caches.

    prefix of group 0   C o n t e x t : i t . .     suffix of row 0   . . Q u e s t i o n A n s w
                                                              row 1   Q u e s t i o n , t o o A
    prefix of group 1   C o n t e x t . . . . .     suffix of row 0   . . . . . . W h y ? N o

Prefixes start in the first column; suffixes end in the same column, and new tokens go behind it. Padding is masked, by
lengths: the columns before a prefix's length, and those from a suffix's start to the column of the token that attends.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from qa_onnx.engine.kv_cache import KVCache, KVCachePool, aligned
from qa_onnx.engine.planner import Group
from qa_onnx.engine.provider import Limits
from qa_onnx.engine.sequence import Sequence

SCORE_BYTES = 12
"""Bytes that attention takes per score at its peak: scores, scores with bias, and probabilities, in float32."""


@dataclass(kw_only=True, eq=False)
class Batch:
    """B running sequences, each in a slot (a row of a group), and G groups of R slots in all.

    Attributes:
        prefix: KV cache of the prefixes, G groups of one row.
        suffix: KV cache of the suffixes and new tokens, G groups of R rows.
        prefix_ids: The tokens of the prefixes; of fewer than G groups where the last ones are padding.
        prefix_lengths: int64 [G], how many columns of `prefix` hold tokens.
        suffix_starts: int64 [G, R], the first column of `suffix` that holds a token.
        sequences: The running sequences.
        groups, rows: int64 [B], where each of them is.
        positions: int64 [B], the position of its next token.
        write_columns: int64 [B], the column of `suffix` that its next token goes to. The plain graph writes all rows
            of a group to one column; the graph with kernels does not ask that of them.
    """

    prefix: KVCache
    suffix: KVCache
    prefix_ids: list[tuple[int, ...]]
    prefix_lengths: np.ndarray
    suffix_starts: np.ndarray
    sequences: list[Sequence]
    groups: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    write_columns: np.ndarray

    def keep(self, indices: SequenceOf[int]) -> None:
        """Keeps only some of the running sequences. Their slots stay where they are."""
        if len(indices) == len(self.sequences):
            return
        chosen = np.asarray(indices, np.int64)
        self.sequences = [self.sequences[index] for index in indices]
        self.groups, self.rows = self.groups[chosen], self.rows[chosen]
        self.positions, self.write_columns = self.positions[chosen], self.write_columns[chosen]

    def advance(self, counts: np.ndarray | int) -> None:
        """Keeps so many more tokens of each running sequence, int64 [B], that were computed behind its last one."""
        self.positions = self.positions + counts
        self.write_columns = self.write_columns + counts


def make_batch(groups: SequenceOf[Group], carried: Batch | None, *, pool: KVCachePool, limits: Limits) -> Batch:
    """Makes the batch of some groups, whose prompts are not computed yet.

    Args:
        groups: From `plan_groups`.
        carried: A running batch; its groups follow, with all that they hold.
        pool: Where its caches are taken from.
        limits: Of the provider.

    Raises:
        OutOfMemoryError: The device has not enough memory.
    """
    step = limits.column_step
    suffix_end = aligned(max(group.suffix_width for group in groups))
    prefix_ids = [group.prefix_ids for group in groups]
    rows = max(len(group.sequences) for group in groups)
    columns = suffix_end + step
    survivors: list[int] = [] if carried is None else np.unique(carried.groups).tolist()
    if carried is not None:
        prefix_ids += [carried.prefix_ids[group] for group in survivors]
        rows = max(rows, int(carried.rows.max()) + 1)
        columns = max(columns, int(carried.write_columns.max()) + 1)
    columns, prefix_columns, places = aligned(columns), aligned(max(map(len, prefix_ids))), len(prefix_ids)
    if limits.fixed_shapes:  # few different shapes: each is one CUDA graph
        rows, places = 1 << (rows - 1).bit_length(), _round_up(places)
        columns, prefix_columns = aligned(columns, step), aligned(prefix_columns, 4 * 16)
    prefix, suffix = _take_caches(pool, places, rows, prefix_columns, columns)
    prefix_lengths = np.zeros(places, np.int64)
    prefix_lengths[: len(prefix_ids)] = [len(ids) for ids in prefix_ids]
    suffix_starts = np.full((places, rows), columns, np.int64)
    slots = [(place, row) for place, group in enumerate(groups) for row in range(len(group.sequences))]
    sequences = [sequence for group in groups for sequence in group.sequences]
    for slot, sequence in zip(slots, sequences, strict=True):
        suffix_starts[slot] = suffix_end - len(sequence.suffix_ids)
    group_of, row_of = (np.array(numbers, np.int64) for numbers in zip(*slots, strict=True))
    positions = np.array([len(sequence) for sequence in sequences], np.int64)
    write_columns = np.full(len(sequences), suffix_end)
    if carried is not None:
        pool.copy(carried.prefix, survivors, prefix, len(groups))
        pool.copy(carried.suffix, survivors, suffix, len(groups))
        kept = slice(len(groups), len(groups) + len(survivors))
        shared = min(rows, carried.suffix.rows)
        suffix_starts[kept, :shared] = carried.suffix_starts[survivors, :shared]
        sequences = sequences + carried.sequences
        group_of = np.concatenate([group_of, len(groups) + np.searchsorted(survivors, carried.groups)])
        row_of = np.concatenate([row_of, carried.rows])
        positions = np.concatenate([positions, carried.positions])
        write_columns = np.concatenate([write_columns, carried.write_columns])
    return Batch(
        prefix=prefix,
        suffix=suffix,
        prefix_ids=prefix_ids,
        prefix_lengths=prefix_lengths,
        suffix_starts=suffix_starts,
        sequences=sequences,
        groups=group_of,
        rows=row_of,
        positions=positions,
        write_columns=write_columns,
    )


def _take_caches(
    pool: KVCachePool, groups: int, rows: int, prefix_columns: int, columns: int
) -> tuple[KVCache, KVCache]:
    """The caches of prefixes and suffixes: both, or none."""
    prefix = pool.take(groups=groups, rows=1, columns=prefix_columns)
    try:
        return prefix, pool.take(groups=groups, rows=rows, columns=columns)
    except BaseException:
        pool.give_back(prefix)
        raise


def _round_up(groups: int) -> int:
    """A number of groups, rounded up to a power of two, or above 8 to a multiple of 8."""
    return 1 << (groups - 1).bit_length() if groups <= 8 else aligned(groups, 8)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one slot that are computed together, and the position of the first of them."""

    group: int
    row: int
    token_ids: SequenceOf[int]
    position: int


def split_prefill(
    segments: SequenceOf[SequenceOf[Segment]], *, rows: int, columns: int, heads: int, limits: Limits
) -> list[tuple[int, int]]:
    """Splits a prefill into runs: first and last (not included) group of each.

    A run is full with `max_prefill_tokens` tokens, or before its attention scores exceed half of `max_batch_bytes`.

    Args:
        segments: Of each group.
        rows: R.
        columns: Of the caches that they attend to.
        heads: H.
        limits: Of the provider.
    """
    runs: list[tuple[int, int]] = []
    first = tokens = width = 0
    for group, members in enumerate(segments):
        wider = max(width, aligned(max(len(segment.token_ids) for segment in members)))
        scores = (group + 1 - first) * heads * rows * wider * columns
        if group > first and (
            tokens >= limits.max_prefill_tokens or scores * SCORE_BYTES > limits.max_batch_bytes // 2
        ):
            runs.append((first, group))
            first, tokens, wider = group, 0, aligned(max(len(segment.token_ids) for segment in members))
        tokens += sum(len(segment.token_ids) for segment in members)
        width = wider
    return [*runs, (first, len(segments))] if segments else []


def grid_inputs(
    segments: SequenceOf[Segment], *, groups: int, rows: int, heads: int, right_aligned: bool
) -> dict[str, np.ndarray]:
    """Lays segments out for the plain graph (`export/decoder.py` says what each input is).

    Args:
        segments: At most one for each slot; their groups count from 0.
        groups: G.
        rows: R.
        heads: H.
        right_aligned: Whether the segments end in the last of the T new columns, or start in the first.

    Returns:
        `input_ids`, `position_ids`, `slot_index`, `context_index`, and for the last token of each segment
        `output_index`, `output_slot_index` and `output_context_index`.
    """
    group, row, lengths, _, number = _flatten(segments)
    width = segment_width(segments)
    column = number + np.repeat(width - lengths, lengths) if right_aligned else number
    token_group, token_row = np.repeat(group, lengths), np.repeat(row, lengths)
    slot_index = np.zeros((groups, rows, width), np.int64)
    slot_index[token_group, token_row, column] = np.arange(lengths.sum())
    output_slot_index = np.zeros((groups, rows, 1), np.int64)
    output_slot_index[group, row, 0] = np.arange(len(segments))
    return _token_inputs(segments) | {
        "slot_index": slot_index,
        "context_index": context_index(token_group, token_row * width + column, rows * width, heads),
        "output_slot_index": output_slot_index,
        "output_context_index": context_index(group, row, rows, heads),
    }


def decode_grid_inputs(
    batch: Batch,
    token_ids: SequenceOf[int] | np.ndarray,
    group: np.ndarray,
    row: np.ndarray,
    place: np.ndarray,
    *,
    heads: int,
) -> dict[str, np.ndarray]:
    """Lays the tokens of a decode step out for the plain graph, as `grid_inputs` does for segments.

    Args:
        batch: Of the step.
        token_ids: int64 [B], the last token of each running sequence.
        group: int64 [N], of the slots that are computed.
        row: int64 [N], in their groups.
        place: int64 [B], which of them belongs to each running sequence.
        heads: H.
    """
    tokens, positions = np.zeros(len(group), np.int64), np.zeros(len(group), np.int64)
    tokens[place], positions[place] = token_ids, batch.positions
    write_index = np.zeros(batch.suffix.groups, np.int64)
    write_index[batch.groups] = batch.write_columns
    slot_index = np.zeros((batch.suffix.groups, batch.suffix.rows, 1), np.int64)
    slot_index[group, row, 0] = np.arange(len(group))
    index = context_index(group, row, batch.suffix.rows, heads)
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "output_index": np.arange(len(group)),
        "slot_index": slot_index,
        "context_index": index,
        "output_slot_index": slot_index,
        "output_context_index": index,
        "write_index": write_index,
    }


def segment_inputs(segments: SequenceOf[Segment], first_columns: np.ndarray) -> dict[str, np.ndarray]:
    """Lays segments out for the graph with kernels (`export/kernel_decoder.py` says what each input is).

    Args:
        segments: At most one for each slot; their groups count from 0.
        first_columns: int64 [S], the column that each one's first token goes to.
    """
    group, row, lengths, starts, _ = _flatten(segments)
    table = np.stack([group, row, starts, lengths, first_columns], axis=1)
    return _token_inputs(segments) | {"segments": table}


def segment_width(segments: SequenceOf[Segment]) -> int:
    """Columns for the longest of some segments."""
    return aligned(max(len(segment.token_ids) for segment in segments))


def _token_inputs(segments: SequenceOf[Segment]) -> dict[str, np.ndarray]:
    """What both graphs are told: tokens, their positions, and the last token of each segment."""
    _, _, lengths, starts, number = _flatten(segments)
    return {
        "input_ids": np.concatenate([np.asarray(segment.token_ids, np.int64) for segment in segments]),
        "position_ids": np.repeat([segment.position for segment in segments], lengths) + number,
        "output_index": starts + lengths - 1,
    }


def _flatten(segments: SequenceOf[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each segment its group, row, length and first packed token; of each token its number in its segment."""
    lengths = np.array([len(segment.token_ids) for segment in segments])
    starts = np.cumsum(lengths) - lengths
    group = np.array([segment.group for segment in segments])
    row = np.array([segment.row for segment in segments])
    return group, row, lengths, starts, np.arange(lengths.sum()) - np.repeat(starts, lengths)


def context_index(group: np.ndarray, slot: np.ndarray, slots: int, heads: int) -> np.ndarray:
    """Where attention leaves the heads of each token, int64 [N, H], in its output [G, H, slots, D] as rows of D."""
    found: np.ndarray = (group[:, None] * heads + np.arange(heads)) * slots + slot[:, None]
    return found
