"""The memory of the engine: what a batch may take, what is uploaded, and what is given back."""

from __future__ import annotations

import numpy as np
import pytest
from fake_engines import (
    MAX_POSITIONS,
    MODES,
    PREFIXES,
    engine_of,
    expected,
    generate_all,
    prefill,
    prompt_of,
    prompts_alone,
)
from fake_onnxruntime import LAYOUT, make_sessions
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx import EngineError, InvalidInputError, OutOfMemoryError
from qa_onnx.engine.engine import CHOICE, LOGPROBS
from qa_onnx.engine.kv_cache import CacheLayout, KVCache, KVCachePool


def test_a_batch_keeps_to_the_tokens_that_its_memory_has_room_for():
    prompts = [prompt_of(*range(1, 31)) for _ in range(40)]
    sessions = make_sessions()
    generate_all(engine_of(sessions), prompts, max_new_tokens=1, batch_size=10**9)
    limits = sessions[0].limits
    assert max(rows * groups for groups, rows, _ in sessions[0].grids) * 30 <= limits.max_batch_tokens


@pytest.mark.parametrize("rows", [1, 8])
def test_max_batch_bytes_bounds_the_tokens_of_a_batch_and_the_scores_of_a_run(rows):
    """Half of it is for keys and values, half for the scores of one run."""
    max_batch_bytes = 2 * least_bytes(MAX_POSITIONS)
    sessions = make_sessions(max_batch_bytes=max_batch_bytes, max_batch_tokens=10**9, max_prefill_tokens=10**9)
    engine = engine_of(sessions)
    assert engine.max_batch_tokens == max_batch_bytes // 2 // LAYOUT.bytes_per_token
    prompts = [prompt_of(*range(1, 41), prefix=[1 + index // rows] * 30) for index in range(40)]
    assert generate_all(engine, prompts, max_new_tokens=1, batch_size=40) == [expected(one, 1) for one in prompts]
    assert rows > 1 or max(groups for groups, _, _ in sessions[0].grids) > 1
    assert max(sessions[0].score_counts) * 12 <= max_batch_bytes // 2


def least_bytes(max_positions):
    columns = -(-max_positions // 16) * 16
    return 2 * max(2 * columns * LAYOUT.bytes_per_token, LAYOUT.heads * columns * columns * 12)


@pytest.mark.parametrize("max_positions", [80, 73])
def test_max_batch_bytes_has_room_for_one_prompt(max_positions):
    least = least_bytes(max_positions)
    words = f"got max_batch_bytes {least - 1}; one prompt of the model's {max_positions} tokens takes {least}"
    with pytest.raises(InvalidInputError, match=words):
        engine_of(make_sessions(max_batch_bytes=least - 1), max_positions=max_positions)
    engine = engine_of(make_sessions(max_batch_bytes=least), max_positions=max_positions)
    prompt = prompt_of(*range(1, 41), prefix=PREFIXES[2])
    assert generate_all(engine, [prompt], max_new_tokens=9, batch_size=1) == [
        expected(prompt, 9, max_positions=max_positions)
    ]


def steps_of(mode, *, steps=12, **options):
    """A batch of three sequences that is stepped, and what each of its runs uploaded and fetched."""
    sessions = make_sessions(mode)
    engine = engine_of(sessions)
    prompts = [prompt_of(1, 2, prefix=PREFIXES[2]), prompt_of(3, prefix=PREFIXES[2]), prompt_of(4, 5, 6)]
    batch, predictions = prefill(engine, prompts, max_new_tokens=80, **options)
    first = len(sessions[0].uploads)
    for _ in range(steps):
        for sequence, token in zip(batch.sequences, predictions.token_ids.tolist(), strict=True):
            sequence.token_ids.append(token)
        predictions = engine.decode_step(batch, predictions.token_ids)
    return sessions[0], slice(first, None)


def test_a_steady_decode_step_uploads_three_arrays():
    session, steps = steps_of("device")
    assert session.uploads[steps][0] == 10  # all of them, once
    assert session.uploads[steps][1:] == [3] * 11  # tokens, positions, columns to write to


def test_on_the_cpu_arrays_are_not_copied():
    session, steps = steps_of("cpu")
    assert set(session.uploads[steps]) == {0}


def test_the_device_chooses_unless_log_probabilities_are_needed():
    session, _ = steps_of("device")
    assert set(session.fetched) == {CHOICE}
    session, _ = steps_of("device", no_repeat_ngram_size=2)
    assert set(session.fetched) == {LOGPROBS}
    session, _ = steps_of("device", no_answer_threshold=1.0)
    assert session.fetched == [LOGPROBS, *[CHOICE] * 12]
    session, _ = steps_of("cpu")
    assert set(session.fetched) == {LOGPROBS}


def test_a_decode_step_on_the_device_keeps_its_shape():
    session, steps = steps_of("device")
    assert set(session.grids[steps]) == {(2, 2, 1)}
    assert set(session.token_counts[steps]) == {4}  # all slots


def test_each_shape_of_a_decode_step_is_one_cuda_graph():
    session, steps = steps_of("device with CUDA graphs", steps=70)
    ids = session.graph_ids
    assert set(ids[: steps.start]) == {-1}
    assert -1 not in ids[steps]
    assert ids[steps] == sorted(ids[steps])
    assert 2 <= len(set(ids[steps])) <= 4  # one more whenever the cache grew


def test_in_float32_only_steps_of_one_row_a_group_are_captured():
    """For the matmuls of others ONNX Runtime copies pointers to the device, which is forbidden while capturing."""
    sessions = make_sessions("device with CUDA graphs")
    engine = engine_of(sessions, can_capture_rows=LAYOUT.dtype == "float16")
    assert engine._can_capture_rows is False
    generate_all(engine, prompts_alone(4), max_new_tokens=12, batch_size=4)
    assert set(sessions[0].graph_ids) == {-1}
    prompts = [prompt_of(1, prefix=PREFIXES[2]), prompt_of(1, prefix=PREFIXES[4])]
    generate_all(engine, prompts, max_new_tokens=12, batch_size=4)
    assert set(sessions[0].graph_ids) == {-1, 1}


def test_cuda_graphs_are_used_again_by_the_next_batch():
    sessions = make_sessions("device with CUDA graphs")
    engine = engine_of(sessions)
    engine._can_capture_rows = True
    for _ in range(5):
        generate_all(engine, prompts_alone(4), max_new_tokens=12, batch_size=4)
    assert 1 <= engine.stats.cuda_graphs <= 2
    assert len(set(sessions[0].graph_ids) - {-1}) == engine.stats.cuda_graphs
    assert engine.uses_cuda_graphs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", [1, 2])
def test_a_prefill_that_fails_leaves_the_running_batch_as_it_was(mode, run):
    sessions = make_sessions(mode)
    engine = engine_of(sessions)
    first = prompt_of(1, 2, prefix=PREFIXES[2])
    batch, predictions = prefill(engine, [first], ignore_eos=True)
    token_ids = [predictions.token_ids[0]]
    sessions[0].fail_at = len(sessions[0].graph_ids) + run
    with pytest.raises(EngineError, match="the device was lost"):
        prefill(engine, [prompt_of(3, 4, prefix=PREFIXES[3])], carried=batch)
    sessions[0].fail_at = None
    for _ in range(3):
        token_ids.append(engine.decode_step(batch, [token_ids[-1]]).token_ids[0])
    others = make_sessions(mode)
    undisturbed = engine_of(others)
    batch, predictions = prefill(undisturbed, [first], ignore_eos=True)
    for index, token in enumerate(token_ids):
        assert predictions.token_ids[0] == token
        if index < 3:
            predictions = undisturbed.decode_step(batch, [token])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_fails_gives_its_memory_back(mode):
    sessions = make_sessions(mode)
    engine = engine_of(sessions)
    for _ in range(3):
        sessions[0].fail_at = len(sessions[0].graph_ids) + 1
        with pytest.raises(EngineError, match="the device was lost"):
            prefill(engine, [prompt_of(3, prefix=PREFIXES[3])])
    assert len(engine._pool._free) == 2
    engine.release_memory()
    assert live_cache_bytes(sessions) == 0


def live_cache_bytes(sessions):
    """Bytes of all caches that live on the device; the zeros that it fills fresh ones with are of one chunk."""
    arrays = [value._array for value in sessions[0]._ort.allocations.values()]
    caches = [one for one in arrays if one.dtype == np.float32 and one.ndim == 1 and one.size > 16 * LAYOUT.head_size]
    return sum(one.nbytes for one in caches)


def test_the_memory_of_a_batch_that_others_joined_is_used_again():
    engine = engine_of(make_sessions())
    first, _ = prefill(engine, [prompt_of(1, 2, prefix=PREFIXES[2])], ignore_eos=True)
    batch, _ = prefill(engine, [prompt_of(3, prefix=PREFIXES[3])], carried=first, ignore_eos=True)
    memory = {id(first.prefix.memory), id(first.suffix.memory)}
    assert {id(free) for free in engine._pool._free} == memory
    assert memory.isdisjoint({id(batch.prefix.memory), id(batch.suffix.memory)})


@pytest.mark.parametrize("mode", MODES[:2])
def test_free_memory_is_given_back_to_the_device_where_it_is_short(mode):
    session, copier = make_sessions(mode)
    pool = KVCachePool(LAYOUT, session, copier)
    pool.give_back(pool.take(groups=1, rows=1, columns=64))
    runtime = session._ort
    large = {"groups": 4, "rows": 1, "columns": 64}
    live = sum(value._array.nbytes for value in runtime.allocations.values())
    runtime.free_bytes = live + 4 * 64 * LAYOUT.bytes_per_token - 1
    taken = pool.take(**large)
    assert live_cache_bytes((session, copier)) == taken.nbytes
    with pytest.raises(OutOfMemoryError):
        pool.take(**large)
    pool.give_back(taken)
    assert pool.take(**large).memory is taken.memory


@pytest.mark.parametrize("mode", MODES)
def test_too_little_memory_is_an_error_of_its_own_and_later_batches_work(mode):
    sessions = make_sessions(mode)
    engine = engine_of(sessions)
    sessions[0]._ort.free_bytes = 100
    with pytest.raises(OutOfMemoryError, match=r"no memory for a batch of one prompt of 41 tokens.*max_batch_bytes"):
        generate_all(engine, [prompt_of(1, prefix=range(1, 41))], max_new_tokens=1, batch_size=1)
    sessions[0]._ort.free_bytes = 2**40
    assert generate_all(engine, [prompt_of(1)], max_new_tokens=9, batch_size=1) == [expected(prompt_of(1), 9)]


def test_a_cache_names_its_layers_as_the_graph_does():
    layout = CacheLayout(layers=2, heads=3, head_size=4)
    session, copier = make_sessions()
    cache = KVCachePool(layout, session, copier).take(groups=2, rows=5, columns=16)
    assert layout.names == ["0.key", "0.value", "1.key", "1.value"]
    views = cache.views()
    assert [view.shape for view in views] == [(2, 3, 5, 16, 4)] * 4
    each = 2 * 3 * 5 * 16 * 4
    assert [view.offset for view in views] == [0, each, 2 * each, 3 * each]
    assert cache.memory.shape() == [4 * each]
    assert (cache.nbytes, layout.bytes_per_token) == (4 * 4 * each, 4 * 4 * 3 * 4)
    some = cache.views(1, 2, columns=0)
    assert [(view.shape, view.offset) for view in some] == [
        ((1, 3, 5, 0, 4), (2 * side + 1) * each // 2) for side in range(4)
    ]


@pytest.mark.parametrize("mode", MODES[:2])
def test_memory_that_was_given_back_is_used_again_and_the_largest_is_kept(mode):
    pool = KVCachePool(LAYOUT, *make_sessions(mode))
    caches = [pool.take(groups=3, rows=1, columns=16 * count) for count in range(1, KVCachePool.MAX_FREE + 2)]
    for cache in caches:
        assert (cache.memory._array == 0).all()
        pool.give_back(cache)
    assert pool.take(groups=3, rows=1, columns=16).memory is caches[1].memory  # the smallest was let go
    assert pool.take(groups=3, rows=1, columns=16 * len(caches)).memory is caches[-1].memory
    fresh = pool.take(groups=3, rows=1, columns=16)
    assert all(fresh.memory is not cache.memory for cache in caches)


@pytest.mark.parametrize("mode", MODES[:2])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_copy_of_some_groups_has_their_rows_and_columns(mode, data):
    pool = KVCachePool(LAYOUT, *make_sessions(mode))
    counts = st.integers(1, 4)
    source, target = (
        pool.make(groups=data.draw(counts), rows=data.draw(counts), columns=16 * data.draw(counts)) for _ in range(2)
    )
    groups = data.draw(st.lists(st.integers(0, source.groups - 1), min_size=1, max_size=target.groups))
    first = data.draw(st.integers(0, target.groups - len(groups)))
    filled = array_of(source)
    filled[...] = np.arange(filled.size).reshape(filled.shape)
    before = array_of(target).copy()
    pool.copy(source, groups, target, first)
    rows, columns = min(source.rows, target.rows), min(source.columns, target.columns)
    copied = array_of(target)[:, first : first + len(groups)]
    assert np.array_equal(copied[:, :, :, :rows, :columns], filled[:, groups][:, :, :, :rows, :columns])
    others = [group for group in range(target.groups) if not first <= group < first + len(groups)]
    assert np.array_equal(array_of(target)[:, others], before[:, others])
    assert np.isfinite(array_of(target)).all()


def array_of(cache: KVCache):
    """[2 * layers, G, H, R, C, D], the cache's own memory."""
    shape = (2 * LAYOUT.layers, cache.groups, LAYOUT.heads, cache.rows, cache.columns, LAYOUT.head_size)
    return cache.memory._array[: int(np.prod(shape))].reshape(shape)
