"""Mutations of bundles, drawn at random: files, manifest, tokenizer, graphs and weights."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from bench.fuzz.mutations import ODD_FLOATS, ODD_NUMBERS, dump_json, mutate_bytes, mutate_json
from qa_onnx.manifest import CACHE_COPY_NAME, CONFIG_NAME, KERNEL_MODEL_NAME, MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME

WEIGHTS_NAME = "model.onnx_data"
OUTSIDE_NAME = "outside.bin"
ELEMENT_TYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 20, 23, 99)
"""Of tensors, by their numbers in ONNX; the last is none."""
UNLISTED_NAMES = ("unlisted.bin", "link.bin")
"""Files that a graph may name and the manifest does not."""
"""A file next to the bundle, as large as its weights: nothing may read it."""
MAX_READ_BYTES = 2**26


class MutableBundle:
    """A copy of a bundle that is made of hard links, so that only the files that are mutated are written."""

    def __init__(self, source: Path, directory: Path) -> None:
        """Links the files; the two are on one file system."""
        directory.mkdir()
        for path in source.iterdir():
            os.link(path, directory / path.name)
        self.directory = directory
        self.listed: dict[str, dict[str, Any]] = self.manifest()["files"]
        """What the manifest said of each file before anything was mutated."""
        self.inodes = {name: (directory / name).stat().st_ino for name in self.listed}
        self.must_be_refused = False
        """Whether nobody may load it: data is read from elsewhere, or a checksum is wrong."""

    def read(self, name: str) -> bytes:
        """The content of a file; nothing where it is none any more, or a huge one."""
        path = self.directory / name
        is_readable = path.is_file() and not path.is_symlink() and path.stat().st_size < MAX_READ_BYTES
        return path.read_bytes() if is_readable else b""

    def remove(self, name: str) -> Path:
        """Makes way for something else; returns the path."""
        path = self.directory / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file; the one that it was linked to keeps its content."""
        self.remove(name).write_bytes(content)

    def manifest(self) -> dict[str, Any]:
        """The manifest's JSON object.

        Raises:
            ValueError: It is none any more.
        """
        values: dict[str, Any] = json.loads(self.read(MANIFEST_NAME))
        return values

    def changes(self) -> dict[str, dict[str, Any]]:
        """What the manifest should say of the files that were changed or added."""
        found = {}
        for path in self.directory.iterdir():
            is_regular = path.is_file() and not path.is_symlink()
            if path.name == MANIFEST_NAME or not is_regular or path.stat().st_ino == self.inodes.get(path.name):
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = {"bytes": path.stat().st_size, "sha256": digest}
            if entry != self.listed.get(path.name):
                found[path.name] = entry
        return found


def mutate_bundle(random: Random, bundle: MutableBundle) -> str:
    """Mutates some files of a bundle; its manifest mostly has their new checksums, as an attacker's would.

    Returns:
        What was done.
    """
    chosen = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=random.choice((1, 1, 1, 2)))
    done = [mutation(random, bundle) for mutation in chosen if mutation is not _manifest]
    changes = {name: listed for name, listed in bundle.changes().items() if name not in UNLISTED_NAMES}
    if random.random() < _CORRECTED:
        try:
            values = bundle.manifest()
            values["files"] |= changes
            bundle.write(MANIFEST_NAME, json.dumps(values).encode())
        except (ValueError, RecursionError):
            done.append("no manifest")
    elif bundle.listed.keys() & changes.keys():
        bundle.must_be_refused = True
        done.append("checksums of before")
    if _manifest in chosen:
        done.append(_manifest(random, bundle))
    return "; ".join(done)


def _bytes(random: Random, bundle: MutableBundle) -> str:
    name = random.choice((MODEL_NAME, KERNEL_MODEL_NAME, CACHE_COPY_NAME, TOKENIZER_NAME, CONFIG_NAME))
    content, done = mutate_bytes(random, bundle.read(name))
    bundle.write(name, content)
    return f"{name}: {done}"


def _json(random: Random, bundle: MutableBundle) -> str:
    name = random.choice((TOKENIZER_NAME, TOKENIZER_NAME, CONFIG_NAME))
    try:
        value = json.loads(bundle.read(name))
    except (ValueError, RecursionError):
        return "nothing"
    done = [mutate_json(random, value) for _ in range(random.choice((1, 1, 3)))]
    bundle.write(name, dump_json(random, value))
    return f"{name}: {', '.join(done)}"


