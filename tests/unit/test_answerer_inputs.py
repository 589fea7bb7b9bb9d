from __future__ import annotations

import copy
import pickle
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from fakes import CONTEXT, echo_answerer, small_tokenizer

from qa_onnx import Answerer, BundleError, ClosedError, InvalidInputError


class Table:
    """As a DataFrame of pandas: it yields the names of its columns."""

    ndim = 2

    def __iter__(self):
        return iter(["Who?"])


@pytest.fixture
def answerer():
    return echo_answerer()


def test_answers_come_in_the_order_asked():
    questions = [f"Question {index}?" + " long" * (index * 7 % 10) for index in range(40)]
    contexts = [CONTEXT[: 5 + index % 9] for index in range(40)]
    together = list(zip(questions, contexts, strict=True))
    random.Random(0).shuffle(together)
    questions, contexts = zip(*together, strict=True)
    with echo_answerer(config={"batch_size": 6}) as answerer:
        answers = answerer.answer_batch(questions, contexts, max_new_tokens=64)
        assert [answer.text for answer in answers] == list(questions)
        assert max(answerer._engine.sequence_counts) == 6


def test_an_answer_tells_its_tokens_and_why_it_ended(answerer):
    prompt = small_tokenizer().encode(f"Context: {CONTEXT}\nQuestion: Who?\nAnswer:")
    answer = answerer.answer("Who?", CONTEXT, max_new_tokens=20)
    assert (answer.text, answer.finish_reason, answer.prompt_tokens) == ("Who?", "stop", len(prompt.ids))
    assert answer.token_ids == tuple(small_tokenizer().encode(" Who?").ids)
    assert answer.new_tokens == len(answer.token_ids)
    short = answerer.answer("Who was it?", CONTEXT, max_new_tokens=2)
    assert (short.new_tokens, short.finish_reason) == (2, "length")


def test_one_call_and_a_batch_of_one_agree(answerer):
    assert answerer.answer_batch(["Who?"], [CONTEXT]) == [answerer.answer("Who?", CONTEXT)]


def test_nothing_asked_is_nothing_answered(answerer):
    assert answerer.answer_batch([], []) == []


@pytest.mark.parametrize("context", [CONTEXT, np.str_(CONTEXT)])
@pytest.mark.parametrize("questions", [["Who?", "When?", "Who?"], ("Who?",), np.array(["Who?", "When?"]), []])
def test_one_context_is_that_of_all_questions(answerer, questions, context):
    expected = answerer.answer_batch(questions, [CONTEXT] * len(questions))
    assert answerer.answer_batch(questions, context) == expected
    assert answerer.answer_batch((question for question in questions), context) == expected
    assert len(expected) == len(questions)


