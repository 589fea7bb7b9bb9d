"""What training writes: checkpoints that are verified, one run in a directory, full disks, no names of the machine."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from export.to_onnx import export
from qa_onnx.lock import folder_lock
from tests.conftest import ROOT
from training import checkpoints, finetune, report, trainer
from training.checkpoints import CHECKSUMS_NAME, good_checkpoints
from training.finetune import LOCK_NAME
from training.report import escape_markdown
from training.starter.pretrain import paragraphs_of
from training.starter.sample import generate


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


class Killed(BaseException):
    """Stands in for a kill: nothing but the files is left."""


def die(*_, **__):
    raise Killed


def steps_of(output):
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def weights_of(output):
    return load_file(output / "model.safetensors")


def has_equal_weights(first, second):
    first, second = weights_of(first), weights_of(second)
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "_png", lambda figure: b"PNG")
        yield


@pytest.fixture(scope="module")
def arguments(tiny_model_dir, tmp_path_factory):
    """Two epochs of 4 steps, each ended by an evaluation; a checkpoint every 2 steps."""
    directory = tmp_path_factory.mktemp("data")
    data, heldout = directory / "data.json", directory / "heldout.json"
    data.write_text(json.dumps(generate("train", questions=16)))
    heldout.write_text(json.dumps(generate("heldout", questions=4)))
    sources = ["--model", tiny_model_dir, "--train", data, "--eval", heldout, "--limit-eval", 1, "--max-new-tokens", 2]
    return [*sources, "--eval-at-start", "--epochs", 2, "--batch-size", 4, "--save-steps", 2, "--keep", 3]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "model"
    assert run_finetune(*arguments, "--output", output) == 0
    return output


@pytest.fixture(scope="module")
def ended(arguments, tmp_path_factory):
    """A run that was killed while answering after its last step; F1 is always 0, so that the last is the best."""
    output = tmp_path_factory.mktemp("ended") / "model"
    real = trainer.generate_answers
    calls = []

    def generate_answers(*given, **options):
        calls.append(0)
        return real(*given, **options) if len(calls) < 3 else die()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "generate_answers", generate_answers)
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", output)
    assert [path.name for path in good_checkpoints(output)[0]] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in output.glob("best-*")) == ["best-0", "best-4"]
    return output


@pytest.fixture
def output(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "out")


def flip(path, place=-100):
    """Changes one bit and neither size nor time."""
    times = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times, times))


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
    good, damages = good_checkpoints(output)
    assert [path.name for path in good] == ["checkpoint-2", "checkpoint-4"]
    assert len(damages) == 1
    assert damages[0].startswith(f"{output / 'checkpoint-6'} cannot be used: ")
    assert damage in damages[0]


def test_a_checkpoint_whose_best_weights_are_damaged_is_left_out(output):
    flip(output / "best-4" / "model.safetensors")
    good, damages = good_checkpoints(output)
    assert [path.name for path in good] == ["checkpoint-2"]
    assert all("best-4/model.safetensors is damaged" in damage for damage in damages)
    shutil.rmtree(output / "best-0")
    assert good_checkpoints(output)[0] == []


def test_a_copy_under_another_name_is_no_checkpoint(output):
    for name in ("checkpoint-6-copy", "checkpoint-", "checkpoint-x"):
        shutil.copytree(output / "checkpoint-4", output / name)
    (output / "checkpoint-9").write_text("a file")
    assert [path.name for path in good_checkpoints(output)[0]] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
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
    assert f"going on from {output / 'checkpoint-2'}\n" in said
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
        run_finetune(*arguments, "--keep", 1, "--output", output)
    assert steps_of(output) == [4]
    assert [path.name for path in good_checkpoints(output)[0]] == ["checkpoint-4"]


def test_without_a_good_checkpoint_nothing_is_deleted_or_begun(arguments, output, capsys):
    for step in (2, 4, 6):
        flip(output / f"checkpoint-{step}" / "model.safetensors")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run_finetune(*arguments, "--output", output) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "checkpoint-6/model.safetensors is damaged" in line
    assert "none was deleted. Restore one" in line
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_two_processes_go_on_after_a_kill(arguments, tmp_path):
    output = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training.finetune"]
    command = [sys.executable, *launcher, *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not list(output.glob("checkpoint-*")):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [process.pid, *map(int, children)]:
            os.kill(pid, signal.SIGKILL)
    checkpoint = good_checkpoints(output)[0][-1]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"going on from {checkpoint}\n") == 1
    assert (output / "metrics.json").exists()


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

    real = finetune._load_data
    monkeypatch.setattr(finetune, "_load_data", finished)
    assert run_finetune(*arguments, "--output", tmp_path / "out") == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_what_a_kill_left_is_cleared(arguments, output, whole):
    (output / LOCK_NAME).write_text("1\n")
    (output / ".training_config.json.0a1b2c3d.partial").write_text("{")
    shutil.copytree(output / "checkpoint-2", output / checkpoints.UNFINISHED_NAME / "checkpoint-8")
    assert run_finetune(*arguments, "--output", output) == 0
    assert not [path.name for path in output.iterdir() if path.name.startswith(".") or path.name == LOCK_NAME]
    assert has_equal_weights(output, whole)


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
        (finetune, "write_file", full),
        (report, "write_file", full),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(arguments, output, whole, capsys, monkeypatch, where, name, fails):
    with monkeypatch.context() as patched:
        if where is report:  # the settings are written by it, too, at the start
            patched.setattr(finetune, "write_json", lambda *_: None)
        patched.setattr(where, name, fails)
        assert run_finetune(*arguments, "--output", output) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("going on", "step "))]
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
    paragraphs_of(data)[0]["qas"][0]["question"] += " Really?"
    (tmp_path / "b" / "data.json").write_text(json.dumps(data))
    assert run(tmp_path / "b") == 2
    assert "sha256_of_train was" in capsys.readouterr().err
    shutil.copy(tmp_path / "a" / "data.json", tmp_path / "b")
    flip(tmp_path / "b" / "model" / "model.safetensors")
    assert run(tmp_path / "b") == 2
    assert "sha256_of_model was" in capsys.readouterr().err
    shutil.copy(tmp_path / "a" / "model" / "model.safetensors", tmp_path / "b" / "model")
    assert run(tmp_path / "b") == 0


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


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("When was Tolvik founded (in 1803)?", "When was Tolvik founded (in 1803)?"),
        ("a | b", r"a \| b"),
        ("a \\| b", r"a \\\| b"),
        ("one\r\n\ttwo\u2028three\x00", "one two three"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("<!-- hidden", "&lt;!-- hidden"),
        ("`code` ```", r"\`code\` \`\`\`"),
        ("[x](https://y.org)", r"\[x\](https\://y.org)"),
        ("![x](y)", r"!\[x\](y)"),
        ("see www.y.org", r"see www\.y.org"),
        ("*a* __b__ ~~c~~ $d$", r"\*a\* \_\_b\_\_ \~\~c\~\~ \$d\$"),
        ("# heading", r"\# heading"),
        ("- item", r"\- item"),
        ("+ item", r"\+ item"),
        ("1. item", r"1\. item"),
        ("2) item", r"2\) item"),
        ("===", r"\==="),
        ("&lt; &#60;", r"&amp;lt; &amp;\#60;"),
        ("> quote", "&gt; quote"),
    ],
)
def test_text_in_markdown_shows_as_it_is(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_report_shows_what_attacks_it_as_text(arguments, tmp_path):
    attack = "<script>x</script> | [a](javascript:b) `c` <!-- # d"
    data = generate("heldout", questions=4)
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                qa["question"] = f"{attack}\n# {qa['question']}"
    name = "<img src=x> |`[a](b).json"
    (tmp_path / name).write_text(json.dumps(data))
    given = [*arguments[:5], tmp_path / name, "--output", tmp_path / "<b>|out", "--max-new-tokens", 2]
    assert run_finetune(*given, "--max-steps", 1) == 0
    for file in ("report.md", "README.md"):
        body = (tmp_path / "<b>|out" / file).read_text().split("---\n")[-1]
        assert not [mark for mark in ("<script", "<img", "<b>", "<!--", " [a]", "|`") if mark in body]
    rows = [line for line in (tmp_path / "<b>|out" / "report.md").read_text().splitlines() if "&lt;script" in line]
    assert len(rows) == 4
    assert all(len(row.replace(r"\|", "").split("|")) == 6 for row in rows)
