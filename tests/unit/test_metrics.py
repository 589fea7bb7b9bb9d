from __future__ import annotations

import json

import pytest
from fakes import squad_data

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.evaluation.metrics import evaluate, exact_match_score, f1_score, normalize_answer
from qa_onnx.evaluation.predictions import read_predictions


def question(name, *golds):
    answers = tuple(GoldAnswer(text=gold, start=0) for gold in golds)
    return Example(id=name, title="", context="c", question="q", answers=answers)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Normans", "normans"),
        ("an apple, a pear and the plum", "apple pear and plum"),
        ("U.S.A.!", "usa"),
        ("10,000", "10000"),
        ("mother-in-law", "motherinlaw"),
        ("the-end", "theend"),
        ("theatre of another anthem", "theatre of another anthem"),
        (" a\u00a0b\t\nc ", "b c"),
        ("«Élan»", "«élan»"),
        ("the", ""),
        ("?!", ""),
    ],
)
def test_answers_are_normalized_as_the_official_script_does(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("Rollo", "the rollo.", 1),
        ("the Norman king Rollo", "king Rollo of Normandy", 4 / 7),  # 2 shared of 3 and of 4
        ("to to be", "to be or not to be", 2 / 3),  # 3 of 3 and of 6
        ("to to to", "to be", 2 / 5),  # 1 of 3 and of 2
        ("be to", "to be", 1),
        ("Rollo", "William", 0),
        ("", "Rollo", 0),
        ("Rollo", "", 0),
        ("the", "an", 0),  # nothing is left of either: the v1.1 script says 0
    ],
)
def test_f1_is_as_computed_by_hand(prediction, gold, f1):
    assert f1_score(prediction, gold) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(("prediction", "gold", "score"), [("The Rollo!", "rollo", 1), ("Rollo I", "Rollo", 0)])
def test_exact_match_compares_normalized_answers(prediction, gold, score):
    assert exact_match_score(prediction, gold) == score


def test_the_best_gold_answer_counts_for_each_score():
    scores = evaluate([question("q", "William", "king Rollo", "Rollo I")], {"q": "Rollo"})
    assert (scores.exact_match, scores.f1, scores.total) == (0.0, pytest.approx(100 * 2 / 3), 1)
    assert evaluate([question("q", "William", "Rollo")], {"q": "rollo"}).exact_match == 100.0


def test_a_missing_prediction_scores_nothing_and_counts():
    examples = [question(name, "Rollo") for name in ("q1", "q2", "q3", "q4")]
    scores = evaluate(examples, {"q1": "Rollo", "unknown": "Rollo"})
    assert scores.to_dict() == {"exact_match": 25.0, "f1": 25.0, "total": 4}


@pytest.mark.parametrize(
    ("predictions", "score"), [({"q": ""}, 100), ({"q": "the ."}, 100), ({"q": "Rollo"}, 0), ({}, 0)]
)
def test_a_question_without_answer_is_right_only_when_none_is_given(predictions, score):
    scores = evaluate([question("q")], predictions)
    assert (scores.exact_match, scores.f1) == (score, score)


def test_percentages_are_over_all_questions():
    examples = parse_squad(squad_data(), source="test")
    scores = evaluate(examples, {"q1": "Rollo", "q2": "Normandy", "q3": "because"})
    assert scores.exact_match == pytest.approx(100 / 3)
    assert scores.f1 == pytest.approx(100 * (1 + 2 / 3) / 3)


def test_published_scores_are_reproduced(real_data):
    expectations = sorted((real_data / "metric").glob("*.expected.json"))
    assert expectations
    for path in expectations:
        expected = json.loads(path.read_text(encoding="utf-8"))
        examples, predictions = (read(path.parent / expected[key]) for key, read in READERS.items())
        scores = evaluate(examples, predictions)
        assert scores.total == expected["total"]
        assert scores.exact_match == pytest.approx(expected["exact_match"], rel=0, abs=1e-9)
        assert scores.f1 == pytest.approx(expected["f1"], rel=0, abs=1e-9)


READERS = {"data": read_examples, "predictions": read_predictions}
