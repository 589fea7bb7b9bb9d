"""Runs that hold questions out, and what console, report and model card say of their figures."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.reader import read_examples
from training import finetune, report
from training.report import make_title, wilson_interval, worst_examples
from training.settings import FinetuneConfig
from training.starter.sample import generate


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "to_png", lambda figure: b"PNG")
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """30 questions of `sample` on some passages, as SQuAD JSON."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(generate("train", questions=30)))
    return path


@pytest.fixture(scope="module")
def options(tiny_model_dir):
    return ["--model", tiny_model_dir, "--max-steps", 1, "--batch-size", 2, "--max-new-tokens", 2]


@pytest.fixture(scope="module")
def held(options, rows, tmp_path_factory):
    output = tmp_path_factory.mktemp("held") / "model"
    assert run_finetune(*options, "--train", rows, "--output", output) == 0
    return output


def test_a_tenth_of_the_passages_is_held_out_by_default_and_written_as_rows(held, rows):
    heldout, examples = read_examples(str(held / "heldout.jsonl")), read_examples(str(rows))
    assert set(heldout) < set(examples)
    passages = {example.context for example in heldout}
    assert {example for example in examples if example.context in passages} == set(heldout)
    metrics = json.loads((held / "metrics.json").read_text())
    assert metrics["eval_questions"] == len(heldout) >= 3
    assert metrics["eval_passages"] == len(passages)
    assert metrics["train_questions"] == len(examples) - len(heldout)
    assert json.loads((held / "predictions.json").read_text()).keys() == {example.id for example in heldout}
    assert json.loads((held / "training_config.json").read_text())["eval"] == "10%"


def test_report_and_card_say_what_the_figures_stand_on(held, rows):
    metrics = json.loads((held / "metrics.json").read_text())
    for name in ("report.md", "README.md"):
        text = (held / name).read_text()
        counts = f"{metrics['eval_questions']} questions about {metrics['eval_passages']} passages"
        assert f"on {counts} of 10% of the questions, held out by passage" in text
        assert "95 % confidence" in text
        assert "Wilson" in text
        assert f"None of the {metrics['eval_questions']} questions to evaluate is about a passage" in text
        assert f"for question answering, fine-tuned on {rows.name}" in text
    card = ModelCard((held / "README.md").read_text())
    assert card.data.eval_results[0].dataset_name == "10% of the questions, held out by passage"
    assert "`heldout.jsonl`" in card.text


def test_the_console_says_what_is_held_out(options, rows, tmp_path, capsys):
    assert run_finetune(*options, "--train", rows, "--eval", "40%", "--output", tmp_path / "out", "--dry-run") == 0
    captured = capsys.readouterr()
    assert re.search(
        r"evaluating on 40% of the questions, held out by passage: 1\d questions about \d passages\n", captured.err
    )
    assert "warning" not in captured.err
    assert f"{rows.name}, without those held out: " in captured.out
    assert re.search(r"^40% of the questions, held out by passage: 1\d questions on \d passages", captured.out, re.M)
    assert "None of the 1" in captured.out


@pytest.mark.parametrize("format_name", ["same file", "jsonl with other ids"])
def test_overlap_is_warned_of_whatever_the_format(options, rows, tmp_path, capsys, format_name):
    place = rows
    if format_name != "same file":
        place = tmp_path / "other.jsonl"
        lines = [
            {"id": f"n{number}", "passage": f"  {example.context} ", "query": example.question.upper(), "reply": "x"}
            for number, example in enumerate(read_examples(str(rows)))
        ]
        lines[0]["query"] = "Another question?"
        place.write_text("\n".join(map(json.dumps, lines)))
    assert run_finetune(*options, "--train", rows, "--eval", place, "--output", tmp_path / "out") == 0
    same, others = (30, 0) if format_name == "same file" else (29, 1)
    sentence = (
        f"Of the 30 questions to evaluate, {same} are trained on and {others} others are about passages that are "
        "trained on."
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "Of the 30" in line]
    assert lines == [f"warning: {sentence} Scores are too high by that; --eval 10% holds out by passage"]
    for name in ("report.md", "README.md"):
        assert sentence in (tmp_path / "out" / name).read_text()
    assert not (tmp_path / "out" / "heldout.jsonl").exists()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["eval_questions_trained_on"], metrics["eval_questions_on_passages_trained_on"]) == (same, others)


