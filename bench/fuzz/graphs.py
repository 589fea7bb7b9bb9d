"""Mutations of a bundle's graphs: nodes, inputs and outputs, initializers, external data, versions, costly nodes."""

from __future__ import annotations

import os
from random import Random

import onnx
from google.protobuf.message import DecodeError

from bench.fuzz.mutable_bundle import OUTSIDE_NAME, WEIGHTS_NAME, MutableBundle
from bench.fuzz.mutations import ODD_FLOATS, mutate_bytes
from qa_onnx.manifest import CACHE_COPY_NAME, KERNEL_MODEL_NAME, MODEL_NAME

ELEMENT_TYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 20, 23, 99)
"""Of tensors, by their numbers in ONNX; the last is none."""


def mutate_graph(random: Random, bundle: MutableBundle) -> str:
    """Changes one of the graphs in one or two places; returns what was done."""
    name = random.choice((MODEL_NAME, KERNEL_MODEL_NAME, KERNEL_MODEL_NAME, CACHE_COPY_NAME))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bundle.read(name))
    except DecodeError:
        return "nothing"
    if not (model.graph.node and model.graph.input and model.graph.output):
        return "nothing"
    mutations = random.choices(_GRAPH_MUTATIONS, k=random.choice((1, 1, 2)))
    done = [mutation(random, model, bundle) for mutation in mutations]
    bundle.write(name, model.SerializeToString())
    return f"{name}: {', '.join(done)}"


def _names(graph: onnx.GraphProto) -> list[str]:
    return ["", *(value.name for value in (*graph.input, *graph.output, *graph.initializer)), "nowhere"]


