"""Commands, snippets, tables and links of README and of every page of the documentation.

The convention for fenced blocks, which the tests below hold pages to:

- No language, `bash` or `sh`: shell commands, without prompt signs and output. Each is parsed by the program's own
  parser; `answer`, `predict`, `evaluate` and `info` on files in `runs/demo` run, and so do curl's requests.
- `python`: all blocks of a page run in order, in one namespace, where `make demo` has left its files.
- `json` and `yaml` are parsed. `text` and all other languages are no commands, and not run.
- A Python or shell block that cannot run here has `<!-- not run: REASON -->` on the line above it. Python is still
  compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from bench import tables
from qa_onnx import cli
from tests.conftest import ROOT

INCLUDED = ("CONTRIBUTING.md", "SECURITY.md", "bench/NOTES.md", "training/starter/NOTES.md")
PAGES = ("README.md", *INCLUDED, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
TEXT = "\n".join(TEXTS.values())
SHELL = ("", "bash", "sh")
FENCE = re.compile(
    r"(?:^ *<!-- not run:(?P<reason>[^\n]*?)-->\n)?^(?P<indent> *)```(?P<language>[\w.+-]*)(?P<info>[^\n`]*)\n"
    r"(?P<body>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
BENCHES = (
    "accuracy bulk latency long_documents look_ahead reliability report roofline scaling serve throughput training"
)
SUITE = {
    "qa_onnx": "qa_onnx.cli",
    "training.finetune": "training.finetune",
    "export.to_onnx": "export.to_onnx",
    **{f"bench.{name}": f"bench.{name}" for name in BENCHES.split()},
}
"""The programs that the documentation has to show, and the modules of their parsers."""
NOT_PARSED = {"training.starter.pretrain", "training.starter.sample", "training.starter.split", "bench.kills"}
"""Modules that are commands, too, but keep their parser to themselves."""
SYSTEM = {".", "cd", "mkdir", "git", "export", "docker", "kubectl", "curl", "bash"}
RUN = {"answer", "predict", "evaluate", "info"}
DEMO = "runs/demo/"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    body: str
    reason: str | None

    def __str__(self):
        return f"{self.page}-{self.number}"


def blocks_of(page):
    return [
        Block(page, number, found["language"], textwrap.dedent(found["body"]), found["reason"])
        for number, found in enumerate(FENCE.finditer(TEXTS[page]), 1)
    ]


def commands_of(block):
    """The commands of a shell block as lists of words; `|` and `&&` separate commands, a quoted text may have lines."""
    lines = iter(block.body.replace("\\\n", " ").splitlines())
    for line in lines:
        while True:
            try:
                words = shlex.split(line, comments=True)
                break
            except ValueError:
                line += "\n" + next(lines)
        command = []
        for word in [*words, "&&"]:
            if word not in ("|", "&&"):
                command.append(word)
            elif command:
                yield command
                command = []


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NOT_RUN = [block for block in BLOCKS if block.reason is not None]
COMMANDS = [
    (block.page, command)
    for block in BLOCKS
    if block.language in SHELL and block.reason is None
    for command in commands_of(block)
]
SNIPPETS = {
    page: [block for block in BLOCKS if (block.page, block.language, block.reason) == (page, "python", None)]
    for page in PAGES
}


def program_of(command):
    """The program of this project that a command starts, and its arguments; None for any other command."""
    if command[:2] == ["/usr/bin/time", "-v"]:
        command = command[2:]
    name = command[0].rpartition("/")[2]
    if name == "qa-onnx":
        return "qa_onnx", command[1:]
    if name in ("python", "python3", "torchrun", "accelerate") and "-m" in command:
        place = command.index("-m")
        return command[place + 1], command[place + 2 :]
    return None


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, starter_bundle, heldout_file):
    """A directory that looks as `make demo` leaves the checkout, and README's export of the starter."""
    directory = tmp_path_factory.mktemp("workplace")
    demo = directory / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(starter_bundle, demo / "bundle")
    shutil.copytree(starter_bundle, directory / "runs" / "starter" / "bundle")
    shutil.copytree(ROOT / "training" / "starter" / "model", demo / "model")
    shutil.copyfile(heldout_file, demo / "heldout.json")
    return directory


