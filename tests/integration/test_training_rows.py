"""Training rows: how questions, windows and packed passages become tokens, labels and batches; the generated sample."""

from __future__ import annotations

import pytest

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.squad import parse_squad
from qa_onnx.errors import PromptTooLongError
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from qa_onnx.text.windows import encode_windows
from training import model
from training.data import Collator, LengthGroupedSampler, RowSettings, cached_rows, target_answer, tokenize
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


def test_a_question_that_cannot_fit_is_named(tokenizer):
    examples = [example(), example(id="x7", question="why " * 300 + "?")]
    with pytest.raises(PromptTooLongError, match=r"question x7 has \d+ tokens.*Shorten"):
        tokenize(examples, tokenizer, RowSettings(max_positions=256))


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
