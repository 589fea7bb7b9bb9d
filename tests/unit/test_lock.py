from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from qa_onnx import InvalidInputError
from qa_onnx.lock import folder_lock
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from qa_onnx.lock import folder_lock
with folder_lock(Path(sys.argv[1]), what="a training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "lock"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_it_and_what_to_do(tmp_path, other):
    words = rf"a training is already running, in process {other.pid} .*Wait"
    with pytest.raises(InvalidInputError, match=words) as caught, folder_lock(tmp_path / "lock", what="a training"):
        pytest.fail("held by two")
    assert str(tmp_path / "lock") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "lock").read_text() == f"{other.pid}\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path, other, number):
    other.send_signal(number)
    other.wait()
    assert (tmp_path / "lock").exists()
    with folder_lock(tmp_path / "lock", what="a training"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "lock").exists()


def test_it_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path / "lock", what="a training"):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_it_holds_within_one_process_too(tmp_path):
    words = f"an export is already running, in process {os.getpid()} "
    lock = tmp_path / "lock"
    with folder_lock(lock, what="an export"):
        with pytest.raises(InvalidInputError, match=words), folder_lock(lock, what="an export"):
            pytest.fail("held twice")
        assert lock.exists()


def test_a_file_that_its_holder_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Its holder removes it between open and flock here; two would hold a lock then, each on a file of its own."""
    path, lock, opened = tmp_path / "lock", fcntl.flock, []

    def removed_first(descriptor, operation):
        if not opened:
            path.unlink()
        opened.append(os.fstat(descriptor).st_ino)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with folder_lock(path, what="a training"):
        assert path.stat().st_ino == opened[1]
    assert len(opened) == 2


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(InvalidInputError, match="cannot be locked"), folder_lock(tmp_path / "lock", what="a training"):
        pytest.fail("followed")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("name", ["none/lock", "folder"])
def test_a_place_that_cannot_be_locked_is_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match="cannot be locked"), folder_lock(tmp_path / name, what="a training"):
        pytest.fail("locked")
