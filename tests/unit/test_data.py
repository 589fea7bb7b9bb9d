from __future__ import annotations

import csv
import json
import re
import shlex

import pytest
from fakes import CONTEXT, squad_data, write_json

from qa_onnx import files
from qa_onnx.data.columns import find_columns, parse_columns
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.reader import read_examples, read_sources
from qa_onnx.data.rows import skipped_lines
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


PASSAGE = "The Aller rises near Seehausen. It is 211 km long and joins the Weser at Verden."
QA = {"id": "q", "question": "How long?", "answers": [{"text": "211 km", "answer_start": 38}]}
ROW = {"context": PASSAGE, **QA}
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


def write_csv(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


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
