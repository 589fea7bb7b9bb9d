"""Fixtures that several files of tests share: answerers, and a working directory for the command line."""

from __future__ import annotations

import pytest
from fakes import CONTEXT, Gate, echo_answerer, manifest_fields, squad_data, write_json

from qa_onnx.cli import options
from qa_onnx.manifest import write_manifest


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with a file for each of the cases."""
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "data.json", squad_data())
    write_json(tmp_path / "predictions.json", {"q1": "the Rollo", "q2": "Normandy", "q3": ""})
    write_json(tmp_path / "some.json", {"q1": "Rollo", "other": "x"})
    write_json(tmp_path / "list.json", [])
    (tmp_path / "cut.json").write_text('{"data": [')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "context.txt").write_text(CONTEXT)
    (tmp_path / "empty").mkdir()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("model.onnx", "model.kernels.onnx", "cache_copy.onnx", "tokenizer.json", "config.json"):
        (bundle / name).write_text(name)
    write_manifest(bundle, manifest_fields())
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """Loading any bundle gives an answerer that answers with the question; what was asked for is noted."""
    calls = []

    class Loader:
        @staticmethod
        def from_pretrained(path, **options):
            calls.append({"path": str(path), **options})
            return echo_answerer()

    monkeypatch.setattr(options, "Answerer", Loader)
    return calls


@pytest.fixture
def answerer():
    with echo_answerer() as answerer:
        yield answerer


@pytest.fixture
def held():
    """An answerer whose engine waits at each step until `release` is set."""
    answerer = echo_answerer(config={"max_queue": 3, "max_wait_ms": 0})
    gate = Gate(answerer._engine)
    answerer.release, answerer.reached = gate.release, gate.reached
    yield answerer
    gate.release.set()
    answerer.close()
