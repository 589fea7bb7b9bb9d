"""The prefix cache: LRU by bytes, and pins of the prefixes that sequences wait for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qa_onnx.engine.kv_cache import CacheLayout, KVCache, aligned
from qa_onnx.engine.prefix_cache import PrefixCache, PrefixCacheStats

LAYOUT = CacheLayout(layers=1, heads=1, head_size=2)
CHUNK = 16 * LAYOUT.bytes_per_token
"""Bytes of a prefix of 1 to 16 tokens."""


def ids_of(name, length=1):
    return (name,) * length


def entry_of(prefix_ids):
    return KVCache(layout=LAYOUT, memory=None, groups=1, rows=1, columns=aligned(len(prefix_ids)))


def insert(cache, *names, length=1):
    for name in names:
        cache.insert(ids_of(name, length), entry_of(ids_of(name, length)))


def found(cache, *names):
    return [cache.lookup(ids_of(name)) is not None for name in names]


def test_it_keeps_to_its_bytes_and_evicts_what_was_used_longest_ago():
    cache = PrefixCache(2 * CHUNK, LAYOUT)
    insert(cache, 1, 2)
    cache.lookup(ids_of(1))
    insert(cache, 3)
    assert found(cache, 1, 2, 3) == [True, False, True]
    stats = cache.stats()
    assert (stats.entries, stats.nbytes) == (2, 2 * CHUNK)
    insert(cache, 4, length=33)  # larger than the whole budget
    assert cache.lookup(ids_of(4, 33)) is None
    assert cache.stats().nbytes == 0


def test_a_prefix_that_does_not_fit_is_not_wanted():
    cache = PrefixCache(2 * CHUNK, LAYOUT)
    assert cache.wants(ids_of(4, 32), taken=1)
    assert not cache.wants(ids_of(4, 33), taken=1)


def test_a_prefix_cache_of_no_bytes_keeps_nothing():
    cache = PrefixCache(0, LAYOUT)
    assert not cache.wants(ids_of(1), taken=0)
    insert(cache, 1)
    assert found(cache, 1) == [False]
    assert (cache.stats().entries, cache.stats().nbytes) == (0, 0)


def test_an_empty_prefix_is_neither_wanted_nor_pinned():
    cache = PrefixCache(CHUNK, LAYOUT)
    cache.pin(())
    assert not cache.wants((), taken=0)
    cache.unpin(())


def test_a_prefix_that_is_there_is_not_wanted_again():
    cache = PrefixCache(CHUNK, LAYOUT)
    insert(cache, 1)
    assert not cache.wants(ids_of(1), taken=0)


def test_a_pinned_prefix_stays_whatever_the_budget_until_its_last_pin_is_gone():
    cache = PrefixCache(0, LAYOUT)
    for _ in range(2):
        cache.pin(ids_of(1))
    insert(cache, 1, 2)
    assert found(cache, 1, 2) == [True, False]
    cache.unpin(ids_of(1))
    assert found(cache, 1) == [True]
    cache.unpin(ids_of(1))
    assert found(cache, 1) == [False]
    assert cache.stats().nbytes == 0


def test_without_a_budget_it_wants_what_more_sequences_wait_for_than_were_taken():
    cache = PrefixCache(0, LAYOUT)
    for _ in range(3):
        cache.pin(ids_of(1))
    assert cache.wants(ids_of(1), taken=2)
    assert not cache.wants(ids_of(1), taken=3)
    assert not cache.wants(ids_of(2), taken=0)


def test_prefixes_that_sequences_wait_for_are_not_displaced_by_others():
    cache = PrefixCache(2 * CHUNK, LAYOUT)
    cache.pin(ids_of(1))
    assert cache.wants(ids_of(2), taken=1)
    cache.pin(ids_of(3))
    assert not cache.wants(ids_of(2), taken=1)  # the pinned ones fill the budget
    cache.unpin(ids_of(3))
    assert cache.wants(ids_of(2), taken=1)


def test_evicting_all_keeps_the_pinned_ones():
    cache = PrefixCache(10 * CHUNK, LAYOUT)
    cache.pin(ids_of(2))
    insert(cache, 1, 2, 3)
    cache.evict(0)
    assert found(cache, 1, 2, 3) == [False, True, False]
    assert cache.stats().evictions == 2


def test_stats_count_hits_misses_and_evictions():
    cache = PrefixCache(2 * CHUNK, LAYOUT)
    found(cache, 1)
    insert(cache, 1, 2, 3)
    found(cache, 1, 2, 3, 3)
    assert cache.stats() == PrefixCacheStats(
        entries=2, nbytes=2 * CHUNK, max_bytes=2 * CHUNK, hits=3, misses=2, evictions=1
    )


class PrefixCacheMachine(RuleBasedStateMachine):
    """Any order of calls, against a model of a list and a counter."""

    def __init__(self):
        super().__init__()
        self.max_bytes = 4 * CHUNK
        self.cache = PrefixCache(self.max_bytes, LAYOUT)
        self.order = []  # the least recently used first
        self.pins = Counter()

    prefixes = st.integers(1, 8).map(lambda name: ids_of(name, 5 * name))

    @staticmethod
    def size(prefix_ids):
        return -(-len(prefix_ids) // 16) * CHUNK

    def evict(self, budget=None):
        for prefix_ids in list(self.order):
            if sum(map(self.size, self.order)) <= (self.max_bytes if budget is None else budget):
                return
            if not self.pins[prefix_ids]:
                self.order.remove(prefix_ids)

    @rule(prefix_ids=prefixes)
    def lookup(self, prefix_ids):
        entry = self.cache.lookup(prefix_ids)
        assert (entry is not None) == (prefix_ids in self.order)
        if entry is not None:
            assert entry.nbytes == self.size(prefix_ids)
            self.order.remove(prefix_ids)
            self.order.append(prefix_ids)

    @rule(prefix_ids=prefixes, taken=st.integers(0, 3))
    def insert_what_is_wanted(self, prefix_ids, taken):
        pinned = sum(self.size(prefix) for prefix in self.pins if self.pins[prefix])
        fits = pinned + self.size(prefix_ids) <= self.max_bytes
        wanted = prefix_ids not in self.order and (self.pins[prefix_ids] > taken or fits)
        assert self.cache.wants(prefix_ids, taken=taken) == wanted
        if wanted:
            self.cache.insert(prefix_ids, entry_of(prefix_ids))
            self.order.append(prefix_ids)
            self.evict()

    @rule(prefix_ids=prefixes)
    def pin(self, prefix_ids):
        self.cache.pin(prefix_ids)
        self.pins[prefix_ids] += 1

    @rule(prefix_ids=prefixes)
    def unpin(self, prefix_ids):
        if self.pins[prefix_ids]:
            self.cache.unpin(prefix_ids)
            self.pins[prefix_ids] -= 1
            if not self.pins[prefix_ids]:
                self.evict()

    @rule(chunks=st.integers(0, 6))
    def evict_to(self, chunks):
        self.cache.evict(chunks * CHUNK)
        self.evict(chunks * CHUNK)

    @invariant()
    def holds_what_the_model_holds(self):
        stats = self.cache.stats()
        assert (stats.entries, stats.nbytes) == (len(self.order), sum(map(self.size, self.order)))
        pinned = sum(self.size(prefix) for prefix in self.order if self.pins[prefix])
        assert stats.nbytes <= max(self.max_bytes, pinned)


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("length", [1, 16, 17])
def test_a_prefix_counts_as_wide_as_the_kv_cache_holds_it(length):
    cache = PrefixCache(10 * CHUNK, LAYOUT)
    insert(cache, 1, length=length)
    assert cache.stats().nbytes == -(-length // 16) * CHUNK
