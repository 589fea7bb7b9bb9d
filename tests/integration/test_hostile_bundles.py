"""Bundles whose parts were altered, with checksums that fit: each is refused as it is loaded, in one line."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from export.gpt2 import ACTIVATIONS
from export.to_onnx import export
from qa_onnx import Answerer, BundleError, EngineConfig, EngineError, GenerationConfig
from qa_onnx.bundle import Bundle
from qa_onnx.graph_file import OPERATORS
from qa_onnx.manifest import MANIFEST_NAME, sha256_of
from tests.conftest import ROOT
from tests.kernels import needs_kernels

CONTEXT = "The bridge was opened in 1803. " * 20


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def int8_bundle(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "bundle"
    export(str(tiny_model_dir), path, precision="int8")
    return path


def fit_checksums(bundle, **changes):
    """Changes the manifest, and its sizes and checksums to those of the files, as an attacker would."""
    path = bundle / MANIFEST_NAME
    manifest = json.loads(path.read_text(encoding="utf-8")) | changes
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def problem_of(bundle, *, kernels="auto"):
    with pytest.raises(BundleError) as caught:
        Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(kernels=kernels))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 2, "head_size": 16},
        {"heads": 3},
        {"head_size": 9},
        {"layers": 1},
        {"layers": 3},
        {"layers": 1000},
        {"max_positions": 255},
        {"max_positions": 2**20},
        {"vocab_size": 599},
        {"vocab_size": 601},
        {"vocab_size": 2**24},
        {"eos_token_id": 1},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_graph_and_configuration_is_refused(bundle, changes, monkeypatch):
    fit_checksums(bundle, **changes)
    monkeypatch.setattr("qa_onnx.loading.resolve_provider", lambda *_: "cpu")  # so that fp16 is loaded, too
    assert "contradicts itself: " in problem_of(bundle)


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", 3), ("n_embd", "32"), ("n_head", None), ("model_type", "bert")]
)
def test_a_configuration_that_contradicts_the_manifest_is_refused(bundle, name, value):
    path = bundle / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")
    fit_checksums(bundle)
    assert f"config.json has {name} {value!r}" in problem_of(bundle)


def alter_graph(bundle, alter, name="model.onnx"):
    model = onnx.load(bundle / name, load_external_data=False)
    alter(model.graph)
    (bundle / name).write_bytes(model.SerializeToString())
    fit_checksums(bundle)


def initializer(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def set_location(tensor, location):
    next(pair for pair in tensor.external_data if pair.key == "location").value = location


@pytest.mark.parametrize("location", ["unlisted", "../outside", "/etc/hostname", "sub/x", "", "model.onnx_data\x00"])
def test_external_data_that_the_manifest_does_not_list_is_refused(bundle, location):
    for path in (bundle / "unlisted", bundle.parent / "outside"):
        path.write_bytes((bundle / "model.onnx_data").read_bytes())
    alter_graph(bundle, lambda graph: set_location(initializer(graph, "wte.weight"), location))
    assert "which a graph reads, is not listed in the manifest" in problem_of(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_link_of_one_of_graph_and_weights_to_elsewhere_is_refused_with_the_reason(bundle, name):
    (bundle.parent / "elsewhere").mkdir()
    (bundle / name).rename(bundle.parent / "elsewhere" / name)
    (bundle / name).symlink_to(f"../elsewhere/{name}")
    assert "model.onnx and model.onnx_data are links to different directories" in problem_of(bundle)


def test_links_of_graph_and_weights_to_one_directory_are_followed(bundle):
    for layout in ("blobs", "..data"):
        (bundle.parent / layout).mkdir()
        for path in [path for path in bundle.iterdir() if path.name != layout]:
            shutil.move(path.resolve(), bundle.parent / layout / path.name)
            path.unlink(missing_ok=True)
            path.symlink_to(f"../{layout}/{path.name}")
        with Answerer.from_pretrained(bundle, provider="cpu") as answerer:
            assert answerer.answer("When?", CONTEXT, max_new_tokens=4).new_tokens


IN_OPEN, IN_NONBLOCK = 0x20, 0x800
"""Of Linux's inotify(7)."""


