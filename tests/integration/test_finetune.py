"""Fine-tuning from the command line: what it learns from, what it writes, how it stops and goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from export.to_onnx import export
from qa_onnx import Answerer
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import PromptTooLongError
from qa_onnx.evaluation.metrics import Scores
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from qa_onnx.text.windows import encode_windows
from tests.conftest import ROOT
from training import finetune, model, trainer
from training.checkpoints import good_checkpoints
from training.data import Collator, LengthGroupedSampler, RowSettings, cached_rows, target_answer, tokenize
from training.starter import pretrain
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
    row = tokenize([example()], tokenizer, RowSettings(max_positions=256))[0]
    text = tokenizer.backend_tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    prompt = PROMPT_TEMPLATE.format(context=example().context, question=example().question)
    assert text == f"{prompt} Mara<|endoftext|>"
    counted = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.backend_tokenizer.decode(counted, skip_special_tokens=False) == " Mara<|endoftext|>"
    assert row["length"] == len(row["input_ids"])


def test_loss_on_all_counts_every_token(tokenizer):
    row = tokenize([example()], tokenizer, RowSettings(loss_on="all", max_positions=256))[0]
    assert row["labels"] == row["input_ids"]


def test_an_unanswerable_question_trains_the_end_of_text_alone(tokenizer):
    row = tokenize([example(answers=())], tokenizer, RowSettings(max_positions=256))[0]
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
    rows = tokenize([long], tokenizer, RowSettings(max_positions=160, no_answer_windows=100))
    windows = encode_windows(
        tokenizer.backend_tokenizer, [long.question], [context], max_positions=160, max_new_tokens=32
    )[0]
    assert len(rows) == len(windows) > 2
    for row, window in zip(rows, windows, strict=True):
        assert row["input_ids"][: len(window.prompt)] == window.prompt.ids
        answer = tokenizer.backend_tokenizer.decode(row["input_ids"][len(window.prompt) : -1])
        assert answer == (" Zanzibar" if "Zanzibar" in window.text else "")
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= 160


def test_an_answer_in_other_words_is_trained_on_where_its_passage_is_one_window(tokenizer):
    absent = (GoldAnswer(text="Zanzibar", start=0),)
    (row,) = tokenize([example(answers=absent)], tokenizer, RowSettings(max_positions=256))
    assert "Zanzibar" in tokenizer.backend_tokenizer.decode([label for label in row["labels"] if label != -100])
    long = example(id="x7", context=" ".join(f"word{index}" for index in range(80)), answers=absent)
    with pytest.raises(PromptTooLongError, match=r"question x7: its answer stands nowhere .* \d+ windows"):
        tokenize([example(), long], tokenizer, RowSettings(max_positions=160))


WRITTEN = {
    "space before": ("(211 km)", " 211 km", "211 km"),
    "space behind": ("(211 km )", "211 km ", "211 km"),
    "line feed behind": ("(211 km)", "211 km\n", "211 km"),
    "two spaces": ("(211  km)", "211 km", "211  km"),
    "line feed": ("(211\nkm)", "211 km", "211\nkm"),
    "no-break space": ("(211\u00a0km)", "211 km", "211\u00a0km"),
    "case": ("(211 km)", "211 KM", "211 km"),
    "composed": ("Aller-Su\u0308d", "Aller-S\u00fcd", "Aller-Su\u0308d"),
    "decomposed": ("Aller-S\u00fcd", "Aller-Su\u0308d", "Aller-S\u00fcd"),
    "full width": ("\uff12\uff11\uff11 km", "211 km", "\uff12\uff11\uff11 km"),
    "apostrophe": ("the miller\u2019s", "miller's", "miller\u2019s"),
    "dash": ("1803\u20131807", "1803-1807", "1803\u20131807"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answer_that_is_written_otherwise_is_trained_on_in_its_window(tokenizer, name):
    part, given, target = WRITTEN[name]
    words = [f"word{index}" for index in range(80)]
    words[60] = part
    long = example(context=" ".join(words), answers=(GoldAnswer(text=given, start=7),))
    rows = list(tokenize([long], tokenizer, RowSettings(max_positions=160)))
    decode = tokenizer.backend_tokenizer.decode
    trained = [decode([label for label in row["labels"][:-1] if label != -100]).strip() for row in rows]
    passages = [decode(row["input_ids"][: row["passage_tokens"]]) for row in rows]
    assert len(rows) > 2
    assert target in trained
    assert trained == [target if part in passage else "" for passage in passages]


def test_among_equal_gold_answers_one_that_stands_in_the_passage_is_trained_on():
    answers = tuple(GoldAnswer(text=text, start=0) for text in ("a town", "a town", "mara", "Mara "))
    assert target_answer(example(answers=answers)).text == "Mara"


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


def test_a_question_that_cannot_fit_is_named(tokenizer):
    examples = [example(), example(id="x7", question="why " * 300 + "?")]
    with pytest.raises(PromptTooLongError, match=r"question x7 has \d+ tokens.*Shorten"):
        tokenize(examples, tokenizer, RowSettings(max_positions=256))


def test_questions_that_cannot_fit_are_skipped_and_counted_when_asked(tiny_model_dir, tmp_path, capsys):
    data = generate("train", questions=20)
    pretrain.paragraphs_of(data)[0]["qas"][0].update(id="x7", question="why " * 300 + "?")
    (tmp_path / "data.json").write_text(json.dumps(data))
    arguments = ["--model", tiny_model_dir, "--train", tmp_path / "data.json", "--eval", "sample"]
    arguments += ["--limit-eval", 2, "--max-steps", 1, "--output", tmp_path / "out"]
    assert run_finetune(*arguments) == 2
    assert "question x7 has" in capsys.readouterr().err
    assert run_finetune(*arguments, "--skip-bad-rows") == 0
    assert "skipped 1 questions that do not fit, the first: question x7 has" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["train_questions"], metrics["questions_that_do_not_fit"]) == (19, 1)


def test_batches_are_padded_to_their_longest_row():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = Collator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_rows_are_kept_by_content_tokenizer_and_settings(tokenizer, tmp_path, monkeypatch):
    settings = RowSettings(max_positions=256)
    rows = list(cached_rows([example()], tokenizer, settings, cache_dir=tmp_path))
    assert rows == list(tokenize([example()], tokenizer, settings))
    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr("training.data.tokenize", None)
        assert list(cached_rows([example(id="other")], tokenizer, settings, cache_dir=tmp_path)) == rows
    cached_rows([example(question="Who?")], tokenizer, settings, cache_dir=tmp_path)
    cached_rows([example()], tokenizer, RowSettings(max_positions=256, loss_on="all"), cache_dir=tmp_path)
    cached_rows([example(answers=())], tokenizer, settings, cache_dir=tmp_path)
    other = model.load_tokenizer("starter")
    assert cached_rows([example()], other, settings, cache_dir=tmp_path)[0]["input_ids"] != rows[0]["input_ids"]
    assert len(list(tmp_path.iterdir())) == 5
    assert kept.is_dir()


def test_text_loss_share_counts_that_share_of_passage_and_question(tokenizer):
    examples = [example(id=str(index), question=f"Who founded Tolvik {index}?") for index in range(50)]
    rows = tokenize(examples, tokenizer, RowSettings(max_positions=256, text_loss_share=0.3))
    answer = len(tokenizer(" Mara")["input_ids"]) + 1
    counted = [sum(label != -100 for label in row["labels"][:-answer]) / (row["length"] - answer) for row in rows]
    assert 0.25 < sum(counted) / len(counted) < 0.35
    assert all(row["labels"][-answer:] == row["input_ids"][-answer:] for row in rows)


def test_the_order_of_rows_groups_lengths_and_follows_from_seed_and_epoch():
    lengths = [(index * 7919) % 1000 for index in range(4000)]
    sampler = LengthGroupedSampler(lengths, batch_rows=16, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(4000))
    assert first == list(LengthGroupedSampler(lengths, batch_rows=16, seed=1))
    assert first != list(LengthGroupedSampler(lengths, batch_rows=16, seed=2))
    batches = [[lengths[index] for index in first[start : start + 16]] for start in range(0, 4000, 16)]
    assert max(batches[0]) == max(lengths)
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 50
    sampler.set_epoch(1)
    assert list(sampler) != first


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


def test_the_same_seed_gives_the_same_weights(finetuned, tiny_model_dir, tmp_path):
    output = tmp_path / "again"
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", output]
    run_finetune(*arguments, "--max-steps", 2, "--limit-train", 64, "--limit-eval", 8, "--learning-rate", 1e-3)
    first, second = (load_file(path / "model.safetensors") for path in (finetuned, output))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_precision_asked_for_goes_over_that_of_a_launcher(tiny_model_dir, tmp_path, monkeypatch):
    found = []
    for left in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", left)
        arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / left]
        assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 0
        found.append(json.loads((tmp_path / left / "metrics.json").read_text())["losses"])
    assert found[0] == found[1]


def test_bfloat16_trains_and_saves_fp32(tiny_model_dir, tmp_path):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
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


def command(tiny_model_dir, output, *more, launcher=()):
    options = ["--train", "sample", "--eval", "sample", "--epochs", "1", "--limit-train", "960", "--limit-eval", "6"]
    program = [*launcher, "-m", "training.finetune", "--model", str(tiny_model_dir), "--output", str(output)]
    return [sys.executable, "-u", *program, *options, *more]


@pytest.fixture(scope="module")
def whole(tiny_model_dir, tmp_path_factory):
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "model"
    subprocess.run(command(tiny_model_dir, output), cwd=ROOT, check=True, capture_output=True)
    return output


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_after_an_end_and_gives_the_same_weights(tiny_model_dir, tmp_path, whole, number):
    output = tmp_path / "stopped"
    killed = number == signal.SIGKILL
    same = command(tiny_model_dir, output, "--save-steps", "7" if killed else "1000")

    def run(*more):
        return subprocess.run([*same, *more], cwd=ROOT, check=False, capture_output=True, text=True)

    process = subprocess.Popen(same, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.startswith("step 20/"))
    process.send_signal(number)
    rest, log = process.communicate(timeout=120)
    assert process.returncode == (-9 if killed else 130), log
    checkpoint = good_checkpoints(output)[0][-1]
    assert 14 <= int(checkpoint.name.split("-")[1]) < 60
    if not killed:
        assert "the same command goes on" in rest
    # As kills in the middle of saving leave them: no mark, a file cut short, a file missing.
    (output / "checkpoint-997").mkdir()
    for name in ("checkpoint-998", "checkpoint-999"):
        shutil.copytree(checkpoint, output / name)
    (output / "checkpoint-998" / "optimizer.pt").write_bytes(b"cut")
    (output / "checkpoint-999" / "trainer_state.json").unlink()
    assert good_checkpoints(output)[0][-1] == checkpoint
    other = run("--batch-size", "8")
    assert (other.returncode, "batch_size was 16, is 8" in other.stderr) == (2, True)
    other = run("--limit-eval", "5")
    assert (other.returncode, "limit_eval was 6, is 5" in other.stderr) == (2, True)
    settings = output / "training_config.json"
    settings.rename(tmp_path / "elsewhere")
    other = run()
    assert (other.returncode, "training_config.json cannot be read" in other.stderr) == (2, True)
    (tmp_path / "elsewhere").rename(settings)
    again = run()
    assert (again.returncode, f"going on from {checkpoint}" in again.stderr) == (0, True)
    assert re.search(r"^step (\d+)/\1  loss", again.stderr, re.MULTILINE)
    assert "\nstep 1/" not in again.stderr  # the first step was not made again
    weights, expected = (load_file(path / "model.safetensors") for path in (output, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (output, whole)]
    assert [row["step"] for row in metrics[0]["evaluations"]] == [row["step"] for row in metrics[1]["evaluations"]]
    assert not list(output.glob("checkpoint-*"))
    finished = run()
    assert (finished.returncode, "holds a finished run" in finished.stderr) == (2, True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def losses_of(path):
    """The loss of every step, the mean over the processes, each of which counts as much."""
    curves = [list(map(float, part.read_text().split())) for part in sorted(path.parent.glob(f"{path.name}.*"))]
    return [sum(step) / len(step) for step in zip(*curves, strict=True)], len(curves)


@pytest.fixture(scope="module")
def one_process(tiny_model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "model"
    return run_recorded(tiny_model_dir, output, 16, ())


def run_recorded(tiny_model_dir, output, batch_size, launcher):
    """20 steps of packed rows, less than an epoch: its last short batch is filled up with rows for two processes."""
    script = [*launcher, str(ROOT / "tests" / "integration" / "record_losses.py"), str(output.parent / "losses")]
    options = ["--model", str(tiny_model_dir), "--train", "sample", "--eval", "sample", "--output", str(output)]
    options += ["--limit-train", "1500", "--limit-eval", "7", "--max-steps", "20", "--batch-size", str(batch_size)]
    options += ["--dropout", "0", "--packing", "--learning-rate", "1e-3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script, *options], cwd=ROOT, env=environment, check=True, capture_output=True)
    return output


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_losses_of_one_at_the_same_global_batch(tiny_model_dir, tmp_path, one_process, launcher):
    two_processes = run_recorded(tiny_model_dir, tmp_path / "model", 8, launcher)
    (one, first), (two, second) = (losses_of(output.parent / "losses") for output in (one_process, two_processes))
    assert (first, second, len(one)) == (1, 2, 20)
    assert one[-1] < one[0] - 0.5
    assert two == pytest.approx(one, abs=1e-5)
    predictions = [json.loads((path / "predictions.json").read_text()) for path in (one_process, two_processes)]
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 7


def test_weights_split_by_fsdp_are_gathered_for_evaluation_in_every_process(tiny_model_dir, tmp_path):
    """accelerate starts FSDP on GPUs only: PyTorch's own call stands in for it."""
    script = [*TORCHRUN, str(ROOT / "tests" / "integration" / "split_weights.py"), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, check=True, capture_output=True)
    expected = load_file(tiny_model_dir / "model.safetensors")
    for rank in (0, 1):
        gathered = load_file(tmp_path / str(rank) / "model.safetensors")
        assert all(torch.equal(gathered[name], tensor) for name, tensor in expected.items())


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


