"""Files of a training: full disks, modes, and no names of the machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import has_equal_weights, run_finetune, steps_of, without_plots

from export.to_onnx import export
from training import checkpoints, finetune, report, run_directory, trainer
from training.starter.sample import generate


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_full(*_, **__):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize(
    ("where", "name", "fails"),
    [
        (torch, "save", full),
        (torch, "save", torch_full),
        (checkpoints, "write_file", full),
        (checkpoints, "put_in_place", full),
        (trainer, "write_file", full),
        (run_directory, "write_file", full),
        (report, "write_file", full),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(arguments, output, whole, capsys, monkeypatch, where, name, fails):
    with monkeypatch.context() as patched:
        if where is report:  # the settings are written by it, too, at the start
            patched.setattr(run_directory, "write_json", lambda *_: None)
        patched.setattr(where, name, fails)
        assert run_finetune(*arguments, "--output", output) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("resuming", "step "))]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {output} cannot be written (")
    assert f"The last good checkpoint: {output / 'checkpoint-'}" in lines[0]
    assert not (output / checkpoints.UNFINISHED_NAME).exists()
    assert run_finetune(*arguments, "--output", output) == 0
    assert has_equal_weights(output, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; its size in kilobytes can be changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def resize(kilobytes, *, first=False):
        options = f"size={kilobytes}k" if first else f"remount,size={kilobytes}k"
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False, capture_output=True)

    if os.geteuid() != 0 or resize(100, first=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield place, resize
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kilobytes", [4, 1000, 2300])
def test_a_disk_that_is_really_full(arguments, whole, capsys, small_disk, kilobytes):
    place, resize = small_disk
    resize(kilobytes)
    assert run_finetune(*arguments, "--output", place / "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1
    assert "No space left" in lines[0] or "inline_container" in lines[0]
    resize(20_000)
    assert run_finetune(*arguments, "--output", place / "out") == 0
    assert has_equal_weights(place / "out", whole)


@pytest.fixture
def alice(tmp_path, monkeypatch):
    """A user's home on a machine, with names that stand nowhere else."""
    home = tmp_path / "home" / "alice-q7"
    (home / "work").mkdir(parents=True)
    for name, value in (("HOME", str(home)), ("USER", "alice-q7"), ("LOGNAME", "alice-q7"), ("HOSTNAME", "host-q7")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "host-q7")
    monkeypatch.chdir(home / "work")
    return home


def leaks(directory):
    names = ("alice-q7", "host-q7", str(directory.parents[2]), str(Path(finetune.__file__).parents[1]))
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [
        (str(path), name)
        for path in files
        for name in names
        if name in str(path.relative_to(directory)) or name.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("options", [[], ["--lora-rank", 4]])
def test_no_file_of_a_training_or_an_export_tells_of_the_machine(tiny_model_dir, alice, monkeypatch, options):
    shutil.copytree(tiny_model_dir, alice / "models" / "small")
    for part in ("train", "heldout"):
        (alice / f"{part}.json").write_text(json.dumps(generate(part, questions=20)))
    monkeypatch.setattr(finetune, "delete_checkpoints", lambda *_, **__: None)
    output = alice / "work" / "out"
    sources = ["--model", alice / "models" / "small", "--train", alice / "train.json", "--eval", alice / "heldout.json"]
    more = ["--cache-dir", alice / "cache", "--tensorboard", "--max-steps", 1, "--limit-eval", 2, "--save-steps", 1]
    assert run_finetune(*sources, *more, *options, "--output", output) == 0
    assert steps_of(output)
    assert leaks(output) == []
    assert json.loads((output / "training_config.json").read_text())["model"] == "small"
    if options:
        return
    export(str(output), alice / "work" / "bundle", keep_optimum=True, verify=[alice / "heldout.json"])
    assert leaks(alice / "work" / "bundle") == []
    assert leaks(alice / "work" / "bundle-optimum") == []
    export(str(alice / "models" / "small"), alice / "work" / "bundle", force=True)
    assert json.loads((alice / "work" / "bundle" / "qa_onnx.json").read_text())["source_model"] == "small"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_is_trained_has_the_modes_of_the_umask(arguments, output, umask):
    before = os.umask(umask)
    try:
        assert run_finetune(*arguments, "--output", output) == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir() if path.is_file()}
    assert modes["model.safetensors"] == modes["report.md"] == 0o666 & ~umask


def test_an_output_that_cannot_be_made_is_one_line(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "none")
    for output in (tmp_path / "file" / "out", tmp_path / "dangling"):
        assert run_finetune(*arguments, "--output", output) == 2
        assert f"--output {output} cannot be created" in capsys.readouterr().err.splitlines()[-1]
