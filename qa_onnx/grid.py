"""The grid of a batch: groups of rows, the caches of passages and rows, and where they hold tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qa_onnx.kv_cache import CachePool, aligned

GROWTH = 16
"""Columns that rows get at a time for new tokens."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """New tokens of one row, and the position of the first of them."""

    group: int
    row: int
    token_ids: Sequence[int]
    position: int


@dataclass(kw_only=True)
class Grid:
    """G groups (the questions on one passage each) of R rows. Passages start, and questions end, in the same column.

    Attributes:
        pool: Where `passages` and `own` come from.
        passage_ids: The tokens of the G passages.
        passages: Their keys and values, [2 * layers, G, H, 1, P, D].
        own: Keys and values of the rows' own tokens, [2 * layers, G, H, R, C, D].
        own_mask: bool [G, R, C], True where `own` holds a token.
        write_index: int64 [G], the column of `own` that the group's next tokens go to.
    """

    pool: CachePool
    passage_ids: list[tuple[int, ...]]
    passages: np.ndarray
    own: np.ndarray
    own_mask: np.ndarray
    write_index: np.ndarray

    @classmethod
    def empty(
        cls, pool: CachePool, passage_ids: Sequence[tuple[int, ...]], *, passage_width: int, rows: int, columns: int
    ) -> Grid:
        """Makes the caches of some passages and of `rows` rows on each, all of them unread."""
        groups = len(passage_ids)
        return cls(
            pool=pool,
            passage_ids=list(passage_ids),
            passages=pool.take(groups=groups, rows=1, columns=passage_width),
            own=pool.take(groups=groups, rows=rows, columns=columns),
            own_mask=np.zeros((groups, rows, columns), bool),
            write_index=np.zeros(groups, np.int64),
        )

    @property
    def passage_mask(self) -> np.ndarray:
        """Bool [G, P], True where `passages` holds a token."""
        width = self.passages.shape[4]
        lengths = np.array([len(ids) for ids in self.passage_ids])
        mask: np.ndarray = np.arange(width) < lengths[:, None]
        return mask

    def passage(self, group: int) -> np.ndarray:
        """Keys and values of one passage, [2 * layers, H, P, D] with P no wider than it needs."""
        return self.passages[:, group, :, 0, : aligned(len(self.passage_ids[group]))]

    def set_passage(self, group: int, keys_and_values: np.ndarray) -> None:
        """Copies the keys and values of one passage, as `passage` gives them, into the grid."""
        self.passage(group)[...] = keys_and_values

    def copy_group(self, group: int, source: Grid, source_group: int, *, rows: int) -> None:
        """Copies what a group's passage and its first rows hold from another grid of at most as many columns."""
        self.set_passage(group, source.passage(source_group))
        columns = source.own.shape[4]
        self.own[:, group, :, :rows, :columns] = source.own[:, source_group, :, :rows]
        self.own_mask[group, :rows, :columns] = source.own_mask[source_group, :rows]
        self.write_index[group] = source.write_index[source_group]

    def grow(self) -> None:
        """Gives every row `GROWTH` more columns."""
        groups, rows, columns = self.own_mask.shape
        narrow, self.own = self.own, self.pool.take(groups=groups, rows=rows, columns=columns + GROWTH)
        self.own[..., :columns, :] = narrow
        self.pool.give_back(narrow)
        self.own_mask = np.pad(self.own_mask, [(0, 0), (0, 0), (0, GROWTH)])

    def give_back(self) -> None:
        """Gives the memory of the caches back. The grid is of no use any more."""
        self.pool.give_back(self.passages)
        self.pool.give_back(self.own)
