"""Checkpoints of a training: verified by content, locked, and never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import Killed, die, flip, has_equal_weights, run_finetune, steps_of, without_plots

from qa_onnx.lock import folder_lock
from training import checkpoints, finetune, trainer
from training.checkpoints import CHECKSUMS_NAME, complete_checkpoints
from training.run_directory import LOCK_NAME
from training.starter.pretrain import list_paragraphs
from training.starter.sample import generate


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


DAMAGES = {
    "optimizer.pt is damaged": lambda path: flip(path / "optimizer.pt"),
    "model.safetensors is damaged": lambda path: flip(path / "model.safetensors"),
    "scheduler.pt is damaged": lambda path: (path / "scheduler.pt").write_bytes(b""),
    "rng_state.pth is missing": lambda path: (path / "rng_state.pth").unlink(),
    "config.json is damaged": lambda path: flip(path / "config.json", 10),
    "trainer_state.json is damaged": lambda path: shutil.copy(
        path.with_name("checkpoint-4") / "trainer_state.json", path
    ),
    "pytorch_model.bin is not of this checkpoint": lambda path: (path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem"
    ),
    f"{CHECKSUMS_NAME}: cannot be read": lambda path: (path / CHECKSUMS_NAME).unlink(),
    f"{CHECKSUMS_NAME} is damaged; expected JSON": lambda path: (path / CHECKSUMS_NAME).write_text('{"a"'),
    f"{CHECKSUMS_NAME} is damaged; expected a JSON object": lambda path: (path / CHECKSUMS_NAME).write_text("[]"),
    "expected JSON": lambda path: (path / CHECKSUMS_NAME).write_text("[" * 100_000),
    "is not UTF-8": lambda path: (path / CHECKSUMS_NAME).write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_kind_leaves_a_checkpoint_out_and_is_named(output, damage):
    DAMAGES[damage](output / "checkpoint-6")
    good, damages = complete_checkpoints(output)
    assert [path.name for path in good] == ["checkpoint-2", "checkpoint-4"]
    assert len(damages) == 1
    assert damages[0].startswith(f"{output / 'checkpoint-6'} cannot be used: ")
    assert damage in damages[0]


def test_a_checkpoint_whose_best_weights_are_damaged_is_left_out(output):
    flip(output / "best-4" / "model.safetensors")
    good, damages = complete_checkpoints(output)
    assert [path.name for path in good] == ["checkpoint-2"]
    assert all("best-4/model.safetensors is damaged" in damage for damage in damages)
    shutil.rmtree(output / "best-0")
    assert complete_checkpoints(output)[0] == []


def test_a_copy_under_another_name_is_no_checkpoint(output):
    for name in ("checkpoint-6-copy", "checkpoint-", "checkpoint-x"):
        shutil.copytree(output / "checkpoint-4", output / name)
    (output / "checkpoint-9").write_text("a file")
    assert [path.name for path in complete_checkpoints(output)[0]] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    checkpoints.delete_checkpoints(output, kept=())
    assert {path.name for path in output.glob("checkpoint-*")} == {
        "checkpoint-6-copy",
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-9",
    }


def test_a_run_goes_on_from_the_newest_good_checkpoint_to_the_same_weights(arguments, output, whole, capsys):
    flip(output / "checkpoint-6" / "optimizer.pt")
    flip(output / "best-4" / "tokenizer.json")
    assert run_finetune(*arguments, "--output", output) == 0
    said = capsys.readouterr().err
    assert f"warning: {output / 'checkpoint-6'} cannot be used: {output / 'checkpoint-6' / 'optimizer.pt'}" in said
    assert f"resuming from {output / 'checkpoint-2'}\n" in said
    assert has_equal_weights(output, whole)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (output, whole)]
    assert metrics[0]["evaluations"] == metrics[1]["evaluations"]
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


def test_damaged_checkpoints_are_not_kept_instead_of_good_ones(arguments, output, monkeypatch):
    """Of two to keep, the damaged one of a later step is none."""
    flip(output / "checkpoint-6" / "optimizer.pt")
    shutil.rmtree(output / "checkpoint-4")
    real = trainer.delete_checkpoints

    def delete_and_die(*given, **options):
        real(*given, **options)
        raise Killed

    monkeypatch.setattr(trainer, "delete_checkpoints", delete_and_die)
    with pytest.raises(Killed):
        run_finetune(*arguments, "--save-total-limit", 1, "--output", output)
    assert steps_of(output) == [4]
    assert [path.name for path in complete_checkpoints(output)[0]] == ["checkpoint-4"]


def test_without_a_good_checkpoint_nothing_is_deleted_or_begun(arguments, output, capsys):
    for step in (2, 4, 6):
        flip(output / f"checkpoint-{step}" / "model.safetensors")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run_finetune(*arguments, "--output", output) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "checkpoint-6/model.safetensors is damaged" in line
    assert "none was deleted. Restore one" in line
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("is_listed", [False, True])
def test_no_pickle_is_run(arguments, output, tmp_path, capsys, monkeypatch, name, is_listed):
    """Not even one whose checksum somebody has put into the list, with PyTorch's own switch that would allow it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Planted(tmp_path / "ran"), output / "checkpoint-6" / name)
    pickle.loads(pickle.dumps(Planted(tmp_path / "works")))  # noqa: S301
    assert (tmp_path / "works").exists()
    if is_listed:
        sums = checkpoints._checksums(output / "checkpoint-6")
        (output / "checkpoint-6" / CHECKSUMS_NAME).write_text(json.dumps(sums))
    status = run_finetune(*arguments, "--output", output)
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    if is_listed:
        assert status == 2
        assert f"{output / 'checkpoint-6'} holds a pickle" in said
    else:
        assert status == 0
        assert f"{name} is damaged" in said


