"""What the benchmarks share: a runner in a process of its own, and the models and options of all of them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.models import ROOT, convert_to_gguf, convert_to_openvino, prepare, quantize_for_vllm, random_gpt2
from bench.peers import RUNNERS
from bench.settings import Settings

SETTLE_SECONDS = 0.5
"""Pause before a measurement, in which the threads of the previous runner stop spinning."""
PEERS = [name for name in RUNNERS if not name.endswith("extractive")]
PEERS_DIRECTORY = ROOT / "runs" / "peers"
PEER_ENVIRONMENTS = {"OpenVINO": "openvino", "vLLM": "vllm", "llama.cpp": "llama-cpp"}
"""Made by `make bench-peers`, for runners whose names begin so."""
CONVERSIONS = {"OpenVINO": convert_to_openvino, "vLLM": quantize_for_vllm, "llama.cpp": convert_to_gguf}
RANDOM = "GPT-2's 124 M parameters, random"


def peer_python(name: str) -> Path:
    """The interpreter of a runner: this one, or that of an environment of its own where packages clash."""
    environment = PEER_ENVIRONMENTS.get(name.split()[0])
    return Path(sys.executable) if environment is None else PEERS_DIRECTORY / environment / "bin" / "python"


class Runner:
    """A process that answers requests (`bench.peers`)."""

    def __init__(self, name: str, settings: Settings, directory: Path) -> None:
        """Starts the process and waits until it has loaded; `missing` says what is not installed, if anything."""
        path = directory / f"{name.replace(' ', '-')}.json"
        path.write_text(settings.to_json())
        self._errors = path.with_suffix(".log")
        python = peer_python(name)
        self.name = name
        self.missing: str | None = None
        self.load_seconds: float | None = None
        self._process = None
        if not python.is_file():
            self.missing = "make bench-peers installs it"
            return
        self._process = subprocess.Popen(
            [str(python), "-m", "bench.peers", name, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            text=True,
        )
        loaded = self._read()
        self.missing = loaded.get("missing")
        self.load_seconds = loaded.get("load_seconds")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply."""
        time.sleep(SETTLE_SECONDS)
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status, errors = self._process.wait(), self._errors.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name} ended with status {status}: {errors[-1] if errors else 'no message'}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def add_model_options(parser: argparse.ArgumentParser, *, takes_bundles: bool = False) -> None:
    """Adds the options of every benchmark: data, model, runners, threads, and the file for the result.

    Args:
        parser: Of the benchmark.
        takes_bundles: Whether bundles that exist may be measured instead of a model (`--bundles`, without `--work`).
    """
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="SQuAD file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="of GPT-2: measures random weights of its size")
    source.add_argument("--model", type=Path, metavar="DIR", help="written by training.finetune")
    if takes_bundles:
        source.add_argument("--bundles", nargs="+", type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    parser.add_argument(
        "--work", type=Path, required=not takes_bundles, metavar="DIR", help="for the models; used again"
    )
    parser.add_argument("--verify", type=Path, metavar="FILE", help="questions that int8 is smoothed with, for --model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON with every sample")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=RUNNERS, default=PEERS, metavar="RUNNER")


def prepare_models(arguments: argparse.Namespace) -> None:
    """Makes the models of a benchmark, if they are not there yet."""
    model = arguments.model or arguments.work / "model"
    if arguments.model is None and not model.exists():
        random_gpt2(model, arguments.tokenizer)
    prepare(arguments.work, model, arguments.verify)
    for prefix, convert in CONVERSIONS.items():
        python = peer_python(prefix)
        if python.is_file() and any(name.startswith(prefix) for name in arguments.only):
            convert(arguments.work, python)
