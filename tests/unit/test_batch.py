"""`AnswerBatch`: columns in, columns out, in the input's order, with errors of rows or without."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import CONTEXT, echo_answerer

from qa_onnx import EngineConfig, EngineError, GenerationConfig, InvalidInputError, ProviderError, batch
from qa_onnx.batch import RESULTS, AnswerBatch

OTHER = "Oxygen was discovered in 1774 by Joseph Priestley. " * 3


@pytest.fixture
def loads(monkeypatch):
    """The answerers that were loaded, of an engine that echoes."""
    loaded = []

    def load(path, *, provider, config):
        loaded.append(echo_answerer())
        loaded[-1].asked = []
        answer_batch = loaded[-1].answer_batch

        def note(questions, contexts, **options):
            loaded[-1].asked.append(list(zip(questions, contexts, strict=True)))
            return answer_batch(questions, contexts, **options)

        loaded[-1].answer_batch = note
        return loaded[-1]

    monkeypatch.setattr(batch.Answerer, "from_pretrained", load)
    monkeypatch.setattr(batch, "_loaded", {})
    yield loaded
    for answerer in loaded:
        answerer.close()


def rows(count=30):
    questions = [f"Question {index}?" + " long" * (index % 7) for index in range(count)]
    return {"id": list(range(count)), "question": questions, "context": [(CONTEXT, OTHER)[i % 2] for i in range(count)]}


def test_results_are_those_of_the_answerer_in_the_order_of_the_input(loads):
    given = rows()
    out = AnswerBatch("bundle")(given)
    assert list(out) == ["id", "question", "context", *RESULTS]
    assert all(out[name] is given[name] for name in given)
    expected = loads[0].answer_batch(given["question"], given["context"])
    for name in RESULTS:
        assert out[name] == [getattr(answer, "text" if name == "answer" else name) for answer in expected]


def test_questions_of_one_context_are_asked_one_after_another(loads):
    AnswerBatch("bundle")(rows())
    contexts = [context for _, context in loads[0].asked[-1]]
    assert contexts == sorted(contexts)
    assert set(contexts) == {CONTEXT, OTHER}


def test_a_bundle_is_loaded_at_the_first_batch_and_once_for_all_copies_and_threads(loads):
    answers = AnswerBatch("bundle", engine=EngineConfig(threads=1))
    copies = [pickle.loads(pickle.dumps(answers)) for _ in range(4)]  # noqa: S301 - our own
    assert not loads
    threads = [threading.Thread(target=copy, args=(rows(3),)) for copy in copies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    AnswerBatch("bundle", engine=EngineConfig())(rows(3))
    assert len(loads) == 2
    answers.close()
    assert answers(rows(1))["answer"]
    assert len(loads) == 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_process_loads_a_bundle_of_its_own(loads):
    answers = AnswerBatch("bundle")
    expected = answers(rows(3))["answer"]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: theirs.send((answers(rows(3))["answer"], len(loads)))
    )
    process.start()
    assert ours.poll(20)
    assert ours.recv() == (expected, 2)
    process.join()


def test_a_path_is_the_same_in_a_worker_of_another_working_directory(monkeypatch, tmp_path):
    answers = AnswerBatch("bundle")
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(answers)).model == here / "bundle"  # noqa: S301 - our own


BAD = {
    3: (None, CONTEXT, "question is missing"),
    4: (float("nan"), CONTEXT, "question is missing"),
    8: ("Who?", " \n", "context is empty or only white space"),
    9: (7, OTHER, "question is of type int"),
    15: ("word " * 500, OTHER, "question has .* tokens; .* leaves"),
    16: ("\ud800?", CONTEXT, "question has a lone surrogate"),
}


def bad_rows(*numbers):
    given = rows()
    for number in numbers or BAD:
        given["question"][number], given["context"][number] = BAD[number][:2]
    return given


def test_with_null_bad_rows_say_why_and_the_others_are_answered(loads):
    out = AnswerBatch("bundle", on_error="null")(bad_rows())
    good = AnswerBatch("bundle")(rows())
    for index in range(30):
        if index in BAD:
            assert all(out[name][index] is None for name in RESULTS)
            assert re.match(BAD[index][2], out["error"][index])
        else:
            assert out["error"][index] is None
            assert all(out[name][index] == good[name][index] for name in RESULTS)


@pytest.mark.parametrize("number", BAD)
def test_with_raise_the_row_is_named(loads, number):
    with pytest.raises(InvalidInputError, match=f"^row {number}: {BAD[number][2]}"):
        AnswerBatch("bundle")(bad_rows(number))


def test_an_engine_that_fails_one_row_fails_that_row_and_one_that_fails_all_fails_the_batch(loads, monkeypatch):
    answers = AnswerBatch("bundle", on_error="null")
    answers(rows(1))
    answer_batch = loads[0].answer_batch

    def fail(questions, contexts, **options):
        if failing & set(questions):
            raise EngineError("no probability")
        return answer_batch(questions, contexts, **options)

    monkeypatch.setattr(loads[0], "answer_batch", fail)
    given = rows()
    failing = {given["question"][5]}
    assert [index for index, error in enumerate(answers(given)["error"]) if error] == [5]
    failing = set(given["question"])
    with pytest.raises(EngineError, match="no probability"):
        answers(given)


def test_errors_that_are_no_rows_are_raised_in_any_case(loads, monkeypatch):
    with pytest.raises(InvalidInputError, match="window 100000"):
        AnswerBatch("bundle", on_error="null", generation=GenerationConfig(window=100_000))(rows())

    def refuse(path, **options):
        raise ProviderError("no such provider")

    monkeypatch.setattr(batch.Answerer, "from_pretrained", refuse)
    with pytest.raises(ProviderError):
        AnswerBatch("other", on_error="null")(rows())


def test_columns_may_have_other_names_and_be_arrays(loads):
    given = rows(4)
    columns = {"ask": np.array(given["question"], object), "doc": np.array(given["context"]), "answer": [1, 2, 3, 4]}
    out = AnswerBatch("bundle", question="ask", context="doc", prefix="qa_", on_error="null")(columns)
    assert out["qa_answer"] == AnswerBatch("bundle")(given)["answer"]
    assert out["answer"] == [1, 2, 3, 4]
    assert list(out)[-1] == "qa_error"


def test_columns_of_arrow_tables_and_frames_are_taken(loads):
    given = rows(4)
    expected = AnswerBatch("bundle")(given)["answer"]
    table = pytest.importorskip("pyarrow").table(given)
    assert AnswerBatch("bundle")(dict(zip(table.column_names, table.columns, strict=True)))["answer"] == expected
    frame = pytest.importorskip("pandas").DataFrame(given, index=[7, 3, 5, 1])
    assert AnswerBatch("bundle")(dict(frame.items()))["answer"] == expected


def test_no_rows_are_no_error(loads):
    out = AnswerBatch("bundle")({"question": [], "context": []})
    assert out == {name: [] for name in ("question", "context", *RESULTS)}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"question": ["Who?"]}, "no column 'context' among 'question'"),
        ({}, "no column 'question' and 'context' among none"),
        ({"question": ["Who?"], "context": []}, "0 values of 'context' and 1 of 'question'"),
        ({"question": ["Who?"], "context": ["A."], "score": [1]}, "'score' is in the input already.*prefix"),
    ],
)
def test_tables_that_do_not_fit_are_refused_before_a_model_is_loaded(loads, columns, words):
    with pytest.raises(InvalidInputError, match=words):
        AnswerBatch("bundle")(columns)
    assert not loads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_error": "skip"}, "on_error 'skip'; expected one of raise, null"),
        ({"question": "text", "context": "text"}, "two"),
        ({"generation": GenerationConfig(num_answers=2)}, "num_answers 2"),
        ({"generation": {"extractive": True}}, "generation of type dict"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(InvalidInputError, match=words):
        AnswerBatch("bundle", **options)
