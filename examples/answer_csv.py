"""Answers every row of a CSV file with the columns `question` and `context`; the rest of each row is kept.

    python examples/answer_csv.py BUNDLE questions.csv answers.csv

The file may be larger than memory: rows are read as they are answered.
"""

import csv
import sys
from collections import deque
from collections.abc import Iterator

from qa_onnx import Answerer, GenerationConfig


def main(bundle: str, source: str, target: str) -> None:
    """Adds `answer`, `score`, `start` and `end` to each row."""
    with (
        open(source, newline="", encoding="utf-8") as questions,
        open(target, "w", newline="", encoding="utf-8") as answers,
        Answerer.from_pretrained(bundle) as answerer,
    ):
        reader = csv.DictReader(questions)
        columns = [*(reader.fieldnames or []), "answer", "score", "start", "end"]
        writer = csv.DictWriter(answers, columns)
        writer.writeheader()
        waiting: deque[dict[str, str]] = deque()

        def pairs() -> Iterator[tuple[str, str]]:
            for row in reader:
                waiting.append(row)
                yield row["question"], row["context"]

        for answer in answerer.answer_iter(pairs(), config=GenerationConfig(extractive=True)):
            found = {"answer": answer.text, "score": f"{answer.score:.4f}", "start": answer.start, "end": answer.end}
            writer.writerow(waiting.popleft() | found)


if __name__ == "__main__":
    main(*sys.argv[1:])
