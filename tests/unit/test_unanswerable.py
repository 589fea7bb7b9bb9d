"""Questions without an answer that are made for training."""

from __future__ import annotations

import pytest

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.errors import InvalidInputError
from training.unanswerable import make_unanswerable


def part(name, count, *, without=0, passages=None):
    """Questions on so many passages, the last `without` of them without an answer."""
    return [
        Example(
            id=f"{name}{number}",
            title="",
            context=f"{name} has place{number % (passages or count)} in it.",
            question=f"Which place is {number} of {name}?",
            answers=()
            if number >= count - without
            else (GoldAnswer(text=f"place{number % (passages or count)}", start=0),),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("share", "without", "made"),
    [(0.0, 0, 0), (0.2, 0, 2), (0.25, 0, 2), (0.5, 2, 3), (0.2, 2, 0), (0.2, 5, 0), (0.9, 0, 9)],
)
def test_questions_are_made_until_the_share_is_reached(share, without, made):
    examples = part("a", 10, without=without)
    found = make_unanswerable([examples], share, seed=0)
    assert len(found) == made
    assert not any(example.answers for example in found)
    assert found == make_unanswerable([examples], share, seed=0)


def test_each_source_is_paired_with_its_own_passages():
    parts = [part("a", 10), part("b", 4)]
    made = make_unanswerable(parts, 0.5, seed=0)
    assert [example.id[0] for example in made] == ["a"] * 5 + ["b"] * 2
    assert all(example.context.startswith(example.id[0]) for example in made)


def test_a_source_of_one_passage_gives_none_beside_others():
    made = make_unanswerable([part("a", 10, passages=1), part("b", 4), []], 0.5, seed=0)
    assert [example.id[0] for example in made] == ["b"] * 2


@pytest.mark.parametrize("parts", [[part("a", 10, passages=1)], [part("a", 10, passages=1), part("b", 1)]])
def test_where_none_can_be_made_it_is_said(parts):
    with pytest.raises(InvalidInputError, match=r"--no-answer-share 0.5: got .* passages.*--no-answer-share 0$"):
        make_unanswerable(parts, 0.5, seed=0)
