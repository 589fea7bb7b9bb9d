"""Checkpoints of every layout and attention give transformers' model; what is not a number is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations import hub_kernels

from export import decoder
from export.to_onnx import export
from qa_onnx import Answerer, InvalidInputError
from qa_onnx.checkpoint import load_checkpoint, settings
from qa_onnx.data.squad import parse_squad
from training.data import Collator, RowSettings, tokenize
from training.evaluation import generate_answers
from training.model import load_model
from training.starter.sample import generate


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def examples():
    return parse_squad(generate("train", questions=20), source="sample")


def logits_of(model):
    with torch.inference_mode():
        return model(torch.arange(1, 200).reshape(1, -1)).logits


def change_weights(folder, change, *, metadata=None):
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, metadata=metadata)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- layouts -------------------------------------------------------------------------------------------------------


def as_base_model(folder):
    """Without `transformer.`, with attention masks and without architectures: as `gpt2` is stored on the hub."""

    def change(weights):
        masks = {f"h.{layer}.attn.bias": torch.ones(256, 256).tril().reshape(1, 1, 256, 256) for layer in range(2)}
        return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()} | masks

    change_weights(folder, change)
    change_config(folder, architectures=["GPT2LMHeadModel"], n_ctx=256, task_specific_params={"text-generation": {}})


def with_a_tied_head(folder):
    change_weights(folder, lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()})


def with_old_masks(folder):
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8)}
    masks["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    change_weights(folder, lambda weights: weights | masks, metadata={"format": "pt"})


def in_shards(folder):
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def without_metadata(folder):
    change_weights(folder, lambda weights: weights)


def with_only_old_tokenizer_files(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def in_the_hubs_cache(folder):
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(f"../../blobs/{number:064x}")
    (folder.parent / "snapshots").mkdir()
    folder.rename(folder.parent / "snapshots" / "model")
    folder.symlink_to("snapshots/model")


LAYOUTS = [
    as_base_model,
    with_a_tied_head,
    with_old_masks,
    in_shards,
    without_metadata,
    with_only_old_tokenizer_files,
    in_the_hubs_cache,
]


@pytest.mark.parametrize("change", LAYOUTS)
def test_a_model_of_any_layout_is_loaded_as_it_was(folder, tiny_model_dir, reference, change):
    change(folder)
    model, tokenizer = load_model(str(folder))
    assert model.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    assert torch.equal(logits_of(model), logits_of(reference))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.eos_token_id == tokenizer.eos_token_id == reference.config.eos_token_id
    text = " Zoë's 7 words,\n<|endoftext|>"
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert ids == load_model(str(tiny_model_dir))[1].backend_tokenizer.encode(text).ids
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_width_are_loaded_as_float32(folder, reference, dtype):
    change_weights(folder, lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()})
    change_config(folder, dtype=str(dtype).removeprefix("torch."))
    model, _ = load_model(str(folder))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, reference.state_dict()[name].to(dtype).float()), name


def test_a_fine_tuned_model_is_saved_and_loaded_as_it_was(folder, tmp_path):
    model, tokenizer = load_model(str(folder), dropout=0.25)
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0.25, 0.25, 0.25)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, other = load_model(str(tmp_path / "saved"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.config.attn_pdrop == 0.25
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "saved").config.architectures == ["GPT2LMHeadModel"]


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_model(str(folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_output_weights_of_their_own_are_kept_only_where_the_config_says_so(folder, tmp_path):
    torch.manual_seed(1)
    config = GPT2Config.from_pretrained(folder, tie_word_embeddings=False)
    untied = GPT2LMHeadModel(config).eval()
    untied.save_pretrained(folder)
    model, _ = load_checkpoint(folder)
    assert torch.equal(logits_of(model), logits_of(untied))
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    export(str(folder), tmp_path / "bundle")  # the gate compares it with PyTorch
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(InvalidInputError, match=r"lm_head\.weight differs from the token embedding"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.1.ln_2.bias", "transformer.h.0.mlp.c_fc.weight"]
)
def test_weights_that_are_no_numbers_are_refused_by_name(folder, value, name):
    def change(weights):
        weights[name].view(-1)[-1] = value
        return weights

    change_weights(folder, change)
    with pytest.raises(InvalidInputError, match=f"1 of its tensors.* NaN or infinite: {name.split('.', 1)[1]}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_no_float32_numbers_are_refused(folder, dtype):
    def change(weights):
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        for name in ("transformer.wpe.weight", "transformer.ln_f.bias"):
            weights[name].view(-1)[0] = 1e300 if dtype == torch.float64 else float("nan")
        return weights

    change_weights(folder, change)
    with pytest.raises(InvalidInputError, match=r"2 of its tensors .*: wpe.weight, ln_f.bias"):
        load_model(str(folder))


# -- attention -----------------------------------------------------------------------------------------------------

ATTENTIONS = [
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"reorder_and_upcast_attn": True},
    {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
]


@pytest.mark.parametrize("fields", ATTENTIONS)
def test_trained_and_answered_is_what_the_config_says(folder, tmp_path, reference, examples, fields):
    change_config(folder, **fields)
    model, tokenizer = load_model(str(folder))
    eager = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    torch.testing.assert_close(logits_of(model), logits_of(eager), atol=1e-4, rtol=1e-4)
    if fields != {"reorder_and_upcast_attn": True}:  # which changes only how it is rounded
        assert (logits_of(model) - logits_of(reference)).abs().max() > 0.1

    losses = []
    for network, packing in ((model, False), (model, True), (eager, False)):
        rows = list(tokenize(examples, tokenizer, RowSettings(max_positions=256, packing=packing)))
        assert (max(row["length"] for row in rows) > model.config.n_positions) == packing
        counted = sum(label != -100 for row in rows for label in row["labels"])
        batch = Collator(pad_token_id=0, packing=packing)(rows)
        network.zero_grad()
        loss = network(**batch, num_items_in_batch=counted).loss
        loss.backward()
        losses.append((loss.item(), [parameter.grad.clone() for parameter in network.parameters()]))
    for loss, gradients in losses[1:]:
        assert loss == pytest.approx(losses[0][0], abs=1e-4)
        for ours, theirs in zip(losses[0][1], gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)

    together = generate_answers(model, tokenizer, examples, max_new_tokens=8, progress=False)
    alone = generate_answers(model, tokenizer, examples, max_new_tokens=8, batch_size=1, progress=False)
    assert together == alone
    if len(fields) == 1 and "scale_attn_weights" not in fields:
        return  # an export takes seconds: `tests/integration/test_models.py` has one, and all fields together here
    export(str(folder), tmp_path / "bundle")
    with Answerer.from_pretrained(tmp_path / "bundle", provider="cpu") as answerer:
        answers = answerer.answer_batch(
            [example.question for example in examples], [example.context for example in examples], max_new_tokens=8
        )
    assert {example.id: answer.text for example, answer in zip(examples, answers, strict=True)} == together


def test_every_activation_that_is_loaded_can_be_exported():
    assert set(settings.ACTIVATIONS) == set(decoder.ACTIVATIONS)


# -- code ----------------------------------------------------------------------------------------------------------

ACTING_FIELDS = [
    {"_attn_implementation": "evil/kernel"},
    {"_attn_implementation_internal": "evil/kernel"},
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation_internal": "evil/kernel@main:function"},
    {"_experts_implementation": "evil/kernel", "_attn_implementation_autoset": True},
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "custom_pipelines": {"x": {}}},
    {"_name_or_path": "evil/model", "use_kernels": True},
]


@pytest.mark.parametrize("fields", ACTING_FIELDS)
def test_no_field_of_a_config_asks_for_code(folder, tmp_path, monkeypatch, examples, fields):
    """CVE-2026-4372: transformers imports a kernel of the hub that the config names, where `kernels` is installed."""
    asked = []

    def get_kernel(repository, *arguments, **options):
        asked.append(repository)
        raise RuntimeError(f"would run code of {repository}")

    stand_in = types.ModuleType("kernels")
    stand_in.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel, raising=False)
    monkeypatch.setattr(hub_kernels, "_kernels_available", True)
    change_config(folder, **fields)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model, tokenizer = load_model(str(folder))
    generate_answers(model, tokenizer, examples[:1], max_new_tokens=1, progress=False)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    load_checkpoint(folder)
    if fields == ACTING_FIELDS[0]:  # the export loads with `load_checkpoint`, and takes seconds
        export(str(folder), tmp_path / "bundle", keep_optimum=True)
    for path in tmp_path.glob("[sb]*/config.json"):
        assert "evil" not in path.read_text()
    assert asked == []
    assert not (tmp_path / "ran").exists()


# -- adapters ------------------------------------------------------------------------------------------------------


def make_adapter(base, path, **options):
    """An adapter of PEFT with matrices that are not zero, and the model that it makes of its base."""
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "fan_in_fan_out": True, **options}
    adapted = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**options, init_lora_weights=False))
    adapted.save_pretrained(path)
    return adapted.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
        {"target_modules": ["mlp.c_proj"], "layers_to_transform": [1], "r": 1},
        {"target_modules": "all-linear", "task_type": None, "lora_dropout": 0.5},
    ],
)
def test_an_adapter_is_merged_into_its_base(folder, tmp_path, reference, options):
    adapted = make_adapter(folder, tmp_path / "adapter", **options)
    model, _ = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(model), logits_of(adapted), atol=1e-3, rtol=1e-4)
    assert (logits_of(model) - logits_of(reference)).abs().max() > 0.1
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("place", ["../model", "model", "{folder}", "someone/base"])
def test_the_base_of_an_adapter_is_found(folder, tmp_path, monkeypatch, place):
    """Relative to the adapter or to the working directory, by an absolute path, or in the hub's cache."""
    adapted = make_adapter(folder, tmp_path / "adapter", target_modules=["c_attn"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": place.format(folder=folder)})
    )
    if place == "model":
        monkeypatch.chdir(tmp_path)
    if place == "someone/base":
        cache = tmp_path / "hub"
        snapshot = cache / "models--someone--base" / "snapshots" / ("0" * 40)
        snapshot.parent.mkdir(parents=True)
        folder.rename(snapshot)
        (cache / "models--someone--base" / "refs").mkdir()
        (cache / "models--someone--base" / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    model, _ = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(model), logits_of(adapted), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["c_attn"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["c_attn"], "modules_to_save": ["wpe"]}, "modules_to_save"),
        ({"target_modules": ["wte"]}, "expected LoRA's of the matrices"),
        ({"target_modules": ["c_attn"], "bias": "lora_only"}, "bias"),
        ({"target_modules": ["c_attn"], "rank_pattern": {"h.0.attn.c_attn": 2}}, "rank_pattern"),
    ],
)
def test_an_adapter_of_more_than_lora_says_how_to_merge_it(folder, tmp_path, options, message):
    make_adapter(folder, tmp_path / "adapter", **options)
    with pytest.raises(InvalidInputError, match="merge_and_unload") as refused:
        load_checkpoint(tmp_path / "adapter")
    assert message in str(refused.value)


