"""The parity gate: an exported graph computes what the PyTorch model computes, or the export fails.

PyTorch generates greedily from each prompt alone. The runtime's engine must then give the same log-probabilities and
the same tokens in each way of running it: with the KV cache and without, alone and in batches of mixed lengths, with
prefixes that prompts share or that are in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from qa_onnx.config import GenerationConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.planner import plan_groups
from qa_onnx.engine.scheduler import generate
from qa_onnx.engine.sequence import Prompt, make_sequence
from qa_onnx.errors import ParityError

LOGPROBS_TOLERANCE = 1e-3
NEW_TOKENS = 8
LAST_STEP = NEW_TOKENS - 1
BATCH_SIZE, BATCH_TOKENS = 8, 2048
"""Maximum number of rows of a batch, and of its tokens, padding included: a batch bounds the gate's memory."""
RANDOM_LENGTHS = ((0, 1), (1, 1), (0, 3), (5, 2), (15, 17), (40, 24), (89, 32), (120, 8), (177, 23), (400, 1))
"""Tokens of the prefixes and suffixes of random prompts."""
SHARED_LENGTHS = (3, 16, 29)
"""Tokens of more suffixes on every second of those prefixes."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """PyTorch's greedy tokens after a prompt, and the log-probabilities (float32 [N, V]) each was chosen from."""

    prompt: Prompt
    tokens: list[int]
    logprobs: np.ndarray


