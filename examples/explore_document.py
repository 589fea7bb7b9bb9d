"""Asks questions about a text file of any length, and shows where in it the answers are.

python examples/explore_document.py BUNDLE book.txt "Who led the Normans?" "When did they settle?"
"""

import sys
from pathlib import Path

from qa_onnx import Answer, Answerer, GenerationConfig

AROUND = 60


def show(document: str, answer: Answer) -> str:
    """An answer between the words around it, with its score and its place."""
    if answer.start is None or answer.end is None:
        return f"  {answer.score:6.1%}  (no answer)"
    before = document[max(answer.start - AROUND, 0) : answer.start]
    after = document[answer.end : answer.end + AROUND]
    line = " ".join(f"{before}[{answer.text}]{after}".split())
    return f"  {answer.score:6.1%}  ...{line}...  (characters {answer.start} to {answer.end})"


def main(bundle: str, path: str, *questions: str) -> None:
    """Prints the three most probable answers to each question."""
    document = Path(path).read_text(encoding="utf-8")
    with Answerer.from_pretrained(bundle) as answerer:
        config = GenerationConfig(extractive=True, num_answers=3)
        answers = answerer.answer_batch(questions, document, config=config)
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question}  ({answer.windows} windows)")
            for found in (answer, *answer.alternatives):
                print(show(document, found))


if __name__ == "__main__":
    if len(sys.argv) < 4 or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
