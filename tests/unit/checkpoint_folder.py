"""A checkpoint directory for tests, and what the loader says about it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from qa_onnx.checkpoint import STARTER_DIRECTORY, load_checkpoint
from qa_onnx.checkpoint.settings import ModelSettings, read_settings
from qa_onnx.checkpoint.weights import check_weights, weight_files
from qa_onnx.errors import InvalidInputError

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


def make_folder(path):
    """A complete checkpoint, with a tokenizer of 8,192 tokens."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STARTER_DIRECTORY / name, path)
    return path


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


def renamed(old, new):
    return lambda found: {name.replace(old, new, 1): tensor for name, tensor in found.items()}


def without(*parts):
    return lambda found: {name: tensor for name, tensor in found.items() if not any(part in name for part in parts)}


def having(name, shape=(4, 4), dtype=np.float32):
    return lambda found: {**found, name: np.zeros(shape, dtype)}
