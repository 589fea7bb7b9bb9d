"""Training data from files of all kinds and from the hub: the same examples, and errors that name the row."""

from __future__ import annotations

import csv
import json
import sys
import time

import datasets
import pytest
from source_files import CONTEXT, EXAMPLES, ROWS, write

from qa_onnx.data.reader import read_examples
from qa_onnx.errors import InvalidInputError
from tests.conftest import ROOT
from training import finetune
from training.sources import Source, apply_weight, load_source
from training.stats import count_by_length


@pytest.mark.parametrize("kind", ["squad.json", "squad.jsonl", "plain.jsonl", "objects.jsonl", "rows.csv"])
def test_every_format_gives_the_same_examples(tmp_path, kind):
    write(tmp_path / kind, kind)
    source = load_source(str(tmp_path / kind), "train")
    assert source.examples == EXAMPLES
    assert (source.repaired, source.absent, source.bad_rows) == (0, 0, ())
    assert source.to_dict()["without_answer"] == 1


def test_columns_of_other_names_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("passage,q,reply\nMara founded it.,Who?,Mara\n")
    columns = {"context": "passage", "question": "q", "answers": "reply"}
    (found,) = load_source(str(path), "train", columns=columns).examples
    assert (found.context, found.question, found.answers[0].text) == ("Mara founded it.", "Who?", "Mara")
    with pytest.raises(InvalidInputError, match=r"line 2: no column 'question' among .*--columns"):
        load_source(str(path), "train")


