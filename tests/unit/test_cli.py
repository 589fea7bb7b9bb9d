from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import CONTEXT, echo_answerer, manifest_fields, squad_data, write_json

from qa_onnx import Answer, EngineConfig, InvalidInputError, cli
from qa_onnx.bundle import Bundle, write_manifest
from qa_onnx.evaluation.predictions import read_answers
from qa_onnx.files import write_file
from qa_onnx.progress import Progress


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with a file for each of the cases."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "data.json", squad_data())
    write_json(tmp_path / "predictions.json", {"q1": "the Rollo", "q2": "Normandy", "q3": ""})
    write_json(tmp_path / "some.json", {"q1": "Rollo", "other": "x"})
    write_json(tmp_path / "list.json", [])
    (tmp_path / "cut.json").write_text('{"data": [')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "context.txt").write_text(CONTEXT)
    (tmp_path / "empty").mkdir()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("model.onnx", "model.kernels.onnx", "cache_copy.onnx", "tokenizer.json", "config.json"):
        (bundle / name).write_text(name)
    write_manifest(bundle, manifest_fields())
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """Loading any bundle gives an answerer that answers with the question; what was asked for is noted."""
    calls = []

    class Loader:
        @staticmethod
        def from_pretrained(path, **options):
            calls.append({"path": str(path), **options})
            return echo_answerer()

    monkeypatch.setattr(cli, "Answerer", Loader)
    return calls


def run(capsys, command):
    status = cli.main(command.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


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
    status, out, err = run(capsys, "calibrate --model bundle --data data.json")
    assert (status, err) == (0, "")
    kept = json.loads(out)["no_answer"]
    assert (kept["questions"], kept["without_answer"], kept["source"]) == (3, 1, "data.json")
    assert kept["pairs_made"] is False
    assert Bundle.open("bundle").manifest.no_answer == kept
    assert Bundle.open("bundle").manifest.no_answer_threshold == kept["threshold"] >= kept["best_f1_thresh"]
    assert list(files.glob("bundle/*.partial")) == []


def test_a_calibration_needs_answers_and_two_passages(files, loaded, capsys):
    rows_file(files / "none.jsonl", {"context": CONTEXT, "question": "Who?", "answers": None})
    rows_file(files / "one.jsonl", {"context": CONTEXT, "question": "Who?", "answers": "Rollo"})
    before = (files / "bundle/qa_onnx.json").read_bytes()
    for name, message in (("none", "none of 1 questions has an answer"), ("one", "expected at least two passages")):
        status, out, err = run(capsys, f"calibrate --model bundle --data {name}.jsonl")
        assert (status, out, message in err, err.count("\n")) == (2, "", True, 1)
    assert (files / "bundle/qa_onnx.json").read_bytes() == before


def test_generation_options_reach_the_answerer(files, loaded, capsys):
    command = "answer --model bundle --question Normans --context @context.txt --extractive --num-answers 2"
    _, out, _ = run(capsys, command)
    first, second = out.splitlines()
    assert re.fullmatch(r"1\. Normans  \(score 0\.\d\d\)", first)
    assert re.fullmatch(r"2\. .+  \(score 0\.\d\d\)", second)
    options = "--temperature 1 --top-k 5 --top-p 0.9 --seed 3 --no-repeat-ngram-size 2 --no-answer-threshold 1"
    command = f"answer --model bundle --question Normans --context @context.txt {options} --stride 9"
    assert run(capsys, command)[0] == 0


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


@pytest.mark.parametrize("context", ["@context.txt", "Rollo"])
def test_answer_prints_the_text(files, loaded, capsys, context):
    status, out, err = run(capsys, f"answer --model bundle --question Who? --context {context}")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"Who\?  \(score [01]\.\d\d\)\n", out)


def test_answer_reads_the_file_after_the_at_sign(files, loaded, capsys):
    _, from_file, _ = run(capsys, "answer --model bundle --question Who? --context @context.txt --json")
    cli.main(["answer", "--model", "bundle", "--question", "Who?", "--context", CONTEXT, "--json"])
    assert json.loads(from_file) == json.loads(capsys.readouterr().out)


def test_answer_prints_the_whole_answer_as_json(files, loaded, capsys):
    _, out, _ = run(capsys, "answer --model bundle --question Who_was_it? --context Rollo --json --max-new-tokens 2")
    answer = json.loads(out)
    assert answer.keys() == {field.name for field in dataclasses.fields(Answer)} | {"new_tokens"}
    assert (answer["new_tokens"], answer["finish_reason"]) == (2, "length")


def test_options_reach_the_answerer(files, loaded, capsys):
    run(capsys, "answer --model bundle --question Who? --context Rollo --provider cpu --threads 2 --device-id 1")
    run(capsys, "answer --model bundle --question Who? --context Rollo")
    assert loaded == [
        {"path": "bundle", "provider": "cpu", "config": EngineConfig(threads=2, device_id=1)},
        {"path": "bundle", "provider": "auto", "config": EngineConfig()},
    ]


