"""past_key_values as an object: the keys and values of the tokens that the model has already read.

A cache is a grid of rows: G groups (a group is the questions on one passage) of R rows, each with room for C tokens.
The passages have a cache of their own, of one row a group, which all rows of a group attend to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from qa_onnx.session import Session

if TYPE_CHECKING:
    import onnxruntime

PASSAGE_PREFIX, PAST_PREFIX, PRESENT_PREFIX = "passage.", "past_key_values.", "present."
ALIGNMENT = 16
"""Columns begin at multiples of this. The sum over a row's keys then takes the same steps whatever stands before it,
so that a row's result is the same to the last bit in any batch."""


def aligned(columns: int) -> int:
    """`columns`, rounded up to a multiple of `ALIGNMENT`."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


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

    def shape(self, *, groups: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of a cache's array, [2 * layers, G, H, R, C, D]: keys of the first layer, its values, and so on."""
        return (2 * self.layers, groups, self.heads, rows, columns, self.head_size)


class CachePool:
    """Memory for the arrays of caches, used again and again: the first touch of fresh memory is slow.

    What an array held before stays in it. Those are finite numbers, and columns that hold no token are masked.
    Safe to use from several threads.
    """

    MAX_FREE = 2

    def __init__(self, layout: CacheLayout) -> None:
        """Makes arrays of a layout. There are none yet."""
        self.layout = layout
        self._free: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, *, groups: int, rows: int, columns: int) -> np.ndarray:
        """An array for a cache, [2 * layers, G, H, R, C, D] in the layout's dtype, finite numbers in it."""
        shape = self.layout.shape(groups=groups, rows=rows, columns=columns)
        size = prod(shape)
        with self._lock:
            fitting = [index for index, buffer in enumerate(self._free) if buffer.size >= size]
            smallest = min(fitting, key=lambda index: self._free[index].size, default=None)
            buffer = np.zeros(size, self.layout.dtype) if smallest is None else self._free.pop(smallest)
        return buffer[:size].reshape(shape)

    def give_back(self, array: np.ndarray) -> None:
        """Takes an array from `take` back; nobody may use it any more. Of all those given back the largest are kept."""
        buffer = array
        while isinstance(buffer.base, np.ndarray):
            buffer = buffer.base
        with self._lock:
            self._free = sorted([*self._free, buffer], key=lambda free: -free.size)[: self.MAX_FREE]


class KVCache:
    """Keys and values of every layer on the session's device, where the graph writes into them in place."""

    def __init__(self, session: Session, array: np.ndarray) -> None:
        """Puts [2 * layers, G, H, R, C, D] (keys of the first layer, its values, keys of the second...) on the device.

        On the CPU that takes no copy: the graph reads and writes the array itself.
        """
        self._array = array
        self._is_shared = session.provider == "cpu"
        self._values = [session.to_device(layer) for layer in array]

    def to_host(self) -> np.ndarray:
        """The array, with what the graph has written into the cache; on the CPU it always has that."""
        if not self._is_shared:
            for layer, value in zip(self._array, self._values, strict=True):
                layer[...] = value.numpy()
        return self._array

    def named(self, prefix: str) -> dict[str, onnxruntime.OrtValue]:
        """The values by the graph's names, `{prefix}{layer}.key` and `{prefix}{layer}.value`."""
        return {
            f"{prefix}{index // 2}.{'value' if index % 2 else 'key'}": value for index, value in enumerate(self._values)
        }


class PassageCache:
    """Keys and values of the passages read last, for questions still to come. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Keeps at most `max_bytes` bytes; with 0 it keeps nothing."""
        self.max_bytes = max_bytes
        self._passages: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self._nbytes = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._passages)

    def get(self, passage_ids: Sequence[int]) -> np.ndarray | None:
        """The keys and values of a passage, [2 * layers, H, P, D] with P aligned, or None. Not to be written to."""
        with self._lock:
            key = tuple(passage_ids)
            if key in self._passages:
                self._passages.move_to_end(key)
            return self._passages.get(key)

    def put(self, passage_ids: Sequence[int], array: np.ndarray) -> None:
        """Keeps a copy of a passage's keys and values, and lets go of the passages that were used longest ago."""
        if array.nbytes > self.max_bytes:
            return
        with self._lock:
            key = tuple(passage_ids)
            self._nbytes += array.nbytes - (self._passages.pop(key).nbytes if key in self._passages else 0)
            self._passages[key] = array.copy()
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._passages.popitem(last=False)[1].nbytes