@contextmanager
def opened_in(directory):
    """Gives a set that has the names of the files of a directory that were opened in the block, by whatever library."""
    names, libc = set(), ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(IN_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(directory), IN_OPEN) > 0
    try:
        yield names
        events = os.read(watch, 2**16)
        while events:  # int wd; uint32_t mask, cookie, len; char name[len]
            length = int.from_bytes(events[12:16], sys.byteorder)
            names.add(events[16 : 16 + length].rstrip(b"\0").decode())
            events = events[16 + length :]
    finally:
        os.close(watch)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's inotify")
def test_no_file_is_opened_that_the_manifest_does_not_list(bundle):
    for name in (
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
        *("generation_config.json", "adapter_config.json", "model.onnx.data", "pytorch_model.bin", "modeling.py"),
    ):
        (bundle / name).write_bytes((bundle / "config.json").read_bytes())
    with opened_in(bundle) as names, Answerer.from_pretrained(bundle, provider="cpu") as answerer:
        answerer.answer("When?", CONTEXT, config=GenerationConfig(max_new_tokens=4, extractive=True))
    assert names - {""} == {MANIFEST_NAME, *answerer.manifest.files}


def rename_first(values):
    values[0].name = "renamed"


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda graph: graph.node.append(helper.make_node("Loop", ["x"], ["y"])), "it has a node 'Loop'"),
        (lambda graph: graph.initializer.remove(initializer(graph, "wpe.weight")), "wpe.weight in {name} is None"),
        (lambda graph: initializer(graph, "wte.weight").dims.append(1), "wte.weight in {name} is (600, 32, 1)"),
        (lambda graph: initializer(graph, "wpe.weight").dims.__setitem__(0, 10**12), "wpe.weight in {name} is (10"),
        (
            lambda graph: initializer(graph, "eos_token_id").CopyFrom(
                numpy_helper.from_array(np.array([7]), "eos_token_id")
            ),
            "another eos_token_id than the manifest's",
        ),
        (lambda graph: graph.output.pop(), "{name} output present.1.value is missing"),
        (lambda graph: graph.output.insert(0, graph.output.pop()), "{name} outputs are in another order"),
    ],
    ids=["loop", "no positions", "rank", "huge", "end of text", "no output", "order"],
)
@pytest.mark.parametrize("name", ["model.onnx", "model.kernels.onnx"])
def test_an_altered_graph_is_refused(bundle, name, alter, words):
    if name == "model.kernels.onnx":
        needs_kernels()
    alter_graph(bundle, alter, name)
    assert words.format(name=name) in problem_of(bundle, kernels="off" if name == "model.onnx" else "required")


