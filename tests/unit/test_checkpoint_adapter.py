"""LoRA adapters that can be merged into their base, and those that are refused; without PyTorch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoint_folder import (
    load_file,
    refusal,
    renamed,
    save_file,
)

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../model", "bias": "none"}


@pytest.fixture
def adapter(folder):
    path = folder.parent / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    names = [f"base_model.model.transformer.h.0.attn.c_attn.lora_{part}.weight" for part in "AB"]
    save_file({names[0]: np.ones((2, 4), np.float32), names[1]: np.ones((12, 2), np.float32)}, path / ADAPTER)
    return path


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "a LoRA adapter that names no base. Merge it with peft's merge_and_unload"),
        ({"base_model_name_or_path": ""}, "names no base"),
        ({"base_model_name_or_path": ["x"]}, "names no base"),
        ({"base_model_name_or_path": "../gone"}, "whose base '../gone' cannot be found"),
        ({"base_model_name_or_path": "nobody/nowhere-gpt2"}, "whose base 'nobody/nowhere-gpt2' cannot be found"),
        ({"base_model_name_or_path": "a" * 5000}, "File name too long"),
        ({"base_model_name_or_path": "."}, "whose base '.' is an adapter itself"),
        ({"peft_type": "IA3"}, "a PEFT adapter of type 'IA3'; expected 'LORA'. Merge it with peft"),
        ({"peft_type": None}, "a PEFT adapter of type None"),
        ({"use_dora": True}, "the adapter uses use_dora; expected plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "the adapter uses modules_to_save"),
        ({"bias": "all"}, "the adapter uses bias"),
        ({"init_lora_weights": "pissa"}, "the adapter uses init_lora_weights"),
        ({"rank_pattern": {"c_attn": 3}}, "the adapter uses rank_pattern"),
        ({"some_new_field": 1}, "the adapter uses some_new_field"),
        ({"r": 0}, "r 0; expected a whole number of at least 1"),
        ({"r": "2"}, "r '2'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan; expected a number"),
    ],
)
def test_an_adapter_that_cannot_be_merged_says_how(adapter, changes, message):
    (adapter / "adapter_config.json").write_text(json.dumps({**LORA, **changes}))
    assert message in refusal(adapter)


def test_a_pickled_adapter_is_refused_before_it_is_opened(adapter, pickled):
    (adapter / ADAPTER).unlink()
    shutil.copy(pickled, adapter / "adapter_model.bin")
    assert "its weights are in adapter_model.bin, a pickle" in refusal(adapter)


def test_an_adapter_next_to_a_whole_model_is_refused(adapter, folder):
    shutil.copy(folder / "model.safetensors", adapter)
    assert "holds a whole model and an adapter" in refusal(adapter)


def test_the_base_of_an_adapter_is_checked_as_any_model(adapter, folder):
    save_file(renamed("", "module.")(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert "All names begin with 'module.'" in refusal(adapter)
