from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from qa_onnx import InvalidInputError
from qa_onnx.data.reader import read_examples
from qa_onnx.errors import one_line
from qa_onnx.files import check_outputs, keep_lines, public_name, put_in_place, read_text, set_default_modes, write_file


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_byte_order_mark_is_removed_and_line_ends_are_kept(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(tmp_path / "f", expected="a text file") == "one\r\ntwo\n"


def test_what_cannot_be_read_is_said_once(tmp_path):
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin1", "byte 3"),
    ):
        with pytest.raises(InvalidInputError, match=words) as caught:
            read_text(path, expected="a text file")
        assert str(caught.value).count(str(path)) == 1


def test_a_text_of_more_than_the_limit_is_refused_and_so_is_a_device_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("qa_onnx.files.MAX_TEXT_BYTES", 2**10)
    (tmp_path / "most").write_bytes(b"x" * 2**10)
    (tmp_path / "more").write_bytes(b"x" * (2**10 + 1))
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert len(read_text(tmp_path / "most", expected="a text file")) == 2**10
    for name in ("more", "zero"):
        with pytest.raises(InvalidInputError, match=f"{name}: has more than .* GiB; expected a text file of at most"):
            read_text(tmp_path / name, expected="a text file")


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path):
    write_file(tmp_path / "new", "x")
    (tmp_path / "old").write_text("before")
    (tmp_path / "old").chmod(0o604)
    write_file(tmp_path / "old", "after")
    assert (mode(tmp_path / "new"), mode(tmp_path / "old")) == (0o640, 0o604)
    assert (tmp_path / "old").read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_link_stays_and_its_file_is_written(tmp_path, depth):
    (tmp_path / "0").write_text("old")
    for index in range(depth):
        (tmp_path / str(index + 1)).symlink_to(str(index))
    write_file(tmp_path / str(depth), "new")
    assert (tmp_path / str(depth)).is_symlink()
    assert (tmp_path / "0").read_text() == "new"


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_file(tmp_path / "pipe", "through")
    reader.join(10)
    assert got == ["through"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_standard_output_may_be_a_pipe():
    reading, writing = os.pipe()
    path = Path(f"/dev/fd/{writing}")
    check_outputs({"--output": path}, {})
    write_file(path, "through")
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "through"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_written_to_and_stays(tmp_path):
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    check_outputs({"--output": tmp_path / "null"}, {})
    write_file(tmp_path / "null", "gone")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_a_planted_partial_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out.partial").symlink_to("victim")
    write_file(tmp_path / "out", "x")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match="No space left"):
        write_file(tmp_path / "out", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "old")]


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("gpt2", "gpt2"),
        ("owner/name", "owner/name"),
        ("./runs//model/", "runs/model"),
        ("{here}/runs/model", "runs/model"),
        ("{here}/runs/../model", "model"),
        (".", "here"),
        ("{here}", "here"),
        ("..", "work"),
        ("../secret/model", "model"),
        ("{above}/secret/model", "model"),
        ("{here}-2/model", "model"),
        ("/home/alice/model", "model"),
        ("..model", "..model"),
    ],
)
def test_a_public_name_tells_of_no_directory_outside(tmp_path, monkeypatch, given, public):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert public_name(given.format(here=here, above=tmp_path)) == public
    assert public_name(Path(given.format(here=here, above=tmp_path))) == public


