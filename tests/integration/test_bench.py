"""The benchmarks on a tiny model: every runner answers, agrees with PyTorch, and is in the report."""

from __future__ import annotations

import io
import json
import sys

import pytest

from bench import (
    harness,
    latency,
    plots,
    report,
    runner,
    scaling,
    tables,
    throughput,
    training,
)
from bench.peers import RUNNERS, serve
from bench.prompts import load_model_tokenizer
from bench.settings import Settings
from qa_onnx.bundle import Bundle
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.kernels import find_kernels
from tests.conftest import ROOT
from training.starter.sample import generate


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "work"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(throughput, "BATCH_SIZES", (8,))
    monkeypatch.setattr(runner, "SETTLE_SECONDS", 0)


def test_every_runner_gives_pytorchs_tokens_with_end_of_text_ignored(
    tiny_model_dir, tmp_path, work, quick, capsys, monkeypatch
):
    monkeypatch.setattr(runner, "PEERS_DIRECTORY", tmp_path)  # those in environments of their own have another test
    tune = throughput.best_batch_size  # in a process of its own, which for most runners takes long to load
    monkeypatch.setattr(
        throughput, "best_batch_size", lambda name, *rest: tune(name, *rest) if name == "CTranslate2 int8" else 8
    )
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=12)))
    arguments = ["--workload", "documents", "--data", data, "--model", tiny_model_dir, "--work", work]
    arguments += ["--verify", data, "--output", output, "--rounds", "2"]
    assert throughput.main([*map(str, arguments)]) == 0
    int8 = Bundle.open(work / "int8").manifest
    assert int8.precision_loss["smoothing"]
    assert (int8.no_answer, int8.windows) == ({}, {})
    result = json.loads(output.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == runner.PEERS == [name for name in RUNNERS if name != "qa_onnx int8 extractive"]
    absent = {name for name in rows if name.startswith(("OpenVINO", "vLLM", "llama.cpp"))}
    if find_kernels("bf16").library is None:
        absent.add("qa_onnx bf16")
    assert {name for name, row in rows.items() if row["status"].startswith("not installed")} == absent
    for name in rows.keys() - absent:
        row = rows[name]
        assert row["status"] == "measured"
        assert len(row["seconds"]) == 2
        assert row["peak_rss_mib"] > 10
        assert row["equal_tokens_percent"] == 100 or "fp32" not in name
    assert result["versions"]["onnxruntime"]
    table = tables.throughput_table(result)
    assert table in capsys.readouterr().out
    assert all(f"| {name} |" in table for name in runner.PEERS)
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("agreement", [{}, {"equal_tokens_percent": 99.0}])
def test_bars_are_the_answers_per_second_and_agreement_is_plotted_where_it_was_measured(agreement):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    row = {"name": "qa_onnx fp32", "status": "measured", "seconds": [2.0, 4.0], "answers_per_second": 3.0} | agreement
    plots._bars({"workload": "documents", "questions": 12, "passages": 1, "rows": [row]}, figure)
    bars, *others = figure.axes
    assert [bar.get_width() for bar in bars.patches] == [3.0]
    assert list(bars.lines[0].get_xdata()) == [6.0, 3.0]
    assert [list(other.lines[0].get_xydata()[0]) for other in others] == [[3.0, 99.0]] * bool(agreement)


@pytest.mark.parametrize("name", ["OpenVINO fp32", "vLLM fp32", "llama.cpp bf16"])
def test_an_engine_in_an_environment_of_its_own_gives_pytorchs_tokens(name, tmp_path, quick):
    if not runner.peer_python(name).is_file():
        pytest.skip("make bench-peers installs it")
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=12)))
    arguments = ["--workload", "documents", "--data", data, "--model", ROOT / "training" / "starter" / "model"]
    arguments += ["--work", tmp_path / "work", "--output", output, "--rounds", "1", "--only", "transformers fp32", name]
    assert throughput.main([*map(str, arguments)]) == 0
    (row,) = [row for row in json.loads(output.read_text())["rows"] if row["name"] == name]
    assert row["equal_tokens_percent"] == 100 if "fp32" in name else row["equal_tokens_percent"] > 80


def test_latency_asks_two_questions_a_passage(tiny_model_dir, tmp_path, work, quick, capsys):
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=30)))
    arguments = ["--data", data, "--model", tiny_model_dir, "--work", work, "--output", output, "--passages", 4]
    assert latency.main([*map(str, arguments), "--only", "qa_onnx fp32", "transformers fp32"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["name"], len(row["first"]), len(row["second"])) for row in rows] == [
        ("qa_onnx fp32", 3, 3),
        ("transformers fp32", 3, 3),
    ]
    assert "| qa_onnx fp32 |" in capsys.readouterr().out
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_many_callers_get_what_a_batch_gets(tiny_model_dir, tmp_path, work, quick, capsys):
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=30)))
    arguments = ["--data", data, "--model", tiny_model_dir, "--work", work, "--output", output, "--concurrency", 8]
    options = ["--questions", "20", "--rounds", "2", "--only", "qa_onnx fp32", "transformers fp32"]
    assert latency.main([*map(str, arguments), *options]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["callers"] for row in rows] == ["answer_async", "answer"]
    for row in rows:
        assert (row["name"], row["equal"], len(row["waits"])) == ("qa_onnx fp32", 40, 40)
        assert row["seconds_waited"]["50"] <= row["seconds_waited"]["95"] <= max(row["seconds"])
    assert "| qa_onnx fp32 | answer |" in capsys.readouterr().out


