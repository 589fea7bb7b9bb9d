"""`python -m qa_onnx answer-file`: the answers of `answer_batch`; kills, full disks and two runs lose nothing."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from qa_onnx import Answerer, EngineError
from qa_onnx.batch import ERROR, RESULTS
from qa_onnx.cli import main
from tests.conftest import ROOT
from training.starter.sample import generate

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402 - after the check that it is there

ROWS = 600
OPTIONS = ("--max-new-tokens", "4", "--threads", "1")


@pytest.fixture(scope="module")
def questions():
    """600 generated questions on contexts with several each, with an id."""
    articles = generate("train", questions=ROWS + 50)["data"]
    pairs = [
        (asked["question"], paragraph["context"])
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ][:ROWS]
    asked, contexts = zip(*pairs, strict=True)
    return pa.table({"id": [f"q{index}" for index in range(ROWS)], "question": asked, "context": contexts})


@pytest.fixture(scope="module")
def source(questions, tmp_path_factory):
    path = tmp_path_factory.mktemp("bulk") / "questions.parquet"
    pq.write_table(questions, path)
    return path


@pytest.fixture(scope="module")
def undisturbed(tiny_bundle, source, tmp_path_factory):
    """The files of a run that nothing disturbs, and how many seconds it took."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    started = time.monotonic()
    done = start(tiny_bundle, source, output).communicate(timeout=60)
    assert done == ("answered 600 rows: 20 files in " + str(output) + "\n", "")
    return contents(output), time.monotonic() - started


def command(bundle, source, output, *more):
    arguments = ["--model", bundle, "--input", source, "--output", output, "--shard-rows", 30, *OPTIONS, *more]
    return ["answer-file", *map(str, arguments)]


