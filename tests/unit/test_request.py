"""The answer that is made of several windows, with log-probabilities that are given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fakes import log_softmax, small_tokenizer

from qa_onnx import GenerationConfig
from qa_onnx.engine.sampling import Predictions, accept
from qa_onnx.request import Request
from qa_onnx.scores import ScoreCalibration
from qa_onnx.text.windows import Window, answer_logprobs, encode_windows, log_priors, weigh_windows

END = 0


def logits(tokenizer, text, no_answer):
    """Log-probabilities of a first token: of the text's and, with the given probability, of the end-of-text."""
    probabilities = np.full(tokenizer.get_vocab_size(), 1e-9)
    probabilities[tokenizer.encode(text).ids[0]] = 1.0 - no_answer
    probabilities[END] = no_answer
    return log_softmax(np.log(probabilities))


def answer_of(windows, found, *, calibration=None, **options):
    """The answer of a request whose windows say what `found` holds: a text of one token, and P(no answer)."""
    tokenizer = small_tokenizer()
    request = Request(
        windows,
        GenerationConfig(**options),
        tokenizer=tokenizer,
        eos_token_id=END,
        max_positions=128,
        find_spans=lambda text: None,
        calibration=calibration,
    )
    ended = np.full(tokenizer.get_vocab_size(), -30.0)
    ended[END] = 10.0
    for sequence, (text, no_answer) in zip(request.sequences, found, strict=True):
        accept(sequence, Predictions.from_logprobs(logits(tokenizer, text, no_answer)[None], END), 0, eos_token_id=END)
        while not sequence.is_finished:
            accept(sequence, Predictions.from_logprobs(log_softmax(ended)[None], END), 0, eos_token_id=END)
        request.finish(sequence)
    assert request.is_done
    return request.answer()


def windows_of(*shares):
    (whole,) = encode_windows(small_tokenizer(), ["Who?"], ["Rollo the Normans"], max_positions=128, max_new_tokens=8)[
        0
    ]
    return [
        Window(start=100 * number, text=whole.text, prompt=whole.prompt, log_prior=math.log(share))
        for number, share in enumerate(shares)
    ]


def test_windows_weigh_as_much_as_their_priors():
    found = [(" the", 0.1), (" Rollo", 0.1)]
    first, second = answer_of(windows_of(0.7, 0.3), found), answer_of(windows_of(0.3, 0.7), found)
    assert (first.window, second.window) == (0, 1)
    assert first.text != second.text
    odds = 0.9 / 0.1
    assert first.score == pytest.approx(0.7 * odds / (1 + odds), abs=1e-3)
    assert first.no_answer_probability == pytest.approx(0.1, abs=1e-3)
    assert second.start == 100


def test_a_text_that_several_windows_give_adds_up():
    found = [(" the", 0.0), (" Rollo", 0.0), (" Rollo", 0.0)]
    answer = answer_of(windows_of(0.4, 0.28, 0.32), found)
    assert (answer.window, answer.start) == (2, 200)  # the window in which it is most probable
    held = 0.99  # the least probability of no answer that is told apart is 0.01
    assert answer.score == pytest.approx(0.6 * 100 / (1 + held * 100), abs=1e-2)
    assert answer.logprob == pytest.approx(math.log(answer.score))


def test_no_answer_is_decided_over_all_windows():
    windows, found = windows_of(0.9, 0.1), [(" Rollo", 0.3), (" the", 0.95)]
    answer = answer_of(windows, found, no_answer_threshold=0.5)
    assert (answer.finish_reason, answer.window) == ("stop", 0)
    odds = 0.9 * 0.7 / 0.3 + 0.1 * 0.05 / 0.95
    assert answer.no_answer_probability == pytest.approx(1 / (1 + odds), abs=1e-3)
    none = answer_of(windows, found, no_answer_threshold=0.3)
    assert (none.text, none.finish_reason, none.start, none.token_ids) == ("", "no_answer", None, ())
    assert none.score == none.no_answer_probability == answer.no_answer_probability
    assert none.logprob == pytest.approx(math.log(none.no_answer_probability))


def test_without_a_threshold_a_window_without_the_answer_is_no_reason_to_give_none():
    answer = answer_of(windows_of(0.9, 0.1), [(" the", 0.99), (" Rollo", 0.2)])
    assert (answer.window, answer.finish_reason) == (1, "stop")


def test_the_score_is_calibrated_and_the_log_probability_is_not():
    calibration = ScoreCalibration(slope=0.5, intercept=-1.0)
    answer = answer_of(windows_of(1.0), [(" Rollo", 0.2)], calibration=calibration)
    assert answer.logprob == pytest.approx(math.log(0.8), abs=1e-3)
    assert answer.score == pytest.approx(calibration.score(answer.logprob)) != pytest.approx(0.8, abs=0.1)


def test_priors_add_up_and_follow_the_rare_words_of_the_question():
    texts = ["The river is long.", "The bridge crosses the river.", "The Tolvik bridges were opened.", "The end."]
    priors = log_priors("When was the Tolvik bridge opened?", texts)
    assert sum(map(math.exp, priors)) == pytest.approx(1.0)
    assert max(range(4), key=priors.__getitem__) == 2
    assert priors[0] == pytest.approx(priors[3])  # `the` is everywhere and tells nothing
    assert log_priors("Why?", ["one"]) == [0.0]
    assert log_priors("???", ["one", "two"]) == [pytest.approx(math.log(0.5))] * 2


def test_probabilities_of_texts_add_up_over_windows():
    found = answer_logprobs([("x", math.log(0.5)), ("x", math.log(0.2)), ("y", -1e9)])
    assert found["x"] == pytest.approx(math.log(0.7))
    assert math.exp(found["y"]) == 0.0


def test_many_windows_without_the_answer_neither_hide_it_nor_make_one():
    windows = windows_of(*[0.02] * 50)
    weights, no_answer = weigh_windows(windows, [0.01] + [0.95] * 49)
    assert no_answer < 0.4
    assert max(range(50), key=weights.__getitem__) == 0
    assert weigh_windows(windows, [0.95] * 50)[1] == pytest.approx(0.95)


def test_tiny_probabilities_of_no_answer_are_all_alike():
    weights, _ = weigh_windows(windows_of(0.4, 0.6), [1e-12, 1e-4])
    assert weights[1] - weights[0] == pytest.approx(math.log(0.6 / 0.4))


def test_a_single_window_stays_as_it_is():
    assert weigh_windows(windows_of(1.0), [1e-5]) == ([0.0], 1e-5)
