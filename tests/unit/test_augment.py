"""Cloze questions and altered contexts: every answer stands where it says."""

from __future__ import annotations

import random

from qa_onnx.data.squad import parse_squad
from training.starter.augment import altered, augment, cloze_questions, find_spans, split_sentences
from training.starter.sample import generate

CONTEXT = (
    "The Tolvik bridge was opened by Mara Velden in 1803. It is 412 metres long, and it carries the old coast road. "
    "On 3 May 1911 the middle of the bridge was destroyed by a flood, and twelve workers had to repair it."
)


def test_spans_are_of_the_kinds_that_are_asked_for():
    kinds = {CONTEXT[start:end]: kind for kind, start, end in find_spans(CONTEXT)}
    assert kinds["1803"] == kinds["3 May 1911"] == "date"
    assert kinds["412"] == kinds["twelve"] == "number"
    assert kinds["Mara Velden"] == "name"
    assert "phrase" in kinds.values()


def test_cloze_questions_have_answers_that_stand_there_and_do_not_tell_them():
    for seed in range(30):
        qas = cloze_questions(CONTEXT, 6, random.Random(seed))
        assert len(qas) > 3
        for qa in qas:
            answer = qa["answers"][0]
            assert CONTEXT.startswith(answer["text"], answer["answer_start"])
            assert len(qa["question"].split()) >= 3


def test_altered_contexts_keep_their_questions_where_their_sentences_are():
    qas = [
        {"question": "When?", "answers": [{"text": "1803", "answer_start": CONTEXT.index("1803")}]},
        {"question": "Who?", "answers": [{"text": "twelve workers", "answer_start": CONTEXT.index("twelve")}]},
    ]
    asked, orders = 0, set()
    for seed in range(50):
        made = altered({"context": CONTEXT, "qas": qas}, ["A stranger came."], random.Random(seed))
        orders.add(made["context"])
        for qa in made["qas"]:
            asked += 1
            answer = qa["answers"][0]
            assert made["context"].startswith(answer["text"], answer["answer_start"])
    assert len(orders) > 20
    assert asked > 60
    assert any("A stranger came." in order for order in orders)
    assert len(split_sentences(CONTEXT)) == 3


def test_a_data_set_is_made_of_several_the_same_each_time():
    parts = [generate("train", questions=40, seed=seed) for seed in (1, 2)]
    made = augment(parts, copies=2, cloze=3, seed=5)
    assert made == augment(parts, copies=2, cloze=3, seed=5)
    assert made != augment(parts, copies=2, cloze=3, seed=6)
    examples = parse_squad(made, source="made")
    assert len(examples) > 160
    for example in examples:
        assert example.context.startswith(example.answers[0].text, example.answers[0].start)
