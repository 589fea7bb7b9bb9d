"""Tables and plots from results: `python -m bench.report RESULT.json [--plot FILE.png]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.plots import plot
from bench.tables import render


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A table, and a plot, of a result.")
    parser.add_argument("result", type=Path, metavar="RESULT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(render(result))
    if arguments.plot is not None:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
