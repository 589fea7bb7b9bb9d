"""The process that parses one PDF: bytes on standard input, one JSON object on standard output.

`qa_onnx.serve.pdf` runs this file by its path. It imports nothing of this package, so that it starts in a fraction of a
second and its limit of memory is about the PDF only. Whatever a hostile file does to the parser ends with this process.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from io import BytesIO

_HYPHENATED = re.compile(r"(?<=[^\W\d_])-$")
FULL_LINE = 0.6
"""A line this long, as a part of the longest one of its page, was broken for want of room and not by its author."""


def join_lines(page: str) -> str:
    """Joins the lines that a page's width broke, so that an answer of two words is on one line.

    Short lines end where they are: headings, items of lists, the last line of a paragraph. A word that was hyphenated
    at the end of a line becomes one word again where it goes on with a small letter.
    """
    lines = [" ".join(line.split()) for line in page.splitlines()]
    longest = max(map(len, lines), default=0)
    text = ""
    for index, line in enumerate(lines):
        following = lines[index + 1] if index + 1 < len(lines) else ""
        if not line or not following or len(line) < FULL_LINE * longest:
            text += line + "\n"
        elif _HYPHENATED.search(line) and following[0].islower():
            text += line[:-1]
        else:
            text += line + " "
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def clean(text: str) -> str:
    """Joins surrogates that are pairs, as pypdf may give an emoji, and replaces lone ones; drops null characters."""
    return text.replace("\0", "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse(data: bytes, *, max_pages: int, max_characters: int) -> dict[str, object]:
    """The text of a PDF, or what is wrong with it.

    Returns:
        `text` and `pages`; or `error`, a key of `qa_onnx.serve.pdf.ERRORS`, and `found`, what was too much.

    Raises:
        MemoryError: The PDF takes more than there may be.
    """
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):  # many are encrypted with no password, against changes only
            return {"error": "encrypted"}
        count = len(reader.pages)
        if count > max_pages:
            return {"error": "too_many_pages", "found": count}
        pages: list[str] = []
        size = 0
        for page in reader.pages:
            pages.append(page.extract_text())
            size += len(pages[-1])
            if size > max_characters:
                return {"error": "too_much_text"}
    except DependencyError:  # AES needs a package that pypdf does without
        return {"error": "encrypted"}
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a file that lies about itself makes a parser raise anything
        return {"error": "damaged"}
    text = clean("\n\n".join(filter(None, map(join_lines, pages))))
    return {"text": text, "pages": count} if text else {"error": "no_text"}


def main(memory_bytes: int, cpu_seconds: int, max_pages: int, max_characters: int) -> None:
    """Limits this process, then parses what standard input holds."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        output = json.dumps(parse(sys.stdin.buffer.read(), max_pages=max_pages, max_characters=max_characters)).encode()
    except MemoryError:
        output = b'{"error": "too_much_work"}'
    sys.stdout.buffer.write(output)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
