"""What is measured, each in a process of its own: `python -m bench.peers NAME SETTINGS` serves requests on its stdin.

A request is a JSON line, `{"batch_size": 16}` for all questions or `{"question": 3}` for one alone; the reply is a JSON
line with the seconds and the new tokens. Every runner is given texts and has to tokenise and detokenise them itself.
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

Tokens = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a runner needs to know.

    Attributes:
        directory: Made by `bench.models.prepare`.
        questions, contexts: The texts, one context a question.
        max_new_tokens: The most tokens of an answer.
        stops: Whether end-of-text ends an answer; else every answer has `max_new_tokens`.
        threads: CPU threads.
        passage_cache: Whether qa_onnx may remember passages from one request to the next.
    """

    directory: str
    questions: list[str]
    contexts: list[str]
    max_new_tokens: int
    stops: bool
    threads: int
    passage_cache: bool = False

    def to_json(self) -> str:
        """For the command line of a runner."""
        return json.dumps(asdict(self))


Answer = Callable[[Sequence[str], Sequence[str], int], Any]
"""Answers questions with their contexts, at most so many in a batch; returns what `tokens_of` understands."""


def grounded(settings: Settings, precision: str) -> tuple[Answer, Callable[[Any], Tokens]]:
    """The runtime of this repository, where every answer stands in its passage."""
    return qa_onnx(settings, precision, is_grounded=True)


def qa_onnx(settings: Settings, precision: str, *, is_grounded: bool = False) -> tuple[Answer, Callable[[Any], Tokens]]:
    """The runtime of this repository."""
    from qa_onnx import Answerer, GenerationConfig
    from qa_onnx.answerer import DEFAULT_PASSAGE_CACHE_BYTES
    from qa_onnx.decoding import greedy_decode
    from qa_onnx.prompt import encode_answers, encode_prompts

    cache_bytes = DEFAULT_PASSAGE_CACHE_BYTES if settings.passage_cache else 0
    answerer = Answerer.from_pretrained(
        Path(settings.directory) / precision,
        provider="cpu",
        threads=settings.threads,
        passage_cache_bytes=cache_bytes,
    )
    engine, tokenizer = answerer._engine, answerer._tokenizer
    assert engine is not None
    if not settings.stops:
        engine.eos_token_id = -1
    config = GenerationConfig(max_new_tokens=settings.max_new_tokens, grounded=is_grounded)

    def answer(questions: Sequence[str], contexts: Sequence[str], batch_size: int) -> Any:
        answerer.answer_batch(questions, contexts, config=config, batch_size=batch_size)
        return questions, contexts

    def tokens_of(asked: Any) -> Tokens:
        """Asks again, outside of the time measured: an `Answer` has no token ids."""
        if is_grounded:
            answers = answerer.answer_batch(*asked, config=config)
            return encode_answers(tokenizer, [answer.text for answer in answers])
        prompts = encode_prompts(tokenizer, *asked)
        made = greedy_decode(engine, prompts, max_new_tokens=settings.max_new_tokens, batch_size=64)
        return [generation.token_ids for generation in made]

    return answer, tokens_of


def _generating(model: Any, settings: Settings) -> tuple[Answer, Callable[[Any], Tokens]]:
    """Answers by transformers' `generate`, in batches of like length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    from qa_onnx.prompt import encode_prompts, load_tokenizer
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
        Path(settings.directory) / "model", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
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

    from qa_onnx.prompt import encode_prompts, load_tokenizer

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


RUNNERS: dict[str, tuple[Callable[[Settings, str], tuple[Answer, Callable[[Any], Tokens]]], str]] = {
    "qa_onnx fp32": (qa_onnx, "fp32"),
    "qa_onnx int8": (qa_onnx, "int8"),
    "qa_onnx int8 grounded": (grounded, "int8"),
    "transformers fp32": (transformers, "fp32"),
    "transformers bf16": (transformers, "bf16"),
    "Optimum fp32": (optimum, "fp32"),
    "CTranslate2 fp32": (ctranslate2, "fp32"),
    "CTranslate2 int8": (ctranslate2, "int8"),
}


def peak_rss_mib() -> float:
    """The most memory this process has held. `getrusage` would tell its parent's where that held more."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # in kB


def serve(name: str, settings: Settings, requests: TextIO, replies: TextIO) -> None:
    """Loads a runner and answers requests until there are no more."""

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    make, precision = RUNNERS[name]
    started = time.perf_counter()
    try:
        answer, tokens_of = make(settings, precision)
    except ImportError as error:
        reply(missing=str(error))
        return
    reply(load_seconds=time.perf_counter() - started)
    for line in requests:
        request = json.loads(line)
        chosen = slice(None) if "batch_size" in request else slice(request["question"], request["question"] + 1)
        questions, contexts = settings.questions[chosen], settings.contexts[chosen]
        started = time.perf_counter()
        answers = answer(questions, contexts, request.get("batch_size", 1))
        seconds = time.perf_counter() - started
        tokens = tokens_of(answers) if request.get("tokens") else None
        reply(seconds=seconds, peak_rss_mib=peak_rss_mib(), tokens=tokens)


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    serve(sys.argv[1], Settings(**json.loads(Path(sys.argv[2]).read_text())), sys.stdin, protocol)
