"""Fine-tuning from the command line: what a run writes, and that each setting has its effect."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import run_finetune, without_plots

from qa_onnx.evaluation.metrics import Scores
from tests.conftest import ROOT
from training import finetune, model, report, trainer
from training import plots as plots_module


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


@pytest.fixture(scope="module")
def finetuned(tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetuned") / "model"
    arguments = [*tiny_run, "--output", output]
    options = ["--max-steps", 2, "--limit-train", 64, "--limit-eval", 8, "--eval-at-start", "--learning-rate", 1e-3]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "to_png", plots_module.to_png)
        assert run_finetune(*arguments, *options) == 0
    return output


def test_a_run_writes_weights_tokenizer_settings_and_metrics_and_no_pickle(finetuned, tiny_model_dir):
    names = {path.name for path in finetuned.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_config.json", "metrics.json"} <= names
    assert {"history.csv", "predictions.json", "report.md", "README.md", "training.png", "lengths.png"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "checkpoint" in name]
    assert not [name for name in names if "best" in name or "unfinished" in name]
    settings = json.loads((finetuned / "training_config.json").read_text())
    assert settings["learning_rate"] == 1e-3
    assert settings["package_versions"]["torch"] == torch.__version__
    metrics = json.loads((finetuned / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert [row["step"] for row in metrics["evaluations"]] == [0, 2]
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, finetuned))
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert json.loads((finetuned / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_the_same_seed_gives_the_same_weights(finetuned, tiny_run, tmp_path):
    output = tmp_path / "again"
    arguments = [*tiny_run, "--output", output]
    run_finetune(*arguments, "--max-steps", 2, "--limit-train", 64, "--limit-eval", 8, "--learning-rate", 1e-3)
    first, second = (load_file(path / "model.safetensors") for path in (finetuned, output))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_precision_asked_for_goes_over_that_of_a_launcher(tiny_run, tmp_path, monkeypatch):
    found = []
    for left in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", left)
        arguments = [*tiny_run, "--output", tmp_path / left]
        assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0
        found.append(json.loads((tmp_path / left / "metrics.json").read_text())["losses"])
    assert found[0] == found[1]


def test_bfloat16_trains_and_saves_fp32(tiny_run, tmp_path):
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    options = ["--precision", "bf16", "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2]
    assert run_finetune(*arguments, *options) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"].dtype == torch.float32


def test_random_weights_of_a_named_architecture_train_and_are_seeded(tiny_model_dir, tmp_path, monkeypatch):
    small = model.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=256)
    monkeypatch.setitem(model.ARCHITECTURES, "gpt2", small)
    for name in ("a", "b"):
        arguments = ["--from-scratch", "gpt2", "--tokenizer", tiny_model_dir, "--output", tmp_path / name]
        limits = ["--max-steps", 1, "--limit-train", 8, "--limit-eval", 2]
        assert run_finetune(*arguments, "--train", "sample", "--eval", "sample", *limits) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["vocab_size"] == 600


def test_the_named_architecture_is_gpt2_itself():
    config = model.ARCHITECTURES["gpt2"]
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions, config.vocab_size) == (
        12,
        12,
        768,
        1024,
        50257,
    )


def test_lora_trains_thin_matrices_and_leaves_a_plain_model(tiny_model_dir, tiny_run, tmp_path):
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    options = ["--lora-rank", 4, "--learning-rate", 0.01, "--max-steps", 3, "--limit-train", 64, "--limit-eval", 4]
    assert run_finetune(*arguments, *options) == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    assert not list((tmp_path / "out").glob("adapter*"))


def test_the_best_weights_are_kept_and_a_run_stops_that_does_not_get_better(tiny_run, tmp_path, monkeypatch):
    """Scores 10, 30, 20, 20: the second evaluation's weights are the model, and the fourth is the last."""
    scores, weights = iter([10.0, 30.0, 20.0, 20.0, 90.0]), {}
    real = trainer.GenerationTrainer.evaluate

    def evaluate(self):
        weights[self.state.global_step] = self.model.transformer.wte.weight.detach().clone()
        return real(self)

    monkeypatch.setattr(trainer.GenerationTrainer, "evaluate", lambda self, *_, **__: evaluate(self))
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Scores(exact_match=0.0, f1=next(scores), total=4))
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    options = [
        "--eval-steps",
        2,
        "--early-stopping-patience",
        2,
        "--limit-train",
        320,
        "--limit-eval",
        4,
        "--save-steps",
        3,
    ]
    assert run_finetune(*arguments, *options) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["f1"] for row in metrics["evaluations"]] == [10.0, 30.0, 20.0, 20.0]
    assert (metrics["best_step"], metrics["steps"], metrics["f1"]) == (4, 8, 30.0)
    saved = load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(saved, weights[4])
    assert not torch.equal(saved, weights[8])


