"""How far a training is, on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """Shows step, total, loss, learning rate and time left with each log, and the scores of each evaluation.

    On a terminal loss and learning rate follow a bar that is drawn again; elsewhere each log is a line.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._started: float | None = None
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes at which step training starts, which may be in the middle."""
        self._started, self._first = None, state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes when the first step starts: an evaluation before it takes no step's time."""
        if self._started is None:
            self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Updates the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows a loss or an evaluation; what else is logged, such as the time at the end, is in the report."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_f1" in logs:
            self._say(f"{step}  exact match {logs['eval_exact_match']:.2f}  F1 {logs['eval_f1']:.2f}")
        elif "loss" in logs:
            loss, rate = f"{logs['loss']:.4f}", f"{logs['learning_rate']:.2e}"
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {loss}, learning rate {rate}")
            else:
                self._say(f"{step}  loss {loss}  learning rate {rate}  {self._time_left(state)} left")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _time_left(self, state: TrainerState) -> str:
        """From the steps of this process and their time, with evaluations and checkpoints between them."""
        assert self._started is not None, "a loss is logged after a step"
        done = max(state.global_step - self._first, 1)
        seconds = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        text: str = tqdm.format_interval(round(seconds))
        return text

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
