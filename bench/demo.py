"""The whole path on the embedded model and data: `make demo`.

Runs the project's own commands, prints each before it runs, and ends with one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from qa_onnx import Answerer
from qa_onnx.bundle import MANIFEST_NAME
from qa_onnx.cli import EXIT_BAD_INPUT
from qa_onnx.data.reader import read_examples

DESCRIPTION = "Fine-tunes the embedded model, exports it and answers with it, in a few minutes. Writes to runs/demo."
DIRECTORY = Path("runs/demo")
MODEL, BUNDLE = DIRECTORY / "model", DIRECTORY / "bundle"
HELDOUT, ACCURACY = DIRECTORY / "heldout.json", DIRECTORY / "accuracy.json"
TRAIN_QUESTIONS = 8_000
SHOWN = 6

COMMANDS = (
    f"-m training.starter.sample --split heldout --output {HELDOUT}",
    f"-m training.finetune --model starter --train sample --eval {HELDOUT} --output {MODEL} --limit-train "
    f"{TRAIN_QUESTIONS} --epochs 1 --eval-at-start",
    f"-m export.to_onnx --model {MODEL} --output {BUNDLE} --verify {HELDOUT}",
    f"-m bench.accuracy --model {BUNDLE} --torch {MODEL} --data {HELDOUT} --output {ACCURACY}",
)


def run(command: str) -> None:
    """Prints a command as a user would type it and runs it; a failure ends the demo with its exit status."""
    print(f"\n$ python {command}", flush=True)
    status = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Runs the demo."""
    argparse.ArgumentParser(prog="python -m bench.demo", description=DESCRIPTION).parse_args()
    started = time.monotonic()
    for path, marker in ((MODEL, "training_config.json"), (BUNDLE, MANIFEST_NAME)):
        if path.exists():
            if not (path / marker).is_file():
                sys.stderr.write(f"error: {path} is not of an earlier demo ({marker} is missing); move it away\n")
                sys.exit(EXIT_BAD_INPUT)
            shutil.rmtree(path)
    for command in COMMANDS:
        run(command)

    print("\nAnswers to questions on contexts that the model has never seen:")
    examples = read_examples(HELDOUT)[:: 400 // SHOWN][:SHOWN]
    with Answerer.from_pretrained(BUNDLE) as answerer:
        answers = answerer.answer_batch([e.question for e in examples], [e.context for e in examples])
    for example, answer in zip(examples, answers, strict=True):
        print(f"\n  {example.context}\n  Q: {example.question}\n  A: {answer.text}   (gold: {example.answers[0].text})")

    before, *_, after = json.loads((MODEL / "metrics.json").read_text(encoding="utf-8"))["evaluations"]
    accuracy = json.loads(ACCURACY.read_text(encoding="utf-8"))
    print(f"\nmodel: {MODEL}   bundle: {BUNDLE}")
    print(
        f"exact match on held-out questions: {before['exact_match']:.1f} before fine-tuning, "
        f"{after['exact_match']:.1f} after"
    )
    summary = {
        "exact_match_before": before["exact_match"],
        "exact_match_after": accuracy["qa_onnx"]["exact_match"],
        "f1_after": accuracy["qa_onnx"]["f1"],
        "questions": accuracy["questions"],
        "texts_differing_from_torch": accuracy["texts_differing_from_torch"],
        "answers_per_second": accuracy["qa_onnx"]["answers_per_second"],
        "torch_answers_per_second": accuracy["torch"]["answers_per_second"],
        "seconds": time.monotonic() - started,
    }
    print(json.dumps({name: round(value, 2) for name, value in summary.items()}))


if __name__ == "__main__":
    main()
