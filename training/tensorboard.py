"""TensorBoard's event files, without what transformers' own callback puts there: paths and the host's name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TensorBoardLog(TrainerCallback):
    """Writes every logged number to a directory, under the names that transformers gives it (`train/loss`)."""

    def __init__(self, directory: Path) -> None:
        """Takes the directory; a file in it begins with the first log."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        self._path = directory / f"events.out.tfevents.{time.time_ns()}"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends the numbers of a step."""
        if not state.is_world_process_zero:
            return
        values = [
            self._summary.Value(
                tag=f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}", simple_value=number
            )
            for name, number in (logs or {}).items()
            if isinstance(number, int | float)
        ]
        events = [self._event(wall_time=time.time(), step=state.global_step, summary=self._summary(value=values))]
        if not self._path.exists():
            events.insert(0, self._event(wall_time=time.time(), file_version="brain.Event:2"))
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("ab") as file:
            for event in events:
                self._writer(file).write(event.SerializeToString())
