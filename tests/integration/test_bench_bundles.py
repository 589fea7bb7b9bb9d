"""The measurements of bundles on a tiny model, without other runners."""

from __future__ import annotations

import json

import onnx
import pytest

from bench import (
    accuracy,
    cuda_counts,
    latency,
    long_documents,
    look_ahead,
    reliability,
    report,
    roofline,
    throughput,
)
from qa_onnx.bundle import Bundle
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import InvalidInputError
from tests.kernels import needs_kernels
from training.starter.sample import generate


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


def test_roofline_compares_prefill_and_decode_with_the_machines_limits(tiny_bundle, tmp_path, monkeypatch, capsys):
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
    assert result["gemm_rates"].keys() == {"fp32", "int8"}
    assert "| fp32 prefill, 3 rows |" in capsys.readouterr().out
    result["points"] += [point | {"precision": "bf16"} for point in result["points"]]  # ONNX Runtime has no GEMM of it
    output.write_text(json.dumps(result))
    assert report.main([str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_operations_are_those_of_gpt2s_matmuls(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest  # two layers of width 32, 600 tokens in the vocabulary
    layer = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32)
    assert roofline.count_operations(manifest, 5, 5, 0) == 5 * (2 * layer + 2 * 32 * 600)
    assert roofline.count_operations(manifest, 5, 1, 0) == 5 * layer + layer + 4 * 2 * 32 * 96 + 2 * 32 * 600
    assert roofline.count_operations(manifest, 0, 0, 7) == 2 * 7 * 2 * (2 * 32)


def test_two_questions_are_on_one_passage():
    examples = latency.two_questions(parse_squad(generate("heldout", questions=60), source="sample"), passages=5)
    assert len(examples) == 10
    assert all(one.context == other.context for one, other in zip(examples[::2], examples[1::2], strict=True))


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


def test_agreement_counts_a_token_that_only_one_side_has_as_different():
    shares = throughput.agreement([[1, 2], [3], [5]], [[1, 2], [3, 4], [6]])
    assert shares["equal_answers_percent"] == pytest.approx(100 / 3)
    assert shares["equal_tokens_percent"] == pytest.approx(60)


def articles_of(heldout_file, path):
    """The passages of the held-out sample as articles of two passages each."""
    paragraphs = [part for article in json.loads(heldout_file.read_text())["data"] for part in article["paragraphs"]]
    data = [{"title": f"part {first}", "paragraphs": paragraphs[first : first + 2]} for first in range(0, 12, 2)]
    path.write_text(json.dumps({"data": data}))
    return path


def test_long_documents_hold_the_own_passage_and_others_of_other_articles(starter_bundle, heldout_file, tmp_path):
    data, output = articles_of(heldout_file, tmp_path / "articles.json"), tmp_path / "long.json"
    examples = read_examples(data)
    for example, (document, start) in zip(examples, long_documents.make_documents(examples, 5, seed=0), strict=True):
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


def test_bulk_counts_equal_answers_and_memory(tiny_bundle, heldout_file, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from bench.bulk import main as measure

    result = tmp_path / "bulk.json"
    options = ["--questions", "40", "--rounds", "1", "--memory-rows", "60", "--max-new-tokens", "4"]
    assert measure(["--model", str(tiny_bundle), "--data", str(heldout_file), *options, "--output", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["speed"]["equal"] == found["speed"]["questions"] == 40
    assert found["memory"][0]["rows"] == 60
    assert 20 < found["memory"][0]["peak_mib"] < 2_000
    assert "40 of 40 answers and scores are equal" in capsys.readouterr().out
