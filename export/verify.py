"""The parity gate: an exported graph must compute what the PyTorch model computes, or the export fails.

PyTorch generates greedily from each prompt alone. The runtime's engine then has to give the same logits and the same
tokens in every way it can be run: with the cache and without, alone and in batches of mixed lengths, on passages that
it shares between questions or remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

from qa_onnx.decoding import greedy_decode
from qa_onnx.engine import DecodeState, Engine
from qa_onnx.errors import ParityError
from qa_onnx.planner import plan_groups
from qa_onnx.prompt import Prompt

LOGITS_TOLERANCE = 1e-3
NEW_TOKENS = 8
LAST_STEP = NEW_TOKENS - 1
BATCH_SIZE, BATCH_TOKENS = 8, 2048
"""The most rows of a batch and the most tokens, padding included: a batch bounds the gate's memory."""
RANDOM_LENGTHS = ((0, 1), (1, 1), (0, 3), (5, 2), (15, 17), (40, 24), (89, 32), (120, 8), (177, 23), (400, 1))
"""Tokens of the passages and questions of random prompts."""
SHARED_LENGTHS = (3, 16, 29)
"""Tokens of more questions on every second of those passages."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What PyTorch says: the greedy tokens after a prompt, and the logits (float32 [N, V]) each was chosen from."""

    prompt: Prompt
    tokens: list[int]
    logits: np.ndarray


def random_prompts(vocab_size: int, max_positions: int, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens in mixed order of length; some share a passage, one is as long as the model allows."""
    draw = np.random.default_rng(seed)
    longest = max_positions - NEW_TOKENS + 1
    prompts = []
    for index, (passage, question) in enumerate([*RANDOM_LENGTHS, (longest - 20, 20)]):
        questions = (question, *SHARED_LENGTHS) if index % 2 else (question,)
        passage_ids = draw.integers(0, vocab_size, min(passage, longest - max(questions))).tolist()
        prompts += [
            Prompt(passage_ids=passage_ids, question_ids=draw.integers(0, vocab_size, length).tolist())
            for length in questions
        ]
    return [prompts[index] for index in draw.permutation(len(prompts))]


@torch.inference_mode()
def torch_reference(model: GPT2LMHeadModel, prompt: Prompt) -> Reference:
    """Generates `NEW_TOKENS` tokens greedily, with neither a batch nor padding (end-of-text does not stop it)."""
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    output = model(torch.tensor([prompt.ids]), use_cache=True, logits_to_keep=1)
    while True:
        logits.append(output.logits[0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == NEW_TOKENS:
            return Reference(prompt=prompt, tokens=tokens, logits=np.stack(logits))
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def with_cache(engine: Engine, references: Sequence[Reference]) -> np.ndarray:
    """Reads the prompts together and feeds PyTorch's tokens one by one: logits, float32 [B, N, V]."""
    state = _prefill(engine, [reference.prompt for reference in references])
    logits = [state.logits]
    for step in range(NEW_TOKENS - 1):
        state = engine.decode_step(state, np.array([references[prompt].tokens[step] for prompt in state.prompts]))
        logits.append(state.logits)
    return np.stack(logits, axis=1)[np.argsort(state.prompts)]


def without_cache(engine: Engine, references: Sequence[Reference]) -> np.ndarray:
    """Reads each prompt with PyTorch's tokens behind it as one text: logits of the last step, float32 [B, 1, V]."""
    state = _prefill(
        engine,
        [
            Prompt(passage_ids=[], question_ids=reference.prompt.ids + reference.tokens[:LAST_STEP])
            for reference in references
        ],
    )
    return state.logits[np.argsort(state.prompts), None]


def _prefill(engine: Engine, prompts: Sequence[Prompt]) -> DecodeState:
    by_number = dict(enumerate(prompts))
    return engine.prefill(by_number, list(plan_groups(by_number, max_rows=len(prompts))))


def verify_parity(model: GPT2LMHeadModel, engine: Engine, prompts: Sequence[Prompt], *, source: str) -> dict[str, Any]:
    """Compares the engine with the PyTorch model on every prompt, in every way.

    Args:
        model: In evaluation mode, float32, on the CPU.
        engine: Of the exported graph, with room in its passage cache.
        prompts: Each of at most `max_positions - NEW_TOKENS + 1` tokens, in mixed order of length.
        source: Where the prompts are from, for the report.

    Returns:
        The report for the manifest.

    Raises:
        ParityError: Logits differ by more than `LOGITS_TOLERANCE`, or a greedy token differs.
    """
    references = [torch_reference(model, prompt) for prompt in prompts]
    all_steps = list(range(NEW_TOKENS))
    ways: tuple[tuple[str, Callable[[Engine, Sequence[Reference]], np.ndarray], list[int]], ...] = (
        ("with_cache", with_cache, all_steps),
        ("without_cache", without_cache, [LAST_STEP]),
    )
    differences = {}
    for way, compute, steps in ways:
        for suffix, batch_size in (("batched", BATCH_SIZE), ("alone", 1)):
            name = f"{way}_{suffix}"
            differences[name] = max(
                _compare(name, compute(engine, batch), batch, steps) for batch in _batches(references, batch_size)
            )
    for _ in range(2):  # the second time some passages are remembered
        _compare_decoding(engine, references)
    return {
        "source": source,
        "prompts": len(references),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "new_tokens_each": NEW_TOKENS,
        "tokens_differing": 0,
        "logits_tolerance": LOGITS_TOLERANCE,
        "max_logits_difference": differences,
    }


def _batches(references: Sequence[Reference], size: int) -> list[list[Reference]]:
    """Neighbours in the order given, so that lengths are mixed, in batches of at most `size` rows."""
    batches: list[list[Reference]] = [[]]
    for reference in references:
        width = max(len(row.prompt) for row in (*batches[-1], reference))
        if batches[-1] and (len(batches[-1]) == size or (len(batches[-1]) + 1) * width > BATCH_TOKENS):
            batches.append([])
        batches[-1].append(reference)
    return batches


def _compare(way: str, logits: np.ndarray, references: Sequence[Reference], steps: list[int]) -> float:
    """Returns the largest difference of logits [B, len(steps), V]; NaN counts as different."""
    worst = 0.0
    for got, reference in zip(logits, references, strict=True):
        difference = float(np.abs(got - reference.logits[steps]).max())
        where = f"{way}, prompt of {len(reference.prompt)} tokens"
        if not difference <= LOGITS_TOLERANCE:
            raise ParityError(
                f"{where}: logits differ from PyTorch's by {difference:.3g}; expected at most {LOGITS_TOLERANCE:g}. "
                "The bundle was not written"
            )
        tokens, expected = got.argmax(axis=-1).tolist(), [reference.tokens[step] for step in steps]
        if tokens != expected:
            raise ParityError(
                f"{where}: greedy tokens {tokens} differ from PyTorch's {expected}. The bundle was not written"
            )
        worst = max(worst, difference)
    return worst


def _compare_decoding(engine: Engine, references: Sequence[Reference]) -> None:
    """Runs the engine's own loop, rows leaving the batch and others joining, against PyTorch's tokens."""
    generations = greedy_decode(
        engine, [reference.prompt for reference in references], max_new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE
    )
    for generation, reference in zip(generations, references, strict=True):
        tokens = reference.tokens
        expected = tokens[: tokens.index(engine.eos_token_id)] if engine.eos_token_id in tokens else tokens
        if generation.token_ids != expected:
            raise ParityError(
                f"greedy_decode, prompt of {len(reference.prompt)} tokens: got {generation.token_ids}, PyTorch "
                f"{expected}. The bundle was not written"
            )
