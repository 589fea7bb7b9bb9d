"""The text of a PDF, parsed by pypdf (extra `pdf`) in a process of its own that cannot take more than it may."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qa_onnx.errors import InvalidInputError, QAOnnxError

WORKER = Path(__file__).with_name("pdf_worker.py")
PASSED_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")
"""Where the interpreter finds its shared library and its modules. Others stay out: the service's have an API key."""
SIGNATURE_BYTES = 1024
"""Where `%PDF-` has to stand: real files have up to so many other bytes before it."""


@dataclass(frozen=True, kw_only=True)
class PdfLimits:
    """What one PDF may take.

    Attributes:
        file_bytes: Maximum size of the file.
        pages: Maximum number of pages.
        characters: Maximum length of the text, in Unicode code points.
        memory_bytes: Maximum address space of the process that parses it.
        cpu_seconds: Maximum CPU time of that process, in whole seconds.
        seconds: Maximum time that it may take in all.
    """

    file_bytes: int = 32 * 2**20
    pages: int = 1_000
    characters: int = 1_000_000
    memory_bytes: int = 768 * 2**20
    cpu_seconds: int = 20
    seconds: float = 40.0


@dataclass(frozen=True, kw_only=True)
class PdfText:
    """What a PDF says.

    Attributes:
        text: Its pages' text, with a blank line between pages and lines that the page's width broke joined again.
        pages: Its number of pages, those without text included.
    """

    text: str
    pages: int


ERRORS = {
    "encrypted": "the PDF is encrypted; expected one without a password. Save it without its protection",
    "too_many_pages": "the PDF has {found:,} pages; expected at most {limits.pages:,}. Split it",
    "too_much_text": "the PDF has more than {limits.characters:,} characters; expected at most that. Split it",
    "too_much_work": "the PDF takes too much time or memory to read; expected a simpler or smaller one. Split it, or "
    "paste its text",
    "damaged": "the PDF cannot be read: it is damaged, or not a PDF. Open it in a viewer and save it anew",
    "no_text": "the PDF has no text, as where its pages are pictures; expected one with text. Run it through text "
    "recognition (OCR) first",
}
"""What can be wrong with a PDF, and how to mend it."""


def reads_pdf() -> bool:
    """Whether PDF files are read here: the extra `pdf` is installed, and the system can limit a process."""
    return find_spec("pypdf") is not None and find_spec("resource") is not None


async def extract_text(data: bytes, *, limits: PdfLimits | None = None) -> PdfText:
    """Reads the text of a PDF. A task that is cancelled ends the process that parses it.

    Args:
        data: The file's bytes.
        limits: What it may take; None is `PdfLimits()`.

    Raises:
        InvalidInputError: pypdf is not installed; the file is no PDF, damaged, encrypted, has no text, or takes more
            than `limits`.
        QAOnnxError: The process that parses does not start.
    """
    limits = limits or PdfLimits()
    if not reads_pdf():
        raise InvalidInputError(
            "got a PDF, and pypdf is not installed; expected it. In the checkout: pip install '.[pdf]'"
        )
    if len(data) > limits.file_bytes:
        raise InvalidInputError(f"got a PDF of {len(data):,} bytes; expected at most {limits.file_bytes:,}. Split it")
    if b"%PDF-" not in data[:SIGNATURE_BYTES]:
        raise InvalidInputError("got a file that does not begin as a PDF does, with %PDF-; expected a PDF")
    found = await _run_worker(data, limits)
    if "error" in found:
        raise InvalidInputError(ERRORS[found["error"]].format(found=found.get("found", 0), limits=limits))
    return PdfText(text=found["text"], pages=found["pages"])


async def _run_worker(data: bytes, limits: PdfLimits) -> dict[str, Any]:
    """What the process wrote; `too_much_work` where it was ended or wrote nothing."""
    numbers = (limits.memory_bytes, limits.cpu_seconds, limits.pages, limits.characters)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the worker's own folder has modules that are named as others are
        str(WORKER),
        *map(str, numbers),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ},
    )
    try:
        async with asyncio.timeout(limits.seconds):
            output, _ = await process.communicate(data)
    except TimeoutError:
        return {"error": "too_much_work"}
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    status = process.returncode or 0
    if status < 0:  # by a signal: the system's limits, or a crash of the interpreter at them
        return {"error": "too_much_work"}
    if status > 0:
        raise QAOnnxError(
            f"the process that parses PDF files failed with status {status}; expected pypdf to be "
            "importable. In the checkout: pip install --force-reinstall '.[pdf]'"
        )
    found: dict[str, Any] = json.loads(output)
    return found
