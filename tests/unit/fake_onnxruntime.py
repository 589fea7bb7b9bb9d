"""A fake of ONNX Runtime below the real `Session` and `Binding`: two graphs in numpy, and a device of its own.

The decoder's "model" tells every wrong index, mask, position and cache, for the next token depends on exactly the
tokens that are attended to, through two layers. With `mix` a hash of 20 bits:

    hidden        of a token is its id, then what the first layer makes of it
    key, value    of head j are (hidden + j, position) and (hidden + 2 j + 1, position)
    context       of head j is the sum of `mix_key_value` over all keys that the token attends to, and 31 * query
    hidden        is mix(7 * hidden + sum of (j + 1) * context of head j)

On the "cuda" device memory is reached by address alone: arrays are copied to it and come back as copies, fresh memory
holds NaN, and memory that nobody holds any more cannot be read or written.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
from fakes import log_softmax

from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.engine.provider import Limits
from qa_onnx.engine.session import Session
from qa_onnx.errors import OutOfMemoryError

VOCABULARY, END = 50, 0
LAYOUT = CacheLayout(layers=2, heads=2, head_size=2)


def mix(value):
    """A hash of a whole number, or of each in an array: from 0 to 2^20."""
    return ((value % 2**20) * 2654435761 % 2**32) >> 12


def mix_key_value(key, position, value, value_position):
    return mix(3 * key + 1009 * position + 5 * value + 10007 * value_position)


def token_of(hidden):
    """The most probable next token."""
    return END if hidden % 17 == 0 else 1 + hidden % (VOCABULARY - 1)


class OrtValue:
    """A tensor on the device. Only the runtime looks at `_array` where the device is not the CPU."""

    def __init__(self, runtime, array):
        self._runtime, self._array = runtime, array
        runtime.allocations[self.data_ptr()] = self

    def data_ptr(self):
        return self._array.ctypes.data

    def shape(self):
        return list(self._array.shape)

    def numpy(self):
        return self._array if self._runtime.provider == "cpu" else self._array.copy()

    def update_inplace(self, array):
        assert (array.shape, array.dtype) == (self._array.shape, self._array.dtype)
        self._runtime.uploads += 1
        self._array[...] = array


class FakeRuntime:
    """The part of the module `onnxruntime` that sessions and bindings use.

    Attributes:
        uploads: Arrays copied to the device so far.
        free_bytes: Of the device.
        allocations: Live tensors by address.
    """

    def __init__(self, provider):
        self.provider = provider
        self.uploads = 0
        self.free_bytes = 2**40
        self.allocations = weakref.WeakValueDictionary()
        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=self._from_numpy, ortvalue_from_shape_and_type=self._from_shape
        )

    def RunOptions(self):  # noqa: N802
        entries = {}
        return SimpleNamespace(entries=entries, add_run_config_entry=entries.__setitem__)

    def _from_numpy(self, array, provider, device_id):
        assert (provider, device_id) == (self.provider, 0)
        if provider == "cpu":
            return OrtValue(self, array)
        self.uploads += 1
        return OrtValue(self, array.copy())

    def _from_shape(self, shape, dtype, provider, device_id):
        assert (provider, device_id) == ("cuda", 0)
        array = np.full(shape, np.nan, dtype)
        self.check_room(array.nbytes, RuntimeError)
        return OrtValue(self, array)

    def check_room(self, nbytes, error):
        live = sum(value._array.nbytes for value in self.allocations.values())
        if live + nbytes > self.free_bytes:
            raise error(f"Failed to allocate memory for requested buffer of size {nbytes}")

    def at(self, address, shape, dtype):
        """The tensor at an address, as a view; whole within one live allocation."""
        size = int(np.prod(shape))
        if not size:
            return np.zeros(shape, dtype)
        for base, value in self.allocations.items():
            first = (address - base) // value._array.itemsize
            if first >= 0 and first + size <= value._array.size and value._array.dtype == dtype:
                return value._array.ravel()[first : first + size].reshape(shape)
        raise AssertionError(f"no live memory at {address} for {shape}")


class IOBinding:
    def __init__(self, runtime):
        self.runtime = runtime
        self.inputs, self.outputs, self.buffers = {}, {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_input(self, name, provider, device_id, dtype, shape, address):
        assert (provider, device_id) == (self.runtime.provider, 0)
        self.inputs[name] = address, tuple(shape), dtype

    def bind_output(self, name, provider, device_id, dtype=None, shape=None, address=None):
        assert (provider, device_id) == (self.runtime.provider, 0)
        self.outputs[name] = None if address is None else (address, tuple(shape), dtype)

    def get_outputs(self):
        return [self.buffers.get(name) for name in self.outputs]

    def input(self, name):
        bound = self.inputs[name]
        if isinstance(bound, OrtValue):
            return bound._array
        address, shape, dtype = bound
        return self.runtime.at(address, shape, dtype)

    def output(self, name):
        address, shape, dtype = self.outputs[name]
        return self.runtime.at(address, shape, dtype)

    def fetch(self, name, array):
        """Writes an output that is fetched to its own memory, which is used again while the shape stays."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer._array.shape != array.shape:
            self.buffers[name] = OrtValue(self.runtime, np.ascontiguousarray(array))
        else:
            buffer._array[...] = array

    def signature(self):
        """What must not change while a CUDA graph is replayed: shapes and addresses."""

        def place(bound):
            return (bound.data_ptr(), *bound.shape()) if isinstance(bound, OrtValue) else bound

        fetched = {name: self.buffers[name].data_ptr() for name in self.outputs if name in self.buffers}
        return (
            {name: place(bound) for name, bound in self.inputs.items()},
            {name: bound for name, bound in self.outputs.items() if bound},
            fetched,
        )


