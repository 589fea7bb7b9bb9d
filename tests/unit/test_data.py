"""SQuAD files and their relatives: what is read, and errors that name the place."""

from __future__ import annotations

import csv
import json
import re

import pytest
from data_rows import PASSAGE, QA, ROW
from fakes import CONTEXT, squad_data, write_json

from qa_onnx import files
from qa_onnx.data.example import GoldAnswer
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation.predictions import read_predictions

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
    first, second, third = read_examples(write_json(tmp_path / "data.json", squad_data()))
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
    examples = read_examples(str(write_json(tmp_path / "data.json", data)))
    assert [(example.id, example.title, len(example.answers)) for example in examples] == [("q1", "", 2), ("q2", "", 1)]


def test_an_impossible_question_has_no_answers_whatever_is_listed():
    data = changed((*Q, "is_impossible"), True)
    assert [len(example.answers) for example in parse_squad(data, source="here")] == [2, 0, 0]


@pytest.mark.parametrize(
    ("path", "value", "place", "given"),
    [
        ((), "text", "the top level", "a JSON string"),
        ((), {}, "the top level", "a JSON object of no fields"),
        ((), [3], "[0]", "a JSON number"),
        (("data",), ABSENT, "the top level", "a JSON object of 'version'"),
        (("data",), {}, "data", "a JSON object"),
        (("data", 0), 3, "data[0]", "a JSON number"),
        (("data", 0, "title"), [], "data[0].paragraphs[0].qas[0].title", "a JSON array"),
        (("data", 0, "paragraphs"), None, "data[0].paragraphs", "a JSON null"),
        (("data", 0, "paragraphs", 1), [], "data[0].paragraphs[1]", "a JSON array"),
        ((*P, "context"), ABSENT, "data[0].paragraphs[0].context", "nothing"),
        ((*P, "context"), " \n", "data[0].paragraphs[0].context", "an empty string"),
        ((*P, "qas"), ABSENT, "data[0].paragraphs[0].qas", "nothing"),
        ((*P, "qas", 0), "q", "data[0].paragraphs[0].qas[0]", "a JSON string"),
        ((*Q, "id"), [7], "data[0].paragraphs[0].qas[1].id", "a JSON array"),
        ((*Q, "id"), True, "data[0].paragraphs[0].qas[1].id", "a JSON boolean"),
        ((*Q, "id"), " ", "data[0].paragraphs[0].qas[1].id", "an empty string"),
        ((*Q, "id"), "\ud800", "data[0].paragraphs[0].qas[1].id", "a lone surrogate"),
        ((*Q, "id"), "q1", "data[0].paragraphs[0].qas[1].id", "'q1'"),
        ((*Q, "question"), ABSENT, "data[0].paragraphs[0].qas[1].question", "nothing"),
        ((*Q, "question"), "", "data[0].paragraphs[0].qas[1].question", "an empty string"),
        ((*Q, "is_impossible"), "maybe", "data[0].paragraphs[0].qas[1].is_impossible", "'maybe'"),
        ((*Q, "is_impossible"), 2, "data[0].paragraphs[0].qas[1].is_impossible", "2"),
        ((*Q, "is_impossible"), [], "data[0].paragraphs[0].qas[1].is_impossible", "a JSON array"),
        ((*Q, "answers"), ABSENT, "data[0].paragraphs[0].qas[1].answers", "nothing"),
        ((*Q, "answers"), {}, "data[0].paragraphs[0].qas[1].answers", "a JSON object"),
        (A, 7, "data[0].paragraphs[0].qas[1].answers[0]", "7"),
        (A, {}, "data[0].paragraphs[0].qas[1].answers[0].text", "a JSON null"),
        ((*A, "text"), False, "data[0].paragraphs[0].qas[1].answers[0].text", "a JSON boolean"),
        ((*A, "text"), "", "data[0].paragraphs[0].qas[1].answers[0].text", "an empty string"),
        ((*A, "answer_start"), "5a", "data[0].paragraphs[0].qas[1].answers[0].answer_start", "'5a'"),
        ((*A, "answer_start"), "1e999", "data[0].paragraphs[0].qas[1].answers[0].answer_start", "'1e999'"),
        ((*A, "answer_start"), True, "data[0].paragraphs[0].qas[1].answers[0].answer_start", "a JSON boolean"),
        ((*A, "answer_start"), 1.5, "data[0].paragraphs[0].qas[1].answers[0].answer_start", "1.5"),
    ],
)
def test_a_malformed_file_is_named_with_the_place_in_it(path, value, place, given, tmp_path):
    file = write_json(tmp_path / "data.json", changed(path, value))
    with pytest.raises(InvalidInputError, match=re.escape(f"{file}: {place}: got {given}; expected ")):
        read_examples(file)


