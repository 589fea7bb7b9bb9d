"""Fixtures that several folders use: small models, their bundles, and where the real data is."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qa-onnx-tests-")  # before anything imports datasets
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real SQuAD files; tests that use them skip where they are absent."""
    path = Path(os.environ.get("QA_ONNX_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "squad" / "dev.json").is_file():
        pytest.skip(f"no SQuAD data in {path}; set QA_ONNX_DATA")
    return path


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory) -> Path:
    """60 questions of `sample`, as a SQuAD file."""
    from training.starter.sample import generate

    path = tmp_path_factory.mktemp("data") / "heldout.json"
    path.write_text(json.dumps(generate("heldout", questions=60)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A GPT-2 of two layers with random weights, large ones, so that its greedy tokens vary with the prompt."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from training.starter.pretrain import paragraphs_of, train_tokenizer
    from training.starter.sample import generate

    directory = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = train_tokenizer(paragraphs_of(generate("train", questions=300)), vocab_size=600)
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
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_dir, tmp_path_factory) -> Path:
    """The bundle of the tiny model."""
    from export.to_onnx import export

    path = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
    export(str(tiny_model_dir), path)
    return path


@pytest.fixture(scope="session")
def starter_bundle(tmp_path_factory, heldout_file) -> Path:
    """The bundle of the trained starter, as it is before any fine-tuning."""
    from export.to_onnx import export

    path = tmp_path_factory.mktemp("starter-bundle") / "bundle"
    export("starter", path, verify=[heldout_file])
    return path
