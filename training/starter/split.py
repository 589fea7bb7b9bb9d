"""Splits a SQuAD file by article in two: `python -m training.starter.split --help`.

Designs of the starter are compared on one half; the figures that are reported come from the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qa_onnx.cli import run_command
from qa_onnx.data.json_text import read_json
from qa_onnx.files import write_file

HALVES = ("design.json", "report.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a SQuAD file and writes two: every other article, by title."""
    parser = argparse.ArgumentParser(description="Split a SQuAD file by article in two halves.")
    parser.add_argument("--data", type=Path, required=True, help="SQuAD JSON file, with several articles")
    parser.add_argument("--output", type=Path, required=True, help=f"directory to write {' and '.join(HALVES)} to")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _split(arguments.data, arguments.output))


def _split(source: Path, output: Path) -> None:
    data = read_json(source)
    articles = sorted(data["data"], key=lambda article: str(article["title"]))
    output.mkdir(parents=True, exist_ok=True)
    for name, half in zip(HALVES, (articles[::2], articles[1::2]), strict=True):
        write_file(output / name, json.dumps({**data, "data": half}, ensure_ascii=False))
        print(f"wrote {output / name}: {', '.join(article['title'] for article in half)}")


if __name__ == "__main__":
    sys.exit(main())