def test_a_duplicated_id_names_both_places():
    data = changed(("data", 0, "paragraphs", 1, "qas", 0, "id"), "q2")
    with pytest.raises(InvalidInputError) as caught:
        parse_squad(data, source="here")
    assert "data[0].paragraphs[1].qas[0].id" in str(caught.value)
    assert "data[0].paragraphs[0].qas[1] has it too" in str(caught.value)


@pytest.mark.parametrize("read", [read_examples, read_predictions])
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
    with pytest.raises(InvalidInputError, match=f"{tmp_path}: got a folder without a data set; expected SQuAD JSON"):
        read_examples(tmp_path)


PARAGRAPH = {"context": PASSAGE, "qas": [QA]}


RELATIVES = {
    "list of articles": [{"title": "t", "paragraphs": [PARAGRAPH]}],
    "list of paragraphs": [PARAGRAPH],
    "KorQuAD 2": {
        "data": [
            {
                "title": "t",
                "raw_html": "<p>The Aller</p>",
                "context": PASSAGE,
                "qas": [{"id": "q", "question": "How long?", "answer": {**QA["answers"][0], "html_answer_start": 99}}],
            }
        ]
    },
    "rows in data": {"data": [ROW]},
    "list of rows": [ROW],
    "one row": ROW,
    "one article": {"title": "t", "paragraphs": [PARAGRAPH]},
    "one paragraph": PARAGRAPH,
    "capital names": [{"ID": "q", "Context": PASSAGE, "Question": "How long?", "Answer": "211 km"}],
    "usual names": [{"id": "q", "passage": PASSAGE, "query": "How long?", "reply": ["211 km"]}],
    "a list of texts": [{"context": PASSAGE, "qas": [{**QA, "answers": ["211 km"]}]}],
    "the hub's": [{**ROW, "answers": {"text": ["211 km"], "answer_start": [38]}}],
    "start as a string": [{**ROW, "answers": [{"text": "211 km", "answer_start": "38"}]}],
    "start as a float": [{**ROW, "answers": [{"text": "211 km", "answer_start": 38.0}]}],
    "start null": [{**ROW, "answers": [{"text": "211 km", "answer_start": None}]}],
    "start missing": [{**ROW, "answers": [{"text": "211 km"}]}],
    "start in a list": [{**ROW, "answers": "211 km", "answer_start": [38]}],
    "start NaN": [{**ROW, "answers": "211 km", "answer_start": float("nan")}],
    "is_impossible as a string": [{**ROW, "is_impossible": "False"}],
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_squad_give_the_same_example(name, tmp_path):
    (example,) = read_examples(write_json(tmp_path / "data.json", RELATIVES[name]))
    assert (example.id, example.context, example.question) == ("q", PASSAGE, "How long?")
    assert example.answers == (GoldAnswer(text="211 km", start=38),)


PLACE = "data[0].paragraphs[0].qas[1]"


@pytest.mark.parametrize(
    ("given", "name"),
    [(7, "7"), (7.5, "7.5"), ("q", "q"), *((missing, PLACE) for missing in (None, "", ABSENT, float("nan")))],
)
def test_ids_are_strings_or_numbers_and_missing_ones_are_the_place(given, name, tmp_path):
    file = write_json(tmp_path / "data.json", changed((*Q, "id"), given))
    assert [example.id for example in read_examples(file)] == ["q1", name, "q3"]


@pytest.mark.parametrize(("given", "title"), [(12, "12"), (None, ""), ("", ""), (ABSENT, ""), ("Aller", "Aller")])
def test_titles_do_not_matter(given, title):
    assert parse_squad(changed(("data", 0, "title"), given), source="here")[0].title == title


@pytest.mark.parametrize("answers", [ABSENT, None, "NaN", 7, [{"txt": 3}], {"text": [None]}])
def test_gold_answers_may_be_missing_where_none_are_needed(answers, tmp_path):
    file = write_json(tmp_path / "data.json", changed((*Q, "answers"), answers))
    examples = read_examples(file, needs_answers=False)
    assert [(example.id, example.answers) for example in examples] == [("q1", ()), ("q2", ()), ("q3", ())]


@pytest.mark.parametrize("impossible", [True, 1, "true", "True", "1"])
@pytest.mark.parametrize("answers", [ABSENT, None, [], [{"text": "in Normandy", "answer_start": 43}]])
def test_an_impossible_question_has_no_answers_in_any_format(impossible, answers, tmp_path):
    row = {"context": CONTEXT, "question": "Who?", "is_impossible": impossible}
    row |= {} if answers is ABSENT else {"answers": answers}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    cells = [json.dumps(value) if isinstance(value, list) else str(value) for value in row.values()]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, cells])
    write_json(tmp_path / "rows.json", [{"context": CONTEXT, "qas": [row]}])
    for name in ("rows.jsonl", "rows.csv", "rows.json"):
        assert read_examples(tmp_path / name)[0].answers == ()


