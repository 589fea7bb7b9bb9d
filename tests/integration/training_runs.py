"""Helpers of the tests that run the training command in this process."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training import finetune, report


class Killed(BaseException):
    """Raised in place of a kill: nothing but the files is left."""


def die(*_, **__):
    raise Killed


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


@contextmanager
def without_plots():
    """Drawing them takes longer than a short training."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "to_png", lambda figure: b"PNG")
        yield


def read_metrics(output):
    return json.loads((output / "metrics.json").read_text())


def steps_of(output):
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def has_equal_weights(first, second):
    first, second = (load_file(output / "model.safetensors") for output in (first, second))
    return all(torch.equal(first[name], second[name]) for name in second)


def flip(path, place=-100):
    """Changes one bit and neither size nor time."""
    times = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times, times))
