"""What CUDA needs, checked without a GPU: a kernel for every node, and an engine that treats values as a device's."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from transformers import GPT2Config, GPT2LMHeadModel

from bench.cuda_kernels import OPERATORS
from export.decoder import build_decoder
from export.gpt2 import ACTIVATIONS
from export.graph import build_cache_copy
from qa_onnx import Answerer, EngineConfig, GenerationConfig, loading
from qa_onnx.data.reader import read_examples
from qa_onnx.engine.session import Session
from tests.conftest import ROOT
from tests.parity.engines import EOS, layout_of, torch_weights

TABLE = json.loads((ROOT / "tests" / "cuda_kernels.json").read_text(encoding="utf-8"))
NAMES = {value: name.lower() for name, value in TensorProto.DataType.items()}


def nodes_with_types(graph, opsets):
    """Each node of a graph with the types of its type constraints, as its schema names these (contrib: one, `T`)."""
    types = {value.name: NAMES[value.type.tensor_type.elem_type] for value in graph.input}
    types |= {tensor.name: NAMES[tensor.data_type] for tensor in graph.initializer}
    for node in graph.node:
        domain = node.domain or "ai.onnx"
        if domain != "ai.onnx":
            (only,) = {types[name] for name in node.input if name}
            bound = {"T": only}
            types |= dict.fromkeys(node.output, only)
        else:
            schema = onnx.defs.get_schema(node.op_type, opsets[domain], "")
            slots = list(schema.inputs) + [schema.inputs[-1]] * len(node.input)  # the last may be variadic
            bound = {slot.type_str: types[name] for slot, name in zip(slots, node.input, strict=False) if name}
            allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
            for slot, name in zip(
                list(schema.outputs) + [schema.outputs[-1]] * len(node.output), node.output, strict=False
            ):
                if node.op_type == "Cast":
                    bound[slot.type_str] = NAMES[helper.get_node_attr_value(node, "to")]
                if slot.type_str not in bound:
                    (only,) = allowed.get(slot.type_str, [slot.type_str])
                    bound[slot.type_str] = only.removeprefix("tensor(").removesuffix(")")
                types[name] = bound[slot.type_str]
        yield node, domain, bound


def without_kernel(model):
    """The nodes for which CUDA has no kernel, as text, with how often they occur."""
    opsets = {one.domain or "ai.onnx": one.version for one in model.opset_import}
    missing = Counter()
    for node, domain, bound in nodes_with_types(model.graph, opsets):
        kernels = [
            types
            for row in TABLE["kernels"]
            if (row["domain"], row["op"]) == (domain, node.op_type)
            and row["since"] <= opsets[domain] <= (row["until"] or opsets[domain])
            for types in row["types"]
        ]
        if not any(all(bound[name] in types for name, types in kernel.items() if name in bound) for kernel in kernels):
            missing[f"{domain} {node.op_type} {bound}"] += 1
    return missing


@pytest.fixture(scope="module")
def small():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("float16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_node_of_the_decoder_has_a_cuda_kernel(small, float16, activation, tied):
    config = GPT2Config(**{**small.config.to_dict(), "activation_function": activation})
    weights = torch_weights(small)
    if not tied:
        weights["lm_head.weight"] = weights["wte.weight"] + 1
    model = build_decoder(weights, config, eos_token_id=EOS, float16=float16)
    assert len(model.graph.node) > 80
    assert without_kernel(model) == {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_node_of_the_copies_has_a_cuda_kernel(small, dtype):
    assert without_kernel(build_cache_copy(layout_of(small.config, dtype))) == {}


def test_nodes_without_a_kernel_are_found(small):
    """Else the two tests above could not fail."""
    model = build_decoder(torch_weights(small), small.config, eos_token_id=EOS)
    model.graph.node.append(helper.make_node("ReduceProd", ["write_index"], ["product"]))
    model.graph.node.append(helper.make_node("And", ["write_index", "write_index"], ["both"]))
    model.graph.node.append(helper.make_node("Softmax", ["write_index"], ["soft"]))
    assert [text.split()[1] for text in without_kernel(model)] == ["ReduceProd", "And", "Softmax"]


def test_the_table_is_small_and_of_a_version_that_captures_graphs():
    assert (ROOT / "tests" / "cuda_kernels.json").stat().st_size < 100_000
    assert tuple(map(int, TABLE["onnxruntime-gpu"].split(".")[:2])) >= (1, 31)
    assert {(row["domain"], row["op"]) for row in TABLE["kernels"]} == {
        (domain, op) for domain, ops in OPERATORS.items() for op in ops
    }


# -- the engine's way on CUDA, on the CPU ------------------------------------------------------------------------------


class DeviceName(str):
    """`cpu` for ONNX Runtime; for code that asks whether values share an array's memory (`!= "cpu"`), another."""

    __hash__ = str.__hash__

    def __ne__(self, other):
        return True


