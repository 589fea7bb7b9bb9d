"""Bad rows of training data: named, and skipped only when asked."""

from __future__ import annotations

import json

import pytest
from source_files import CONTEXT, ROWS, squad_of

from qa_onnx.data import text_files
from qa_onnx.errors import InvalidInputError
from training.sources import load_source

BAD_ROWS = {
    "rows.csv": (
        f'id,context,question,answers,answer_start\na,"{CONTEXT}",Who founded Tolvik?,Mara,0\nb,,When?,1803,23\n'
        f'c,"{CONTEXT}",Where?,sea,here\n',
        ["line 3: context: got an empty string", "line 4: answer_start: got 'here'"],
    ),
    "rows.jsonl": (
        "\n".join(
            [
                json.dumps({"context": CONTEXT, "question": "Who?", "answer": "Mara"}),
                "{cut",
                json.dumps({"context": CONTEXT, "question": 7, "answer": "Mara"}),
                json.dumps({"context": CONTEXT, "question": "Who?", "answers": [3]}),
                json.dumps({"context": CONTEXT, "question": "Who \ud800?", "answer": "Mara"}),
                json.dumps({"context": CONTEXT, "question": "?", "answers": ["sea"], "answer_start": [1, 2]}),
            ]
        ),
        [
            "not valid JSON at line 2, column 2",
            "line 3: question: got 7",
            "line 4: answers[0]: got 3",
            "line 5: question: got a lone surrogate",
            "line 6: answer_start: got 2 of 1 answers",
        ],
    ),
    "squad.json": (
        json.dumps(
            {
                "data": [
                    {
                        "paragraphs": [
                            {
                                "context": CONTEXT,
                                "qas": [squad_of(ROWS)["data"][0]["paragraphs"][0]["qas"][0], {"id": "x"}],
                            },
                            {"context": 5, "qas": []},
                        ]
                    }
                ]
            }
        ),
        ["data[0].paragraphs[0].qas[1]", "data[0].paragraphs[1].context"],
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_and_skipped_only_when_asked(tmp_path, name):
    text, places = BAD_ROWS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInputError) as raised:
        load_source(str(tmp_path / name), "train")
    assert f"{tmp_path / name}: {places[0]}" in str(raised.value)
    source = load_source(str(tmp_path / name), "train", skip_bad_rows=True)
    assert [example.question for example in source.examples] in (["Who founded Tolvik?"], ["Who?"])
    assert len(source.bad_rows) == len(places)
    for found, place in zip(source.bad_rows, places, strict=True):
        assert place in found
    assert len(source.warnings()) == len(places)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"answers": "Mara"}, {"answers": "reply"}, "no column 'reply'"),
        ({"answers": "Mara"}, {"title": "heading"}, "no column 'heading'"),
        ({}, {}, "no column 'answers'"),
        ({"answers": {"txt": ["Mara"]}}, {}, "answers: got a JSON object"),
        ({"answers": "Ma\ud800ra"}, {}, "lone surrogate"),
        ({"answers": "Mara", "id": "\ud800"}, {}, "lone surrogate"),
        ({"answers": "Mara", "answer_start": float("inf")}, {}, "answer_start: got inf"),
    ],
)
def test_what_would_be_trained_on_wrongly_is_refused(tmp_path, row, columns, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"context": CONTEXT, "question": "Who founded Tolvik?", **row}))
    with pytest.raises(InvalidInputError, match=message):
        load_source(str(path), "train", columns=columns)


def test_rows_of_csv_with_too_many_or_too_few_fields_and_files_that_are_none_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    for row, message in (("a, b,c,d", "line 2: got 4 fields; expected 3"), ("a,b", "line 2: got 2 fields; expected 3")):
        path.write_text(f"context,question,answers\n{row}\n")
        with pytest.raises(InvalidInputError, match=message):
            load_source(str(path), "train")
    path.write_text(f"context,question,answers\na,b,{'c' * 99}\n")
    monkeypatch.setattr(text_files, "MAX_CSV_FIELD", 50)
    with pytest.raises(InvalidInputError, match=r"line 2 is not CSV .*field larger than field limit"):
        load_source(str(path), "train")


def test_a_long_document_fits_into_a_field_and_an_empty_id_is_filled_in(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"id,context,question,answers\n,{'word ' * 40_000},Who?,word\n,Mara did.,Who?,Mara\n")
    first, second = load_source(str(path), "train").examples
    assert len(first.context) == 200_000
    assert (first.id, second.id) == ("line 2", "line 3")


def test_json_that_is_nested_too_deeply_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(InvalidInputError, match=r"not valid JSON .*line 1 on: nested too deep"):
        load_source(str(path), "train")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "squad.json"])
def test_a_file_of_bad_rows_only_and_an_empty_one_are_refused(tmp_path, name):
    bad = {
        "rows.csv": "context,question,answers\n,,\n",
        "rows.jsonl": "3\n",
        "squad.json": '{"data": [{"paragraphs": [{"context": ""}]}]}',
    }
    empty = {"rows.csv": "", "rows.jsonl": "\n", "squad.json": '{"data": []}'}
    (tmp_path / name).write_text(bad[name])
    with pytest.raises(InvalidInputError, match="its only row is bad: "):
        load_source(str(tmp_path / name), "train", skip_bad_rows=True)
    (tmp_path / name).write_text(empty[name])
    with pytest.raises(InvalidInputError, match="no questions"):
        load_source(str(tmp_path / name), "train", skip_bad_rows=True)


@pytest.mark.parametrize("name", ["missing.csv", "missing.jsonl", "missing.json", "missing"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(InvalidInputError, match=name):
        load_source(str(tmp_path / name), "train")
