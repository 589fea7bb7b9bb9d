"""What the training command refuses or leaves out, in one clear line, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
import transformers
from training_runs import run_finetune, without_plots

from qa_onnx.errors import InvalidInputError
from training import finetune, model, settings
from training.data import Collator
from training.starter import pretrain
from training.starter.sample import generate


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Drawing them takes longer than the training."""
    with without_plots():
        yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "starter", "--from-scratch", "gpt2"], "either --model or --from-scratch"),
        (["--from-scratch", "gpt2"], "--tokenizer"),
        (["--model", "starter", "--batch-size", "0"], "batch_size 0"),
        (["--model", "starter", "--limit-eval", "0"], "limit_eval 0"),
        (["--model", "starter", "--limit-train", "-1"], "limit_train -1"),
        (["--model", "starter", "--no-answer-share", "-0.1"], "no_answer_share -0.1"),
        (["--model", "starter", "--max-steps", "0"], "max_steps 0"),
        (["--model", "starter", "--learning-rate", "nan"], "learning_rate nan"),
        (["--model", "{missing}"], "no model could be loaded"),
        (["--model", "starter", "--train", "{broken}"], "not valid JSON at line 1"),
        (["--model", "starter", "--output", "{full}"], "not empty"),
        (["--model", "starter", "--output", "{broken}"], "is a file"),
        (["--model", "{pickled}"], "safetensors"),
        (["--model", "{bert}"], "'bert' model"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(arguments, message, tmp_path, tiny_model_dir, capsys):
    places = {name: tmp_path / name for name in ("missing", "broken", "full", "pickled", "bert")}
    places["broken"].write_text("{")
    places["full"].mkdir()
    (places["full"] / "thesis.txt").write_text("precious")
    places["pickled"].mkdir()
    (places["pickled"] / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    (places["pickled"] / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    places["bert"].mkdir()
    (places["bert"] / "config.json").write_text('{"model_type": "bert"}')
    options = {"--train": "sample", "--eval": "sample", "--output": str(tmp_path / "out")}
    given = [argument.format(**places) for argument in arguments]
    for name, value in options.items():
        given += [] if name in given else [name, value]
    assert run_finetune(*given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
    assert (places["full"] / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("vocabulary", [], r"tokenizer has 600 tokens and its model embeds 500"),
        ("no end-of-text", [], r"no <\|endoftext\|> among the 600 tokens of its model"),
        ("positions", [], r"no model could be loaded"),
        ("", ["--max-length", "300"], r"--max-length 300; the model has 256 positions"),
        ("", ["--pad-to", "512"], r"--pad-to 512; the model has 256 positions"),
        ("", ["--weights", "1", "2"], r"got 1 sources and 2 weights"),
        ("", ["--weights", "-1"], r"weights \[-1.0\]"),
        ("", ["--columns", "passage=context"], r"column 'passage=context'"),
        ("", ["--precision", "fp16"], r"fp16 needs a GPU"),
        ("", ["--packing", "--pad-to", "64"], r"do not go together"),
        ("", ["--label-smoothing", "1"], r"label_smoothing 1.0"),
    ],
)
def test_a_model_or_a_setting_that_cannot_be_is_refused(tiny_model_dir, tmp_path, capsys, change, options, message):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    config = json.loads((directory / "config.json").read_text())
    if change == "vocabulary":
        transformers.GPT2LMHeadModel(model.GPT2Config(**{**config, "vocab_size": 500})).save_pretrained(directory)
    if change == "positions":
        (directory / "config.json").write_text(json.dumps({**config, "n_positions": 512}))
    if change == "no end-of-text":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (directory / name).unlink()
        vocabulary = json.loads((directory / "tokenizer.json").read_text())
        vocabulary["added_tokens"] = []
        number = vocabulary["model"]["vocab"].pop("<|endoftext|>")
        vocabulary["model"]["vocab"]["<|end|>"] = number
        (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
    arguments = ["--model", directory, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, *options) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "options", "message"), [("1", [], "expected version 2"), ("2", ["--lora-rank", "4"], "without FSDP")]
)
def test_fsdp_that_could_not_be_evaluated_is_refused(tmp_path, monkeypatch, capsys, number, options, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", number)
    sources = ["--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune("--model", "starter", *sources, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_there_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "find_spec", lambda name: None)
    sources = ["--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune("--model", "starter", *sources, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_several_gpus_want_a_process_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sources = ["--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune("--model", "starter", *sources) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_checkpoints_of_something_else_are_left_alone(tiny_run, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-500" / "model.safetensors").write_text("precious")
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 2
    assert "checkpoint-500 is in it" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-500" / "model.safetensors").read_text() == "precious"


def test_questions_whose_answer_is_in_no_window_are_left_out_when_asked(tiny_model_dir, tmp_path, capsys):
    rows = [
        {"id": str(number), "context": " ".join(["word"] * 500 + ["Mara"]), "question": "Who?", "answer": answer}
        for number, answer in enumerate(("mara", "a town", " Mara\n"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", tiny_model_dir, "--train", tmp_path / "rows.jsonl", "--eval", "sample", "--limit-eval", 2]
    arguments += ["--output", tmp_path / "out", "--dry-run"]
    assert run_finetune(*arguments) == 2
    assert "question 1: its answer stands nowhere in its passage" in (error := capsys.readouterr().err)
    assert "1 of 3, with --skip-bad-rows" in error
    assert run_finetune(*arguments, "--skip-bad-rows") == 0
    assert "skipped 1 questions that do not fit, the first: question 1: its answer" in capsys.readouterr().err


def test_questions_that_cannot_fit_are_skipped_and_counted_when_asked(tiny_model_dir, tmp_path, capsys):
    data = generate("train", questions=20)
    pretrain.list_paragraphs(data)[0]["qas"][0].update(id="x7", question="why " * 300 + "?")
    (tmp_path / "data.json").write_text(json.dumps(data))
    arguments = ["--model", tiny_model_dir, "--train", tmp_path / "data.json", "--eval", "sample"]
    arguments += ["--limit-eval", 2, "--max-steps", 1, "--output", tmp_path / "out"]
    assert run_finetune(*arguments) == 2
    assert "question x7 has" in capsys.readouterr().err
    assert run_finetune(*arguments, "--skip-bad-rows") == 0
    assert "skipped 1 questions that do not fit, the first: question x7 has" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["train_questions"], metrics["questions_that_do_not_fit"]) == (19, 1)


def test_the_notebooks_recipe_pads_to_512_and_options_go_over_a_recipe(tiny_model_dir, tmp_path, capsys):
    parse = finetune.make_parser().parse_args
    shared = ["--model", "gpt2", "--train", "squad", "--eval", "squad", "--output", "out"]
    notebook = finetune.resolve_config(parse([*shared, "--recipe", "notebook"]))
    assert (notebook.optimization.batch_size, notebook.data.pad_to, notebook.data.loss_on) == (2, 512, "all")
    assert notebook.optimization.lr_scheduler_type == "linear"
    ours = finetune.resolve_config(parse([*shared, "--recipe", "gpt2-squad", "--epochs", "1"]))
    assert (ours.data.packing, ours.optimization.epochs) == (True, 1.0)
    assert (ours.optimization.learning_rate, ours.optimization.precision) == (6.25e-5, "auto")
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert Collator(pad_token_id=9, pad_to=512)(rows)["input_ids"].shape == (1, 512)


def test_a_dry_run_shows_what_there_is_and_touches_nothing(tiny_run, tmp_path, capsys):
    arguments = [*tiny_run, "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--dry-run", "--limit-train", 64, "--packing", "--max-length", 128) == 0
    output = capsys.readouterr().out
    assert re.search(r"rows: \d+ with \d+ questions \(\d+ of them about a part", output)
    assert re.search(r"padding: \d+\.\d%", output)
    assert len(re.findall(r"\n +\d+-\d+ +\d+ =*(?=\n)", output)) >= 12
    assert output.count("in the loss: '") == 3
    assert not (tmp_path / "out").exists()


def test_every_setting_is_an_option_with_its_default_and_its_range(tiny_run, tmp_path):
    lines = finetune.make_parser().format_help().splitlines()
    (example,) = [line for line in lines if line.startswith("  python -m training.finetune ")]
    assert finetune.resolve_config(finetune.make_parser().parse_args(example.split()[3:])).data.eval == "20%"
    text = " ".join(" ".join(lines).split())
    assert text.count("(required)") == 2  # --train and --output
    assert "optimization: --recipe NAME" in text
    for declared in (
        field for group in [*settings.GROUPS.values(), settings.FinetuneConfig] for field in fields(group)
    ):
        if declared.name not in settings.GROUPS:
            assert f"--{declared.name.replace('_', '-')} " in text
            if isinstance(declared.default, int | float | str) and not isinstance(declared.default, bool):
                assert f"(default: {declared.default})" in text
    given = finetune.make_parser().parse_args([str(one) for one in [*tiny_run, "--output", tmp_path / "out"]])
    config = finetune.resolve_config(given)
    assert config.to_dict()["batch_size"] == config.optimization.batch_size == 16
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        settings.FinetuneConfig.from_options({"model": "gpt2", "train": ("x",), "output": tmp_path, "batch": 3})
    with pytest.raises(InvalidInputError, match=r"got recipe 'mine'; expected one of gpt2-squad"):
        settings.FinetuneConfig.from_options({"model": "gpt2", "train": ("x",), "output": tmp_path, "recipe": "mine"})
