"""Where a measurement was made: processor, memory, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("onnxruntime", "torch", "transformers", "optimum", "optimum-onnx", "ctranslate2", "tokenizers", "numpy")


def describe_machine() -> dict[str, Any]:
    """The machine and the versions of everything that takes part; a package that is not there is None."""
    return {
        "machine": {"system": platform.platform(), "processor": processor(), "processors": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def processor() -> str:
    """The processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def reset_peak() -> None:
    """Has the kernel measure this process's peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mib() -> float:
    """Peak memory of this process. `getrusage` would give its parent's where that was higher."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # in kB


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
