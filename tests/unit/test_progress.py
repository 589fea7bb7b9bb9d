from __future__ import annotations

import io
import sys

import pytest

from qa_onnx.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn_on(stream, monkeypatch, *, total=4, enabled=True):
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total, "answering", enabled=enabled) as bar:
        for _ in range(total):
            bar.advance(1)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("stream", "total", "enabled"),
    [(io.StringIO(), 4, True), (Terminal(), 4, False), (Terminal(), 0, True)],
    ids=["no terminal", "not enabled", "no work"],
)
def test_nothing_is_drawn(stream, total, enabled, monkeypatch):
    assert drawn_on(stream, monkeypatch, total=total, enabled=enabled) == ""


def test_a_terminal_gets_one_line_from_none_to_all(monkeypatch):
    text = drawn_on(Terminal(), monkeypatch)
    assert text.startswith("\ranswering [" + " " * 30 + "] 0/4 ")
    assert text.rpartition("\r")[2].startswith("answering [" + "=" * 30 + "] 4/4 ")
    assert text.endswith("\n")
    assert text.count("\n") == 1


def test_a_line_that_ends_in_an_error_is_closed_too(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)

    def work():
        with Progress(4, "answering", enabled=True) as bar:
            bar.advance(1)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert "] 1/4 " in stream.getvalue()
    assert stream.getvalue().endswith("\n")


def test_fast_work_is_not_drawn_at_every_step(monkeypatch):
    monkeypatch.setattr("qa_onnx.progress.time.monotonic", lambda: 1.0)
    assert drawn_on(Terminal(), monkeypatch, total=1000).count("\r") == 2
