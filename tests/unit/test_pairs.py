"""Questions without an answer, made of questions with one."""

from __future__ import annotations

import pytest

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.pairs import unanswerable_pairs
from qa_onnx.errors import InvalidInputError


def example(number, *, title="", context=None, question=None, answer="answer", **changes):
    values = {
        "id": f"q{number}",
        "title": title,
        "context": context or f"Passage {number} says answer{number} here.",
        "question": question or f"What does passage {number} say?",
        "answers": (GoldAnswer(text=f"answer{number}" if answer == "answer" else answer, start=0),),
    }
    return Example(**{**values, **changes})


ARTICLES = [example(10 * article + part, title=f"t{article}") for article in range(3) for part in range(4)]


def test_a_pair_is_a_question_on_another_passage_of_its_article_without_answers():
    pairs = unanswerable_pairs(ARTICLES, 12, seed=1)
    by_id = {made.id: made for made in ARTICLES}
    contexts = {made.context: made.title for made in ARTICLES}
    assert len(pairs) == len({pair.id for pair in pairs}) == 12
    for pair in pairs:
        asked = by_id[pair.id.removesuffix("@other-passage")]
        assert pair.answers == ()
        assert pair.question == asked.question
        assert pair.context != asked.context
        assert contexts[pair.context] == asked.title == pair.title


def test_pairs_follow_from_the_seed():
    first = unanswerable_pairs(ARTICLES, 6, seed=1)
    assert first == unanswerable_pairs(ARTICLES, 6, seed=1)
    assert first != unanswerable_pairs(ARTICLES, 6, seed=2)
    assert first == unanswerable_pairs(ARTICLES, 12, seed=1)[:6]


@pytest.mark.parametrize("title", ["", "  "])
def test_without_a_title_any_other_passage_is_taken(title):
    examples = [example(number, title=title) for number in range(5)]
    pairs = unanswerable_pairs(examples, 5, seed=3)
    assert len(pairs) == 5
    assert len({pair.context for pair in pairs}) > 1


def test_an_article_of_one_passage_takes_one_of_another_and_its_title():
    examples = [example(99, title="alone"), *ARTICLES]
    (pair,) = [pair for pair in unanswerable_pairs(examples, 13, seed=0) if pair.id.startswith("q99@")]
    assert pair.title in {"t0", "t1", "t2"}


@pytest.mark.parametrize(
    "other",
    ["It has the Answer1 too.", "It has the ANSWER1", "xanswer1x", "an  answer\n1", "Passage 1  says\nanswer1 HERE."],
)
def test_a_passage_with_a_gold_answer_is_no_partner(other):
    gold = "an answer 1" if other.startswith("an ") else "answer1"
    asked = example(1, title="t", answer=gold)
    examples = [asked, example(2, title="t", context=other), example(3, title="t", context="Nothing of it.")]
    pairs = {pair.id: pair for pair in unanswerable_pairs(examples, 3, seed=0)}
    assert pairs["q1@other-passage"].context == "Nothing of it."


def test_every_gold_answer_counts():
    answers = tuple(GoldAnswer(text=text, start=0) for text in ("Mara", "Mara Vell"))
    examples = [example(1, answers=answers, context="Mara Vell."), example(2, context="Only Mara."), example(3)]
    pairs = {pair.id: pair for pair in unanswerable_pairs(examples, 3, seed=0)}
    assert pairs["q1@other-passage"].context == examples[2].context


def test_a_passage_that_the_same_question_is_asked_about_is_no_partner():
    examples = [
        example(1, question="Who founded it?"),
        example(2, question="who  founded it?"),
        example(3, question="When?"),
        example(4, question="When?"),
    ]
    pairs = {pair.id: pair for pair in unanswerable_pairs(examples, 4, seed=0)}
    founded, dated = {made.context for made in examples[:2]}, {made.context for made in examples[2:]}
    assert {pairs["q1@other-passage"].context, pairs["q2@other-passage"].context} == dated
    assert {pairs["q3@other-passage"].context, pairs["q4@other-passage"].context} == founded


def test_questions_without_answers_give_passages_only():
    examples = [example(1), example(2, answers=()), example(3, answers=())]
    pairs = unanswerable_pairs(examples, 5, seed=0)
    assert [pair.question for pair in pairs] == [examples[0].question] * 2
    assert {pair.context for pair in pairs} == {examples[1].context, examples[2].context}
    assert [pair.id for pair in pairs] == ["q1@other-passage", "q1@other-passage-2"]


def test_more_pairs_than_questions_have_further_passages_and_ids_of_their_own():
    pairs = unanswerable_pairs(ARTICLES, 50, seed=0)
    assert (
        len(pairs) == len({(pair.question, pair.context) for pair in pairs}) == len({pair.id for pair in pairs}) == 50
    )


def test_fewer_are_made_where_there_are_fewer():
    assert len(unanswerable_pairs([example(1), example(2)], 7, seed=0)) == 2


def test_ids_that_are_taken_or_shared_stay_unique():
    examples = [example(1), example(1, context="Another one."), example(2, id="q1@other-passage")]
    pairs = unanswerable_pairs(examples, 6, seed=0)
    ids = [made.id for made in (*pairs, examples[2])]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("count", [0, -1])
def test_no_pair_is_made_where_none_is_wanted(count):
    assert unanswerable_pairs([example(1)], count, seed=0) == []


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [example(1)],
        [example(1), example(2, context=example(1).context)],
        [example(1), example(2, context=example(1).context.replace(" ", "\n").upper())],
        [example(1, answers=()), example(2, answers=())],
        [example(1, context="a b", answer="a"), example(2, context="a c", answer="a")],
    ],
)
def test_where_no_pair_can_be_made_it_is_said(examples):
    with pytest.raises(InvalidInputError, match=rf"got {len(examples)} questions on \d different passages; expected"):
        unanswerable_pairs(examples, 1, seed=0)
