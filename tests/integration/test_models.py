"""Models of unusual shapes from the commands: trained two steps, exported and answered, or refused before any work."""

from __future__ import annotations

import json
import pickle
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from export import to_onnx
from qa_onnx import Answerer, GenerationConfig, PromptTooLongError
from qa_onnx.checkpoint import STARTER_DIRECTORY
from training import finetune

CONTEXT, QUESTION = "Mara founded Tolvik in 1803.", "Who?"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions that are short enough for 32 positions."""
    asked = [
        {"id": str(index), "question": QUESTION, "answers": [{"text": "Mara", "answer_start": 0}]} for index in range(4)
    ]
    path = tmp_path_factory.mktemp("data") / "short.json"
    path.write_text(json.dumps({"data": [{"title": "", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    return path


def make_model(path, **sizes):
    sizes = {"vocab_size": 8192, "n_positions": 64, "n_embd": 4, "n_layer": 1, "n_head": 2, **sizes}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).save_pretrained(path)
    shutil.copy(STARTER_DIRECTORY / "tokenizer.json", path)
    return path


def train(model, data, output, *options):
    arguments = ["--model", model, "--train", data, "--eval", data, "--output", output, "--max-steps", 2]
    return finetune.main([str(one) for one in (*arguments, "--batch-size", 2, "--max-new-tokens", 4, *options)])


@pytest.fixture
def refusing(monkeypatch):
    """Fails the test where something reaches for another machine, or unpickles; and the hub is not switched off."""
    calls = []

    def refuse(*arguments, **options):
        calls.append(arguments)  # the libraries catch what is raised
        raise OSError("refused")

    for owner, *names in (
        (socket.socket, "connect", "connect_ex", "sendto"),
        (socket, "getaddrinfo", "gethostbyname", "create_connection"),
        (pickle, "load", "loads", "Unpickler"),
        (torch, "load"),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    assert calls == []


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"n_positions": 32, "scale_attn_by_inverse_layer_idx": True, "n_layer": 2}, ["--packing"]),
        ({"n_positions": 40, "n_embd": 4, "n_head": 4}, []),  # head size 1
        ({"n_embd": 3, "n_head": 1, "n_inner": 1, "activation_function": "relu"}, ["--packing"]),
        ({"n_embd": 1, "n_head": 1}, ["--lora-rank", "1"]),
    ],
)
def test_a_small_model_is_trained_exported_and_answers(data, tmp_path, sizes, options):
    """By themselves: nobody is asked on the network, and nothing is unpickled that others may have made."""
    model = make_model(tmp_path / "model", **sizes)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(values | {"_name_or_path": "a/b", "name_or_path": "a/b"}))
    assert train(model, data, tmp_path / "trained", *options) == 0
    assert to_onnx.main(["--model", str(tmp_path / "trained"), "--output", str(tmp_path / "bundle")]) == 0
    with Answerer.from_pretrained(tmp_path / "bundle", provider="cpu") as answerer:
        config = GenerationConfig(extractive=True, max_new_tokens=4)
        answer = answerer.answer(QUESTION, CONTEXT, config=config)
        assert answer.text in CONTEXT
        assert answerer.answer(QUESTION, CONTEXT, max_new_tokens=4).new_tokens <= 4


def test_a_model_of_16_positions_is_exported_and_says_what_does_not_fit(data, tmp_path, capsys):
    model = make_model(tmp_path / "model", n_positions=16)
    assert train(model, data, tmp_path / "trained") == 2
    assert "of the model's 16 positions" in capsys.readouterr().err
    assert not (tmp_path / "trained").exists()
    assert to_onnx.main(["--model", str(model), "--output", str(tmp_path / "bundle")]) == 0
    with Answerer.from_pretrained(tmp_path / "bundle", provider="cpu") as answerer:
        assert answerer.answer("?", "1803", max_new_tokens=2).new_tokens <= 2
        with pytest.raises(PromptTooLongError, match="of the model's 16 positions"):
            answerer.answer(QUESTION, CONTEXT, max_new_tokens=4)


def with_prefix(model):
    weights = load_file(model / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, model / "model.safetensors")


def with_nan(model):
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, model / "model.safetensors")


def with_field(name, value):
    def change(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, name: value}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_prefix, "All names begin with '_orig_mod.'"),
        (with_nan, "NaN or infinite: ln_f.bias"),
        (with_field("activation_function", "silu"), "activation_function 'silu'; expected one of"),
        (with_field("architectures", ["GPT2ForQuestionAnswering"]), "head or code would be lost"),
        (with_field("n_layer", 2), "12 missing: transformer.h.1."),
        (with_field("n_positions", 8), "transformer.wpe.weight [64, 4] instead of [8, 4]"),
    ],
)
def test_both_commands_refuse_a_model_before_any_work(data, tmp_path, capsys, change, message):
    model = make_model(tmp_path / "model")
    change(model)
    export = ["--model", str(model), "--output", str(tmp_path / "bundle")]
    for command in (lambda: train(model, data, tmp_path / "trained"), lambda: to_onnx.main(export)):
        assert command() == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
