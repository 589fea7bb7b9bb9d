"""Windows of a training: as given or chosen, kept in the model's directory, and how many without an answer are kept."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from qa_onnx.checkpoint.windows import read_windows
from qa_onnx.config import DEFAULT_STRIDE
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.errors import InvalidInputError
from qa_onnx.text.windows import WindowSettings, encode_windows
from training import finetune, report
from training.data import RowSettings, tokenize
from training.model import load_tokenizer
from training.starter.sample import generate
from training.windows import choose_window, select_windows


def run_finetune(*arguments):
    return finetune.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


def document(place, *, words=300, answers=True):
    """A question about a long passage with its answer at a word, which is asked to be there."""
    parts = [f"word{index}" for index in range(words)]
    parts[place] = "Zanzibar"
    context = " ".join(parts)
    gold = (GoldAnswer(text="Zanzibar", start=context.index("Zanzibar")),) if answers else ()
    return Example(id="q", title="", context=context, question="Which place?", answers=gold)


def answered(tokenizer, rows):
    """Whether each row has more to learn than the end-of-text."""
    return [sum(label != -100 for label in row["labels"]) > 1 for row in rows]


def rows_of(tokenizer, example, **options):
    settings = RowSettings(max_positions=256, windows=WindowSettings(window=64, stride=16), **options)
    return list(tokenize([example], tokenizer, settings))


@pytest.mark.parametrize("place", [0, 150, 299])
@pytest.mark.parametrize("most", [0, 1, 2, 1000])
def test_of_the_windows_without_the_answer_some_are_kept_for_each_with_it(tokenizer, place, most):
    everything = rows_of(tokenizer, document(place), no_answer_windows=1000)
    rows = rows_of(tokenizer, document(place), no_answer_windows=most)
    has = answered(tokenizer, rows)
    assert sum(has) == sum(answered(tokenizer, everything)) >= 1
    assert len(has) - sum(has) == min(most * sum(has), len(everything) - sum(has))
    assert len(everything) > 20
    assert sum(row["left_out"] for row in rows) == len(everything) - len(rows)
    assert all(row["windows"] == 1 for row in rows)
    contents = [row["input_ids"] for row in everything]
    assert [contents.index(row["input_ids"]) for row in rows] == sorted(
        contents.index(row["input_ids"]) for row in rows
    )


@pytest.mark.parametrize(("most", "kept"), [(0, 1), (1, 1), (3, 3)])
def test_a_question_without_an_answer_keeps_some_windows(tokenizer, most, kept):
    rows = rows_of(tokenizer, document(5, answers=False), no_answer_windows=most)
    assert answered(tokenizer, rows) == [False] * kept


def test_which_windows_are_kept_follows_from_the_seed(tokenizer):
    def kept(seed):
        return [row["input_ids"] for row in rows_of(tokenizer, document(150), seed=seed)]

    assert kept(1) == kept(1)
    assert any(kept(1) != kept(seed) for seed in range(2, 6))


def test_packed_rows_count_windows_that_are_left_out_once(tokenizer):
    (whole,) = rows_of(tokenizer, document(3, words=5))
    assert whole["left_out"] == whole["windows"] == 0
    apart, packed = (rows_of(tokenizer, document(150), packing=packing) for packing in (False, True))
    assert sum(row["left_out"] for row in packed) == sum(row["left_out"] for row in apart) > 15


def test_a_passage_is_trained_on_in_the_windows_of_its_settings(tokenizer):
    example = document(150)
    rows = rows_of(tokenizer, example, no_answer_windows=1000)
    windows = encode_windows(
        tokenizer.backend_tokenizer,
        [example.question],
        [example.context],
        max_positions=256,
        max_new_tokens=32,
        settings=WindowSettings(window=64, stride=32),
    )[0]
    assert [row["input_ids"][: len(window.prompt)] for row, window in zip(rows, windows, strict=True)] == [
        window.prompt.ids for window in windows
    ]


def test_window_and_stride_are_chosen_where_they_are_not_given(tokenizer):
    bpe, short = tokenizer.backend_tokenizer, document(3, words=5)
    assert select_windows([short], bpe, window=None, stride=None, max_positions=1024) == WindowSettings(
        window=128, stride=min(DEFAULT_STRIDE, 32)
    )
    assert select_windows([document(3)], bpe, window=None, stride=8, max_positions=256) == WindowSettings(
        window=160, stride=8
    )
    assert select_windows([short], bpe, window=None, stride=None, max_positions=1024, least=256).window == 256
    assert select_windows([short], bpe, window=200, stride=None, max_positions=256) == WindowSettings(
        window=200, stride=min(DEFAULT_STRIDE, 50)
    )
    assert select_windows([document(3, answers=False)], bpe, window=None, stride=None, max_positions=1024).window == 928


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (15, None, r"window 15; expected None or a whole number of at least 16"),
        (257, None, r"--window 257, which leaves 0 of 256 positions for question and answer; expected at least 32"),
        (230, None, r"--window 230, which leaves 26 of 256 positions"),
        (64, -1, r"stride -1"),
    ],
)
def test_windows_that_cannot_be_are_refused(tokenizer, window, stride, message):
    with pytest.raises(InvalidInputError, match=message):
        select_windows([], tokenizer.backend_tokenizer, window=window, stride=stride, max_positions=256)


@pytest.fixture(scope="module")
def sources(tiny_model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(generate("train", questions=24)))
    return ["--model", tiny_model_dir, "--train", path, "--max-steps", 1, "--batch-size", 2, "--max-new-tokens", 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", 10], "window 10; expected None or a whole number of at least 16"),
        (["--window", 0], "window 0"),
        (["--window", 1024], "--window 1024, which leaves 0 of 256 positions"),
        (["--window", 120, "--max-length", 128], "--window 120, which leaves 8 of 128 positions"),
        (["--stride", -1], "stride -1"),
        (["--no-answer-windows", -1], "no_answer_windows -1"),
    ],
)
def test_a_run_with_such_windows_is_refused(sources, tmp_path, capsys, options, message):
    assert run_finetune(*sources, *options, "--output", tmp_path / "out") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_choice_is_shown_evaluated_with_and_written(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "to_png", lambda figure: b"PNG")
    assert run_finetune(*sources, "--window", 40, "--stride", 8, "--output", tmp_path / "x", "--dry-run") == 0
    shown = re.search(r"windows: of up to 40 tokens of a passage, neighbors share 8; (\d+) ", capsys.readouterr().out)
    assert int(shown[1]) > 0
    assert run_finetune(*sources, "--window", 40, "--stride", 8, "--output", tmp_path / "out") == 0
    assert read_windows(tmp_path / "out") == WindowSettings(window=40, stride=8)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["window"], metrics["stride"]) == (40, 8)
    assert "windows of up to 40 tokens; neighboring windows share 8" in (tmp_path / "out" / "report.md").read_text()


def test_by_default_a_window_is_chosen(sources, tmp_path, capsys):
    assert run_finetune(*sources, "--output", tmp_path / "x", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "windows: of up to 160 tokens of a passage, neighbors share 40; 0 without" in output


@pytest.mark.parametrize(
    ("passages", "positions", "window"),
    [
        ([1], 1024, 128),
        ([100] * 50, 1024, 128),
        ([128], 1024, 128),
        ([129], 1024, 192),
        ([400] * 99 + [900], 1024, 448),  # 99 % are held
        ([400] * 98 + [900] * 2, 1024, 928),
        ([400, 900], 1024, 928),
        ([5000], 1024, 928),
        ([5000], 256, 160),
        ([60], 256, 128),
        ([60], 200, 104),
        ([60], 100, 50),
        ([60], 40, 20),
        ([3000], 4096, 3008),
    ],
)
def test_the_window_is_the_smallest_multiple_that_holds_nearly_all_passages(passages, positions, window):
    assert choose_window(passages, 0, max_positions=positions) == window


@pytest.mark.parametrize(("least", "window"), [(0, 128), (128, 128), (129, 192), (300, 320), (1200, 928)])
def test_the_window_holds_what_it_has_to(least, window):
    assert choose_window([100] * 200, least, max_positions=1024) == window


def many(last):
    """199 short passages and another one."""
    short = [replace(document(3, words=5), context=f"Zanzibar {number} is far.") for number in range(199)]
    short = [replace(example, answers=(GoldAnswer(text="Zanzibar", start=0),)) for example in short]
    return [*short, last]


@pytest.mark.parametrize("text", ["Zanzibar", "an island far away"])
def test_a_passage_whose_answer_does_not_occur_in_it_is_read_whole(tokenizer, text):
    last = document(40, words=80)
    last = replace(last, answers=(replace(last.answers[0], text=text),))
    bpe = tokenizer.backend_tokenizer
    window = select_windows(many(last), bpe, window=None, stride=None, max_positions=1024).window
    length = len(bpe.encode(f"Context: {last.context}").ids)
    assert (window >= length) == (text != "Zanzibar")
    tokenize(many(last), tokenizer, RowSettings(max_positions=1024, windows=WindowSettings(window=window)))


def test_a_long_answer_is_whole_in_a_window(tokenizer):
    last = document(40, words=200)
    text = last.context[200:700]
    last = replace(last, answers=(GoldAnswer(text=text, start=200),))
    settings = select_windows(many(last), tokenizer.backend_tokenizer, window=None, stride=None, max_positions=1024)
    assert settings.window < len(tokenizer.backend_tokenizer.encode(last.context).ids)
    rows = tokenize([last], tokenizer, RowSettings(max_positions=1024, windows=settings))
    assert any(answered(tokenizer, rows))
