"""Where answers are right and where they are wrong: tables, the worst cases, plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from qa_onnx.data.example import Example
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.metrics import mean_scores, score_example
from qa_onnx.files import write_file

QUESTION_WORDS = ("how many", "how much", "how", "what", "when", "where", "which", "who", "whom", "whose", "why")
BINS = 10


def question_word(question: str) -> str:
    """The first question word in a question; `other` where there is none."""
    words = [word.strip("\"'(,?").lower() for word in question.split()]
    for index, word in enumerate(words):
        pair = " ".join(words[index : index + 2])
        if pair in QUESTION_WORDS:
            return pair
        if word in QUESTION_WORDS:
            return word
    return "other"


def answer_length(example: Example) -> str:
    """How many words the shortest gold answer has, in four classes; `no answer` where there is none."""
    if not example.answers:
        return "no answer"
    words = min(len(answer.text.split()) for answer in example.answers)
    return "1 word" if words <= 1 else "2 words" if words == 2 else "3 to 5 words" if words <= 5 else "6 or more words"


def table(examples: Sequence[Example], predictions: Mapping[str, str], windows: Mapping[str, int]) -> str:
    """Exact match and F1 by length of the answer, by question word and, where known, by windows of the passage."""
    groupings: list[tuple[str, Callable[[Example], str]]] = [
        ("gold answer", answer_length),
        ("question word", lambda example: question_word(example.question)),
    ]
    if windows:
        groupings.append(("windows", lambda example: str(windows.get(example.id, "unknown"))))
    lines = [f"{'':<28}{'questions':>10}{'exact match':>13}{'F1':>8}"]
    for title, group_of in groupings:
        groups: dict[str, list[tuple[float, float]]] = {}
        for example in examples:
            groups.setdefault(group_of(example), []).append(score_example(example, predictions.get(example.id)))
        lines.append(title)
        for name, scored in sorted(groups.items(), key=lambda group: -len(group[1])):
            scores = mean_scores(scored)
            lines.append(f"  {name:<26}{scores.total:>10,}{scores.exact_match:>13.2f}{scores.f1:>8.2f}")
    return "\n".join(lines)


def worst_cases(
    examples: Sequence[Example], answers: Mapping[str, dict[str, Any]], *, limit: int
) -> list[dict[str, Any]]:
    """The answers furthest from right, of these the ones that the model is surest of first.

    Args:
        examples: The questions.
        answers: By question id; `text`, and `score` where that is known.
        limit: How many at most.

    Returns:
        For each `id`, `question`, `passage`, `gold`, `answer`, `score` and `f1`.
    """
    cases = [
        {
            "id": example.id,
            "question": example.question,
            "passage": example.context,
            "gold": [answer.text for answer in example.answers],
            "answer": answers[example.id]["text"],
            "score": answers[example.id].get("score"),
            "f1": score_example(example, answers[example.id]["text"])[1],
        }
        for example in examples
        if example.id in answers
    ]
    wrong = [case for case in cases if case["f1"] < 1]
    return sorted(wrong, key=lambda case: (case["f1"], -(case["score"] or 0)))[:limit]


def plot(examples: Sequence[Example], answers: Mapping[str, dict[str, Any]], output: Path) -> None:
    """Draws how far `score` can be trusted: a reliability diagram, and F1 against a threshold on it, as PNG.

    Raises:
        InvalidInputError: matplotlib is not installed, or the answers have no scores.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError("--plot needs matplotlib; in the checkout: pip install '.[plot]'") from error
    scored = sorted(
        (answers[example.id]["score"], *score_example(example, answers[example.id]["text"]))
        for example in examples
        if "score" in answers.get(example.id, {})
    )
    if not scored:
        raise InvalidInputError("--plot needs answers with scores; pass --answers, from `predict --answers`")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins: list[list[tuple[float, float, float]]] = [[] for _ in range(BINS)]
    for row in scored:
        bins[min(int(row[0] * BINS), BINS - 1)].append(row)
    filled = [rows for rows in bins if rows]
    left.plot([0, 1], [0, 1], ":", color="#9aa5b1")
    means = [tuple(statistics.mean(row[column] for row in rows) for column in (0, 1)) for rows in filled]
    left.plot(*zip(*means, strict=True), "o-", color="#0b3d66")
    for (score, exact), rows in zip(means, filled, strict=True):
        left.annotate(f"{len(rows):,}", (score, exact), xytext=(4, 5), textcoords="offset points", fontsize=7)
    left.set(xlabel="score, mean of a tenth of its range", ylabel="share of exact matches", xlim=(0, 1), ylim=(0, 1))
    left.set_title(f"how right, of {len(scored):,} answers", loc="left")
    thresholds = [step / 100 for step in range(100)]
    kept = [[f1 for score, _, f1 in scored if score >= threshold] for threshold in thresholds]
    known = [(threshold, statistics.mean(rows)) for threshold, rows in zip(thresholds, kept, strict=True) if rows]
    right.plot(*zip(*known, strict=True), color="#0b3d66", label="F1 of the answers kept")
    shares = [len(rows) / len(scored) for rows in kept]
    right.plot(thresholds, shares, "--", color="#d98b36", label="share of answers kept")
    right.set(xlabel="least score of an answer that is kept", xlim=(0, 1), ylim=(0, 1.02))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_file(output, image.getvalue())
