"""The command `predict`: its output files, and the rows that it reads."""

from __future__ import annotations

import json
import os
import threading

import pytest
from command_line import EVALUATE, PREDICT, rows_file, run
from fakes import CONTEXT, write_json

from qa_onnx import EngineConfig, InvalidInputError, cli
from qa_onnx.cli import predict
from qa_onnx.progress import Progress


def test_evaluate_refuses_predictions_of_other_questions(files, capsys):
    write_json(files / "none.json", {"other": "x"})
    status, out, err = run(capsys, "evaluate --data data.json --predictions none.json")
    assert (status, out) == (2, "")
    assert err.startswith("error: none.json: has no prediction of the 3 questions in data.json; expected their ids")
    assert "'q1'" in err
    assert run(capsys, "evaluate --data data.json --predictions none.json --all")[0] == 0


def test_what_predict_limit_leaves_out_is_not_scored(files, loaded, capsys):
    assert run(capsys, f"{PREDICT} --limit 2 --output out.json --answers answers.jsonl")[0] == 0
    for given in ("--predictions out.json", "--answers answers.jsonl"):
        status, out, _ = run(capsys, f"evaluate --data data.json {given}")
        scores = json.loads(out.splitlines()[-1])
        assert (status, scores["total"], scores["questions_in_data"]) == (0, 2, 3)


@pytest.mark.parametrize(("limit", "ids"), [("", ["q1", "q2", "q3"]), ("--limit 2", ["q1", "q2"])])
def test_predict_writes_the_official_format(files, loaded, capsys, limit, ids):
    command = f"predict --model bundle --data data.json --output out.json --batch-size 2 {limit}"
    assert run(capsys, command) == (0, f"wrote {len(ids)} answers to out.json\n", "")
    assert [call["config"] for call in loaded] == [EngineConfig(batch_size=2)]
    questions = {"q1": "Who led the Normans?", "q2": "Where did they settle?", "q3": "Why?"}
    assert json.loads((files / "out.json").read_text("utf-8")) == {name: questions[name] for name in ids}
    assert list(files.glob("*.partial")) == []