def random_prompts(vocab_size: int, max_positions: int, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens in mixed order of length; some share a prefix, one is as long as the model allows."""
    draw = np.random.default_rng(seed)
    longest = max_positions - NEW_TOKENS + 1
    prompts = []
    for index, (prefix, suffix) in enumerate([*RANDOM_LENGTHS, (max(longest - 20, 0), 20)]):
        suffixes = [min(length, longest) for length in ((suffix, *SHARED_LENGTHS) if index % 2 else (suffix,))]
        prefix_ids = draw.integers(0, vocab_size, min(prefix, longest - max(suffixes))).tolist()
        prompts += [
            Prompt(prefix_ids=prefix_ids, suffix_ids=draw.integers(0, vocab_size, length).tolist())
            for length in suffixes
        ]
    return [prompts[index] for index in draw.permutation(len(prompts))]


def torch_reference(model: GPT2LMHeadModel, prompt: Prompt) -> Reference:
    """Generates `NEW_TOKENS` tokens greedily, with neither a batch nor padding (end-of-text does not stop it)."""
    tokens: list[int] = []
    logprobs: list[np.ndarray] = []
    new, cache = prompt.ids, None
    with torch.inference_mode():
        while len(tokens) < NEW_TOKENS:
            output = model(torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            logprobs.append(output.logits[0, -1].float().log_softmax(dim=-1).numpy())
            tokens.append(int(logprobs[-1].argmax()))
            new, cache = tokens[-1:], output.past_key_values
    return Reference(prompt=prompt, tokens=tokens, logprobs=np.stack(logprobs))


def with_cache(engine: Engine, references: Sequence[Reference]) -> np.ndarray:
    """Reads the prompts together and feeds PyTorch's tokens one by one: log-probabilities, float32 [B, N, V]."""
    return follow(engine, [reference.prompt for reference in references], [r.tokens[:LAST_STEP] for r in references])


def without_cache(engine: Engine, references: Sequence[Reference]) -> np.ndarray:
    """Reads each prompt and PyTorch's tokens as one suffix: log-probabilities of the last step, float32 [B, 1, V]."""
    prompts = [
        Prompt(prefix_ids=[], suffix_ids=reference.prompt.ids + reference.tokens[:LAST_STEP])
        for reference in references
    ]
    return follow(engine, prompts, [[]] * len(prompts))


def follow(engine: Engine, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Prefills prompts as one batch and feeds each the tokens given for it, of each prompt equally many, N.

    Returns:
        The log-probabilities after the prompt and each of these tokens, float32 [B, N + 1, V].
    """
    config = GenerationConfig()
    sequences = [make_sequence(prompt, config, eos_token_id=-1, max_positions=1 << 30) for prompt in prompts]
    batch, predictions = engine.prefill(list(plan_groups(sequences, max_rows=len(sequences))))
    place_of = {sequence: place for place, sequence in enumerate(batch.sequences)}
    order = [place_of[sequence] for sequence in sequences]
    steps = [_logprobs(predictions.logprobs)[order]]
    for step in range(len(tokens[0])):
        fed = np.zeros(len(sequences), np.int64)
        fed[order] = [row[step] for row in tokens]
        steps.append(_logprobs(engine.decode_step(batch, fed).logprobs)[order])
    engine.release(batch)
    return np.stack(steps, axis=1)


def _logprobs(logprobs: np.ndarray | None) -> np.ndarray:
    assert logprobs is not None  # on the CPU the engine always returns them
    return logprobs


def verify_parity(
    model: GPT2LMHeadModel, engines: Mapping[str, Engine], prompts: Sequence[Prompt], *, source: str
) -> dict[str, Any]:
    """Compares engines with the PyTorch model on every prompt, in each mode.

    Args:
        model: In evaluation mode, float32, on the CPU.
        engines: Of the exported graphs on the CPU, with prefix caches, by a prefix for their names in the report.
        prompts: Each of at most `max_positions - NEW_TOKENS + 1` tokens, in mixed order of length.
        source: Where the prompts come from, for the report.

    Returns:
        The report for the manifest.

    Raises:
        ParityError: Log-probabilities differ by more than `LOGPROBS_TOLERANCE`, or a greedy token differs.
    """
    references = [torch_reference(model, prompt) for prompt in prompts]
    all_steps = list(range(NEW_TOKENS))
    modes: tuple[tuple[str, Callable[[Engine, Sequence[Reference]], np.ndarray], list[int]], ...] = (
        ("with_cache", with_cache, all_steps),
        ("without_cache", without_cache, [LAST_STEP]),
    )
    differences = {}
    for prefix, engine in engines.items():
        for mode, compute, steps in modes:
            for suffix, batch_size in (("batched", BATCH_SIZE), ("alone", 1)):
                name = f"{prefix}{mode}_{suffix}"
                differences[name] = max(
                    _compare(name, compute(engine, batch), batch, steps) for batch in _batches(references, batch_size)
                )
        for _ in range(2):  # the second time some prefixes are in the prefix cache
            _compare_generation(engine, references)
    return {
        "source": source,
        "prompts": len(references),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "new_tokens_each": NEW_TOKENS,
        "tokens_differing": 0,
        "logprobs_tolerance": LOGPROBS_TOLERANCE,
        "max_logprob_difference": differences,
    }


def _batches(references: Sequence[Reference], size: int) -> list[list[Reference]]:
    """Batches of at most `size` rows in the order given, so that lengths are mixed."""
    batches: list[list[Reference]] = [[]]
    for reference in references:
        width = max(len(row.prompt) for row in (*batches[-1], reference))
        if batches[-1] and (len(batches[-1]) == size or (len(batches[-1]) + 1) * width > BATCH_TOKENS):
            batches.append([])
        batches[-1].append(reference)
    return batches


def _compare(mode: str, logprobs: np.ndarray, references: Sequence[Reference], steps: list[int]) -> float:
    """Returns the largest difference of log-probabilities [B, len(steps), V]; NaN counts as different."""
    worst = 0.0
    for got, reference in zip(logprobs, references, strict=True):
        difference = float(np.abs(got - reference.logprobs[steps]).max())
        where = f"{mode}, prompt of {len(reference.prompt)} tokens"
        if not difference <= LOGPROBS_TOLERANCE:
            raise ParityError(
                f"{where}: log-probabilities differ from PyTorch's by {difference:.3g}; expected at most "
                f"{LOGPROBS_TOLERANCE:g}. The bundle was not written"
            )
        tokens, expected = got.argmax(axis=-1).tolist(), [reference.tokens[step] for step in steps]
        if tokens != expected:
            raise ParityError(
                f"{where}: greedy tokens {tokens} differ from PyTorch's {expected}. The bundle was not written"
            )
        worst = max(worst, difference)
    return worst


def _compare_generation(engine: Engine, references: Sequence[Reference]) -> None:
    """Compares the scheduler's tokens with PyTorch's, while sequences leave the batch and others join it."""
    prompts = [reference.prompt for reference in references]
    config = GenerationConfig(max_new_tokens=NEW_TOKENS)
    generations = generate(engine, prompts, config, batch_size=BATCH_SIZE)
    for generation, reference in zip(generations, references, strict=True):
        tokens = reference.tokens
        expected = tokens[: tokens.index(engine.eos_token_id)] if engine.eos_token_id in tokens else tokens
        if generation.token_ids != expected:
            raise ParityError(
                f"generation, prompt of {len(reference.prompt)} tokens: got {generation.token_ids}, PyTorch "
                f"{expected}. The bundle was not written"
            )
