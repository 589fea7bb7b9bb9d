"""Scores: from the probability of an answer under the model to the probability that it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_LOGPROB = math.log(1e-6)
"""Less probable answers are taken for as probable as this: beyond it, differences say nothing."""
NEWTON_STEPS = 50
RIDGE = 1e-3
ECE_BINS = 10


@dataclass(frozen=True, kw_only=True)
class ScoreCalibration:
    """A logistic function of the logit of the model's probability (Platt, 1999, "Probabilistic Outputs for SVMs").

    Attributes:
        slope: Factor of the logit, at least 0, so that the order of scores stays; 1 with `intercept` 0 changes nothing.
        intercept: Added to it.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def score(self, logprob: float) -> float:
        """The probability, from 0 to 1, that an answer is right, by its log-probability under the model."""
        if self == ScoreCalibration():
            return min(1.0, math.exp(logprob))
        return float(_sigmoid(self.slope * _logits([logprob]) + self.intercept)[0])


def fit_calibration(logprobs: Sequence[float], is_right: Sequence[bool]) -> ScoreCalibration:
    """The calibration with the largest likelihood, by Newton's method with a small ridge.

    Args:
        logprobs: Of answers, under the model; at least one.
        is_right: Whether each of them is right.
    """
    features = np.stack([_logits(logprobs), np.ones(len(logprobs))], axis=1)
    weights = _fit(features, np.asarray(is_right, np.float64), np.array([1.0, 0.0]))
    if weights[0] < 0:  # the more probable, the less often right: probabilities tell nothing
        features[:, 0] = 0.0
        weights = _fit(features, np.asarray(is_right, np.float64), np.zeros(2))
    return ScoreCalibration(slope=float(weights[0]), intercept=float(weights[1]))


def _fit(features: np.ndarray, targets: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The weights, float64 [2], of a logistic regression that are pulled to a prior a little."""
    ridge = RIDGE * len(targets)

    def loss(weights: np.ndarray) -> float:
        logits = features @ weights
        return float((np.logaddexp(0.0, logits) - targets * logits).sum() + ridge / 2 * ((weights - prior) ** 2).sum())

    weights = prior.copy()
    for _ in range(NEWTON_STEPS):
        found = _sigmoid(features @ weights)
        gradient = features.T @ (found - targets) + ridge * (weights - prior)
        curvature = (features * (found * (1.0 - found))[:, None]).T @ features + ridge * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and abs(step).max() > 1e-9:  # Newton's step may be too long
            step /= 2
        weights = weights - step
    return weights


def expected_calibration_error(scores: Sequence[float], is_right: Sequence[bool]) -> float:
    """The mean difference between scores and shares of right answers, over ten bins of as many answers.

    Naeini et al., 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"; bins of equal mass, as of
    Nixon et al., 2019, "Measuring Calibration in Deep Learning".
    """
    order = np.argsort(scores, kind="stable")
    sorted_scores, right = np.asarray(scores)[order], np.asarray(is_right, np.float64)[order]
    parts = zip(np.array_split(sorted_scores, ECE_BINS), np.array_split(right, ECE_BINS), strict=True)
    return float(sum(abs(part.mean() - share.mean()) * len(part) for part, share in parts if len(part)) / len(right))


def _logits(logprobs: Sequence[float]) -> np.ndarray:
    clipped = np.clip(np.asarray(logprobs, np.float64), MIN_LOGPROB, -1e-6)
    logits: np.ndarray = clipped - np.log(-np.expm1(clipped))
    return logits


def _sigmoid(values: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = np.exp(-np.logaddexp(0.0, -values))
    return probabilities