def test_scaling_varies_one_thing_at_a_time(tiny_model_dir, tmp_path, work, quick, monkeypatch, capsys):
    base = scaling.Point(batch_size=2, passage_words=15, questions_per_passage=2, threads=2)
    monkeypatch.setattr(scaling, "BASE", base)
    monkeypatch.setattr(scaling, "AXES", {"batch_size": (1, 4), "passage_words": (10, 20), "threads": (1, 4096)})
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=12)))
    arguments = ["--data", data, "--model", tiny_model_dir, "--work", work, "--output", output, "--questions", 6]
    only = ["--only", "qa_onnx fp32", "transformers fp32", "--rounds", "2", "--max-new-tokens", "2"]
    assert scaling.main([*map(str, arguments), *only]) == 0
    rows = json.loads(output.read_text())["rows"]
    measured = [("batch_size", 1), ("batch_size", 4), ("passage_words", 10), ("passage_words", 20), ("threads", 1)]
    assert [(row["axis"], row["value"]) for row in rows[::2]] == measured
    assert {row["name"] for row in rows} == {"qa_onnx fp32", "transformers fp32"}
    assert all(len(row["seconds"]) == 2 and row["point"][row["axis"]] == row["value"] for row in rows)
    assert rows[0]["point"] | {"batch_size": 4} == rows[2]["point"]
    assert "| passage words 20 |" in capsys.readouterr().out
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_scalings_passages_are_cut_to_length_and_all_different():
    examples = parse_squad(generate("heldout", questions=60), source="sample")
    point = scaling.Point(batch_size=1, passage_words=25, questions_per_passage=3, threads=1)
    questions, contexts = scaling.make_questions(examples, point, 8)
    assert len(questions) == len(contexts) == 8
    assert [len(context.split()) for context in contexts] == [25] * 8
    assert [contexts.index(context) for context in contexts] == [0, 0, 0, 3, 3, 3, 6, 6]


def settings_of(directory, **changes):
    values = {
        "directory": str(directory),
        "questions": ["Who?", "Where is the bridge?"],
        "contexts": ["Mara founded a town."] * 2,
        "max_new_tokens": 5,
        "stops": False,
        "threads": 1,
    }
    return Settings(**(values | changes))


def ask(name, settings, *requests):
    replies = io.StringIO()
    serve(name, settings, io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_one_question_is_asked_alone_and_every_answer_has_its_tokens(tiny_bundle, tmp_path):
    (tmp_path / "fp32").symlink_to(tiny_bundle)
    loaded, everything, single = ask(
        "qa_onnx fp32",
        settings_of(tmp_path, batch_size=2),
        {"batch_size": 2, "tokens": True},
        {"question": 1, "tokens": True},
    )
    assert loaded["load_seconds"] > 0
    assert [len(tokens) for tokens in everything["tokens"]] == [5, 5]
    assert single["tokens"] == everything["tokens"][1:]


def test_extractive_answers_are_of_the_context_and_may_be_shorter(tiny_bundle, tmp_path):
    (tmp_path / "int8").symlink_to(tiny_bundle)
    _, reply = ask("qa_onnx int8 extractive", settings_of(tmp_path, batch_size=2), {"batch_size": 2, "tokens": True})
    assert all(len(tokens) <= 5 for tokens in reply["tokens"])


def test_another_batch_size_than_the_one_that_was_loaded_is_refused(tiny_bundle, tmp_path):
    (tmp_path / "fp32").symlink_to(tiny_bundle)
    with pytest.raises(ValueError, match="got batch size 3; qa_onnx was loaded with 2"):
        ask("qa_onnx fp32", settings_of(tmp_path, batch_size=2), {"batch_size": 3})


def test_a_peer_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    (reply,) = ask("CTranslate2 int8", settings_of(tmp_path))
    assert "ctranslate2" in reply["missing"]
    result = {
        "rows": [
            {"name": "CTranslate2 int8", "status": f"not installed ({reply['missing']})"},
            {"name": "qa_onnx int8", "status": "measured", "seconds": [1.0], "answers_per_second": 2.0, "batch_size": 1}
            | {"peak_rss_mib": 10, "load_seconds": 1.0},
        ],
        "workload": "w",
        "questions": 2,
        "passages": 1,
        "max_new_tokens": 8,
        "model": "m",
        "versions": {},
        "threads": 1,
        "rounds": 1,
        "machine": {"processor": "p"},
    }
    assert "| CTranslate2 int8 | not installed" in tables.throughput_table(result)
    assert tables.ratio(result, "qa_onnx int8", "CTranslate2 int8") is None


def test_runners_take_turns_and_one_that_is_not_installed_is_a_row(tmp_path, monkeypatch):
    asked, closed = [], []

    class FakeRunner:
        def __init__(self, name, settings, directory):
            self.name, self.load_seconds = name, 0.5
            self.missing = "absent" if name == "vLLM bf16" else None

        def ask(self, **request):
            asked.append((self.name, request))
            return {"seconds": 2.0, "peak_rss_mib": 10, "tokens": [[1], [2]] if request.get("tokens") else None}

        def close(self):
            closed.append(self.name)

    monkeypatch.setattr(harness, "Runner", FakeRunner)
    names = ["qa_onnx fp32", "vLLM bf16", "transformers fp32"]
    monkeypatch.setattr(throughput, "best_batch_size", lambda *_: 16)
    ours, absent, theirs = throughput.measure(settings_of(tmp_path), names, rounds=2)
    assert absent["status"] == "not installed (absent)"
    assert (ours["seconds"], ours["answers_per_second"], ours["equal_tokens_percent"]) == ([2.0, 2.0], 1.0, 100)
    assert (ours["batch_size"], theirs["batch_size"]) == (64, 16)
    assert [name for name, request in asked if "batch_size" in request] == ["qa_onnx fp32", "transformers fp32"] * 2
    assert closed == ["qa_onnx fp32", "transformers fp32"]
    ours, absent, _ = latency.measure(settings_of(tmp_path, questions=["Who?"] * 4, contexts=["Mara."] * 4), names)
    assert (ours["first"], ours["second"], ours["first_ms"]["50"]) == ([2.0], [2.0], 2000)
    assert "first_ms" not in absent


def test_a_runner_that_dies_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"qa_onnx fp32 ended with status 1: .*BundleError.* no such directory"):
        runner.Runner("qa_onnx fp32", settings_of(tmp_path), tmp_path)


