"""The files of a checkpoint: shards, links and pickles, checked before they are opened; without PyTorch."""

from __future__ import annotations

import os
import shutil

import pytest
from checkpoint_folder import (
    SETTINGS,
    accepted,
    refusal,
    save_file,
    shard,
    tensors,
    write_index,
)

from qa_onnx.checkpoint import load_checkpoint
from qa_onnx.checkpoint.files import file_in
from qa_onnx.checkpoint.tokenizer import read_tokenizer
from qa_onnx.errors import InvalidInputError


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