@pytest.mark.parametrize(
    ("questions", "contexts", "words"),
    [
        ("Who?", ["context"], "got questions of type str; expected a list of strings.*answer"),
        ("Who?", "context", "got questions of type str"),
        (np.str_("Who?"), ["context"], "got questions of type str_; expected a list of strings"),
        (["Who?"], b"context", "got contexts of type bytes"),
        (["Who?"], np.array("context"), "got contexts of type ndarray"),
        (["Who?"], {"context"}, "got contexts of type set"),
        (["Who?"], " ", "context 0 "),
        (["Who?", "When?"], "", "context 0 "),
        (None, ["context"], "got questions of type NoneType"),
        ({"Who?"}, ["context"], "got questions of type set"),
        ({"Who?": 1}, ["context"], "got questions of type dict"),
        (b"Who?", ["context"], "got questions of type bytes"),
        (np.array("Who?"), ["context"], "got questions of type ndarray; expected a list of strings"),
        (np.array([["Who?"]]), ["context"], "got questions of type ndarray; expected a list of strings, or a column"),
        (Table(), ["context"], "got questions of type Table; expected a list of strings, or a column of a table"),
        (np.array([1.5]), ["context"], "question 0 is of type float64; expected a string"),
        ([b"Who?"], ["context"], "question 0 is of type bytes; expected a string"),
        (["Who?"], [], "got 1 questions and 0 contexts"),
        (["Who?", ""], ["context"] * 2, "question 1 is empty"),
        (["Who?", None], ["context"] * 2, "question 1 is of type NoneType"),
    ],
)
def test_bad_questions_and_contexts_are_refused(answerer, questions, contexts, words):
    with pytest.raises(InvalidInputError, match=words):
        answerer.answer_batch(questions, contexts)
    assert answerer._engine.prompts == []


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2"])
def test_max_new_tokens_has_to_be_a_positive_whole_number(answerer, value):
    words = f"got max_new_tokens {value!r}; expected a whole number of at least 1"
    for call in (answerer.answer, answerer.submit, answerer.stream):
        with pytest.raises(InvalidInputError, match=words):
            call("Who?", CONTEXT, max_new_tokens=value)
    with pytest.raises(InvalidInputError, match=words):
        answerer.answer_batch(["Who?"], [CONTEXT], max_new_tokens=value)
    with pytest.raises(InvalidInputError, match=words):
        list(answerer.answer_iter([("Who?", CONTEXT)], max_new_tokens=value))
    assert answerer._engine.prompts == []


class Series:
    """As of pandas: it yields its values, and `[0]` looks for a label."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        raise KeyError(label)


@pytest.mark.parametrize(
    "kind",
    [tuple, np.array, lambda texts: np.array(texts, dtype=object), Series, iter, lambda texts: (t for t in texts)],
    ids=["tuple", "array", "array of objects", "series", "iterator", "generator"],
)
def test_texts_may_come_in_anything_that_yields_them(answerer, kind):
    questions, contexts = ["Who?", "Where is it?"], [CONTEXT, "In Rouen."]
    answers = answerer.answer_batch(kind(questions), kind(contexts))
    assert answers == answerer.answer_batch(questions, contexts)
    assert [answer.text for answer in answers] == questions


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_answerer_cannot_go_to_another_process(answerer, duplicate):
    with pytest.raises(InvalidInputError, match="Load the bundle in each process"):
        duplicate(answerer)


def test_a_process_pool_says_so_too(answerer):
    with ProcessPoolExecutor(1) as pool, pytest.raises(InvalidInputError, match="Load the bundle in each process"):
        pool.submit(answerer.answer, "Who?", CONTEXT).result()


def test_bad_input_is_a_value_error_too(answerer):
    with pytest.raises(ValueError, match="question 0 is empty"):
        answerer.answer("", CONTEXT)


def test_after_close_every_call_is_an_error(answerer):
    answerer.close()
    answerer.close()
    for call in (lambda: answerer.answer("Who?", CONTEXT), lambda: answerer.answer_batch([], [])):
        with pytest.raises(ClosedError, match="from_pretrained"):
            call()


def test_a_with_block_closes(answerer):
    with answerer as entered:
        assert entered is answerer
        assert entered.answer("Who?", CONTEXT).text == "Who?"
    with pytest.raises(ClosedError):
        answerer.answer("Who?", CONTEXT)


def test_the_representation_names_model_precision_and_state(answerer):
    assert repr(answerer) == "Answerer('small', precision='fp32', provider='cpu')"
    answerer.close()
    assert repr(answerer) == "Answerer('small', precision='fp32', closed)"


def test_loading_what_is_no_bundle_is_a_bundle_error(tmp_path):
    with pytest.raises(BundleError, match="there is no such directory"):
        Answerer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [{"batch_size": 2}, 2, "cpu"])
def test_an_engine_config_has_to_be_one(tmp_path, config):
    with pytest.raises(
        InvalidInputError, match=f"got config of type {type(config).__name__}; expected an EngineConfig"
    ):
        Answerer.from_pretrained(tmp_path, config=config)