def test_a_public_name_tells_no_user_from_above_the_home_directories(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.chdir("/")
    assert public_name("/home/alice/model") == "model"
    assert public_name("owner/name") == "owner/name"


def test_a_public_name_is_utf_8():
    assert public_name(os.fsdecode(b"caf\xe9")) == "caf\ufffd"


def test_outputs_are_no_inputs_and_differ(tmp_path):
    data, other, link, hard = (tmp_path / name for name in ("data", "other", "link", "hard"))
    data.write_text("x")
    link.symlink_to("data")
    hard.hardlink_to(data)
    check_outputs({"--output": other, "--answers": None}, {"--data": data})
    for output in (data, link, hard, tmp_path / "." / "data", tmp_path / ".." / tmp_path.name / "data"):
        with pytest.raises(InvalidInputError, match="same file as --data"):
            check_outputs({"--output": output}, {"--data": data})
    with pytest.raises(InvalidInputError, match="same file as --output"):
        check_outputs({"--output": other, "--answers": tmp_path / "." / "other"}, {"--data": data})


def test_outputs_are_no_files_of_an_input_directory(tmp_path):
    """A bundle, also one of links as in the cache of the hub, or a data set of splits."""
    blob, folder, split = tmp_path / "blobs" / "0a1b", tmp_path / "bundle", tmp_path / "bundle" / "train"
    for directory in (blob.parent, folder, split):
        directory.mkdir()
    for path in (blob, folder / "config.json", split / "data.arrow"):
        path.write_text("x")
    (folder / "model.onnx").symlink_to(blob)
    check_outputs({"--output": folder / "answers.json"}, {"--model": folder})
    for output in (blob, folder / "config.json", folder / "model.onnx", split / "data.arrow"):
        with pytest.raises(InvalidInputError, match=f"--output {output} is the same file as --model {folder}/"):
            check_outputs({"--output": output}, {"--model": folder})


def test_outputs_have_a_directory_and_are_none(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(InvalidInputError, match="cannot be written"):
            check_outputs({"--output": path}, {})


def test_libraries_that_write_private_files_are_corrected(tmp_path):
    directory = tmp_path / "bundle"
    directory.mkdir(mode=0o700)
    (directory / "weights").touch(mode=0o600)
    set_default_modes(directory)
    assert (mode(directory), mode(directory / "weights")) == (0o750, 0o640)
    assert [path.name for path in directory.iterdir()] == ["weights"]


@pytest.fixture(params=["renameat2", "plain"])
def renames(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr("qa_onnx.files._rename", lambda *arguments: False)
    return request.param


def make(directory, text):
    directory.mkdir()
    (directory / "file").write_text(text)
    return directory


def test_a_directory_is_put_in_place(tmp_path, renames):
    put_in_place(make(tmp_path / "new", "new"), tmp_path / "target", replace=False)
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_directory_that_appeared_meanwhile_is_not_replaced(tmp_path, renames):
    make(tmp_path / "target", "of somebody else")
    with pytest.raises(InvalidInputError, match="meanwhile"):
        put_in_place(make(tmp_path / "new", "new"), tmp_path / "target", replace=False)
    assert (tmp_path / "target" / "file").read_text() == "of somebody else"


def test_replacing_exchanges(tmp_path, renames):
    make(tmp_path / "target", "old")
    put_in_place(make(tmp_path / "new", "new"), tmp_path / "target", replace=True)
    assert (tmp_path / "target" / "file").read_text() == "new"
    (left,) = (path for path in tmp_path.iterdir() if path.name != "target")
    assert (left / "file").read_text() == "old"


def test_the_old_directory_comes_back_where_the_second_of_two_renames_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("qa_onnx.files._rename", lambda *arguments: False)
    target, new = make(tmp_path / "target", "old"), make(tmp_path / "new", "new")
    rename = type(target).rename

    def fail(source, destination):
        if source == new:
            raise KeyboardInterrupt
        return rename(source, destination)

    monkeypatch.setattr(type(target), "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, target, replace=True)
    assert (target / "file").read_text() == "old"


def test_lines_are_kept_as_they_come_until_the_whole_file_is_written(tmp_path):
    target, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    with keep_lines(target) as keep:
        keep("first")
        assert partial.read_text() == "first\n"
        keep("second \u2028")
        assert partial.read_text(encoding="utf-8") == "first\nsecond \u2028\n"
    assert not partial.exists()


@pytest.mark.parametrize("error", [InvalidInputError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_lines_stay_where_the_end_fails(tmp_path, error):
    def fail():
        with keep_lines(tmp_path / "out") as keep:
            keep("first")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (tmp_path / "out.partial").read_text() == "first\n"
    assert one_line(error).endswith(f". What was computed before is in {tmp_path / 'out.partial'}")
    with pytest.raises(InvalidInputError, match=r"is there already.*Move or delete it"), keep_lines(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial").read_text() == "first\n"


def test_without_lines_nothing_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught, keep_lines(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(caught.value, "__notes__")


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out.partial").symlink_to("victim")
    with pytest.raises(InvalidInputError, match="is there already"), keep_lines(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_of_a_device_no_lines_are_kept():
    with keep_lines(Path(os.devnull)) as keep:
        keep("first")
    assert not Path(f"{os.devnull}.partial").exists()


def test_a_pipe_that_nobody_reads_is_an_error_and_its_lines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("qa_onnx.files.PIPE_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")

    def write():
        with keep_lines(tmp_path / "pipe") as keep:
            keep("first")
            write_file(tmp_path / "pipe", "all")

    with pytest.raises(InvalidInputError, match=r"pipe: cannot be written \(nobody reads the pipe\)"):
        write()
    assert (tmp_path / "pipe.partial").read_text() == "first\n"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_pipe_may_be_read_a_little_later(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Timer(0.2, lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_file(tmp_path / "pipe", "all" * 100_000)  # more than a pipe holds
    reader.join()
    assert read == ["all" * 100_000]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_line_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode, **how: opened(Path("/dev/full"), "w", **how))
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    (tmp_path / "out.partial").touch()
    with pytest.raises(InvalidInputError, match="No space left"), keep_lines(tmp_path / "out") as keep:
        keep("first")


@pytest.mark.parametrize("links", [{"a": "a"}, {"a": "b", "b": "a"}])
def test_links_that_lead_to_each_other_are_refused_and_stay(tmp_path, links):
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    for call in (lambda path: check_outputs({"--output": path}, {}), lambda path: write_file(path, "text")):
        with pytest.raises(InvalidInputError, match=r"a: cannot be written \(Too many levels of symbolic links\)"):
            call(tmp_path / "a")
    assert {path.name: str(path.readlink()) for path in tmp_path.iterdir()} == links


def test_an_empty_partial_file_of_a_killed_run_is_used_again(tmp_path):
    (tmp_path / "out.partial").touch()
    with keep_lines(tmp_path / "out") as keep:
        keep("first")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_even_be_seen_is_named_with_its_option(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(InvalidInputError, match=r"--output .*out: cannot be written \(Permission denied\)"):
        check_outputs({"--output": tmp_path / "out"}, {})
    with pytest.raises(InvalidInputError, match=r"data: cannot be read \(Permission denied\); expected SQuAD JSON"):
        read_examples(tmp_path / "data")


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"cannot be (written|read) \(File name too long\)"):
        check_outputs({"--output": tmp_path / ("x" * 300)}, {})
    with pytest.raises(InvalidInputError, match=r"cannot be read \(File name too long\)"):
        read_examples("x" * 300)