def test_a_loss_that_is_no_number_ends_the_run_with_the_batch_and_the_last_checkpoint(tiny_run, tmp_path, capsys):
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    options = ["--learning-rate", 1e18, "--warmup-ratio", 0, "--save-steps", 1, "--limit-train", 64, "--limit-eval", 2]
    assert run_finetune(*arguments, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"the loss is (nan|inf) after step 1", error)
    assert str(tmp_path / "out" / "checkpoint-1") in error
    batch = load_file(tmp_path / "out" / "bad-batch-0.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape


def test_out_of_memory_names_the_settings_to_lower(tiny_run, tmp_path, capsys, monkeypatch):
    def forward(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model.GPT2LMHeadModel, "forward", forward)
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--limit-train", 64, "--limit-eval", 2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--batch-size 16" in error
    assert "a smaller --micro-batch-tokens, which trains the same" in error


def test_settings_of_training_reach_the_optimizer(tiny_run, tmp_path, monkeypatch):
    made = []

    def stop_at_once(trainer, config, checkpoint):
        made.append(trainer)
        trainer.stop.stopped = True

    monkeypatch.setattr(finetune, "_train", stop_at_once)
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    options = [
        "--weight-decay",
        0.1,
        "--lr-scheduler-type",
        "linear",
        "--warmup-ratio",
        0.5,
        "--label-smoothing",
        0.1,
        "--dropout",
        0.2,
    ]
    options += ["--gradient-accumulation", 2, "--limit-train", 64, "--limit-eval", 2, "--packing", "--batch-size", 4]
    assert run_finetune(*arguments, *options) == 130
    trained = made[0]
    trained.create_optimizer_and_scheduler(10)
    names = {id(parameter): name for name, parameter in trained.model.named_parameters()}
    groups = trained.optimizer.param_groups
    decayed = {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert decayed.keys() == {0.1, 0.0}
    assert decayed[0.0] == {name for name in names.values() if name.endswith("bias") or ".ln_" in name}
    rates = []
    for _ in range(10):
        rates.append(trained.lr_scheduler.get_last_lr()[0] / 5e-5)
        trained.lr_scheduler.step()
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert trained.model.label_smoothing == 0.1
    assert trained.model.transformer.h[0].attn.attn_dropout.p == trained.model.transformer.drop.p == 0.2
    assert trained.args.gradient_accumulation_steps == 2
    assert len(trained.get_train_dataloader()) < 64 / 4


def test_less_memory_and_accumulated_batches_give_the_same_model(tiny_run, tmp_path):
    """Four rows at once, or two by two with activations computed again."""
    found = []
    for name, options in (("a", ["--batch-size", 4]), ("b", ["--batch-size", 2, "--gradient-accumulation", 2])):
        arguments = [*tiny_run, "--output", tmp_path / name]
        more = ["--gradient-checkpointing"] if name == "b" else []
        shared = ["--limit-train", 4, "--limit-eval", 2, "--max-steps", 1, "--dropout", 0, "--warmup-ratio", 0]
        assert run_finetune(*arguments, *options, *more, *shared) == 0
        found.append(load_file(tmp_path / name / "model.safetensors"))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-5, rtol=1e-4)


def test_tensorboard_gets_its_files_when_asked(tiny_run, tmp_path):
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--tensorboard", "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0
    assert list((tmp_path / "out" / "tensorboard").rglob("events.out.tfevents*"))


def test_the_report_and_the_card_say_what_was_done(finetuned):
    report, card = ((finetuned / name).read_text() for name in ("report.md", "README.md"))
    for words in ("## Data", "sha256", "## The worst answers", "torch 2.", "learning_rate | `0.001`", "CPU cores"):
        assert words in report
    loaded = ModelCard(card)
    assert {result.metric_type for result in loaded.data.eval_results} == {"exact_match", "f1"}
    assert loaded.data.pipeline_tag == "text-generation"
    history = list(csv.DictReader((finetuned / "history.csv").open()))
    assert [row["step"] for row in history] == ["0", "1", "2"]
    assert history[0]["f1"]
    assert float(history[1]["loss"]) > 0
    assert all((finetuned / name).stat().st_size > 5000 for name in ("training.png", "lengths.png"))


def test_a_hub_id_is_loaded_from_the_hubs_cache(tiny_model_dir, tmp_path):
    """The hub cannot be reached here: a cache as the hub's own client lays it out replaces it."""
    repository = tmp_path / "hub" / "models--gpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_model_dir, repository / "snapshots" / ("0" * 40))
    options = ["--train", "sample", "--eval", "sample", "--limit-train", "8", "--limit-eval", "2", "--max-steps", "1"]
    subprocess.run(
        [sys.executable, "-m", "training.finetune", "--model", "gpt2", *options, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
    )
    settings = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert (settings["model"], settings["learning_rate"]) == ("gpt2", 5e-5)


@pytest.mark.parametrize("options", [[], ["--lora-rank", 2]])
def test_what_is_evaluated_is_computed_in_the_precision_that_is_saved(tiny_run, tmp_path, monkeypatch, options):
    """Training in bf16, answers in fp32: plain weights and merged ones alike."""
    seen = set()
    real = model.GPT2LMHeadModel.forward

    def forward(self, *arguments, **inputs):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return real(self, *arguments, **inputs)

    monkeypatch.setattr(model.GPT2LMHeadModel, "forward", forward)
    arguments = [*tiny_run, "--output", tmp_path / "out", "--precision", "bf16", *options]
    assert run_finetune(*arguments, "--eval-at-start", "--max-steps", 2, "--limit-train", 32, "--limit-eval", 2) == 0
    assert seen == {(True, True), (False, False)}


@pytest.mark.parametrize("packing", [[], ["--packing"]])
def test_a_batch_in_parts_trains_the_same(tiny_run, tmp_path, monkeypatch, packing):
    """The losses of both steps, the second after a step of the optimizer; and no part has more tokens than it may."""
    sizes, losses = [], []
    real = model.GPT2LMHeadModel.forward

    def forward(self, *arguments, **inputs):
        if self.training:
            sizes.append(inputs["input_ids"].shape)
        return real(self, *arguments, **inputs)

    monkeypatch.setattr(model.GPT2LMHeadModel, "forward", forward)
    for name, more in (("whole", []), ("parts", ["--micro-batch-tokens", 600])):
        sizes.clear()
        arguments = [*tiny_run, "--output", tmp_path / name, *packing, *more]
        options = ["--max-steps", 2, "--batch-size", 8, "--dropout", 0, "--limit-eval", 2, "--learning-rate", 1e-2]
        assert run_finetune(*arguments, *options, "--warmup-ratio", 0) == 0
        losses.append([loss for _, loss in json.loads((tmp_path / name / "metrics.json").read_text())["losses"]])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert len(sizes) > 2
    assert all(rows * tokens <= 600 for rows, tokens in sizes)
