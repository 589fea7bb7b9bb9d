"""What is measured, each in a process of its own: `python -m bench.peers NAME SETTINGS` serves requests on its stdin.

A request is a JSON line, `{"batch_size": 16}` for all questions or `{"question": 3}` for one alone; the reply is a JSON
line with the seconds and the new tokens. Every runner is given texts and has to tokenize and detokenize them itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from bench.machine import peak_rss_mib
from qa_onnx.errors import ProviderError

Tokens = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a runner needs to know.

    Attributes:
        directory: Made by `bench.models.prepare`.
        questions, contexts: The texts, one context per question.
        max_new_tokens: Maximum number of tokens of an answer.
        stops: Whether end-of-text ends an answer; else every answer has `max_new_tokens`.
        threads: CPU threads.
        batch_size: Maximum number of questions in a batch of qa_onnx, which it is loaded with.
        prefix_cache: Whether qa_onnx keeps the prefixes of contexts from one request to the next.
    """

    directory: str
    questions: list[str]
    contexts: list[str]
    max_new_tokens: int
    stops: bool
    threads: int
    batch_size: int = 64
    prefix_cache: bool = False

    def to_json(self) -> str:
        """For the command line of a runner."""
        return json.dumps(asdict(self))


Answer = Callable[[Sequence[str], Sequence[str], int], Any]
"""Answers questions with their contexts, in batches of at most the given size; returns what `tokens_of` takes."""


def extractive(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """The runtime of this repository, where every answer is a span of its context."""
    return qa_onnx(settings, precision, is_extractive=True)


def qa_onnx(
    settings: Settings, precision: str, *, is_extractive: bool = False
) -> tuple[Answer, Callable[[Any], Tokens]]:
    """The runtime of this repository. Extractive answers end where they end, whatever `Settings.stops` says."""
    from qa_onnx import Answerer, EngineConfig, GenerationConfig
    from qa_onnx.config import DEFAULT_PREFIX_CACHE_BYTES
    from qa_onnx.kernels import choose_kernels

    choose_kernels("auto", provider="cpu", precision=precision)  # an error where there is nothing for bf16
    answerer = Answerer.from_pretrained(
        Path(settings.directory) / precision,
        provider="cpu",
        config=EngineConfig(
            threads=settings.threads,
            batch_size=settings.batch_size,
            prefix_cache_bytes=DEFAULT_PREFIX_CACHE_BYTES if settings.prefix_cache else 0,
        ),
    )
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        extractive=is_extractive,
        ignore_eos=not settings.stops and not is_extractive,
    )

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Any:
        if len(questions) > 1 and batch_size != settings.batch_size:
            raise ValueError(f"got batch size {batch_size}; qa_onnx was loaded with {settings.batch_size}")
        return answerer.answer_batch(questions, contexts, config=config)

    return answer, lambda answers: [list(answer.token_ids) for answer in answers]


def _generating(model: Any, settings: Settings) -> tuple[Answer, Callable[[Any], Tokens]]:
    """Answers by transformers' `generate`, in batches of like length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    from qa_onnx.text.prompt import encode_prompts, load_tokenizer
    from training.padding import pad_left, plan_batches

    torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(str(Path(settings.directory) / "model" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=end if settings.stops else None,
        pad_token_id=end,
        bos_token_id=end,
    )
    model.generation_config = config

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        rows: dict[int, list[int]] = {}
        for batch in plan_batches([len(prompt) for prompt in prompts], max_rows=batch_size, max_tokens=1 << 20):
            input_ids, attention_mask = pad_left([prompts[index].ids for index in batch], end)
            with torch.inference_mode():
                generated = model.generate(
                    input_ids=torch.from_numpy(input_ids),
                    attention_mask=torch.from_numpy(attention_mask),
                    generation_config=config,
                )
            for index, row in zip(batch, generated[:, input_ids.shape[1] :].tolist(), strict=True):
                rows[index] = row[: row.index(end)] if settings.stops and end in row else row
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, lambda tokens: tokens


def transformers(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """Transformers' `generate` on PyTorch."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        Path(settings.directory) / "model",
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    return _generating(model.eval(), settings)


