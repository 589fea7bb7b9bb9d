"""An engine on the fake runtime, its prompts, and the answers that it has to give."""

from __future__ import annotations

from fake_onnxruntime import END, LAYOUT, mix, mix_key_value, token_of

from qa_onnx import GenerationConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.planner import plan_groups
from qa_onnx.engine.scheduler import generate
from qa_onnx.engine.sequence import Prompt, make_sequence

MODES = ("cpu", "device", "device with CUDA graphs")


PREFIXES = ([], [3], list(range(1, 20)), [7] * 16, list(range(40, 5, -1)))


MAX_POSITIONS = 80


def engine_of(sessions, *, max_positions=MAX_POSITIONS, prefix_cache_bytes=0, can_capture_rows=True):
    engine = Engine(
        *sessions,
        layout=LAYOUT,
        eos_token_id=END,
        max_positions=max_positions,
        prefix_cache_bytes=prefix_cache_bytes,
    )
    engine._can_capture_rows = can_capture_rows  # as in float16, which has no room for the fake's hidden values
    return engine


def expected(prompt, max_new_tokens, *, max_positions=MAX_POSITIONS, threshold=None):
    """The answer and why it ended, of one prompt alone, token by token."""
    tokens = list(prompt.ids)
    sums = [[0] * LAYOUT.heads for _ in range(LAYOUT.layers)]

    def read(position):
        hidden = tokens[position]
        for layer in sums:
            gathered = 0
            for head in range(LAYOUT.heads):
                layer[head] += mix_key_value(hidden + head, position, hidden + 2 * head + 1, position)
                gathered += (head + 1) * (layer[head] + 31 * hidden)
            hidden = mix(7 * hidden + gathered)
        return token_of(hidden)

    for position in range(len(tokens)):
        token = read(position)
    for _ in range(min(max_new_tokens, max_positions - len(prompt) + 1)):
        if token == END and threshold is not None and len(tokens) == len(prompt):
            token = 1  # all others are as probable as each other
        if token == END:
            return tokens[len(prompt) :], "stop" if len(tokens) > len(prompt) else "no_answer"
        tokens.append(token)
        token = read(len(tokens) - 1)
    return tokens[len(prompt) :], "length"


def generate_all(engine, prompts, *, max_new_tokens, batch_size, threshold=None, ignore_eos=False):
    config = GenerationConfig(max_new_tokens=max_new_tokens, no_answer_threshold=threshold, ignore_eos=ignore_eos)
    generations = generate(engine, prompts, config, batch_size=batch_size)
    return [(generation.token_ids, generation.finish_reason) for generation in generations]


def prompt_of(*suffix_ids, prefix=()):
    return Prompt(prefix_ids=list(prefix), suffix_ids=list(suffix_ids))


def prompts_alone(count):
    return [prompt_of(token) for token in range(1, count + 1)]


def sequence_of(prompt, **options):
    return make_sequence(prompt, GenerationConfig(**options), eos_token_id=END, max_positions=MAX_POSITIONS)


def prefill(engine, prompts, *, carried=None, **options):
    sequences = [sequence_of(prompt, **options) for prompt in prompts]
    return engine.prefill(list(plan_groups(sequences, max_rows=16)), carried=carried)