@pytest.mark.parametrize(("limit", "ids"), [("", ["q1", "q2", "q3"]), ("--limit 2", ["q1", "q2"])])
def test_predict_writes_the_official_format(files, loaded, capsys, limit, ids):
    command = f"predict --model bundle --data data.json --output out.json --batch-size 2 {limit}"
    assert run(capsys, command) == (0, f"wrote {len(ids)} answers to out.json\n", "")
    assert [call["config"] for call in loaded] == [EngineConfig(batch_size=2)]
    questions = {"q1": "Who led the Normans?", "q2": "Where did they settle?", "q3": "Why?"}
    assert json.loads((files / "out.json").read_text("utf-8")) == {name: questions[name] for name in ids}
    assert list(files.glob("*.partial")) == []


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


ANSWER, PREDICT = "answer --model bundle --question Who?", "predict --model bundle --data data.json"
EVALUATE = "evaluate --data data.json --predictions predictions.json"


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


def test_a_context_file_without_text_is_bad_input(files, loaded, capsys):
    (files / "blank.txt").write_text(" \n")
    status, out, err = run(capsys, f"{ANSWER} --context @blank.txt")
    assert (status, out) == (2, "")
    assert err.startswith("error: context 0 is empty or only white space")
    assert err.count("\n") == 1


def test_an_error_stays_one_line_whatever_is_in_it(files, capsys):
    values = json.loads((files / "bundle" / "qa_onnx.json").read_text("utf-8"))
    values["files"]["two\nlines"] = {"bytes": 1, "sha256": ""}
    write_json(files / "bundle" / "qa_onnx.json", values)
    status, _, err = run(capsys, "info --model bundle")
    assert (status, err.count("\n")) == (2, 1)


def test_a_file_that_cannot_be_written_is_named(files, loaded, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = run(capsys, f"{PREDICT} --output out.json")
    assert status == 2
    assert err.startswith("error: out.json: cannot be written")
    assert err.count("\n") == 1


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


@pytest.mark.parametrize(
    ("value", "context"),
    [("-", "In 1803.\r\n"), ("@-", "In 1803.\r\n"), ("@@nasa", "@nasa"), ("@@", "@"), ("@crlf.txt", "one\r\n")],
)
def test_a_context_from_standard_input_a_file_or_the_command_line(files, capsys, monkeypatch, value, context):
    asked = []

    class Asked:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def answer_batch(self, questions, contexts, *, config):
            asked.append(contexts)
            return echo_answerer().answer_batch(questions, contexts, config=config)

    monkeypatch.setattr(cli, "_load", lambda arguments: Asked())
    (files / "crlf.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfIn 1803.\r\n")))
    assert run(capsys, f"answer --model bundle --question Rollo --context {value}")[0] == 0
    assert asked == [context]


def test_offsets_refer_to_the_text_as_decoded(files, loaded, capsys):
    (files / "crlf.txt").write_bytes("\ufeffÉlan.\r\nThe Normans were led by\r\nRollo.\r\n".encode())
    status, out, _ = run(capsys, "answer --model bundle --question Rollo --context @crlf.txt --extractive --json")
    answer = json.loads(out)
    assert (status, answer["text"]) == (0, "Rollo")
    assert "Élan.\r\nThe Normans were led by\r\nRollo.\r\n"[answer["start"] : answer["end"]] == "Rollo"


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


def test_answers_with_every_kind_of_line_separator_are_read_again(files, capsys):
    text = "a\u2028b\x85c\x0bd\x0ce"
    answer = {"id": "q1", "text": text, "score": 0.5, "no_answer_probability": 0.1, "windows": 1}
    write_file(files / "answers.jsonl", json.dumps(answer, ensure_ascii=False) + "\n")
    assert read_answers(files / "answers.jsonl") == {"q1": answer}
    write_file(files / "answers.jsonl", json.dumps(answer) + "\n\n")
    assert run(capsys, "evaluate --data data.json --answers answers.jsonl")[0] == 2


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

    monkeypatch.setattr(cli, "write_file", fail)
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


@pytest.mark.parametrize("context", ["-", "@-"])
def test_a_closed_standard_input_is_one_line(files, loaded, capsys, monkeypatch, context):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(capsys, f"{ANSWER} --context {context}")
    assert (status, err) == (
        2,
        "error: standard input is closed; expected a text there, or --context TEXT or @FILE\n",
    )