LINE = json.dumps({"context": PASSAGE, "question": "How long?", "answers": "211 km"})


TABLE = f"context,question,answers\n{PASSAGE},How long?,211 km\n"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("rows.json", f"{LINE}\n{LINE}\n", "line 1"),
        ("rows.JSON", json.dumps([ROW | {"id": ""}]), "[0]"),
        ("rows.JSONL", f"\n{LINE}\r\n\n", "line 2"),
        ("rows.ndjson", LINE, "line 1"),
        ("rows.jsonl", json.dumps([ROW | {"id": ""}], indent=1), "[0]"),
        ("rows", LINE, "question"),
        ("rows.txt", f"{LINE}\n{LINE}", "line 1"),
        ("rows.CSV", TABLE, "line 2"),
        ("rows.csv", TABLE.replace("\n", "\r\n").replace("context", "\ufeffcontext", 1), "line 2"),
        ("rows.csv", "\n" + TABLE.replace(",", ";"), "line 3"),
        ("rows.csv", TABLE.replace(",", "|"), "line 2"),
        ("rows.csv", TABLE.replace(",", "\t"), "line 2"),
        ("rows.csv", TABLE.replace("\n", "\r").replace(",", ";").replace("Verden", "Verden,,,"), "line 2"),
        ("rows.csv", '"a, b, c, d";' + TABLE.replace(",", ";").replace("\nThe", "\n;The"), "line 2"),
        ("rows.tsv", "\t" + TABLE.replace(",", "\t").replace("\nThe", "\n0\tThe"), "line 2"),
        ("rows.tsv", TABLE.replace(",", "\t"), "line 2"),
        ("rows.txt", TABLE.replace(",", "\t"), "line 2"),
        ("rows", TABLE.replace("\n", "\r"), "line 2"),
        ("rows.csv", TABLE.replace("context", "Passage ,", 1).replace("Verden.,", "Verden.,,"), "line 2"),
    ],
)
def test_the_content_decides_where_the_name_does_not(name, text, place, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    example, *_ = read_examples(tmp_path / name)
    assert (example.id, example.context.replace(",", ""), example.question) == (place, PASSAGE, "How long?")
    assert example.answers == (GoldAnswer(text="211 km", start=38),)


SEPARATED = "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029g"


def test_only_line_feeds_end_lines(tmp_path):
    row = {"context": f"{SEPARATED} h", "question": SEPARATED, "answers": SEPARATED}
    lines = "".join(json.dumps(row | {"id": str(number)}, ensure_ascii=False) + "\n" for number in range(2))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.csv").write_text(
        f'id,context,question,answers\r\n0,{row["context"]},{SEPARATED},{SEPARATED}\r\n1,"{SEPARATED} h",{SEPARATED},'
        f"{SEPARATED}\r\n",
        encoding="utf-8",
    )
    for name in ("rows.jsonl", "rows.csv"):
        examples = read_examples(tmp_path / name)
        assert [example.id for example in examples] == ["0", "1"]
        assert {(example.context, example.question) for example in examples} == {(row["context"], SEPARATED)}
        assert {example.answers for example in examples} == {(GoldAnswer(text=SEPARATED, start=0),)}