def _take_ctrl_c():
    """In a new process: a background job of a shell ignores the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(bundle, source, output, *more, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "qa_onnx", *command(bundle, source, output, *more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **({"preexec_fn": _take_ctrl_c} | options),
    )


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if not path.name.startswith(".")}


def copy_run(undisturbed, output):
    """The folder of the finished run."""
    output.mkdir()
    for name, content in undisturbed[0].items():
        (output / name).write_bytes(content)
    return output


def rows_of(output):
    """The rows of a folder, in the order of its files."""
    paths = sorted(path for path in output.iterdir() if path.name.startswith("part-"))
    if paths[0].suffix == ".jsonl":
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_answers_are_those_of_answer_batch_to_the_bit(tiny_bundle, questions, undisturbed, tmp_path):
    with Answerer.from_pretrained(tiny_bundle) as answerer:
        answers = answerer.answer_batch(
            questions["question"].to_pylist(), questions["context"].to_pylist(), max_new_tokens=4
        )
    for name, content in undisturbed[0].items():
        (tmp_path / name).write_bytes(content)
    expected = [
        row | {name: getattr(answer, "text" if name == "answer" else name) for name in RESULTS}
        for row, answer in zip(questions.to_pylist(), answers, strict=True)
    ]
    assert rows_of(tmp_path) == expected
    assert pq.read_table(tmp_path).to_pylist() == expected  # as one data set
    assert len({row["answer"] for row in expected}) > 50


@pytest.mark.parametrize(("processes", "count"), [(1, 4), (2, 3)])
def test_kills_at_random_moments_lose_and_repeat_nothing(tiny_bundle, source, undisturbed, tmp_path, processes, count):
    expected, seconds = undisturbed
    draw = random.Random(processes)
    partial = folder = 0
    for kill in range(count):
        output = tmp_path / f"out-{folder}"
        process = start(tiny_bundle, source, output, "--processes", processes)
        before = contents(output) if output.exists() else {}
        if kill % 2 == 0:  # some shards later, else nothing may ever be done between two kills
            wanted, until = len(list(output.glob("part-*"))) + draw.randrange(1, 6), time.monotonic() + 60
            while process.poll() is None and len(list(output.glob("part-*"))) < wanted:
                assert time.monotonic() < until
                time.sleep(0.001)
            time.sleep(draw.uniform(0, seconds / 50))
        else:
            time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.communicate()
        left = contents(output) if output.exists() else {}
        assert before.items() <= left.items() <= expected.items()
        partial += 1 < len(left) < len(expected)
        folder += left == expected
    assert partial
    time.sleep(0.2)  # workers of a parent that was killed end by themselves
    output = tmp_path / f"out-{folder}"
    out, errors = start(tiny_bundle, source, output, "--processes", processes).communicate(timeout=60)
    assert errors == ""
    assert out.startswith("answered ")
    for number in range(folder + 1):
        assert contents(tmp_path / f"out-{number}") == expected
    assert not list(output.glob(".*"))


def test_workers_end_where_their_parent_is_killed(tiny_bundle, source, tmp_path):
    process = start(tiny_bundle, source, tmp_path / "out", "--processes", "2", start_new_session=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("part-*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.communicate()  # to the end of their standard error, too
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers are left")


def test_a_worker_that_is_killed_is_one_clear_line(tiny_bundle, source, undisturbed, tmp_path):
    output = tmp_path / "out"
    process = start(tiny_bundle, source, output, "--processes", "2")
    until = time.monotonic() + 60
    while not list(output.glob("part-*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for child in children.stdout.split():  # one of them may be Python's resource tracker
        os.kill(int(child), signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors.count("\n")) == (2, "", 1)
    assert "ended by signal 9; the system may have been out of memory" in errors
    assert "the same command continues there" in errors
    assert start(tiny_bundle, source, output).communicate(timeout=60)[1] == ""
    assert contents(output) == undisturbed[0]


def test_ctrl_c_ends_it_with_what_is_done_kept(tiny_bundle, source, tmp_path):
    process = start(tiny_bundle, source, tmp_path / "out", "--processes", "2", start_new_session=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "out").glob("part-*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert errors.startswith("interrupted. The answers to ")
    assert errors.count("\n") == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_ctrl_c_while_processes_start_is_one_line(tiny_bundle, source, tmp_path):
    for wait in (0, 0.1, 0.3):  # all of them within their imports, which take longer
        process = start(tiny_bundle, source, tmp_path / "out", "--processes", "2", start_new_session=True)
        until = time.monotonic() + 60
        children = ["pgrep", "-c", "-P", str(process.pid), "-f", "spawn_main"]
        while int(subprocess.run(children, capture_output=True, text=True, check=False).stdout) < 2:
            assert time.monotonic() < until
            time.sleep(0.005)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=30)
        assert (process.returncode, out, errors.count("\n")) == (130, "", 1)
        assert errors.startswith("interrupted")


def test_a_full_disk_in_the_middle_keeps_the_shards_before(tiny_bundle, questions, tmp_path):
    noise = random.Random(0)
    long = ["" if index < 90 else noise.randbytes(2_000).hex() for index in range(120)]
    source, output = tmp_path / "long.parquet", tmp_path / "out"
    pq.write_table(questions.slice(0, 120).append_column("long", pa.array(long)), source)
    limit = (50_000, resource.RLIM_INFINITY)
    process = start(tiny_bundle, source, output, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors.count("\n")) == (2, "", 1)
    assert "part-00000-00003.parquet: cannot be written (File too large); expected a place with room" in errors
    assert f"The answers to 90 rows are in {output}" in errors
    before = contents(output)
    assert len(before) == 4
    assert start(tiny_bundle, source, output).communicate(timeout=60)[0].startswith("answered 30 rows, 90 were there")
    assert before.items() <= contents(output).items()


def test_two_runs_at_once_are_refused(tiny_bundle, source, undisturbed, tmp_path):
    output = tmp_path / "out"
    first = start(tiny_bundle, source, output)
    until = time.monotonic() + 60
    while not (output / ".lock").exists() or not (output / ".lock").read_text():
        assert time.monotonic() < until
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    errors = start(tiny_bundle, source, output).communicate(timeout=60)[1]
    os.kill(first.pid, signal.SIGCONT)
    assert f"is already running, in process {first.pid}" in errors
    assert errors.count("\n") == 1
    assert first.communicate(timeout=60)[1] == ""
    assert contents(output) == undisturbed[0]


def run(*arguments):
    return main(list(map(str, arguments)))


def test_rows_with_errors_are_kept_where_they_may_be(tiny_bundle, questions, tmp_path, capsys):
    asked = questions["question"].to_pylist()[:70]
    asked[3], asked[40], asked[65] = None, " ", "word " * 400
    source = tmp_path / "holes.parquet"
    pq.write_table(questions.slice(0, 70).set_column(1, "question", pa.array(asked)), source)
    kept = command(tiny_bundle, source, tmp_path / "kept", "--on-error", "null")
    assert run(*kept) == 0
    assert capsys.readouterr().out.startswith("answered 70 rows, 3 with an error: 3 files")
    rows = rows_of(tmp_path / "kept")
    assert [index for index, row in enumerate(rows) if row[ERROR] is not None] == [3, 40, 65]
    assert all(rows[index][name] is None for index in (3, 40, 65) for name in RESULTS)
    assert run(*command(tiny_bundle, source, tmp_path / "strict")) == 2
    assert "row 3 (the first is 0): question is missing" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    asked[3], asked[40] = "Who?", "Who?"
    pq.write_table(questions.slice(0, 70).set_column(1, "question", pa.array(asked)), source)
    assert run(*command(tiny_bundle, source, tmp_path / "strict")) == 2
    errors = capsys.readouterr().err
    assert "row 65 (the first is 0): question has " in errors
    assert "The answers to 60 rows are in" in errors


@pytest.mark.parametrize("output_format", ["jsonl", "csv"])
def test_other_formats_and_several_files_in_their_order(tiny_bundle, questions, tmp_path, output_format):
    for number in range(3):
        pq.write_table(questions.slice(number * 20, 20), tmp_path / f"{number}.parquet")
    inputs = ["--input", *(tmp_path / f"{number}.parquet" for number in (2, 0, 1))]
    arguments = command(tiny_bundle, "", tmp_path / "out", "--output-format", output_format, *inputs)  # the last counts
    assert run(*arguments) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["_SUCCESS", "_run.json", *(f"part-0000{number}-00000.{output_format}" for number in range(3))]
    if output_format == "jsonl":
        ids = [row["id"] for row in rows_of(tmp_path / "out")]
        assert ids == [f"q{index}" for index in [*range(40, 60), *range(40)]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--max-new-tokens", "5"], "generation "),
        (["--shard-rows", "31"], "shard_rows 30 instead of 31"),
        (["--output-format", "csv"], "output_format parquet instead of csv"),
        (["--extractive"], "generation "),
    ],
)
def test_a_folder_of_another_run_is_refused(tiny_bundle, source, undisturbed, tmp_path, capsys, change, words):
    output = copy_run(undisturbed, tmp_path / "out")
    assert run(*command(tiny_bundle, source, output, *change)) == 2
    error = capsys.readouterr().err
    assert "is of another run (" in error
    assert words in error
    assert contents(output) == undisturbed[0]


def test_what_ran_is_recorded_and_a_machine_that_runs_another_is_refused(
    tiny_bundle, source, undisturbed, tmp_path, capsys
):
    output = copy_run(undisturbed, tmp_path / "out")
    manifest = json.loads((output / "_run.json").read_text())
    with Answerer.from_pretrained(tiny_bundle) as answerer:
        stats = answerer.stats()
    assert (manifest["provider"], manifest["kernels"]) == (stats.provider, stats.kernels)
    assert run(*command(tiny_bundle, source, output, "--provider", stats.provider)) == 0  # what `auto` was
    for name, there in (("provider", "other"), ("kernels", "avx1024")):
        (output / "_run.json").write_text(json.dumps(manifest | {name: there}))
        assert run(*command(tiny_bundle, source, output)) == 2
        assert f"is of another run ({name} {there} instead of {getattr(stats, name)})" in capsys.readouterr().err


def test_changed_inputs_another_bundle_and_files_of_others_are_refused(
    tiny_bundle, questions, source, undisturbed, tmp_path, capsys
):
    output = copy_run(undisturbed, tmp_path / "out")
    other = tmp_path / "questions.parquet"
    pq.write_table(questions.slice(1), other)
    assert run(*command(tiny_bundle, other, output)) == 2
    assert "599 rows)" in capsys.readouterr().err
    manifest = json.loads((output / "_run.json").read_text())
    (output / "_run.json").write_text(json.dumps(manifest | {"bundle": "0" * 64}))
    assert run(*command(tiny_bundle, source, output)) == 2
    assert "bundle 000000000000 instead of " in capsys.readouterr().err
    (output / "_run.json").unlink()
    assert run(*command(tiny_bundle, source, output)) == 2
    assert "has files already, such as _SUCCESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--output-format", "xlsx"], "output_format 'xlsx'; expected one of parquet, jsonl, csv"),
        (["--processes", "0"], "processes 0"),
        (["--on-error", "skip"], "on_error 'skip'"),
        (["--temperature", "0.7"], "temperature 0.7 without a seed; expected"),
        (["--num-answers", "2"], "num_answers 2; a row has columns for one answer"),
        (["--window", "100000"], "window 100000; the model has 256 positions"),
        (["--columns", "question=ask"], "no column 'ask'"),
        (["--input", "missing.parquet"], "missing.parquet: there is no such file"),
        (["--model", "missing"], "missing is not a bundle"),
    ],
)
def test_a_command_that_cannot_run_says_so_in_one_line_and_leaves_nothing(
    tiny_bundle, source, tmp_path, capsys, more, words
):
    assert run(*command(tiny_bundle, source, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("part-*"))


def test_without_pyarrow_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['pyarrow'] = None; from qa_onnx.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = command("bundle", "questions.csv", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: answer-file needs the package pyarrow; pip install pyarrow, or, in the checkout, '.[bulk]'\n"
    )


def test_a_finished_run_is_said_to_be_there(tiny_bundle, source, undisturbed, tmp_path, capsys):
    output = copy_run(undisturbed, tmp_path / "out")
    assert run(*command(tiny_bundle, source, output)) == 0
    assert capsys.readouterr().out.startswith("answered 0 rows, 600 were there already: 20 files")


def test_a_run_that_misses_shards_is_not_marked_as_done(
    tiny_bundle, source, undisturbed, tmp_path, capsys, monkeypatch
):
    output = copy_run(undisturbed, tmp_path / "out")
    (output / "part-00000-00007.parquet").unlink()

    def fail(*_, **__):
        (output / ".part-00000-00007.parquet.0123abcd.partial").touch()  # as a process that was killed leaves it
        raise EngineError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr("qa_onnx.bulk.run.write_shards", fail)
        assert run(*command(tiny_bundle, source, output)) == 2
    assert "the device is gone" in capsys.readouterr().err
    assert contents(output).keys() == undisturbed[0].keys() - {"_SUCCESS", "part-00000-00007.parquet"}
    assert not list(output.glob(".*"))
    assert run(*command(tiny_bundle, source, output)) == 0
    assert contents(output) == undisturbed[0]
