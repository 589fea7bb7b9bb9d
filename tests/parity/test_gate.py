"""The gate of the export: it passes what is equal, stops what is not, and a stopped export leaves nothing."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import to_onnx
from export.verify import NEW_TOKENS, random_prompts
from qa_onnx import ParityError


def test_the_report_is_in_the_manifest(tiny_bundle):
    parity = json.loads((tiny_bundle / "qa_onnx.json").read_text())["parity"]
    assert parity["tokens_differing"] == 0
    assert set(parity["max_logits_difference"]) == {
        "with_cache_batched",
        "with_cache_alone",
        "without_cache_batched",
        "without_cache_alone",
    }
    assert all(0 <= value <= parity["logits_tolerance"] for value in parity["max_logits_difference"].values())


def test_the_prompts_are_of_mixed_lengths_up_to_the_last_position():
    lengths = [len(prompt) for prompt in random_prompts(100, 256)]
    assert max(lengths) + NEW_TOKENS - 1 == 256
    assert min(lengths) == 1
    assert lengths != sorted(lengths)


def damage_exports(monkeypatch, damage):
    def damaged(*arguments):
        model = build_decoder(*arguments)
        damage(model)
        return model

    build_decoder = to_onnx.build_decoder
    monkeypatch.setattr(to_onnx, "build_decoder", damaged)


def alter_embedding(model):
    tensor = next(tensor for tensor in model.graph.initializer if "wpe" in tensor.name)
    values = numpy_helper.to_array(tensor).copy()
    values[5, 3] += 0.5  # one element: the same in all of a row would vanish in the layer norm
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def ignore_positions(model):
    """Every token at position 0, as if position_ids had been forgotten."""
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        node.input[:] = ["no_positions" if name == "position_ids" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["position_ids", "zero"], ["no_positions"]))


def ignore_padding(model):
    """No mask, as if padding were text: only rows beside longer ones go wrong."""
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        node.input[:] = ["no_bias" if name == "attention_bias" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["attention_bias", "zero"], ["no_bias"]))


def write_to_the_first_column(model):
    """Every step's keys and values in one column, as if `write_index` had been forgotten."""
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        node.input[:] = ["first" if name == "write_index" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["write_index", "zero"], ["first"]))


@pytest.mark.parametrize("damage", [alter_embedding, ignore_positions, ignore_padding, write_to_the_first_column])
def test_a_graph_that_computes_something_else_is_not_written(tiny_model_dir, tmp_path, monkeypatch, capsys, damage):
    damage_exports(monkeypatch, damage)
    with pytest.raises(ParityError, match="not written"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert to_onnx.main(["--model", str(tiny_model_dir), "--output", str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nan_does_not_pass(tiny_model_dir, tmp_path, monkeypatch):
    def nan_logits(model):
        model.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
        for node in model.graph.node:
            node.output[:] = ["finite_logits" if name == "logits" else name for name in node.output]
        model.graph.node.append(onnx.helper.make_node("Add", ["finite_logits", "nan"], ["logits"]))

    damage_exports(monkeypatch, nan_logits)
    with pytest.raises(ParityError, match="nan"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle")