@pytest.mark.parametrize("given", ["0%", "100%", "--eval=-5%", "abc%"])
def test_a_share_that_cannot_be_is_refused(options, rows, tmp_path, capsys, given):
    share = [given] if given.startswith("--") else ["--eval", given]
    assert run_finetune(*options, "--train", rows, *share, "--output", tmp_path / "out") == 2
    assert "expected a percentage of the questions above 0 % and below 100 %" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_passage_cannot_be_held_out(options, tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text("context,question,answer\n" + "".join(f"It is red.,Which color {n}?,red\n" for n in range(5)))
    assert run_finetune(*options, "--train", path, "--output", tmp_path / "out") == 2
    assert "all 5 questions are on one passage; expected at least two" in capsys.readouterr().err


def test_weights_and_limits_come_after_holding_out(options, rows, tmp_path):
    run = [*options, "--train", rows, "sample_v2", "--weights", 2, 0.001, "--eval", "0.2%", "--limit-eval", 2]
    assert run_finetune(*run, "--limit-train", 10, "--output", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["train_questions"], metrics["eval_questions"]) == (10, 2)
    heldout = read_examples(str(tmp_path / "out" / "heldout.jsonl"))
    assert len(heldout) > 2
    trained = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert len(trained["sha256_of_train"]) == 2
    assert metrics["eval_questions_trained_on"] == metrics["eval_questions_on_passages_trained_on"] == 0


class Killed(BaseException):
    """What a kill does: nothing but the files is left."""


def test_a_run_that_goes_on_holds_out_the_same_questions(options, rows, held, tmp_path, monkeypatch, capsys):
    def die(*_, **__):
        raise Killed

    run = [*options, "--train", rows, "--save-steps", 1, "--output", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "write_report", die)
        with pytest.raises(Killed):
            run_finetune(*run)
    assert run_finetune(*run, "--eval", "20%") == 2
    assert "sha256_of_train was" in capsys.readouterr().err
    assert run_finetune(*run, "--seed", 1) == 2
    assert run_finetune(*run) == 0
    assert (tmp_path / "out" / "heldout.jsonl").read_bytes() == (held / "heldout.jsonl").read_bytes()


def example(number, *golds):
    answers = tuple(GoldAnswer(text=text, start=0) for text in golds)
    return Example(id=str(number), title="", context="c", question=f"q{number}", answers=answers)


def test_the_worst_answers_are_wrong_ones():
    examples = [
        example(0, "a b"),
        example(1, "a b"),
        example(2, "a b"),
        example(3),
        example(4),
        example(5, "The"),
        example(6, "a b", "c"),
    ]
    answers = dict(zip(map(str, range(7)), ("A  b!", "b d", "x", "x", "", "the", "c"), strict=True))
    assert [(made.id, answer) for made, answer, _ in worst_examples(examples, answers)] == [
        ("2", "x"),
        ("3", "x"),
        ("1", "b d"),
    ]
    assert worst_examples(examples[:1], answers) == []


@pytest.mark.parametrize(
    ("percent", "total", "low", "high"),
    [
        (0, 10, 0, 27.75),
        (100, 10, 72.25, 100),
        (50, 100, 40.38, 59.62),
        (28.77, 1950, 26.81, 30.82),
        (100, 1, 20.65, 100),
    ],
)
def test_confidence_intervals_are_wilsons(percent, total, low, high):
    assert wilson_interval(percent, total) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    ("model", "train", "title"),
    [
        ("gpt2", ("squad",), "GPT-2 for question answering, fine-tuned on SQuAD"),
        ("starter", ("/home/me/my.csv",), "The starter GPT-2 for question answering, fine-tuned on my.csv"),
        ("/home/me/small", ("sample", "b/c.json"), "small for question answering, fine-tuned on sample and c.json"),
        ("o/gpt", tuple("abcde"), "gpt for question answering, fine-tuned on a, b, c and 2 more"),
    ],
)
def test_the_title_names_model_and_data_and_no_directory(tmp_path, model, train, title):
    assert make_title(FinetuneConfig.from_options({"model": model, "train": train, "output": tmp_path})) == title


