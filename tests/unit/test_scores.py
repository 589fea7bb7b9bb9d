from __future__ import annotations

import math

import numpy as np
import pytest

from qa_onnx.scores import ScoreCalibration, expected_calibration_error, fit_calibration


def drawn(count, *, is_right):
    """Log-probabilities drawn evenly, and whether each is right, with the probability that `is_right` gives."""
    draw = np.random.default_rng(0)
    probabilities = draw.uniform(0.01, 0.99, count)
    return np.log(probabilities).tolist(), (draw.random(count) < is_right(probabilities)).tolist()


def test_without_a_calibration_the_score_is_the_probability():
    assert ScoreCalibration().score(math.log(0.3)) == pytest.approx(0.3)
    assert ScoreCalibration().score(0.0) == 1.0


def test_an_overconfident_model_is_corrected():
    logprobs, right = drawn(4000, is_right=lambda probabilities: probabilities / 2)
    found = fit_calibration(logprobs[::2], right[::2])
    before = expected_calibration_error(np.exp(logprobs[1::2]).tolist(), right[1::2])
    after = expected_calibration_error([found.score(value) for value in logprobs[1::2]], right[1::2])
    assert before > 0.2
    assert after < 0.06
    assert found.score(math.log(0.9)) < 0.6


def test_a_calibrated_model_is_left_as_it_is():
    logprobs, right = drawn(4000, is_right=lambda probabilities: probabilities)
    found = fit_calibration(logprobs, right)
    assert found.slope == pytest.approx(1.0, abs=0.15)
    assert found.intercept == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize("right", [[True] * 30, [False] * 30, [True]])
def test_extremes_give_finite_scores_in_order(right):
    found = fit_calibration([-0.1] * len(right), right)
    scores = [found.score(logprob) for logprob in (-1e9, -5.0, -0.5, 0.0)]
    assert scores == sorted(scores)
    assert 0 <= scores[0] <= scores[-1] <= 1


def test_scores_never_fall_as_the_probability_rises():
    logprobs, right = drawn(400, is_right=lambda probabilities: 1 - probabilities)
    found = fit_calibration(logprobs, right)
    assert found.slope == 0.0


def test_the_error_is_the_mean_gap_of_the_bins():
    assert expected_calibration_error([0.5] * 100, [True, False] * 50) == pytest.approx(0.0)
    assert expected_calibration_error([0.9] * 100, [True, False] * 50) == pytest.approx(0.4)
    assert expected_calibration_error([0.25, 0.75], [False, True]) == pytest.approx(0.25)
