"""What a training shows while it runs and after it: lines, a bar, curves and histograms."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from training import finetune, plots, report, trainer
from training.progress import TrainingProgress
from training.starter.sample import generate
from training.stats import DatasetStats, count_by_length, histogram_step


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


def shown(monkeypatch, stream, *, first=0, is_main=True):
    """What a run of 40 steps writes to a stream, with two logs and an evaluation."""
    monkeypatch.setattr(sys, "stderr", stream)
    arguments, control = TrainingArguments(report_to=[]), TrainerControl()
    state = TrainerState(max_steps=40, global_step=first, is_world_process_zero=is_main)
    progress = TrainingProgress()
    progress.on_train_begin(arguments, state, control)
    for step in range(first + 1, 41):
        progress.on_step_begin(arguments, state, control)
        state.global_step = step
        progress.on_step_end(arguments, state, control)
        if step % 20 == 0:
            progress.on_log(arguments, state, control, logs={"loss": 1.25, "learning_rate": 5e-5, "grad_norm": 1.0})
    progress.on_log(arguments, state, control, logs={"eval_exact_match": 12.5, "eval_f1": 20.0})
    progress.on_log(arguments, state, control, logs={"train_runtime": 3.0, "total_flos": 0.0})
    progress.on_train_end(arguments, state, control)
    return stream.getvalue()


@pytest.mark.parametrize("first", [0, 11])
def test_piped_it_is_a_line_for_each_log(monkeypatch, first):
    lines = shown(monkeypatch, io.StringIO(), first=first).splitlines()
    assert lines == [
        "step 20/40  loss 1.2500  learning rate 5.00e-05  00:00 left",
        "step 40/40  loss 1.2500  learning rate 5.00e-05  00:00 left",
        "step 40/40  exact match 12.50  F1 20.00",
    ]


def test_time_left_is_that_of_the_steps_of_this_process(monkeypatch):
    now = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr("training.progress.time.monotonic", lambda: next(now))
    lines = shown(monkeypatch, io.StringIO(), first=10).splitlines()
    assert [re.search(r"([\d:]+) left", line)[1] for line in lines[:2]] == ["01:00", "00:00"]


def test_an_evaluation_before_the_first_step_is_no_time_of_a_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("training.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    arguments, control = TrainingArguments(report_to=[]), TrainerControl()
    state = TrainerState(max_steps=11, is_world_process_zero=True)
    progress = TrainingProgress()
    progress.on_train_begin(arguments, state, control)
    now[0] += 3600
    progress.on_step_begin(arguments, state, control)
    now[0] += 2
    state.global_step = 1
    progress.on_log(arguments, state, control, logs={"loss": 1.25, "learning_rate": 0.0})
    assert stream.getvalue().endswith("  00:20 left\n")


def test_on_a_terminal_it_is_a_bar_and_no_lines(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "\rtraining:" in text
    assert re.search(r"40/40 .*loss 1\.2500, learning rate 5\.00e-05", text)
    assert "step 20/40" not in text
    assert "step 40/40  exact match 12.50  F1 20.00" in text


def test_other_processes_show_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), is_main=False) == ""


@pytest.fixture(scope="module")
def sources(tiny_model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for part in ("train", "heldout"):
        (directory / part).write_text(json.dumps(generate(part, questions=48)))
    shared = ["--model", tiny_model_dir, "--train", directory / "train", "--eval", directory / "heldout"]
    return [*shared, "--limit-eval", 1, "--max-new-tokens", 2, "--batch-size", 4]


@pytest.fixture(scope="module")
def drawn(sources, tmp_path_factory):
    """A run of 12 steps: its figures, and what it wrote to standard output and error."""
    figures, out, err = [], io.StringIO(), io.StringIO()
    arguments = [
        *sources,
        "--max-steps",
        12,
        "--warmup-ratio",
        0.25,
        "--output",
        tmp_path_factory.mktemp("drawn") / "out",
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "to_png", lambda figure: figures.append(figure) or b"PNG")
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        assert run_finetune(*arguments) == 0
    return figures, out.getvalue(), err.getvalue()


def test_a_short_run_is_logged_at_every_step_and_not_twice(drawn):
    _, out, err = drawn
    steps = [line for line in err.splitlines() if " loss " in line]
    assert [line.split()[1] for line in steps] == [f"{step}/12" for step in range(1, 13)]
    assert "loss" not in out


def test_the_curves_have_each_point_and_the_peak_of_the_schedule(drawn):
    (loss, rate, score), (lengths,) = (figure.axes for figure in drawn[0])
    assert list(loss.lines[0].get_xdata()) == list(range(1, 13))
    assert list(rate.lines[0].get_xdata()) == list(range(1, 13))
    rates = list(rate.lines[0].get_ydata())
    wanted = [step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)) for step in range(12)]
    assert rates == pytest.approx([5e-5 * value for value in wanted])
    assert max(rates) == 5e-5
    assert [line.get_label() for line in score.lines] == ["exact match", "F1"]
    assert len(lengths.patches) > 10


def test_the_learning_rates_are_those_that_were_trained_with(sources, tmp_path, monkeypatch):
    used, made = [], []
    real = trainer.GenerationTrainer.training_step

    def training_step(self, *arguments):
        made[:] = [self]
        used.append(self.optimizer.param_groups[0]["lr"])
        return real(self, *arguments)

    monkeypatch.setattr(trainer.GenerationTrainer, "training_step", training_step)
    monkeypatch.setattr(report, "to_png", lambda figure: b"PNG")
    options = [
        "--lr-scheduler-type",
        "linear",
        "--warmup-ratio",
        0.4,
        "--learning-rate",
        1e-3,
        "--limit-train",
        24,
        "--epochs",
        1,
    ]
    assert run_finetune(*sources, *options, "--output", tmp_path / "out") == 0
    assert made[0].learning_rates() == pytest.approx(used)


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([5], 1),
        ([5, 5, 6], 1),
        (range(30), 1),
        (range(31), 2),
        (range(100, 160), 2),
        ([1, 150], 10),
        ([60, 1024], 50),
        ([0, 99_999], 5000),
        ([0, 1_000_000], 50_000),
    ],
)
def test_histograms_have_as_many_classes_as_show_something(values, step):
    assert histogram_step(list(values)) == step
    assert len(count_by_length(list(values), step)) <= 30
    if max(values) - min(values) >= 30:
        assert len(count_by_length(list(values), step)) >= 12


def test_a_histogram_of_one_length_is_drawn():
    stats = DatasetStats(
        rows=3, questions=3, windows=0, left_out=0, tokens=15, counted=3, padding=0.0, lengths={5: 3}, length_step=1
    )
    assert len(plots.plot_lengths(stats).axes[0].patches) == 1
