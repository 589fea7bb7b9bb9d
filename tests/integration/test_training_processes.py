"""Training in two processes: the losses of one, weights that FSDP has split, and a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from training.checkpoints import complete_checkpoints

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def losses_of(path):
    """The loss of every step, the mean over the processes, each of which counts as much."""
    curves = [list(map(float, part.read_text().split())) for part in sorted(path.parent.glob(f"{path.name}.*"))]
    return [sum(step) / len(step) for step in zip(*curves, strict=True)], len(curves)


@pytest.fixture(scope="module")
def one_process(tiny_model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "model"
    return run_recorded(tiny_model_dir, output, 16, ())


def run_recorded(tiny_model_dir, output, batch_size, launcher, *more):
    """20 steps of packed rows, less than an epoch: its last short batch is filled up with rows for two processes."""
    script = [*launcher, str(ROOT / "tests" / "integration" / "record_losses.py"), str(output.parent / "losses")]
    options = ["--model", str(tiny_model_dir), "--train", "sample", "--eval", "sample", "--output", str(output)]
    options += ["--limit-train", "1500", "--limit-eval", "7", "--max-steps", "20", "--batch-size", str(batch_size)]
    options += ["--dropout", "0", "--packing", "--learning-rate", "1e-3", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script, *options], cwd=ROOT, env=environment, check=True, capture_output=True)
    return output


@pytest.mark.parametrize(
    ("launcher", "options"),
    [(TORCHRUN, ["--micro-batch-tokens", "1000"]), (ACCELERATE, [])],
    ids=["torchrun, in parts", "accelerate"],
)
def test_two_processes_give_the_losses_of_one_at_the_same_global_batch(
    tiny_model_dir, tmp_path, one_process, launcher, options
):
    two_processes = run_recorded(tiny_model_dir, tmp_path / "model", 8, launcher, *options)
    (one, first), (two, second) = (losses_of(output.parent / "losses") for output in (one_process, two_processes))
    assert (first, second, len(one)) == (1, 2, 20)
    assert one[-1] < one[0] - 0.5
    assert two == pytest.approx(one, abs=1e-5)
    predictions = [json.loads((path / "predictions.json").read_text()) for path in (one_process, two_processes)]
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 7


def test_weights_split_by_fsdp_are_gathered_for_evaluation_in_every_process(tiny_model_dir, tmp_path):
    """accelerate starts FSDP on GPUs only: PyTorch's own call replaces it."""
    script = [*TORCHRUN, str(ROOT / "tests" / "integration" / "split_weights.py"), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, check=True, capture_output=True)
    expected = load_file(tiny_model_dir / "model.safetensors")
    for rank in (0, 1):
        gathered = load_file(tmp_path / str(rank) / "model.safetensors")
        assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items())


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_two_processes_go_on_after_a_kill(arguments, tmp_path):
    output = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training.finetune"]
    command = [sys.executable, *launcher, *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not list(output.glob("checkpoint-*")):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, children)]:
            os.kill(pid, signal.SIGKILL)
    checkpoint = complete_checkpoints(output)[0][-1]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"resuming from {checkpoint}\n") == 1
    assert (output / "metrics.json").exists()
