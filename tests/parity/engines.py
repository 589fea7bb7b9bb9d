"""What the parity tests share: engines of graphs that were just built, prompts, and what a scheduler makes of them."""

from __future__ import annotations

import numpy as np
import onnx

from export.decoder import build_decoder
from export.graph import build_cache_copy
from export.kernel_decoder import build_kernel_decoder
from export.weights import QuantizedWeight
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.engine.planner import plan_groups
from qa_onnx.engine.scheduler import Scheduler
from qa_onnx.engine.sequence import Prompt, make_sequence
from qa_onnx.engine.session import Session
from qa_onnx.kernels import load_kernels

EOS = 0


def torch_weights(model):
    state = model.state_dict().items()
    return {name.removeprefix("transformer."): tensor.numpy() for name, tensor in state if name != "lm_head.weight"}


def layout_of(config, dtype="float32"):
    return CacheLayout(
        layers=config.n_layer, heads=config.n_head, head_size=config.n_embd // config.n_head, dtype=dtype
    )


def quantized_weights(weights):
    """Every matrix in int8, rounded without calibration."""
    quantized = {}
    for name, array in weights.items():
        if array.ndim == 2 and name != "wpe.weight":
            matrix = array.T if name == "wte.weight" else array
            scales = (np.abs(matrix).max(axis=0) / 127).astype(np.float32)
            quantized[name] = QuantizedWeight(values=np.round(matrix / scales).astype(np.int8), scales=scales)
    return quantized


def save_graphs(model, directory, *, precision="fp32", has_kernels=False):
    """Writes `model.onnx` and `cache_copy.onnx` of a PyTorch model."""
    weights, float16 = torch_weights(model), precision == "fp16"
    quantized = quantized_weights(weights) if precision == "int8" else {}
    if has_kernels:
        graph = build_kernel_decoder(weights, model.config, quantized, eos_token_id=EOS, bfloat16=precision == "bf16")
    else:
        graph = build_decoder(weights, model.config, quantized, eos_token_id=EOS, float16=float16)
    onnx.save(graph, directory / "model.onnx")
    layout = layout_of(model.config, "float16" if float16 else "float32")
    onnx.save(build_cache_copy(layout), directory / "cache_copy.onnx")
    return layout


def load_engine(
    directory, layout, *, max_positions=256, cache_bytes=0, session_class=Session, has_kernels=False, **options
):
    config = EngineConfig(**options)
    kernels = {"kernels": load_kernels()} if has_kernels else {}
    return Engine(
        session_class(directory / "model.onnx", provider="cpu", config=config, **kernels),
        session_class(directory / "cache_copy.onnx", provider="cpu", config=config),
        layout=layout,
        eos_token_id=EOS,
        max_positions=max_positions,
        prefix_cache_bytes=cache_bytes,
    )


def mixed_prompts(seed=1, prefixes=7, count=24):
    """Suffixes of 1 to 40 tokens, on prefixes of none to 120; some prefixes have many suffixes."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(1, 600, draw.integers(1, 120)).tolist() for _ in range(prefixes)] + [[]]
    return [
        Prompt(
            prefix_ids=texts[min(draw.integers(0, prefixes + 1), draw.integers(0, prefixes + 1))],
            suffix_ids=draw.integers(1, 600, draw.integers(1, 40)).tolist(),
        )
        for _ in range(count)
    ]


def sequences_of(prompts, config=None, *, max_positions=256):
    config = config or GenerationConfig(max_new_tokens=20)
    return [make_sequence(prompt, config, eos_token_id=EOS, max_positions=max_positions) for prompt in prompts]


def prefill(engine, prompts, *, max_rows=64):
    """Prefills prompts as one batch; returns it, the number of the prompt of each of its sequences, and predictions."""
    sequences = sequences_of(prompts, max_positions=engine.max_positions)
    number_of = {sequence: number for number, sequence in enumerate(sequences)}
    batch, predictions = engine.prefill(list(plan_groups(sequences, max_rows=max_rows)))
    return batch, [number_of[sequence] for sequence in batch.sequences], predictions


def run(engine, prompts, config, *, batch_size, aborted=(), abort_after=0):
    """Generates; returns of each prompt its tokens and what the model said of them, to the last bit.

    The prompts of the numbers `aborted` are aborted after some steps; theirs are whatever they had by then.
    """
    sequences = sequences_of(prompts, config, max_positions=engine.max_positions)
    scheduler = Scheduler(engine, batch_size=batch_size)
    scheduler.add(sequences, is_bulk=True)
    steps = 0
    while not scheduler.is_idle:
        if steps == abort_after:
            for number in aborted:
                scheduler.abort(sequences[number])
        for sequence in scheduler.step():
            assert sequence.error is None
        steps += 1
    return [(one.token_ids, one.logprobs, one.no_answer_probability, one.finish_reason) for one in sequences]
