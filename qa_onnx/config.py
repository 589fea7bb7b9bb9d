"""The options of a call (`GenerationConfig`) and of a loaded model (`EngineConfig`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf
from numbers import Integral, Real

import numpy as np

from qa_onnx.errors import InvalidInputError, short_repr

MAX_NUM_ANSWERS = 100
MIN_TEMPERATURE = 0.001
"""Below it, drawing is greedy: a difference of 0.1 between two logits is a factor of e^100."""
MAX_WHOLE_NUMBER = 2**63
DEFAULT_MAX_NEW_TOKENS = 32
DEFAULT_STRIDE = 128
MIN_WINDOW_TOKENS = 16
DEFAULT_BATCH_SIZE = 64
DEFAULT_PREFIX_CACHE_BYTES = 256 * 2**20
KERNELS = ("auto", "off", "required")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to answer. The defaults are greedy decoding of unconstrained text, one answer per question.

    The options of decoding do what the logits processors of transformers with the same purpose do
    (https://huggingface.co/docs/transformers/internal/generation_utils), in the same order.

    Attributes:
        max_new_tokens: Maximum number of tokens of an answer.
        extractive: Only answers that are a span of the context, from the start of a word to the end of one.
        num_answers: How many different answers a question gets, the most probable first (`Answer.alternatives`);
            at most `MAX_NUM_ANSWERS`.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and answer together; 0 is no limit.
        temperature: 0 takes the most probable token; from `MIN_TEMPERATURE` on, tokens are drawn from the logits
            divided by it.
        top_k: Draw from this number of most probable tokens; 0 is all of them.
        top_p: Draw from the most probable tokens whose probabilities add up to this (nucleus sampling, Holtzman et
            al., 2019).
        seed: Seed of the draws; the same seed draws the same answer to the same question, alone and in any batch. None
            draws differently each time.
        no_answer_threshold: From 0 to 1. Where the probability that the context holds no answer is above it, the
            answer is empty; where it is not, there is one. None takes the bundle's, from `python -m qa_onnx calibrate`;
            where it has none, the answer is empty where that is most probable.
        window: Maximum number of tokens of a context that are read at once (see `WindowSettings`); longer ones are read
            in overlapping windows. None takes the bundle's.
        stride: Tokens that neighboring windows share, no more than half a window. None takes the bundle's.
        ignore_eos: Continue after the end-of-text token, up to `max_new_tokens`. For benchmarks.

    Raises:
        InvalidInputError: A value is out of range, or two options contradict each other.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    extractive: bool = False
    num_answers: int = 1
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    no_answer_threshold: float | None = None
    window: int | None = None
    stride: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("num_answers", 1),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
        ):
            _set_whole_number(self, name, least)
        for name, least in (("seed", 0), ("window", MIN_WINDOW_TOKENS), ("stride", 0)):
            if getattr(self, name) is not None:
                _set_whole_number(self, name, least)
        if self.num_answers > MAX_NUM_ANSWERS:
            raise InvalidInputError(
                f"got num_answers {self.num_answers}; expected at most {MAX_NUM_ANSWERS}: the search for them takes "
                "time and memory"
            )
        for name in ("extractive", "ignore_eos"):
            _set_bool(self, name)
        _set_number(self, "temperature", f"0 (greedy), or a number from {MIN_TEMPERATURE} on")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < inf):
            raise InvalidInputError(
                f"got temperature {self.temperature!r}; expected 0 (greedy), or a number from {MIN_TEMPERATURE} on"
            )
        _set_number(self, "top_p", "a number above 0 and at most 1")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"got top_p {self.top_p!r}; expected a number above 0 and at most 1")
        if self.no_answer_threshold is not None:
            _set_number(self, "no_answer_threshold", "a probability from 0 to 1, or None")
        threshold = self.no_answer_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise InvalidInputError(
                f"got no_answer_threshold {threshold!r}; expected a probability from 0 to 1, or None"
            )
        if not self.samples and (self.top_k, self.top_p, self.seed) != (0, 1.0, None):
            raise InvalidInputError(
                "got top_k, top_p or seed without a temperature; they have no effect on greedy decoding. "
                "Pass a temperature above 0, or leave them out. For several answers per question pass num_answers"
            )
        if self.samples and self.num_answers > 1:
            raise InvalidInputError(
                f"got num_answers {self.num_answers} with a temperature; the most probable answers are searched, not "
                "drawn. Leave one of them out"
            )
        if self.extractive and self.no_repeat_ngram_size:
            raise InvalidInputError(
                "got extractive with no_repeat_ngram_size; an extractive answer repeats the context. "
                "Leave one of them out"
            )
        if self.ignore_eos and (self.extractive or self.num_answers > 1 or threshold is not None):
            raise InvalidInputError(
                "got ignore_eos with extractive, num_answers or no_answer_threshold, which decide where an answer "
                "ends. Leave one of them out"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a loaded model computes. None is the provider's default.

    Attributes:
        threads: CPU threads of one operator, at most as many as the machine has processors; None is one per physical
            core.
        kernels: `auto` computes with this package's own operators for the CPU where they run (`qa_onnx.kernels`), `off`
            with ONNX Runtime's alone, and `required` refuses to load where they cannot run. `Answerer.stats()` says
            which it is.
        device_id: The GPU to run on. For several GPUs load one `Answerer` per device.
        memory_limit: Maximum bytes of GPU memory that ONNX Runtime allocates for a session's weights and activations;
            KV caches are bounded by `max_batch_bytes` and `prefix_cache_bytes`. None is no limit.
        cuda_graphs: Capture the decode step in a CUDA graph where the onnxruntime-gpu in use can (1.31 and later);
            `Answerer.stats()` says whether it does.
        look_ahead: Verify several tokens of an answer at once where few are computed and its context proposes them
            (`qa_onnx.engine.look_ahead`): the same answers in fewer steps. Only with kernels.
        batch_size: Maximum number of sequences computed together.
        max_batch_tokens: Maximum number of tokens, padding included, that the KV cache of a batch holds when prompts
            join it. A batch always takes at least one prompt.
        max_prefill_tokens: Tokens after which one run of a prefill is full.
        max_batch_bytes: Maximum bytes of a batch: KV cache and attention scores, half for each.
        prefix_cache_bytes: Memory for the keys and values of contexts read before: another question on one of them
            computes only the question. 0 keeps no context longer than questions wait for it.
        max_wait_ms: How long the first request of `submit`, `answer_async`, `stream` and `answer_iter` waits for others
            to share its batch, in milliseconds. `answer` and `answer_batch` never wait.
        max_queue: Maximum number of requests of single callers that wait or run; one more raises `QueueFullError`.
            `answer_batch` is not limited by it.

    Raises:
        InvalidInputError: A value is out of range.
    """

    threads: int | None = None
    kernels: str = "auto"
    device_id: int = 0
    memory_limit: int | None = None
    cuda_graphs: bool = True
    look_ahead: bool = True
    batch_size: int = DEFAULT_BATCH_SIZE
    max_batch_tokens: int | None = None
    max_prefill_tokens: int | None = None
    max_batch_bytes: int | None = None
    prefix_cache_bytes: int = DEFAULT_PREFIX_CACHE_BYTES
    max_wait_ms: float = 2.0
    max_queue: int = 1024

    def __post_init__(self) -> None:
        for name, least in (
            ("device_id", 0),
            ("batch_size", 1),
            ("prefix_cache_bytes", 0),
            ("max_queue", 1),
        ):
            _set_whole_number(self, name, least)
        for name in ("threads", "memory_limit", "max_batch_tokens", "max_prefill_tokens", "max_batch_bytes"):
            if getattr(self, name) is not None:
                _set_whole_number(self, name, 1, "; None is the provider's default")
        processors = os.cpu_count() or 1
        if self.threads is not None and self.threads > processors:
            raise InvalidInputError(
                f"got threads {self.threads}; this machine has {processors} processors, and more threads than that "
                "only wait for each other. Pass at most as many, or None"
            )
        _set_bool(self, "cuda_graphs")
        _set_bool(self, "look_ahead")
        if self.kernels not in KERNELS:
            raise InvalidInputError(f"got kernels {short_repr(self.kernels)}; expected one of {', '.join(KERNELS)}")
        _set_number(self, "max_wait_ms", "milliseconds from 0 to 60,000")
        if not 0 <= self.max_wait_ms <= 60_000:
            raise InvalidInputError(f"got max_wait_ms {self.max_wait_ms:g}; expected milliseconds from 0 to 60,000")


