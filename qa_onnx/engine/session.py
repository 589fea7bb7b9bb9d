"""Sessions of ONNX Runtime: their options, device memory, and I/O binding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qa_onnx.config import EngineConfig
from qa_onnx.engine.provider import (
    ONNX_RUNTIME_NAMES,
    choose_limits,
    has_cuda_graphs,
    import_onnxruntime,
    int8_saturates,
    preload_cuda,
    resolve_provider,
)
from qa_onnx.errors import BundleError, EngineError, OutOfMemoryError, ProviderError, QAOnnxError, one_line
from qa_onnx.kernels import KernelLibrary

if TYPE_CHECKING:
    import onnxruntime

_NO_CAPTURE = -1
_SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
"""On the CPU the fused operators are slower than the two that they replace (`bench/NOTES.md`)."""
_MAX_FOLDED_BYTES = str(2**30)
"""Maximum bytes of a constant that is computed as a graph is loaded: int8 embeddings are transposed then."""
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "Available memory of",
    "out of memory",
    "bad_alloc",
    "cudaErrorMemoryAllocation",
)


@dataclass(frozen=True, kw_only=True)
class View:
    """A tensor in device memory: `shape` elements of `dtype`, from `offset` elements behind the start of `memory`."""

    memory: Any
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """Where it starts on its device."""
        address: int = self.memory.data_ptr() + self.offset * self.dtype.itemsize
        return address

    def as_rows(self, size: int) -> View:
        """The same elements as [-1, size]."""
        return replace(self, shape=(prod(self.shape) // size, size))


@dataclass(frozen=True)
class TensorType:
    """The type of an input or output: a NumPy dtype's name, and a shape in which a string is any number."""

    dtype: str
    shape: tuple[int | str, ...]

    def matches(self, other: TensorType) -> bool:
        """Whether another type has the same dtype, as many dimensions, and the same fixed ones."""
        fixed = [[size if isinstance(size, int) else None for size in one.shape] for one in (self, other)]
        return self.dtype == other.dtype and fixed[0] == fixed[1]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


Signature = dict[str, TensorType]
"""The type of each input, or output, of a graph, in order."""
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def load_copier(path: Path, *, provider: str, config: EngineConfig | None = None) -> Session:
    """Loads the graph that copies KV caches, as `Session` does.

    It has one thread: those of a second pool would spin after each copy, and take the processors from the decoder's.
    """
    return Session(path, provider=provider, config=replace(config or EngineConfig(), threads=1, cuda_graphs=False))