def test_no_pickle_of_settings_is_written(ended):
    assert {path.name for path in ended.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")} == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }


def test_one_training_at_a_time(arguments, output, capsys):
    before = sorted(output.rglob("*"))
    with folder_lock(output / LOCK_NAME, what="a training"):
        assert run_finetune(*arguments, "--output", output) == 2
        assert sorted(path for path in output.rglob("*") if path.name != LOCK_NAME) == before
    said = capsys.readouterr().err
    assert f"error: a training in {output} is already running, in process {os.getpid()} " in said


def test_what_another_training_finished_meanwhile_is_not_trained_again(arguments, whole, tmp_path, capsys, monkeypatch):
    """It ends between this one's first look and its lock."""

    def finished(config, *rest):
        shutil.copytree(whole, config.output)
        return real(config, *rest)

    real = finetune.load_data
    monkeypatch.setattr(finetune, "load_data", finished)
    assert run_finetune(*arguments, "--output", tmp_path / "out") == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_what_a_kill_left_is_cleared(arguments, output, whole):
    (output / LOCK_NAME).write_text("1\n")
    (output / ".training_config.json.0a1b2c3d.partial").write_text("{")
    shutil.copytree(output / "checkpoint-2", output / checkpoints.UNFINISHED_NAME / "checkpoint-8")
    assert run_finetune(*arguments, "--output", output) == 0
    assert not [path.name for path in output.iterdir() if path.name.startswith(".") or path.name == LOCK_NAME]
    assert has_equal_weights(output, whole)


def test_of_model_and_data_the_content_decides_where_a_run_goes_on(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """Moved, they are the same; others under the same names are not."""
    shutil.copytree(tiny_model_dir, tmp_path / "a" / "model")
    (tmp_path / "a" / "data.json").write_text(json.dumps(generate("train", questions=20)))

    def run(place):
        given = ["--model", place / "model", "--train", place / "data.json", "--eval", place / "data.json"]
        options = ["--max-steps", 1, "--limit-eval", 1, "--save-steps", 1]
        return run_finetune(*given, *options, "--output", tmp_path / "out")

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "write_report", die)
        with pytest.raises(Killed):
            run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    data = json.loads((tmp_path / "b" / "data.json").read_text())
    list_paragraphs(data)[0]["qas"][0]["question"] += " Really?"
    (tmp_path / "b" / "data.json").write_text(json.dumps(data))
    assert run(tmp_path / "b") == 2
    assert "sha256_of_train was" in capsys.readouterr().err
    shutil.copy(tmp_path / "a" / "data.json", tmp_path / "b")
    flip(tmp_path / "b" / "model" / "model.safetensors")
    assert run(tmp_path / "b") == 2
    assert "sha256_of_model was" in capsys.readouterr().err
    shutil.copy(tmp_path / "a" / "model" / "model.safetensors", tmp_path / "b" / "model")
    assert run(tmp_path / "b") == 0