def answer(capsys, *arguments):
    status = cli.main(["answer", "--model", "bundle", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SCORE = r"  \(score [01]\.\d\d\)\n"


def test_several_questions_are_shown_with_their_answers(files, loaded, capsys):
    asked = ["--question", "Who led\nthem?", "--question", "Where?"]
    status, out, err = answer(capsys, *asked, "--context", CONTEXT)
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"Who led them\?\n  Who led them\?{SCORE}Where\?\n  Where\?{SCORE}", out)
    _, out, _ = answer(capsys, *asked, "--context", CONTEXT, "--num-answers", "2", "--extractive")
    assert [line[:5] for line in out.splitlines() if line.startswith(" ")] == ["  1. ", "  2. "] * 2
    status, out, _ = answer(capsys, *asked, "--context", CONTEXT, "--json")
    assert (status, [json.loads(line)["text"] for line in out.splitlines()]) == (0, ["Who led\nthem?", "Where?"])


def test_where_there_is_no_answer_the_output_says_so(files, loaded, capsys):
    options = ["--extractive", "--no-answer-threshold", "0"]
    status, out, _ = answer(capsys, "--question", "Rollo", "--context", CONTEXT, *options)
    assert status == 0
    assert re.fullmatch(rf"\(no answer\){SCORE}", out)


@pytest.mark.parametrize(
    "content",
    [
        "Who?\nWhere did they settle?\n",
        "\ufeffWho?\r\n\r\n  Where did they settle? \r\n",
        "\n\nWho?\rWhere did they settle?",
    ],
)
@pytest.mark.parametrize("name", ["questions.txt", "-"])
def test_a_file_of_questions_has_one_in_each_line_that_is_not_blank(files, loaded, capsys, monkeypatch, content, name):
    (files / "questions.txt").write_bytes(content.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    status, out, err = answer(capsys, "--questions", name, "--context", "@context.txt", "--json")
    assert (status, err) == (0, "")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["Who?", "Where did they settle?"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--questions", "blank.txt"), "--questions blank.txt: has no questions; expected one in each line"),
        (("--questions", "void.txt"), "--questions void.txt: has no questions"),
        (("--questions", "latin.txt"), "--questions latin.txt: byte 3 is not UTF-8"),
        (("--questions", "nowhere.txt"), "--questions nowhere.txt: cannot be read (No such file"),
        (("--questions", "empty"), "--questions empty: cannot be read (Is a directory)"),
        (("--questions", "-"), "standard input is closed; expected a question in each line"),
        (("--questions", "-", "--context", "-"), "--questions - and --context - both read standard input"),
        (("--questions", "-", "--context", "@-"), "--questions - and --context - both read standard input"),
        (("--question", "Who?", "--context", "context.txt"), "write --context @context.txt, "),
        (("--question", "Who?", "--context", "./context.txt"), "write --context @./context.txt, "),
        (("--question", "Who?", "--context", "bundle/config.json"), "is the name of a file; expected a text."),
        (("--question", "Who?", "--context", "manuel.txt"), "manuel.txt looks like a file, and there is none"),
        (("--question", "Who?", "--context", "@empty"), "--context @empty: cannot be read (Is a directory)"),
    ],
)
def test_what_is_no_question_and_no_context_is_refused(files, loaded, capsys, monkeypatch, arguments, words):
    (files / "blank.txt").write_text(" \n\r\n\n")
    (files / "void.txt").write_text("")
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = answer(capsys, "--context", "Rollo.", *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("context", [" context.txt", "empty", "context.txt\n", "x" * 5000, "nul\0.txt", "context"])
def test_a_context_that_is_no_name_of_a_file_is_text(files, loaded, capsys, context):
    assert answer(capsys, "--question", "Who?", "--context", context)[0] == 0


@pytest.mark.parametrize("given", [[], ["--question", "a", "--questions", "b"]])
def test_questions_are_given_in_one_way(files, loaded, capsys, given):
    with pytest.raises(SystemExit) as caught:
        answer(capsys, *given, "--context", "Rollo.")
    assert caught.value.code == 2


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_several_files_are_answered_and_evaluated_together(files, loaded, capsys):
    row = {"context": CONTEXT, "question": "Who?", "answers": "Rollo"}
    for name in ("a.jsonl", "b.jsonl"):
        rows_file(files / name, row)
    assert run(capsys, "predict --model bundle --data a.jsonl b.jsonl data.json --output out.json")[0] == 0
    ids = ["a.jsonl: line 1", "b.jsonl: line 1", "q1", "q2", "q3"]
    assert list(json.loads((files / "out.json").read_text())) == ids
    status, out, err = run(capsys, "evaluate --data data.json ./a.jsonl b.jsonl --predictions out.json")
    assert (status, err, json.loads(out.splitlines()[-1])["total"]) == (0, "", 5)
    status, out, _ = run(capsys, "calibrate --model bundle --data a.jsonl data.json")
    kept = json.loads(out)["no_answer"]
    assert (status, kept["source"], kept["questions"]) == (0, "a.jsonl, data.json", 4)


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
    rows_file(files / "rows.jsonl", *[BAD] * 7, GOOD, GOOD | {"answers": None})
    status, out, err = run(capsys, f"{command} --data rows.jsonl")
    assert (status, out) == (2, "")
    assert err == (
        "error: rows.jsonl: line 1: question: got an empty string; expected some text (7 of 9 rows are bad). Mend it, "
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
