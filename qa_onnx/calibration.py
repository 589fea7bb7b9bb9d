"""What a bundle learns from questions with known answers: when there is no answer, what scores mean, how long to read.

`python -m qa_onnx calibrate` and the export (`--verify`) do it. What is found is kept in the manifest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from qa_onnx.answer import Answer
from qa_onnx.answerer import Answerer
from qa_onnx.config import DEFAULT_MAX_NEW_TOKENS, GenerationConfig
from qa_onnx.data.example import Example
from qa_onnx.data.pairs import unanswerable_pairs
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.metrics import best_thresholds, evaluate, score_example
from qa_onnx.scores import ScoreCalibration, expected_calibration_error, fit_calibration
from qa_onnx.text.windows import WindowSettings

QUESTIONS = 1_000
"""Maximum number of questions that are answered for a calibration, drawn by a seed."""
SEED = 0
MAX_F1_DROP = 1.0
"""Points of F1 on questions with an answer that a threshold may cost, where questions without one are made. On other
questions it costs more, about twice as much on the starter's."""
MAX_SHARE_DROP = 1.0
"""Percent of the questions without an answer that a higher threshold, which is kinder to the others, may cost."""
MIN_THRESHOLD = 0.05
"""Where questions without one are made: less doubt is no reason to give no answer, however clear the questions are."""
CURVE_POINTS = 21
MIN_SCORED = 20
"""Fewer questions tell too little: no threshold is chosen, and scores stay the model's own."""
DOCUMENT_PASSAGES, DOCUMENTS = 12, 8
WINDOW_SIZES = (256, 512, 1024)
"""Windows that are tried, besides the model's own."""


def calibrate(
    answerer: Answerer,
    examples: Sequence[Example],
    *,
    source: str,
    extractive: bool = False,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
) -> dict[str, dict[str, Any]]:
    """Finds the no-answer threshold and the calibration of scores.

    Where all questions have an answer, as many without one are made, each asked about another passage
    (`unanswerable_pairs`). The threshold is then the highest that leaves nearly as many of these without an answer as
    can be (`MAX_SHARE_DROP`) at a cost of at most `MAX_F1_DROP` points of F1 on the others. Where the questions come
    with and without answers, it is the one with the best F1 on all, as the evaluation script of SQuAD v2.0 finds it.

    Args:
        answerer: Of the bundle.
        examples: Questions with known answers; `QUESTIONS` of them are drawn.
        source: Their name, for the record.
        extractive: Whether answers are spans of the context.
        max_new_tokens: Maximum number of tokens of an answer.

    Returns:
        The manifest's fields `no_answer` (of fewer than `MIN_SCORED` questions, or where none without an answer could
        be made, without a `threshold` and with the `reason`) and `scores` (left out where fewer than `MIN_SCORED`
        questions with an answer got one).
    """
    chosen = list(examples)
    if len(chosen) > QUESTIONS:
        chosen = random.Random(SEED).sample(chosen, QUESTIONS)
    made = False
    reason = ""
    if len(chosen) < MIN_SCORED:
        reason = f"got {len(chosen)} questions; expected at least {MIN_SCORED}, as fewer tell too little"
    elif not any(example.answers for example in chosen):
        reason = f"none of {len(chosen)} questions has an answer"
    elif all(example.answers for example in chosen):
        try:
            chosen += unanswerable_pairs(chosen, len(chosen), seed=SEED)
            made = True
        except InvalidInputError as error:
            reason = str(error)
    config = GenerationConfig(max_new_tokens=max_new_tokens, extractive=extractive, no_answer_threshold=1.0)
    answers = answerer.answer_batch(
        [example.question for example in chosen],
        [example.context for example in chosen],
        config=config,
        progress=True,
    )
    unanswerable = sum(not example.answers for example in chosen)
    about = {
        "source": source,
        "questions": len(chosen),
        "without_answer": unanswerable,
        "pairs_made": made,
        "extractive": extractive,
    }
    no_answer: dict[str, Any] = about | {"reason": reason} if reason else dict(about)
    if not reason:
        no_answer |= _find_threshold(chosen, answers, made=made)
    asked = [pair for pair in zip(chosen, answers, strict=True) if pair[0].answers]
    scores = _calibrate_scores(asked, about)
    return {"no_answer": no_answer} | ({"scores": scores} if scores else {})


