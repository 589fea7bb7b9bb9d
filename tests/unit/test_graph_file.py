from __future__ import annotations

import random

import numpy as np
import pytest

from qa_onnx.errors import BundleError
from qa_onnx.graph_file import MAX_GRAPH_BYTES, GraphFile

onnx = pytest.importorskip("onnx", reason="comes with the extra export")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper


def model_of(nodes, initializers=(), **model_fields):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])
    graph = helper.make_graph(nodes, "graph", [value], [value], list(initializers))
    return helper.make_model(graph, **model_fields)


def read(model, path):
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return GraphFile.read(path)


def external(name, location, **more):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_weights_constants_and_files_are_read(tmp_path):
    weights = [
        numpy_helper.from_array(np.arange(6).reshape(2, 3), "small"),
        external("w", "model.onnx_data", offset="0", length="48"),
        external("other", "more"),
        numpy_helper.from_array(np.zeros((), np.float32), "scalar"),
    ]
    found = read(model_of([helper.make_node("Add", ["x", "x"], ["y"])], weights), tmp_path / "model.onnx")
    assert found.shapes == {"small": (2, 3), "w": (3, 4), "other": (3, 4), "scalar": ()}
    assert found.data_files == {"model.onnx_data", "more"}
    assert found.constants == {"small": np.arange(6).tobytes(), "scalar": bytes(4)}


def subgraph(operator):
    inner = helper.make_graph([], "inner", [], [])
    return helper.make_node(operator, ["x"], ["y"], then_branch=inner, else_branch=inner)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("Loop", ["x"], ["y"]), "it has a node 'Loop'"),
        (helper.make_node("Scan", ["x"], ["y"]), "it has a node 'Scan'"),
        (helper.make_node("Add", ["x"], ["y"], domain="evil"), "it has a node 'evil.Add'"),
        (helper.make_node("PyOp", ["x"], ["y"], domain="com.microsoft"), "it has a node 'com.microsoft.PyOp'"),
        (helper.make_node("ConstantOfShape", ["x"], ["y"]), "'ConstantOfShape'"),
        (subgraph("If"), "an attribute that is a tensor or a graph"),
        (subgraph("Add"), "an attribute that is a tensor or a graph"),
        (
            helper.make_node("Add", [], ["y"], value=numpy_helper.from_array(np.zeros(1))),
            "an attribute that is a tensor or a graph",
        ),
        (helper.make_node("Add", [], ["y"], value=external("w", "secret")), "an attribute that is a tensor or a graph"),
        (helper.make_node("Add", [], ["y"], values=[external("w", "secret")]), "an attribute that is a tensor"),
    ],
)
def test_a_node_that_the_export_does_not_write_is_refused(tmp_path, node, words):
    with pytest.raises(BundleError, match=words) as caught:
        read(model_of([helper.make_node("Add", ["x", "x"], ["y"]), node]), tmp_path / "model.onnx")
    assert "model.onnx is not a graph that this package's export writes" in str(caught.value)
    assert "Export the model again" in str(caught.value)


def test_functions_training_steps_and_sparse_weights_are_refused(tmp_path):
    function = helper.make_function("local", "f", ["x"], ["y"], [], [helper.make_opsetid("", 24)])
    sparse = model_of([])
    sparse.graph.sparse_initializer.add()
    training = model_of([])
    training.training_info.add()
    for model, words in (
        (model_of([], functions=[function]), "functions"),
        (sparse, "sparse weights"),
        (training, "training steps"),
    ):
        with pytest.raises(BundleError, match=f"it has {words}"):
            read(model, tmp_path / "model.onnx")


def test_two_weights_of_one_name_are_refused(tmp_path):
    with pytest.raises(BundleError, match="it has two weights 'w'"):
        read(model_of([], [external("w", "a"), external("w", "b")]), tmp_path / "model.onnx")


def test_a_second_graph_in_the_file_is_read_too(tmp_path):
    """Protobuf joins what is written twice."""
    second = onnx.ModelProto()
    second.graph.node.append(helper.make_node("Loop", ["x"], ["y"]))
    with pytest.raises(BundleError, match="'Loop'"):
        read(model_of([]).SerializeToString() + second.SerializeToString(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "content", [b"content", b"\xff" * 100, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05\x0a", b"\x0b\x0c"]
)
def test_what_is_no_protobuf_is_refused(tmp_path, content):
    with pytest.raises(BundleError, match=r"protobuf is (damaged|cut short)"):
        read(content, tmp_path / "model.onnx")


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)
    with pytest.raises(BundleError, match=f"{MAX_GRAPH_BYTES + 1} bytes; expected a graph of at most"):
        GraphFile.read(tmp_path / "model.onnx")


def test_damage_of_any_kind_is_a_bundle_error_or_harmless(tmp_path):
    """Random damage to real bytes: never another exception, and what onnx reads as weights is what is read here."""
    draw = random.Random(0)
    weights = [external("w", "model.onnx_data"), numpy_helper.from_array(np.arange(6), "small")]
    whole = model_of([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], weights).SerializeToString()
    outcomes = []
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            found = read(bytes(content), tmp_path / "model.onnx")
        except BundleError:
            outcomes.append("refused")
            continue
        try:
            graph = onnx.load_from_string(bytes(content)).graph
        except Exception:  # noqa: BLE001 - protobuf's own, which the runtime raises too
            outcomes.append("onnx refuses")
            continue
        outcomes.append("read")
        assert set(found.shapes) == {tensor.name for tensor in graph.initializer}
        files = {pair.value for one in graph.initializer for pair in one.external_data if pair.key == "location"}
        assert files <= found.data_files
    assert outcomes.count("read") > 50 < outcomes.count("refused")
