"""The weights of a checkpoint fit its configuration, or are refused; without PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_folder import (
    SETTINGS,
    accepted,
    change_config,
    having,
    refusal,
    renamed,
    save_file,
    tensors,
    without,
)


@pytest.mark.parametrize(
    ("change", "config", "messages"),
    [
        (renamed("", "_orig_mod."), {}, ["28 missing: wte.weight", "28 unknown", "All names begin with '_orig_mod.'"]),
        (renamed("", "module."), {}, ["All names begin with 'module.'", "take the prefix off the names"]),
        (renamed("transformer.", "model."), {}, ["All names begin with 'model.'"]),
        (renamed("", "base_model.model."), {}, ["All names begin with 'base_model.model.'"]),
        (renamed("transformer.h.", "transformer.layers."), {}, ["24 missing: transformer.h.0.", "24 unknown"]),
        (renamed("transformer.h.0", "h.0"), {}, ["12 missing: transformer.h.0.", "12 unknown: h.0.attn"]),
        (renamed("c_fc", "fc_in"), {}, ["4 missing: transformer.h.0.mlp.c_fc", "4 unknown: transformer.h.0.mlp.fc_in"]),
        (without("c_proj.weight"), {}, ["4 missing: transformer.h.0.attn.c_proj.weight"]),
        (without("wte", "wpe", ".h."), {}, ["26 missing: transformer.wte.weight"]),
        (without(".ln_f."), {}, ["2 missing: transformer.ln_f.weight, transformer.ln_f.bias."]),
        (without("."), {}, ["28 missing"]),
        (without(), {"n_layer": 3}, ["12 missing: transformer.h.2.attn.c_attn.weight"]),
        (without(), {"n_layer": 1}, ["12 unknown: transformer.h.1."]),
        (without(), {"n_layer": 0}, ["n_layer 0; expected a whole number from 1 to"]),
        (without(), {"n_layer": -1}, ["n_layer -1; expected a whole number from 1 to"]),
        (without(), {"n_positions": 64}, ["1 of another shape: transformer.wpe.weight [32, 4] instead of [64, 4]"]),
        (without(), {"vocab_size": 9000}, ["transformer.wte.weight [8192, 4] instead of [9000, 4]"]),
        (without(), {"n_embd": 8}, ["28 of another shape"]),
        (without(), {"n_inner": 12}, ["transformer.h.0.mlp.c_fc.weight [4, 16] instead of [4, 12]"]),
        (having("transformer.h.0.attn.c_attn.weight", (12, 4)), {}, ["[12, 4] instead of [4, 12]"]),
        (having("transformer.h.0.ln_1.bias", (4,), np.int8), {}, ["1 no floating-point numbers", "ln_1.bias I8"]),
        (having("transformer.h.0.attn.q.weight"), {}, ["1 unknown: transformer.h.0.attn.q.weight"]),
        (having("transformer.h.2.attn.bias"), {}, ["1 unknown: transformer.h.2.attn.bias"]),  # of no layer
        (having("lm_head.weight"), {}, ["lm_head.weight [4, 4] instead of [8192, 4]"]),
        (having("lm_head.bias"), {}, ["1 unknown: lm_head.bias"]),
        (without(), {"tie_word_embeddings": False}, ["1 missing: lm_head.weight"]),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(folder, change, config, messages):
    change_config(folder, **config)
    save_file(change(tensors()), folder / "model.safetensors")
    message = refusal(folder)
    for part in messages:
        assert part in message


@pytest.mark.parametrize(
    "change",
    [
        without(),
        renamed("transformer.", ""),  # as `gpt2` is stored on the hub
        having("lm_head.weight", (8192, 4)),
        having("transformer.h.0.attn.bias", (1, 1, 32, 32), np.uint8),
        having("transformer.h.1.attn.masked_bias", ()),
        lambda found: having("h.1.attn.bias", (1, 1, 32, 32))(renamed("transformer.", "")(found)),
        lambda found: {name: tensor.astype(np.float16) for name, tensor in found.items()},
        lambda found: {name: tensor.astype(np.float64) for name, tensor in found.items()},
    ],
)
def test_weights_that_fit_are_found_by_their_names(folder, change):
    stored = change(tensors())
    save_file(stored, folder / "model.safetensors")
    found = accepted(folder)
    assert found.keys() - {"lm_head.weight"} == SETTINGS.shapes().keys()
    assert set(found.values()) == {name for name in stored if not name.endswith((".attn.bias", "masked_bias"))}