@pytest.fixture(scope="module")
def two_epochs(tiny_model_dir, tmp_path_factory):
    """Two epochs, each ended by a checkpoint and an evaluation: settings, and an undisturbed run."""
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--eval-at-start"]
    arguments += ["--epochs", 2, "--limit-train", 64, "--limit-eval", 3, "--save-steps", 2]
    output = tmp_path_factory.mktemp("two-epochs") / "model"
    assert run_finetune(*arguments, "--output", output) == 0
    return arguments, output


class Killed(BaseException):
    """Stands in for a kill: nothing but the files is left."""


def went_on_as_if_never_ended(arguments, output, expected):
    """The same command, started again, makes the weights and the evaluations of the undisturbed run."""
    assert run_finetune(*arguments, "--output", output) == 0
    found, wanted = (json.loads((path / "metrics.json").read_text()) for path in (output, expected))
    assert found["evaluations"] == wanted["evaluations"]
    assert (found["steps"], found["best_step"]) == (wanted["steps"], wanted["best_step"])
    weights, whole = (load_file(path / "model.safetensors") for path in (output, expected))
    return all(torch.equal(weights[name], whole[name]) for name in whole)


def evaluated_steps(run):
    return [row["step"] for row in json.loads((run / "metrics.json").read_text())["evaluations"]]


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_an_end_while_answering_loses_no_evaluation(two_epochs, tmp_path, monkeypatch, evaluation):
    arguments, expected = two_epochs
    step = evaluated_steps(expected)[evaluation]
    with monkeypatch.context() as patched:

        def generate_answers(model, *rest, **options):
            if current[0].state.global_step == step:
                raise Killed
            return real(model, *rest, **options)

        current, real, start = [], trainer.generate_answers, trainer.GenerationTrainer.__init__
        patched.setattr(trainer, "generate_answers", generate_answers)
        patched.setattr(
            trainer.GenerationTrainer,
            "__init__",
            lambda self, **options: (current.append(self), start(self, **options))[1],
        )
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", tmp_path / "out")
    assert went_on_as_if_never_ended(arguments, tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        (["--patience", 1], None),  # F1 stays 0: the second, after an epoch, is the last
        (["--max-steps", 3], [0, 3]),
        (["--max-steps", 5, "--eval-steps", 3], [0, 3, 5]),
    ],
)
def test_an_end_while_finishing_does_not_train_on(two_epochs, tmp_path, monkeypatch, options, evaluated):
    arguments, expected = [*two_epochs[0], *options], tmp_path / "expected"
    assert run_finetune(*arguments, "--output", expected) == 0
    evaluated = evaluated or evaluated_steps(two_epochs[1])[:2]
    steps = json.loads((expected / "metrics.json").read_text())["steps"]
    assert (steps, evaluated_steps(expected)) == (evaluated[-1], evaluated)

    def write_report(*_, **__):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "write_report", write_report)
        with pytest.raises(Killed):
            run_finetune(*arguments, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert went_on_as_if_never_ended(arguments, tmp_path / "out", expected)


def test_checkpoints_of_something_else_are_left_alone(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-500" / "model.safetensors").write_text("precious")
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--max-steps", 1, "--limit-train", 16, "--limit-eval", 2) == 2
    assert "checkpoint-500 is in it" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-500" / "model.safetensors").read_text() == "precious"


def test_several_gpus_want_a_process_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sources = ["--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune("--model", "starter", *sources) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def test_lora_trains_thin_matrices_and_leaves_a_plain_model_that_exports(tiny_model_dir, tmp_path):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    options = ["--lora-rank", 4, "--learning-rate", 0.01, "--max-steps", 3, "--limit-train", 64, "--limit-eval", 4]
    assert run_finetune(*arguments, *options) == 0
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    assert not list((tmp_path / "out").glob("adapter*"))
    export(str(tmp_path / "out"), tmp_path / "bundle")
    with Answerer.from_pretrained(tmp_path / "bundle") as answerer:
        assert answerer.answer("Who founded Tolvik?", example().context, max_new_tokens=4).new_tokens >= 1


def test_the_best_weights_are_kept_and_a_run_stops_that_does_not_get_better(tiny_model_dir, tmp_path, monkeypatch):
    """Scores 10, 30, 20, 20: the second evaluation's weights are the model, and the fourth is the last."""
    scores, weights = iter([10.0, 30.0, 20.0, 20.0, 90.0]), {}
    real = trainer.GenerationTrainer.evaluate

    def evaluate(self):
        weights[self.state.global_step] = self.model.transformer.wte.weight.detach().clone()
        return real(self)

    monkeypatch.setattr(trainer.GenerationTrainer, "evaluate", lambda self, *_, **__: evaluate(self))
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Scores(exact_match=0.0, f1=next(scores), total=4))
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    options = ["--eval-steps", 2, "--patience", 2, "--limit-train", 320, "--limit-eval", 4, "--save-steps", 3]
    assert run_finetune(*arguments, *options) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["f1"] for row in metrics["evaluations"]] == [10.0, 30.0, 20.0, 20.0]
    assert (metrics["best_step"], metrics["steps"], metrics["f1"]) == (4, 8, 30.0)
    saved = load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(saved, weights[4])
    assert not torch.equal(saved, weights[8])


def test_disk_use_is_bounded_by_keep(tiny_model_dir, tmp_path, monkeypatch):
    seen = []
    real = trainer.GenerationTrainer._save_checkpoint

    def save(self, *arguments):
        real(self, *arguments)
        seen.append(sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")))

    monkeypatch.setattr(trainer.GenerationTrainer, "_save_checkpoint", save)
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    run_finetune(*arguments, "--max-steps", 4, "--save-steps", 1, "--keep", 2, "--limit-train", 64, "--limit-eval", 2)
    names = [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert seen == [names[:1], names[:2], names[1:3], names[2:]]


def test_a_loss_that_is_no_number_ends_the_run_with_the_batch_and_the_last_checkpoint(tiny_model_dir, tmp_path, capsys):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    options = ["--learning-rate", 1e18, "--warmup", 0, "--save-steps", 1, "--limit-train", 64, "--limit-eval", 2]
    assert run_finetune(*arguments, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"the loss is (nan|inf) after step 1", error)
    assert str(tmp_path / "out" / "checkpoint-1") in error
    batch = load_file(tmp_path / "out" / "bad-batch-0.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape


def test_out_of_memory_names_the_settings_to_lower(tiny_model_dir, tmp_path, capsys, monkeypatch):
    def forward(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model.GPT2LMHeadModel, "forward", forward)
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--limit-train", 64, "--limit-eval", 2) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--batch-size 16" in error
    assert "--gradient-accumulation" in error


def test_settings_of_training_reach_the_optimizer(tiny_model_dir, tmp_path, monkeypatch):
    made = []

    def stop_at_once(trainer, config, checkpoint):
        made.append(trainer)
        trainer.stop.stopped = True

    monkeypatch.setattr(finetune, "_train", stop_at_once)
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    options = [
        "--weight-decay",
        0.1,
        "--schedule",
        "linear",
        "--warmup",
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


def test_less_memory_and_accumulated_batches_give_the_same_model(tiny_model_dir, tmp_path):
    """Four rows at once, or two by two with activations computed again."""
    found = []
    for name, options in (("a", ["--batch-size", 4]), ("b", ["--batch-size", 2, "--gradient-accumulation", 2])):
        arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / name]
        more = ["--gradient-checkpointing"] if name == "b" else []
        shared = ["--limit-train", 4, "--limit-eval", 2, "--max-steps", 1, "--dropout", 0, "--warmup", 0]
        assert run_finetune(*arguments, *options, *more, *shared) == 0
        found.append(load_file(tmp_path / name / "model.safetensors"))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=2e-5, rtol=1e-4)


def test_the_notebooks_recipe_pads_to_512_and_options_go_over_a_recipe(tiny_model_dir, tmp_path, capsys):
    parse = finetune.make_parser().parse_args
    shared = ["--model", "gpt2", "--train", "squad", "--eval", "squad", "--output", "out"]
    notebook = finetune.config_of(parse([*shared, "--recipe", "notebook"]))
    assert (notebook.batch_size, notebook.pad_to, notebook.loss_on, notebook.schedule) == (2, 512, "all", "linear")
    ours = finetune.config_of(parse([*shared, "--recipe", "gpt2-squad", "--epochs", "1"]))
    assert (ours.packing, ours.epochs, ours.learning_rate, ours.precision) == (True, 1.0, 6.25e-5, "auto")
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert Collator(pad_token_id=9, pad_to=512)(rows)["input_ids"].shape == (1, 512)


def test_a_dry_run_shows_what_there_is_and_touches_nothing(tiny_model_dir, tmp_path, capsys):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
    assert run_finetune(*arguments, "--dry-run", "--limit-train", 64, "--packing", "--max-length", 128) == 0
    output = capsys.readouterr().out
    assert re.search(r"rows: \d+ with \d+ questions \(\d+ of them about a part", output)
    assert re.search(r"padding: \d+\.\d%", output)
    assert len(re.findall(r"\n +\d+-\d+ +\d+ =*(?=\n)", output)) >= 12
    assert output.count("in the loss: '") == 3
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_its_files_when_asked(tiny_model_dir, tmp_path):
    arguments = ["--model", tiny_model_dir, "--train", "sample", "--eval", "sample", "--output", tmp_path / "out"]
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