class Session:
    """One graph on one provider. `make_binding` runs it; its inputs and outputs stay on the provider's device.

    Attributes:
        inputs: The types of the graph's inputs.
        outputs: The types of its outputs.
        has_kernels: Whether the graph has this package's own operators.
    """

    has_kernels = False

    def __init__(
        self,
        model_path: Path,
        *,
        provider: str = "auto",
        config: EngineConfig | None = None,
        kernels: KernelLibrary | None = None,
    ) -> None:
        """Loads the graph.

        Args:
            model_path: The ONNX file.
            provider: `auto`, `cpu` or `cuda`.
            config: Threads, device and limits.
            kernels: The operators of a graph from `export.kernel_decoder`; None for other graphs.

        Raises:
            InvalidInputError: An unknown provider.
            ProviderError: The provider does not start; it is never replaced by another.
            BundleError: ONNX Runtime cannot load the file.
            OutOfMemoryError: There is no memory for it.
        """
        config = config or EngineConfig()
        self.path = model_path
        self.provider = resolve_provider(provider)
        self.limits = choose_limits(self.provider, config)
        self._ort = import_onnxruntime()
        self._device_id = config.device_id if self.provider == "cuda" else 0
        self.has_cuda_graphs = self.provider == "cuda" and config.cuda_graphs and has_cuda_graphs(self._ort)
        self.has_kernels = kernels is not None
        preloaded = ""
        if self.provider == "cuda":
            preloaded = preload_cuda(self._ort)
            self._ort.set_default_logger_severity(4)  # what does not start is told below, in one line
        name = ONNX_RUNTIME_NAMES[self.provider]
        try:
            self._session: onnxruntime.InferenceSession = self._ort.InferenceSession(
                str(model_path),
                self._session_options(config, kernels),
                providers=[name],
                provider_options=[self._provider_options(config)],
                disabled_optimizers=_SLOW_FUSIONS,
                enable_fallback=0,
            )
            self.inputs = _signature(self._session.get_inputs())
            self.outputs = _signature(self._session.get_outputs())
        except Exception as error:  # ONNX Runtime's own classes have no base in common but this one
            raise self._loading_error(error) from error
        if name not in self._session.get_providers():
            raise ProviderError(
                f"{name} was asked for, and ONNX Runtime started with {', '.join(self._session.get_providers())}. "
                f"{preloaded}Check that the machine has a GPU and its driver (nvidia-smi), install the CUDA libraries "
                "(in the checkout: pip install '.[gpu]'), or pass provider='cpu'"
            )

    def _session_options(self, config: EngineConfig, kernels: KernelLibrary | None) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4 if self.provider == "cuda" else 3
        # The graph comes optimized from the export, and fusing more makes it slower.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if self.provider == "cpu" and int8_saturates():  # one of the extended optimizations makes int8 exact
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.x64quantprecision", "1")
        if config.threads is not None:
            options.intra_op_num_threads = config.threads
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", _MAX_FOLDED_BYTES)
        if kernels is not None:
            options.register_custom_ops_library(str(kernels.path))
        return options

    def _loading_error(self, error: Exception) -> QAOnnxError:
        """What an error of ONNX Runtime while it loads the graph means to a caller."""
        if _is_out_of_memory(error):
            return OutOfMemoryError(f"there is no memory to load {self.path}: {one_line(error)}")
        if self.provider == "cuda" and ("device" in str(error).lower() or "CUDA failure" in str(error)):
            return ProviderError(
                f"CUDA device {self._device_id} cannot be used: {one_line(error)} Check the GPU with nvidia-smi, "
                "pass another device_id, or provider='cpu'"
            )
        name = ONNX_RUNTIME_NAMES[self.provider]
        return BundleError(f"{self.path} cannot be loaded by ONNX Runtime on {name}: {one_line(error)}")

    def _provider_options(self, config: EngineConfig) -> dict[str, str]:
        if self.provider == "cpu":
            return {}
        options = {
            "device_id": str(self._device_id),
            "use_tf32": "0",  # TF32 rounds fp32 inputs to 10 bits: faster, and not PyTorch's answers any more
            "arena_extend_strategy": "kSameAsRequested",
        }
        if config.memory_limit is not None:
            options["gpu_mem_limit"] = str(config.memory_limit)
        if self.has_cuda_graphs:
            options["enable_cuda_graph"] = "1"
        return options

    def allocate(self, elements: int, dtype: np.dtype) -> Any:
        """Allocates device memory for some elements.

        On the CPU it holds zeros, on CUDA whatever was there before (see `KVCachePool`).

        Raises:
            OutOfMemoryError: There is not enough.
        """
        with _errors_of_runtime():
            if self.provider == "cpu":
                return self.to_device(np.zeros(max(elements, 1), dtype))
            return self._ort.OrtValue.ortvalue_from_shape_and_type(
                [max(elements, 1)], dtype.type, self.provider, self._device_id
            )

    def to_device(self, array: np.ndarray) -> Any:
        """Copies an array to the device; on the CPU its memory is shared."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.provider, self._device_id)

    def make_binding(self) -> Binding:
        """Makes a binding that has no inputs and outputs yet."""
        return Binding(self)


class Binding:
    """The inputs and outputs of a graph, set once and run many times: only arrays that change are copied to the device.

    One thread at a time may use it.
    """

    def __init__(self, session: Session) -> None:
        """Binds nothing yet."""
        self._session = session
        self._ort = session._ort
        self._binding = session._session.io_binding()
        self._arrays: dict[str, tuple[np.ndarray, onnxruntime.OrtValue]] = {}
        self._outputs: list[str] = []
        """All outputs, in the order they were bound first, which is ONNX Runtime's."""
        self._fetched: tuple[str, ...] = ()
        self._fetched_rows = -1
        self._options = self._ort.RunOptions()
        self._options.only_execute_path_to_fetches = True
        self._graph_id: int | None = None

    def set_array(self, name: str, array: np.ndarray) -> None:
        """Sets an input to an array; one that is equal to what is there already is not copied again."""
        held = self._arrays.get(name)
        if held is not None and held[0].shape == array.shape:
            if not np.array_equal(held[0], array):
                held[0][...] = array
                if self._session.provider != "cpu":  # there the value is the array's own memory
                    held[1].update_inplace(held[0])
            return
        own = np.array(array, order="C")
        value = self._session.to_device(own)
        self._arrays[name] = own, value
        self._binding.bind_ortvalue_input(name, value)

    def set_input(self, name: str, view: View) -> None:
        """Sets an input to device memory, which has to live until the last run."""
        with _errors_of_runtime():
            self._binding.bind_input(
                name, self._session.provider, self._session._device_id, view.dtype.type, view.shape, view.address
            )

    def set_output(self, name: str, view: View) -> None:
        """Has an output written to device memory, which may be an input's, and has to live until the last run."""
        self._note_output(name)
        with _errors_of_runtime():
            self._binding.bind_output(
                name, self._session.provider, self._session._device_id, view.dtype.type, view.shape, view.address
            )

    def set_fetched(self, names: tuple[str, ...], *, rows: int) -> None:
        """Says which other outputs `run` returns, of `rows` rows each. Their memory is kept while that is the same."""
        if (names, rows) == (self._fetched, self._fetched_rows):
            return
        self._fetched, self._fetched_rows = names, rows
        for name in names:
            self._note_output(name)
            self._binding.bind_output(name, self._session.provider, self._session._device_id)

    def _note_output(self, name: str) -> None:
        if name not in self._outputs:
            self._outputs.append(name)

    def run(self, *, graph_id: int | None = None) -> dict[str, np.ndarray]:
        """Runs what the outputs need.

        Args:
            graph_id: Number of the CUDA graph to capture or replay: shapes and addresses have to be those of its first
                run. None does neither.

        Returns:
            The fetched outputs. On the CPU they are the outputs' own memory, valid until the next run.

        Raises:
            OutOfMemoryError: The device has not enough memory.
            EngineError: ONNX Runtime fails for another reason.
        """
        number = _NO_CAPTURE if graph_id is None else graph_id
        if self._session.has_cuda_graphs and number != self._graph_id:  # setting it again would print a warning
            self._options.add_run_config_entry("gpu_graph_id", str(number))
            self._graph_id = number
        with _errors_of_runtime():
            self._session._session.run_with_iobinding(self._binding, self._options)
            if not self._fetched:
                return {}
            values = self._binding.get_outputs()
            return {name: values[self._outputs.index(name)].numpy() for name in self._fetched}


def _signature(values: Iterable[Any]) -> Signature:
    return {value.name: TensorType(_DTYPES.get(value.type, value.type), tuple(value.shape)) for value in values}


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def _errors_of_runtime() -> Iterator[None]:
    """Turns the errors of ONNX Runtime into this package's."""
    try:
        yield
    except Exception as error:  # its own classes have no base in common but this one
        if _is_out_of_memory(error):
            raise OutOfMemoryError(one_line(error)) from error
        raise EngineError(f"ONNX Runtime failed: {one_line(error)}") from error
