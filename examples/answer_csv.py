"""Answers every row of a CSV file with a question and a context; the rest of each row is kept.

    python examples/answer_csv.py BUNDLE questions.csv answers.csv

Columns and separator are found as `python -m qa_onnx predict` finds them: `question` or `query`, and `context`,
`passage` or `text`, in any case. The file may be larger than memory: rows are read as they are answered.
"""

import csv
import sys
from collections import deque
from collections.abc import Iterator

from qa_onnx import Answerer, GenerationConfig
from qa_onnx.data.columns import REQUIRED, find_columns
from qa_onnx.data.text_files import find_separator


def main(bundle: str, source: str, target: str) -> None:
    """Adds `answer`, `score`, `start` and `end` to each row, or replaces what it has under these names."""
    with (
        open(source, newline="", encoding="utf-8-sig") as questions,
        open(target, "w", newline="", encoding="utf-8") as answers,
        Answerer.from_pretrained(bundle) as answerer,
    ):
        separator = find_separator(questions.readline())
        questions.seek(0)
        reader = csv.DictReader(questions, delimiter=separator)
        header = list(reader.fieldnames or [])
        column_of = find_columns(header, required=REQUIRED, fields=REQUIRED)
        columns = dict.fromkeys([*header, "answer", "score", "start", "end"])
        writer = csv.DictWriter(answers, columns, delimiter=separator)
        writer.writeheader()
        waiting: deque[dict[str, str]] = deque()

        def pairs() -> Iterator[tuple[str, str]]:
            for row in reader:
                waiting.append(row)
                yield row[column_of["question"]], row[column_of["context"]]

        for answer in answerer.answer_iter(pairs(), config=GenerationConfig(extractive=True)):
            found = {"answer": answer.text, "score": f"{answer.score:.4f}", "start": answer.start, "end": answer.end}
            writer.writerow(waiting.popleft() | found)


if __name__ == "__main__":
    if len(sys.argv) != 4 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