def test_a_ratio_is_the_median_over_rounds():
    rows = [
        {"name": "a", "status": "measured", "seconds": [1.0, 2.0, 4.0]},
        {"name": "b", "status": "measured", "seconds": [3.0, 4.0, 40.0]},
    ]
    assert tables.ratio({"rows": rows}, "a", "b") == 3.0


def test_a_trained_models_answers_are_evaluated(tiny_model_dir, tmp_path):
    (tmp_path / "model").symlink_to(tiny_model_dir)
    settings = settings_of(tmp_path)
    examples = parse_squad(generate("heldout", questions=8), source="sample")
    encode = load_model_tokenizer(settings).encode
    tokens = [encode(" " + example.answers[0].text).ids if example.answers else [] for example in examples]
    assert throughput.quality(tokens, examples, settings) == {"exact_match": 100, "f1": 100}
    tokens[0] = tokens[0] + encode(" and three more").ids
    scores = throughput.quality(tokens, examples, settings)
    assert scores["exact_match"] == 87.5
    assert 87.5 < scores["f1"] < 100
    row = {"name": "qa_onnx fp32", "status": "measured", "seconds": [1.0], "answers_per_second": 2.0, "batch_size": 1}
    result = {"workload": "natural", "questions": 8, "passages": 1, "max_new_tokens": 8, "model": "m", "rounds": 1}
    result |= {"rows": [row | {"peak_rss_mib": 10, "load_seconds": 1.0} | scores], "versions": {}, "threads": 1}
    table = tables.throughput_table(result | {"machine": {"processor": "p"}})
    assert "| qa_onnx fp32 is | exact match | F1 | peak RSS |" in table
    assert f"| 1.0x | 87.5 | {scores['f1']:.1f} | 10 MiB |" in table


def test_the_workloads_are_those_of_the_issue(real_data):
    examples = read_examples(real_data / "squad" / "dev.json")
    documents, single = throughput.documents(examples), throughput.one_question(examples)
    assert len({example.context for example in documents}) == 48
    assert documents == examples[: len(documents)]
    assert len({example.context for example in single}) == len(single) == 64
    long = throughput.long_context(examples)
    contexts = [example.context for example in long]
    assert contexts == [context for context in dict.fromkeys(contexts) for _ in range(4)]
    assert len(contexts) == 48
    assert all(550 < len(context.split()) <= 720 for context in contexts)
    assert all(answer.text in example.context for example in long for answer in example.answers)
    assert single[0] == examples[0]


def test_a_small_file_is_a_workload_too():
    examples = parse_squad(generate("heldout", questions=9), source="sample")
    assert list(throughput.documents(examples)) == examples
    assert len(throughput.one_question(examples)) == len({example.context for example in examples})


def test_training_is_measured_against_the_notebooks_way(tmp_path, capsys):
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=12)))
    arguments = ["--data", data, "--passages", 2, "--rounds", 1, "--output", output]
    assert training.main([*map(str, arguments), "--only", "notebook", "qa_onnx, packed"]) == 0
    result = json.loads(output.read_text())
    notebook, packed = result["rows"]
    assert notebook["tokens_computed"] == 512 * result["questions"]
    assert packed["tokens_computed"] < result["tokens"]
    assert packed["peak_mib"] > 100
    table = tables.render(result)
    assert table in capsys.readouterr().out
    assert "| notebook |" in table
    assert "| 1.0x |" in table
