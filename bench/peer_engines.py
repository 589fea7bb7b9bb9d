"""Peers that plan their batches themselves, each in an environment of its own (`make bench-peers`).

All of them get token ids, and a prompt's first part, the context, is computed once for all its questions as far as the
peer can share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.prompts import END_OF_TEXT, cut_at_end, group_by_prefix, load_model_tokenizer
from bench.settings import Answer, Loaded, Settings, Tokens
from qa_onnx.engine.sequence import Prompt

MAX_SEQUENCES = 64
LLAMA_CELLS, LLAMA_CONTEXTS = 8192, 4
"""Tokens in the caches of llama.cpp, and contexts in a batch."""


def _answering(settings: Settings, tokenizer: Tokenizer, generate: Callable[[list[list[int]]], Tokens]) -> Answer:
    """Answers by a function from prompts to new tokens, which shares prefixes from one call to the next only.

    The first question on each context is asked before the others, or they would not find its keys and values.
    """
    from qa_onnx.text.prompt import encode_prompts

    end = tokenizer.token_to_id(END_OF_TEXT)

    def answer(questions: Sequence[str], contexts: Sequence[str], _: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        groups = group_by_prefix(prompts)
        leading, others = [group[0] for group in groups], sorted(index for group in groups for index in group[1:])
        rows: dict[int, list[int]] = {}
        for indices in filter(None, (leading, others)):
            for index, row in zip(indices, generate([prompts[index].ids for index in indices]), strict=True):
                rows[index] = cut_at_end(row, end, settings)
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer


def openvino(settings: Settings, precision: str) -> Loaded:
    """OpenVINO GenAI: continuous batching, paged attention and prefix caching.

    int8 is that of the weights, multiplied in bfloat16, with activations quantized dynamically: the fastest of its
    settings.
    """
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    directory, tokenizer = Path(settings.directory), load_model_tokenizer(settings)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.dynamic_split_fuse = 2048, MAX_SEQUENCES, True
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
    config.ignore_eos = not settings.stops
    config.eos_token_id = tokenizer.token_to_id(END_OF_TEXT)

    def generate(prompts: list[list[int]]) -> Tokens:
        inputs = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
        results = pipelines[0].generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    answer = _answering(settings, tokenizer, generate)
    if not settings.prefix_cache:
        answer.prepare = prepare  # type: ignore[attr-defined]
    return answer, lambda tokens: tokens


def vllm(settings: Settings, precision: str) -> Loaded:
    """The build of vLLM for CPUs: continuous batching, paged attention and prefix caching.

    int8 is W8A8: weights by channel, activations by token, the rest in bfloat16.
    """
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{settings.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    directory, tokenizer = Path(settings.directory), load_model_tokenizer(settings)
    engine = LLM(
        model=str(directory / ("vllm-int8" if precision == "int8" else "model")),
        dtype="float32" if precision == "fp32" else "bfloat16",
        block_size=32,
        enable_prefix_caching=True,
        max_num_batched_tokens=2048,
        max_num_seqs=MAX_SEQUENCES,
        max_model_len=1024,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=settings.max_new_tokens,
        ignore_eos=not settings.stops,
        stop_token_ids=[tokenizer.token_to_id(END_OF_TEXT)] if settings.stops else None,
        detokenize=False,
    )

    def generate(prompts: list[list[int]]) -> Tokens:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(result.outputs[0].token_ids) for result in engine.generate(inputs, sampling, use_tqdm=False)]

    answer = _answering(settings, tokenizer, generate)
    if not settings.prefix_cache:
        answer.prepare = engine.reset_prefix_cache  # type: ignore[attr-defined]
    return answer, lambda tokens: tokens


class _LlamaContext:
    """A model of llama.cpp and its caches, by the C API: it can decode a token for several sequences at once."""

    def __init__(self, path: Path, threads: int, vocabulary: int) -> None:
        import llama_cpp as library

        self._library, self._vocabulary = library, vocabulary
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.use_extra_bufts = False  # its AMX kernels end in an illegal instruction with Q8_0 (0.3.36)
        model = library.llama_model_load_from_file(str(path).encode(), parameters)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = LLAMA_CELLS, LLAMA_CELLS, 512
        options.n_seq_max, options.kv_unified = MAX_SEQUENCES, True
        options.n_threads = options.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, options)
        self._batch = library.llama_batch_init(LLAMA_CELLS, 0, MAX_SEQUENCES)

    def clear(self) -> None:
        """Empties the caches."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def decode(self, rows: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        """Computes tokens: id, position, sequences, and whether its logits are wanted."""
        batch = self._batch
        for place, (token, position, sequences, wants_logits) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wants_logits
            batch.n_seq_id[place] = len(sequences)
            for index, sequence in enumerate(sequences):
                batch.seq_id[place][index] = sequence
        batch.n_tokens = len(rows)
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave {status}")

    def next_token(self, place: int) -> int:
        """The most probable token after one whose logits were wanted."""
        import numpy as np

        logits = self._library.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def llama_cpp(settings: Settings, precision: str) -> Loaded:
    """The C API of llama.cpp: a context is decoded once, into the caches of all sequences that ask about it.

    int8 is Q8_0. Attention reads the cells of all sequences of a batch, so a batch has few contexts.
    """
    from qa_onnx.text.prompt import encode_prompts

    tokenizer = load_model_tokenizer(settings)
    end, path = tokenizer.token_to_id(END_OF_TEXT), Path(settings.directory) / f"llama-cpp-{precision}.gguf"
    context = _LlamaContext(path, settings.threads, tokenizer.get_vocab_size())

    def generate(prompts: Sequence[Prompt], groups: Sequence[Sequence[int]]) -> dict[int, list[int]]:
        context.clear()
        sequences = {index: place for place, index in enumerate(index for group in groups for index in group)}
        rows: list[tuple[int, int, Sequence[int], bool]] = []
        for group in groups:
            shared = [sequences[index] for index in group]
            rows += [(token, place, shared, False) for place, token in enumerate(prompts[group[0]].prefix_ids)]
        starts: dict[int, int] = {}
        for index, sequence in sequences.items():
            ids, offset = prompts[index].suffix_ids, len(prompts[index].prefix_ids)
            rows += [(token, offset + place, [sequence], False) for place, token in enumerate(ids)]
            rows[-1] = (*rows[-1][:3], True)
            starts[index] = len(rows) - 1
        context.decode(rows)
        new = {index: [context.next_token(place)] for index, place in starts.items()}
        for step in range(1, settings.max_new_tokens):
            running = [index for index in new if not (settings.stops and new[index][-1] == end)]
            if not running:
                break
            step_rows = [
                (new[index][-1], len(prompts[index].ids) + step - 1, [sequences[index]], True) for index in running
            ]
            context.decode(step_rows)
            for place, index in enumerate(running):
                new[index].append(context.next_token(place))
        return new

    def answer(questions: Sequence[str], contexts: Sequence[str], _: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        rows: dict[int, list[int]] = {}
        for groups in _fit_groups(prompts, settings.max_new_tokens):
            rows |= generate(prompts, groups)
        tokens = [cut_at_end(rows[index], end, settings) for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, lambda tokens: tokens


def _fit_groups(prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[list[int]]]:
    """Indices of prompts by context, as many contexts at once as llama.cpp is given."""
    batch: list[list[int]] = []
    cells = 0
    for group in sorted(group_by_prefix(prompts), key=lambda group: len(prompts[group[0]].prefix_ids)):
        needed = len(prompts[group[0]].prefix_ids) + sum(
            len(prompts[index].suffix_ids) + max_new_tokens for index in group
        )
        sequences = sum(map(len, batch)) + len(group)
        if batch and (len(batch) == LLAMA_CONTEXTS or sequences > MAX_SEQUENCES or cells + needed > LLAMA_CELLS):
            yield batch
            batch, cells = [], 0
        batch.append(group)
        cells += needed
    yield batch
