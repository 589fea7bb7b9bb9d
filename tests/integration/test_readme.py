"""README's commands and its snippet do what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from bench import (
    accuracy,
    bulk,
    latency,
    long_documents,
    look_ahead,
    reliability,
    report,
    roofline,
    scaling,
    throughput,
    training,
)
from export import to_onnx
from qa_onnx import cli
from tests.conftest import ROOT
from training import finetune

TEXT = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "docs/bulk.md"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(
        r"(/usr/bin/time -v )?(\.venv/bin/)?python -m (qa_onnx|training\.finetune|export\.to_onnx|bench\.)", line
    )
]
PARSERS = {
    "qa_onnx": cli.make_parser,
    "training.finetune": finetune.make_parser,
    "export.to_onnx": to_onnx.make_parser,
    "bench.accuracy": accuracy.make_parser,
    "bench.bulk": bulk.make_parser,
    "bench.latency": latency.make_parser,
    "bench.look_ahead": look_ahead.make_parser,
    "bench.long_documents": long_documents.make_parser,
    "bench.reliability": reliability.make_parser,
    "bench.report": report.make_parser,
    "bench.roofline": roofline.make_parser,
    "bench.scaling": scaling.make_parser,
    "bench.throughput": throughput.make_parser,
    "bench.training": training.make_parser,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, starter_bundle, heldout_file):
    """A directory that looks as `make demo` leaves the checkout."""
    directory = tmp_path_factory.mktemp("workplace")
    demo = directory / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(starter_bundle, demo / "bundle")
    shutil.copyfile(heldout_file, demo / "heldout.json")
    return directory


def run(workplace, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=workplace, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_there_are_commands_of_every_program():
    programs = {shlex.split(command.split("python -m ", 1)[1])[0] for command in COMMANDS}
    assert programs == set(PARSERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_program_takes(command):
    program, *arguments = shlex.split(command.split("python -m ", 1)[1])
    PARSERS[program]().parse_args(arguments)


def test_no_figure_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]+\b(?<!QA_ONNX_DATA)(?<!TOKENIZER_DIR)(?<!ORT_DISABLE_TELEMETRY)", TEXT)


@pytest.mark.parametrize("result", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_results(result):
    """`bench.report` makes them; a result that README does not show is one that it need not show."""
    _, table, where = report.render(json.loads(result.read_text())).split("\n\n")
    if f"bench.report bench/results/{result.name}" in TEXT:
        assert table in TEXT
        assert where in TEXT


@pytest.mark.parametrize("snippet", [block for language, block in BLOCKS if language == "python"])
def test_the_snippets_run(workplace, snippet):
    assert len(run(workplace, "-c", snippet).splitlines()) >= 3


def test_the_block_for_gpt2_and_squad_runs_with_random_weights(real_data, tmp_path):
    """124 M parameters, 20 steps: some minutes. The block with random weights is the real one, but for its sources."""
    tokenizer = real_data.parent / "tokenizer" / "gpt2"
    if not tokenizer.is_dir():
        pytest.skip(f"no GPT-2 tokenizer in {tokenizer}")
    real, block = ([*text.splitlines()] for _, text in BLOCKS if "--recipe gpt2-squad" in text)
    stand_ins = {
        "--model gpt2": "--from-scratch gpt2 --tokenizer TOKENIZER_DIR",
        "--train squad --eval squad": "--train SQUAD/train.json --eval SQUAD/dev.json --limit-eval 8 --max-steps 20 "
        "--batch-size 2 --gradient-accumulation 4",
    }
    for given, stand_in in stand_ins.items():
        real = [line.replace(given, stand_in) for line in real]
    assert block == real
    places = {"TOKENIZER_DIR": str(tokenizer), "SQUAD/": f"{real_data / 'squad'}/"}
    outputs = []
    for line in block:
        for place, path in places.items():
            line = line.replace(place, path)
        outputs.append(run(tmp_path, *shlex.split(line)[1:]))
    metrics = json.loads((tmp_path / "runs" / "squad" / "model" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["eval_questions"]) == (20, 8)
    assert metrics["losses"][-1][1] < metrics["losses"][0][1]
    assert "text" in json.loads(outputs[-1])


def test_the_commands_that_ask_a_bundle_run_in_order(workplace):
    commands = [command for command in COMMANDS if command.startswith("python -m qa_onnx") and "runs/demo" in command]
    outputs = [run(workplace, *shlex.split(command)[1:]) for command in commands]
    assert len(outputs) == 7
    assert outputs[1].splitlines()[0::3] == ["How long is it?", "When was it opened?"]
    assert [line[:5] for line in outputs[1].splitlines() if line.startswith(" ")] == ["  1. ", "  2. "] * 2
    assert '"exact_match"' in outputs[3]
    assert "question word" in outputs[5]
    assert (workplace / "runs" / "demo" / "scores.png").is_file()
    assert re.search(r"^  precision +fp32$", outputs[6], flags=re.MULTILINE)