class FakeSession(Session):
    """A session of one of the two graphs; everything above the runtime is the real thing.

    Attributes:
        token_counts: Packed tokens of each run.
        sequence_counts: Tokens that each run chose, of runs that choose.
        grids: [G, R, T] of each run.
        score_counts: Attention scores of one layer of each run.
        fetched: Names of the outputs that each choosing run fetched.
        graph_ids: The CUDA graph of each run.
        uploads: Arrays that were copied to the device since the run before.
        fail_at: Number of the run that fails, counted from 1.
    """

    def __init__(self, runtime, *, limits, has_cuda_graphs=False):
        self.provider, self.limits, self.has_cuda_graphs = runtime.provider, limits, has_cuda_graphs
        self._ort, self._device_id = runtime, 0
        self._session = SimpleNamespace(
            io_binding=lambda: IOBinding(runtime), run_with_iobinding=self._run_with_iobinding
        )
        self._captured = {}
        self._uploads_before = 0
        self.token_counts, self.sequence_counts, self.grids, self.score_counts = [], [], [], []
        self.fetched, self.graph_ids, self.uploads = [], [], []
        self.fail_at = None

    def allocate(self, elements, dtype):
        if self.provider == "cpu":
            self._ort.check_room(elements * np.dtype(dtype).itemsize, OutOfMemoryError)
        return super().allocate(elements, dtype)

    def _run_with_iobinding(self, bound, options):
        assert options.only_execute_path_to_fetches
        graph_id = int(options.entries.get("gpu_graph_id", -1))
        assert graph_id == -1 or self.has_cuda_graphs
        self.uploads.append(self._ort.uploads - self._uploads_before)
        self._uploads_before = self._ort.uploads
        self.graph_ids.append(graph_id)
        if len(self.graph_ids) == self.fail_at:
            raise RuntimeError("the device was lost")
        self._compute(bound)
        if graph_id != -1:
            assert self._captured.setdefault(graph_id, bound.signature()) == bound.signature()

    def _compute(self, bound):
        """Runs the decoder, as far as the outputs ask for it."""
        hidden, position = bound.input("input_ids"), bound.input("position_ids")
        slots = bound.input("slot_index")
        assert {value._array.dtype for value in bound.inputs.values() if isinstance(value, OrtValue)} == {
            np.dtype(np.int64)
        }
        assert slots.min() >= 0
        self.token_counts.append(len(hidden))
        self.grids.append(slots.shape)
        columns = bound.input("prefix.0.key").shape[3] + bound.input("past_key_values.0.key").shape[3]
        self.score_counts.append(LAYOUT.heads * slots.size * columns)
        hidden = self._layer(bound, 0, hidden, position, queries=hidden, query_slots=slots, index="context_index")
        chosen = [name for name in ("logprobs", "token_ids", "token_logprobs", "eos_logprobs") if name in bound.outputs]
        queries = hidden[bound.input("output_index")] if chosen else None
        last_slots = bound.input("output_slot_index")
        hidden = self._layer(
            bound, 1, hidden, position, queries=queries, query_slots=last_slots, index="output_context_index"
        )
        if not chosen:
            return
        scores = np.zeros((len(hidden), VOCABULARY), np.float32)
        for row, value in zip(scores, hidden.tolist(), strict=True):
            row[token_of(value)] = 3.0
        logprobs = log_softmax(scores)
        results = {
            "logprobs": logprobs,
            "token_ids": logprobs.argmax(axis=1)[:, None],
            "token_logprobs": logprobs.max(axis=1)[:, None],
            "eos_logprobs": logprobs[:, [END]],
        }
        for name in chosen:
            bound.fetch(name, results[name])
        self.sequence_counts.append(len(hidden))
        self.fetched.append(tuple(chosen))

    @staticmethod
    def _layer(bound, layer, hidden, position, *, queries, query_slots, index):
        """One layer: writes keys and values; hidden values of all queries, in the order of `index`."""
        slots, write_index = bound.input("slot_index"), bound.input("write_index")
        groups, rows, width = slots.shape
        caches, prefixes = {}, {}
        for part, factor, more in (("key", 1, 0), ("value", 2, 1)):
            name = f"{layer}.{part}"
            past, present = bound.inputs[f"past_key_values.{name}"], bound.outputs[f"present.{name}"]
            assert past == present  # the graph writes in place
            caches[part], prefixes[part] = bound.output(f"present.{name}"), bound.input(f"prefix.{name}")
            assert caches[part].shape[:3] == (groups, LAYOUT.heads, rows)
            assert prefixes[part].shape[:3] == (groups, LAYOUT.heads, 1)
            for head in range(LAYOUT.heads):
                new = np.stack([hidden + factor * head + more, position], axis=-1).astype(np.float32)
                for group, column in enumerate(write_index.tolist()):
                    assert 0 <= column <= caches[part].shape[3] - width
                    caches[part][group, head, :, column : column + width] = new[slots[group]]
            for cache in (caches[part], prefixes[part]):
                assert np.isfinite(cache).all(), "fresh memory of the device was read"
        if queries is None:
            return None
        (key, value), (prefix_key, prefix_value) = caches.values(), prefixes.values()
        own = mix_key_value(*(half.astype(np.int64) for one in (key, value) for half in np.moveaxis(one, -1, 0)))
        shared = mix_key_value(
            *(half.astype(np.int64) for one in (prefix_key, prefix_value) for half in np.moveaxis(one, -1, 0))
        )
        tokens = query_slots.shape[2]
        steps = np.arange(width)[width - tokens :]  # of the last layer, the last token of each row
        column = np.arange(own.shape[3])
        starts, lengths = bound.input("suffix_starts"), bound.input("prefix_lengths")
        until = write_index[:, None] + steps  # [G, T]
        sees = (column >= starts[:, :, None, None]) & (column <= until[:, None, :, None])  # [G, R, T, C]
        context = (own[:, :, :, None, :] * sees[:, None]).sum(axis=-1)  # [G, H, R, T]
        seen = np.arange(shared.shape[3]) < lengths[:, None]
        context = context + (shared[:, :, 0] * seen[:, None]).sum(axis=-1)[:, :, None, None]
        context = context + 31 * queries[query_slots][:, None]
        gathered = context.ravel()[bound.input(index)]
        assert gathered.shape == (len(queries), LAYOUT.heads)
        return mix(7 * queries + gathered @ np.arange(1, LAYOUT.heads + 1))