class DeviceSession(Session):
    """A session whose values are copies in memory of their own, which holds NaN at first, as CUDA's may."""

    copied = allocated = 0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.limits = replace(self.limits, fixed_shapes=True, chooses_on_host=False, column_step=32)
        self.provider = DeviceName("cpu")

    def allocate(self, elements, dtype):
        DeviceSession.allocated += 1
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.full(max(elements, 1), np.nan, dtype), "cpu", 0)

    def to_device(self, array):
        DeviceSession.copied += 1
        return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), "cpu", 0)


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(loading, "Session", DeviceSession)
    monkeypatch.setattr(loading, "load_copier", DeviceSession)
    DeviceSession.copied = DeviceSession.allocated = 0


CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=40),
    "no end-of-text": GenerationConfig(max_new_tokens=40, ignore_eos=True),
    "extractive": GenerationConfig(max_new_tokens=8, extractive=True),
    "several answers": GenerationConfig(max_new_tokens=8, num_answers=3),
    "sampled": GenerationConfig(max_new_tokens=8, temperature=1.0, seed=3),
}


def ask(bundle, examples, config, **options):
    with Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(**options)) as asked:
        return asked.answer_batch([e.question for e in examples], [e.context for e in examples], config=config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("batch_size", "cache_bytes"), [(3, 0), (7, 1 << 20), (64, 1 << 26)])
def test_the_devices_way_gives_the_texts_of_the_cpus(
    tiny_bundle, heldout_file, on_device, monkeypatch, config, batch_size, cache_bytes
):
    examples = read_examples(heldout_file)[:40]
    options = {"batch_size": batch_size, "prefix_cache_bytes": cache_bytes}
    got = ask(tiny_bundle, examples, config, kernels="off", **options)  # kernels are for the CPU
    assert DeviceSession.copied > 20
    assert DeviceSession.allocated > 1
    monkeypatch.undo()
    expected = ask(tiny_bundle, examples, config, **options)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert [answer.text for answer in got] == [answer.text for answer in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-3)
        assert one.no_answer_probability == pytest.approx(other.no_answer_probability, rel=1e-3)
        assert [found.text for found in one.alternatives] == [found.text for found in other.alternatives]


def test_calls_of_all_kinds_share_batches_in_the_devices_way(tiny_bundle, heldout_file, on_device, monkeypatch):
    """Sequences that need log-probabilities run with ones that do not."""
    examples = read_examples(heldout_file)[:24]
    configs = [config for config in CONFIGS.values() for _ in range(5)][: len(examples)]

    def ask_all(**options):
        with Answerer.from_pretrained(
            tiny_bundle, provider="cpu", config=EngineConfig(batch_size=8, **options)
        ) as asked:
            futures = [
                asked.submit(example.question, example.context, config=config)
                for example, config in zip(examples, configs, strict=True)
            ]
            return [future.result().text for future in futures]

    got = ask_all(kernels="off")
    monkeypatch.undo()
    assert got == ask_all()
