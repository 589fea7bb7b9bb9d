"""The text of PDF files: what is in them, and that a hostile one costs nothing but its own process."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qa_onnx.errors import InvalidInputError
from qa_onnx.serve import pdf, pdf_worker
from qa_onnx.serve.pdf import PdfLimits, extract_text
from qa_onnx.serve.pdf_worker import join_lines
from tests.serve.pdf_files import make_bomb, make_encrypted, make_loop, make_pdf, make_slow, make_with_content

SMALL = PdfLimits(cpu_seconds=2, seconds=10, memory_bytes=384 * 2**20)


def read(data, limits=SMALL):
    return asyncio.run(extract_text(data, limits=limits))


def workers() -> list[int]:
    """Children of this process that parse a PDF now, zombies left out."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads and processes may end meanwhile
            children = path.read_text().split()
            found += [int(child) for child in children if b"pdf_worker" in Path("/proc", child, "cmdline").read_bytes()]
    return found


def test_gives_the_text_of_all_pages_in_order():
    found = read(make_pdf(["The first page (of two)."], [], ["The last \\ page, café."]))
    assert found.text == "The first page (of two).\n\nThe last \\ page, café."
    assert found.pages == 3


def test_joins_lines_that_the_page_width_broke():
    page = (
        "A heading\nIn the tenth century, the Normans were led by the\nViking leader Rollo, and came to be known for "
        "their infor-\nmation, and by Jean-\nPaul.\nA list:\none\n\n\n\ntwo\n"
    )
    assert join_lines(page) == (
        "A heading\nIn the tenth century, the Normans were led by the Viking leader Rollo, and came to be known for "
        "their information, and by Jean-\nPaul.\nA list:\none\n\ntwo"
    )
    assert join_lines("who came from New\nYork in winter.") == "who came from New York in winter."


def test_reads_a_file_that_is_encrypted_without_a_password():
    assert read(make_encrypted("")).text == "A secret."


@pytest.mark.parametrize(
    ("data", "limits", "message"),
    [
        (b"", SMALL, "does not begin as a PDF does"),
        (b"<html>" * 1000 + b"%PDF-1.7", SMALL, "does not begin as a PDF does"),
        (b"%PDF-1.7\nnothing more", SMALL, "cannot be read"),
        (make_pdf(["A page."])[:200], SMALL, "cannot be read"),
        (make_loop(), SMALL, "cannot be read|has no text"),
        (make_encrypted("a password"), SMALL, "is encrypted"),
        (make_pdf(["A page."], ["Another."]), replace(SMALL, pages=1), "has 2 pages; expected at most 1"),
        (make_pdf(["A page."]), replace(SMALL, file_bytes=99), "of [0-9]+ bytes; expected at most 99"),
        (make_pdf(["A page."]), replace(SMALL, characters=5), "more than 5 characters"),
        (make_pdf([]), SMALL, "has no text"),
    ],
)
def test_says_in_one_line_what_is_wrong(data, limits, message):
    with pytest.raises(InvalidInputError, match=message) as raised:
        read(data, limits)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "data",
    [
        make_bomb(1024),
        make_with_content(b"[" * 3_000_000),
        make_with_content(b"q " * 3_000_000),
        make_slow(),
    ],
    ids=["bomb", "brackets", "states", "slow"],
)
def test_a_hostile_file_costs_its_own_process_only(data):
    started = time.monotonic()
    with pytest.raises(InvalidInputError) as raised:
        read(data)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < SMALL.seconds + 5
    assert workers() == []


def test_a_canceled_task_ends_the_process():
    async def cancel():
        task = asyncio.create_task(extract_text(make_slow(), limits=PdfLimits()))
        while not workers():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert workers() == []


def test_says_what_to_install_where_there_is_no_parser(monkeypatch):
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install '\.\[pdf\]'"):
        read(make_pdf(["A page."]))


def test_the_process_can_take_and_write_no_more_than_it_may(monkeypatch, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import os, runpy, sys

def fails(action):
    try:
        action()
    except (MemoryError, OSError) as error:
        return type(error).__name__

def parse(data, **limits):
    def write():
        with open({str(tmp_path / "written")!r}, "wb") as file:
            file.write(b"data")
    return {{"text": str([fails(lambda: bytearray(2**29)), fails(write), sorted(os.environ)]), "pages": 1}}

worker = runpy.run_path({str(pdf.WORKER)!r})
worker["main"].__globals__["parse"] = parse
worker["main"](*map(int, sys.argv[1:]))
""")
    monkeypatch.setattr(pdf, "WORKER", probe)
    monkeypatch.setenv("QA_ONNX_API_KEY", "a-key-of-the-tests-only")
    for name in pdf.PASSED_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    memory, written, variables = ast.literal_eval(read(make_pdf(["A page."])).text)
    assert (memory, written) == ("MemoryError", "OSError")
    assert set(variables) <= {"LC_CTYPE"}


def test_the_process_finds_the_libraries_and_modules_of_the_service(monkeypatch, tmp_path):
    """A Python with a shared library outside of the system's folders does not start without LD_LIBRARY_PATH."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import json, os, sys\n"
        "found = [os.environ['LD_LIBRARY_PATH'], __import__('module_of_the_service').NAME]\n"
        "print(json.dumps({'text': str(found), 'pages': 1}))\n"
    )
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "module_of_the_service.py").write_text("NAME = 'found'\n")
    monkeypatch.setattr(pdf, "WORKER", probe)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(modules))
    assert ast.literal_eval(read(make_pdf(["A page."])).text) == [str(tmp_path), "found"]


@pytest.mark.parametrize("name", ["join_lines", "clean", "json.dumps"])
def test_memory_that_ends_behind_the_parser_is_an_error_of_the_file(monkeypatch, tmp_path, name):
    probe = tmp_path / "probe.py"
    probe.write_text(f"""
import json, runpy, sys

def fail(*arguments):
    raise MemoryError

main = runpy.run_path({str(pdf.WORKER)!r})["main"]
if {name!r} == "json.dumps":
    json.dumps = fail
else:
    main.__globals__[{name!r}] = fail
main(*map(int, sys.argv[1:]))
""")
    monkeypatch.setattr(pdf, "WORKER", probe)
    with pytest.raises(InvalidInputError, match="too much time or memory"):
        read(make_pdf(["A page."]))


def test_an_emoji_in_two_halves_is_one_again():
    assert pdf_worker.clean("a \ud83d\ude80\0 and \ud83d") == "a 🚀 and \ufffd"


def test_names_a_parser_that_does_not_start(monkeypatch, tmp_path):
    broken = tmp_path / "pdf_worker.py"
    broken.write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(pdf, "WORKER", broken)
    with pytest.raises(pdf.QAOnnxError, match="failed with status 1"):
        read(make_pdf(["A page."]))