def test_the_title_of_random_weights(tmp_path):
    config = FinetuneConfig.from_options(
        {"from_scratch": "gpt2", "tokenizer": "x", "train": ("squad_v2",), "output": tmp_path}
    )
    assert make_title(config) == "GPT-2 from random weights for question answering, fine-tuned on SQuAD v2.0"


def test_questions_without_an_answer_are_made_trained_on_and_counted(options, rows, tmp_path, capsys):
    run = [*options, "--train", rows, "--eval", "sample", "--limit-eval", 2, "--packing", "--no-answer-share", 0.5]
    assert run_finetune(*run, "--output", tmp_path / "dry", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "trained on: 30 questions, 0 of them without an answer, and 15 more without an answer" in output
    assert re.search(r"rows: \d+ with 45 questions", output)
    assert run_finetune(*run, "--output", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    names = ("train_questions", "train_questions_without_answer", "questions_made_without_answer")
    assert [metrics[name] for name in names] == [30, 0, 15]
    assert "and on 15 without an answer that were made of them" in (tmp_path / "out" / "report.md").read_text()


def test_questions_that_cannot_be_made_are_an_error(options, tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text("context,question,answer\n" + "".join(f"It is red.,Which color {n}?,red\n" for n in range(5)))
    run = [*options, "--train", path, "--eval", "sample", "--limit-eval", 2, "--output", tmp_path / "out"]
    assert run_finetune(*run, "--no-answer-share", 0.5) == 2
    assert "--no-answer-share 0.5: got 5 questions on 1 different passages" in capsys.readouterr().err
    assert run_finetune(*run, "--no-answer-share", 1) == 2
    assert "no_answer_share 1.0" in capsys.readouterr().err


def test_a_pair_that_does_not_fit_is_left_out(options, tmp_path):
    """A question may fit with its own short passage and leave no room for a window of another."""
    rows = [
        {"context": "It is red.", "question": "Which color " + "is it of them " * 32 + "?", "answer": "red"},
        {"context": " ".join(f"word{n}" for n in range(40)), "question": "Which word is second?", "answer": "word1"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = [*options, "--train", tmp_path / "rows.jsonl", "--eval", "sample", "--limit-eval", 2]
    assert run_finetune(*run, "--no-answer-share", 0.99, "--output", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["train_questions"], metrics["questions_made_without_answer"]) == (2, 1)


def test_a_question_held_out_that_cannot_fit_is_named_or_skipped(options, tmp_path, capsys):
    """It must not depend on the draw whether one that is too long can be left out."""
    lines = [
        {"id": f"x{n}", "context": f"Mara {n} lives.", "question": "why " * 300 + "?", "answer": "Mara"}
        for n in range(20)
    ]
    fine = [{"id": f"y{n}", "context": f"Mara {n} dies.", "question": "Who?", "answer": "Mara"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines + fine)))
    run = [*options, "--train", tmp_path / "rows.jsonl", "--eval", "50%", "--output", tmp_path / "out"]
    assert run_finetune(*run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"question x\d+ has \d+ tokens.* \d+ of 20, with --skip-bad-rows$", error)
    assert run_finetune(*run, "--skip-bad-rows") == 0
    assert "skipped 20 questions that do not fit" in capsys.readouterr().err
    heldout = read_examples(str(tmp_path / "out" / "heldout.jsonl"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {example.question for example in heldout} == {"Who?"}
    assert metrics["train_questions"] + metrics["eval_questions"] == 20
    assert metrics["eval_questions"] == len(heldout) > 3
