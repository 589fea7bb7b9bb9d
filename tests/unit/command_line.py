"""What the tests of the command line share."""

from __future__ import annotations

import json

from fakes import CONTEXT

from qa_onnx import cli

ANSWER, PREDICT = "answer --model bundle --question Who?", "predict --model bundle --data data.json"
EVALUATE = "evaluate --data data.json --predictions predictions.json"


def run(capsys, command):
    status = cli.main(command.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_to_calibrate(path, count=20):
    """Questions on two passages, every fourth without an answer."""
    rows = [{"context": f"{CONTEXT} {i % 2}", "question": f"Who {i}?", "answers": "Rollo"} for i in range(count)]
    rows_file(path, *(row | ({"answers": None} if i % 4 == 0 else {}) for i, row in enumerate(rows)))
