"""The first day of a user: texts and a CSV file of their own, through every command, without SQuAD's JSON."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

TEXTS = {
    "bakery.txt": (
        "Holm Bakery is in the old harbour of Aldersund, next to the fish market. Ida Holm opened it in 1968, and her "
        "grandson Jonas runs it today. The oven burns birch wood and is lit at three in the morning. On Saturdays it "
        "sells rye bread for 42 crowns, and on other days wheat rolls for 9 crowns each. It is closed on Mondays."
    ),
    "ferry.txt": (
        "The ferry Maren crosses the Lyse fjord six times a day. It carries 34 cars and 180 passengers, and a crossing "
        "takes 25 minutes. The shipyard in Tresvik built it in 2003; its two engines run on natural gas. In winter the "
        "last ferry leaves at nine in the evening. Tickets are sold on board, and bicycles travel free of charge."
    ),
    "library.txt": (
        "The town library of Karsby has 61,000 books and a collection of sea charts. The architect Lena Brandt drew "
        "the building, which is made of red brick, and it opened in the spring of 1931. Members borrow twelve books "
        "for four weeks. The reading room is on the second floor, and the café at the entrance is run by volunteers."
    ),
}
QUESTIONS = {
    "bakery.txt": [
        ("Who opened Holm Bakery?", "Ida Holm"),
        ("When was the bakery opened?", "1968"),
        ("Who runs it today?", "Jonas"),
        ("What does the oven burn?", "birch wood"),
        ("How much is the rye bread?", "42 crowns"),
        ("When is the bakery closed?", "Mondays"),
        ("What is next to the bakery?", "the fish market"),
    ],
    "ferry.txt": [
        ("Which fjord does the ferry cross?", "the Lyse fjord"),
        ("How many cars does it carry?", "34"),
        ("How long does the crossing take?", "25 minutes"),
        ("Where was the ferry built?", "Tresvik"),
        ("When was it built?", "2003"),
        ("What do the engines run on?", "natural gas"),
        ("Where are tickets sold?", "on board"),
    ],
    "library.txt": [
        ("How many books does the library have?", "61,000"),
        ("Who drew the building?", "Lena Brandt"),
        ("What is the building made of?", "red brick"),
        ("When did the library open?", "the spring of 1931"),
        ("How many books may members borrow?", "twelve"),
        ("Who runs the café?", "volunteers"),
    ],
}
TRAINING = (
    *("-m", "training.finetune", "--model", "starter", "--train", "own.csv", "--eval", "20%", "--output", "model"),
    *("--max-steps", "16", "--batch-size", "4", "--save-steps", "2"),
)
SNIPPET = """
import sys
from pathlib import Path
from qa_onnx import Answerer, GenerationConfig

passage = Path("bakery.txt").read_text(encoding="utf-8")
with Answerer.from_pretrained("bundle") as answerer:
    for answer in answerer.answer_batch(
        ["Who opened Holm Bakery?", "What does the oven burn?"], passage, config=GenerationConfig(extractive=True)
    ):
        assert answer.text == passage[answer.start : answer.end]
        assert 0 <= answer.score <= 1
        print(answer.text)
