"""SQuAD's official exact match and F1 (Rajpurkar et al., 2016), as its evaluation script computes them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from qa_onnx.errors import InvalidInputError
from qa_onnx.squad import Example

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Exact match and F1 in percent over `total` questions."""

    exact_match: float
    f1: float
    total: int

    def to_dict(self) -> dict[str, float | int]:
        """The three figures by name, ready for JSON."""
        return asdict(self)


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


def evaluate(examples: Sequence[Example], predictions: Mapping[str, str]) -> Scores:
    """Scores predictions by question id: the best over a question's gold answers, 0 where a prediction is missing.

    A question without gold answers (SQuAD v2.0) is right only when an empty answer was predicted for it.

    Raises:
        InvalidInputError: There are no examples.
    """
    if not examples:
        raise InvalidInputError("got no questions to score; expected at least one")
    exact_match = f1 = 0.0
    for example in examples:
        prediction = predictions.get(example.id)
        if prediction is None:
            continue
        exact_match += _best(exact_match_score, prediction, example)
        f1 += _best(f1_score, prediction, example)
    total = len(examples)
    return Scores(exact_match=100.0 * exact_match / total, f1=100.0 * f1 / total, total=total)


def _best(score: Callable[[str, str], float], prediction: str, example: Example) -> float:
    if not example.answers:
        return float(normalize_answer(prediction) == "")
    return max(score(prediction, answer.text) for answer in example.answers)
