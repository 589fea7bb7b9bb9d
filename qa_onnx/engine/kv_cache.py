"""past_key_values as an object: keys and values of the tokens that the model has read, in the provider's memory.

A cache is a grid: G groups (a group is the sequences that share a prefix) of R rows, each with room for C tokens. A
batch has two: one of its prefixes, with one row per group that all sequences of the group attend to, and one of its
suffixes, with one row per sequence. All layers are in one block of memory:

    [2 * layers, G, H, R, C, D]      keys of the first layer, its values, keys of the second, ...

so that a range of groups is contiguous within a layer, and the graph reads and writes it where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qa_onnx.engine.session import Binding, Session, View
from qa_onnx.errors import OutOfMemoryError

PREFIX_NAME, PAST_NAME, PRESENT_NAME = "prefix.", "past_key_values.", "present."
SOURCE_NAME, TARGET_NAME, COPY_INDEX = "source.", "target.", "index"
ALIGNMENT = 16
"""Columns begin at multiples of this. The sum over a row's keys then takes the same steps whatever stands before it,
so that a sequence's result is the same to the last bit in any batch."""


def aligned(columns: int, step: int = ALIGNMENT) -> int:
    """`columns`, rounded up to a multiple of `step`."""
    return -(-columns // step) * step


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What the caches of a model have in common; `dtype` is that of its keys and values."""

    layers: int
    heads: int
    head_size: int
    dtype: str = "float32"

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take."""
        return 2 * self.layers * self.heads * self.head_size * np.dtype(self.dtype).itemsize

    @property
    def names(self) -> list[str]:
        """The name of each key and value, behind the prefix that tells which cache: `0.key`, `0.value`, `1.key`..."""
        return [f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


@dataclass(frozen=True, kw_only=True, eq=False)
class KVCache:
    """Keys and values of a grid of tokens, on the session's device.

    Attributes:
        layout: Of the model.
        memory: Device memory of at least as many elements as the cache has; see `KVCachePool`.
        groups, rows, columns: G, R and C.
    """

    layout: CacheLayout
    memory: Any
    groups: int
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache."""
        return self.groups * self.rows * self.columns * self.layout.bytes_per_token

    def views(self, first: int = 0, last: int | None = None, *, columns: int | None = None) -> list[View]:
        """The keys and values of groups `first` to `last` (not included), [groups, H, R, C, D] for each name.

        Args:
            first: The first group.
            last: The group behind the last; None is all.
            columns: 0 gives an empty cache, of the same groups.
        """
        last = self.groups if last is None else last
        shape = (last - first, self.layout.heads, self.rows, self.columns, self.layout.head_size)
        each = prod(shape[1:])
        return [
            View(
                memory=self.memory,
                dtype=np.dtype(self.layout.dtype),
                offset=(side * self.groups + first) * each,
                shape=shape if columns is None else (*shape[:3], columns, shape[4]),
            )
            for side in range(2 * self.layout.layers)
        ]

    def chunks(self, groups: Sequence[int], *, rows: int, columns: int) -> np.ndarray:
        """Where groups are, in chunks of `ALIGNMENT` columns of one row: int64 [len(groups) * H * rows * columns / 16].

        Rows and columns that the cache does not have are given as those of row and column 0.
        """
        here = self.columns // ALIGNMENT
        row, chunk = np.arange(rows), np.arange(columns // ALIGNMENT)
        row[row >= self.rows] = 0
        chunk[chunk >= here] = 0
        places = np.asarray(groups, np.int64)[:, None] * self.layout.heads + np.arange(self.layout.heads)
        places = places[..., None] * self.rows + row
        found: np.ndarray = (places[..., None] * here + chunk).ravel()
        return found


class KVCachePool:
    """Memory for caches, and copies between them on the device. Memory is used again: its first touch is slow.

    What a cache held before stays in it. Those are finite numbers, and columns that hold no token are masked.
    """

    MAX_FREE = 2

    def __init__(self, layout: CacheLayout, session: Session, copier: Session) -> None:
        """Has no memory yet.

        Args:
            layout: Of the model.
            session: Where the caches are used.
            copier: Of the graph that `export.decoder.build_cache_copy` makes, on the same device.
        """
        self.layout = layout
        self._dtype = np.dtype(layout.dtype)
        self._chunk = ALIGNMENT * layout.head_size
        self._session = session
        self._binding: Binding = copier.make_binding()
        self._free: list[Any] = []
        self._zeros: View | None = None

    def take(self, *, groups: int, rows: int, columns: int) -> KVCache:
        """A cache of finite numbers; `columns` is a multiple of `ALIGNMENT`.

        Raises:
            OutOfMemoryError: The device has not enough memory, not even without the free caches.
        """
        elements = self._elements(groups, rows, columns)
        fitting = [memory for memory in self._free if _size(memory) >= elements]
        if fitting and elements:
            memory = min(fitting, key=_size)
            self._free = [free for free in self._free if free is not memory]
        else:
            memory = self._allocate(elements)
        return KVCache(layout=self.layout, memory=memory, groups=groups, rows=rows, columns=columns)

    def make(self, *, groups: int, rows: int, columns: int) -> KVCache:
        """A cache with memory of its own size, which is not given back."""
        memory = self._allocate(self._elements(groups, rows, columns))
        return KVCache(layout=self.layout, memory=memory, groups=groups, rows=rows, columns=columns)

    def give_back(self, cache: KVCache) -> None:
        """Takes the memory of a cache back, which nobody may use any more. Of all free memory the largest is kept."""
        self._free = sorted([*self._free, cache.memory], key=_size, reverse=True)[: self.MAX_FREE]

    def release(self) -> None:
        """Gives all free memory back to the device."""
        self._free = []

    def copy(self, source: KVCache, groups: Sequence[int], target: KVCache, first: int) -> None:
        """Copies groups of one cache to the places `first`, `first + 1`... of another, on the device.

        Each row's columns go to the first columns of the same row, as far as the target has them.
        """
        if not groups or not source.columns or not target.columns:
            return
        index = source.chunks(groups, rows=target.rows, columns=target.columns)
        self._copy(index, source.views(), target.views(first, first + len(groups)))

    def _elements(self, groups: int, rows: int, columns: int) -> int:
        return 2 * self.layout.layers * self.layout.heads * self.layout.head_size * groups * rows * columns

    def _allocate(self, elements: int) -> Any:
        try:
            memory = self._session.allocate(elements, self._dtype)
        except OutOfMemoryError:
            if not self._free:
                raise
            self.release()
            memory = self._session.allocate(elements, self._dtype)
        if self._session.provider != "cpu" and elements:
            self._fill_with_zeros(memory, elements)
        return memory

    def _fill_with_zeros(self, memory: Any, elements: int) -> None:
        """Fresh device memory may hold NaN, which no mask keeps out of a product."""
        if self._zeros is None:
            self._zeros = View(
                memory=self._session.to_device(np.zeros(self._chunk, self._dtype)),
                dtype=self._dtype,
                offset=0,
                shape=(self._chunk,),
            )
        sides = 2 * self.layout.layers
        each = elements // sides
        targets = [View(memory=memory, dtype=self._dtype, offset=side * each, shape=(each,)) for side in range(sides)]
        self._copy(np.zeros(each // self._chunk, np.int64), [self._zeros] * sides, targets)

    def _copy(self, index: np.ndarray, sources: Sequence[View], targets: Sequence[View]) -> None:
        self._binding.set_array(COPY_INDEX, index)
        for name, source, target in zip(self.layout.names, sources, targets, strict=True):
            self._binding.set_input(f"{SOURCE_NAME}{name}", source.as_rows(self._chunk))
            self._binding.set_output(f"{TARGET_NAME}{name}", target.as_rows(self._chunk))
        self._binding.run()


def _size(memory: Any) -> int:
    elements: int = memory.shape()[0]
    return elements