def optimum(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """Optimum's `ORTModelForCausalLM` on its own export."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    directory = Path(settings.directory) / "fp32-optimum"
    return _generating(ORTModelForCausalLM.from_pretrained(directory, session_options=options), settings)


def ctranslate2(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """CTranslate2's generator, with its own batching by length."""
    import ctranslate2 as library

    from qa_onnx.text.prompt import encode_prompts, load_tokenizer

    directory = Path(settings.directory)
    tokenizer = load_tokenizer(str(directory / "model" / "tokenizer.json"))
    generator = library.Generator(
        str(directory / f"ctranslate2-{precision}"), inter_threads=1, intra_threads=settings.threads
    )

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        results = generator.generate_batch(
            [[tokenizer.id_to_token(token) for token in prompt.ids] for prompt in prompts],
            max_batch_size=batch_size,
            max_length=settings.max_new_tokens,
            min_length=0 if settings.stops else settings.max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        tokens = [result.sequences_ids[0] for result in results]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, lambda tokens: tokens


def openvino(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """OpenVINO GenAI: continuous batching, paged attention and prefix caching.

    The first question on each context is asked before the others, or they would not find its keys and values: they are
    shared from one request to the next, not within one. int8 is that of the weights, multiplied in bfloat16, with
    activations quantized dynamically: the fastest of its settings.
    """
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    from qa_onnx.text.prompt import encode_prompts, load_tokenizer

    directory = Path(settings.directory)
    tokenizer = load_tokenizer(str(directory / "model" / "tokenizer.json"))
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.dynamic_split_fuse = 2048, 64, True
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = "f32" if precision == "fp32" else "bf16"
    options["KV_CACHE_PRECISION"] = {"fp32": "f32", "bf16": "bf16", "int8": "u8"}[precision]
    if precision == "int8":
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    converted = directory / f"openvino-{'int8' if precision == 'int8' else 'fp32'}"
    pipelines: list[Any] = []

    def prepare() -> None:  # it would find the contexts of the request before in its cache; qa_onnx's is off, too
        pipelines.clear()
        pipelines.append(genai.ContinuousBatchingPipeline(str(converted), scheduler, "CPU", options))

    prepare()
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = settings.max_new_tokens, False
    config.min_new_tokens = 0 if settings.stops else settings.max_new_tokens
    config.ignore_eos = not settings.stops
    config.eos_token_id = end = tokenizer.token_to_id("<|endoftext|>")

    def answer(questions: Sequence[str], contexts: Sequence[str], _: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        first = {tuple(prompt.prefix_ids): index for index, prompt in reversed(list(enumerate(prompts)))}
        leading = sorted(first.values())
        others = [index for index in range(len(prompts)) if index not in set(leading)]
        rows: dict[int, list[int]] = {}
        for indices in filter(None, (leading, others)):
            inputs = [ov.Tensor(np.array([prompts[index].ids], np.int64)) for index in indices]
            for index, result in zip(indices, pipelines[0].generate(inputs, [config] * len(inputs)), strict=True):
                row = list(result.m_generation_ids[0])
                rows[index] = row[: row.index(end)] if settings.stops and end in row else row
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    if not settings.prefix_cache:
        answer.prepare = prepare  # type: ignore[attr-defined]
    return answer, lambda tokens: tokens


RUNNERS: dict[str, tuple[Callable[[Settings, str], tuple[Answer, Callable[[Any], Tokens]]], str]] = {
    "qa_onnx fp32": (qa_onnx, "fp32"),
    "qa_onnx bf16": (qa_onnx, "bf16"),
    "qa_onnx int8": (qa_onnx, "int8"),
    "qa_onnx int8 extractive": (extractive, "int8"),
    "transformers fp32": (transformers, "fp32"),
    "transformers bf16": (transformers, "bf16"),
    "Optimum fp32": (optimum, "fp32"),
    "CTranslate2 fp32": (ctranslate2, "fp32"),
    "CTranslate2 int8": (ctranslate2, "int8"),
    "OpenVINO fp32": (openvino, "fp32"),
    "OpenVINO bf16": (openvino, "bf16"),
    "OpenVINO int8": (openvino, "int8"),
}
PLANS_ITS_BATCHES = ("qa_onnx", "OpenVINO")
"""What the names of runners begin with that take all questions at once."""


def serve(name: str, settings: Settings, requests: TextIO, replies: TextIO) -> None:
    """Loads a runner and answers requests until there are no more."""

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    make, precision = RUNNERS[name]
    started = time.perf_counter()
    try:
        answer, tokens_of = make(settings, precision)
    except (ImportError, ProviderError) as error:  # ours: bfloat16 on a processor without it
        reply(missing=str(error))
        return
    reply(load_seconds=time.perf_counter() - started)
    for line in requests:
        request = json.loads(line)
        chosen = slice(None) if "batch_size" in request else slice(request["question"], request["question"] + 1)
        questions, contexts = settings.questions[chosen], settings.contexts[chosen]
        getattr(answer, "prepare", lambda: None)()
        started = time.perf_counter()
        answers = answer(questions, contexts, request.get("batch_size", 1))
        seconds = time.perf_counter() - started
        tokens = tokens_of(answers) if request.get("tokens") else None
        reply(seconds=seconds, peak_rss_mib=peak_rss_mib(), tokens=tokens)


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    serve(sys.argv[1], Settings(**json.loads(Path(sys.argv[2]).read_text())), sys.stdin, protocol)
