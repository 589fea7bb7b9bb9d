"""A GPT-2 checkpoint is checked before it is loaded: what is refused, and why, without PyTorch."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import fields

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qa_onnx.checkpoint import STARTER_DIRECTORY, load_checkpoint
from qa_onnx.checkpoint.files import file_in
from qa_onnx.checkpoint.settings import ModelSettings, read_settings
from qa_onnx.checkpoint.tokenizer import read_tokenizer
from qa_onnx.checkpoint.weights import check_weights, weight_files
from qa_onnx.errors import InvalidInputError
from qa_onnx.text.constraint import check_byte_level

safetensors = pytest.importorskip("safetensors.numpy", reason="comes with the extras train and export")
load_file, save_file = safetensors.load_file, safetensors.save_file
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 8192,
    "n_positions": 32,
    "n_embd": 4,
    "n_layer": 2,
    "n_head": 2,
}
SETTINGS = ModelSettings(vocab_size=8192, n_positions=32, n_embd=4, n_layer=2, n_head=2)


def tensors():
    return {f"transformer.{name}": np.ones(shape, np.float32) for name, shape in SETTINGS.shapes().items()}


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint, with a tokenizer of 8,192 tokens."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STARTER_DIRECTORY / name, path)
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def refusal(folder):
    """The one line that says why a checkpoint is not loaded."""
    with pytest.raises(InvalidInputError) as refused:
        load_checkpoint(folder)
    message = str(refused.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 900
    return message


def accepted(folder):
    """The names that the weights of a checkpoint have in their files, by their names in the model."""
    return {name: stored for name, (_, stored) in check_weights(weight_files(folder), read_settings(folder)).items()}


# -- weights that do not fit ---------------------------------------------------------------------------------------


def renamed(old, new):
    return lambda found: {name.replace(old, new, 1): tensor for name, tensor in found.items()}


def without(*parts):
    return lambda found: {name: tensor for name, tensor in found.items() if not any(part in name for part in parts)}


def having(name, shape=(4, 4), dtype=np.float32):
    return lambda found: {**found, name: np.zeros(shape, dtype)}


@pytest.mark.parametrize(
    ("change", "config", "messages"),
    [
        (renamed("", "_orig_mod."), {}, ["28 missing: wte.weight", "28 unknown", "All names begin with '_orig_mod.'"]),
        (renamed("", "module."), {}, ["All names begin with 'module.'", "take the prefix off the names"]),
        (renamed("transformer.", "model."), {}, ["All names begin with 'model.'"]),
        (renamed("", "base_model.model."), {}, ["All names begin with 'base_model.model.'"]),
        (renamed("transformer.h.", "transformer.layers."), {}, ["24 missing: transformer.h.0.", "24 unknown"]),
        (renamed("transformer.h.0", "h.0"), {}, ["12 missing: transformer.h.0.", "12 unknown: h.0.attn"]),
        (renamed("c_fc", "fc_in"), {}, ["4 missing: transformer.h.0.mlp.c_fc", "4 unknown: transformer.h.0.mlp.fc_in"]),
        (without("c_proj.weight"), {}, ["4 missing: transformer.h.0.attn.c_proj.weight"]),
        (without("wte", "wpe", ".h."), {}, ["26 missing: transformer.wte.weight"]),
        (without(".ln_f."), {}, ["2 missing: transformer.ln_f.weight, transformer.ln_f.bias."]),
        (without("."), {}, ["28 missing"]),
        (without(), {"n_layer": 3}, ["12 missing: transformer.h.2.attn.c_attn.weight"]),
        (without(), {"n_layer": 1}, ["12 unknown: transformer.h.1."]),
        (without(), {"n_layer": 0}, ["n_layer 0; expected a whole number from 1 to"]),
        (without(), {"n_layer": -1}, ["n_layer -1; expected a whole number from 1 to"]),
        (without(), {"n_positions": 64}, ["1 of another shape: transformer.wpe.weight [32, 4] instead of [64, 4]"]),
        (without(), {"vocab_size": 9000}, ["transformer.wte.weight [8192, 4] instead of [9000, 4]"]),
        (without(), {"n_embd": 8}, ["28 of another shape"]),
        (without(), {"n_inner": 12}, ["transformer.h.0.mlp.c_fc.weight [4, 16] instead of [4, 12]"]),
        (having("transformer.h.0.attn.c_attn.weight", (12, 4)), {}, ["[12, 4] instead of [4, 12]"]),
        (having("transformer.h.0.ln_1.bias", (4,), np.int8), {}, ["1 no floating-point numbers", "ln_1.bias I8"]),
        (having("transformer.h.0.attn.q.weight"), {}, ["1 unknown: transformer.h.0.attn.q.weight"]),
        (having("transformer.h.2.attn.bias"), {}, ["1 unknown: transformer.h.2.attn.bias"]),  # of no layer
        (having("lm_head.weight"), {}, ["lm_head.weight [4, 4] instead of [8192, 4]"]),
        (having("lm_head.bias"), {}, ["1 unknown: lm_head.bias"]),
        (without(), {"tie_word_embeddings": False}, ["1 missing: lm_head.weight"]),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(folder, change, config, messages):
    change_config(folder, **config)
    save_file(change(tensors()), folder / "model.safetensors")
    message = refusal(folder)
    for part in messages:
        assert part in message


@pytest.mark.parametrize(
    "change",
    [
        without(),
        renamed("transformer.", ""),  # as `gpt2` is stored on the hub
        having("lm_head.weight", (8192, 4)),
        having("transformer.h.0.attn.bias", (1, 1, 32, 32), np.uint8),
        having("transformer.h.1.attn.masked_bias", ()),
        lambda found: having("h.1.attn.bias", (1, 1, 32, 32))(renamed("transformer.", "")(found)),
        lambda found: {name: tensor.astype(np.float16) for name, tensor in found.items()},
        lambda found: {name: tensor.astype(np.float64) for name, tensor in found.items()},
    ],
)
def test_weights_that_fit_are_found_by_their_names(folder, change):
    stored = change(tensors())
    save_file(stored, folder / "model.safetensors")
    found = accepted(folder)
    assert found.keys() - {"lm_head.weight"} == SETTINGS.shapes().keys()
    assert set(found.values()) == {name for name in stored if not name.endswith((".attn.bias", "masked_bias"))}


@pytest.mark.parametrize(
    ("name", "shape", "model"),
    [
        ("qa_outputs.weight", (2, 4), "GPT2ForQuestionAnswering"),
        ("multiple_choice_head.summary.weight", (1, 4), "GPT2DoubleHeadsModel"),
        ("score.weight", (2, 4), "GPT2ForSequenceClassification"),
        ("classifier.weight", (2, 4), "GPT2ForTokenClassification"),
        ("v_head.summary.weight", (1, 4), "value head"),
    ],
)
def test_a_head_that_would_be_lost_is_refused(folder, name, shape, model):
    save_file(having(name, shape)(tensors()), folder / "model.safetensors")
    message = refusal(folder)
    assert model in message
    assert name in message


@pytest.mark.parametrize(
    "architectures",
    [["GPT2ForQuestionAnswering"], ["GPT2DoubleHeadsModel"], ["GPT2LMHeadModel", "MyGPT2"], "GPT2LMHeadModel", [3]],
)
def test_architectures_of_another_function_are_refused(folder, architectures):
    change_config(folder, architectures=architectures)
    assert "head or code would be lost; expected 'GPT2LMHeadModel'" in refusal(folder)


@pytest.mark.parametrize("architectures", [None, [], ["GPT2LMHeadModel"], ["GPT2Model"]])
def test_a_language_model_may_leave_its_architecture_out(folder, architectures):
    change_config(folder, architectures=architectures)
    assert read_settings(folder) == SETTINGS


# -- config.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "it is a 'llama' model; expected a GPT-2"),
        ({"model_type": None}, "it is a None model"),
        ({"vocab_size": "8192"}, "vocab_size '8192'; expected a whole number"),
        ({"n_layer": 2.0}, "n_layer 2.0; expected a whole number"),
        ({"n_layer": True}, "n_layer True; expected a whole number"),
        ({"n_layer": 5000}, "n_layer 5000; expected at most 1000"),
        ({"n_layer": 2**40}, "n_layer 1099511627776"),
        ({"n_layer": [2]}, "n_layer [2]"),
        ({"n_head": 3}, "n_head 3; expected a divisor of n_embd, 4"),
        ({"n_head": 0}, "n_head 0"),
        ({"n_inner": 0}, "n_inner 0"),
        ({"n_positions": 200_000}, "n_positions 200000; expected fewer"),
        ({"activation_function": "silu"}, "activation_function 'silu'; expected one of gelu_new"),
        ({"activation_function": "gelu_fast"}, "activation_function 'gelu_fast'"),
        ({"activation_function": ["gelu"]}, "activation_function ['gelu']"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon 0; expected a number from"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon -1e-05"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon '1e-5'"),
        ({"attn_pdrop": 1.5}, "attn_pdrop 1.5; expected a number from 0 to 0.99"),
        ({"scale_attn_weights": "false"}, "scale_attn_weights 'false'; expected true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings 0; expected true or false"),
        ({"add_cross_attention": True}, "add_cross_attention: it reads a second text"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: its weights are quantized"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"hidden_size": 8}, "n_embd 4 and hidden_size 8, which mean the same"),
    ],
)
def test_a_config_of_what_is_not_computed_is_refused(folder, changes, message):
    change_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b'["gpt2"]', "config.json holds a list; expected a JSON object"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
        (b" " * (2**20 + 1), "has 1,048,577 bytes; expected at most 1,048,576"),
        (b"{}", "it is a None model"),
        (b'{"model_type": "gpt2"}', "config.json has no n_embd, n_head, n_layer, n_positions, vocab_size"),
        (b'{"model_type": "gpt2", "n_embd": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
    ],
)
def test_a_config_that_is_no_config_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


def test_only_known_fields_are_read_and_common_names_of_them_count(folder):
    acting = {
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "auto_map": {"AutoConfig": "evil.Config"},
        "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
        "_name_or_path": "evil/model",
        "dtype": "float16",
        "n_ctx": 7,
    }
    sizes = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = {name: value for name, value in CONFIG.items() if not name.startswith("n_")} | sizes | acting
    (folder / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    assert read_settings(folder) == SETTINGS
    assert acting.keys() & {field.name for field in fields(ModelSettings)} == set()


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, "sdpa"),
        ({"scale_attn_weights": False}, "eager"),
        ({"scale_attn_by_inverse_layer_idx": True}, "eager"),
        ({"reorder_and_upcast_attn": True}, "eager"),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": False}, "eager"),
    ],
)
def test_the_attention_is_one_that_computes_what_the_config_says(folder, changes, attention):
    change_config(folder, **changes)
    assert read_settings(folder).attention == attention


# -- files ---------------------------------------------------------------------------------------------------------


class _Opened:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def pickled(tmp_path):
    """A pickle that must not be opened."""
    path = tmp_path / "pickle.bin"
    path.write_bytes(pickle.dumps(_Opened(tmp_path / "opened")))
    yield path
    assert not (tmp_path / "opened").exists()


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), *, shared=0):
    """Splits the weights over two files, and writes their index; `shared` tensors are in both."""
    (folder / "model.safetensors").unlink()
    items = list(tensors().items())
    parts = dict(items[: 10 + shared]), dict(items[10:])
    for name, part in zip(names, parts, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(part, path)
    write_index(folder, {name: names[name not in parts[0]] for name, _ in items})


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_by_their_index(folder):
    shard(folder)
    assert accepted(folder).keys() == SETTINGS.shapes().keys()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"wte.weight": "pytorch_model-00001-of-00002.bin"}, "'pytorch_model-00001-of-00002.bin'; expected .safetens"),
        ({"wte.weight": "model.pkl"}, "'model.pkl'; expected .safetensors files only"),
        ({"wte.weight": "../other/model.safetensors"}, "lies outside the model's directory"),
        ({"wte.weight": "{other}/model.safetensors"}, "lies outside the model's directory"),
        ({"wte.weight": "sub/../../other/model.safetensors"}, "lies outside the model's directory"),
        ({"wte.weight": "link.safetensors"}, "lies outside the model's directory"),
        ({"wte.weight": "linked/model.safetensors"}, "lies outside the model's directory"),
        ({"wte.weight": "gone.safetensors"}, "'gone.safetensors', which is not there; copy all of its files"),
        ({"wte.weight": "dangling.safetensors"}, "is a link to a file that is not there"),
        ({"wte.weight": "sub.safetensors"}, "sub.safetensors is not a file"),
        ({"wte.weight": 3}, "has no weight_map of tensors to file names"),
        ({"wte.weight": "a\x00b.safetensors"}, "names 'a\\x00b.safetensors'"),
        ({"wte.weight": "a" * 3000 + ".safetensors"}, "File name too long"),
        ({}, "has no weight_map"),
        (["model.safetensors"], "has no weight_map"),
    ],
)
def test_an_index_of_other_files_is_refused_before_they_are_opened(folder, tmp_path, pickled, weight_map, message):
    (folder / "model.safetensors").unlink()
    other = tmp_path / "other"
    (folder / "sub.safetensors").mkdir()
    (folder / "sub").mkdir()
    other.mkdir()
    save_file(tensors(), other / "model.safetensors")
    (folder / "linked").symlink_to(other)
    (folder / "link.safetensors").symlink_to(other / "model.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    for name in ("pytorch_model-00001-of-00002.bin", "model.pkl"):
        shutil.copy(pickled, folder / name)
    if isinstance(weight_map, dict):
        weight_map = {
            tensor: name.replace("{other}", str(other)) if isinstance(name, str) else name
            for tensor, name in weight_map.items()
        }
    write_index(folder, weight_map)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"])
def test_pickled_weights_are_refused_before_they_are_opened(folder, pickled, name):
    (folder / "model.safetensors").unlink()
    shutil.copy(pickled, folder / name)
    message = refusal(folder)
    assert f"its weights are in {name}, a pickle" in message
    assert "save_pretrained" in message


def test_a_pickle_next_to_the_weights_is_not_looked_at(folder, pickled):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        shutil.copy(pickled, folder / name)
    assert accepted(folder).keys() == SETTINGS.shapes().keys()


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_weights_that_were_cut_short_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


def test_a_pickle_under_the_name_of_weights_is_not_opened(folder, pickled):
    shutil.copy(pickled, folder / "model.safetensors")
    assert "model.safetensors is no whole safetensors file" in refusal(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    shard(folder, shared=2)
    assert "2 in two files: transformer." in refusal(folder)


def hub_cache(folder, blobs):
    """Moves the files to blobs, and links to them, as the hub's cache does."""
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(os.path.relpath(blobs / f"{number:064x}", folder))