assert not {"torch", "transformers", "datasets", "training", "export"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A directory with three texts, and 20 questions on them as a spreadsheet program saves them."""
    directory = tmp_path_factory.mktemp("desk")
    for name, text in TEXTS.items():
        (directory / name).write_text(text + "\n", encoding="utf-8")
    rows = [(TEXTS[name], *pair) for name, pairs in QUESTIONS.items() for pair in pairs]
    assert len(rows) == 20
    with (directory / "own.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Passage", "Question", "Answer"), *rows])
    return directory


def options(desk, output):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return {"cwd": desk, "env": environment, "stdout": output, "stderr": subprocess.STDOUT, "text": True}


def run(desk, *arguments, statuses=(0,)):
    """Runs a command in the directory; returns what it wrote, to standard error too."""
    given = options(desk, subprocess.PIPE)
    done = subprocess.run([sys.executable, *arguments], **given, check=False, timeout=600)
    assert done.returncode in statuses, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dry_run(desk):
    """What `--dry-run` says; it comes first, so that it finds no model and leaves none."""
    output = run(desk, *TRAINING, "--dry-run")
    assert not (desk / "model").exists()
    return output


@pytest.fixture(scope="module")
def model(desk, dry_run):
    """The model of a training that was interrupted after its first checkpoint, and started again."""
    directory = desk / "model"
    with (desk / "training.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, *TRAINING], **options(desk, log))
        while process.poll() is None and not list(directory.glob("checkpoint-*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        status = process.wait(600)
    said = (desk / "training.log").read_text(encoding="utf-8")
    assert status == 130, said
    assert "the same command resumes" in said
    assert not (directory / "metrics.json").exists()
    assert "resuming from model/checkpoint-" in run(desk, *TRAINING)
    return directory


@pytest.fixture(scope="module")
def bundle(desk, model):
    """Exported in int8, calibrated and checked on the own questions; 20 are too few to limit a loss of F1."""
    checks = ("--verify", "own.csv", "--max-f1-drop", "100")
    run(desk, "-m", "export.to_onnx", "--model", "model", "--output", "bundle", "--precision", "int8", *checks)
    return desk / "bundle"


def test_a_dry_run_counts_the_rows_of_the_csv_file(dry_run):
    counts = re.findall(r"^(own\.csv, without.*|20% of .*): (\d+) questions on (\d) passages", dry_run, re.M)
    assert [(name, passages) for name, _, passages in counts] == [
        ("own.csv, without those held out", "2"),
        ("20% of the questions, held out by passage", "1"),
    ]
    assert sum(int(questions) for _, questions, _ in counts) == 20


def test_training_holds_out_whole_passages_and_keeps_them(desk, model):
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["train_questions"] + metrics["eval_questions"] == 20
    heldout = [json.loads(line) for line in (model / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out_passages = {row["context"] for row in heldout}
    assert len(heldout) == metrics["eval_questions"]
    assert len(heldout) == sum(len(QUESTIONS[name]) for name, text in TEXTS.items() if text in held_out_passages)
    assert metrics["steps"] == 16
    assert (model / "report.md").is_file()


def test_the_bundle_is_compared_with_pytorch(desk, bundle, model):
    for data in ("own.csv", "model/heldout.jsonl"):
        arguments = ("--model", "bundle", "--torch", "model", "--data", data, "--output", "accuracy.json")
        run(desk, "-m", "bench.accuracy", *arguments, statuses=(0, 1))  # int8 may differ by more than a tie
        accuracy = json.loads((desk / "accuracy.json").read_text(encoding="utf-8"))
        assert accuracy["precision"] == "int8"
        assert accuracy["questions"] == (20 if data == "own.csv" else len((desk / data).read_text().splitlines()))


def test_the_bundle_answers_about_a_text_file(desk, bundle):
    questions = ("--question", "Who opened Holm Bakery?", "--question", "What does the oven burn?")
    asked = ("-m", "qa_onnx", "answer", "--model", "bundle", *questions, "--context", "@bakery.txt", "--extractive")
    answers = [json.loads(line) for line in run(desk, *asked, "--json").splitlines()]
    assert len(answers) == 2
    assert all(answer["text"] in TEXTS["bakery.txt"] for answer in answers)
    plain = run(desk, *asked)
    for text in ("Who opened Holm Bakery?", "What does the oven burn?", *(answer["text"] for answer in answers)):
        assert text in plain


def test_an_application_gets_the_same_answers(desk, bundle):
    asked = ("--question", "Who opened Holm Bakery?", "--context", "@bakery.txt", "--extractive", "--json")
    first = json.loads(run(desk, "-m", "qa_onnx", "answer", "--model", "bundle", *asked))["text"]
    assert run(desk, "-c", SNIPPET).splitlines()[0] == first


def test_the_csv_file_is_predicted_and_scored(desk, bundle):
    outputs = ("--output", "predictions.json", "--answers", "answers.jsonl")
    run(desk, "-m", "qa_onnx", "predict", "--model", "bundle", "--data", "own.csv", *outputs)
    predictions = json.loads((desk / "predictions.json").read_text(encoding="utf-8"))
    assert len(predictions) == 20
    assert len((desk / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 20
    for given in (("--predictions", "predictions.json"), ("--answers", "answers.jsonl")):
        scores = run(desk, "-m", "qa_onnx", "evaluate", "--data", "own.csv", *given)
        assert '"exact_match"' in scores
        assert "20" in scores


def test_the_starter_is_exported_and_compared_by_its_name(desk, starter_bundle):
    manifest = json.loads((starter_bundle / "qa_onnx.json").read_text(encoding="utf-8"))
    assert manifest["source_model"] == "starter"
    arguments = ("--model", str(starter_bundle), "--torch", "starter", "--data", "own.csv")
    assert "0 of 20 answers differ" in run(desk, "-m", "bench.accuracy", *arguments)


def test_a_bundle_says_what_it_is(desk, bundle):
    assert "int8" in run(desk, "-m", "qa_onnx", "info", "--model", "bundle")