def test_an_adapter_of_another_base_or_with_nan_is_refused(folder, tmp_path):
    adapted = make_adapter(folder, tmp_path / "adapter", target_modules=["c_attn"])
    assert isinstance(adapted, PeftModel)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    for change, message in (
        (lambda tensor: torch.cat([tensor, tensor], dim=1), "the adapter's matrices for h.0.attn.c_attn.weight"),
        (lambda tensor: tensor * float("nan"), "2 of its tensors .* NaN or infinite: h.0.attn.c_attn.weight"),
    ):
        save_file({name: change(tensor).contiguous() for name, tensor in weights.items()}, path)
        with pytest.raises(InvalidInputError, match=message):
            load_checkpoint(tmp_path / "adapter")
    save_file({}, path)
    with pytest.raises(InvalidInputError, match="has no tensors"):
        load_checkpoint(tmp_path / "adapter")


def test_a_downloaded_model_is_fetched_without_pickles_or_code(folder, monkeypatch):
    asked = {}

    def snapshot_download(repository, *, revision, allow_patterns, **options):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_checkpoint("someone/model")
    assert (asked["repository"], asked["revision"]) == ("someone/model", None)
    assert {os.path.splitext(name)[1] for name in asked["patterns"]} == {".json", ".safetensors", ".txt"}  # noqa: PTH122
