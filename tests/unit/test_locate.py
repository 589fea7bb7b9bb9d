"""Answers are found in their passages however they are written, and nowhere else."""

from __future__ import annotations

import unicodedata

import pytest

from qa_onnx.data.example import GoldAnswer
from training.answers import locate

PASSAGE = "The Aller (211 km) is long. It is 211 km, said US papers, because it flows to the us of old."


@pytest.mark.parametrize(
    ("context", "text", "start", "place"),
    [
        (PASSAGE, "211 km", 11, 11),
        (PASSAGE, "211 km", 34, 34),
        (PASSAGE, " 211 km", 33, 34),
        (PASSAGE, " 211 km", 10, 11),
        (PASSAGE, "211 km\n", 12, 11),
        (PASSAGE, "211 km", 30, 34),
        (PASSAGE, "211 km", -7, 11),
        (PASSAGE, "211 km", 10**30, 34),
        (PASSAGE, "211 KM", 33, 34),
        (PASSAGE, "(211 KM)", 0, 10),
        ("It is the miller's.", "miller 's", 0, 10),
        ("It is 3 , 000 m.", "3,000 m", 0, 6),
        ("x \uff08211km\uff09", "211 km", 0, 3),
        (PASSAGE, "us", 60, PASSAGE.index("us of")),
        (PASSAGE, "US", 0, PASSAGE.index("US")),
        (PASSAGE, "Us", 0, PASSAGE.index("US")),
        ("a because us", "US", 0, 10),
        ("party art", "art", 0, 6),
        ("party", "art", 0, 1),
        ("a\n\n b", "a b", 0, 0),
        ("x a\u00a0\u2009b", "a b", 0, 2),
        ("x a\u200b\u00adb", "ab", 0, 2),
        ("x a \u200b b", "a b", 0, 2),
        ("Stra\u00dfe 5", "STRASSE 5", 0, 0),
        ("\ufb01nd it", "find", 0, 0),
        ("it is \u201cnew\u201d", '"new"', 0, 6),
        ("5\u22123", "5-3", 0, 0),
        ("\uc11c\uc6b8 \uc2dc", unicodedata.normalize("NFD", "\uc11c\uc6b8"), 0, 0),
        (unicodedata.normalize("NFD", "x \uc11c\uc6b8\uc2dc"), "\uc11c\uc6b8", 0, 2),
        ("\u6771\u4eac\uff12\u90fd", "\u4eac2", 0, 1),
        ("\u00e4\u00e4 5 m, 5 m", "5 m", 5, 3),  # the byte in UTF-8
        ("\U0001f600\U0001f600\U0001f600 5 m 5 m", "5 m", 7, 4),  # the unit in UTF-16
    ],
)
def test_an_answer_is_found_where_it_stands(context, text, start, place):
    found = locate(context, text, start)
    assert found is not None
    assert found.start == place
    assert context.startswith(found.text, found.start)
    assert found.text == found.text.strip()
    assert len(unicodedata.normalize("NFC", found.text)) <= len(text) + 3


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (PASSAGE, "212 km"),
        ("a because b", "US"),
        ("a\ufb01b", "I"),
        ("a\ufb01b", "ai"),
        ("Su\u0308d", "Su"),
        ("xa b", "ab"),
        ("abx", "a b"),
        ("no where", "now here to"),
        ("nothing", "\u200b"),
        ("nothing", "\u200b\u200b"),
    ],
)
def test_what_stands_nowhere_is_not_found(context, text):
    assert locate(context, text, 0) is None or context.find(text) >= 0
    assert locate(context, text, 0) in (None, GoldAnswer(text=text, start=context.find(text)))


def test_a_long_passage_is_searched_in_good_time():
    context = "The mill stands near the old ro\u0301ad. " * 3_000
    assert locate(context, "a town", 5) is None
    assert locate(context + "211  km", "211 KM", 0) == GoldAnswer(text="211  km", start=len(context))
