"""Runs of the training command that several files of tests look at."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture(scope="session")
def tiny_run(tiny_model_dir, tmp_path_factory):
    """Arguments that train the tiny model on 320 questions and evaluate it with 12, whose answers are short."""
    from training.starter.sample import generate

    directory = tmp_path_factory.mktemp("sample")
    for part, questions in (("train", 320), ("heldout", 12)):
        (directory / f"{part}.json").write_text(json.dumps(generate(part, questions=questions)))
    sources = ["--train", directory / "train.json", "--eval", directory / "heldout.json"]
    return ["--model", tiny_model_dir, *sources, "--max-new-tokens", 4]


@pytest.fixture(scope="session")
def arguments(tiny_model_dir, tmp_path_factory):
    """Two epochs of 4 steps, each ended by an evaluation; a checkpoint every 2 steps."""
    from training.starter.sample import generate

    directory = tmp_path_factory.mktemp("data")
    data, heldout = directory / "data.json", directory / "heldout.json"
    data.write_text(json.dumps(generate("train", questions=16)))
    heldout.write_text(json.dumps(generate("heldout", questions=4)))
    sources = ["--model", tiny_model_dir, "--train", data, "--eval", heldout, "--limit-eval", 1, "--max-new-tokens", 2]
    return [*sources, "--eval-at-start", "--epochs", 2, "--batch-size", 4, "--save-steps", 2, "--save-total-limit", 3]


@pytest.fixture(scope="session")
def whole(arguments, tmp_path_factory):
    """A run that nothing disturbed."""
    from training_runs import run_finetune, without_plots

    output = tmp_path_factory.mktemp("whole") / "model"
    with without_plots():
        assert run_finetune(*arguments, "--output", output) == 0
    return output


@pytest.fixture(scope="session")
def ended(arguments, tmp_path_factory):
    """A run that was killed while answering after its last step; F1 is always 0, so that the last is the best."""
    from training_runs import Killed, die, run_finetune

    from training import trainer
    from training.checkpoints import complete_checkpoints

    output = tmp_path_factory.mktemp("ended") / "model"
    real = trainer.generate_answers
    calls = []

    def generate_answers(*given, **options):
        calls.append(0)
        return real(*given, **options) if len(calls) < 3 else die()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "generate_answers", generate_answers)
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", output)
    assert [path.name for path in complete_checkpoints(output)[0]] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in output.glob("best-*")) == ["best-0", "best-4"]
    return output


@pytest.fixture
def output(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "out")
