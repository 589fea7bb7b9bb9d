"""What an ONNX file holds, read from its protobuf before ONNX Runtime opens it: operators, weights, files of weights.

Only what this package's export writes is let through: nodes of known operators whose attributes are numbers and
strings. So a graph has no loops, no graphs inside of nodes and no functions, and every file that it reads is known.
(Field numbers: `onnx.proto3` of the ONNX project.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qa_onnx.errors import BundleError

MAX_GRAPH_BYTES = 8 * 2**20
"""Of a graph without its weights, which are in a file of their own. GPT-2 XL's has a thirtieth of this."""
OPERATORS = frozenset(
    {
        *("Add", "And", "Cast", "Concat", "Div", "Expand", "Gather", "Gelu", "Gemm", "GreaterOrEqual"),
        *("LayerNormalization", "Less", "LessOrEqual", "LogSoftmax", "MatMul", "Max", "Min", "Mul", "Neg"),
        *("QuantizeLinear", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Shape", "Slice", "Softmax", "Split", "Sub"),
        *("TensorScatter", "TopK", "Transpose", "Unsqueeze", "Where"),
        *("com.microsoft.FastGelu", "com.microsoft.FusedMatMul", "com.microsoft.MatMulIntegerToFloat"),
        *("qa_onnx.LinearBFloat16", "qa_onnx.LinearInt8", "qa_onnx.SharedAttention"),
        *("qa_onnx.UnpackBFloat16", "qa_onnx.UnpackInt8"),
    }
)
"""The operators that `export.decoder` and `export.kernel_decoder` use."""
PRECISION_OPERATORS = {
    "int8": {"com.microsoft.MatMulIntegerToFloat", "qa_onnx.LinearInt8"},
    "bf16": {"qa_onnx.LinearBFloat16"},
}
"""Operators that a graph has one of in that precision, and in no other."""
_MODEL_GRAPH = 7
_MODEL_REFUSED = {20: "training steps", 25: "functions"}
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_GRAPH_REFUSED = {15: "sparse weights"}
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_SCALARS = frozenset({1, 2, 3, 4, 7, 8, 9, 13, 20, 21})
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 8, 9, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(kw_only=True)
class GraphFile:
    """What an ONNX file holds.

    Attributes:
        operators: The names of the operators, with their domains.
        shapes: The shape of each weight.
        constants: The bytes of each weight that is in the file itself.
        data_files: The names of the files that hold the other weights.
    """

    operators: set[str] = field(default_factory=set)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, bytes] = field(default_factory=dict)
    data_files: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> GraphFile:
        """Reads a file, and refuses what the export does not write.

        Raises:
            BundleError: It cannot be read, is too large, no ONNX file, or holds something that is refused.
        """
        try:
            size = path.stat().st_size
            if size > MAX_GRAPH_BYTES:
                raise BundleError(f"{path} has {size} bytes; expected a graph of at most {MAX_GRAPH_BYTES}")
            found = cls()
            found._read_model(memoryview(path.read_bytes()))
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise BundleError(
                f"{path} is not a graph that this package's export writes: {error}. Export the model again"
            ) from error
        return found

    def _read_model(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number in _MODEL_REFUSED:
                raise ValueError(f"it has {_MODEL_REFUSED[number]}")
            if number == _MODEL_GRAPH:
                self._read_graph(_message(value))

    def _read_graph(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number in _GRAPH_REFUSED:
                raise ValueError(f"it has {_GRAPH_REFUSED[number]}")
            if number == _GRAPH_NODE:
                self.operators.add(_operator(_message(value)))
            elif number == _GRAPH_INITIALIZER:
                self._read_tensor(_message(value))

    def _read_tensor(self, data: memoryview) -> None:
        dims: list[int] = []
        name, raw, location = "", b"", None
        for number, value in _fields(data):
            if number == _TENSOR_DIMS:
                dims += [value] if isinstance(value, int) else list(_varints(value))
            elif number == _TENSOR_NAME:
                name = str(_message(value), "utf-8")
            elif number == _TENSOR_RAW:
                raw = bytes(_message(value))
            elif number == _TENSOR_EXTERNAL:
                pair = {key: str(_message(text), "utf-8") for key, text in _fields(_message(value))}
                if pair.get(1) == "location":
                    location = pair.get(2, "")
                    self.data_files.add(location)
        if name in self.shapes:
            raise ValueError(f"it has two weights {name!r}")
        self.shapes[name] = tuple(dims)
        if location is None:
            self.constants[name] = raw


def _operator(data: memoryview) -> str:
    """The operator of a node, which is one of `OPERATORS`."""
    operator, domain = "", ""
    for number, value in _fields(data):
        if number == _NODE_OPERATOR:
            operator = str(_message(value), "utf-8")
        elif number == _NODE_DOMAIN:
            domain = str(_message(value), "utf-8")
        elif number == _NODE_ATTRIBUTE:
            for part, _ in _fields(_message(value)):
                if part not in _ATTRIBUTE_SCALARS:
                    raise ValueError("a node has an attribute that is a tensor or a graph")
    name = f"{domain}.{operator}" if domain not in ("", "ai.onnx") else operator
    if name not in OPERATORS:
        raise ValueError(f"it has a node {name!r}")
    return name


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("its protobuf is damaged")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: their numbers, and a whole number or the bytes of each."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("its protobuf is damaged")
        if position + length > len(data):
            raise ValueError("its protobuf is cut short")
        yield key >> 3, data[position : position + length]
        position += length


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("its protobuf is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("its protobuf is damaged")
