"""Cells of CSV and texts of JSON: lists that are written out, and what is no answer."""

from __future__ import annotations

import csv

import pytest
from data_rows import PASSAGE, ROW
from fakes import write_json

from qa_onnx.data.example import GoldAnswer
from qa_onnx.data.reader import read_examples
from qa_onnx.errors import InvalidInputError


def cell_read(tmp_path, cell, context=PASSAGE, column="answers"):
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["context", "question", column], [context, "How long?", cell]])
    return [(answer.text, answer.start) for answer in read_examples(tmp_path / "rows.csv")[0].answers]


@pytest.mark.parametrize(
    "cell",
    [
        "{'text': ['211 km'], 'answer_start': [38]}",
        '{"text": ["211 km"], "answer_start": [38]}',
        "{'text': array(['211 km'], dtype=object), 'answer_start': array([38], dtype=int32)}",
        "{'answer_start': array([38]), 'text': array(['211 km'],\n      dtype='<U6')}",
        "{'text': np.array(['211 km']), 'answer_start': [np.int64(38)]}",
        "[{'text': '211 km', 'answer_start': 38}]",
        "['211 km']",
        '["211 km"]',
        "('211 km',)",
        "array(['211 km'], dtype=object)",
        "{'text': '211 km', 'answer_start': nan}",
        "  ['211 km']\n",
        "211 km",
    ],
)
def test_lists_and_dicts_that_are_written_out_in_csv_are_read(cell, tmp_path):
    assert cell_read(tmp_path, cell) == [("211 km", 38)]


def test_arrays_as_numpy_prints_them_are_lists(tmp_path):
    assert cell_read(tmp_path, "['211 km' 'long']") == [("211 km", 38), ("long", 45)]
    assert cell_read(tmp_path, "{'text': ['211 km' 'long'], 'answer_start': [38 45]}") == [("211 km", 38), ("long", 45)]
    assert cell_read(tmp_path, r"""["It's" 'a "b\'"']""", """It's a "b'".""") == [("It's", 0), ("""a "b'\"""", 5)]


@pytest.mark.parametrize(
    "cell",
    [
        "nan",
        "NaN",
        "None",
        "null",
        "<NA>",
        "[]",
        "{'text': [], 'answer_start': []}",
        "",
        " ",
        "array([], dtype=object)",
        "()",
        "np.nan",
        "none",
        "NONE",
        "Nan",
        "N/A",
        "['nan']",
        '["None"]',
        "''",
    ],
)
def test_cells_without_a_value_are_no_answer(cell, tmp_path):
    assert cell_read(tmp_path, cell) == []
    assert cell_read(tmp_path, cell, column="Answer") == []


@pytest.mark.parametrize(
    ("cell", "context"),
    [("None", "None of them won."), ("nan", "He asked his nan."), ("[1]", "As is said in [1]."), ("{x}", "Type {x}.")],
)
def test_cells_that_stand_in_their_passage_are_text(cell, context, tmp_path):
    assert cell_read(tmp_path, cell, context) == [(cell, context.index(cell))]
    assert cell_read(tmp_path, cell, "Nonetheless, nanometres.") == [] if cell in ("None", "nan") else True


@pytest.mark.parametrize(
    "cell",
    [
        "{'text': ['211 km'], 'answer_st",
        "['211 km'",
        "[1]",
        "{'a': 1}",
        "{'text': ['211 km'], 'answer_start': [38, 40]}",
        "[os.system('true')]",
        "[" * 30 + "]" * 30,
        "{" + "'a': {" * 5_000,
        "[sic] 211",
        "{'text': [None]}",
        "[['211 km']]",
        "['211 km'] or so",
        "{'text': 7}",
        "{[1]: 2}",
        "set()",
        "OrderedDict([('text', ['211 km'])])",
        "Series([], dtype: object)",
        "frozenset({1})",
    ],
)
def test_cells_that_look_written_out_and_cannot_be_read_are_refused(cell, tmp_path):
    with pytest.raises(InvalidInputError, match=r"rows.csv: line 2: answers.*: got .*expected"):
        cell_read(tmp_path, cell)


@pytest.mark.parametrize("text", ["None", "NaN", "[]", "{}", "()", "nan", "NONE", "np.nan", "[None]", "''", "['nan']"])
def test_a_text_that_says_that_there_is_nothing_is_no_answer_in_json_either(text, tmp_path):
    (example,) = read_examples(write_json(tmp_path / "rows.json", [{**ROW, "answers": text}]))
    assert example.answers == ()
    if text != "['nan']":  # a list in a list is no answer, and what it writes out stays text
        (example,) = read_examples(write_json(tmp_path / "rows.json", [{**ROW, "answers": [text, "211 km"]}]))
        assert [answer.text for answer in example.answers] == ["211 km"]
    row = {**ROW, "context": f"It is {text} there.", "answers": text}
    assert read_examples(write_json(tmp_path / "rows.json", [row]))[0].answers == (GoldAnswer(text=text, start=6),)


@pytest.mark.parametrize("text", ["[1]", "{'a': 1}", "[sic]", "['cut", "('a')", "sin(x)", "nanometres", "set theory"])
def test_text_of_json_stays_text(text, tmp_path):
    (example,) = read_examples(write_json(tmp_path / "rows.json", [{**ROW, "answers": text}]))
    assert [answer.text for answer in example.answers] == [text]


@pytest.mark.parametrize(
    "text", ["['211 km']", "{'text': ['211 km'], 'answer_start': [38]}", '[{"text": "211 km", "answer_start": 38}]']
)
def test_answers_that_are_written_out_in_json_are_read_unless_they_stand_in_the_passage(text, tmp_path):
    (example,) = read_examples(write_json(tmp_path / "rows.json", [{**ROW, "answers": text}]))
    assert example.answers == (GoldAnswer(text="211 km", start=38),)
    row = {**ROW, "context": f"Type {text}.", "answers": text}
    assert read_examples(write_json(tmp_path / "rows.json", [row]))[0].answers == (GoldAnswer(text=text, start=5),)


@pytest.mark.parametrize("column", ["context", "question"])
@pytest.mark.parametrize("word", ["nan", "None", "NULL", ""])
def test_a_passage_or_a_question_that_is_missing_in_csv_is_refused(column, word, tmp_path):
    cells = {"context": PASSAGE, "question": "How long?", "answers": "211 km"} | {column: word}
    (tmp_path / "rows.csv").write_text(f"{','.join(cells)}\n{','.join(cells.values())}\n")
    with pytest.raises(InvalidInputError, match=f"line 2: {column}: got (a JSON null|an empty string)"):
        read_examples(tmp_path / "rows.csv")
