"""Fixtures that several folders use: small models, their bundles, and where the real data is.

`make test` runs several workers (pytest-xdist), each on one thread. What a session makes once is made once for all of
them, in a folder that they share.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
from filelock import FileLock

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


class OneThread(onnxruntime.SessionOptions):
    """Sessions of one thread where a test asks for no number: two workers of two threads wait for each other."""

    def __init__(self):
        super().__init__()
        self.intra_op_num_threads = 1


if IN_WORKER:
    onnxruntime.SessionOptions = OneThread
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, and of torch where it is imported later
    if "torch" in sys.modules:  # pytest imports it for the filters of warnings in pyproject.toml
        sys.modules["torch"].set_num_threads(1)
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qa-onnx-tests-")  # before anything imports datasets
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def keep_one_thread():
    """A worker's PyTorch is back at one thread after a program that sets another number: it changes last digits."""
    yield
    if IN_WORKER and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a file or folder once for all workers: `make_once(name, make)` calls `make(path)` in one of them."""
    shared = tmp_path_factory.getbasetemp()
    if IN_WORKER:
        shared = shared.parent

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / "made-once" / name
        path.parent.mkdir(exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = path.with_name(f"partial-{name}")  # left by a worker that died, or whose fixture failed
                if partial.exists():
                    shutil.rmtree(partial)
                make(partial)
                partial.rename(path)
        return path

    return make_once


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real SQuAD files; tests that use them skip where they are absent."""
    path = Path(os.environ.get("QA_ONNX_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "squad" / "dev.json").is_file():
        pytest.skip(f"no SQuAD data in {path}; set QA_ONNX_DATA")
    return path


@pytest.fixture(scope="session")
def heldout_file(make_once) -> Path:
    """60 questions of `sample`, as a SQuAD file."""

    def write(folder: Path) -> None:
        from training.starter.sample import generate

        folder.mkdir()
        (folder / "heldout.json").write_text(json.dumps(generate("heldout", questions=60)), encoding="utf-8")

    return make_once("data", write) / "heldout.json"


def write_tiny_model(directory: Path) -> None:
    """Writes a GPT-2 of two layers with random weights, large ones, so that its greedy tokens vary with the prompt."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from training.starter.pretrain import list_paragraphs, train_tokenizer
    from training.starter.sample import generate

    tokenizer = train_tokenizer(list_paragraphs(generate("train", questions=300)), vocab_size=600)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_model_dir(make_once) -> Path:
    """The directory of the tiny model; see `write_tiny_model`."""
    return make_once("tiny-model", write_tiny_model)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_dir, make_once) -> Path:
    """The bundle of the tiny model."""
    from export.to_onnx import export

    return make_once("tiny-bundle", lambda path: export(str(tiny_model_dir), path))


@pytest.fixture(scope="session")
def starter_bundle(heldout_file, make_once) -> Path:
    """The bundle of the trained starter, as it is before any fine-tuning."""
    from export.to_onnx import export

    return make_once("starter-bundle", lambda path: export("starter", path, verify=[heldout_file]))