def _find_threshold(examples: Sequence[Example], answers: Sequence[Answer], *, made: bool) -> dict[str, Any]:
    """The threshold, its figures, and the curve that it was chosen on."""
    probabilities = [answer.no_answer_probability for answer in answers]
    f1 = [score_example(example, answer.text)[1] for example, answer in zip(examples, answers, strict=True)]
    answerable = [index for index, example in enumerate(examples) if example.answers]
    others = [index for index, example in enumerate(examples) if not example.answers]

    def at(threshold: float) -> dict[str, float]:
        kept = sum(f1[index] for index in answerable if probabilities[index] <= threshold)
        empty = sum(probabilities[index] > threshold for index in others)
        return {
            "threshold": threshold,
            "f1_answerable": 100.0 * kept / len(answerable),
            "no_answer_percent": 100.0 * empty / len(others),
        }

    ordered = sorted(set(probabilities))
    before = at(1.0)["f1_answerable"]
    more: dict[str, float] = {}
    if made:
        within = [point for point in map(at, ordered) if before - point["f1_answerable"] <= MAX_F1_DROP]
        wanted = within[0]["no_answer_percent"] - MAX_SHARE_DROP
        kept = max(point["threshold"] for point in within if point["no_answer_percent"] >= wanted)
    else:
        more = best_thresholds(
            examples,
            {example.id: answer.text for example, answer in zip(examples, answers, strict=True)},
            {example.id: answer.no_answer_probability for example, answer in zip(examples, answers, strict=True)},
        )
        kept = more["best_f1_thresh"]
    higher = [value for value in ordered if value > kept]
    threshold = (kept + higher[0]) / 2 if higher else kept  # no question is so near that rounding decides on it
    found = at(max(threshold, MIN_THRESHOLD) if made else threshold)
    steps = [ordered[index * (len(ordered) - 1) // (CURVE_POINTS - 1)] for index in range(CURVE_POINTS)]
    curve = [[round(value, 6) for value in at(threshold).values()] for threshold in sorted(set(steps))]
    return {**found, "f1_without_threshold": before, **more, "curve": curve}


def _calibrate_scores(asked: Sequence[tuple[Example, Answer]], about: dict[str, Any]) -> dict[str, Any]:
    """Fits one half of the questions and reports the error on the other half.

    Where that is smaller than without a calibration, the fit of all questions is kept; else scores stay as they were.
    """
    found = [
        (answer.logprob, score_example(example, answer.text)[0] == 1.0) for example, answer in asked if answer.text
    ]
    if len(found) < MIN_SCORED:
        return {}
    logprobs, is_right = [logprob for logprob, _ in found], [right for _, right in found]
    half = fit_calibration(logprobs[::2], is_right[::2])
    raw = ScoreCalibration()
    errors = {
        name: expected_calibration_error([by.score(logprob) for logprob in logprobs[1::2]], is_right[1::2])
        for name, by in (("ece_before", raw), ("ece_after", half))
    }
    kept = fit_calibration(logprobs, is_right)
    if errors["ece_after"] >= errors["ece_before"]:
        kept, errors["ece_after"] = raw, errors["ece_before"]
    return {**asdict(kept), **errors, "questions": len(found), "source": about["source"]}


def choose_windows(
    answerer: Answerer, examples: Sequence[Example], own: WindowSettings, *, max_positions: int
) -> dict[str, Any]:
    """Chooses the window by what is answered right on long documents, made of the examples' passages.

    Args:
        answerer: Of the bundle.
        examples: Questions with answers; those on the first passages are asked.
        own: What the model was trained with; kept where no other window gives more right answers, or where there are
            too few passages for a document of `DOCUMENT_PASSAGES`.
        max_positions: Of the model.

    Returns:
        The manifest's field `windows`.
    """
    asked: dict[str, list[Example]] = {}
    for example in examples:
        if example.answers:
            asked.setdefault(example.context, []).append(example)
    passages = list(asked)
    if len(passages) < DOCUMENT_PASSAGES:
        return asdict(own)
    random.Random(SEED).shuffle(passages)
    pairs = [
        (replace(example, id=str(len(passages) * place + number)), "\n\n".join(part))
        for place in range(0, min(len(passages), DOCUMENTS * DOCUMENT_PASSAGES), DOCUMENT_PASSAGES)
        for part in (passages[place : place + DOCUMENT_PASSAGES],)
        for number, example in enumerate(example for passage in part for example in asked[passage][:1])
    ]
    sizes = [size for size in WINDOW_SIZES if size <= max_positions]
    tried = list(
        dict.fromkeys([own, *(WindowSettings(window=size, stride=min(own.stride, size // 4)) for size in sizes)])
    )
    shares = []
    for settings in tried:
        config = GenerationConfig(no_answer_threshold=1.0, **asdict(settings))
        answers = answerer.answer_batch(
            [example.question for example, _ in pairs], [document for _, document in pairs], config=config
        )
        given = {example.id: answer.text for (example, _), answer in zip(pairs, answers, strict=True)}
        shares.append(evaluate([example for example, _ in pairs], given).f1)
    best = tried[max(range(len(tried)), key=shares.__getitem__)]
    measured = [{**asdict(settings), "f1": f1} for settings, f1 in zip(tried, shares, strict=True)]
    return {**asdict(best), "tried": measured, "questions": len(pairs), "passages": DOCUMENT_PASSAGES}
