"""Several files with one list of questions; predictions."""

from __future__ import annotations

import re

import pytest
from data_rows import PASSAGE, ROW, write_csv
from fakes import write_json

from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_sources
from qa_onnx.data.rows import skipped_lines
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.predictions import read_predictions

TWO_FIELDS = ("context", "question", "answers")


def test_several_files_have_one_list_of_questions_whose_places_name_the_file(tmp_path):
    first = write_csv(tmp_path / "a.csv", TWO_FIELDS, (PASSAGE, "How long?", "211 km"))
    second = write_json(tmp_path / "b.json", [ROW | {"id": ""}, ROW])
    examples = read_sources([first, second])
    assert [example.id for example in examples] == ["a.csv: line 2", "b.json: [0]", "q"]
    assert [example.place for example in examples] == [f"{first}: line 2", f"{second}: [0]", f"{second}: [1]"]
    assert [example.id for example in read_sources([first])] == ["line 2"]
    (tmp_path / "more").mkdir()
    third = write_csv(tmp_path / "more" / "a.csv", TWO_FIELDS, (PASSAGE, "How long?", "211 km"))
    assert [example.id for example in read_sources([first, third])] == [f"{first}: line 2", f"{third}: line 2"]


def test_ids_that_several_files_share_are_named_with_both_places(tmp_path):
    first = write_csv(tmp_path / "a.csv", ("id", *TWO_FIELDS), ("x", PASSAGE, "How long?", "211 km"))
    second = write_json(tmp_path / "b.json", [ROW, ROW | {"id": "x"}])
    words = f"{second}: [1].id: got 'x'; expected an id of its own ({first}: line 2 has it too)"
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        read_sources([first, second])
    skipped: list[str] = []
    assert [example.id for example in read_sources([first, second], skipped=skipped)] == ["x", "q"]
    assert skipped == [words]


def test_one_file_is_not_read_twice(tmp_path):
    path = write_json(tmp_path / "a.json", [ROW])
    (tmp_path / "link.json").symlink_to(path)
    for other in (path, str(path), tmp_path / "." / "a.json", tmp_path / "link.json"):
        with pytest.raises(InvalidInputError, match="twice; expected different sources"):
            read_sources([path, other])
    with pytest.raises(InvalidInputError, match="no source"):
        read_sources([])


@pytest.mark.parametrize(
    ("content", "words"), [("", "file is empty"), ("context,question,answers\n,,\n", "its only row is bad")]
)
def test_each_of_several_files_must_have_questions(content, words, tmp_path):
    (tmp_path / "b.csv").write_text(content)
    with pytest.raises(InvalidInputError, match=f"b.csv: .*{words}"):
        read_sources([write_json(tmp_path / "a.json", [ROW]), tmp_path / "b.csv"], skipped=[])


def test_a_directory_among_several_files_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match=f"{tmp_path}: got a folder without a data set"):
        read_sources([write_json(tmp_path / "a.json", [ROW]), tmp_path])


def test_the_first_skipped_rows_are_named_and_the_others_counted():
    assert skipped_lines([]) == []
    assert skipped_lines(["a"]) == ["skipped: a"]
    assert len(skipped_lines(["a"] * 5)) == 5
    assert skipped_lines(["a"] * 1_006)[5:] == ["skipped: 1,001 more bad rows"]


def test_equal_examples_may_have_different_places():
    values = {"id": "q", "title": "", "context": "c", "question": "q", "answers": ()}
    first, second = Example(**values, place="a: line 1"), Example(**values)
    assert first == second
    assert hash(first) == hash(second)


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
