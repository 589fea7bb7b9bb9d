"""The kernels one by one: against numpy, at the edges of their blocks, and with values that are not finite."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from qa_onnx import ProviderError
from qa_onnx.kernels import DOMAIN, load_kernels

onnx = pytest.importorskip("onnx", reason="comes with the extra export")
ml_dtypes, onnxruntime = pytest.importorskip("ml_dtypes"), pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
try:
    LIBRARY = load_kernels()
except ProviderError as error:
    pytest.skip(str(error), allow_module_level=True)

HEADS = 3
ROWS = (1, 2, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 95, 96, 97, 193)
WIDTHS = (1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 100, 128, 130)
ACTIVATIONS = {0: lambda x: x, 1: None, 2: None, 3: lambda x: np.maximum(x, 0)}


@pytest.fixture(params=LIBRARY.instruction_sets)
def instruction_set(request):
    LIBRARY.use(request.param)
    yield request.param
    LIBRARY.use(LIBRARY.instruction_set)


@pytest.fixture(
    params=[
        *(f"{name}-Int8" for name in LIBRARY.instruction_sets),
        *(f"{name}-BFloat16" for name in LIBRARY.instruction_sets if name in LIBRARY.bfloat16),
    ]
)
def kind(request):
    """Int8 or BFloat16, with each instruction set that multiplies in it."""
    name, _, kind = request.param.rpartition("-")
    LIBRARY.use(name)
    yield kind
    LIBRARY.use(LIBRARY.instruction_set)


def activated(x, number):
    if number == 1:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if number == 2:
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    return ACTIVATIONS[number](x)


def session_of(node, inputs, constants=None):
    """A session of one node; its outputs have any shape."""
    constants = constants or {}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    values = [helper.make_tensor_value_info(name, kind, [None] * inputs[name].ndim) for name, kind in kinds.items()]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "one", values, outputs, weights)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(LIBRARY.path))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def pack(matrix, group):
    width, columns = matrix.shape
    padded = np.zeros((-(-width // group) * group, -(-columns // 16) * 16), matrix.dtype)
    padded[:width, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(len(padded) // group, group, -1, 16).transpose(2, 0, 3, 1))


def linear(kind, x, weight, *, bias=None, norm=None, residual=None, activation=0, **changes):
    """Runs a linear layer; returns its output, and the weight that it multiplies by."""
    names, constants = ["x", "", "", "weight", "", "", "", ""], {}
    if kind == "Int8":
        scales = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
        values = np.round(weight / scales).astype(np.int8)
        constants |= {"weight": pack(values, 4), "scales": scales, "sums": values.sum(axis=0, dtype=np.int32)}
        names[4:6] = ["scales", "sums"]
        rounded = values * scales
    else:
        values = weight.astype(ml_dtypes.bfloat16)
        constants["weight"], rounded = pack(values, 2), values.astype(np.float32)
    if norm is not None:
        constants["scale"], constants["shift"] = norm
        names[1:3] = ["scale", "shift"]
    if bias is not None:
        constants["bias"], names[6] = bias, "bias"
    inputs = {"x": x}
    if residual is not None:
        inputs["residual"], names[7] = residual, "residual"
    attributes = {"columns": weight.shape[1], "activation": activation, "epsilon": 1e-5} | changes
    node = helper.make_node(f"Linear{kind}", names, ["y"], domain=DOMAIN, **attributes)
    session = session_of(node, inputs, constants)
    together = session.run(None, inputs)[0]
    for row in range(0, len(x), 1 + len(x) // 7):  # and alone
        alone = session.run(None, {name: array[row : row + 1] for name, array in inputs.items()})[0]
        np.testing.assert_array_equal(alone[0], together[row])
    return together, rounded


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33, 48, 63, 64, 65, 127, 320])
def test_a_linear_layer_is_numpys_whatever_the_sizes(kind, columns):
    for rows in ROWS:
        draw = np.random.default_rng([rows, columns])
        width = int(draw.choice(WIDTHS))
        x = draw.standard_normal((rows, width), np.float32)
        weight = draw.standard_normal((width, columns), np.float32)
        bias, residual = draw.standard_normal(columns, np.float32), draw.standard_normal((rows, columns), np.float32)
        got, rounded = linear(kind, x, weight, bias=bias, residual=residual)
        if kind == "Int8":
            low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
            tolerance = ((high - low) / 255 / 2)[:, None] * np.abs(rounded).sum(axis=0)
            expected = x.astype(np.float64) @ rounded + bias + residual
        else:
            expected = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ rounded + bias + residual
            tolerance = 0
        assert (np.abs(got - expected) <= tolerance * 1.001 + 1e-4).all(), f"{rows} rows of {width}"


@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [1, 7, 8, 16, 17, 48, 200])
def test_norm_and_activation_are_numpys(kind, activation, width):
    draw = np.random.default_rng(width)
    x = draw.standard_normal((11, width), np.float32) * 3 + 2
    scale, shift = draw.standard_normal((2, width), np.float32)
    weight = np.eye(width, dtype=np.float32)  # so that what is seen is the norm, rounded
    got, _ = linear(kind, x, weight, norm=(scale, shift), activation=activation)
    wide = x.astype(np.float64)
    mean, variance = wide.mean(axis=1, keepdims=True), wide.var(axis=1, keepdims=True)
    normal = (wide - mean) / np.sqrt(variance + 1e-5) * scale + shift
    reach = np.maximum(normal.max(axis=1), 0) - np.minimum(normal.min(axis=1), 0)
    tolerance = reach[:, None] / 255 if kind == "Int8" else np.abs(normal) / 128
    assert (np.abs(got - activated(normal, activation)) <= 1.2 * tolerance + 1e-4).all()


def test_rows_that_are_not_finite_are_not_numbers_and_change_no_other(kind):
    draw = np.random.default_rng(0)
    x, weight = draw.standard_normal((9, 40), np.float32), draw.standard_normal((40, 70), np.float32)
    expected, _ = linear(kind, x, weight)
    broken = x.copy()
    broken[2, 5], broken[4, 39], broken[6, 0] = np.nan, np.inf, -np.inf
    got, _ = linear(kind, broken, weight)
    assert not np.isfinite(got[[2, 4, 6]]).any()
    whole = [0, 1, 3, 5, 7, 8]
    np.testing.assert_array_equal(got[whole], expected[whole])


def test_zeros_and_tiny_and_huge_numbers_are_multiplied(kind):
    x = np.array([[0.0] * 8, [1e-30] * 8, [1e20] * 8, [-1e20, 1e20] * 4], np.float32)
    weight = np.ones((8, 20), np.float32)
    got, _ = linear(kind, x, weight)
    step = 2e20 / 255  # bfloat16 has 8 bits; int8 may be one step off at both ends of a row's range
    for row, tolerance in enumerate((0, 1e-19, 8e20 / 256, 8 * step)):
        np.testing.assert_allclose(got[row], x[row].sum(), atol=tolerance, rtol=0)


def test_the_columns_of_a_packed_weight_are_unpacked(kind):
    draw = np.random.default_rng(3)
    weight = draw.standard_normal((10, 37), np.float32)
    ids = np.array([0, 36, 15, 16, 16, 31], np.int64)
    if kind == "Int8":
        values = np.round(weight * 30).astype(np.int8)
        constants = {"weight": pack(values, 4), "scales": np.linspace(1, 2, 37, dtype=np.float32)}
        expected = (values * constants["scales"]).T[ids]
        names = ["ids", "weight", "scales"]
    else:
        values = weight.astype(ml_dtypes.bfloat16)
        constants, names = {"weight": pack(values, 2)}, ["ids", "weight", ""]
        expected = values.astype(np.float32).T[ids]
    node = helper.make_node(f"Unpack{kind}", names, ["y"], domain=DOMAIN, width=10)
    session = session_of(node, {"ids": ids}, constants)
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], expected)
    for wrong in (-1, 48, 2**40):
        with pytest.raises(Exception, match="a token is not in the vocabulary"):
            session.run(None, {"ids": np.array([0, wrong], np.int64)})


class Attention:
    """Groups of rows with tokens on prefixes of mixed lengths, in the kernel's layout and in numpy's."""

    def __init__(self, *, size=8, prefixes=(20, 0, 3), rows=2, counts=(3, 1), seed=0, columns=48, queries=None):
        self.draw = np.random.default_rng(seed)
        self.size, self.rows, self.columns, groups = size, rows, columns, len(prefixes)
        self.prefixes = np.array(prefixes, np.int64)
        places = [(group, row) for group in range(groups) for row in range(rows)]
        lengths = [counts[index % len(counts)] for index in range(len(places))]
        self.starts = self.draw.integers(0, columns - max(lengths), (groups, rows))
        before = [int(self.draw.integers(0, columns - max(lengths) - self.starts[place] + 1)) for place in places]
        tokens = np.cumsum([0, *lengths])
        self.segments = np.array(
            [
                [*place, tokens[index], lengths[index], self.starts[place] + before[index]]
                for index, place in enumerate(places)
            ],
            np.int64,
        )
        width = -(-max(prefixes) // 16) * 16
        self.qkv = self.normal(tokens[-1], 3 * HEADS * size)
        self.prefix_keys, self.prefix_values = self.normal(2, groups, HEADS, 1, width, size)
        self.keys, self.values = self.normal(2, groups, HEADS, rows, columns, size)
        # What no token attends to may be anything.
        for group, length in enumerate(prefixes):
            self.prefix_values[group, :, :, length:] = np.nan
            for row in range(rows):
                self.values[group, :, row, : self.starts[group, row]] = np.nan
        self.outputs = None if queries is None else np.array(queries, np.int64)

    def normal(self, *shape):
        return self.draw.standard_normal(shape, np.float32)

    def inputs(self):
        def packed(keys):
            *outer, columns, size = keys.shape
            return np.ascontiguousarray(keys.reshape(*outer, columns // 16, 16, size).swapaxes(-1, -2)).reshape(
                keys.shape
            )

        query = self.qkv if self.outputs is None else self.qkv[self.outputs]
        named = {
            "query": np.ascontiguousarray(query),
            "key_value": self.qkv,
            "segments": self.segments,
            "prefix_lengths": self.prefixes,
            "suffix_starts": self.starts,
            "prefix_keys": packed(self.prefix_keys),
            "prefix_values": self.prefix_values,
            "keys": packed(self.keys),
            "values": self.values,
        }
        return named if self.outputs is None else named | {"outputs": self.outputs}

    def node(self):
        attributes = {"key_offset": HEADS * self.size, "scale": float(self.size**-0.5)}
        names = ["context", "new_keys", "new_values"]
        return helper.make_node("SharedAttention", list(self.inputs()), names, domain=DOMAIN, **attributes)

    def run(self, **changes):
        inputs = self.inputs() | changes
        return session_of(self.node(), inputs).run(None, inputs)[0]

    def expected(self):
        parts = self.qkv.astype(np.float64).reshape(len(self.qkv), 3, HEADS, self.size)
        found = np.zeros((len(self.qkv), HEADS, self.size))
        for group, row, token, count, column in self.segments.tolist():
            length, start = self.prefixes[group], self.starts[group, row]
            for head in range(HEADS):
                keys, values = self.keys[group, head, row].copy(), self.values[group, head, row].copy()
                keys[column : column + count] = parts[token : token + count, 1, head]
                values[column : column + count] = parts[token : token + count, 2, head]
                for number in range(count):
                    own = slice(start, column + number + 1)
                    all_keys = np.concatenate([self.prefix_keys[group, head, 0, :length], keys[own]])
                    all_values = np.concatenate([self.prefix_values[group, head, 0, :length], values[own]])
                    scores = all_keys @ parts[token + number, 0, head] * self.size**-0.5
                    weights = np.exp(scores - scores.max())
                    found[token + number, head] = weights @ all_values / weights.sum()
        found = found.reshape(len(self.qkv), -1)
        return found if self.outputs is None else found[self.outputs]


@pytest.mark.parametrize("size", [8, 16, 24, 40, 64, 80, 128])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"rows": 1, "counts": (1,)},
        {"rows": 9, "counts": (1,)},
        {"rows": 5, "counts": (1, 7, 1, 1, 14)},
        {"prefixes": (0,), "rows": 1, "counts": (47,)},
        {"prefixes": (0, 0), "rows": 3, "counts": (1,)},
        {"prefixes": (1, 15, 16, 17, 63, 64, 65), "rows": 2, "counts": (5, 6)},
        {"prefixes": (1023,), "rows": 7, "counts": (1, 2)},
        {"prefixes": (31, 32, 33), "rows": 2, "counts": (97, 130), "columns": 160},
        {"prefixes": (40,), "rows": 50, "counts": (1, 2, 3)},
        {"queries": [0, 4, 11]},
    ],
    ids=str,
)
def test_attention_is_numpys_on_any_groups(instruction_set, case, size):
    attention = Attention(size=size, **case)
    np.testing.assert_allclose(attention.run(), attention.expected(), atol=3e-5)


def test_attention_of_a_token_has_the_same_bits_alone(instruction_set):
    attention = Attention(rows=5, counts=(1, 7, 1, 1, 14), prefixes=(33, 0, 20))
    together = attention.run()
    for one in attention.segments[::2]:
        alone = attention.run(segments=one[None])
        rows = slice(one[2], one[2] + one[3])
        np.testing.assert_array_equal(alone[rows], together[rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": [[3, 0, 0, 1, 40]]}, "outside of its cache"),
        ({"segments": [[0, 2, 0, 1, 40]]}, "outside of its cache"),
        ({"segments": [[0, 0, 11, 2, 40]]}, "outside of its cache"),
        ({"segments": [[0, 0, 0, 9, 40]]}, "outside of its cache"),
        ({"segments": [[0, 0, -1, 1, 40]]}, "outside of its cache"),
        ({"segments": [[0, 0, 0, 1]]}, "five columns"),
        ({"suffix_starts": [[48, 0], [0, 0], [0, 0]]}, "begins before its suffix"),
        ({"suffix_starts": [[-1, 0], [0, 0], [0, 0]]}, "begins before its suffix"),
        ({"prefix_lengths": [33, 0, 0]}, "longer than its cache"),
        ({"prefix_lengths": [-1, 0, 0]}, "longer than its cache"),
        ({"prefix_lengths": [1, 0]}, "do not fit the caches"),
    ],
    ids=str,
)
def test_attention_reads_and_writes_nothing_outside_of_its_caches(instruction_set, changes, message):
    changes = {name: np.array(value, np.int64) for name, value in changes.items()}
    with pytest.raises(Exception, match=message):
        Attention().run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 33}, "does not fit"),
        ({"columns": 0}, "columns is out of range"),
        ({"columns": -16}, "columns is out of range"),
        ({"residual": np.zeros((2, 31), np.float32)}, "the residual"),
        ({"bias": np.zeros(31, np.float32)}, "one number a column"),
        ({"norm": np.zeros((2, 5), np.float32)}, "one number a channel"),
    ],
    ids=str,
)
def test_a_linear_layer_that_contradicts_itself_is_an_error(kind, changes, message):
    x, weight = np.zeros((2, 8), np.float32), np.ones((8, 32), np.float32)
    with pytest.raises(Exception, match=message):
        linear(kind, x, weight, **changes)


def test_a_norm_without_a_shift_and_too_few_scales_are_errors(kind):
    x = np.zeros((2, 8), np.float32)
    weight = pack(np.ones((8, 32), np.int8 if kind == "Int8" else ml_dtypes.bfloat16), 4 if kind == "Int8" else 2)
    constants = {"weight": weight, "scale": np.ones(8, np.float32)}
    names = ["x", "scale", "", "weight"]
    if kind == "Int8":
        constants |= {"scales": np.ones(32, np.float32), "sums": np.zeros(32, np.int32)}
        names += ["scales", "sums"]
    attributes = {"columns": 32, "activation": 0, "epsilon": 1e-5}
    node = helper.make_node(f"Linear{kind}", names, ["y"], domain=DOMAIN, **attributes)
    with pytest.raises(Exception, match="a scale and a shift"):
        session_of(node, {"x": x}, constants).run(None, {"x": x})
    ids = np.array([20], np.int64)
    node = helper.make_node(f"Unpack{kind}", ["ids", "weight", "few"], ["y"], domain=DOMAIN, width=8)
    session = session_of(node, {"ids": ids}, {"weight": weight, "few": np.ones(20, np.float32)})
    with pytest.raises(Exception, match="not in the vocabulary"):
        session.run(None, {"ids": ids})
    node = helper.make_node(f"Unpack{kind}", ["ids", "weight", "few"], ["y"], domain=DOMAIN, width=8)
    narrow = np.ascontiguousarray(weight[:, :, :1])
    session = session_of(node, {"ids": ids}, {"weight": narrow, "few": np.ones(20, np.float32)})
    with pytest.raises(Exception, match="does not fit its width"):
        session.run(None, {"ids": ids})


def test_kernels_without_bfloat16_refuse_it(instruction_set):
    if instruction_set in LIBRARY.bfloat16:
        pytest.skip(f"{instruction_set} multiplies in bfloat16")
    with pytest.raises(Exception, match="do not multiply in bfloat16"):
        linear("BFloat16", np.zeros((2, 8), np.float32), np.ones((8, 32), np.float32))


def test_a_session_without_the_library_refuses_its_operators(tmp_path):
    attention = Attention()
    inputs = attention.inputs()
    script = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in attention.node().output]
    graph = helper.make_graph([attention.node()], "one", values, outputs)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), tmp_path / "one.onnx")
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "one.onnx"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, "SharedAttention" in found.stderr) == (1, True)
