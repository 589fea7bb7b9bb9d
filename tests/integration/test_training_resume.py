"""Runs that were ended by a signal, a kill or a stop: the same command resumes them to the same weights."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from training_runs import Killed, die, has_equal_weights, read_metrics, run_finetune, without_plots

from tests.conftest import ROOT
from training import finetune, report, trainer
from training.checkpoints import complete_checkpoints


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


@pytest.fixture(scope="module")
def one_epoch(tiny_run):
    """20 steps, and an evaluation after the last."""
    return [*tiny_run, "--epochs", 1, "--limit-eval", 6, "--save-steps", 7]


@pytest.fixture(scope="module")
def undisturbed(one_epoch, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "model"
    assert run_finetune(*one_epoch, "--output", output) == 0
    return output


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_after_a_signal_the_same_command_gives_the_same_weights(one_epoch, tmp_path, undisturbed, capsys, number):
    output = tmp_path / "stopped"
    command = [sys.executable, "-u", "-m", "training.finetune", *map(str, one_epoch), "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.startswith("step 8/"))
    process.send_signal(number)
    said, log = process.communicate(timeout=600)
    killed = number == signal.SIGKILL
    assert process.returncode == (-9 if killed else 130), log
    checkpoint = complete_checkpoints(output)[0][-1]
    assert 7 <= int(checkpoint.name.split("-")[1]) < 20
    if not killed:
        assert "the same command resumes" in said

    def rerun(*more):
        status = run_finetune(*one_epoch, *more, "--output", output)
        return status, capsys.readouterr().err

    # As kills in the middle of saving leave them: no mark, a file cut short, a file missing.
    (output / "checkpoint-997").mkdir()
    for name in ("checkpoint-998", "checkpoint-999"):
        shutil.copytree(checkpoint, output / name)
    (output / "checkpoint-998" / "optimizer.pt").write_bytes(b"cut")
    (output / "checkpoint-999" / "trainer_state.json").unlink()
    assert complete_checkpoints(output)[0][-1] == checkpoint
    for option, message in (("--batch-size", "batch_size was 16, is 5"), ("--limit-eval", "limit_eval was 6, is 5")):
        status, error = rerun(option, 5)
        assert (status, message in error) == (2, True)
    settings = output / "training_config.json"
    settings.rename(tmp_path / "elsewhere")
    status, error = rerun()
    assert (status, "training_config.json cannot be read" in error) == (2, True)
    (tmp_path / "elsewhere").rename(settings)
    status, error = rerun()
    assert (status, f"resuming from {checkpoint}" in error) == (0, True)
    assert re.search(r"^step (\d+)/\1  loss", error, re.MULTILINE)
    assert "\nstep 1/" not in error  # the first step was not made again
    assert has_equal_weights(output, undisturbed)
    evaluated = [[row["step"] for row in read_metrics(path)["evaluations"]] for path in (output, undisturbed)]
    assert evaluated[0] == evaluated[1]
    assert not list(output.glob("checkpoint-*"))
    status, error = rerun()
    assert (status, "holds a finished run" in error) == (2, True)


@pytest.fixture(scope="module")
def two_epochs(tiny_run, tmp_path_factory):
    """Two epochs, each ended by a checkpoint and an evaluation: settings, and an undisturbed run."""
    arguments = [*tiny_run, "--eval-at-start"]
    arguments += ["--epochs", 2, "--limit-train", 64, "--limit-eval", 3, "--save-steps", 2]
    output = tmp_path_factory.mktemp("two-epochs") / "model"
    assert run_finetune(*arguments, "--output", output) == 0
    return arguments, output


def resumes_as_if_never_ended(arguments, output, expected):
    """The same command, started again, makes the weights and the evaluations of the undisturbed run."""
    assert run_finetune(*arguments, "--output", output) == 0
    found, wanted = read_metrics(output), read_metrics(expected)
    assert found["evaluations"] == wanted["evaluations"]
    assert (found["steps"], found["best_step"]) == (wanted["steps"], wanted["best_step"])
    return has_equal_weights(output, expected)


def evaluated_steps(run):
    return [row["step"] for row in read_metrics(run)["evaluations"]]


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_an_end_while_answering_loses_no_evaluation(two_epochs, tmp_path, monkeypatch, evaluation):
    arguments, expected = two_epochs
    step = evaluated_steps(expected)[evaluation]
    with monkeypatch.context() as patched:

        def generate_answers(model, *rest, **options):
            if current[0].state.global_step == step:
                raise Killed
            return real(model, *rest, **options)

        current, real, start = [], trainer.generate_answers, trainer.GenerationTrainer.__init__
        patched.setattr(trainer, "generate_answers", generate_answers)
        patched.setattr(
            trainer.GenerationTrainer,
            "__init__",
            lambda self, **options: (current.append(self), start(self, **options))[1],
        )
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", tmp_path / "out")
    assert resumes_as_if_never_ended(arguments, tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        (["--early-stopping-patience", 1], None),  # F1 stays 0: the second, after an epoch, is the last
        (["--max-steps", 3], [0, 3]),
        (["--max-steps", 5, "--eval-steps", 3], [0, 3, 5]),
    ],
)
def test_an_end_while_finishing_does_not_train_on(two_epochs, tmp_path, monkeypatch, options, evaluated):
    arguments, expected = [*two_epochs[0], *options], tmp_path / "expected"
    assert run_finetune(*arguments, "--output", expected) == 0
    evaluated = evaluated or evaluated_steps(two_epochs[1])[:2]
    steps = read_metrics(expected)["steps"]
    assert (steps, evaluated_steps(expected)) == (evaluated[-1], evaluated)

    def write_report(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "write_report", write_report)
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert resumes_as_if_never_ended(arguments, tmp_path / "out", expected)


def test_disk_use_is_bounded_by_keep(tiny_run, tmp_path, monkeypatch):
    seen = []
    real = trainer.GenerationTrainer._save_checkpoint

    def save(self, *arguments):
        real(self, *arguments)
        seen.append(sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")))

    monkeypatch.setattr(trainer.GenerationTrainer, "_save_checkpoint", save)
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    run_finetune(
        *arguments, "--max-steps", 4, "--save-steps", 1, "--save-total-limit", 2, "--limit-train", 64, "--limit-eval", 2
    )
    names = [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert seen == [names[:1], names[:2], names[1:3], names[2:]]


def test_a_run_that_was_killed_before_its_first_checkpoint_can_start_again(tiny_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training_config.json").write_text("{}")
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0


def test_kills_in_the_end_of_a_run_leave_nothing_behind(two_epochs, tmp_path, monkeypatch):
    """Killed before the model is copied, before the report, before the metrics, and before checkpoints are deleted."""
    arguments, expected = two_epochs
    output = tmp_path / "out"
    for module, name in (
        (finetune, "copy_model"),
        (finetune, "write_report"),
        (report, "write_json"),
        (finetune, "delete_checkpoints"),
    ):
        assert not (output / "metrics.json").exists()
        with monkeypatch.context() as patched:
            patched.setattr(module, name, die)
            with pytest.raises(Killed):
                run_finetune(*arguments, "--output", output)
        assert list(output.glob("checkpoint-*"))
    assert (output / "metrics.json").exists()
    assert run_finetune(*arguments, "--output", output) == 2  # it is finished, and now clean
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    assert has_equal_weights(output, expected)
    assert read_metrics(output)["evaluations"] == read_metrics(expected)["evaluations"]
