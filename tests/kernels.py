"""What tests of the kernels share; as a program, `python -m tests.kernels LIBRARY`, it tests another library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qa_onnx import kernels
from qa_onnx.errors import ProviderError
from qa_onnx.kernels import load_kernels


def needs_kernels(precision="fp32"):
    """Skips a test where there are no kernels, or none for a precision, and says why."""
    try:
        library = load_kernels()
    except ProviderError as error:
        pytest.skip(str(error))
    if precision == "bf16" and not library.bfloat16:
        pytest.skip("this processor does not multiply in bfloat16")
    return library


if __name__ == "__main__":
    kernels.LIBRARY = Path(sys.argv[1]).resolve()
    sys.exit(
        pytest.main(["-q", "-p", "no:cacheprovider", "tests/unit/test_kernels.py", "tests/unit/test_kernel_choice.py"])
    )
