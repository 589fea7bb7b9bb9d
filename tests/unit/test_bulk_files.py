"""Files that `answer-file` reads and writes, without a model: types, shards, and what is wrong with a file."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from datetime import date
from decimal import Decimal

import pytest

pa = pytest.importorskip("pyarrow", reason="comes with the extra bulk")
pq = pytest.importorskip("pyarrow.parquet")

from qa_onnx import InvalidInputError  # noqa: E402 - after the check that pyarrow is there
from qa_onnx.batch import RESULTS  # noqa: E402
from qa_onnx.bulk import plan, table_files  # noqa: E402
from qa_onnx.bulk.plan import find_files, plan_file  # noqa: E402
from qa_onnx.bulk.table_files import encode, read_batches, read_schema  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

QUESTION, CONTEXT = "Who led, and why?", 'The "Normans" were led\nby Rollo, 😀.'


def table(rows=10, **columns):
    questions = [f"{QUESTION} {index}" for index in range(rows)]
    return pa.table({"id": list(range(rows)), "question": questions, "context": [CONTEXT] * rows} | columns)


def read(path):
    schema = read_schema(path)
    return pa.Table.from_batches(list(read_batches(path, schema)), schema)


def plan_of(path, *, shard_rows=4, needs_texts=True, output_format="parquet", columns=None):
    return plan_file(
        path,
        columns=columns or {},
        results=RESULTS,
        needs_texts=needs_texts,
        output_format=output_format,
        shard_rows=shard_rows,
    )


@pytest.fixture
def write(tmp_path):
    def write(given, suffix):
        path = tmp_path / f"given{suffix}"
        if suffix == ".parquet":
            pq.write_table(given, path)
        elif suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(row, default=str) for row in given.to_pylist()))
        else:
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ";")
                writer.writerow(given.column_names)
                writer.writerows([row.values() for row in given.to_pylist()])
        return path

    return write


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("rows", [1, 10, 700])
def test_every_format_gives_the_same_rows(write, suffix, rows):
    given = table(rows)
    found = read(write(given, suffix))
    if suffix in (".csv", ".tsv"):
        assert found.schema.types == [pa.string()] * 3
        given = given.cast(found.schema)
    assert found.to_pylist() == given.to_pylist()


def test_cells_of_csv_stay_the_text_that_they_are(write):
    given = table(4, code=["007", "NA", "", "2020-01-01"])
    assert read(write(given, ".csv")).column("code").to_pylist() == ["007", "NA", "", "2020-01-01"]


def test_a_column_of_json_lines_has_one_type_in_the_whole_file(write):
    values = [None] * 300 + [1] * 300 + [2.5]
    given = table(601, when=["2020-01-01"] * 601, number=values, nothing=[None] * 601, tags=[["a"]] * 601)
    path = write(given, ".jsonl")
    path.write_text(path.read_text() + "\n" + json.dumps({"context": "c", "question": "q", "late": {"deep": 1}}))
    found = read(path)
    types = dict(zip(found.schema.names, found.schema.types, strict=True))
    assert (types["when"], types["number"], types["nothing"]) == (pa.string(), pa.float64(), pa.string())
    assert types["late"] == pa.struct([("deep", pa.int64())])
    assert found.column("number").to_pylist() == [*values, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "q"', r"line 1"),
        ('{"a": 1}\n[1]', "line 2: got a JSON array; expected an object"),
        ('{"a": 1}\n{"a": "x"}', "column 'a' has values of different types"),
        ('{"a": 123456789012345678901234567890}', "column 'a'"),
        ('{"a": "\\ud800"}', "column 'a' has a lone surrogate"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_json_lines_that_cannot_be_read_say_where(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("question,context\na,b\nc\n", "line 3: got 1 fields; expected 2"),
        ("question,question\na,b\n", "two columns are called 'question'"),
        ('question,context\na,"b', "line 2 is not CSV"),
        (b"question,context\na,\xff\n", "not UTF-8"),
    ],
)
def test_csv_that_cannot_be_read_says_where(tmp_path, content, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("size", [0, 10, 300, 1500])
def test_parquet_that_was_cut_or_altered_is_an_error(write, size):
    path = write(table(300), ".parquet")
    data = path.read_bytes()
    path.write_bytes(data[:size] + (b"\x00" * 40 + data[size + 40 :] if size == 300 else b""))
    with pytest.raises(InvalidInputError, match=r"given\.parquet: cannot be read"):
        plan_of(path)


def test_shards_are_the_rows_in_their_order_wherever_batches_end(write, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 7)
    for suffix in (".parquet", ".jsonl", ".csv"):
        path = write(table(50), suffix)
        for shard_rows in (1, 6, 7, 8, 50, 51):
            file = plan_of(path, shard_rows=shard_rows)
            assert sum(file.shards) == 50
            assert set(file.shards[:-1]) <= {shard_rows}
            tables = list(file.tables([True] * len(file.shards)))
            assert [part.num_rows for part in tables] == list(file.shards)
            assert [int(row) for part in tables for row in part.column("id").to_pylist()] == list(range(50))
            wanted = [index % 2 == 0 for index in range(len(file.shards))]
            assert [part is not None for part in file.tables(wanted)] == wanted
        assert not any(plan_of(path).tables([False] * 13))


def test_long_contexts_make_smaller_shards(write, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 7)
    monkeypatch.setattr(plan, "MAX_SHARD_BYTES", 10_000)
    file = plan_of(write(table(50, context=["word " * 300] * 50), ".parquet"), shard_rows=1000)
    assert file.shards == (7,) * 7 + (1,)
    assert sum(part.num_rows for part in file.tables([True] * 8)) == 50


def test_a_file_that_lost_rows_since_it_was_checked_is_an_error(write):
    path = write(table(50), ".csv")
    file = plan_of(path)
    path.write_text("".join(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)[:21]))
    with pytest.raises(InvalidInputError, match="fewer rows than before"):
        list(file.tables([True] * len(file.shards)))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_without_text_are_named_before_anything_is_computed(write, suffix):
    given = table(400, question=[*["q"] * 300, None, *["q"] * 99])
    with pytest.raises(InvalidInputError, match=r"row 300 .*question is missing.*--on-error null"):
        plan_of(write(given, suffix))
    assert sum(plan_of(write(given, suffix), needs_texts=False).shards) == 400


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (table().rename_columns(["id", "ask", "doc"]), {}, "no column 'context' .*--columns context=doc question=ask"),
        (table(question=list(range(10))), {}, "'question' has the type int64; expected text"),
        (table(score=[1.0] * 10), {}, "has a column 'score' already.*--prefix"),
        (table(tags=[["a"]] * 10), {"output_format": "csv"}, "'tags' has the type list.*csv has no form"),
        (table(raw=[b"a"] * 10), {"output_format": "jsonl"}, "'raw' has the type binary.*--output-format"),
    ],
)
def test_a_table_that_does_not_fit_says_what_to_type(write, given, options, words):
    with pytest.raises(InvalidInputError, match=rf"given\.parquet: .*{words}"):
        plan_of(write(given, ".parquet"), **options)


def test_columns_have_the_names_that_are_known_or_given(write):
    path = write(table().rename_columns(["id", "Query", "PASSAGE"]), ".parquet")
    assert (plan_of(path).question, plan_of(path).context) == ("Query", "PASSAGE")
    path = write(table().rename_columns(["text", "ask", "doc"]), ".parquet")
    file = plan_of(path, columns={"question": "ask", "context": "doc"})
    assert (file.question, file.context) == ("ask", "doc")


def test_json_lines_and_csv_hold_what_parquet_does():
    given = table(
        3,
        when=[date(2020, 1, 1), None, None],
        price=[Decimal("1.50"), None, None],
        number=[float("nan"), 0.1, float("inf")],
        deep=[{"a": [float("nan")]}, None, {"a": []}],
    )
    lines = [json.loads(line) for line in encode(given, "jsonl").decode().splitlines()]
    assert lines[0]["when"] == "2020-01-01"
    assert lines[0]["price"] == "1.50"
    assert [line["number"] for line in lines] == [None, 0.1, None]
    assert lines[0]["deep"] == {"a": [None]}
    assert lines[0]["context"] == CONTEXT
    rows = list(csv.DictReader(encode(given.drop(["deep"]), "csv").decode().splitlines(keepends=True)))
    assert [row["context"] for row in rows] == [CONTEXT] * 3
    assert float(rows[1]["number"]) == 0.1
    with pytest.raises(InvalidInputError, match="csv cannot hold the values"):
        encode(given, "csv")


@pytest.mark.parametrize(
    ("number", "kind", "output_format", "words"),
    [
        (2**62, pa.timestamp("us"), "jsonl", r"jsonl cannot hold the values \(.*out of range"),
        (2**30, pa.date32(), "jsonl", "jsonl cannot hold the values"),
        (2**62, pa.timestamp("us"), "csv", r"csv cannot hold the values \(.*out of range"),
        (2**30, pa.date32(), "csv", r"csv cannot hold the values \(.*out of range"),
        (1, pa.duration("us"), "jsonl", "value of type timedelta, which jsonl has no form for"),
        (1, pa.timestamp("us", "Nowhere/Land"), "csv", "csv cannot hold the values"),
    ],
)
def test_values_that_the_format_cannot_hold_are_named_before_anything_is_computed(
    write, number, kind, output_format, words
):
    width = pa.int32() if kind.bit_width == 32 else pa.int64()
    when = pa.array([0] * 299 + [number], width).cast(kind)
    path = write(table(300, when=when), ".parquet")
    assert sum(plan_of(path).shards) == 300
    with pytest.raises(InvalidInputError, match=rf"given\.parquet: the column 'when' of type .*: .*{words}.*--output"):
        plan_of(path, output_format=output_format)


def test_nanoseconds_without_pandas_are_an_error_that_names_the_column(write, tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError('no pandas')")
    when = pa.array([1] * 10, pa.int64()).cast(pa.timestamp("ns"))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qa_onnx import InvalidInputError\n"
        "from qa_onnx.bulk.plan import plan_file\n"
        "options = {'columns': {}, 'results': [], 'needs_texts': True, 'output_format': 'jsonl', 'shard_rows': 4}\n"
        "try: plan_file(Path(sys.argv[1]), **options)\n"
        "except InvalidInputError as error: print(error)"
    )
    path = write(table(when=when), ".parquet")
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert "given.parquet: the column 'when' of type timestamp[ns]: jsonl cannot hold the values (" in done.stdout


def test_a_struct_without_fields_is_refused_before_anything_is_computed(tmp_path):
    path = tmp_path / "given.jsonl"
    path.write_text('{"question": "q", "context": "c", "meta": {}}')
    with pytest.raises(InvalidInputError, match=r"given\.jsonl: the column 'meta' of type .*parquet cannot hold"):
        plan_of(path)
    assert plan_of(path, output_format="jsonl").shards == (1,)


def test_folders_stand_for_their_files(write, tmp_path):
    for name in ("b.parquet", "a.parquet", "_SUCCESS", "_meta.parquet", ".hidden.csv", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    other = write(table(), ".csv")
    assert find_files([tmp_path / "in", other]) == [tmp_path / "in" / "a.parquet", tmp_path / "in" / "b.parquet", other]
    (tmp_path / "empty").mkdir()
    for inputs, words in (
        ([tmp_path / "empty"], "has no files to answer"),
        ([tmp_path / "none.csv"], "there is no such file"),
        ([tmp_path / "in" / "notes.txt"], "no known suffix"),
        ([other, tmp_path / "in" / ".." / other.name], "twice"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            find_files(inputs)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_memory_does_not_grow_with_the_file(write, suffix, tmp_path):
    """Also where all rows of a Parquet file are one row group."""

    def peak(rows):
        path = tmp_path / f"{rows}{suffix}"
        given = pa.table(
            {"question": ["Who?"] * rows, "context": [f"{index} " + "word " * 100 for index in range(rows)]}
        )
        if suffix == ".parquet":
            pq.write_table(given, path, row_group_size=rows, compression="none", use_dictionary=False)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in given.to_pylist()))
        del given
        file = plan_of(path, shard_rows=500)
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in file.tables([True] * len(file.shards)))

    small, large = peak(3_000), peak(24_000)
    assert large < 1.5 * small
