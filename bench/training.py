"""Training compared with the notebook's, on the same questions: `python -m bench.training --help`.

The notebook that this project replaces pads every row to 512 tokens, takes two at a time, and computes the loss over
passage, question and answer. Tokens per second count the questions' rows alone, without padding and as if no two shared
a passage, so that the figure is comparable between setups. Each setup runs in a process of its own in every round, and
they take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed

from bench.harness import describe_run, publish, take_turns
from bench.machine import peak_rss_mib
from bench.tables import render
from qa_onnx.data.reader import read_examples
from training.data import Collator, LengthGroupedSampler, RowSettings, tokenize
from training.model import build_model, load_model

NOTEBOOK = "notebook"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to train: rows per batch, how they are made, and in which precision matmuls are computed."""

    batch_rows: int
    rows: RowSettings
    pad_to: int = 0
    bf16: bool = False


SETUPS = {
    NOTEBOOK: Setup(batch_rows=2, rows=RowSettings(loss_on="all"), pad_to=512),
    "qa_onnx, a row a question": Setup(batch_rows=16, rows=RowSettings()),
    "qa_onnx, packed": Setup(batch_rows=4, rows=RowSettings(packing=True)),
    "qa_onnx, packed, bf16": Setup(batch_rows=4, rows=RowSettings(packing=True), bf16=True),
}


def train(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains over all questions once, after one step that warms up; seconds, tokens and memory."""
    setup = SETUPS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(0)
    if arguments.tokenizer is not None:
        model, tokenizer = build_model("gpt2", arguments.tokenizer)
    else:
        model, tokenizer = load_model("starter")
    if name == NOTEBOOK:  # its loss was transformers' own
        plain = transformers.GPT2LMHeadModel(model.config)
        plain.load_state_dict(model.state_dict())
        model = plain
    model = model.to(device).train()
    examples = read_examples(arguments.data)
    passages = sorted({example.context for example in examples})
    chosen = set(random.Random(0).sample(passages, min(arguments.passages, len(passages))))
    examples = [example for example in examples if example.context in chosen]
    tokens = sum(tokenize(examples, tokenizer, RowSettings())["length"])
    rows = tokenize(examples, tokenizer, setup.rows)
    order = list(LengthGroupedSampler(rows["length"], batch_rows=setup.batch_rows, seed=0))
    collator = Collator(pad_token_id=tokenizer.eos_token_id, packing=setup.rows.packing, pad_to=setup.pad_to)
    batches = [
        collator([rows[index] for index in order[start : start + setup.batch_rows]])
        for start in range(0, len(order), setup.batch_rows)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(batch: dict[str, torch.Tensor]) -> None:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=setup.bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step(batches[-1])
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_rss_mib()
    computed = sum(batch["input_ids"].numel() for batch in batches)
    return {
        "seconds": seconds,
        "questions": len(examples),
        "tokens": tokens,
        "tokens_computed": computed,
        "peak_mib": memory,
    }


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="Training tokens per second, compared with the notebook's training.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="SQuAD JSON")
    parser.add_argument("--passages", type=int, default=8, metavar="N", help="random ones of it (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="GPT-2's: trains 124 M random weights; the starter without it"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(SETUPS), metavar="SETUP", default=list(SETUPS))
    parser.add_argument("--output", type=Path, metavar="JSON", help="where the result goes")
    parser.add_argument("--run", choices=list(SETUPS), help=argparse.SUPPRESS)  # for the process of one setup
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(given)
    if arguments.run is not None:
        print(json.dumps(train(arguments.run, arguments)))
        return 0

    def run(name: str, index: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.training", *given, "--run", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        print(f"round {index + 1}: {name}: {found['seconds']:.1f} s", file=sys.stderr)
        return found

    runs = take_turns({name: partial(run, name) for name in arguments.only}, rounds=arguments.rounds)
    rows = [
        {
            "name": name,
            "seconds": [run["seconds"] for run in found],
            "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in found),
            "questions_per_second": statistics.median(run["questions"] / run["seconds"] for run in found),
            "tokens_computed": found[0]["tokens_computed"],
            "peak_mib": max(run["peak_mib"] for run in found),
        }
        for name, found in runs.items()
    ]
    first = next(iter(runs.values()))[0]
    model = "GPT-2, 124 M parameters, random weights" if arguments.tokenizer else "the starter"
    result = describe_run(
        "training",
        model=model,
        questions=first["questions"],
        tokens=first["tokens"],
        passages=arguments.passages,
        rounds=arguments.rounds,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    )
    result["rows"] = rows
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
