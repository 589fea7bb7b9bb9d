"""The command line: help, bad input, standard output and `info`."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ANSWER, PREDICT, run
from fakes import write_json

from qa_onnx import cli

COMMANDS = ["answer", "serve", "predict", "evaluate", "calibrate", "info", "answer-file"]


def test_info_prints_a_page_or_the_manifest(files, capsys):
    status, page, err = run(capsys, "info --model bundle")
    assert (status, err) == (0, "")
    title, *lines = page.splitlines()
    assert title == "bundle"
    shown = {line[2:20].strip(): line[20:] for line in lines}
    assert shown["precision"] == "fp32"
    assert shown["context window"].startswith("128 tokens")
    assert shown["no answer"].startswith("no threshold")
    assert "{" not in page
    status, out, err = run(capsys, "info --model bundle --json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads((files / "bundle" / "qa_onnx.json").read_text("utf-8"))


def info_lines(directory, capsys, **changes):
    """The page of a bundle whose manifest was changed, by label."""
    values = json.loads((directory / "bundle" / "qa_onnx.json").read_text("utf-8"))
    write_json(directory / "bundle" / "qa_onnx.json", values | changes)
    status, page, err = run(capsys, "info --model bundle")
    assert (status, err) == (0, "")
    return {line[2:20].strip(): line[20:] for line in page.splitlines()[1:]}


def test_info_tells_what_was_measured(files, capsys):
    parity = {"source": "2 of random tokens", "prompts": 87, "tokens_differing": 0}
    parity["max_logprob_difference"] = {"alone": 2e-5, "batched": 9.5e-5}
    loss = {"equal_answers_percent": 96.25, "f1_drop": 0.125, "questions": 200}
    kept = {"threshold": 0.0161234, "source": "dev.json", "questions": 1400, "without_answer": 131}
    shown = info_lines(files, capsys, parity=parity, precision_loss=loss, no_answer=kept, precision="int8")
    assert shown["precision"] == "int8"
    assert shown["parity"].startswith("every token equals PyTorch's in fp32 on 87 prompts, 2 of random tokens; ")
    assert shown["parity"].endswith("differ by at most 9.5e-05")
    assert (
        shown["precision loss"] == "96.25 % of answers equal those of fp32; F1 falls by 0.125 points on 200 questions"
    )
    assert shown["no answer"] == (
        "above a probability of 0.016, found on dev.json (1,400 questions, 131 without an answer)"
    )
    assert "precision loss" not in info_lines(files, capsys, precision_loss={}, precision="fp32")
    loss = info_lines(files, capsys, precision_loss={"equal_answers_percent": 50})["precision loss"]
    assert loss == "50 % of answers equal those of fp32; loss of F1 not measured"


@pytest.mark.parametrize("value", [None, "two\nlines", 10**400, [1], {"a": None}, True, "x" * 10_000, 1e300])
def test_info_shows_reports_whatever_is_in_them(files, capsys, value):
    parity = dict.fromkeys(("source", "prompts", "tokens_differing"), value)
    for differences in (value, {"alone": value}):
        loss = dict.fromkeys(("equal_answers_percent", "f1_drop", "questions"), value)
        kept = {"threshold": 0.5, "source": value, "questions": value, "without_answer": value}
        report = parity | {"max_logprob_difference": differences}
        changes = {"parity": report, "precision_loss": loss, "no_answer": kept, "package_versions": {str(value): value}}
        changes["source_model"] = str(value)
        assert max(map(len, info_lines(files, capsys, **changes).values())) < 1_000


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{ANSWER} --context @nowhere.txt", "--context @nowhere.txt: cannot be read"),
        (f"{ANSWER} --context @latin.txt", "--context @latin.txt: byte 3 is not UTF-8"),
        (f"{ANSWER} --context @", "--context @: cannot be read"),
        ("answer --model nowhere --question Who? --context Rollo", "nowhere is not a bundle"),
        ("answer --model empty --question Who? --context Rollo", "it has no qa_onnx.json"),
        ("predict --model nowhere --data data.json --output out.json", "nowhere is not a bundle"),
        (f"{PREDICT} --output nowhere/out.json", "nowhere/out.json: cannot be written"),
        (f"{PREDICT} --output empty", "empty: cannot be written"),
        ("predict --model bundle --data cut.json --output out.json", "cut.json: not valid JSON"),
        ("predict --model bundle --data nowhere.json --output out.json", "nowhere.json: cannot be read"),
        ("evaluate --data data.json --predictions nowhere.json", "nowhere.json: cannot be read"),
        ("evaluate --data data.json --predictions list.json", "list.json: got a JSON array"),
        ("evaluate --data list.json --predictions predictions.json", "list.json: there are no questions"),
        ("info --model nowhere", "nowhere is not a bundle"),
        ("info --model starter", "python -m export.to_onnx --model starter --output BUNDLE"),
        (f"{ANSWER} --context Rollo --top-p 0.5", "without a temperature"),
        (f"{PREDICT} --output out.json --answers nowhere/answers.jsonl", "answers.jsonl: cannot be written"),
        ("evaluate --data data.json --answers predictions.json", "predictions.json: line 1"),
        ("evaluate --data data.json --answers latin.txt", "latin.txt: byte 3 is not UTF-8"),
        (
            "evaluate --data data.json --predictions predictions.json --plot plot.png",
            "--plot needs answers with scores",
        ),
        ("evaluate --data data.json --predictions predictions.json --worst nowhere/x", "nowhere/x: cannot be written"),
    ],
)
def test_bad_input_gives_status_2_and_one_line(files, capsys, command, words):
    status, out, err = run(capsys, command)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not (files / "out.json").exists()


def test_an_error_stays_one_line_whatever_is_in_it(files, capsys):
    values = json.loads((files / "bundle" / "qa_onnx.json").read_text("utf-8"))
    values["files"]["two\nlines"] = {"bytes": 1, "sha256": ""}
    write_json(files / "bundle" / "qa_onnx.json", values)
    status, _, err = run(capsys, "info --model bundle")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{PREDICT} --output out.json --limit 0", "--limit: got '0'; expected a whole number of at least 1"),
        (f"{PREDICT} --output out.json --batch-size -1", "--batch-size: got '-1'"),
        (f"{PREDICT} --output out.json --max-new-tokens 1.5", "--max-new-tokens: got '1.5'"),
        (f"{ANSWER} --context Rollo --threads two", "--threads: got 'two'"),
        (f"{ANSWER} --context Rollo --provider tpu", "--provider: invalid choice: 'tpu'"),
        (ANSWER, "the following arguments are required: --context"),
        ("", "required: COMMAND"),
        ("sing", "invalid choice: 'sing'"),
    ],
)
def test_bad_arguments_give_status_2_and_name_the_argument(files, loaded, capsys, command, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(command.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert loaded == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", ["answer", "predict", "evaluate", "info"]),
        (
            "answer",
            ["--model", "--question", "--context", "--json", "--provider", "{auto,cpu,cuda}", "--max-new-tokens"],
        ),
        ("predict", ["--model", "--data", "--output", "--limit", "--batch-size", "--provider", "--threads"]),
        ("evaluate", ["--data", "--predictions"]),
        ("info", ["--model"]),
    ],
)
def test_every_command_has_help(capsys, command, words):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert [word for word in words if word not in out] == []


def test_the_help_begins_with_what_is_used_first_and_has_an_example(capsys):
    parser = cli.make_parser()
    text = parser.format_help()
    assert re.findall(r"^    ([a-z-]+)(?:  |$)", text, re.M) == COMMANDS
    (example,) = [line for line in text.splitlines() if line.startswith("  python -m qa_onnx ")]
    assert parser.parse_args(shlex.split(example)[3:]).question == ["Who made the first sketch?"]
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert re.search(r"\n\n[A-Z][^:]+\.\n\noptions:", capsys.readouterr().out), command


@pytest.mark.parametrize(("redirect", "status"), [(">&-", 2), ("> /dev/full", 2), ("2>&- >&-", 2), ("> /dev/null", 0)])
def test_standard_output_that_cannot_be_written_is_one_line(files, redirect, status):
    evaluate = f"{sys.executable} -m qa_onnx evaluate --data data.json --predictions predictions.json {redirect}"
    done = subprocess.run(
        ["sh", "-c", evaluate],
        cwd=files,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(("encoding", "text"), [("ascii", "caf\\xe9"), ("latin-1", "café"), ("utf-8", "café")])
def test_standard_output_of_another_encoding_gets_every_answer(files, loaded, monkeypatch, encoding, text):
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding=encoding))
    for option in ("", "--json"):
        command = ["answer", "--model", "bundle", "--question", "café", "--context", "A café.", *option.split()]
        assert cli.main(command) == 0
    plain, whole = printed.getvalue().decode(encoding).splitlines()
    assert (plain.partition("  (score ")[0], json.loads(whole)["text"]) == (text, "café")


def test_what_was_printed_before_an_error_is_not_lost(files, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed))

    def command():
        sys.stdout.write("one answer\n")
        raise OSError(28, "No space left on device", "elsewhere")

    assert cli.run_command(command) == 2
    assert printed.getvalue() == b"one answer\n"


def answer(capsys, *arguments):
    status = cli.main(["answer", "--model", "bundle", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_command_that_writes_to_a_closed_pipe_exits_with_0(capsys):
    def write():
        raise BrokenPipeError

    assert cli.run_command(write) == 0
    assert capsys.readouterr() == ("", "")
