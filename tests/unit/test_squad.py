from __future__ import annotations

import json
import re

import pytest
from fakes import CONTEXT, squad_data, write_json

from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.squad import GoldAnswer, parse_squad, read_predictions, read_squad

ABSENT = object()
P, Q = ("data", 0, "paragraphs", 0), ("data", 0, "paragraphs", 0, "qas", 1)
A = (*Q, "answers", 0)


def changed(path, value):
    data = squad_data()
    if not path:
        return value
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return data


def test_a_v2_file_is_read(tmp_path):
    first, second, third = read_squad(write_json(tmp_path / "data.json", squad_data()))
    assert (first.id, first.title, first.context, first.question) == ("q1", "Normans", CONTEXT, "Who led the Normans?")
    assert first.answers == (GoldAnswer(text="Rollo", start=24), GoldAnswer(text="led by Rollo", start=17))
    assert [answer.text for answer in second.answers] == ["in Normandy"]
    assert (third.id, third.context, third.answers) == ("q3", "Nothing.", ())


def test_a_v1_file_has_neither_version_nor_is_impossible(tmp_path):
    data = squad_data()
    del data["version"]
    data["data"][0]["paragraphs"].pop()
    del data["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"]
    del data["data"][0]["title"]
    examples = read_squad(str(write_json(tmp_path / "data.json", data)))
    assert [(example.id, example.title, len(example.answers)) for example in examples] == [("q1", "", 2), ("q2", "", 1)]


def test_an_impossible_question_has_no_answers_whatever_is_listed():
    data = changed((*Q, "is_impossible"), True)
    assert [len(example.answers) for example in parse_squad(data, source="here")] == [2, 0, 0]


@pytest.mark.parametrize(
    ("path", "value", "place", "given"),
    [
        ((), [], "the top level", "a JSON array"),
        ((), "text", "the top level", "a JSON string"),
        (("data",), ABSENT, "data", "nothing"),
        (("data",), {}, "data", "a JSON object"),
        (("data",), [], "data", "no questions"),
        (("data", 0), 3, "data[0]", "a JSON number"),
        (("data", 0, "title"), 3, "data[0].title", "a JSON number"),
        (("data", 0, "paragraphs"), None, "data[0].paragraphs", "a JSON null"),
        (("data", 0, "paragraphs"), [], "data", "no questions"),
        (("data", 0, "paragraphs", 1), [], "data[0].paragraphs[1]", "a JSON array"),
        ((*P, "context"), ABSENT, "data[0].paragraphs[0].context", "nothing"),
        ((*P, "context"), " \n", "data[0].paragraphs[0].context", "an empty string"),
        ((*P, "qas"), ABSENT, "data[0].paragraphs[0].qas", "nothing"),
        ((*P, "qas", 0), "q", "data[0].paragraphs[0].qas[0]", "a JSON string"),
        ((*Q, "id"), 7, "data[0].paragraphs[0].qas[1].id", "a JSON number"),
        ((*Q, "id"), "", "data[0].paragraphs[0].qas[1].id", "an empty string"),
        ((*Q, "id"), "q1", "data[0].paragraphs[0].qas[1].id", "'q1'"),
        ((*Q, "question"), ABSENT, "data[0].paragraphs[0].qas[1].question", "nothing"),
        ((*Q, "question"), "", "data[0].paragraphs[0].qas[1].question", "an empty string"),
        ((*Q, "is_impossible"), "false", "data[0].paragraphs[0].qas[1].is_impossible", "a JSON string"),
        ((*Q, "answers"), ABSENT, "data[0].paragraphs[0].qas[1].answers", "nothing"),
        ((*Q, "answers"), {}, "data[0].paragraphs[0].qas[1].answers", "a JSON object"),
        (A, "Rollo", "data[0].paragraphs[0].qas[1].answers[0]", "a JSON string"),
        ((*A, "text"), False, "data[0].paragraphs[0].qas[1].answers[0].text", "a JSON boolean"),
        ((*A, "text"), "", "data[0].paragraphs[0].qas[1].answers[0].text", "an empty string"),
        ((*A, "answer_start"), ABSENT, "data[0].paragraphs[0].qas[1].answers[0].answer_start", "nothing"),
        ((*A, "answer_start"), "5", "data[0].paragraphs[0].qas[1].answers[0].answer_start", "a JSON string"),
        ((*A, "answer_start"), True, "data[0].paragraphs[0].qas[1].answers[0].answer_start", "a JSON boolean"),
        ((*A, "answer_start"), 1.5, "data[0].paragraphs[0].qas[1].answers[0].answer_start", "a JSON number"),
    ],
)
def test_a_malformed_file_is_named_with_the_place_in_it(path, value, place, given, tmp_path):
    file = write_json(tmp_path / "data.json", changed(path, value))
    with pytest.raises(InvalidInputError, match=re.escape(f"{file}: {place}: got {given}; expected ")):
        read_squad(file)


def test_a_duplicated_id_names_both_places():
    data = changed(("data", 0, "paragraphs", 1, "qas", 0, "id"), "q2")
    with pytest.raises(InvalidInputError) as caught:
        parse_squad(data, source="here")
    assert "data[0].paragraphs[1].qas[0].id" in str(caught.value)
    assert "data[0].paragraphs[0].qas[1] has it too" in str(caught.value)


@pytest.mark.parametrize("read", [read_squad, read_predictions])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        (json.dumps(squad_data()).encode()[:300], "not valid JSON at line 1"),
        (b"", "not valid JSON at line 1, column 1"),
        ('{"q": "café"}'.encode("latin-1"), "byte 10 is not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"q": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
    ids=["absent", "cut", "empty", "latin-1", "deep", "huge number"],
)
def test_a_file_that_is_no_json_is_named(read, content, words, tmp_path):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=re.escape(f"{file}: ") + f".*{re.escape(words)}"):
        read(file)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match=f"{tmp_path}: cannot be read .Is a directory.; expected a JSON file"):
        read_squad(tmp_path)


def test_predictions_are_read(tmp_path):
    assert read_predictions(write_json(tmp_path / "p.json", {"q1": "Rollo", "q3": ""})) == {"q1": "Rollo", "q3": ""}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "got a JSON array; expected an object"),
        ("text", "got a JSON string; expected an object"),
        ({"q1": None}, "the answer of 'q1' is a JSON null; expected a string"),
        ({"q1": "a", "q2": ["b"]}, "the answer of 'q2' is a JSON array; expected a string"),
    ],
)
def test_predictions_of_another_shape_are_named(value, words, tmp_path):
    file = write_json(tmp_path / "p.json", value)
    with pytest.raises(InvalidInputError, match=re.escape(f"{file}: {words}")):
        read_predictions(file)
