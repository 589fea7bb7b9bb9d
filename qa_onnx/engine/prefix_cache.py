"""The prefix cache: keys and values of prefixes that were read before, on the device (LRU by bytes)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from qa_onnx.engine.kv_cache import CacheLayout, KVCache, aligned

PrefixIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PrefixCacheStats:
    """What a prefix cache holds, and how often it helped.

    Attributes:
        entries: Number of prefixes in it.
        nbytes: Bytes of their keys and values.
        max_bytes: Its budget; pinned prefixes may exceed it.
        hits: Lookups that found their prefix.
        misses: Lookups that did not.
        evictions: Prefixes that made room for others.
    """

    entries: int
    nbytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int


class PrefixCache:
    """Prefixes by their tokens, the least recently used first. One thread at a time may use it.

    A prefix is pinned while sequences wait for it: then it is kept whatever the budget, and so computed only once.
    """

    def __init__(self, max_bytes: int, layout: CacheLayout) -> None:
        """Holds nothing yet; at most `max_bytes` bytes of prefixes that are not pinned."""
        self.max_bytes = max_bytes
        self._layout = layout
        self._entries: OrderedDict[PrefixIds, KVCache] = OrderedDict()
        self._pins: Counter[PrefixIds] = Counter()
        self._pinned_bytes = 0
        self._nbytes = self._hits = self._misses = self._evictions = 0

    def lookup(self, prefix_ids: PrefixIds) -> KVCache | None:
        """The keys and values of a prefix, one group of one row, or None."""
        entry = self._entries.get(prefix_ids)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(prefix_ids)
        return entry

    def wants(self, prefix_ids: PrefixIds, *, taken: int) -> bool:
        """Whether a prefix that was just computed is worth inserting.

        It is where more sequences wait for it than the `taken` ones that it was computed for, and where the prefixes
        that sequences wait for do not fill the budget: they would evict it before it is of use.
        """
        if not prefix_ids or prefix_ids in self._entries:
            return False
        return self._pins.get(prefix_ids, 0) > taken or self._pinned_bytes + self._bytes(prefix_ids) <= self.max_bytes

    def insert(self, prefix_ids: PrefixIds, cache: KVCache) -> None:
        """Keeps a prefix's keys and values, and evicts others where the budget asks for it."""
        self._entries[prefix_ids] = cache
        self._nbytes += cache.nbytes
        self.evict()

    def pin(self, prefix_ids: PrefixIds) -> None:
        """Notes that a sequence waits for a prefix, which need not be here yet."""
        if not prefix_ids:
            return
        if prefix_ids not in self._pins:
            self._pinned_bytes += self._bytes(prefix_ids)
        self._pins[prefix_ids] += 1

    def unpin(self, prefix_ids: PrefixIds) -> None:
        """Takes one `pin` back."""
        if not prefix_ids:
            return
        self._pins[prefix_ids] -= 1
        if not self._pins[prefix_ids]:
            del self._pins[prefix_ids]
            self._pinned_bytes -= self._bytes(prefix_ids)
            self.evict()

    def evict(self, max_bytes: int | None = None) -> None:
        """Evicts the least recently used prefixes that are not pinned, until the rest fits into a budget."""
        budget = self.max_bytes if max_bytes is None else max_bytes
        if self._nbytes <= budget:
            return
        for prefix_ids in [ids for ids in self._entries if ids not in self._pins]:
            if self._nbytes <= budget:
                return
            self._nbytes -= self._entries.pop(prefix_ids).nbytes
            self._evictions += 1

    def stats(self) -> PrefixCacheStats:
        """What it holds, and how often it helped."""
        return PrefixCacheStats(
            entries=len(self._entries),
            nbytes=self._nbytes,
            max_bytes=self.max_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def _bytes(self, prefix_ids: PrefixIds) -> int:
        return aligned(len(prefix_ids)) * self._layout.bytes_per_token
