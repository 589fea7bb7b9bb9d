"""Calibration with an answerer whose answers and probabilities are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qa_onnx import calibration
from qa_onnx.calibration import calibrate, choose_windows
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.scores import ScoreCalibration
from qa_onnx.text.windows import WindowSettings


def examples_of(count, *, title="Normans", without=()):
    return [
        Example(
            id=f"q{number}",
            title=title,
            context=f"passage {number} says answer{number}x",
            question=f"what does {number} say?",
            answers=() if number in without else (GoldAnswer(text=f"answer{number}x", start=0),),
        )
        for number in range(count)
    ]


class Oracle:
    """Answers with what its context says; `probability` gives that of no answer, `logprob` that of the answer."""

    def __init__(self, probability, logprob=lambda question, context: -0.1, text=None):
        self.probability, self.logprob = probability, logprob
        self.text = text or (lambda question, context, config: context.split()[-1])
        self.configs = []

    def answer_batch(self, questions, contexts, *, config, progress=False):
        self.configs.append(config)
        return [
            SimpleNamespace(
                text=self.text(question, context, config),
                no_answer_probability=self.probability(question, context),
                logprob=self.logprob(question, context),
            )
            for question, context in zip(questions, contexts, strict=True)
        ]


def is_own(question, context):
    return question.split()[2] == context.split()[1]


def test_pairs_are_made_and_the_threshold_leaves_them_without_an_answer():
    oracle = Oracle(lambda question, context: 0.2 if is_own(question, context) else 0.7)
    found = calibrate(oracle, examples_of(40), source="own.csv")
    no_answer = found["no_answer"]
    assert (no_answer["questions"], no_answer["without_answer"], no_answer["pairs_made"]) == (80, 40, True)
    assert no_answer["threshold"] == pytest.approx(0.45)  # halfway, so that rounding decides on no question
    assert (no_answer["no_answer_percent"], no_answer["f1_answerable"]) == (100.0, 100.0)
    assert {tuple(point[1:]) for point in no_answer["curve"]} == {(100.0, 100.0), (100.0, 0.0)}
    assert oracle.configs[0].no_answer_threshold == 1.0  # every question is answered


def test_a_threshold_costs_at_most_a_point_of_f1():
    def probability(question, context):
        return int(question.split()[2]) / 100 if is_own(question, context) else 0.985

    no_answer = calibrate(Oracle(probability), examples_of(100), source="own.csv")["no_answer"]
    assert no_answer["f1_without_threshold"] - no_answer["f1_answerable"] == pytest.approx(1.0)
    assert no_answer["threshold"] == pytest.approx((0.98 + 0.985) / 2)  # one of a hundred is above
    assert no_answer["no_answer_percent"] == 100.0


def test_of_thresholds_that_are_nearly_as_good_the_highest_is_kept():
    def probability(question, context):
        number = int(question.split()[2])
        if is_own(question, context):
            return 0.1
        return 0.2 if number == 0 else 0.8  # one of a hundred is near the others

    no_answer = calibrate(Oracle(probability), examples_of(100), source="own.csv")["no_answer"]
    assert (no_answer["threshold"], no_answer["no_answer_percent"]) == (pytest.approx(0.5), 99.0)


def test_a_threshold_is_no_lower_than_a_doubt():
    oracle = Oracle(lambda question, context: 1e-6 if is_own(question, context) else 2e-6)
    assert calibrate(oracle, examples_of(40), source="own.csv")["no_answer"]["threshold"] == 0.05


def test_questions_that_come_without_an_answer_are_used_as_they_are():
    oracle = Oracle(lambda question, context: 0.9 if int(question.split()[2]) < 5 else 0.1)
    no_answer = calibrate(oracle, examples_of(30, without=range(5)), source="v2.json")["no_answer"]
    assert (no_answer["questions"], no_answer["without_answer"], no_answer["pairs_made"]) == (30, 5, False)
    assert (no_answer["best_f1_thresh"], no_answer["threshold"]) == (0.1, pytest.approx(0.5))
    assert no_answer["best_f1"] == 100.0


@pytest.mark.parametrize(("count", "without"), [(1, ()), (19, ()), (19, (0, 1))])
def test_few_questions_give_no_threshold_and_say_why(count, without):
    oracle = Oracle(lambda question, context: 0.2 if is_own(question, context) else 0.7)
    found = calibrate(oracle, examples_of(count, without=without), source="own.csv")
    assert "threshold" not in found["no_answer"]
    assert f"got {count} questions; expected at least 20" in found["no_answer"]["reason"]
    assert "scores" not in found
    assert "threshold" in calibrate(oracle, examples_of(20), source="own.csv")["no_answer"]


def test_one_passage_gives_no_threshold_and_says_why():
    (example,) = examples_of(1)
    found = calibrate(Oracle(lambda *_: 0.1), [example] * 30, source="one.csv")
    assert "threshold" not in found["no_answer"]
    assert "expected at least two passages" in found["no_answer"]["reason"]


def test_scores_are_fitted_on_the_questions_with_an_answer():
    def text(question, context, config):
        return context.split()[-1] if int(question.split()[2]) % 3 == 0 else "wrong"

    scores = calibrate(Oracle(lambda *_: 0.1, text=text), examples_of(120), source="own.csv")["scores"]
    assert scores["questions"] == 120
    assert scores["ece_after"] < scores["ece_before"]


def test_a_calibration_that_makes_scores_worse_on_other_questions_is_not_kept(monkeypatch):
    worse = ScoreCalibration(slope=0.0, intercept=-9.0)
    monkeypatch.setattr(calibration, "fit_calibration", lambda *_: worse)
    scores = calibrate(Oracle(lambda *_: 0.1), examples_of(120), source="own.csv")["scores"]
    assert (scores["slope"], scores["intercept"]) == (1.0, 0.0)
    assert scores["ece_after"] == scores["ece_before"] < 0.5


def test_no_more_questions_are_asked_than_a_calibration_needs(monkeypatch):
    monkeypatch.setattr(calibration, "QUESTIONS", 30)
    found = calibrate(Oracle(lambda *_: 0.1), examples_of(100), source="own.csv")
    assert found["no_answer"]["questions"] == 60


def test_the_window_with_the_best_answers_is_chosen_and_ties_keep_the_own():
    own = WindowSettings(window=128, stride=32)
    examples = examples_of(40)

    def right_with(size):
        def text(question, document, config):
            number = question.split()[2]
            return f"answer{number}x" if size in (None, config.window) else "wrong"

        return text

    found = choose_windows(Oracle(lambda *_: 0.1, text=right_with(512)), examples, own, max_positions=1024)
    assert (found["window"], found["stride"], found["passages"]) == (512, 32, 12)
    assert [tried["window"] for tried in found["tried"]] == [128, 256, 512, 1024]
    kept = choose_windows(Oracle(lambda *_: 0.1, text=right_with(None)), examples, own, max_positions=300)
    assert (kept["window"], len(kept["tried"])) == (128, 2)


def test_too_few_passages_keep_the_window_of_the_model():
    oracle = Oracle(lambda *_: 0.1)
    own = WindowSettings(window=128)
    assert choose_windows(oracle, examples_of(11), own, max_positions=1024) == {"window": 128, "stride": 128}
    assert oracle.configs == []
