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

from qa_onnx.engine.kv_cache import KVCache, aligned
from qa_onnx.engine.sequence import Sequence


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


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one slot that are computed together, and the position of the first of them."""

    group: int
    row: int
    token_ids: SequenceOf[int]
    position: int


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
