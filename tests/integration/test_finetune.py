"""Fine-tuning from the command line: what it learns from, what it writes, how it stops and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from safetensors.torch import load_file

from qa_onnx.errors import InvalidInputError, PromptTooLongError
from qa_onnx.prompt import PROMPT_TEMPLATE
from qa_onnx.squad import Example, GoldAnswer, parse_squad
from qa_onnx.windows import encode_windows
from tests.conftest import ROOT
from training import data, finetune, model
from training.data import Collator, load_examples, target_answer, tokenize
from training.starter.sample import generate, with_unanswerable


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return model.load_tokenizer(tiny_model_dir)


def example(**changes):
    values = {
        "id": "q",
        "title": "",
        "context": "Mara founded Tolvik in 1803.",
        "question": "Who founded Tolvik?",
        "answers": (GoldAnswer(text="Mara", start=0),),
    }
    return Example(**{**values, **changes})


def test_a_row_is_prompt_answer_end_of_text_and_only_the_answer_counts(tokenizer):
    row = tokenize([example()], tokenizer, loss_on="answer", max_positions=256)[0]
    text = tokenizer.backend_tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    prompt = PROMPT_TEMPLATE.format(context=example().context, question=example().question)
    assert text == f"{prompt} Mara<|endoftext|>"
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.backend_tokenizer.decode(counted, skip_special_tokens=False) == " Mara<|endoftext|>"
    assert row["length"] == len(row["input_ids"])


def test_loss_on_all_counts_every_token(tokenizer):
    row = tokenize([example()], tokenizer, loss_on="all", max_positions=256)[0]
    assert row["labels"] == row["input_ids"]


def test_an_unanswerable_question_trains_the_end_of_text_alone(tokenizer):
    row = tokenize([example(answers=())], tokenizer, loss_on="answer", max_positions=256)[0]
    assert [label for label in row["labels"] if label != -100] == [tokenizer.eos_token_id]


def test_many_gold_answers_make_one_row_with_the_most_given_one():
    answers = tuple(GoldAnswer(text=text, start=0) for text in ("Mara", "Mara V.", "Mara V."))
    assert target_answer(example(answers=answers)) == GoldAnswer(text="Mara V.", start=0)


@pytest.mark.parametrize("place", [0, 40, 79])
def test_a_long_passage_is_trained_on_in_the_windows_it_is_answered_in(tokenizer, place):
    words = [f"word{index}" for index in range(80)]
    words[place] = "Zanzibar"
    context = " ".join(words)
    long = example(context=context, answers=(GoldAnswer(text="Zanzibar", start=context.index("Zanzibar")),))
    rows = tokenize([long], tokenizer, loss_on="answer", max_positions=160)
    windows = encode_windows(
        tokenizer.backend_tokenizer, [long.question], [context], max_positions=160, max_new_tokens=32, stride=128
    )[0]
    assert len(rows) == len(windows) > 2
    for row, window in zip(rows, windows, strict=True):
        assert row["input_ids"][: len(window.prompt)] == window.prompt.ids
        answer = tokenizer.backend_tokenizer.decode(row["input_ids"][len(window.prompt) : -1])
        assert answer == (" Zanzibar" if "Zanzibar" in window.text else "")
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= 160


def test_an_answer_in_other_words_is_trained_on_once(tokenizer):
    context = " ".join(f"word{index}" for index in range(80))
    long = example(context=context, answers=(GoldAnswer(text="Zanzibar", start=0),))
    assert len(tokenize([long], tokenizer, loss_on="answer", max_positions=160)) == 1


def test_a_question_that_cannot_fit_is_named(tokenizer):
    with pytest.raises(PromptTooLongError, match=r"question 0 has \d+ tokens.*Shorten"):
        tokenize([example(question="why " * 300 + "?")], tokenizer, loss_on="answer", max_positions=256)


def test_batches_are_padded_to_their_longest_row():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = Collator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_squad_from_the_hub_is_read_as_examples(monkeypatch):
    """The hub cannot be reached here: a local data set of the same columns stands in for it."""
    rows = [{"id": "1", "title": "T", "context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": [0]}}]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    expected = Example(id="1", title="T", context="c", question="q", answers=(GoldAnswer(text="c", start=0),))
    assert load_examples("squad", "train") == load_examples("squad", "eval") == [expected]
    assert load_examples("squad_v2", "train") == [expected]
    assert asked == [
        ("rajpurkar/squad", "train"),
        ("rajpurkar/squad", "validation"),
        ("rajpurkar/squad_v2", "train"),
    ]


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(InvalidInputError, match=r"no route.*SQuAD JSON file"):
        load_examples("squad", "train")


def test_sample_is_the_same_each_time_and_its_parts_share_no_answer():
    train, heldout = generate("train", questions=3000), generate("heldout", questions=600)
    assert train == generate("train", questions=3000)
    assert train != generate("train", questions=3000, seed=1)
    answers = [
        {answer.text for example in parse_squad(part, source="sample") for answer in example.answers}
        for part in (train, heldout)
    ]
    assert len(answers[1]) > 300
    assert not answers[0] & answers[1]


def test_every_answer_of_sample_stands_where_it_says():
    for part in ("train", "heldout"):
        for made in parse_squad(generate(part, questions=500), source="sample"):
            answer = made.answers[0]
            assert made.context[answer.start : answer.start + len(answer.text)] == answer.text


def test_sample_v2_asks_a_third_of_its_questions_where_there_is_no_answer():
    data = generate("heldout", questions=300)
    examples = parse_squad(with_unanswerable(data), source="sample_v2")
    golds = {example.id: example.answers for example in parse_squad(data, source="sample")}
    assert {example.id for example in examples} == golds.keys()
    without = [example for example in examples if not example.answers]
    assert 0.25 < len(without) / len(examples) < 0.35
    assert not any(answer.text in example.context for example in without for answer in golds[example.id])
    assert all(example.answers == golds[example.id] for example in examples if example.answers)


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finetuned(tiny_model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetuned") / "model"
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", output]
    status = run_finetune(
        *arguments, "--max-steps", 2, "--limit-train", 64, "--limit-eval", 8, "--eval-at-start", "--learning-rate", 1e-3
    )
    assert status == 0
    return output


def test_a_run_writes_weights_tokenizer_settings_and_metrics_and_no_pickle(finetuned, tiny_model_dir):
    names = {path.name for path in finetuned.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_config.json", "metrics.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "checkpoint" in name]
    settings = json.loads((finetuned / "training_config.json").read_text())
    assert settings["learning_rate"] == 1e-3
    assert settings["package_versions"]["torch"] == torch.__version__
    metrics = json.loads((finetuned / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert [row["step"] for row in metrics["evaluations"]] == [0, 2]
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, finetuned))
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert json.loads((finetuned / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_the_same_seed_gives_the_same_weights(finetuned, tiny_model_dir, tmp_path):
    output = tmp_path / "again"
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", output]
    run_finetune(*arguments, "--max-steps", 2, "--limit-train", 64, "--limit-eval", 8, "--learning-rate", 1e-3)
    first, second = (load_file(path / "model.safetensors") for path in (finetuned, output))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_trains_and_saves_fp32(tiny_model_dir, tmp_path):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--bf16", "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "starter", "--from-scratch", "gpt2"], "either --model or --from-scratch"),
        (["--from-scratch", "gpt2"], "--tokenizer"),
        (["--model", "starter", "--batch-size", "0"], "batch_size 0"),
        (["--model", "starter", "--limit-eval", "0"], "limit_eval 0"),
        (["--model", "starter", "--limit-train", "-1"], "limit_train -1"),
        (["--model", "starter", "--max-steps", "0"], "max_steps 0"),
        (["--model", "starter", "--learning-rate", "nan"], "learning_rate nan"),
        (["--model", "{missing}"], "no model could be loaded"),
        (["--model", "starter", "--train", "{broken}"], "not valid JSON at line 1"),
        (["--model", "starter", "--resume"], "no checkpoint"),
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


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint_and_resumes_to_the_same_weights(tiny_model_dir, tmp_path, number):
    def command(name, *more):
        options = ["--train", "sample", "--eval", "sample", "--epochs", "1", "--save-steps", "1000"]
        options += ["--limit-train", "960", "--limit-eval", "4"]
        places = ["--model", str(tiny_model_dir), "--output", str(tmp_path / name)]
        return [sys.executable, "-u", "-m", "training.finetune", *places, *options, *more]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command("stopped"), cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in process.stdout:  # the first log line comes after 20 of 60 steps
            if "'loss'" in line:
                break
        time.sleep(0.1)
        process.send_signal(number)
        rest = process.stdout.read()
        assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert "--resume" in rest
    checkpoints = list((tmp_path / "stopped").glob("checkpoint-*"))
    assert len(checkpoints) == 1
    assert 20 <= int(checkpoints[0].name.split("-")[1]) < 60
    (tmp_path / "stopped" / "checkpoint-999").mkdir()  # as a kill in the middle of saving leaves it
    other = subprocess.run(
        command("stopped", "--resume", "--batch-size", "8"), cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert (other.returncode, "batch_size was 16, is 8" in other.stderr) == (2, True)
    settings = tmp_path / "stopped" / "training_config.json"
    settings.rename(tmp_path / "elsewhere")
    other = subprocess.run(command("stopped", "--resume"), cwd=ROOT, check=False, capture_output=True, text=True)
    assert (other.returncode, "training_config.json cannot be read" in other.stderr) == (2, True)
    (tmp_path / "elsewhere").rename(settings)
    subprocess.run(command("stopped", "--resume"), cwd=ROOT, check=True, capture_output=True)
    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True)
    stopped, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("stopped", "whole")]
    assert [row["step"] for row in metrics[0]["evaluations"]] == [row["step"] for row in metrics[1]["evaluations"]]


def test_a_run_that_was_killed_before_its_first_checkpoint_can_start_again(tiny_model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training_config.json").write_text("{}")
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0


def test_a_hub_id_is_loaded_from_the_hubs_cache(tiny_model_dir, tmp_path):
    """The hub cannot be reached here: a cache as the hub's own client lays it out stands in for it."""
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