class FakeCopier(FakeSession):
    """A session of the graph that copies KV caches (`export.decoder.build_cache_copy`)."""

    def _compute(self, bound):
        index = bound.input("index")
        for name in LAYOUT.names:
            source, target = bound.input(f"source.{name}"), bound.output(f"target.{name}")
            assert source.shape[1] == target.shape[1] == 16 * LAYOUT.head_size
            assert len(index) == len(target)
            assert 0 <= index.min() <= index.max() < len(source)
            target[...] = source[index]


def limits_of(mode, **changes):
    """Of the CPU, or of CUDA with and without CUDA graphs, but for few tokens."""
    on_device = {} if mode == "cpu" else {"column_step": 32, "fixed_shapes": True, "chooses_on_host": False}
    sizes = {"max_prefill_tokens": 48, "max_batch_tokens": 300, "max_batch_bytes": 2**19}
    return Limits(**sizes | on_device | changes)


def make_sessions(mode="cpu", **limits):
    """The decoder's session and the copier's, on one device. `mode` is `cpu`, `device` or `device with CUDA graphs`."""
    runtime = FakeRuntime("cpu" if mode == "cpu" else "cuda")
    limits = limits_of(mode, **limits)
    return (
        FakeSession(runtime, limits=limits, has_cuda_graphs=mode == "device with CUDA graphs"),
        FakeCopier(runtime, limits=limits),
    )
