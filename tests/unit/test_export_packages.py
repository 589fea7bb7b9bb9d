"""Export and training say in one line which packages they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (
            {"transformers": "5.24.0", "optimum-onnx": "0.1.0"},
            "the export needs transformers 4.57, .* and found 5.24.0",
        ),
        ({"transformers": "4.58.0", "optimum-onnx": "0.1.0"}, "found 4.58.0"),
        ({"transformers": "4.57.6"}, "the export needs the package optimum-onnx, which is not installed"),
    ],
)
def test_an_environment_that_cannot_export_is_one_line(tmp_path, packages, message):
    for name, number in packages.items():
        directory = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    # Without site-packages only these packages are there, and Python's own.
    command = [sys.executable, "-S", "-m", "export.to_onnx", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert re.search(message, done.stderr)


@pytest.mark.parametrize("program", ["training.finetune", "bench.accuracy"])
def test_an_environment_that_cannot_train_is_one_line(tmp_path, program):
    (tmp_path / "torch.py").touch()
    command = [sys.executable, "-S", "-m", program, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "not installed: transformers, datasets, accelerate, peft. In the checkout: pip install" in done.stderr
