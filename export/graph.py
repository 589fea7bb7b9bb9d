"""Builds ONNX graphs node by node, for the runtime's versions of ONNX and of its operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qa_onnx.engine.kv_cache import COPY_INDEX, SOURCE_NAME, TARGET_NAME, CacheLayout
from qa_onnx.engine.session import Signature
from qa_onnx.engine.signature import copier_inputs, copier_outputs

OPSET, CONTRIB_OPSET, IR_VERSION = 24, 1, 11
CONTRIB = "com.microsoft"


class GraphBuilder:
    """Collects nodes and constants; methods that add a node return the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}

    def op(self, op_type: str, *inputs: str, name: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output; `name` is the output's, made up where none is given."""
        output = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", domain=domain, **attributes)
        )
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        """A constant of the graph; returns its name."""
        self.initializers[name] = np.asarray(value, dtype)
        return name

    def finish(self, inputs: Signature, outputs: Signature, *domains: str) -> onnx.ModelProto:
        """The model of all nodes that were added; `domains` are those of operators that are not ONNX Runtime's."""
        initializers = [numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = helper.make_graph(self.nodes, "qa_onnx", _values(inputs), _values(outputs), initializers)
        return _make_model(graph, *domains)


def build_cache_copy(layout: CacheLayout) -> onnx.ModelProto:
    """Builds the graph that copies KV caches on the device: for each key and value, chunks of `ALIGNMENT` columns.

    `source.N.key` [A, chunk] and `index` int64 [B] give `target.N.key` [B, chunk], bound to where the copy goes.
    """
    nodes = [
        helper.make_node("Gather", [f"{SOURCE_NAME}{key}", COPY_INDEX], [f"{TARGET_NAME}{key}"], name=f"{key}/Gather")
        for key in layout.names
    ]
    inputs, outputs = _values(copier_inputs(layout)), _values(copier_outputs(layout))
    graph = helper.make_graph(nodes, "qa_onnx_cache_copy", inputs, outputs)
    return _make_model(graph)


def _values(signature: Signature) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind.dtype)), kind.shape)
        for name, kind in signature.items()
    ]


def _make_model(graph: onnx.GraphProto, *domains: str) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    opsets += [helper.make_opsetid(domain, 1) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qa_onnx")
