"""The gate of the export: it passes what is equal, stops what is not, and a stopped export leaves nothing."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import to_onnx
from export.parity import NEW_TOKENS, random_prompts
from qa_onnx import ParityError
from qa_onnx.kernels import find_kernels
from tests.kernels import needs_kernels


def test_the_report_is_in_the_manifest(tiny_bundle):
    parity = json.loads((tiny_bundle / "qa_onnx.json").read_text())["parity"]
    assert parity["tokens_differing"] == 0
    modes = {"with_cache_batched", "with_cache_alone", "without_cache_batched", "without_cache_alone"}
    if find_kernels("fp32").library is not None:
        modes |= {f"kernels_{mode}" for mode in modes}
    assert set(parity["max_logprob_difference"]) == modes
    assert all(0 <= value <= parity["logprobs_tolerance"] for value in parity["max_logprob_difference"].values())


def test_the_prompts_are_of_mixed_lengths_up_to_the_last_position():
    lengths = [len(prompt) for prompt in random_prompts(100, 256)]
    assert max(lengths) + NEW_TOKENS - 1 == 256
    assert min(lengths) == 1
    assert lengths != sorted(lengths)


def damage_exports(monkeypatch, damage, function="build_decoder"):
    def damaged(*arguments, **options):
        model = build(*arguments, **options)
        damage(model)
        return model

    build = getattr(to_onnx, function)
    monkeypatch.setattr(to_onnx, function, damaged)


def alter_embedding(model):
    tensor = next(tensor for tensor in model.graph.initializer if "wpe" in tensor.name)
    values = numpy_helper.to_array(tensor).copy()
    values[5, 3] += 0.5  # one element: the same in all of a row would vanish in the layer norm
    for node in model.graph.node:
        node.input[:] = ["damaged.wpe" if one == tensor.name else one for one in node.input]
    tensor.CopyFrom(numpy_helper.from_array(values, "damaged.wpe"))


def replace_input(model, name, op_type, constant, *, of=None):
    """Every node, or those of one operator, gets `op_type(input, constant)` in place of an input of the graph."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(constant, np.int64), "damage"))
    for node in model.graph.node:
        if of in (None, node.op_type):
            node.input[:] = ["damaged" if one == name else one for one in node.input]
    model.graph.node.insert(0, onnx.helper.make_node(op_type, [name, "damage"], ["damaged"]))


def replace_value(model, name, op_type, constant):
    """Every reader of a value, and the graph's output, gets `op_type(value, constant)`."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(constant, np.float32), "damage"))
    place = next(place for place, node in enumerate(model.graph.node) if name in node.output)
    model.graph.node[place].output[:] = ["undamaged"]
    model.graph.node.insert(place + 1, onnx.helper.make_node(op_type, ["undamaged", "damage"], [name]))


def ignore_positions(model):
    """Every token at position 0, as if position_ids had been forgotten."""
    replace_input(model, "position_ids", "Mul", 0)


def ignore_padding(model):
    """No mask, as if padding were text: only sequences in a batch with longer ones go wrong."""
    replace_value(model, "attention_bias", "Mul", 0)


def ignore_prefix_lengths(model):
    """The columns behind a prefix are attended to: only prefixes next to longer ones, or not aligned, go wrong."""
    replace_input(model, "prefix_lengths", "Add", 1 << 20)


def ignore_suffix_starts(model):
    """The columns before a suffix are attended to."""
    replace_input(model, "suffix_starts", "Mul", 0)


def ignore_prefixes(model):
    """Sequences attend to their own columns alone."""
    replace_input(model, "prefix_lengths", "Mul", 0)


def attend_to_other_keys(model):
    """Keys of the next head."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "key_offset" and attribute.i:
                attribute.i -= 8


def ignore_order(model):
    """Tokens attend to the ones behind them, too."""
    replace_input(model, "write_index", "Add", 1 << 20, of="Unsqueeze")


def write_to_the_first_column(model):
    """Every step's keys and values in one column, as if `write_index` had been forgotten."""
    replace_input(model, "write_index", "Mul", 0)


def scatter_to_the_first_column(model):
    """The same, where the mask knows of it."""
    replace_input(model, "write_index", "Mul", 0, of="TensorScatter")


DAMAGES = [
    alter_embedding,
    ignore_positions,
    ignore_padding,
    ignore_prefix_lengths,
    ignore_suffix_starts,
    ignore_order,
    write_to_the_first_column,
    scatter_to_the_first_column,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_graph_that_computes_something_else_is_not_written(tiny_model_dir, tmp_path, monkeypatch, capsys, damage):
    damage_exports(monkeypatch, damage)
    with pytest.raises(ParityError, match="not written"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert to_onnx.main(["--model", str(tiny_model_dir), "--output", str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage", [alter_embedding, ignore_positions, ignore_prefixes, ignore_suffix_starts, attend_to_other_keys]
)
def test_a_graph_with_kernels_that_computes_something_else_is_not_written(
    tiny_model_dir, tmp_path, monkeypatch, damage
):
    needs_kernels()
    damage_exports(monkeypatch, damage, "build_kernel_decoder")
    with pytest.raises(ParityError, match=r"^(kernels_|generation).* not written"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_nan_does_not_pass(tiny_model_dir, tmp_path, monkeypatch):
    def nan_logprobs(model):
        replace_value(model, "logprobs", "Add", np.nan)

    damage_exports(monkeypatch, nan_logprobs)
    with pytest.raises(ParityError, match="nan"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle")