def _set_whole_number(config: object, name: str, least: int, more: str = "") -> None:
    """Makes an option an int, of whatever kind of whole number it is (NumPy has eight).

    Raises:
        InvalidInputError: It is no whole number, below `least`, or has more than 64 bits.
    """
    value = getattr(config, name)
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool | np.bool_) else -1
    if number >= MAX_WHOLE_NUMBER:
        raise InvalidInputError(f"got {name} {short_repr(value)}; expected a whole number of less than 2^63")
    if number < least:
        raise InvalidInputError(f"got {name} {short_repr(value)}; expected a whole number of at least {least}{more}")
    object.__setattr__(config, name, number)


def _set_number(config: object, name: str, expected: str) -> None:
    """Makes an option a float.

    Raises:
        InvalidInputError: It is no number that a float can hold.
    """
    value = getattr(config, name)
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise InvalidInputError(f"got {name} {short_repr(value)}; expected {expected}")
    try:
        object.__setattr__(config, name, float(value))
    except OverflowError as error:
        raise InvalidInputError(f"got {name} {short_repr(value)}; expected {expected}") from error


def _set_bool(config: object, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, bool | np.bool_):
        raise InvalidInputError(f"got {name} {short_repr(value)}; expected True or False")
    object.__setattr__(config, name, bool(value))
