"""What an answerer tells about itself: `Answerer.stats()`."""

from __future__ import annotations

from dataclasses import dataclass

from qa_onnx.engine.prefix_cache import PrefixCacheStats
from qa_onnx.engine.stats import EngineStats


@dataclass(frozen=True, kw_only=True)
class AnswererStats:
    """What an answerer does now, and has done since it was loaded.

    Attributes:
        provider: `cpu` or `cuda`.
        requests: Requests that wait or run.
        waiting: Sequences that wait; a request has one per window of its context, or more with `num_answers`.
        running: Sequences that are computed.
        answered: Requests that were answered.
        batch_size: Maximum number of sequences computed together; lower than `EngineConfig.batch_size` after a batch
            for which there was no memory.
        kernels: The instruction set of the kernels that compute (`amx`, `avx512`...); None where ONNX Runtime's own do.
        kernels_reason: Why it is None.
        uses_cuda_graphs: Whether decode steps are captured in CUDA graphs.
        engine: Counts of what was computed.
        prefix_cache: What the prefix cache holds, and how often it helped.
    """

    provider: str
    requests: int
    waiting: int
    running: int
    answered: int
    batch_size: int
    kernels: str | None
    kernels_reason: str
    uses_cuda_graphs: bool
    engine: EngineStats
    prefix_cache: PrefixCacheStats
