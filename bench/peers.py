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
from pathlib import Path
from typing import Any, TextIO

from bench.machine import peak_rss_mib
from bench.peer_engines import llama_cpp, openvino, vllm
from bench.prompts import END_OF_TEXT, cut_at_end, group_by_prefix, load_model_tokenizer
from bench.settings import Loaded, Settings, Tokens
from qa_onnx.errors import ProviderError


def extractive(settings: Settings, precision: str) -> Loaded:
    """The runtime of this repository, where every answer is a span of its context."""
    return qa_onnx(settings, precision, is_extractive=True)


def qa_onnx(settings: Settings, precision: str, *, is_extractive: bool = False) -> Loaded:
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


def _generating(model: Any, settings: Settings) -> Loaded:
    """Answers by transformers' `generate`, in batches of like length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    from qa_onnx.text.prompt import encode_prompts
    from training.padding import pad_left, plan_batches

    torch.set_num_threads(settings.threads)
    tokenizer = load_model_tokenizer(settings)
    end = tokenizer.token_to_id(END_OF_TEXT)
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
                rows[index] = cut_at_end(row, end, settings)
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, lambda tokens: tokens


def _load_transformers(settings: Settings, precision: str) -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        Path(settings.directory) / "model",
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    return model.eval()


def transformers(settings: Settings, precision: str) -> Loaded:
    """Transformers' `generate` on PyTorch."""
    return _generating(_load_transformers(settings, precision), settings)


def transformers_prefix(settings: Settings, precision: str) -> Loaded:
    """Transformers' `generate`, which gets each context's keys and values, computed once for all its questions."""
    import torch
    from transformers import DynamicCache

    from qa_onnx.text.prompt import encode_prompts
    from training.padding import pad_left

    model = _load_transformers(settings, precision)
    plain, tokens_of = _generating(model, settings)
    tokenizer = load_model_tokenizer(settings)
    end = tokenizer.token_to_id(END_OF_TEXT)

    def answer_group(prefix: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Tokens:
        suffix_ids, suffix_mask = (torch.from_numpy(array) for array in pad_left(suffixes, end))
        prefix_ids = torch.tensor([prefix]).expand(len(suffixes), -1)
        with torch.inference_mode():
            cache = DynamicCache()
            model.transformer(prefix_ids[:1], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(suffixes))
            generated = model.generate(
                input_ids=torch.cat([prefix_ids, suffix_ids], 1),
                attention_mask=torch.cat([torch.ones_like(prefix_ids), suffix_mask], 1),
                past_key_values=cache,
                generation_config=model.generation_config,
            )
        new = generated[:, len(prefix) + suffix_ids.shape[1] :].tolist()
        return [cut_at_end(row, end, settings) for row in new]

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        groups = group_by_prefix(prompts)
        if len(groups) == len(prompts):
            return plain(questions, contexts, batch_size)
        rows: dict[int, list[int]] = {}
        for group in groups:
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                new = answer_group(prompts[batch[0]].prefix_ids, [prompts[index].suffix_ids for index in batch])
                rows |= zip(batch, new, strict=True)
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, tokens_of


def optimum(settings: Settings, precision: str) -> Loaded:
    """Optimum's `ORTModelForCausalLM` on its own export."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    directory = Path(settings.directory) / "fp32-optimum"
    return _generating(ORTModelForCausalLM.from_pretrained(directory, session_options=options), settings)


def ctranslate2(settings: Settings, precision: str) -> Loaded:
    """CTranslate2's generator, with its own batching by length."""
    return _ctranslate2(settings, precision, shares=False)


def ctranslate2_prefix(settings: Settings, precision: str) -> Loaded:
    """CTranslate2's generator, where a context with several questions is their static prompt, computed once."""
    return _ctranslate2(settings, precision, shares=True)


def _ctranslate2(settings: Settings, precision: str, *, shares: bool) -> Loaded:
    import ctranslate2 as library

    from qa_onnx.text.prompt import encode_prompts

    directory = Path(settings.directory)
    tokenizer = load_model_tokenizer(settings)
    generator = library.Generator(
        str(directory / f"ctranslate2-{precision}"), inter_threads=1, intra_threads=settings.threads
    )

    def names(ids: Sequence[int]) -> list[str]:
        return [tokenizer.id_to_token(token) for token in ids]

    def generate(prompts: Sequence[Sequence[int]], batch_size: int, prefix: Sequence[int] | None = None) -> Tokens:
        results = generator.generate_batch(
            [names(ids) for ids in prompts],
            static_prompt=None if prefix is None else names(prefix),
            cache_static_prompt=False,  # it would find it in the next request; qa_onnx's cache is off, too
            max_batch_size=batch_size,
            max_length=settings.max_new_tokens,
            min_length=0 if settings.stops else settings.max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Tokens:
        prompts = encode_prompts(tokenizer, questions, contexts)
        groups = group_by_prefix(prompts)
        rows: dict[int, list[int]] = {}
        if shares and len(groups) < len(prompts):
            for group in groups:
                suffixes = [prompts[index].suffix_ids for index in group]
                rows |= zip(group, generate(suffixes, batch_size, prompts[group[0]].prefix_ids), strict=True)
        else:
            rows |= enumerate(generate([prompt.ids for prompt in prompts], batch_size))
        tokens = [rows[index] for index in range(len(prompts))]
        tokenizer.decode_batch(tokens)
        return tokens

    return answer, lambda tokens: tokens


RUNNERS: dict[str, tuple[Callable[[Settings, str], Loaded], str]] = {
    "qa_onnx fp32": (qa_onnx, "fp32"),
    "qa_onnx bf16": (qa_onnx, "bf16"),
    "qa_onnx int8": (qa_onnx, "int8"),
    "qa_onnx int8 extractive": (extractive, "int8"),
    "transformers fp32": (transformers, "fp32"),
    "transformers bf16": (transformers, "bf16"),
    "transformers fp32, shared contexts": (transformers_prefix, "fp32"),
    "transformers bf16, shared contexts": (transformers_prefix, "bf16"),
    "Optimum fp32": (optimum, "fp32"),
    "CTranslate2 fp32": (ctranslate2, "fp32"),
    "CTranslate2 int8": (ctranslate2, "int8"),
    "CTranslate2 fp32, shared contexts": (ctranslate2_prefix, "fp32"),
    "CTranslate2 int8, shared contexts": (ctranslate2_prefix, "int8"),
    "OpenVINO fp32": (openvino, "fp32"),
    "OpenVINO bf16": (openvino, "bf16"),
    "OpenVINO int8": (openvino, "int8"),
    "vLLM fp32": (vllm, "fp32"),
    "vLLM bf16": (vllm, "bf16"),
    "vLLM int8": (vllm, "int8"),
    "llama.cpp bf16": (llama_cpp, "bf16"),
    "llama.cpp int8": (llama_cpp, "int8"),
}
PLANS_ITS_BATCHES = ("qa_onnx", "OpenVINO", "vLLM", "llama.cpp")
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