KERNEL_ATTRIBUTES = {
    "columns": [0, -1, 1, 97, 2**31, 2**63 - 1, -(2**63)],
    "activation": [-1, 99],
    "epsilon": [-1.0, float("nan")],
    "key_offset": [-1, -(2**63), 33, 2**62],
    "scale": [0.0, float("nan")],
    "width": [0, -4, 31, 33, 2**62],
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_kernels_with_attributes_that_contradict_the_graph_end_in_an_error_or_an_answer(
    bundle, int8_bundle, tmp_path, precision
):
    """In a process of its own: what they read and write outside of their arrays would end it."""
    needs_kernels()
    bundle = bundle if precision == "fp32" else shutil.copytree(int8_bundle, tmp_path / "int8")
    path = bundle / "model.kernels.onnx"
    whole, tried = path.read_bytes(), 0
    for name, values in KERNEL_ATTRIBUTES.items():
        for value in values:
            model = onnx.load_from_string(whole)
            changed = 0
            for node in model.graph.node:
                for attribute in node.attribute:
                    if node.domain == "qa_onnx" and attribute.name == name:
                        attribute.CopyFrom(helper.make_attribute(name, value))
                        changed += 1
            if not changed:
                continue
            path.write_bytes(model.SerializeToString())
            fit_checksums(bundle)
            found = subprocess.run(
                [sys.executable, "-c", ANSWER, str(bundle)], capture_output=True, text=True, check=False, cwd=ROOT
            )
            assert found.returncode == 0, (name, value, found.stderr[-2000:])
            tried += 1
    assert tried >= 6


ANSWER = """
import sys
from qa_onnx import Answerer, EngineConfig, QAOnnxError
try:
    with Answerer.from_pretrained(sys.argv[1], provider="cpu", config=EngineConfig(kernels="required")) as answerer:
        answerer.answer_batch(["Who?", "When was it?"], ["Rollo led the Normans.", "It was in 1803. " * 9])
except QAOnnxError as error:
    print(error)
"""


def test_an_altered_copy_graph_is_refused(bundle):
    model = onnx.load(bundle / "cache_copy.onnx")
    for value in (*model.graph.input[1:], *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 16
    (bundle / "cache_copy.onnx").write_bytes(model.SerializeToString())
    fit_checksums(bundle)
    assert "cache_copy.onnx input source.0.key is float32[A, 16], the manifest says float32[A, 128]" in problem_of(
        bundle
    )


@pytest.mark.parametrize("name", ["model.onnx", "cache_copy.onnx", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x00" * 100, b"\xff\xfe"], ids=["empty", "object", "zeros", "no text"]
)
def test_a_file_of_something_else_is_refused(bundle, name, content):
    (bundle / name).write_bytes(content)
    fit_checksums(bundle)
    assert name in problem_of(bundle)


def alter_tokenizer(bundle, alter):
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    alter(tokenizer)
    tokenizer.save(str(bundle / "tokenizer.json"))
    fit_checksums(bundle)


SLOW = Regex("(a+)+$")


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (
            lambda made: made.add_tokens(["one more"]),
            "has a token 600; the manifest says that the model has 600 tokens",
        ),
        (
            lambda made: setattr(made, "model", models.WordLevel({"a": 1})),
            "has no token 0, the manifest's eos_token_id",
        ),
        (lambda made: setattr(made, "normalizer", normalizers.Replace(SLOW, "b")), "has the step Replace"),
        (lambda made: setattr(made, "normalizer", normalizers.Replace("a", "b" * 10**6)), "has the step Replace"),
        (lambda made: setattr(made, "normalizer", normalizers.Prepend("x" * 10**6)), "has the step Prepend"),
        (
            lambda made: setattr(
                made, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("x")])
            ),
            "has the step Prepend",
        ),
        (lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Split(SLOW, "isolated")), "splits by '(a+)+$'"),
        (
            lambda made: setattr(
                made,
                "pre_tokenizer",
                pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("(x|y){2,}"), "isolated"), made.pre_tokenizer]),
            ),
            "splits by '(x|y){2,}'",
        ),
        (lambda made: setattr(made, "decoder", decoders.Replace("a", "b")), "has the step Replace"),
    ],
)
def test_an_altered_tokenizer_is_refused(bundle, alter, words):
    alter_tokenizer(bundle, alter)
    assert words in problem_of(bundle)


def test_a_tokenizer_of_unusual_and_harmless_steps_is_taken(bundle):
    def alter(made):
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        llama = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(llama), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )

    alter_tokenizer(bundle, alter)
    with Answerer.from_pretrained(bundle, provider="cpu") as answerer:
        assert answerer.answer("When?", CONTEXT, max_new_tokens=4).new_tokens


def test_a_tokenizer_that_is_too_large_is_refused(bundle, monkeypatch):
    monkeypatch.setattr("qa_onnx.bundle.MAX_TOKENIZER_BYTES", 1000)
    assert "tokenizer.json has" in problem_of(bundle)


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight", "wpe.weight"])
def test_weights_that_are_no_numbers_fail_the_request(bundle, name, damage):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    place = {pair.key: pair.value for pair in initializer(model.graph, name).external_data}
    with (bundle / "model.onnx_data").open("r+b") as file:
        file.seek(int(place.get("offset", 0)))
        file.write(np.full(int(place["length"]) // 4, damage, np.float32).tobytes())
    fit_checksums(bundle)
    with Answerer.from_pretrained(bundle, provider="cpu") as answerer:
        for extractive in (False, True):
            config = answerer._requests.resolve(None, 4)
            future = answerer.submit("When?", CONTEXT, config=type(config)(max_new_tokens=4, extractive=extractive))
            error = future.exception()
            assert isinstance(error, EngineError)
            assert "log-probabilities are not numbers" in str(error)


def test_what_the_export_writes_uses_known_operators_only(tiny_bundle):
    Bundle.open(tiny_bundle).check_files()
    assert {f"{one.domain}.{one.op_type}".lstrip(".") for one in ACTIVATIONS.values()} <= OPERATORS