def test_a_file_that_cannot_be_written_is_named(files, loaded, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run(capsys, f"{PREDICT} --output out.json")
    assert status == 2
    assert err.startswith("error: out.json: cannot be written")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--output data.json", "--output data.json is the same file as --data"),
        ("--output link.json", "--output link.json is the same file as --data"),
        ("--output out.json --answers data.json", "--answers data.json is the same file as --data"),
        ("--output out.json --answers ./out.json", "is the same file as --output"),
        ("--output bundle/config.json", "--output bundle/config.json is the same file as --model bundle/config.json"),
        ("--output out.json --answers bundle/qa_onnx.json", "is the same file as --model bundle/qa_onnx.json"),
    ],
)
def test_an_output_is_not_an_input_or_another_output(files, loaded, capsys, options, words):
    (files / "link.json").symlink_to("data.json")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    status, out, err = run(capsys, f"{PREDICT} {options}")
    assert (status, out) == (2, "")
    assert words in err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    assert loaded == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--answers answers.jsonl --worst data.json", "--worst data.json is the same file as --data"),
        ("--answers answers.jsonl --worst answers.jsonl", "--worst answers.jsonl is the same file as --answers"),
        ("--predictions predictions.json --worst ./predictions.json", "is the same file as --predictions"),
        ("--answers answers.jsonl --plot link.json", "--plot link.json is the same file as --data"),
        ("--answers answers.jsonl --worst out --plot out", "--plot out is the same file as --worst"),
    ],
)
def test_evaluate_writes_over_no_input_and_no_other_output(files, capsys, options, words):
    (files / "link.json").symlink_to("data.json")
    (files / "answers.jsonl").write_text("")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    status, out, err = run(capsys, f"evaluate --data data.json {options}")
    assert (status, out) == (2, "")
    assert words in err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_predict_and_evaluate_follow_links_and_write_to_pipes(files, loaded, capsys):
    """A link, a pipe and the modes of files stay as they are."""
    (files / "kept.json").write_text("before")
    (files / "kept.json").chmod(0o604)
    (files / "link.json").symlink_to("kept.json")
    received = []
    for name, options in (("answers", f"{PREDICT} --output link.json"), ("worst", EVALUATE)):
        os.mkfifo(files / name)
        reader = threading.Thread(target=lambda name=name: received.append((files / name).read_text()))
        reader.start()
        assert run(capsys, f"{options} --{name} {name}")[0] == 0
        reader.join(10)
        assert (files / name).is_fifo()
    assert [json.loads(line)["id"] for line in received[0].splitlines()] == ["q1", "q2", "q3"]
    assert json.loads(received[1])["id"] == "q2"
    assert (files / "link.json").is_symlink()
    assert list(json.loads((files / "kept.json").read_text())) == ["q1", "q2", "q3"]
    assert (files / "kept.json").stat().st_mode & 0o777 == 0o604


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.CSV", "rows.tsv"])
def test_predict_needs_no_gold_answers_and_evaluate_finds_the_ids_again(files, loaded, capsys, name):
    """Questions of any format without `answers`, with an integer id and with none."""
    rows = [{"id": 7, "context": CONTEXT, "question": "Rollo?"}, {"id": "", "context": CONTEXT, "question": "Normans?"}]
    separator = "\t" if name == "rows.tsv" else ","
    content = {
        "rows.json": json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": rows}]}]}),
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
    }.get(name) or "\n".join(
        separator.join(f'"{cell}"' for cell in cells) for cells in [rows[0], *map(dict.values, rows)]
    )
    (files / name).write_text(content)
    assert run(capsys, f"predict --model bundle --data {name} --output out.json")[0] == 0
    predictions = json.loads((files / "out.json").read_text())
    place = {"rows.json": "data[0].paragraphs[0].qas[1]", "rows.jsonl": "line 2"}.get(name, "line 3")
    assert predictions == {"7": "Rollo?", place: "Normans?"}
    status, _, err = run(capsys, f"evaluate --data {name} --predictions out.json")
    assert (status, "answers" in err, "Traceback" in err) == (2, True, False)


def test_what_predict_has_answered_is_kept_when_the_end_fails(files, loaded, capsys, monkeypatch):
    def fail(*_):
        raise InvalidInputError("out.json: cannot be written (No space left on device)")

    monkeypatch.setattr(predict, "write_file", fail)
    status, _, err = run(capsys, f"{PREDICT} --output out.json")
    assert status == 2
    assert err == (
        "error: out.json: cannot be written (No space left on device). "
        "What was computed before is in out.json.partial\n"
    )
    kept = [json.loads(line) for line in (files / "out.json.partial").read_text().splitlines()]
    assert sorted((answer["id"], answer["text"]) for answer in kept) == [
        ("q1", "Who led the Normans?"),
        ("q2", "Where did they settle?"),
        ("q3", "Why?"),
    ]
    assert not (files / "out.json").exists()