def _node(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    """Changes one node: its operator, attributes, inputs or outputs; or leaves it out or doubles it."""
    nodes = model.graph.node
    place = random.randrange(len(nodes))
    node = nodes[place]
    what = f"node {place} {node.op_type}"
    match random.randrange(8):
        case 0:
            del nodes[place]
            return f"{what} left out"
        case 1:
            nodes.append(node)
            return f"{what} doubled"
        case 2:
            node.op_type = random.choice((*_OPERATORS, random.choice(nodes).op_type))
            return f"{what} is {node.op_type}"
        case 3 if node.input:
            index = random.randrange(len(node.input))
            produced = [name for other in nodes for name in other.output]
            node.input[index] = random.choice((random.choice(_names(model.graph)), random.choice(produced)))
            return f"{what} reads {node.input[index]!r}"
        case 4 if node.output:
            node.output[random.randrange(len(node.output))] = random.choice(_names(model.graph))
            return f"{what} writes elsewhere"
        case 5 if node.input:
            node.input.append(node.input[0])
            return f"{what} has an input more"
        case 6:
            node.domain = random.choice(("", "com.microsoft", "qa_onnx", "ai.onnx.ml", "a.b"))
            return f"{what} of domain {node.domain!r}"
        case _:
            if not node.attribute or random.random() < 0.3:
                value = random.choice((0, -1, 2**62, 1.5, float("nan"), "x", [0], [-1, 2**62], [0.5]))
                name = random.choice(("axis", "to", "perm", "epsilon", "alpha", "keepdims", "allowzero", "mode"))
                node.attribute.append(onnx.helper.make_attribute(name, value))
                return f"{what} {name} is {value}"
            attribute = random.choice(node.attribute)
            attribute.i, attribute.f = random.choice((0, -1, 5, 2**31, 2**62, -(2**63))), random.choice(ODD_FLOATS)
            if attribute.ints:
                attribute.ints[random.randrange(len(attribute.ints))] = attribute.i
            if random.random() < 0.2:
                attribute.type = random.choice((1, 2, 3, 4, 5, 6, 7, 8, 14))
            return f"{what} {attribute.name} is {attribute.i} {attribute.f}"


def _value(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    """Changes the name, type or shape of an input or output of the graph, or their order; or leaves one out."""
    values = random.choice((model.graph.input, model.graph.output))
    place = random.randrange(len(values))
    value = values[place]
    tensor = value.type.tensor_type
    match random.randrange(6):
        case 0:
            what = f"{value.name} left out"
            del values[place]
            return what
        case 1:
            tensor.elem_type = random.choice(ELEMENT_TYPES)
            return f"{value.name} of type {tensor.elem_type}"
        case 2 if tensor.shape.dim:
            dim = random.choice(tensor.shape.dim)
            dim.dim_value = random.choice((0, -1, 1, 3, 2**31, 2**62))
            return f"{value.name} has a size {dim.dim_value}"
        case 3:
            tensor.shape.dim.add().dim_value = 1
            return f"{value.name} has one dimension more"
        case 4:
            other = random.choice(values)
            value.name, other.name = other.name, value.name
            return f"{value.name} and {other.name} exchanged"
        case _:
            what = f"{value.name} renamed"
            value.name = random.choice(_names(model.graph))
            return what


def _initializer(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    """Changes the content, type, shape or name of an initializer that is in the graph, or leaves it out."""
    initializers = model.graph.initializer
    if not initializers:  # the graph that copies caches has none
        return _node(random, model, bundle)
    place = random.randrange(len(initializers))
    tensor = initializers[place]
    match random.randrange(6):
        case 0:
            what = f"{tensor.name} left out"
            del initializers[place]
            return what
        case 1:
            tensor.data_type = random.choice(ELEMENT_TYPES)
            return f"{tensor.name} of type {tensor.data_type}"
        case 2 if tensor.dims:
            index = random.randrange(len(tensor.dims))
            tensor.dims[index] = random.choice((0, -1, 1, tensor.dims[index] + 1, 2**31, 2**62))
            return f"{tensor.name} of shape {list(tensor.dims)}"
        case 3:
            tensor.dims.append(random.choice((0, 1, 2**40)))
            return f"{tensor.name} of shape {list(tensor.dims)}"
        case 4 if tensor.raw_data:
            count = len(tensor.raw_data) // 8
            value = random.choice((0, -1, 1, 5, 10_000, 2**40, 2**62, -(2**63)))
            tensor.raw_data = value.to_bytes(8, "little", signed=True) * count
            return f"{tensor.name} is {value}"
        case _:
            if tensor.raw_data:
                tensor.raw_data, done = mutate_bytes(random, tensor.raw_data)
                return f"{tensor.name}: {done}"
            tensor.raw_data = random.randbytes(64)
            return f"{tensor.name} has raw data"


def _external(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    """Changes where an initializer's external data is: in another file, outside of the bundle, or elsewhere in it."""
    initializers = model.graph.initializer or [model.graph.initializer.add(name="fuzz.external", data_type=1, dims=[1])]
    tensor = random.choice([tensor for tensor in initializers if tensor.external_data] or initializers)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    key = random.choice(("location", "location", "offset", "length"))
    outside = bundle.directory.parent / OUTSIDE_NAME
    if key == "location":
        value = random.choice(
            (
                str(outside),
                f"../{OUTSIDE_NAME}",
                f"{WEIGHTS_NAME}/../../{OUTSIDE_NAME}",
                f"./{WEIGHTS_NAME}",
                "link.bin",
                "unlisted.bin",
                "/dev/zero",
                "/proc/self/mem",
                "/proc/self/environ",
                MODEL_NAME,
                ".",
                "",
                "*/_ORT_MEM_ADDR_/*",
                "x" * 5000,
            )
        )
        if value == "unlisted.bin":
            os.link(outside, bundle.remove(value))
        elif value == "link.bin":
            bundle.remove(value).symlink_to(outside)
        inside = (WEIGHTS_NAME, f"./{WEIGHTS_NAME}", MODEL_NAME)
        bundle.must_be_refused |= value not in inside
    else:
        value = str(random.choice((-1, 1, 3, 4, 4096, 10**7, 2**31, 2**63, 2**64, 10**30, "x", "", "0x10")))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for name, text in (entries | {key: value}).items():
        tensor.external_data.add(key=name, value=text)
    return f"{tensor.name} {key} {value[:80]!r}"


def _opset(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    match random.randrange(4):
        case 0:
            model.ir_version = random.choice((0, 1, 3, 10, 14, 100, 2**62))
            return f"IR version {model.ir_version}"
        case 1:
            opset = random.choice(model.opset_import)
            opset.version = random.choice((-1, 0, 1, 7, 13, 23, 25, 99, 2**62))
            return f"opset {opset.domain!r} {opset.version}"
        case 2:
            model.metadata_props.add(key="x", value="x" * random.choice((1, 10**7)))
            return "metadata"
        case _:
            function = model.functions.add(name=model.graph.node[0].op_type, domain="", input=["x"], output=["x"])
            function.node.append(model.graph.node[0])
            return f"a function {function.name} that calls itself"


def _added_node(random: Random, model: onnx.ModelProto, bundle: MutableBundle) -> str:
    """Has the graph compute something of its own first: memory or time without end, when it is loaded or run."""
    graph = model.graph
    size = random.choice((10**6, 10**9, 2**33, 2**40, 2**62))
    operator, inputs = random.choice(_COSTLY_NODES)
    output = random.choice(graph.output)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == output.name:
                node.output[index] = "fuzz.before"
    graph.initializer.extend(
        [
            onnx.helper.make_tensor("fuzz.one", onnx.TensorProto.INT64, [], [1]),
            onnx.helper.make_tensor("fuzz.size", onnx.TensorProto.INT64, [], [size]),
            onnx.helper.make_tensor("fuzz.shape", onnx.TensorProto.INT64, [1], [size]),
            onnx.helper.make_tensor("fuzz.true", onnx.TensorProto.BOOL, [], [True]),
        ]
    )
    costly = onnx.helper.make_node(operator, [f"fuzz.{name}" for name in inputs], ["fuzz.all"])
    if operator == "Loop":
        costly.attribute.append(onnx.helper.make_attribute("body", onnx.parser.parse_graph(_LOOP_BODY)))
    # An output that the library reads has to need the result, or ONNX Runtime leaves the added node out.
    graph.node.extend(
        [
            costly,
            onnx.helper.make_node("ReduceMin", ["fuzz.all"], ["fuzz.least"], keepdims=0),
            onnx.helper.make_node("Sub", ["fuzz.least", "fuzz.least"], ["fuzz.zero"]),
            onnx.helper.make_node("Cast", ["fuzz.zero"], ["fuzz.cast"], to=output.type.tensor_type.elem_type),
            onnx.helper.make_node("Add", ["fuzz.before", "fuzz.cast"], [output.name]),
        ]
    )
    return f"{operator} of {size} before {output.name}"


_COSTLY_NODES = (
    ("ConstantOfShape", ("shape",)),
    ("Expand", ("one", "shape")),
    ("Tile", ("shape", "shape")),
    ("Range", ("one", "size", "one")),
    ("Loop", ("size", "true", "one")),
)
_LOOP_BODY = """body (int64 turn, bool keep, int64 state) => (bool next_keep, int64 next_state) {
    next_keep = Identity(keep)
    next_state = Add(state, state)
}"""
_GRAPH_MUTATIONS = (_node, _node, _value, _initializer, _external, _opset, _added_node)
_OPERATORS = (
    "If",
    "Loop",
    "Scan",
    "Identity",
    "Resize",
    "GRU",
    "Einsum",
    "NonZero",
    "MatMulNBits",
    "Attention",
    "nothing",
)
