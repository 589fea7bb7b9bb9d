"""The whole path on the embedded model and data: `make demo`.

Runs the project's own commands, prints each before it runs, and says at the end what to type next.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qa_onnx import Answerer, GenerationConfig, InvalidInputError
from qa_onnx.cli import run_command
from qa_onnx.data.reader import read_examples
from qa_onnx.evaluation.metrics import exact_match_score
from qa_onnx.files import public_name, write_file
from qa_onnx.manifest import sha256_of

DESCRIPTION = (
    "Fine-tunes the embedded model on generated questions, exports it, compares it with PyTorch and answers with it, "
    "in a few minutes. Writes to runs/demo, and replaces there only what an earlier demo wrote."
)
DIRECTORY = Path("runs/demo")
MODEL, BUNDLE = DIRECTORY / "model", DIRECTORY / "bundle"
HELDOUT, ACCURACY, PASSAGE = DIRECTORY / "heldout.json", DIRECTORY / "accuracy.json", DIRECTORY / "passage.txt"
OUTPUTS = (MODEL, BUNDLE, HELDOUT, ACCURACY, PASSAGE)
RECORD = DIRECTORY / "demo.json"
"""The SHA-256 of each file that the demo wrote, by its path: what the next demo may delete."""
INTERRUPTED = "interrupted; the same command begins again, and goes on with a training that was interrupted"
PASS_ON_SECONDS = 1.0
"""Time for a command to end by itself after a signal; then it gets SIGTERM."""
TRAIN_QUESTIONS = 2000
SHOWN = 6

COMMANDS = (
    f"-m training.starter.sample --split heldout --output {HELDOUT}",
    f"-m training.finetune --model starter --train sample --eval {HELDOUT} --output {MODEL} --limit-train "
    f"{TRAIN_QUESTIONS} --no-answer-share 0.2 --epochs 1 --eval-at-start",
    f"-m export.to_onnx --model {MODEL} --output {BUNDLE} --verify {HELDOUT}",
    f"-m bench.accuracy --model {BUNDLE} --torch {MODEL} --data {HELDOUT} --output {ACCURACY}",
)

REAL_PASSAGE = """\
The Eiffel Tower is a lattice tower of wrought iron on the Champ de Mars in Paris. It was built from 1887 to 1889 \
by the company of the engineer Gustave Eiffel, as the entrance to the World's Fair of 1889. Maurice Koechlin, an \
engineer of the company, made the first sketch in 1884. The tower was to be taken down after twenty years, but it \
stayed, because it was useful as an antenna for radio. With its antennas it is 330 metres high, and until the Chrysler \
Building was finished in New York in 1930 it was the tallest structure in the world. Its iron is painted about every \
seven years, to protect it from rust. Visitors reach its three levels by stairs or by lift.
"""
REAL_QUESTIONS = (
    ("In which city is the Eiffel Tower?", "Paris"),
    ("Who made the first sketch?", "Maurice Koechlin"),
    ("When was the first sketch made?", "1884"),
    ("How high is the tower?", "330 metres"),
    ("What is the tower made of?", "wrought iron"),
)

PYTHON = public_name(sys.executable)
TRAIN_OWN = (
    f"{PYTHON} -m training.finetune --model starter --train own.csv --eval 20% --no-answer-share 0.2 "
    "--output runs/own/model"
)
NEXT = f"""
What to type next:

  {PYTHON} -m qa_onnx answer --model {BUNDLE} --extractive --context @{PASSAGE} --question "Who made the first sketch?"
  {PYTHON} -m qa_onnx answer --model {BUNDLE} --help
  {PYTHON} -m qa_onnx info --model {BUNDLE}

To ask in a browser, at http://127.0.0.1:8000, and from other programs:

  {PYTHON} -m qa_onnx serve --model {BUNDLE}

With questions of your own, in a CSV file with the columns context, question and answer (here own.csv):

  {TRAIN_OWN} --dry-run
  {TRAIN_OWN}
  {PYTHON} -m export.to_onnx --model runs/own/model --output runs/own/bundle --verify runs/own/model/heldout.jsonl
  {PYTHON} -m qa_onnx answer --model runs/own/bundle --context @FILE --question "..."
"""


def files_of(path: Path) -> list[Path]:
    """A file, or the files below a directory; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        return [file for child in sorted(path.iterdir()) for file in files_of(child)]
    return [path] if path.exists() or path.is_symlink() else []


