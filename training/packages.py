"""Ends a program in one line where packages of the extra `train` are missing. Imported before the imports that fail."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("torch", "transformers", "datasets", "accelerate", "peft")

if missing := [name for name in NEEDED if find_spec(name) is None]:
    sys.stderr.write(
        f"error: this program needs packages that are not installed: {', '.join(missing)}. In the checkout: "
        "pip install '.[cpu,train]'\n"
    )
    raise SystemExit(2)