def test_what_predict_has_answered_is_kept_when_it_is_interrupted(files, loaded, capsys, monkeypatch):
    def interrupt(_, index, answer):
        calls.append((index, answer))
        if len(calls) == 2:
            raise KeyboardInterrupt

    calls = []
    monkeypatch.setattr(Progress, "advance", lambda bar, count: interrupt(bar, len(calls), count))
    status, _, err = run(capsys, f"{PREDICT} --output out.json")
    assert status == 130
    assert err == "interrupted. What was computed before is in out.json.partial\n"
    assert len((files / "out.json.partial").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_columns_of_other_names_are_named(files, loaded, capsys, name):
    row = {"no": "7", "body": CONTEXT, "ask": "Who led the Normans?", "reply": "Rollo"}
    if name.endswith("jsonl"):
        (files / name).write_text(json.dumps(row) + "\n")
    else:
        separator = "\t" if name.endswith("tsv") else ";"
        cells = [f'"{cell}"' for cell in row.values()]
        (files / name).write_text(f"{separator.join(row)}\n{separator.join(cells)}\n")
    status, _, err = run(capsys, f"predict --model bundle --data {name} --output out.json")
    assert status == 2
    assert "no column 'context' among 'no', 'body', 'ask', 'reply'" in err
    assert err.endswith("Pass --columns context=body question=ask\n")
    columns = "--columns context=body question=ask id=no"
    assert run(capsys, f"predict --model bundle --data {name} --output out.json {columns}")[0] == 0
    assert json.loads((files / "out.json").read_text()) == {"7": "Who led the Normans?"}
    status, out, _ = run(capsys, f"evaluate --data {name} --predictions out.json {columns}")
    assert (status, json.loads(out.splitlines()[-1])["total"]) == (0, 1)


@pytest.mark.parametrize("columns", ["context", "passage=x", "context=", "=x"])
def test_columns_have_the_form_field_and_name(files, capsys, columns):
    status, _, err = run(capsys, f"evaluate --data data.json --predictions predictions.json --columns {columns}")
    assert status == 2
    assert f"got column {columns!r}; expected FIELD=NAME, with a field of context, question" in err


@pytest.mark.parametrize("answers", ["out.json.partial", "./out.json.partial"])
def test_the_partial_file_is_no_output(files, loaded, capsys, answers):
    status, _, err = run(capsys, f"{PREDICT} --output out.json --answers {answers}")
    assert status == 2
    assert "the partial file of --output out.json.partial is the same file as --answers" in err
    assert not list(files.glob("out.json*"))


def answer(capsys, *arguments):
    status = cli.main(["answer", "--model", "bundle", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_no_output_is_one_of_several_inputs(files, loaded, capsys):
    rows_file(files / "b.jsonl", {"context": CONTEXT, "question": "Who?"})
    status, _, err = run(capsys, "predict --model bundle --data data.json b.jsonl --output b.jsonl")
    assert (status, "--output b.jsonl is the same file as --data b.jsonl" in err) == (2, True)


BAD = {"context": CONTEXT, "question": ""}


GOOD = {"context": CONTEXT, "question": "Who?", "answers": "Rollo"}


@pytest.mark.parametrize(
    "command",
    [
        "predict --model bundle --output out.json",
        "evaluate --predictions predictions.json --all",
        "calibrate --model bundle",
    ],
)
def test_bad_rows_are_skipped_only_when_asked_and_named(files, loaded, capsys, command):
    rows_file(files / "rows.jsonl", *[BAD] * 7, *[GOOD] * 20, GOOD | {"answers": None})
    status, out, err = run(capsys, f"{command} --data rows.jsonl")
    assert (status, out) == (2, "")
    assert err == (
        "error: rows.jsonl: line 1: question: got an empty string; expected some text (7 of 28 rows are bad). Mend it, "
        "or leave such rows out with --skip-bad-rows\n"
    )
    status, out, err = run(capsys, f"{command} --data rows.jsonl --skip-bad-rows")
    assert status == 0
    lines = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[2] for line in lines[:-1]] == [f"line {number}" for number in range(1, 6)]
    assert lines[-1] == "skipped: 2 more bad rows"


@pytest.mark.parametrize("option", ["", "--skip-bad-rows"])
def test_skipping_is_not_advised_where_every_row_is_bad(files, loaded, capsys, option):
    rows_file(files / "rows.jsonl", BAD, BAD)
    status, _, err = run(capsys, f"{PREDICT.replace('data.json', 'rows.jsonl')} --output out.json {option}")
    assert (status, err) == (
        2,
        "error: rows.jsonl: all 2 rows are bad, the first: line 1: question: got an empty string; expected some text\n",
    )