def _tokenizer_part(random: Random, bundle: MutableBundle) -> str:
    """Puts a well-formed part of another tokenizer into the tokenizer: a costly or huge one, or one of another kind."""
    try:
        values = json.loads(bundle.read(TOKENIZER_NAME))
        model = values["model"]
        vocabulary = list(model["vocab"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "nothing"
    name, text = random.choice(_TOKENIZER_PARTS).split(" ", 1)
    choices = {
        "REGEX": (r"(a+)+$", r"(\w+\s?)+\d$", r"(?=(a|b|ab)*c)", "", ".", "(", "(.*)*x", r"\p{L}{1,60000}", "\u00e9|"),
        "HUGE": ("", "x", " " * 1000, "x" * 10_000_000),
        "TOKEN": (" ", "the", "", "Context", "\n", "\u00e9", random.choice(vocabulary)),
        "ID": (0, 5, len(vocabulary), 2**31, 2**32 - 1),
        "SIZE": (0, 1, 100, 2**33, 2**60),
        "NUMBER": (0.0, 1e308, -1e308, 0.5, -1),
        "BOOLEAN": (True, False),
    }
    for word, values_of_word in choices.items():
        while word in text:
            text = text.replace(word, json.dumps(random.choice(values_of_word)), 1)
    part = json.loads(text)
    if name == "model" and "type" not in part:  # changes the model that is there
        part = model | part
    elif name == "vocab":
        name, step = "model", part
        part = model | {"vocab": {token: place * step for place, token in enumerate(vocabulary)}}
    values[name] = part
    bundle.write(TOKENIZER_NAME, json.dumps(values).encode())
    return f"{TOKENIZER_NAME}: {name} is {text[:160]}"


_TOKENIZER_PARTS = """\
normalizer {"type": "Replace", "pattern": {"Regex": REGEX}, "content": HUGE}
normalizer {"type": "Replace", "pattern": {"String": TOKEN}, "content": HUGE}
normalizer {"type": "Prepend", "prepend": HUGE}
normalizer {"type": "Lowercase"}
normalizer {"type": "NFKD"}
normalizer {"type": "StripAccents"}
normalizer {"type": "Nmt"}
normalizer {"type": "ByteLevel"}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
normalizer {"type": "Sequence", "normalizers": [REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E]}
pre_tokenizer {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": BOOLEAN}
pre_tokenizer {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}
pre_tokenizer {"type": "Whitespace"}
pre_tokenizer {"type": "UnicodeScripts"}
pre_tokenizer null
decoder {"type": "Replace", "pattern": {"Regex": REGEX}, "content": HUGE}
decoder {"type": "ByteFallback"}
decoder {"type": "WordPiece", "prefix": "##", "cleanup": BOOLEAN}
decoder {"type": "Strip", "content": "e", "start": SIZE, "stop": SIZE}
decoder null
post_processor {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
truncation {"direction": "Left", "max_length": SIZE, "strategy": "LongestFirst", "stride": SIZE}
padding {"strategy": {"Fixed": SIZE}, "direction": "Left", "pad_to_multiple_of": SIZE, "pad_id": ID, "pad_type_id": 0, \
"pad_token": TOKEN}
model {"type": "WordLevel", "vocab": {"a": 0, "Context": ID}, "unk_token": TOKEN}
model {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##", \
"max_input_chars_per_word": SIZE}
model {"type": "Unigram", "vocab": [["a", NUMBER], ["Context", NUMBER]], "unk_id": ID, "byte_fallback": BOOLEAN}
model {"type": "BPE", "vocab": {"a": 0}, "merges": []}
model {"dropout": NUMBER}
model {"unk_token": TOKEN, "byte_fallback": true}
model {"end_of_word_suffix": "</w>", "continuing_subword_prefix": TOKEN}
model {"ignore_merges": true, "merges": []}
vocab ID
added_tokens [{"id": ID, "content": TOKEN, "single_word": BOOLEAN, "lstrip": BOOLEAN, "rstrip": BOOLEAN, \
"normalized": BOOLEAN, "special": BOOLEAN}]""".replace(
    "REPLACE_E", '{"type": "Replace", "pattern": {"String": "e"}, "content": "eeeeeeee"}'
).splitlines()
"""Parts of a `tokenizer.json`; the words in capitals are drawn from lists."""


def _graph(random: Random, bundle: MutableBundle) -> str:
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


def _weights(random: Random, bundle: MutableBundle) -> str:
    """Changes the weights: NaN, infinity, huge numbers, other bytes."""
    data = bundle.read(WEIGHTS_NAME)
    number = random.choice(
        (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", bytes(4), b"\x01\x00\x00\x00")
    )
    match random.randrange(3):
        case 0:
            place = 4 * random.randrange(max(len(data) // 4, 1))
            length = 4 * random.choice((1, 256, 10**5))
            data = data[:place] + number * (length // 4) + data[place + length :]
            done = f"{length} bytes from {place} are {number.hex()}"
        case 1:
            data, done = number * (len(data) // 4), f"all are {number.hex()}"
        case _:
            data, done = mutate_bytes(random, data)
    bundle.write(WEIGHTS_NAME, data)
    return f"{WEIGHTS_NAME}: {done}"


def _kind_of_file(random: Random, bundle: MutableBundle) -> str:
    """Puts something that is no file in a file's place, or another file, or none."""
    name = random.choice(
        (
            MODEL_NAME,
            KERNEL_MODEL_NAME,
            CACHE_COPY_NAME,
            TOKENIZER_NAME,
            CONFIG_NAME,
            WEIGHTS_NAME,
            MANIFEST_NAME,
            "extra",
        )
    )
    outside = bundle.directory.parent / OUTSIDE_NAME
    kind = random.choice(
        (
            "missing",
            "empty",
            "directory",
            "pipe",
            "socket",
            "zeros",
            "null",
            "loop",
            "outside",
            "inside",
            "huge",
            "other",
        )
    )
    path = bundle.remove(name)
    match kind:
        case "empty":
            path.touch()
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "null":
            path.symlink_to("/dev/null")
        case "loop":
            path.symlink_to(path)
        case "outside":
            path.symlink_to(outside)
        case "inside":
            path.symlink_to(random.choice((MODEL_NAME, TOKENIZER_NAME, ".")))
        case "huge":
            path.touch()
            os.truncate(path, 2**28)
        case "other":
            os.link(outside, path)
    return f"{name}: {kind}"


def _manifest(random: Random, bundle: MutableBundle) -> str:
    """Changes the manifest: its bytes, any entry, or a field to what contradicts the other files."""
    try:
        values = bundle.manifest()
    except (ValueError, RecursionError):
        return "nothing"
    match random.randrange(5):
        case 0:
            content, done = mutate_bytes(random, bundle.read(MANIFEST_NAME))
            bundle.write(MANIFEST_NAME, content)
            return f"manifest: {done}"
        case 1:
            done = mutate_json(random, values)
        case 2:
            name = random.choice(_FILE_NAMES)
            values["files"][name] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
            done = f"lists {name[:40]!r}"
        case 3:
            name = random.choice(list(values["files"]))
            done = f"{name} is not listed"
            del values["files"][name]
            bundle.must_be_refused = True
        case _:
            name = random.choice(_NUMBERS)
            wrong = (values[name] + 1, values[name] - 1, 2 * values[name], *ODD_NUMBERS, "12", None, True)
            values[name] = random.choice(wrong)
            done = f"{name} is {repr(values[name])[:40]}"
    bundle.write(MANIFEST_NAME, dump_json(random, values))
    return f"manifest: {done}"


_NUMBERS = ("format_version", "eos_token_id", "max_positions", "layers", "heads", "head_size", "vocab_size")
_FILE_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/dev/null",
    "a\\b",
    "\x00",
    "\ud800",
    "x" * 300,
    MANIFEST_NAME,
    "con",
    "é",
    "e\u0301",
)
_CORRECTED = 0.95
"""How often the manifest has the new checksums."""
_WEIGHTS: dict[Callable[[Random, MutableBundle], str], int] = {
    _bytes: 4,
    _json: 4,
    _tokenizer_part: 4,
    _graph: 8,
    _weights: 1,
    _kind_of_file: 2,
    _manifest: 4,
}
"""How often each mutation is chosen."""
