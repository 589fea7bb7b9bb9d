"""ONNX Runtime, and everything that depends on the execution provider: choice, options, devices, I/O binding."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qa_onnx.errors import BundleError, InvalidInputError, ProviderError

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["auto", "cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a provider works on at a time.

    Attributes:
        prefill_tokens: Tokens that one run of a prefill should have: on the CPU few enough for its caches, on CUDA
            many enough to fill the device.
        batch_tokens: Tokens whose keys and values a batch holds at most, which bounds its memory.
    """

    prefill_tokens: int
    batch_tokens: int


_PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
"""TF32 rounds the inputs of fp32 products to 10 bits: faster, and no longer the same answers as PyTorch's."""
_LIMITS = {
    "cpu": Limits(prefill_tokens=512, batch_tokens=1536),
    "cuda": Limits(prefill_tokens=32768, batch_tokens=32768),
}
_PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}
"""What each provider has kernels for; ONNX Runtime would run the rest of a graph elsewhere or by conversions."""
_ONNX_RUNTIME_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime() -> Any:
    """Imports ONNX Runtime with its telemetry off, unless the user has decided on that already.

    Raises:
        ProviderError: It is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderError(
            "ONNX Runtime is not installed. Install qa_onnx with one of its extras: qa_onnx[cpu] or qa_onnx[gpu]"
        ) from error
    return onnxruntime


def resolve_provider(provider: str, precision: str = "fp32") -> Literal["cpu", "cuda"]:
    """Decides which provider to ask for.

    Args:
        provider: One of `PROVIDERS`; `auto` is CUDA where this ONNX Runtime was built with it and it runs the
            precision, else the CPU.
        precision: Of the graph that it is to run.

    Raises:
        InvalidInputError: `provider` is none of `PROVIDERS`.
        ProviderError: The provider is not part of this ONNX Runtime, or does not run the precision.
    """
    if provider not in PROVIDERS:
        raise InvalidInputError(f"got provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
    available = import_onnxruntime().get_available_providers()
    if provider == "auto":
        has_cuda = _ONNX_RUNTIME_NAMES["cuda"] in available
        provider = "cuda" if has_cuda and precision in _PRECISIONS["cuda"] else "cpu"
    if _ONNX_RUNTIME_NAMES[provider] not in available:
        raise ProviderError(
            f"provider {provider!r} was asked for, and this ONNX Runtime has {', '.join(available)}. "
            "For CUDA, uninstall onnxruntime and install qa_onnx[gpu]; or pass provider='cpu'"
        )
    if precision not in _PRECISIONS[provider]:
        other = "cuda" if provider == "cpu" else "cpu"
        raise ProviderError(
            f"a bundle in {precision} does not run on provider {provider!r}, which runs "
            f"{' and '.join(_PRECISIONS[provider])}. Pass provider={other!r}, or export the model in one of these"
        )
    return "cuda" if provider == "cuda" else "cpu"


class Session:
    """One graph on one provider. Inputs and outputs stay on the provider's device until somebody asks for an array.

    Safe to use from several threads: a run keeps no state here.
    """

    def __init__(self, model_path: Path, *, provider: str = "auto", threads: int | None = None) -> None:
        """Loads the graph.

        Args:
            model_path: The ONNX file.
            provider: `auto`, `cpu` or `cuda`.
            threads: Threads of one operator; None leaves it to ONNX Runtime (one a physical core).

        Raises:
            InvalidInputError: An unknown provider, or a thread count below 1 or above the machine's.
            ProviderError: The provider is not there, or ONNX Runtime would have replaced it by another.
            BundleError: ONNX Runtime cannot load the file.
        """
        _check_threads(threads)
        self.path = model_path
        self.provider = resolve_provider(provider)
        self.limits = _LIMITS[self.provider]
        self._ort = import_onnxruntime()
        if self.provider == "cuda" and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()
        name = _ONNX_RUNTIME_NAMES[self.provider]
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        # The graph comes optimised from the export; fusing more (Add with LayerNormalization) makes it slower.
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session: onnxruntime.InferenceSession = self._ort.InferenceSession(
                str(model_path), options, providers=[name], provider_options=[_PROVIDER_OPTIONS[self.provider]]
            )
        except Exception as error:  # ONNX Runtime's own classes have no base in common but this one
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            raise BundleError(f"{model_path} cannot be loaded by ONNX Runtime on {name}: {error}") from error
        if name not in self._session.get_providers():
            raise ProviderError(
                f"{name} was asked for, and ONNX Runtime started with {', '.join(self._session.get_providers())}. "
                "Check the CUDA driver and libraries, or pass provider='cpu'"
            )
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [value.name for value in self._session.get_outputs()]

    def run(
        self,
        inputs: Mapping[str, np.ndarray | onnxruntime.OrtValue],
        *,
        in_place: Mapping[str, onnxruntime.OrtValue],
    ) -> dict[str, onnxruntime.OrtValue]:
        """Runs the graph by I/O binding: nothing leaves the device.

        Args:
            inputs: For each input name an array, or a value that is on the device already.
            in_place: For some output names the value to write to, which may be an input's.

        Returns:
            For each other output name a value on the device.
        """
        # Held until the run is over: on the CPU a value is its array's memory, and a binding may not hold the value.
        values = {
            name: self.to_device(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()
        }
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            if name in in_place:
                binding.bind_ortvalue_output(name, in_place[name])
            else:
                binding.bind_output(name, self.provider)
        self._session.run_with_iobinding(binding)
        outputs = zip(self.output_names, binding.get_outputs(), strict=True)
        return {name: value for name, value in outputs if name not in in_place}

    def to_device(self, array: np.ndarray) -> onnxruntime.OrtValue:
        """Puts an array on the provider's device; on the CPU the value shares the array's memory and keeps it alive."""
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.provider)


def _check_threads(threads: int | None) -> None:
    if threads is None:
        return
    most = os.cpu_count() or 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InvalidInputError(f"got threads {threads!r}; expected a whole number of at least 1, or None")
    if threads > most:
        raise InvalidInputError(
            f"got threads {threads}; this machine has {most} processors, and more threads than that only wait for "
            "each other. Pass at most as many, or None"
        )