def test_rows_of_csv_are_named_by_their_first_line(tmp_path):
    (tmp_path / "rows.csv").write_text('context,question,answers\n"a\nb\nc",Who?,a\n"d\ne",Who?,d\n')
    assert [example.id for example in read_examples(tmp_path / "rows.csv")] == ["line 2", "line 5"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xlsx", b"PK\x03\x04\xff\xfe", "is not UTF-8; expected SQuAD JSON, JSON lines, CSV or TSV"),
        ("rows.txt", b"Some text.\nMore text.\n", "no known format; expected SQuAD JSON"),
        ("rows", b"", "no known format; expected SQuAD JSON"),
        ("rows.csv", b"", "the file is empty: there are no questions; expected a header"),
        ("rows.csv", b"\xef\xbb\xbf", "the file is empty: there are no questions"),
        ("rows.tsv", b" \r\n\n", "the file is empty: there are no questions"),
        ("rows.csv", b"context,question,answers\n", "there are no questions below the header"),
        ("rows.csv", b"context;question;answers\r\n\r\n", "there are no questions below the header"),
        ("rows.txt", b"context\tquestion", "there are no questions below the header"),
        ("rows.csv", b"anything", "there are no questions below the header"),
        ("rows.csv", b'context,question,answers\na,b,"c\nd,e,f\n', "line 2 is not CSV (unexpected end of data)"),
        ("rows.csv", b"context,question,question\na,b,c\n", "line 1: two columns are called 'question'"),
        ("rows.parquet", b"PAR1", "cannot be read as a Parquet file"),
        ("rows.jsonl", b"", "there are no questions"),
        ("rows.json", b"[]", "there are no questions"),
        (
            "rows.json",
            b'{"Data": [], "Version": 1}',
            "got a JSON object of 'Data', 'Version'; expected SQuAD JSON, JSON lines, CSV",
        ),
        ("rows.jsonl", b'{"a": ' * 9_000, "nested too deep"),
        ("rows.json", b'[{"context": "a", "question": "b", "answers": "a", "answer_start": 1e999}]', "got inf"),
        ("rows.json", b'[{"context": "a", "question": "b", "answers": "\\ud800"}]', "lone surrogate"),
    ],
)
def test_what_cannot_be_read_is_refused(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        read_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.csv", "data.tsv", "data"])
def test_a_file_of_text_has_a_gib_at_most(tmp_path, monkeypatch, name):
    assert files.MAX_TEXT_BYTES == 2**30
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 2**10)
    (tmp_path / name).write_text(" " * 2**10 + json.dumps(squad_data()))
    with pytest.raises(InvalidInputError, match=f"{name}: has more than .* GiB"):
        read_examples(tmp_path / name)


def test_two_questions_of_one_id_are_refused_where_answers_are_kept_by_id(tmp_path):
    (tmp_path / "rows.csv").write_text("id,context,question,answers\n1,a b,Who?,a\n1,a b,What?,b\n")
    with pytest.raises(InvalidInputError, match=r"line 3: id: got '1'; expected an id of its own \(line 2 has it too"):
        read_examples(tmp_path / "rows.csv")
    assert len(read_examples(tmp_path / "rows.csv", unique_ids=False)) == 2
