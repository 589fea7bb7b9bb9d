"""What the engine asks of a CUDA device, counted without a GPU: `python -m bench.cuda_counts --help`.

The real onnxruntime-gpu runs with stand-ins for NVIDIA's libraries: memory, copies and streams are real, kernels are
counted and compute nothing. So counts of launches, copies, bytes and synchronizations are exact, while times and
answers mean nothing. The counters are those that the stand-in for libcudart exports: `standin_reset()`,
`standin_report()` (JSON) and `standin_bad()` (JSON, what a GPU would refuse). Put the stand-ins' folder first into
LD_LIBRARY_PATH. NVIDIA's own libraries do not count; on a GPU use Nsight Systems.

Needs onnxruntime-gpu, onnx and what qa_onnx itself needs; no PyTorch, no bundle's manifest: a graph with its
`cache_copy.onnx` in the same directory is enough.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.engine.batch import Batch
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.kv_cache import PREFIX_NAME, CacheLayout
from qa_onnx.engine.planner import Group, plan_groups
from qa_onnx.engine.provider import import_onnxruntime
from qa_onnx.engine.sequence import Prompt, make_sequence
from qa_onnx.engine.session import Session, load_copier
from qa_onnx.manifest import CACHE_COPY_NAME, MODEL_NAME

LIBRARY = "libcudart.so.13"
COPIES = ("h2d", "d2h", "d2d")
CALLS = ("sync", "capture", "graph_launch")
EXIT_ABOVE_TARGET = 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """Limits of a phase of 64 sequences, each with a prefix of its own: bytes of copies, calls of everything else."""

    h2d: float = float("inf")
    d2h: float = float("inf")
    sync: float = float("inf")
    launches: float = float("inf")
    graph_launch: float = 0


TARGETS = {
    "prefill": Target(h2d=2e6, d2h=2e3),
    "prefill, prefixes in the cache": Target(h2d=2e6, d2h=2e3),
    "first decode step of a batch": Target(h2d=64e3, d2h=2e3, sync=16),  # puts all its inputs on the device
    "decode step": Target(h2d=64e3, d2h=2e3, sync=6),
    "refill": Target(h2d=2e6, d2h=2e6),
    "decode step in which caches grow": Target(h2d=64e3, d2h=2e3, sync=16),
    "decode step, replayed": Target(h2d=64e3, d2h=2e3, sync=6, launches=0, graph_launch=1),
}


class Counters:
    """The stand-in's counters: what this process asked of the device since `reset`."""

    def __init__(self) -> None:
        """Finds them.

        Raises:
            SystemExit: The library is not there, or does not count.
        """
        advice = (
            "Counting needs stand-ins for NVIDIA's libraries, which this repository does not hold: libraries of their "
            "names of which libcudart exports standin_reset, standin_report and standin_bad. Put their folder first "
            "into LD_LIBRARY_PATH"
        )
        try:
            self._library = ctypes.CDLL(LIBRARY, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise SystemExit(f"error: no counters: {error}. {advice}") from None
        if not hasattr(self._library, "standin_report"):
            raise SystemExit(f"error: no counters: {LIBRARY} is NVIDIA's own, which does not count. {advice}")
        self._library.standin_report.restype = self._library.standin_bad.restype = ctypes.c_char_p

    def reset(self) -> None:
        """Sets all of them to zero, but for what a GPU would refuse."""
        self._library.standin_reset()

    def read(self) -> dict[str, Any]:
        """`launches` (`gemm` of them matmuls), and `[calls, bytes]` of each kind of copy and call."""
        report: dict[str, Any] = json.loads(self._library.standin_report())
        return report

    def refused(self) -> dict[str, int]:
        """What a GPU would refuse, and how often: sizes of launches and matmuls, copies while capturing."""
        found: dict[str, int] = json.loads(self._library.standin_bad())
        return found


@dataclass(kw_only=True)
class Partition:
    """Where ONNX Runtime runs the nodes of a graph.

    Attributes:
        cuda: Nodes on CUDA.
        cpu: Nodes on the CPU, by operator.
        not_shapes: Those of them that compute something else than shapes, by operator.
        copies: The Memcpy nodes, by the value that they copy.
    """

    cuda: int = 0
    cpu: Counter[str] = field(default_factory=Counter)
    not_shapes: Counter[str] = field(default_factory=Counter)
    copies: list[str] = field(default_factory=list)


def partition(path: Path) -> Partition:
    """Loads a graph on CUDA and reads from ONNX Runtime's log where each node runs."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # as `Session`
    options.log_severity_level = 0
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)  # the log is written by native code
        try:
            session = ort.InferenceSession(str(path), options, providers=["CUDAExecutionProvider"])
        finally:
            os.dup2(stderr, 2)
            file.seek(0)
            log = file.read().decode(errors="replace")
    if "CUDAExecutionProvider" not in session.get_providers():
        raise SystemExit(f"error: the CUDA provider did not load; the last lines of the log:\n{log[-2000:]}")
    shapes = _shape_nodes(onnx.load(path, load_external_data=False).graph)
    found, provider = Partition(), ""
    for line in log.splitlines():
        text = line.partition("VerifyEachNodeIsAssignedToAnEp]")[2].replace("\x1b[m", "")
        if placed := re.search(r"placed on \[(\w+)\]\. Number of nodes: (\d+)", text):
            provider = placed[1]
            if provider == "CUDAExecutionProvider":
                found.cuda = int(placed[2])
        elif provider == "CPUExecutionProvider" and (node := re.match(r"\s+(\S+) \((.*)\)$", text)):
            found.cpu[node[1]] += 1
            found.not_shapes[node[1]] += node[2] not in shapes
        elif copy := re.search(r"AddCopyNode\] Add \w+ ((?:after|before) \S+)", line):
            found.copies.append(copy[1])
    found.not_shapes = +found.not_shapes
    return found


def _shape_nodes(graph: onnx.GraphProto) -> set[str]:
    """The names of the nodes that compute shapes: of nothing but `Shape` and constants."""
    known = {tensor.name for tensor in graph.initializer}
    names = set()
    for node in graph.node:
        if node.op_type == "Shape" or all(name in known for name in node.input if name):
            names.add(node.name)
            known |= set(node.output)
    return names


def read_model(path: Path) -> tuple[CacheLayout, int, int]:
    """The cache layout, the vocabulary and the positions of a graph; its weights are not loaded."""
    graph = onnx.load(path, load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    keys = inputs[f"{PREFIX_NAME}0.key"]
    _, heads, _, _, head_size = (dimension.dim_value for dimension in keys.shape.dim)
    layout = CacheLayout(
        layers=sum(name.startswith(PREFIX_NAME) and name.endswith(".key") for name in inputs),
        heads=heads,
        head_size=head_size,
        dtype=np.dtype(helper.tensor_dtype_to_np_dtype(keys.elem_type)).name,
    )
    logprobs = next(value for value in graph.output if value.name == "logprobs")
    (positions,) = (tensor.dims[0] for tensor in graph.initializer if tensor.name == "wpe.weight")
    return layout, logprobs.type.tensor_type.shape.dim[-1].dim_value, positions


class Tool:
    """One engine, and the phases that were counted."""

    def __init__(
        self, counters: Counters, arguments: argparse.Namespace, *, cuda_graphs: bool = False, cache_bytes: int = 0
    ) -> None:
        """Loads the graphs, which is the first phase."""
        self._counters, self._arguments = counters, arguments
        self._draw = np.random.default_rng(0)
        self.phases: list[dict[str, Any]] = []
        path = graph_path(arguments.model)
        layout, self._vocabulary, positions = read_model(path)
        config = EngineConfig(cuda_graphs=cuda_graphs)

        def load() -> Engine:
            return Engine(
                Session(path, provider="cuda", config=config),
                load_copier(path.with_name(CACHE_COPY_NAME), provider="cuda", config=config),
                layout=layout,
                eos_token_id=self._vocabulary - 1,
                max_positions=positions,
                prefix_cache_bytes=cache_bytes,
            )

        self.engine = self._count("loading", load)

    def run(self) -> None:
        """Prefills two batches, decodes, refills the second one, and decodes until its caches grow."""
        rows = self._arguments.rows
        for name in ("first prefill", "prefill"):  # the second finds the memory that the first has allocated
            batch = self._count(name, lambda: self.engine.prefill(self._groups(rows))[0])
            self._decode(batch)
            if name == "first prefill":
                self.engine.release(batch)
        half = rows // 2
        batch.keep(range(half))
        carried = batch
        batch = self._count("refill", lambda: self.engine.prefill(self._groups(rows - half), carried=carried)[0])
        self._decode(batch)
        columns = batch.suffix.columns
        while batch.suffix.columns == columns:
            before = len(self.phases)
            self._decode(batch, steps=1, is_first=False)
            last = self.phases.pop() if len(self.phases) > before else self.phases[-1]
        self._add({**last, "phase": "decode step in which caches grow"})
        self.engine.release(batch)

    def run_cached(self) -> None:
        """Prefills twice with the same prefixes, which are in the prefix cache the second time."""
        groups = self._groups(self._arguments.rows)
        for name in ("prefill that fills the prefix cache", "prefill, prefixes in the cache"):
            self.engine.release(self._count(name, lambda: self.engine.prefill(groups)[0]))
        assert self.engine.prefix_cache.stats().hits == len({group.prefix_ids for group in groups})

    def run_captured(self) -> None:
        """Decodes one batch with CUDA graphs: captured in the first step, replayed in the others."""
        batch = self.engine.prefill(self._groups(self._arguments.rows))[0]
        self._decode(batch, name="decode step, captured", steps=1, is_first=False)
        self._decode(batch, name="decode step, replayed", is_first=False)

    def _decode(self, batch: Batch, *, name: str = "decode step", steps: int = 4, is_first: bool = True) -> None:
        for step in range(steps):
            tokens = self._draw.integers(self._vocabulary, size=len(batch.sequences))
            title = "first decode step of a batch" if is_first and step == 0 else name
            self._count(title, lambda tokens=tokens: self.engine.decode_step(batch, tokens))

    def _groups(self, rows: int) -> list[Group]:
        arguments = self._arguments
        config = GenerationConfig(no_repeat_ngram_size=int(arguments.logprobs))
        sequences = []
        for index in range(rows):
            if index % arguments.each == 0:
                prefix_ids = self._draw.integers(self._vocabulary, size=arguments.prefix).tolist()
            suffix_ids = self._draw.integers(self._vocabulary, size=arguments.suffix).tolist()
            prompt = Prompt(prefix_ids=prefix_ids, suffix_ids=suffix_ids)
            sequences.append(make_sequence(prompt, config, eos_token_id=-1, max_positions=1 << 30))
        return list(plan_groups(sequences, max_rows=rows))

    def _count(self, name: str, call: Callable[[], Any]) -> Any:
        self._counters.reset()
        result = call()
        report = self._counters.read()
        counts = {"launches": report["launches"], "gemm": report["gemm"][0]}
        for kind in COPIES:
            counts[f"{kind}_calls"], counts[f"{kind}_bytes"] = report[kind]
        counts |= {kind: report[kind][0] for kind in CALLS}
        self._add({"phase": name, "times": 1, **counts, "peak_bytes": report["device_peak"]})
        self.kernels: dict[str, int] = report["kernels"]
        return result

    def _add(self, phase: dict[str, Any]) -> None:
        last = self.phases[-1] if self.phases else {}
        if {**last, "times": 0, "peak_bytes": 0} == {**phase, "times": 0, "peak_bytes": 0}:
            last["times"] += 1
        else:
            self.phases.append(phase)


def graph_path(path: Path) -> Path:
    """The graph of a bundle's directory, or the graph itself."""
    return path / MODEL_NAME if path.is_dir() else path


def describe(phase: dict[str, Any]) -> str:
    """A phase as one line."""
    parts = [f"launches {phase['launches']} (gemm {phase['gemm']})"]
    for kind in COPIES:
        if phase[f"{kind}_calls"]:
            parts.append(f"{kind} {phase[f'{kind}_calls']}: {phase[f'{kind}_bytes'] / 1e3:,.1f} kB")
    parts += [f"{kind} {phase[kind]}" for kind in CALLS if phase[kind]]
    times = f"{phase['times']} x " if phase["times"] > 1 else ""
    return f"{times}{phase['phase']}: {', '.join(parts)}; peak {phase['peak_bytes'] / 1e6:,.0f} MB"


def above_target(phase: dict[str, Any]) -> list[str]:
    """What of a phase is above its target."""
    target = TARGETS.get(phase["phase"])
    if target is None:
        return []
    got = {"h2d": phase["h2d_bytes"], "d2h": phase["d2h_bytes"]}
    got |= {name: phase[name] for name in ("sync", "launches", "graph_launch")}
    return [
        f"{phase['phase']}: {name} {value:,}, target {getattr(target, name):,.0f}"
        for name, value in got.items()
        if value > getattr(target, name)
    ]


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_counts",
        description="Count what the engine asks of a CUDA device, phase by phase, with stand-ins for its libraries.",
    )
    parser.add_argument("model", type=Path, metavar="BUNDLE|GRAPH", help="cache_copy.onnx is next to the graph")
    parser.add_argument("--rows", type=int, default=64, help="sequences of the batch; default: %(default)s")
    parser.add_argument("--each", type=int, default=1, help="sequences of a prefix; default: %(default)s")
    parser.add_argument("--prefix", type=int, default=180, help="tokens of a prefix; default: %(default)s")
    parser.add_argument("--suffix", type=int, default=16, help="tokens of a suffix; default: %(default)s")
    parser.add_argument("--logprobs", action="store_true", help="fetch log-probabilities, as extractive answers need")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a decode step")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a phase is above its target or a GPU would refuse something."""
    arguments = make_parser().parse_args(argv)
    counters = Counters()
    path = graph_path(arguments.model)
    result: dict[str, Any] = {"benchmark": "cuda counts", "onnxruntime": import_onnxruntime().__version__}
    missed: list[str] = []
    print(f"{arguments.model}, onnxruntime-gpu {result['onnxruntime']}")
    for graph in (path, path.with_name(CACHE_COPY_NAME)):
        found = partition(graph)
        result[graph.name] = {"cuda": found.cuda, "cpu": dict(found.cpu), "memcpy": found.copies}
        print(f"{graph.name}: {found.cuda} nodes on CUDA, {found.cpu.total()} on the CPU", end="")
        print(f" ({', '.join(f'{name} {count}' for name, count in found.cpu.most_common()) or 'none'})", end="")
        print(f", {len(found.copies)} Memcpy")
        missed += [f"{graph.name}: Memcpy {copy}" for copy in found.copies]
        missed += [f"{graph.name}: {count} {name} on the CPU, no shapes" for name, count in found.not_shapes.items()]
    plain = Tool(counters, arguments)
    plain.run()
    cached = Tool(counters, arguments, cache_bytes=1 << 40)
    cached.run_cached()
    captured = Tool(counters, arguments, cuda_graphs=True)
    if captured.engine.uses_cuda_graphs:
        captured.run_captured()
    else:
        missed.append("this ONNX Runtime does not capture the decode step")
    result["phases"] = [*plain.phases, *cached.phases[1:], *captured.phases[1:]]
    result["refused"] = counters.refused()
    for phase in result["phases"]:
        print(describe(phase))
        missed += above_target(phase)
    missed += [f"a GPU would refuse: {what} ({count} times)" for what, count in result["refused"].items()]
    if arguments.kernels:
        print("kernels of a decode step:")
        for name, count in sorted(plain.kernels.items(), key=lambda item: (-item[1], item[0])):
            print(f"    {count} {name}")
    print("\n".join(["above target:", *missed]) if missed else "all targets are met; a GPU would refuse nothing")
    result["above_target"] = missed
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return EXIT_ABOVE_TARGET if missed else 0


if __name__ == "__main__":
    sys.exit(main())