def test_the_hub_is_read_as_a_file_is(monkeypatch):
    """The hub cannot be reached here: a local data set of the same columns replaces it."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(HUB_ROWS)

    monkeypatch.setattr("qa_onnx.data.tables.problem_of_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, part in (("squad", "train"), ("squad", "eval"), ("squad_v2", "train"), ("owner/some-set", "eval")):
        assert load_source(name, part).examples == EXAMPLES
    assert asked == [
        ("rajpurkar/squad", "train"),
        ("rajpurkar/squad", "validation"),
        ("rajpurkar/squad_v2", "train"),
        ("owner/some-set", "validation"),
    ]


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr("qa_onnx.data.tables.problem_of_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidInputError, match=r"no route.*SQuAD JSON.*takes sample"):
        load_source("squad", "train")


@pytest.mark.parametrize("name", ["squad", "owner/some-set"])
def test_a_hub_that_does_not_reply_is_asked_once(monkeypatch, name):
    """The client of datasets would try for half a minute."""
    monkeypatch.setattr("qa_onnx.data.tables.problem_of_hub", lambda: "it cannot be reached: unplugged")
    is_offline = datasets.config.HF_HUB_OFFLINE
    started = time.monotonic()
    with pytest.raises(InvalidInputError, match=r"hub \(it cannot be reached: unplugged\).*takes sample"):
        load_source(name, "train")
    assert time.monotonic() - started < 5
    assert is_offline == datasets.config.HF_HUB_OFFLINE


def test_answers_that_stand_elsewhere_are_repaired_and_absent_ones_counted(tmp_path):
    rows = [
        {"context": CONTEXT, "question": "Who lives there?", "answer": "Mara", "answer_start": 50},
        {"context": CONTEXT, "question": "What is it?", "answer": "a town", "answer_start": 3},
        {"context": CONTEXT, "question": "Who founded it?", "answer": "Mara", "answer_start": -4},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = load_source(str(path), "train")
    assert [example.answers[0].start for example in source.examples] == [CONTEXT.rindex("Mara"), 3, 0]
    assert (source.repaired, source.absent) == (2, 1)
    assert [line.split(": ", 1)[1] for line in source.warnings()] == [
        "2 answers stand elsewhere than answer_start says, or in other white space, case or characters; repaired",
        "line 2: answer 'a town' does not occur in its passage",
        "1 answers do not occur in their passage; trained on as they are",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet"])
def test_the_first_answers_that_do_not_occur_are_named_by_file_and_place(tmp_path, kind):
    rows = [{"context": CONTEXT, "question": "Who?", "answers": "Mara"}]
    rows += [{"context": CONTEXT, "question": "Who?", "answers": f"town {number}"} for number in range(7)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    *named, counted = load_source(str(path), "train").warnings()
    place = {"jsonl": "line {}", "csv": "line {}", "json": "[{}]", "parquet": "row {}"}[kind]
    first = {"jsonl": 2, "csv": 3, "json": 1, "parquet": 1}[kind]
    assert named == [
        f"{path}: {place.format(first + number)}: answer 'town {number}' does not occur in its passage"
        for number in range(5)
    ]
    assert counted == f"{path}: 7 answers do not occur in their passage; trained on as they are"


def test_the_same_rows_in_another_file_are_the_same_data(tmp_path):
    rows = "\n".join(json.dumps({"context": CONTEXT, "question": "?", "answer": text}) for text in ("Mara", "no"))
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(rows)
    second.write_text(rows)
    one, other = load_source(str(first), "train"), load_source(str(second), "train")
    assert (one.sha256, one.examples) == (other.sha256, other.examples)
    assert one.absent_answers != other.absent_answers


HUB_ROWS = [
    {
        "id": row["id"],
        "title": "",
        "context": CONTEXT,
        "question": row["question"],
        "answers": {
            "text": [row["text"]] if row["text"] else [],
            "answer_start": [row["start"]] if row["text"] else [],
        },
    }
    for row in ROWS
]


SAVED = {
    "rows.parquet": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_parquet(path),
    "rows.PARQUET": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_pandas().to_parquet(path),
    "rows.json": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_json(path),
    "records.json": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_pandas().to_json(path, orient="records"),
    "rows.csv": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_csv(path),
    "pandas.csv": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_pandas().to_csv(path),
    "pandas.tsv": lambda path: datasets.Dataset.from_list(HUB_ROWS).to_pandas().to_csv(path, sep="\t", index=False),
    "folder": lambda path: datasets.Dataset.from_list(HUB_ROWS).save_to_disk(path),
    "folders": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(HUB_ROWS)}).save_to_disk(path),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_datasets_and_pandas_write_gives_the_same_examples(tmp_path, name):
    SAVED[name](str(tmp_path / name))
    assert load_source(str(tmp_path / name), "train").examples == EXAMPLES


def test_a_folder_of_splits_is_read_by_split_or_as_the_folder_of_one(tmp_path):
    parts = {"train": HUB_ROWS[:1], "test": HUB_ROWS[1:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(
        tmp_path
    )
    assert load_source(str(tmp_path), "train").examples == EXAMPLES[:1]
    assert load_source(str(tmp_path / "test"), "eval").examples == EXAMPLES[1:]
    with pytest.raises(InvalidInputError, match=f"no split 'validation'; .*{tmp_path / 'test'}"):
        load_source(str(tmp_path), "eval")


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "marker", "columns"])
@pytest.mark.parametrize("kind", ["rows.parquet", "folder"])
def test_damaged_tables_are_refused(tmp_path, kind, damage):
    path = tmp_path / kind
    SAVED[kind](str(path))
    file = path if path.is_file() else next(path.glob("*.arrow"))
    if damage == "marker" and path.is_dir():
        (path / "state.json").write_text("{}")
    elif damage == "columns":
        rows = datasets.Dataset.from_list([{"text": 3}])
        rows.to_parquet(str(path)) if path.is_file() else rows.save_to_disk(str(tmp_path / "other"))
        path = path if path.is_file() else tmp_path / "other"
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"PK" + whole}.get(damage, whole[1:]))
    with pytest.raises(InvalidInputError, match=str(path)):
        load_source(str(path), "train")


@pytest.mark.parametrize(
    ("name", "package"), [("rows.parquet", "pyarrow"), ("folder", "datasets"), ("squad", "datasets")]
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.chdir(tmp_path)
    if name in SAVED:
        SAVED[name](name)
    monkeypatch.setitem(sys.modules, package, None)
    advice = rf"the package {package} is not installed; pip install {package}, or, in the checkout, '\.\[train\]'"
    with pytest.raises(InvalidInputError, match=advice):
        read_examples(name)


def test_skipping_bad_rows_is_advised_only_where_good_ones_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("context,question,reply_text\na b,Who?,a\na b,What?,b\n")
    with pytest.raises(InvalidInputError, match=r"all 2 rows are bad.*--columns answers=reply_text$") as raised:
        load_source(str(path), "train")
    assert "--skip-bad-rows" not in str(raised.value)
    path.write_text("context,question,answers\na b,Who?,a\n,What?,b\na b,,a\n")
    with pytest.raises(InvalidInputError, match=r"line 3: context: .*2 of 3 rows are bad.*--skip-bad-rows"):
        load_source(str(path), "train")


def test_questions_of_one_id_are_trained_on_and_not_evaluated(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,context,question,answers\n1,a b,Who?,a\n1,a b,What?,b\n")
    assert len(load_source(str(path), "train").examples) == 2
    with pytest.raises(InvalidInputError, match="an id of its own"):
        load_source(str(path), "eval")


def test_answers_that_are_written_otherwise_are_repaired_and_keep_their_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    answers = (" Mara\n", "mara", "LIES  at", "a town")
    path.write_text("\n".join(json.dumps({"context": CONTEXT, "question": "?", "answer": text}) for text in answers))
    source = load_source(str(path), "train")
    assert [example.answers[0].text for example in source.examples] == list(answers)
    assert [example.answers[0].start for example in source.examples] == [0, 0, CONTEXT.index("lies"), 0]
    assert (source.repaired, source.absent) == (3, 1)


def test_weights_repeat_a_source_or_take_a_part_of_it():
    source = Source(name="x", examples=EXAMPLES, sha256="")
    assert apply_weight(source, 1.0, 0) == list(EXAMPLES)
    assert apply_weight(source, 2.0, 0) == [*EXAMPLES, *EXAMPLES]
    more = apply_weight(source, 1.67, 0)
    assert len(more) == 7
    assert more == apply_weight(source, 1.67, 0)
    assert {tuple(apply_weight(source, 1 / 4, seed)) for seed in range(40)} == {(example,) for example in EXAMPLES}


def test_files_of_several_formats_train_together_with_weights(tiny_model_dir, tmp_path):
    names = ["squad.json", "plain.jsonl", "rows.csv"]
    for name in names:
        write(tmp_path / name, name)
    places = [str(tmp_path / name) for name in names]
    options = ["--weights", "3", "1", "1", "0.002", "--eval", places[2], "--max-steps", "1"]
    options += ["--output", str(tmp_path / "out")]
    status = finetune.main(["--model", str(tiny_model_dir), "--train", *places, "sample", *options])
    assert status == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    sample = len(load_source("sample", "train").examples)
    assert metrics["train_questions"] == 12 + 4 + 4 + round(0.002 * sample)
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(name in report for name in names)  # not where they are on this machine
    assert str(tmp_path) not in report


def test_lengths_are_counted_in_classes():
    assert count_by_length([1, 63, 64, 300], 64) == {0: 2, 64: 1, 128: 0, 192: 0, 256: 1}
    assert count_by_length([], 64) == {}


def test_the_guide_names_every_kind_of_source():
    text = (ROOT / "docs" / "guides" / "training.md").read_text()
    assert all(word in text for word in ("JSON lines", "CSV", "--columns", "--weights", "--skip-bad-rows"))
