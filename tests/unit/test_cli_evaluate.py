"""The commands `evaluate` and `calibrate`."""

from __future__ import annotations

import json

import pytest
from command_line import EVALUATE, rows_file, rows_to_calibrate, run
from fakes import CONTEXT

from qa_onnx import cli
from qa_onnx.bundle import Bundle
from qa_onnx.evaluation.predictions import read_answers
from qa_onnx.files import write_file


def test_evaluate_ends_with_one_line_of_json(files, capsys):
    status, out, err = run(capsys, "evaluate --data data.json --predictions predictions.json")
    scores = json.loads(out.splitlines()[-1])
    assert (status, err) == (0, "")
    f1 = 100 * (2 + 2 / 3) / 3
    assert {name: scores[name] for name in ("exact_match", "f1", "total")} == {
        "exact_match": pytest.approx(200 / 3),
        "f1": pytest.approx(f1),
        "total": 3,
    }
    assert (scores["HasAns_exact"], scores["HasAns_total"]) == (50.0, 2)
    assert (scores["NoAns_exact"], scores["NoAns_f1"], scores["NoAns_total"]) == (100.0, 100.0, 1)


def test_evaluate_prints_a_table_by_groups(files, capsys):
    _, out, _ = run(capsys, "evaluate --data data.json --predictions predictions.json")
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines()[:-1]}
    assert rows["1 word"] == ["1", "100.00", "100.00"]
    assert rows["2 words"][:2] == ["1", "0.00"]
    assert rows["no answer"] == ["1", "100.00", "100.00"]
    assert rows["who"] == ["1", "100.00", "100.00"]
    assert "windows" not in rows


def test_evaluate_reads_whole_answers_and_writes_the_worst_and_a_plot(files, loaded, capsys):
    pytest.importorskip("matplotlib")
    run(capsys, "predict --model bundle --data data.json --output out.json --answers answers.jsonl")
    command = "evaluate --data data.json --answers answers.jsonl --worst worst.jsonl --worst-limit 2 --plot plot.png"
    status, out, err = run(capsys, command)
    assert (status, err) == (0, "")
    scores = json.loads(out.splitlines()[-1])
    assert scores["best_exact"] == pytest.approx(100 / 3)
    assert 0 < scores["best_f1_thresh"] < 1e-3
    assert "windows" in out
    worst = [json.loads(line) for line in (files / "worst.jsonl").read_text("utf-8").splitlines()]
    assert [sorted(case) for case in worst] == [["answer", "f1", "gold", "id", "passage", "question", "score"]] * 2
    assert worst[0]["f1"] <= worst[1]["f1"] < 1
    assert (files / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_keeps_the_best_threshold_in_the_bundle(files, loaded, capsys):
    rows_to_calibrate(files / "own.jsonl")
    status, out, err = run(capsys, "calibrate --model bundle --data own.jsonl")
    assert (status, err) == (0, "")
    kept = json.loads(out)["no_answer"]
    assert (kept["questions"], kept["without_answer"], kept["source"]) == (20, 5, "own.jsonl")
    assert kept["pairs_made"] is False
    assert Bundle.open("bundle").manifest.no_answer == kept
    assert Bundle.open("bundle").manifest.no_answer_threshold == kept["threshold"] >= kept["best_f1_thresh"]
    assert list(files.glob("bundle/*.partial")) == []


def test_a_calibration_needs_answers_two_passages_and_twenty_questions(files, loaded, capsys):
    rows_file(files / "none.jsonl", {"context": CONTEXT, "question": "Who?", "answers": None})
    rows_file(files / "one.jsonl", *[{"context": CONTEXT, "question": "Who?", "answers": "Rollo"}] * 20)
    rows_to_calibrate(files / "few.jsonl", 19)
    before = (files / "bundle/qa_onnx.json").read_bytes()
    for name, message in (
        ("none", "none of 1 questions has an answer"),
        ("one", "expected at least two passages"),
        ("few", "got 19 questions; expected at least 20"),
    ):
        status, out, err = run(capsys, f"calibrate --model bundle --data {name}.jsonl")
        assert (status, out, message in err, err.count("\n")) == (2, "", True, 1)
    assert (files / "bundle/qa_onnx.json").read_bytes() == before


def test_evaluate_scores_the_questions_that_were_asked_and_all_only_when_told(files, capsys):
    status, out, err = run(capsys, "evaluate --data data.json --predictions some.json")
    assert status == 0
    assert json.loads(out.splitlines()[-1]) == {"exact_match": 100, "f1": 100, "total": 1, "questions_in_data": 3}
    assert "scored 1 of 3 questions: the others have no prediction; --all counts them as wrong\n" in err
    assert "1 predictions are of questions that are not in data.json" in err
    assert "no answer" not in out
    status, out, err = run(capsys, "evaluate --data data.json --predictions some.json --all")
    scores = json.loads(out.splitlines()[-1])
    assert (status, scores["total"], scores["exact_match"]) == (0, 3, pytest.approx(100 / 3))
    assert (scores["questions_in_data"], scores["NoAns_exact"]) == (3, 0)
    assert "2 of 3 questions have no prediction and score 0" in err


def test_evaluate_says_the_same_with_all_when_nothing_is_missing(files, capsys):
    assert run(capsys, EVALUATE) == run(capsys, f"{EVALUATE} --all")
    assert "questions_in_data" not in run(capsys, EVALUATE)[1]


def test_answers_with_every_kind_of_line_separator_are_read_again(files, capsys):
    text = "a\u2028b\x85c\x0bd\x0ce"
    answer = {"id": "q1", "text": text, "score": 0.5, "no_answer_probability": 0.1, "windows": 1}
    write_file(files / "answers.jsonl", json.dumps(answer, ensure_ascii=False) + "\n")
    assert read_answers(files / "answers.jsonl") == {"q1": answer}
    write_file(files / "answers.jsonl", json.dumps(answer) + "\n\n")
    assert run(capsys, "evaluate --data data.json --answers answers.jsonl")[0] == 2


def answer(capsys, *arguments):
    status = cli.main(["answer", "--model", "bundle", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_several_files_are_answered_and_evaluated_together(files, loaded, capsys):
    row = {"context": CONTEXT, "question": "Who?", "answers": "Rollo"}
    for name in ("a.jsonl", "b.jsonl"):
        rows_file(files / name, row)
    assert run(capsys, "predict --model bundle --data a.jsonl b.jsonl data.json --output out.json")[0] == 0
    ids = ["a.jsonl: line 1", "b.jsonl: line 1", "q1", "q2", "q3"]
    assert list(json.loads((files / "out.json").read_text())) == ids
    status, out, err = run(capsys, "evaluate --data data.json ./a.jsonl b.jsonl --predictions out.json")
    assert (status, err, json.loads(out.splitlines()[-1])["total"]) == (0, "", 5)
    rows_to_calibrate(files / "b.jsonl")
    status, out, _ = run(capsys, "calibrate --model bundle --data a.jsonl b.jsonl")
    kept = json.loads(out)["no_answer"]
    assert (status, kept["source"], kept["questions"]) == (0, "a.jsonl, b.jsonl", 21)
