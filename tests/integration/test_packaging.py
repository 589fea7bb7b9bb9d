"""The wheel holds the runtime, typed, and nothing else."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from qa_onnx import __version__
from qa_onnx.cli import main
from tests.conftest import ROOT


def build_wheel(directory, **environment):
    """Builds the wheel of a copy of the source; returns its path, the names in it, and its metadata."""
    source = directory / "source"
    patterns = (".git", ".venv*", "runs", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*patterns))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(directory), str(source)],
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    return wheel, names, metadata


def test_the_citation_has_the_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_console_script_is_the_command_line():
    (script,) = entry_points(group="console_scripts", name="qa-onnx")
    assert script.load() is main
    program = Path(sys.executable).with_name("qa-onnx")
    found = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    module = subprocess.run([sys.executable, "-m", "qa_onnx", "--help"], capture_output=True, text=True, check=True)
    assert found == module.stdout
    assert subprocess.run([program, "info", "nowhere"], capture_output=True, check=False).returncode == 2


def test_the_wheel_ships_qa_onnx_only_and_typed(tmp_path):
    wheel, names, metadata = build_wheel(tmp_path)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qa_onnx"}
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "qa-onnx = qa_onnx.cli:main" in scripts
    assert {"qa_onnx/py.typed", "qa_onnx/serve/page.html"} <= set(names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split(":")[1].split(">")[0].strip() for line in required) == ["numpy", "tokenizers"]
    assert not [name for name in names if name.endswith((".cc", ".h"))]
    if sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++"):
        assert "qa_onnx/kernels/libqa_onnx_kernels.so" in names
        assert re.search(r"-py3-none-\w*linux\w*_x86_64\.whl$", wheel.name)


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed; g++'s kernels have unit tests")
def test_kernels_that_clang_compiles_pass_their_tests(tmp_path):
    wheel, _, _ = build_wheel(tmp_path, CC="clang", CXX="clang++")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("qa_onnx/kernels/libqa_onnx_kernels.so", tmp_path / "installed")
    tested = subprocess.run(
        [sys.executable, "-m", "tests.kernels", library], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")
def test_without_a_compiler_the_wheel_is_built_without_kernels_and_they_say_so(tmp_path):
    wheel, names, _ = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert not [name for name in names if name.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = "from qa_onnx.kernels import find_kernels; print(find_kernels('int8').reason)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert f"no compiled kernels at {tmp_path / 'installed'}" in found.stdout
    assert "install g++ or clang++ and install qa_onnx again" in found.stdout
