"""What depends on the execution provider: its choice, the versions of ONNX Runtime that have it, and its limits."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from qa_onnx.config import EngineConfig
from qa_onnx.errors import InvalidInputError, ProviderError

Provider = Literal["auto", "cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a provider computes at a time.

    Attributes:
        max_prefill_tokens: Tokens after which one run of a prefill is full: on the CPU few enough for its caches, on
            CUDA enough to fill the device.
        max_batch_tokens: Maximum number of tokens whose keys and values a batch holds when prompts join it.
        max_batch_bytes: Maximum bytes of a batch: half for keys and values, half for attention scores.
        column_step: Columns of the KV cache that new tokens get at a time.
        fixed_shapes: Whether a decode step computes all slots of a batch, finished ones too, so that its shapes and
            addresses stay the same (CUDA), or only the sequences that run (CPU).
        chooses_on_host: Whether the most probable token is found in numpy (CPU: the operators of ONNX Runtime take
            seven times as long), or by the graph (CUDA: the log-probabilities need not leave the device).
    """

    max_prefill_tokens: int
    max_batch_tokens: int
    max_batch_bytes: int
    column_step: int = 16
    fixed_shapes: bool = False
    chooses_on_host: bool = True


_LIMITS = {
    "cpu": Limits(max_prefill_tokens=512, max_batch_tokens=1536, max_batch_bytes=2 * 2**30),
    "cuda": Limits(
        max_prefill_tokens=32768,
        max_batch_tokens=65536,
        max_batch_bytes=2 * 2**30,
        column_step=32,
        fixed_shapes=True,
        chooses_on_host=False,
    ),
}
_PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "fp16")}
"""What each provider has kernels for; ONNX Runtime would run the rest of a graph elsewhere or by conversions."""
ONNX_RUNTIME_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OLDEST_VERSION = {"cpu": (1, 25), "cuda": (1, 27)}
"""1.24 has no TensorScatter. On CUDA, 1.25 and 1.26 (CUDA 12) have no Reshape and Cast of opset 24: they would copy
activations between host and device in every layer."""
_CUDA_GRAPH_VERSION = (1, 31)
"""Before, Concat and Split copy small arrays to the device, which is forbidden while a CUDA graph is captured."""


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
            "ONNX Runtime is not installed. In the checkout: pip install '.[cpu]', or '.[gpu]'"
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
        ProviderError: The provider is not part of this ONNX Runtime, which is too old for it, or it does not run the
            precision.
    """
    if provider not in PROVIDERS:
        raise InvalidInputError(f"got provider {provider!r}; expected one of {', '.join(PROVIDERS)}")
    ort = import_onnxruntime()
    available = ort.get_available_providers()
    if provider == "auto":
        has_cuda = ONNX_RUNTIME_NAMES["cuda"] in available
        provider = "cuda" if has_cuda and precision in _PRECISIONS["cuda"] else "cpu"
    if ONNX_RUNTIME_NAMES[provider] not in available:
        raise ProviderError(
            f"provider {provider!r} was asked for, and this ONNX Runtime has {', '.join(available)}. "
            "For CUDA, uninstall onnxruntime and, in the checkout, pip install '.[gpu]'; or pass provider='cpu'"
        )
    if _version(ort) < _OLDEST_VERSION[provider]:
        oldest = ".".join(map(str, _OLDEST_VERSION[provider]))
        package, extra = ("onnxruntime-gpu", "gpu") if provider == "cuda" else ("onnxruntime", "cpu")
        raise ProviderError(
            f"ONNX Runtime {ort.__version__} lacks operators that the graph needs on provider {provider!r}; expected "
            f"{package} {oldest} or later. In the checkout: pip install --upgrade '.[{extra}]'"
        )
    if precision not in _PRECISIONS[provider]:
        other = "cuda" if provider == "cpu" else "cpu"
        raise ProviderError(
            f"a bundle in {precision} does not run on provider {provider!r}, which runs "
            f"{' and '.join(_PRECISIONS[provider])}. Pass provider={other!r}, or export the model in one of these"
        )
    return "cuda" if provider == "cuda" else "cpu"


def choose_limits(provider: str, config: EngineConfig) -> Limits:
    """The provider's limits, with those that the caller gave."""
    names = ("max_prefill_tokens", "max_batch_tokens", "max_batch_bytes")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return replace(_LIMITS[provider], **given)


def with_batch_tokens(config: EngineConfig, provider: str, *, weight_bytes: int, token_bytes: int) -> EngineConfig:
    """The configuration with `max_batch_tokens`, where the caller gave none and the CPU computes.

    A decode step there reads all weights, however few its sequences are. So keys and values of a batch may take half as
    many bytes as the weights, if that is more than the provider's default: with GPT-2 in fp32 that is 1.1 times as
    fast. More would bring less, and keep requests that come meanwhile waiting for a longer prefill.

    Args:
        config: Of the caller.
        provider: `cpu` or `cuda`.
        weight_bytes: Of the bundle's weights.
        token_bytes: Of the keys and values of a token.
    """
    if config.max_batch_tokens is not None or provider != "cpu":
        return config
    tokens = max(weight_bytes // 2 // token_bytes, _LIMITS[provider].max_batch_tokens)
    return replace(config, max_batch_tokens=tokens)


def has_cuda_graphs(ort: Any) -> bool:
    """Whether decode steps can be captured with this version of ONNX Runtime."""
    return _version(ort) >= _CUDA_GRAPH_VERSION


@cache
def int8_saturates() -> bool:
    """Whether ONNX Runtime's product of uint8 and int8 saturates on this processor: x86 without VNNI.

    The option `session.x64quantprecision` has it multiply uint8 by uint8 there, which is exact and a tenth slower; with
    VNNI it would only be slower, and elsewhere it does nothing. (ONNX Runtime's quantization guide, "U8S8 can face
    saturation issue".)
    """
    path = Path("/proc/cpuinfo")
    return not path.exists() or "vnni" not in path.read_text(encoding="utf-8", errors="replace")


def preload_cuda(ort: Any) -> str:
    """Loads the CUDA libraries of pip's packages; returns what that printed of those it did not find, for an error."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    return "".join(f"{line.strip()}. " for line in printed.getvalue().splitlines() if "Failed" in line)


def _version(ort: Any) -> tuple[int, int]:
    major, minor, *_ = ort.__version__.split(".")
    return int(major), int(minor)