@pytest.mark.parametrize(
    ("place", "blobs"),
    [
        ("models--a--b/snapshots/0123", "models--a--b/blobs"),
        ("cache/snapshots/main", "cache/blobs"),
        ("model", "hub/models--a--b/blobs"),  # a download by an older huggingface_hub
    ],
)
def test_files_linked_to_blobs_of_the_hubs_cache_are_read(folder, tmp_path, place, blobs):
    target = tmp_path / "here" / place
    target.parent.mkdir(parents=True)
    folder.rename(target)
    hub_cache(target, tmp_path / "here" / blobs)
    assert accepted(target).keys() == SETTINGS.shapes().keys()
    assert read_tokenizer(target)[1]["eos_token"] == "<|endoftext|>"


def test_files_linked_inside_of_the_directory_are_read(folder):
    """As Kubernetes mounts a volume: files lead through `..data` to the directory of a time."""
    data = folder / "..2026_01_01"
    data.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(data / path.name)
        path.symlink_to(f"..data/{path.name}")
    (folder / "..data").symlink_to(data.name)
    assert accepted(folder).keys() == SETTINGS.shapes().keys()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("place", ["elsewhere/{}", "blobs/{}", "models--a/snapshots/{}"])
def test_a_file_that_lies_elsewhere_is_refused(folder, tmp_path, name, place):
    target = tmp_path / place.format(name)
    target.parent.mkdir(parents=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    assert f"{name} lies outside the model's directory" in refusal(folder)


def test_a_link_to_the_directory_is_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert accepted(tmp_path / "link").keys() == SETTINGS.shapes().keys()
    assert file_in(tmp_path / "link", "nothing.json") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/config.json", "it is a file; expected a directory"),
        ("{folder}/nowhere/at/all", "there is no such directory"),
        ("nowhere-gpt2", "there is no such directory, and the hub gave no model of that name"),
        ("nobody/nowhere-gpt2", "there is no such directory, and the hub gave no model of that name"),
        ("../nowhere", "there is no such directory"),
        ("a" * 5000, "File name too long"),
    ],
)
def test_a_name_of_nothing_is_one_line(folder, name, message):
    with pytest.raises(InvalidInputError, match="no model could be loaded from") as refused:
        load_checkpoint(name.format(folder=folder))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_without_one_of_its_files_names_it(folder, name):
    (folder / name).unlink()
    assert f"{name} is not there" in refusal(folder)


