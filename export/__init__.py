"""From a fine-tuned PyTorch model to a verified ONNX bundle. Runs from a checkout; the wheel does not ship it.

Optimum exports with transformers 4.57 only, while training runs with later ones, too. In an environment of another
version every command of this package ends with one line that says so, before Optimum's imports fail.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def _find_problem() -> str | None:
    """What keeps the packages of this environment from exporting; None if nothing does."""
    try:
        found = version("transformers")
        version("optimum-onnx")
    except PackageNotFoundError as error:
        return f"the export needs the package {error.name}, which is not installed: pip install '.[cpu,export]'"
    if found.startswith("4.57."):
        return None
    return (
        f"the export needs transformers 4.57, which Optimum supports, and found {found}. Export in another environment "
        "(pip install '.[cpu,export]'), which reads models that were trained with transformers 5, too"
    )


if (problem := _find_problem()) is not None:
    sys.stderr.write(f"error: {problem}\n")
    raise SystemExit(2)