@pytest.fixture(scope="module")
def done():
    """The outputs of commands that ran, by their arguments."""
    return {}


@pytest.fixture(scope="module")
def service(workplace):
    """The address of the service that README starts, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qa_onnx", "serve", "--model", "runs/demo/bundle", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=workplace, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def ids(entry):
    return entry[0] + ": " + " ".join(entry[1])[:60] if isinstance(entry, tuple) else str(entry)


def test_there_are_commands_of_every_program():
    programs = {program[0] for _, command in COMMANDS if (program := program_of(command))}
    assert set(SUITE) <= programs


@pytest.mark.parametrize("entry", COMMANDS, ids=ids)
def test_every_command_is_one_that_its_program_takes(entry):
    _, command = entry
    program = program_of(command)
    name = command[0].rpartition("/")[2]
    if program and program[0] in SUITE:
        importlib.import_module(SUITE[program[0]]).make_parser().parse_args(program[1])
    elif program and program[0].split(".")[0] in ("training", "export", "bench"):
        module = importlib.import_module(program[0])
        if program[0] not in NOT_PARSED:
            entry_point = importlib.import_module(f"{program[0]}.__main__") if hasattr(module, "__path__") else module
            entry_point.make_parser().parse_args(program[1])
    elif name == "pip" or (program and program[0] == "pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for wanted in re.findall(r"(?:\.|qa_onnx)\[([\w,]+)\]", " ".join(command)):
            assert set(wanted.split(",")) <= set(extras)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(command[1:]) <= set(targets)
    else:
        assert (program and program[0] in ("pytest", "http.server", "venv")) or name in SYSTEM, (
            f"unknown command {command}"
        )


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPETS[page]])
def test_the_snippets_of_a_page_run(workplace, monkeypatch, page):
    monkeypatch.chdir(workplace)
    namespace, output = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in SNIPPETS[page]:
            exec(compile(block.body, str(block), "exec"), namespace)
    assert output.getvalue().strip()


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_a_block_that_is_not_run_says_why(block):
    assert len(block.reason.split()) >= 3
    assert block.language in (*SHELL, "python")
    if block.language == "python":
        compile(block.body, str(block), "exec")
    pytest.skip(block.reason.strip())


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("json", "yaml")], ids=str)
def test_data_in_a_page_can_be_read(block):
    assert {"json": json.loads, "yaml": yaml.safe_load}[block.language](block.body) is not None


def demo_commands(page):
    """The commands of a page that read and write files of the demo alone."""
    for name, command in COMMANDS:
        program = program_of(command)
        if name == page and program and program[0] == "qa_onnx" and program[1][0] in RUN:
            paths = [word for word in program[1] if "/" in word]
            if paths and all(word.removeprefix("@").startswith(DEMO) for word in paths):
                yield program[1]


@pytest.mark.parametrize("page", [page for page in PAGES if [*demo_commands(page)]])
def test_the_commands_that_ask_the_demo_bundle_run_in_order(workplace, monkeypatch, capfd, page, done):
    """What was on an earlier page, too, ran there. The files of a page are left for the next."""
    monkeypatch.chdir(workplace)
    for arguments in demo_commands(page):
        if tuple(arguments) not in done:
            assert cli.main(arguments) == 0, capfd.readouterr().err
            done[tuple(arguments)] = capfd.readouterr().out
        output = done[tuple(arguments)]
        if arguments[0] == "evaluate":
            assert '"exact_match"' in output
        else:
            assert output or arguments[0] == "predict"
        if "--plot" in arguments:
            assert Path(arguments[arguments.index("--plot") + 1]).is_file()


REQUESTS = {shlex.join(command): command for _, command in COMMANDS if command[0] == "curl"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=range(len(REQUESTS)))
def test_the_requests_of_curl_get_a_response(workplace, service, request_):
    command = [word.replace("127.0.0.1:8000", service).replace("localhost:8000", service) for word in request_]
    done = subprocess.run([*command, "-sS", "--fail"], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_block_for_gpt2_and_squad_runs_with_the_embedded_model(workplace, heldout_file):
    """README's block, with a model and data that need no hub, and 4 steps instead of three epochs."""
    (block,) = [block for block in blocks_of("README.md") if "--recipe gpt2-squad" in block.body]
    replaced = {
        "--model gpt2": "--model starter",
        "--train squad --eval squad": f"--train sample --limit-train 200 --eval {heldout_file} --limit-eval 8 "
        "--max-steps 4 --batch-size 2",
        "--verify squad": f"--verify {heldout_file}",
    }
    body = block.body
    for given, instead in replaced.items():
        assert given in body
        body = body.replace(given, instead)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run(
            [sys.executable, *command[1:]], cwd=workplace, env=environment, check=True, capture_output=True, text=True
        ).stdout
        for command in commands_of(Block("README.md", 0, "", body, None))
    ]
    metrics = json.loads((workplace / "runs" / "squad" / "model" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["eval_questions"]) == (4, 8)
    assert "text" in json.loads(outputs[-1])


def test_readme_is_short():
    assert len(TEXTS["README.md"].encode()) <= 10_000
    assert len(TEXTS["README.md"].splitlines()) <= 170


def test_the_tree_in_contributing_is_that_of_the_repository():
    (tree,) = [block.body for block in blocks_of("CONTRIBUTING.md") if block.body.startswith("qa_onnx/")]
    folder = ROOT
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+(?:\.py|/)(?= |$)", re.split(r" {2,}(?=\w+,? )", line.strip())[0])
        if not line.startswith(" "):
            folder = ROOT / names[0]
        assert folder.is_dir()
        assert [name for name in names if not (folder / name).exists() and not (ROOT / name).exists()] == []


def test_no_figure_is_left_to_fill_in():
    """A word in capitals with an underscore is one that the code knows, is set in a command, or stands for a path."""
    folders = ("qa_onnx", "training", "export", "bench", "tests", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources += [ROOT / "Makefile", ROOT / "setup.py", *ROOT.glob("qa_onnx/**/native/*")]
    known = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    text = "\n".join(text for name, text in TEXTS.items() if not name.endswith("NOTES.md"))  # old names are in notes
    words = set(re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b(?!=)", text)) - {"TOKENIZER_DIR"}
    assert {word for word in words if word not in known} == set()


@pytest.mark.parametrize("result", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_results(result):
    """`bench.report` makes them; a result that no page shows is one that they need not show."""
    _, table, where = tables.render(json.loads(result.read_text())).split("\n\n")
    if f"bench.report bench/results/{result.name}" in TEXT:
        assert table in TEXT
        assert where in TEXT


def test_readmes_table_has_rows_of_the_run_of_documents():
    """Its own and the strongest peers; all of them are in the benchmarks."""
    _, table, where = tables.render(json.loads((ROOT / "bench" / "results" / "documents-cpu.json").read_text())).split(
        "\n\n"
    )
    title, line, *rows = table.splitlines()
    shown = [row for row in rows if row in TEXTS["README.md"].splitlines()]
    assert "\n".join([title, line, *shown]) + f"\n\n{where}" in TEXTS["README.md"]
    names = [row.split("|")[1].strip() for row in shown]
    assert {"qa_onnx fp32", "qa_onnx bf16", "qa_onnx int8", "transformers fp32"} <= set(names)
    assert {name.split()[0] for name in names} >= {"OpenVINO", "vLLM", "CTranslate2", "llama.cpp"}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files_of_the_repository(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:"):
            assert ((ROOT / page).parent / path).exists(), f"{page} links to {target}"
