"""SQuAD's official exact match and F1 (Rajpurkar et al., 2016), as its evaluation script computes them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qa_onnx.data.example import Example
from qa_onnx.errors import InvalidInputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Exact match and F1 in percent over `total` questions.

    Attributes:
        exact_match: Share of questions whose answer is a gold answer, once normalised.
        f1: Mean F1.
        total: How many questions there are.
        has_answer: The same over the questions that have an answer, where there are others (SQuAD v2.0).
        no_answer: The same over these others.
    """

    exact_match: float
    f1: float
    total: int
    has_answer: Scores | None = None
    no_answer: Scores | None = None

    def to_dict(self) -> dict[str, float | int]:
        """The figures by name, ready for JSON; those of SQuAD v2.0 by the names of its evaluation script."""
        figures: dict[str, float | int] = {"exact_match": self.exact_match, "f1": self.f1, "total": self.total}
        for name, part in (("HasAns", self.has_answer), ("NoAns", self.no_answer)):
            if part is not None:
                figures |= {f"{name}_exact": part.exact_match, f"{name}_f1": part.f1, f"{name}_total": part.total}
        return figures


def normalize_answer(text: str) -> str:
    """Lower-cases, drops punctuation and articles, and collapses white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_score(prediction: str, gold: str) -> float:
    """1.0 where the two are equal once normalised, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1_score(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words that the two share, once normalised."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(gold).split()
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def score_example(example: Example, prediction: str | None) -> tuple[float, float]:
    """Exact match and F1 of one answer, from 0 to 1: the best over the gold answers, 0 where there is no prediction.

    A question without gold answers (SQuAD v2.0) is right only when an empty answer was predicted for it.
    """
    if prediction is None:
        return 0.0, 0.0
    if not example.answers:
        is_empty = float(normalize_answer(prediction) == "")
        return is_empty, is_empty
    return (
        max(exact_match_score(prediction, answer.text) for answer in example.answers),
        max(f1_score(prediction, answer.text) for answer in example.answers),
    )


def evaluate(examples: Sequence[Example], predictions: Mapping[str, str]) -> Scores:
    """Scores predictions by question id (see `score_example`).

    Raises:
        InvalidInputError: There are no examples.
    """
    if not examples:
        raise InvalidInputError("got no questions to score; expected at least one")
    scored = [(example, score_example(example, predictions.get(example.id))) for example in examples]
    scores = mean_scores([score for _, score in scored])
    without = [score for example, score in scored if not example.answers]
    if not without:
        return scores
    answerable = [score for example, score in scored if example.answers]
    return replace(scores, has_answer=mean_scores(answerable) if answerable else None, no_answer=mean_scores(without))


def mean_scores(scored: Sequence[tuple[float, float]]) -> Scores:
    """The mean of (exact match, F1) from 0 to 1, at least one of them, in percent."""
    total = len(scored)
    return Scores(
        exact_match=100.0 * sum(exact for exact, _ in scored) / total,
        f1=100.0 * sum(f1 for _, f1 in scored) / total,
        total=total,
    )


def best_thresholds(
    examples: Sequence[Example], predictions: Mapping[str, str], no_answer_probabilities: Mapping[str, float]
) -> dict[str, float]:
    """The thresholds that would have given the best scores, as the evaluation script of SQuAD v2.0 finds them.

    Args:
        examples: All of the file.
        predictions: The answers by question id, given whether or not there may be none.
        no_answer_probabilities: By question id. Above the threshold an answer counts as empty.

    Returns:
        `best_exact`, `best_exact_thresh`, `best_f1` and `best_f1_thresh`, the scores in percent.
    """
    ordered = sorted(
        (example for example in examples if example.id in no_answer_probabilities),
        key=lambda example: no_answer_probabilities[example.id],
    )
    found: dict[str, float] = {}
    for index, name in enumerate(("exact", "f1")):
        # Below the least threshold everything is empty: right where there is no answer.
        right = best = float(sum(not example.answers for example in examples))
        threshold = 0.0
        for example in ordered:
            prediction = predictions.get(example.id)
            if example.answers:
                right += score_example(example, prediction)[index]
            elif prediction:
                right -= 1
            if right > best:
                best, threshold = right, no_answer_probabilities[example.id]
        found |= {f"best_{name}": 100.0 * best / len(examples), f"best_{name}_thresh": threshold}
    return found
