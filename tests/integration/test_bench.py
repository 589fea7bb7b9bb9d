"""The benchmark on a tiny model: every runner answers, agrees with PyTorch, and is in the report."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import onnx
import pytest

from bench import (
    accuracy,
    cuda_counts,
    demo,
    latency,
    long_documents,
    look_ahead,
    reliability,
    report,
    roofline,
    runner,
    scaling,
    throughput,
    training,
)
from bench.peers import RUNNERS, serve
from bench.settings import Settings
from export import to_onnx
from qa_onnx import cli
from qa_onnx.bundle import Bundle
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import InvalidInputError
from qa_onnx.kernels import find_kernels
from tests.conftest import ROOT
from tests.kernels import needs_kernels
from training import finetune
from training.starter.sample import generate


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "work"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(throughput, "BATCH_SIZES", (8,))
    monkeypatch.setattr(runner, "SETTLE_SECONDS", 0)


def test_every_runner_gives_pytorchs_tokens_with_end_of_text_ignored(tiny_model_dir, tmp_path, work, quick, capsys):
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=12)))
    arguments = ["--workload", "documents", "--data", data, "--model", tiny_model_dir, "--work", work]
    assert throughput.main([*map(str, arguments), "--output", str(output), "--rounds", "2"]) == 0
    result = json.loads(output.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == runner.PEERS == [name for name in RUNNERS if name != "qa_onnx int8 extractive"]
    absent = {name for name in rows if name.startswith("OpenVINO") and not runner.peer_python(name).is_file()}
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
    table = report.table(result)
    assert table in capsys.readouterr().out
    assert all(f"| {name} |" in table for name in runner.PEERS)
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_reads_files_as_the_other_commands_do(tmp_path, monkeypatch, capsys):
    """Several files, columns of other names, and bad rows that are skipped."""
    first, second = tmp_path / "a.csv", tmp_path / "b.jsonl"
    first.write_text("body;ask;reply\nIt opened in 1803.;When?;1803\n;Who?;Mara\n")
    second.write_text(json.dumps({"body": "Mara did.", "ask": "Who?", "reply": "Mara"}))
    asked = []

    def compare(bundle, torch_model, examples, **options):
        asked.extend(examples)
        raise InvalidInputError("read")

    monkeypatch.setattr(accuracy, "compare", compare)
    arguments = ["--model", str(tmp_path), "--torch", "DIR", "--data", str(first), str(second)]
    assert accuracy.main(arguments) == 2
    assert capsys.readouterr().err.endswith("Pass --columns context=body question=ask\n")
    arguments += ["--columns", "context=body", "question=ask"]
    assert accuracy.main(arguments) == 2
    assert "a.csv: line 3: body: got an empty string; expected some text. Mend it, or leave" in capsys.readouterr().err
    assert asked == []
    assert accuracy.main([*arguments, "--skip-bad-rows", "--limit", "9"]) == 2
    assert capsys.readouterr().err.startswith(f"skipped: {first}: line 3: body: got an empty string")
    assert [example.id for example in asked] == ["a.csv: line 2", "b.jsonl: line 1"]
    assert accuracy.main([*arguments, "--output", str(first)]) == 2
    assert "is the same file as --data" in capsys.readouterr().err


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


def test_look_ahead_is_measured_on_second_questions(starter_bundle, tmp_path, capsys):
    needs_kernels()
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=30)))
    arguments = ["--bundle", starter_bundle, "--data", data, "--output", output, "--passages", 5]
    assert look_ahead.main([*map(str, arguments)]) == 0
    plain, kernels, ahead = json.loads(output.read_text())["rows"]
    assert [len(row["seconds"]) for row in (plain, kernels, ahead)] == [4, 4, 4]
    assert plain["draft_tokens"] == kernels["draft_tokens"] == 0
    assert ahead["equal_percent"] == kernels["equal_percent"] == 100
    assert ahead["steps_each"] <= kernels["steps_each"]
    assert "| kernels, look-ahead |" in capsys.readouterr().out


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


def test_callers_ask_a_bundle_that_exists(tiny_bundle, tmp_path, capsys):
    data, output = tmp_path / "data.json", tmp_path / "result.json"
    data.write_text(json.dumps(generate("heldout", questions=10)))
    arguments = ["--data", data, "--bundles", tiny_bundle, "--output", output, "--concurrency", 4, "--rounds", 1]
    assert latency.main([*map(str, arguments), "--callers", "answer"]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["name"], row["callers"], row["equal"], len(row["seconds"])) == ("qa_onnx fp32", "answer", 10, 1)
    with pytest.raises(SystemExit):
        latency.main([*map(str, arguments[:6])])
    assert "--bundles needs --concurrency" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        latency.main(["--data", str(data), "--model", "m", "--output", str(output)])
    assert "--work is required" in capsys.readouterr().err


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
    questions, contexts = scaling.questions_of(examples, point, 8)
    assert len(questions) == len(contexts) == 8
    assert [len(context.split()) for context in contexts] == [25] * 8
    assert [contexts.index(context) for context in contexts] == [0, 0, 0, 3, 3, 3, 6, 6]


def test_roofline_places_prefill_and_decode_under_the_roofs(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "ROWS", (1, 3))
    monkeypatch.setattr(roofline, "memory_rate", lambda **_: 1e10)
    output = tmp_path / "result.json"
    assert roofline.main(["--bundles", str(tiny_bundle), "--output", str(output), "--repeats", "2"]) == 0
    result = json.loads(output.read_text())
    assert [(point["phase"], point["rows"]) for point in result["points"]] == [
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    assert all(point["seconds"] > 0 for point in result["points"])
    assert result["product_rates"].keys() == {"fp32", "int8"}
    assert "| fp32 prefill, 3 rows |" in capsys.readouterr().out
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_operations_are_those_of_gpt2s_products(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest  # two layers of width 32, 600 tokens in the vocabulary
    layer = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32)
    assert roofline.operations_of(manifest, 5, 5, 0) == 5 * (2 * layer + 2 * 32 * 600)
    assert roofline.operations_of(manifest, 5, 1, 0) == 5 * layer + layer + 4 * 2 * 32 * 96 + 2 * 32 * 600
    assert roofline.operations_of(manifest, 0, 0, 7) == 2 * 7 * 2 * (2 * 32)


def test_two_questions_are_on_one_passage():
    examples = latency.two_questions(parse_squad(generate("heldout", questions=60), source="sample"), passages=5)
    assert len(examples) == 10
    assert all(one.context == other.context for one, other in zip(examples[::2], examples[1::2], strict=True))


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


def test_counting_says_where_there_are_no_counters(tiny_bundle, monkeypatch):
    monkeypatch.setattr(cuda_counts, "LIBRARY", "libqa_onnx_no_such.so")
    with pytest.raises(SystemExit, match=r"no counters: .*LD_LIBRARY_PATH"):
        cuda_counts.main([str(tiny_bundle)])
    monkeypatch.setattr(cuda_counts, "LIBRARY", None)  # the process itself, which exports none
    with pytest.raises(SystemExit, match="does not count"):
        cuda_counts.main([str(tiny_bundle)])


def test_counts_above_a_target_are_told():
    phase = {"phase": "decode step", "h2d_bytes": 70_000, "d2h_bytes": 1, "sync": 6, "launches": 9, "graph_launch": 0}
    assert cuda_counts.above_target(phase) == ["decode step: h2d 70,000, target 64,000"]
    assert cuda_counts.above_target({**phase, "phase": "loading"}) == []


def test_the_shapes_of_a_graph_are_told_from_its_values(tiny_bundle):
    graph = onnx.load(tiny_bundle / "model.onnx").graph
    shapes = cuda_counts._shape_nodes(graph)
    kinds = {node.op_type for node in graph.node if node.name in shapes}
    assert {"Shape", "Concat", "Mul"} <= kinds
    assert not kinds & {"Gather", "Gemm", "TensorScatter", "Where", "Less"}
    layout, vocabulary, positions = cuda_counts.read_model(tiny_bundle / "model.onnx")
    assert (layout, vocabulary, positions) == (Bundle.open(tiny_bundle).manifest.cache_layout, 600, 256)


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
    assert "| CTranslate2 int8 | not installed" in report.table(result)
    assert report.ratio(result, "qa_onnx int8", "CTranslate2 int8") is None


def test_a_runner_that_dies_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"qa_onnx fp32 ended with status 1: .*BundleError.* no such directory"):
        runner.Runner("qa_onnx fp32", settings_of(tmp_path), tmp_path)


def test_a_ratio_is_the_median_over_rounds():
    rows = [
        {"name": "a", "status": "measured", "seconds": [1.0, 2.0, 4.0]},
        {"name": "b", "status": "measured", "seconds": [3.0, 4.0, 40.0]},
    ]
    assert report.ratio({"rows": rows}, "a", "b") == 3.0


def test_agreement_counts_a_token_that_only_one_side_has_as_different():
    shares = throughput.agreement([[1, 2], [3], [5]], [[1, 2], [3, 4], [6]])
    assert shares["equal_answers_percent"] == pytest.approx(100 / 3)
    assert shares["equal_tokens_percent"] == pytest.approx(60)


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
    table = report.render(result)
    assert table in capsys.readouterr().out
    assert "| notebook |" in table
    assert "| 1.0x |" in table


@pytest.fixture
def demo_ran(tmp_path, monkeypatch):
    """A directory in which a demo ran, with small files in place of its own."""
    monkeypatch.chdir(tmp_path)
    for path in ("model/config.json", "model/metrics.json", "bundle/qa_onnx.json", "heldout.json", "accuracy.json"):
        file = demo.DIRECTORY / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"of the demo: {path}")
    demo.write_record()
    (demo.DIRECTORY / "predictions.json").write_text("of the user")
    return demo.DIRECTORY


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_demo_replaces_what_an_earlier_one_wrote(demo_ran, monkeypatch):
    seen = []

    def run(command):
        seen.append(contents(demo_ran).keys())
        return 3

    monkeypatch.setattr(demo, "run", run)
    assert demo.main([]) == 3
    assert seen == [{demo.RECORD, demo_ran / "predictions.json"}]


@pytest.mark.parametrize(
    "name",
    [
        *("model/thesis.txt", "bundle/notes/thesis.txt", "bundle/qa_onnx.json", "model/metrics.json"),
        *("heldout.json", "accuracy.json", "passage.txt", "demo.json"),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_the_demo_never_deletes_what_it_did_not_write(demo_ran, monkeypatch, capsys, name, is_first):
    """Neither files of others, where no demo ran before, too, nor its own that were changed since."""
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    if is_first:
        for path in contents(demo_ran):
            path.unlink()
    (demo_ran / name).parent.mkdir(exist_ok=True)
    (demo_ran / name).write_text("precious")
    before = contents(demo_ran)
    assert demo.main([]) == 2
    assert capsys.readouterr().err.startswith(f"error: {demo_ran / name} was not written by an earlier demo")
    assert contents(demo_ran) == before


@pytest.mark.parametrize("name", ["model", "heldout.json", "bundle/qa_onnx.json"])
def test_the_demo_deletes_nothing_through_links(demo_ran, tmp_path, monkeypatch, name):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    elsewhere = tmp_path / "elsewhere"
    (demo_ran / name).rename(elsewhere)
    (demo_ran / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    assert demo.main([]) == 2
    assert contents(tmp_path) == before


def test_the_demo_does_not_wait_for_a_pipe(demo_ran, capsys):
    os.mkfifo(demo_ran / "model" / "pipe")
    assert demo.main([]) == 2
    assert "model/pipe was not written by an earlier demo" in capsys.readouterr().err


@pytest.mark.parametrize("record", ["[]", "{}", "{cut", '{"written": 5}', '{"written": ["a"]}', "\x00"])
def test_a_record_of_no_demo_is_left_alone(demo_ran, monkeypatch, capsys, record):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    demo.RECORD.write_text(record)
    before = contents(demo_ran)
    assert demo.main([]) == 2
    assert "demo.json was not written by an earlier demo" in capsys.readouterr().err
    assert contents(demo_ran) == before


def test_an_interrupted_training_of_the_demo_goes_on(demo_ran, monkeypatch):
    """Its files are in no record yet; `training.finetune` itself refuses those of another run."""
    shutil.rmtree(demo_ran / "model")
    demo.write_record()
    (demo_ran / "model" / "checkpoint-8").mkdir(parents=True)
    (demo_ran / "model" / "training_config.json").write_text("{}")
    monkeypatch.setattr(demo, "run", lambda command: 3)
    assert demo.main([]) == 3
    assert (demo_ran / "model" / "checkpoint-8").is_dir()
    assert not (demo_ran / "bundle").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_the_demo_waits_for_the_command_that_it_interrupts(tmp_path):
    """A training writes a checkpoint then."""
    (tmp_path / "command.py").write_text(
        "import signal, time\n"
        "def stop(*signal):\n    time.sleep(0.5)\n    print('wrote a checkpoint')\n    raise SystemExit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('began', flush=True)\ntime.sleep(60)\n"
    )
    program = "import sys; from bench import demo; demo.COMMANDS = ('command.py',); sys.exit(demo.main([]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while process.stdout.readline() != "began\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "wrote a checkpoint" in output
    assert demo.INTERRUPTED in output


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["--quick"], 2)])
def test_the_demo_with_options_does_nothing(demo_ran, monkeypatch, arguments, status):
    monkeypatch.setattr(demo, "run", lambda command: pytest.fail("the demo began"))
    before = contents(demo_ran)
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == status
    assert contents(demo_ran) == before


def test_what_the_demo_says_to_type_next_is_taken():
    lines = [line for line in demo.NEXT.splitlines() if " -m " in line]
    assert len(lines) == 8
    for line in lines:
        program, *arguments = shlex.split(line.split(" -m ", 1)[1])
        parser = {
            "qa_onnx": cli.make_parser,
            "training.finetune": finetune.make_parser,
            "export.to_onnx": to_onnx.make_parser,
        }[program]()
        if "--help" not in arguments:
            parser.parse_args(arguments)


def test_the_answers_of_the_demo_are_shown_with_what_was_expected(starter_bundle, heldout_file, monkeypatch, capsys):
    monkeypatch.setattr(demo, "BUNDLE", starter_bundle)
    monkeypatch.setattr(demo, "HELDOUT", heldout_file)
    demo.show_answers()
    out = capsys.readouterr().out
    assert "all names are invented" in out
    assert demo.REAL_PASSAGE in out
    for question, expected in demo.REAL_QUESTIONS:
        assert expected in demo.REAL_PASSAGE
        assert f"Q: {question}" in out
        assert f"expected: {expected})" in out
    assert re.search(rf"\n[0-{len(demo.REAL_QUESTIONS)}] of {len(demo.REAL_QUESTIONS)} are right", out)


def articles_of(heldout_file, path):
    """The passages of the held-out sample as articles of two passages each."""
    paragraphs = [part for article in json.loads(heldout_file.read_text())["data"] for part in article["paragraphs"]]
    data = [{"title": f"part {first}", "paragraphs": paragraphs[first : first + 2]} for first in range(0, 12, 2)]
    path.write_text(json.dumps({"data": data}))
    return path


def test_long_documents_hold_the_own_passage_and_others_of_other_articles(starter_bundle, heldout_file, tmp_path):
    data, output = articles_of(heldout_file, tmp_path / "articles.json"), tmp_path / "long.json"
    examples = read_examples(data)
    for example, (document, start) in zip(examples, long_documents.documents_of(examples, 5, seed=0), strict=True):
        assert document.startswith(example.context, start)
        others = {other.context for other in examples if other.context in document} - {example.context}
        assert len(others) == 5
        assert not others & {other.context for other in examples if other.title == example.title}
    command = ["--model", starter_bundle, "--data", data, "--questions", "8", "--others", "0", "3", "--window", "64"]
    assert long_documents.main([*map(str, command), "--output", str(output)]) == 0
    alone, among = json.loads(output.read_text())["rows"]
    assert alone["windows"] < among["windows"]
    assert 50 <= among["exact_match"] <= 100
    command[-3] = "99"
    assert long_documents.main([*map(str, command)]) == 2


def test_reliability_is_measured_with_pairs_that_have_no_answer(starter_bundle, heldout_file, tmp_path):
    data, output = articles_of(heldout_file, tmp_path / "articles.json"), tmp_path / "reliability.json"
    assert reliability.main([*map(str, ("--model", starter_bundle, "--data", data, "--output", output))]) == 0
    result = json.loads(output.read_text())
    assert result["without_answer"] == result["questions"] > 10
    assert result["f1_answerable_forced"] > 80
    assert result["f1_answerable"] <= result["f1_answerable_forced"]
    assert result["no_answer_percent"] > result["answerable_without_answer_percent"] + 10
    assert result["threshold"] == Bundle.open(starter_bundle).manifest.no_answer_threshold
    assert 0 <= result["ece_of_score"] <= 1
