"""Fixtures that several files of tests share: answerers, checkpoints, a working directory for the command."""

from __future__ import annotations

import os
import pickle

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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A complete checkpoint, with a tokenizer of 8,192 tokens; the hub is out of reach."""
    from checkpoint_folder import make_folder

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return make_folder(tmp_path / "model")


class _Opened:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def pickled(tmp_path):
    """A pickle that must not be opened."""
    path = tmp_path / "pickle.bin"
    path.write_bytes(pickle.dumps(_Opened(tmp_path / "opened")))
    yield path
    assert not (tmp_path / "opened").exists()