# -- tokenizers ----------------------------------------------------------------------------------------------------

TEXT = ["Context: The Aller is 211 km long.\nQuestion: How long is it?\nAnswer: 211 km"] * 4
SPECIAL = ["<|endoftext|>", "<unk>"]


def trained(model, trainer, *, pre_tokenizer=None, decoder=None, normalizer=None):
    tokenizer = Tokenizer(model)
    for name, step in (("pre_tokenizer", pre_tokenizer), ("decoder", decoder), ("normalizer", normalizer)):
        if step is not None:
            setattr(tokenizer, name, step)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def bpe(alphabet=(), **steps):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, **steps)


BYTES = pre_tokenizers.ByteLevel.alphabet()
BYTE_LEVEL = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
OTHERS = {
    "metaspace": lambda: bpe(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "metaspace with bytes": lambda: bpe(BYTES, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "characters": lambda: bpe(),
    "words apart": lambda: bpe(BYTES, pre_tokenizer=pre_tokenizers.Whitespace(), decoder=decoders.BPEDecoder()),
    "no decoder": lambda: bpe(BYTES, pre_tokenizer=BYTE_LEVEL["pre_tokenizer"]),
    "lower case": lambda: bpe(BYTES, normalizer=normalizers.Lowercase(), **BYTE_LEVEL),
    "stripped": lambda: bpe(BYTES, normalizer=normalizers.Strip(), **BYTE_LEVEL),
    "compatibility": lambda: bpe(BYTES, normalizer=normalizers.NFKC(), **BYTE_LEVEL),
    "without accents": lambda: bpe(
        BYTES, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), **BYTE_LEVEL
    ),
    "not all bytes": lambda: bpe(**BYTE_LEVEL),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
    "unigram of bytes": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=BYTES, show_progress=False
        ),
        **BYTE_LEVEL,
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "words": lambda: trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(folder, kind):
    OTHERS[kind]().save(str(folder / "tokenizer.json"))
    assert "expected a byte-level BPE such as GPT-2's" in refusal(folder)


@pytest.mark.parametrize(
    "steps",
    [
        BYTE_LEVEL,
        {**BYTE_LEVEL, "normalizer": normalizers.NFC()},
        {**BYTE_LEVEL, "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {
            **BYTE_LEVEL,
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        },
    ],
)
def test_byte_level_bpes_of_all_kinds_are_accepted(steps):
    check_byte_level(bpe(BYTES, **steps))


def test_a_folder_from_before_tokenizer_json_has_the_same_tokenizer(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(STARTER_DIRECTORY / name, old)
    (found, options), (expected, _) = read_tokenizer(old), read_tokenizer(STARTER_DIRECTORY)
    text = " Zoë's 7 words,\n<|endoftext|> 東京\t."
    assert found.encode(text).ids == expected.encode(text).ids
    assert found.decode(found.encode(text).ids) == text
    assert options["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"[PAD]": 8192, "<|endoftext|>": 0}, None),
        ({"[SEP]": 8193, "[PAD]": 8192}, None),
        ({"[PAD]": 8200}, "'[PAD]' as token 8200; expected 8192"),
        ({"<|endoftext|>": 8192}, "'<|endoftext|>' as token 8192; expected 0"),
        ({"[PAD]": "8192"}, "expected 8192, the next one"),
        ({"[PAD]": 8192, "[SEP]": None}, "is no tokenizer"),
    ],
)
def test_added_tokens_have_the_ids_that_they_were_trained_with(tmp_path, added, message):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(STARTER_DIRECTORY / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if message is None:
        found, _ = read_tokenizer(tmp_path)
        assert {token: found.token_to_id(token) for token in added} == added
    else:
        with pytest.raises(InvalidInputError) as refused:
            read_tokenizer(tmp_path)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "is no tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "has eos_token 7; expected a string"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "has no </s> among the 8192 tokens of its model"),
        ("special_tokens_map.json", b'{"eos_token": {"content": ["x"]}}', "expected a string"),
    ],
)
def test_a_damaged_tokenizer_is_refused(folder, name, content, message):
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_bytes(content)
    assert message in refusal(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    small = {**CONFIG, "vocab_size": 8191}
    (folder / "config.json").write_text(json.dumps(small))
    save_file({**tensors(), "transformer.wte.weight": np.ones((8191, 4), np.float32)}, folder / "model.safetensors")
    assert "has 8192 tokens and its model embeds 8191; expected at most as many" in refusal(folder)


@pytest.mark.parametrize("positions", [1, 4, 12])
def test_a_model_without_positions_for_any_prompt_is_refused(folder, positions):
    change_config(folder, n_positions=positions)
    save_file(
        {**tensors(), "transformer.wpe.weight": np.ones((positions, 4), np.float32)}, folder / "model.safetensors"
    )
    assert f"has {positions} positions, and its tokenizer makes 12 tokens of the shortest prompt" in refusal(folder)


# -- adapters ------------------------------------------------------------------------------------------------------

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../model", "bias": "none"}


@pytest.fixture
def adapter(folder):
    path = folder.parent / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    names = [f"base_model.model.transformer.h.0.attn.c_attn.lora_{part}.weight" for part in "AB"]
    save_file({names[0]: np.ones((2, 4), np.float32), names[1]: np.ones((12, 2), np.float32)}, path / ADAPTER)
    return path


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "a LoRA adapter that names no base. Merge it with peft's merge_and_unload"),
        ({"base_model_name_or_path": ""}, "names no base"),
        ({"base_model_name_or_path": ["x"]}, "names no base"),
        ({"base_model_name_or_path": "../gone"}, "whose base '../gone' cannot be found"),
        ({"base_model_name_or_path": "nobody/nowhere-gpt2"}, "whose base 'nobody/nowhere-gpt2' cannot be found"),
        ({"base_model_name_or_path": "a" * 5000}, "File name too long"),
        ({"base_model_name_or_path": "."}, "whose base '.' is an adapter itself"),
        ({"peft_type": "IA3"}, "a PEFT adapter of type 'IA3'; expected 'LORA'. Merge it with peft"),
        ({"peft_type": None}, "a PEFT adapter of type None"),
        ({"use_dora": True}, "the adapter uses use_dora; expected plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "the adapter uses modules_to_save"),
        ({"bias": "all"}, "the adapter uses bias"),
        ({"init_lora_weights": "pissa"}, "the adapter uses init_lora_weights"),
        ({"rank_pattern": {"c_attn": 3}}, "the adapter uses rank_pattern"),
        ({"some_new_field": 1}, "the adapter uses some_new_field"),
        ({"r": 0}, "r 0; expected a whole number of at least 1"),
        ({"r": "2"}, "r '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan; expected a number"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_how(adapter, changes, message):
    (adapter / "adapter_config.json").write_text(json.dumps({**LORA, **changes}))
    assert message in refusal(adapter)


def test_a_pickled_adapter_is_refused_before_it_is_opened(adapter, pickled):
    (adapter / ADAPTER).unlink()
    shutil.copy(pickled, adapter / "adapter_model.bin")
    assert "its weights are in adapter_model.bin, a pickle" in refusal(adapter)


def test_an_adapter_next_to_a_whole_model_is_refused(adapter, folder):
    shutil.copy(folder / "model.safetensors", adapter)
    assert "holds a whole model and an adapter" in refusal(adapter)


def test_the_base_of_an_adapter_is_checked_as_any_model(adapter, folder):
    save_file(renamed("", "module.")(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert "All names begin with 'module.'" in refusal(adapter)
