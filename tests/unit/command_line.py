"""What the tests of the command line share."""

from __future__ import annotations

import json

from qa_onnx import cli

ANSWER, PREDICT = "answer --model bundle --question Who?", "predict --model bundle --data data.json"
EVALUATE = "evaluate --data data.json --predictions predictions.json"


def run(capsys, command):
    status = cli.main(command.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
