"""Names of columns: how they are found, and what an error says to type."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from data_rows import PASSAGE, write_csv
from fakes import write_json

from qa_onnx.data.columns import find_columns, parse_columns
from qa_onnx.data.example import GoldAnswer
from qa_onnx.data.reader import read_examples
from qa_onnx.errors import InvalidInputError

CELLS = {"context": PASSAGE, "question": "How long?", "answers": "211 km", "answer_start": "38"}


@pytest.mark.parametrize(
    "names",
    [
        ("Passage", "QUESTION", "Answer", "Answer Start"),
        ("TEXT", "Query", "Reply", "answer-start"),
        ("Context", "question", "ANSWERS", "AnswerStart"),
        (" context ", "que stion", "answers", "_answer_start"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "txt", "jsonl"])
def test_columns_are_found_in_any_case_and_with_any_of_space_hyphen_and_underscore(names, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(dict(zip(names, CELLS.values(), strict=True))))
    else:
        write_csv(path, names, CELLS.values())
    (example,) = read_examples(path)
    assert (example.context, example.question) == (PASSAGE, "How long?")
    assert example.answers == (GoldAnswer(text="211 km", start=38),)


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        (("Passage Text", "q", "answers"), 'context="Passage Text" question=q'),
        (("Passage Text", "q", "ans"), 'context="Passage Text" question=q answers=ans'),
        (("doc", "question", "answer_text"), "context=doc answers=answer_text"),
        (("body", "prompt", "response"), "context=body question=prompt answers=response"),
        (("content", "query", "gold"), "context=content answers=gold"),
        (("Kontext", "Frage", "Antwort"), "context=Kontext question=Frage answers=Antwort"),
        (("contexte", "question", "Réponse"), "context=contexte answers=Réponse"),
        (("question_text", "answer_text", "paragraph"), "context=paragraph question=question_text answers=answer_text"),
        (("answer_context", "questions", "answer_id"), "context=answer_context question=questions answers=NAME"),
        (("DocumentText", "QuestionId", "UserQuestion"), "context=DocumentText question=UserQuestion answers=NAME"),
        (("passsage", "qestion", "anwser"), "context=passsage question=qestion answers=anwser"),
        (('the "text"', "question", "answer"), """context='the "text"'"""),
        (("pas$age body", "question", "answer"), "context='pas$age body'"),
        (("x", "y", "z"), "context=NAME question=NAME answers=NAME"),
        (("x", "question", "z"), "context=NAME answers=NAME"),
        (("1", "2", "3"), "context=NAME question=NAME answers=NAME"),
    ],
)
def test_an_error_says_which_columns_to_give(header, hint, tmp_path):
    path = write_csv(tmp_path / "rows.csv", header, (PASSAGE, "How long?", "211 km"))
    with pytest.raises(InvalidInputError) as caught:
        read_examples(path)
    assert str(caught.value).endswith(f"; expected it, or its name. Pass --columns {hint}")
    assert f"among {', '.join(map(repr, header))}" in str(caught.value)
    if "NAME" not in hint:  # what is said to be typed is read by a shell
        typed = parse_columns(shlex.split(hint))
        assert len(read_examples(path, columns=typed)) == 1


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"question": "ask"}, "question=ask context=body answers=reply_text"),
        ({"question": "aks"}, "question=ask context=body answers=reply_text"),
        ({"context": "Body"}, "context=body question=ask answers=reply_text"),
        ({"title": "topic"}, "title=NAME context=body question=ask answers=reply_text"),
    ],
)
def test_the_columns_to_give_hold_those_that_were_given(columns, hint, tmp_path):
    path = write_csv(tmp_path / "rows.csv", ("body", "ask", "reply_text"), (PASSAGE, "How long?", "211 km"))
    with pytest.raises(InvalidInputError) as caught:
        read_examples(path, columns=columns)
    typed = str(caught.value).partition("--columns ")[2]
    assert sorted(typed.split()) == sorted(hint.split())
    if "NAME" not in typed:
        (example,) = read_examples(path, columns=dict(option.split("=") for option in typed.split()))
        assert (example.context, example.answers[0].text) == (PASSAGE, "211 km")


def test_answers_are_no_column_to_give_where_none_are_needed(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ("body", "ask", "reply_text"), (PASSAGE, "How long?", "211 km"))
    with pytest.raises(InvalidInputError, match=r"--columns context=body question=ask$"):
        read_examples(path, needs_answers=False)


@pytest.mark.parametrize(
    ("header", "field", "names"),
    [
        (("passage", "text", "question", "answers"), "context", ("passage", "text")),
        (("Text", "PASSAGE", "question", "answers"), "context", ("PASSAGE", "Text")),
        (("Context", "CONTEXT", "question", "answers"), "context", ("Context", "CONTEXT")),
        (("context", "query", "Query", "answers"), "question", ("query", "Query")),
        (("context", "question", "answer", "reply"), "answers", ("answer", "reply")),
        (("context", "question", "answer", "Answer "), "answers", ("answer", "Answer")),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_two_columns_that_fit_one_field_are_refused_with_what_to_give(header, field, names, suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        write_csv(path, header, [PASSAGE] * 4)
    else:
        write_json(path, [dict.fromkeys((name.strip() for name in header), PASSAGE)])
    first, second = names
    words = f"columns {first!r} and {second!r} both fit {field}; expected one of them. Pass --columns {field}="
    with pytest.raises(InvalidInputError, match=re.escape(f"{words}{first} or --columns {field}={second}")):
        read_examples(path)
    for name in names:
        assert len(read_examples(path, columns={field: name})) == 1


@pytest.mark.parametrize(
    ("others", "columns"),
    [
        ({"text": "no"}, {}),
        ({"passage": "no", "text": "no", "Context": "no"}, {}),
        ({"answer": "no", "reply": "no"}, {}),
        ({"query": "no", "Question": "no"}, {}),
        ({"ID": "no", "Title": "no"}, {}),
        ({"passage": "no"}, {"title": "passage"}),
    ],
)
def test_the_own_name_of_a_field_wins(others, columns, tmp_path):
    row = {"id": "q", "title": "t", **CELLS}
    for names in ({**others, **row}, {**row, **others}):
        (example,) = read_examples(write_json(tmp_path / "rows.json", [names]), columns=columns)
        assert (example.id, example.context, example.question) == ("q", PASSAGE, "How long?")
        assert example.answers == (GoldAnswer(text="211 km", start=38),)


def test_a_column_that_was_given_for_one_field_is_none_of_another(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ("text", "passage", "reply"), ("How long?", PASSAGE, "211 km"))
    (example,) = read_examples(path, columns={"question": "text"})
    assert (example.context, example.question) == (PASSAGE, "How long?")


def test_gold_columns_that_are_not_needed_may_be_several(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ("context", "question", "answer", "reply"), (PASSAGE, "How long?", "", ""))
    assert len(read_examples(path, needs_answers=False)) == 1


def test_columns_without_other_names_get_no_option_to_give():
    with pytest.raises(InvalidInputError, match=r"among 'ask', 'context'; expected it \('ask' may be meant\)$"):
        find_columns(["ask", "context"], required=["question"])
    with pytest.raises(InvalidInputError, match=r"'text' and 'TEXT' both fit context; expected one of them$"):
        find_columns(["text", "TEXT"])
    assert find_columns(["Passage", "other"]) == {"context": "Passage"}