def clear_earlier() -> None:
    """Deletes what an earlier demo wrote. A training that was interrupted stays, and goes on.

    Raises:
        InvalidInputError: There is something that no demo wrote, or that was changed since. Nothing was deleted then.
    """
    is_unfinished = (MODEL / "training_config.json").is_file() and not (MODEL / "metrics.json").exists()
    outputs = [path for path in OUTPUTS if not (path == MODEL and is_unfinished)]
    written = read_record()
    for file in (file for path in outputs for file in files_of(path)):
        if file.is_symlink() or not file.is_file() or written.get(str(file)) != sha256_of(file):
            raise InvalidInputError(
                f"{file} was not written by an earlier demo, or was changed since; nothing was deleted. Move it to "
                "another place, or delete it, and start the demo again"
            )
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_record() -> dict[str, str]:
    """The files of an earlier demo, from `RECORD`; empty where there was none.

    Raises:
        InvalidInputError: There is another file in its place.
    """
    if not RECORD.exists():
        return {}
    try:
        return dict(json.loads(RECORD.read_text(encoding="utf-8"))["written"])
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInputError(f"{RECORD} was not written by an earlier demo; move it to another place") from error


def write_record() -> None:
    """Notes down all files that are there now."""
    written = {str(file): sha256_of(file) for path in OUTPUTS for file in files_of(path)}
    write_file(RECORD, json.dumps({"written": written}, indent=1) + "\n")


def run(command: str) -> int:
    """Prints a command as a user would type it, runs it, and returns its exit status.

    After Ctrl-C or SIGTERM it waits for the command, which may write a checkpoint.
    """
    print(f"\n$ {PYTHON} {command}", flush=True)
    process = subprocess.Popen([sys.executable, *shlex.split(command)])
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(PASS_ON_SECONDS)  # Ctrl-C reaches both processes
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise


def show_answers() -> None:
    """Asks the bundle about passages of the held-out set, and about a real one."""
    examples = read_examples(HELDOUT)[:: 400 // SHOWN][:SHOWN]
    with Answerer.from_pretrained(BUNDLE) as answerer:
        answers = answerer.answer_batch([e.question for e in examples], [e.context for e in examples])
        config = GenerationConfig(extractive=True)
        real = answerer.answer_batch([question for question, _ in REAL_QUESTIONS], REAL_PASSAGE, config=config)
    print("\nOn held-out passages of the kind that it was trained on, which are generated: all names are invented.")
    for example, answer in zip(examples, answers, strict=True):
        print(f"\n  {example.context}\n  Q: {example.question}")
        print(f"  A: {answer.text}   (score {answer.score:.2f}; expected: {example.answers[0].text})")
    print(f"\nOn a real passage, {PASSAGE}:\n\n  {REAL_PASSAGE}")
    right = 0.0
    for (question, expected), answer in zip(REAL_QUESTIONS, real, strict=True):
        right += exact_match_score(answer.text, expected)
        print(f"  Q: {question}\n  A: {answer.text}   (score {answer.score:.2f}; expected: {expected})")
    print(
        f"\n{right:.0f} of {len(REAL_QUESTIONS)} are right. The embedded model is small, and the training above was on "
        "generated text: before you rely on\nanswers, train on questions of your own, and measure."
    )


def summary_of(seconds: float) -> dict[str, float]:
    """The figures of the demo."""
    before, *_ = json.loads((MODEL / "metrics.json").read_text(encoding="utf-8"))["evaluations"]
    accuracy = json.loads(ACCURACY.read_text(encoding="utf-8"))
    return {
        "exact_match_before": before["exact_match"],
        "exact_match_after": accuracy["qa_onnx"]["exact_match"],
        "f1_after": accuracy["qa_onnx"]["f1"],
        "questions": accuracy["questions"],
        "texts_differing_from_torch": accuracy["texts_differing_from_torch"],
        "answers_per_second": accuracy["qa_onnx"]["answers_per_second"],
        "torch_answers_per_second": accuracy["torch"]["answers_per_second"],
        "seconds": seconds,
    }


def demo() -> int:
    """Runs the commands, shows answers and figures; returns the exit status of a command that failed, or 0."""
    started = time.monotonic()
    clear_earlier()
    for command in COMMANDS:
        status = run(command)
        if status:
            return status
        write_record()
    write_file(PASSAGE, REAL_PASSAGE)
    write_record()
    show_answers()
    summary = summary_of(time.monotonic() - started)
    print(f"\nmodel: {MODEL}   bundle: {BUNDLE}")
    print(
        f"exact match on held-out questions: {summary['exact_match_before']:.1f} before fine-tuning, "
        f"{summary['exact_match_after']:.1f} after (with the bundle's no-answer threshold)"
    )
    print("answers/s, above and below, are of this check: docs/benchmarks.md compares with PyTorch")
    print(json.dumps({name: round(value, 2) for name, value in summary.items()}))
    print(NEXT, end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    argparse.ArgumentParser(prog="python -m bench.demo", description=DESCRIPTION).parse_args(argv)
    return run_command(demo, interrupted=INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
