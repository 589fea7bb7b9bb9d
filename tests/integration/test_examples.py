"""The programs in `examples/` run, and do what their docstrings say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from qa_onnx.data.reader import read_examples
from tests.conftest import ROOT


@pytest.fixture
def examples(heldout_file):
    return read_examples(heldout_file)[:12]


def run(name, *arguments, given=""):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("encoding", "separator", "header"),
    [("utf-8", ",", ["id", "question", "context"]), ("utf-8-sig", ";", ["No, of text", "Query", "PASSAGE"])],
)
def test_a_csv_file_gets_answers_that_are_in_its_contexts(
    starter_bundle, examples, tmp_path, encoding, separator, header
):
    with (tmp_path / "questions.csv").open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(header)
        writer.writerows([example.id, example.question, example.context] for example in examples)
    run("answer_csv.py", starter_bundle, tmp_path / "questions.csv", tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=separator))
    assert [row[header[0]] for row in rows] == [example.id for example in examples]
    for row, example in zip(rows, examples, strict=True):
        assert example.context[int(row["start"]) : int(row["end"])] == row["answer"] != ""
        assert 0 <= float(row["score"]) <= 1


def test_the_worker_answers_each_line_and_tells_of_bad_ones(starter_bundle, examples):
    lines = [{"id": example.id, "question": example.question, "context": example.context} for example in examples]
    lines[0] = {"id": examples[0].id, "Query": examples[0].question, "passage": examples[0].context}
    lines.append({"id": "bad", "question": "", "context": "Rollo."})
    lines.append({"id": "other", "ask": "Who?", "context": "Rollo."})
    out = run("async_worker.py", starter_bundle, given="".join(json.dumps(line) + "\n" for line in lines))
    replies = {reply["id"]: reply for reply in map(json.loads, out.splitlines())}
    assert replies.keys() == {line["id"] for line in lines}
    assert "question 0 is empty" in replies["bad"]["error"]
    assert "no column 'question' among 'id', 'ask', 'context'; expected it ('ask' may" in replies["other"]["error"]
    assert all("score" in replies[example.id] for example in examples)


def test_a_document_of_several_windows_is_explored(starter_bundle, examples, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(example.context for example in examples) * 4, encoding="utf-8")
    out = run("explore_document.py", starter_bundle, path, examples[0].question, "Who?")
    assert out.count("%") == 6
    assert f"{examples[0].question}  (1 windows)" not in out
    assert "windows)" in out
