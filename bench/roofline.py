"""How close prefill and decode come to the limits of the machine: `python -m bench.roofline --help`.

Two roofs are measured: the GEMM peak, which is the rate of matmuls of a layer's shapes alone in ONNX Runtime, in fp32
and int8; and the memory bandwidth. Below them are the engine's prefill and its decode steps, with the operations that
the answers need (matmuls with weights, and attention; without padding) and the minimum of bytes of weights, keys and
values that they read. (S. Williams, A. Waterman, D. Patterson, "Roofline", 2009.)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.harness import describe_run, median_seconds, publish
from bench.tables import render
from export.graph import CONTRIB, CONTRIB_OPSET, IR_VERSION, OPSET
from qa_onnx.bundle import Bundle
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.planner import Group, plan_groups
from qa_onnx.engine.provider import import_onnxruntime
from qa_onnx.engine.sequence import Prompt, make_sequence
from qa_onnx.engine.session import Session, load_copier
from qa_onnx.kernels import choose_kernels
from qa_onnx.manifest import MODEL_NAME, Manifest

PRECISIONS = ("fp32", "int8")
PREFIX_TOKENS, SUFFIX_TOKENS, ROWS = 160, 16, (1, 4, 16, 32)
DECODE_STEPS = 8
TOKENS = 512
"""Rows of the matmuls of the GEMM peak, as in a prefill on the CPU."""


def gemm_rate(precision: str, width: int, *, threads: int, repeats: int) -> float:
    """FLOP/s of a layer's four matmuls one after the other, `TOKENS` rows each."""
    random = np.random.default_rng(0)
    nodes, initializers, operations = [], [], 0
    inputs: dict[str, np.ndarray] = {}
    for name, rows, columns in (("qkv", 1, 3), ("out", 1, 1), ("up", 1, 4), ("down", 4, 1)):
        hidden = random.standard_normal((TOKENS, rows * width), np.float32)
        weight = random.standard_normal((rows * width, columns * width), np.float32)
        operations += 2 * hidden.size * columns * width
        if precision == "fp32":
            nodes.append(helper.make_node("MatMul", [f"{name}_in", f"{name}_weight"], [f"{name}_sum"]))
        else:
            hidden, weight = (hidden * 30 + 128).clip(0, 255).astype(np.uint8), (weight * 30).clip(-127, 127)
            weight = weight.astype(np.int8)
            names = [f"{name}_in", f"{name}_weight", "unit", "unit", "zero"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", names, [f"{name}_sum"], domain=CONTRIB))
        inputs[f"{name}_in"] = hidden
        initializers.append(numpy_helper.from_array(weight, f"{name}_weight"))
        nodes.append(helper.make_node("ReduceMax", [f"{name}_sum"], [f"{name}_out"], keepdims=0))
    if precision == "int8":
        initializers.append(numpy_helper.from_array(np.float32(1), "unit"))
        initializers.append(numpy_helper.from_array(np.uint8(128), "zero"))
    graph = helper.make_graph(
        nodes,
        "gemm",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [
            helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [])
            for node in nodes
            if node.op_type == "ReduceMax"
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return operations / median_seconds(lambda: session.run(None, inputs), repeats=repeats)


def memory_rate(*, threads: int, repeats: int) -> float:
    """Bytes per second that all threads together read from memory, far more of it than caches hold."""
    parts = np.array_split(np.ones(1 << 26, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / median_seconds(
            lambda: list(pool.map(np.bitwise_or.reduce, parts)), repeats=repeats
        )


def count_operations(manifest: Manifest, tokens: int, outputs: int, keys: int) -> int:
    """Operations of some tokens that attend to `keys` keys in all, `outputs` of them with an output layer."""
    width = manifest.heads * manifest.head_size
    layer = 2 * 12 * width * width
    only_keys = 2 * 3 * width * width  # the last layer, for tokens without an output
    return (
        tokens * layer * (manifest.layers - 1)
        + outputs * layer
        + (tokens - outputs) * only_keys
        + 4 * width * keys * manifest.layers
        + outputs * 2 * width * manifest.vocab_size
    )


def load_engine(bundle: Bundle, *, threads: int) -> Engine:
    """The engine of a bundle on the CPU, without a prefix cache."""
    manifest, config = bundle.manifest, EngineConfig(threads=threads)
    kernels = choose_kernels(config.kernels, provider="cpu", precision=manifest.precision).library
    return Engine(
        Session(bundle.graph_path(has_kernels=kernels is not None), provider="cpu", config=config, kernels=kernels),
        load_copier(bundle.cache_copy_path, provider="cpu", config=config),
        layout=manifest.cache_layout,
        eos_token_id=manifest.eos_token_id,
        max_positions=manifest.max_positions,
    )


def make_groups(engine: Engine, vocab_size: int, rows: int, random: np.random.Generator) -> list[Group]:
    """Rows of random tokens, each on a prefix of its own."""
    sequences = [
        make_sequence(
            Prompt(
                prefix_ids=random.integers(vocab_size, size=PREFIX_TOKENS).tolist(),
                suffix_ids=random.integers(vocab_size, size=SUFFIX_TOKENS).tolist(),
            ),
            GenerationConfig(),
            eos_token_id=engine.eos_token_id,
            max_positions=engine.max_positions,
        )
        for _ in range(rows)
    ]
    return list(plan_groups(sequences, max_rows=rows))


def engine_points(bundle: Bundle, *, threads: int, repeats: int) -> list[dict[str, Any]]:
    """The engine's prefill, and its decode step at several numbers of rows: operations, bytes, seconds."""
    engine, manifest, random = load_engine(bundle, threads=threads), bundle.manifest, np.random.default_rng(0)
    token_bytes = manifest.cache_layout.bytes_per_token
    weight_bytes = sum(manifest.files[name]["bytes"] for name in manifest.files if name.startswith(MODEL_NAME))
    length = PREFIX_TOKENS + SUFFIX_TOKENS
    points = []
    for rows in ROWS:
        groups = make_groups(engine, manifest.vocab_size, rows, random)
        shared = {"rows": rows, "precision": manifest.precision}
        if rows == ROWS[-1]:
            runs = -(-rows * length // engine.limits.max_prefill_tokens)
            points.append(
                {
                    "phase": "prefill",
                    **shared,
                    "operations": count_operations(manifest, rows * length, rows, rows * length * (length + 1) // 2),
                    "bytes": runs * weight_bytes + rows * length * token_bytes,
                    "seconds": median_seconds(partial(_prefill, engine, groups), repeats=max(repeats // 5, 3)),
                }
            )
        keys = rows * (length + DECODE_STEPS // 2)
        points.append(
            {
                "phase": "decode",
                **shared,
                "operations": count_operations(manifest, rows, rows, keys),
                "bytes": weight_bytes + keys * token_bytes,
                "seconds": _decode_seconds(engine, groups, rows),
            }
        )
    return points


def _prefill(engine: Engine, groups: Sequence[Group]) -> None:
    engine.release(engine.prefill(groups)[0])


def _decode_seconds(engine: Engine, groups: Sequence[Group], rows: int) -> float:
    """The median duration of a decode step."""
    batch, _ = engine.prefill(groups)
    token_ids = np.zeros(rows, np.int64)
    steps = []
    for _ in range(DECODE_STEPS):
        started = time.perf_counter()
        engine.decode_step(batch, token_ids)
        steps.append(time.perf_counter() - started)
    engine.release(batch)
    return statistics.median(steps)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description="Rates compared with the machine's own."
    )
    parser.add_argument("--bundles", nargs="+", type=Path, required=True, metavar="DIR", help="in fp32 and int8")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    bundles = [Bundle.open(path) for path in arguments.bundles]
    width = bundles[0].manifest.heads * bundles[0].manifest.head_size
    measured = {"threads": arguments.threads, "repeats": arguments.repeats}
    result = describe_run("roofline", threads=arguments.threads) | {
        "gemm_rates": {precision: gemm_rate(precision, width, **measured) for precision in PRECISIONS},
        "memory_rate": memory_rate(**measured),
        "points": [point for bundle in bundles for point in engine_points(bundle, **measured)],
    }
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
