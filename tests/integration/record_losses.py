"""Runs `training.finetune` and writes the loss of each step, all its digits, to the file named first, per process."""

from __future__ import annotations

import json
import os
import sys

from training import finetune, trainer

path, *arguments = sys.argv[1:]
real = trainer.GenerationTrainer.training_step


def training_step(self, *inputs):
    loss = real(self, *inputs)
    with open(f"{path}.{os.environ.get('RANK', 0)}", "a") as file:  # noqa: PTH123
        file.write(json.dumps(loss.item()) + "\n")
    return loss


trainer.GenerationTrainer.training_step = training_step
sys.exit(finetune.main(arguments))
