"""Bad input, windows, scores, alternatives and thresholds, as a caller sees them."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import CONTEXT, echo_answerer

from qa_onnx import GenerationConfig, InvalidInputError, PromptTooLongError
from qa_onnx.text.windows import WindowSettings, encode_windows


@pytest.mark.parametrize("call", ["answer", "submit", "stream"])
@pytest.mark.parametrize(
    ("question", "context", "error"),
    [
        ("", CONTEXT, InvalidInputError),
        ("Who?", " \n\t\u00a0", InvalidInputError),
        ("Who?", "\ud800", InvalidInputError),
        ("Who? " * 200, CONTEXT, PromptTooLongError),
    ],
)
def test_bad_input_is_refused_at_the_call(answerer, call, question, context, error):
    with pytest.raises(error):
        getattr(answerer, call)(question, context)


def test_a_nul_character_is_text(answerer):
    answer = answerer.answer("Rollo\x00?", "He was Rollo\x00? Yes.", config=GenerationConfig(extractive=True))
    assert answer.text == "Rollo\x00?"


def test_a_config_has_to_be_one(answerer):
    with pytest.raises(InvalidInputError, match="got config of type dict; expected a GenerationConfig"):
        answerer.answer("Who?", CONTEXT, config={"num_answers": 2})


def test_more_answers_than_spans_are_refused(answerer):
    config = GenerationConfig(extractive=True, num_answers=4)
    with pytest.raises(InvalidInputError, match="got num_answers 4; context 1 has only 3 different spans"):
        answerer.answer_batch(["Who?"] * 2, [CONTEXT, "a b"], config=config)
    assert answerer._engine.prompts == []


def test_a_long_document_gives_the_best_window_and_offsets_in_the_whole(answerer):
    words = [f"word{index}" for index in range(150)]
    words[120] = "Rollo"
    document = " ".join(words)
    answer = answerer.answer("Rollo", document, config=GenerationConfig(extractive=True, max_new_tokens=4))
    assert answer.windows > 2
    assert answer.window > 0
    assert document[answer.start : answer.end] == answer.text == "Rollo"
    assert answer.prompt_tokens > 300


def test_an_answer_that_is_whole_in_no_window_is_not_found(answerer):
    document = " ".join(f"word{index}" for index in range(150))

    def ask(question, stride):
        config = GenerationConfig(extractive=True, max_new_tokens=20, stride=stride)
        return answerer.answer(question, document, config=config).text

    (windows,) = encode_windows(
        answerer._requests._tokenizer,
        ["word10 word11"],
        [document],
        max_positions=128,
        max_new_tokens=20,
        settings=WindowSettings(stride=0),
    )
    first = len(windows[0].text.split())
    parted = f"word{first - 1} word{first}"
    assert parted in document
    assert not any(parted in window.text for window in windows)
    assert ask(parted, stride=0) != parted
    assert ask(parted, stride=30) == parted


@pytest.mark.parametrize("num_answers", [1, 2])
def test_where_no_word_has_so_few_tokens_there_is_no_answer(answerer, num_answers):
    config = GenerationConfig(extractive=True, max_new_tokens=2, num_answers=num_answers)
    answer = answerer.answer("Rollo", "Przewalskiczuk Przewalskiczyk", config=config)
    assert (answer.text, answer.finish_reason, answer.start) == ("", "no_answer", None)
    assert answerer.answer("Rollo", f"Przewalskiczuk {CONTEXT}", config=config).text in CONTEXT


def test_an_answer_tells_its_score_place_and_reason(answerer):
    answer = answerer.answer("Rollo", CONTEXT)
    tokens = answer.new_tokens + 1
    logprob = 10.0 - np.log(np.exp(10.0) + 399)
    assert answer.score == pytest.approx(np.exp(tokens * logprob))
    assert answer.mean_logprob == pytest.approx(logprob)
    assert (answer.start, answer.end) == (CONTEXT.index("Rollo"), CONTEXT.index("Rollo") + 5)
    assert answer.no_answer_probability == pytest.approx(1 / (np.exp(10.0) + 399))
    assert (answer.finish_reason, answer.window, answer.windows, answer.alternatives) == ("stop", 0, 1, ())
    assert repr(answer) == f"Answer('Rollo', score={answer.score:.3f}, start=24, end=29, stop)"
    elsewhere = answerer.answer("William", CONTEXT)
    assert (elsewhere.start, elsewhere.end) == (None, None)
    assert answer.to_dict()["text"] == "Rollo"


def test_several_answers_are_alternatives_of_the_first(answerer):
    config = GenerationConfig(num_answers=3, extractive=True, max_new_tokens=6)
    answer = answerer.answer("Rollo", CONTEXT, config=config)
    texts = [answer.text, *(other.text for other in answer.alternatives)]
    assert texts[0] == "Rollo"
    assert len(set(texts)) == 3
    scores = [answer.score, *(other.score for other in answer.alternatives)]
    assert scores == sorted(scores, reverse=True)
    assert answer.to_dict()["alternatives"][0]["text"] == texts[1]


def test_the_bundles_threshold_holds_unless_the_caller_has_one():
    with echo_answerer(no_answer={"threshold": 0.0}) as answerer:
        answer = answerer.answer("Rollo", CONTEXT)
        assert (answer.text, answer.finish_reason, answer.start, answer.new_tokens) == ("", "no_answer", None, 0)
        config = GenerationConfig(no_answer_threshold=1.0)
        assert answerer.answer("Rollo", CONTEXT, config=config).text == "Rollo"
