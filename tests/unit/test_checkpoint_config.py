"""The configuration of a checkpoint: what the runtime does not compute is refused; without PyTorch."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from checkpoint_folder import (
    CONFIG,
    SETTINGS,
    change_config,
    having,
    refusal,
    save_file,
    tensors,
)

from qa_onnx.checkpoint.settings import ModelSettings, read_settings


@pytest.mark.parametrize(
    ("name", "shape", "model"),
    [
        ("qa_outputs.weight", (2, 4), "GPT2ForQuestionAnswering"),
        ("multiple_choice_head.summary.weight", (1, 4), "GPT2DoubleHeadsModel"),
        ("score.weight", (2, 4), "GPT2ForSequenceClassification"),
        ("classifier.weight", (2, 4), "GPT2ForTokenClassification"),
        ("v_head.summary.weight", (1, 4), "value head"),
    ],
)
def test_a_head_that_would_be_lost_is_refused(folder, name, shape, model):
    save_file(having(name, shape)(tensors()), folder / "model.safetensors")
    message = refusal(folder)
    assert model in message
    assert name in message


@pytest.mark.parametrize(
    "architectures",
    [["GPT2ForQuestionAnswering"], ["GPT2DoubleHeadsModel"], ["GPT2LMHeadModel", "MyGPT2"], "GPT2LMHeadModel", [3]],
)
def test_architectures_of_another_function_are_refused(folder, architectures):
    change_config(folder, architectures=architectures)
    assert "head or code would be lost; expected 'GPT2LMHeadModel'" in refusal(folder)


@pytest.mark.parametrize("architectures", [None, [], ["GPT2LMHeadModel"], ["GPT2Model"]])
def test_a_language_model_may_leave_its_architecture_out(folder, architectures):
    change_config(folder, architectures=architectures)
    assert read_settings(folder) == SETTINGS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "it is a 'llama' model; expected a GPT-2"),
        ({"model_type": None}, "it is a None model"),
        ({"vocab_size": "8192"}, "vocab_size '8192'; expected a whole number"),
        ({"n_layer": 2.0}, "n_layer 2.0; expected a whole number"),
        ({"n_layer": True}, "n_layer True; expected a whole number"),
        ({"n_layer": 5000}, "n_layer 5000; expected at most 1000"),
        ({"n_layer": 2**40}, "n_layer 1099511627776"),
        ({"n_layer": [2]}, "n_layer [2]"),
        ({"n_head": 3}, "n_head 3; expected a divisor of n_embd, 4"),
        ({"n_head": 0}, "n_head 0"),
        ({"n_inner": 0}, "n_inner 0"),
        ({"n_positions": 200_000}, "n_positions 200000; expected fewer"),
        ({"activation_function": "silu"}, "activation_function 'silu'; expected one of gelu_new"),
        ({"activation_function": "gelu_fast"}, "activation_function 'gelu_fast'"),
        ({"activation_function": ["gelu"]}, "activation_function ['gelu']"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon 0; expected a number from"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon -1e-05"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon '1e-5'"),
        ({"attn_pdrop": 1.5}, "attn_pdrop 1.5; expected a number from 0 to 0.99"),
        ({"scale_attn_weights": "false"}, "scale_attn_weights 'false'; expected true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings 0; expected true or false"),
        ({"add_cross_attention": True}, "add_cross_attention: it reads a second text"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: its weights are quantized"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"hidden_size": 8}, "n_embd 4 and hidden_size 8, which mean the same"),
    ],
)
def test_a_config_of_what_is_not_computed_is_refused(folder, changes, message):
    change_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b'["gpt2"]', "config.json holds a list; expected a JSON object"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
        (b" " * (2**20 + 1), "has 1,048,577 bytes; expected at most 1,048,576"),
        (b"{}", "it is a None model"),
        (b'{"model_type": "gpt2"}', "config.json has no n_embd, n_head, n_layer, n_positions, vocab_size"),
        (b'{"model_type": "gpt2", "n_embd": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
    ],
)
def test_a_config_that_is_no_config_is_refused(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


def test_only_known_fields_are_read_and_common_names_of_them_count(folder):
    acting = {
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "auto_map": {"AutoConfig": "evil.Config"},
        "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
        "_name_or_path": "evil/model",
        "dtype": "float16",
        "n_ctx": 7,
    }
    sizes = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = {name: value for name, value in CONFIG.items() if not name.startswith("n_")} | sizes | acting
    (folder / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    assert read_settings(folder) == SETTINGS
    assert acting.keys() & {field.name for field in fields(ModelSettings)} == set()


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, "sdpa"),
        ({"scale_attn_weights": False}, "eager"),
        ({"scale_attn_by_inverse_layer_idx": True}, "eager"),
        ({"reorder_and_upcast_attn": True}, "eager"),
        ({"reorder_and_upcast_attn": True, "scale_attn_weights": False}, "eager"),
    ],
)
def test_the_attention_is_one_that_computes_what_the_config_says(folder, changes, attention):
    change_config(folder, **changes)
    assert read_settings(folder).attention == attention
