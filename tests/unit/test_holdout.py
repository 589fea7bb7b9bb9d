"""Questions held out by passage, and what questions to evaluate share with the training data."""

from __future__ import annotations

import random

import pytest

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.reader import read_examples
from qa_onnx.errors import InvalidInputError
from training.holdout import hold_out, measure_overlap, parse_share, to_json_lines
from training.sources import Source, hash_examples


def example(passage, question="Q?", **changes):
    values = {
        "id": f"{passage}-{question}",
        "title": "",
        "context": f"Passage {passage}.",
        "question": question,
        "answers": (GoldAnswer(text="Passage", start=0),),
    }
    return Example(**{**values, **changes})


def source(examples, name="x"):
    return Source(name=name, examples=tuple(examples), sha256=hash_examples(examples))


MANY = [example(passage, f"question {number}?") for passage in range(50) for number in range(4)]


@pytest.mark.parametrize(
    ("given", "share"), [("10%", 0.1), (" 10 % ", 0.1), ("0.5%", 0.005), (".5%", 0.005), ("99.9%", 0.999)]
)
def test_a_percentage_is_a_share(given, share):
    assert parse_share(given) == pytest.approx(share)


@pytest.mark.parametrize("given", ["squad", "10", "0.1", "a%b.csv", "./10%", "data/10%", "10%.json"])
def test_anything_else_is_a_source(given):
    assert parse_share(given) is None


@pytest.mark.parametrize(
    "given", ["0%", "100%", "-5%", "abc%", "%", "1e1%", "nan%", "inf%", "101%", "0.0%", "10,5%", "+5%"]
)
def test_other_percentages_are_refused(given):
    with pytest.raises(InvalidInputError, match=r"got --eval .*above 0 % and below 100 %"):
        parse_share(given)


@pytest.mark.parametrize("given", ["1%", "10%", "50%", "90%"])
def test_all_questions_on_a_passage_are_on_one_side(given):
    (trained,), heldout = hold_out([source(MANY)], given, seed=42)
    sides = [{made.context for made in part.examples} for part in (trained, heldout)]
    assert not sides[0] & sides[1]
    assert sorted(made.id for part in (trained, heldout) for made in part.examples) == sorted(made.id for made in MANY)
    wanted = parse_share(given) * len(MANY)
    assert wanted <= len(heldout.examples) < wanted + 4
    assert heldout.name == f"{given} of the questions, held out by passage"


def test_passages_that_differ_in_white_space_and_case_are_one():
    examples = [
        example(passage, context=text)
        for passage in range(20)
        for text in (f"Passage {passage} here.", f" PASSAGE\n{passage}\t here. ")
    ]
    (trained,), heldout = hold_out([source(examples)], "30%", seed=0)
    assert len(heldout.examples) == 12
    assert not measure_overlap(trained.examples, heldout.examples)


def test_what_is_held_out_follows_from_seed_and_passages_and_not_from_the_order():
    def held(examples, seed):
        return {made.id for made in hold_out([source(examples)], "20%", seed=seed)[1].examples}

    shuffled = random.Random(3).sample(MANY, len(MANY))
    assert held(MANY, 1) == held(shuffled, 1)
    assert held(MANY, 1) != held(MANY, 2)


def test_each_source_keeps_what_is_not_held_out_and_fingerprints_follow():
    first, second = source(MANY[:100], "a"), source(MANY[100:], "b")
    trained, heldout = hold_out([first, second], "50%", seed=0)
    assert [part.name for part in trained] == ["a", "b"]
    assert all(set(part.examples) < set(whole.examples) for part, whole in zip(trained, (first, second), strict=True))
    assert all(part.sha256 == hash_examples(part.examples) for part in (*trained, heldout))


@pytest.mark.parametrize("given", ["1%", "99.9%"])
def test_each_side_has_a_passage_at_least(given):
    (trained,), heldout = hold_out([source(MANY[:8])], given, seed=0)
    assert [len(part.examples) for part in (trained, heldout)] == [4, 4]


@pytest.mark.parametrize(
    "examples", [MANY[:1], MANY[:4], [example(1), example(2, context="passage  1.")]], ids=["one", "four", "spaces"]
)
def test_one_passage_cannot_be_parted(examples):
    with pytest.raises(
        InvalidInputError, match=rf"all {len(examples)} questions are on one passage; expected at least two"
    ):
        hold_out([source(examples)], "10%", seed=0)


def test_ids_of_several_files_are_made_unique():
    sources = [source([example(n, id=name) for n, name in enumerate(["1", "1", "1-2", "2"], 10 * k)]) for k in (1, 2)]
    _, heldout = hold_out(sources, "99%", seed=0)
    ids = [made.id for made in heldout.examples]
    assert len(ids) == len(set(ids)) == 7


@pytest.mark.parametrize("answers", [(), ("Mara",), ("Mara", "nan", "[1]"), ("line\u2028 end",), ('"', "\\")])
def test_questions_held_out_are_read_as_they_were(tmp_path, answers):
    context = 'Mara nan [1] line\u2028 end " \\ \r\n x'
    made = Example(
        id="line 7",
        title="A, B",
        context=context,
        question="Who\tis it?",
        answers=tuple(GoldAnswer(text=text, start=context.index(text)) for text in answers),
    )
    path = tmp_path / "heldout.jsonl"
    examples = [made, example(1), example(2, title="t")]
    path.write_text(to_json_lines(examples), encoding="utf-8", newline="")
    assert read_examples(str(path)) == examples


TRAINED = [example(1, "Who?"), example(2, "When?")]


@pytest.mark.parametrize(
    ("evaluated", "same_question", "same_passage"),
    [
        ([], 0, 0),
        ([example(3, "Who?")], 0, 0),
        ([example(1, "Who?")], 1, 0),
        ([example(1, "Who?", id="another")], 1, 0),
        ([example(1, "  WHO?\n"), example(1, "who?")], 2, 0),
        ([example(1, "When?")], 0, 1),
        ([example(1, "Who?", context="PASSAGE  1.")], 1, 0),
        ([example(2, "Where?"), example(2, "When?"), example(3)], 1, 1),
        ([example(1, "Who?", answers=())], 1, 0),
    ],
)
def test_overlap_is_found_example_by_example(evaluated, same_question, same_passage):
    found = measure_overlap(TRAINED, evaluated)
    assert (found.total, found.same_question, found.same_passage) == (len(evaluated), same_question, same_passage)
    assert bool(found) == bool(same_question or same_passage)
    if found:
        assert f"{same_question} are trained on and {same_passage} others" in str(found)
