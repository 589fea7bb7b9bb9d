"""The programs in `examples/` run, and do what their docstrings say."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def test_files_of_ray_data_with_and_without_errors_are_one_data_set(tiny_bundle, tmp_path, monkeypatch):
    """What an actor does, which needs no Ray; `tests/distributed` has the rest."""
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    spec = importlib.util.spec_from_file_location("ray_data_example", ROOT / "examples" / "ray_data.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    actor = example.AnswerAndKeep(str(tiny_bundle), Path(tmp_path), "id", max_new_tokens=4)
    context = "Ada crossed the bridge."
    for key, questions in (("a", ["Who?", "What?"]), ("b", ["Who?", None]), ("c", [None, " "])):
        ids = [f"{key}{row}" for row in range(2)]
        asked = pa.array(questions, pa.string())
        actor(pa.table({"id": ids, "question": asked, "context": [context] * 2}))
    files = sorted(map(str, tmp_path.glob("part-*.parquet")))
    schemas = {example.pq.read_schema(file).remove_metadata() for file in files}
    assert (len(files), len(schemas)) == (3, 1)
    rows = {row["id"]: row["error"] for row in example.pq.read_table(tmp_path).to_pylist()}
    assert {key for key, error in rows.items() if error} == {"b1", "c0", "c1"}
