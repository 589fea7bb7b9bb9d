"""The demo: what it deletes, continues and shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from bench import (
    demo,
)
from export import to_onnx
from qa_onnx import cli
from tests.conftest import ROOT
from training import finetune


@pytest.fixture
def demo_ran(tmp_path, monkeypatch):
    """A directory in which a demo ran, with small files in place of its own."""
    monkeypatch.chdir(tmp_path)
    for path in ("model/config.json", "model/metrics.json", "bundle/qa_onnx.json", "heldout.json", "accuracy.json"):
        file = demo.DIRECTORY / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"of the demo: {path}")
    demo.write_record()
    (demo.DIRECTORY / "predictions.json").write_text("of the user")
    return demo.DIRECTORY


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_demo_replaces_what_an_earlier_one_wrote(demo_ran, monkeypatch):
    seen = []

    def run(command):
        seen.append(contents(demo_ran).keys())
        return 3

    monkeypatch.setattr(demo, "run", run)
    assert demo.main([]) == 3
    assert seen == [{demo.RECORD, demo_ran / "predictions.json"}]


@pytest.mark.parametrize(
    "name",
    [
        *("model/thesis.txt", "bundle/notes/thesis.txt", "bundle/qa_onnx.json", "model/metrics.json"),
        *("heldout.json", "accuracy.json", "passage.txt", "demo.json"),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_the_demo_never_deletes_what_it_did_not_write(demo_ran, monkeypatch, capsys, name, is_first):
    """Neither files of others, where no demo ran before, too, nor its own that were changed since."""
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    if is_first:
        for path in contents(demo_ran):
            path.unlink()
    (demo_ran / name).parent.mkdir(exist_ok=True)
    (demo_ran / name).write_text("precious")
    before = contents(demo_ran)
    assert demo.main([]) == 2
    assert capsys.readouterr().err.startswith(f"error: {demo_ran / name} was not written by an earlier demo")
    assert contents(demo_ran) == before


@pytest.mark.parametrize("name", ["model", "heldout.json", "bundle/qa_onnx.json"])
def test_the_demo_deletes_nothing_through_links(demo_ran, tmp_path, monkeypatch, name):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    elsewhere = tmp_path / "elsewhere"
    (demo_ran / name).rename(elsewhere)
    (demo_ran / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    assert demo.main([]) == 2
    assert contents(tmp_path) == before


def test_the_demo_does_not_wait_for_a_pipe(demo_ran, capsys):
    os.mkfifo(demo_ran / "model" / "pipe")
    assert demo.main([]) == 2
    assert "model/pipe was not written by an earlier demo" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["[]", "{}", "{cut", '{"written": 5}', '{"written": ["a"]}', "\x00"])
def test_a_record_of_no_demo_is_left_alone(demo_ran, monkeypatch, capsys, record):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    demo.RECORD.write_text(record)
    before = contents(demo_ran)
    assert demo.main([]) == 2
    assert "demo.json was not written by an earlier demo" in capsys.readouterr().err
    assert contents(demo_ran) == before


def test_an_interrupted_training_of_the_demo_goes_on(demo_ran, monkeypatch):
    """Its files are in no record yet; `training.finetune` itself refuses those of another run."""
    shutil.rmtree(demo_ran / "model")
    demo.write_record()
    (demo_ran / "model" / "checkpoint-8").mkdir(parents=True)
    (demo_ran / "model" / "training_config.json").write_text("{}")
    monkeypatch.setattr(demo, "run", lambda command: 3)
    assert demo.main([]) == 3
    assert (demo_ran / "model" / "checkpoint-8").is_dir()
    assert not (demo_ran / "bundle").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_the_demo_waits_for_the_command_that_it_interrupts(tmp_path):
    """A training writes a checkpoint then."""
    (tmp_path / "command.py").write_text(
        "import signal, time\n"
        "def stop(*signal):\n    time.sleep(0.5)\n    print('wrote a checkpoint')\n    raise SystemExit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('began', flush=True)\ntime.sleep(60)\n"
    )
    program = "import sys; from bench import demo; demo.COMMANDS = ('command.py',); sys.exit(demo.main([]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.stdout.readline() != "began\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "wrote a checkpoint" in output
    assert demo.INTERRUPTED in output


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--quick"], 2)])
def test_the_demo_with_options_does_nothing(demo_ran, monkeypatch, arguments, status):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    before = contents(demo_ran)
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == status
    assert contents(demo_ran) == before


def test_what_the_demo_says_to_type_next_is_taken():
    lines = [line for line in demo.NEXT.splitlines() if " -m " in line]
    assert len(lines) == 8
    for line in lines:
        program, *arguments = shlex.split(line.split(" -m ", 1)[1])
        parser = {
            "qa_onnx": cli.make_parser,
            "training.finetune": finetune.make_parser,
            "export.to_onnx": to_onnx.make_parser,
        }[program]()
        if "--help" not in arguments:
            parser.parse_args(arguments)


def test_the_answers_of_the_demo_are_shown_with_what_was_expected(starter_bundle, heldout_file, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BUNDLE", starter_bundle)
    monkeypatch.setattr(demo, "HELDOUT", heldout_file)
    demo.show_answers()
    out = capsys.readouterr().out
    assert "all names are invented" in out
    assert demo.REAL_PASSAGE in out
    for question, expected in demo.REAL_QUESTIONS:
        assert expected in demo.REAL_PASSAGE
        assert f"Q: {question}" in out
        assert f"expected: {expected})" in out
    assert re.search(rf"\n[0-{len(demo.REAL_QUESTIONS)}] of {len(demo.REAL_QUESTIONS)} are right", out)
