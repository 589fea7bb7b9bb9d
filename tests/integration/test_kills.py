"""The kill tests as a command, in short; `python -m bench.kills training` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("part", ["training", "export"])
def test_a_few_kills_lose_nothing(part):
    command = [sys.executable, "-m", "bench.kills", part, "--count", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["kills"], summary["failures"]) == (2, [])
