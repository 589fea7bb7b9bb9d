from __future__ import annotations

import random

import pytest
from fakes import CONTEXT, small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_onnx.text.constraint import SpanConstraint, Spans, TokenBytes, find_span, word_boundaries
from qa_onnx.text.prompt import encode_answers

TOKENS = TokenBytes(small_tokenizer())
PIECES = (
    "Rollo", "the", "Normans", "10th", "(led", "by)", "don't", '"quoted"', "\u201cso\u201d", " ", "  ", "\t", "\n\n",
    "\r\n", "\u00a0", "\u2003", "naïve", "nai\u0308ve", "e\u0301\u0323", "東京タワー", "ที่นี่", "русский", "العربية",
    "🙂", "👩‍👩‍👧", "👍🏽", "\x00", "<|endoftext|>", "A.B.C.", "1,000", "$5", "\u200b", "한국어", "\ufffd",
)  # fmt: skip
contexts = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=25).map(
    lambda pieces: "".join(pieces).encode("utf-8", "ignore").decode()
)


def draw_span(spans, seed, max_tokens=40):
    draw = random.Random(seed)
    constraint = SpanConstraint(spans)
    for _ in range(max_tokens):
        ids = constraint.allowed_ids().tolist()
        assert ids or constraint.may_end
        if not ids or (constraint.may_end and draw.random() < 0.3):
            break
        constraint.append(draw.choice(ids))
    return constraint


@settings(deadline=None, max_examples=300)
@given(context=contexts.filter(lambda text: text.strip()), seed=st.integers(0, 10))
@example(context="Rollo \n ", seed=0)
@example(context="e\u0301", seed=1)
def test_whatever_is_allowed_is_a_span_from_word_to_word(context, seed):
    spans = Spans(context, TOKENS)
    constraint = draw_span(spans, seed, max_tokens=10**4)
    assert constraint.may_end
    start, end = constraint.span()
    starts, ends = word_boundaries(context)
    assert start in starts
    assert end in ends
    assert context[start:end] == context[start:end].strip() != ""


@settings(deadline=None, max_examples=200)
@given(context=contexts.filter(lambda text: text.strip()), seed=st.integers(0, 10), max_tokens=st.integers(1, 6))
def test_an_answer_that_is_cut_short_stands_in_the_context_too(context, seed, max_tokens):
    constraint = draw_span(Spans(context, TOKENS), seed, max_tokens)
    span = constraint.span()
    if span is None:  # a space alone, or a part of a character
        assert not constraint.may_end
    else:
        start, end = span
        assert context[start:end] == context[start:end].strip() != ""


@settings(deadline=None, max_examples=200)
@given(context=contexts.filter(lambda text: text.strip()), draw=st.data())
def test_every_span_of_words_can_be_spelled_as_the_tokenizer_spells_it(context, draw):
    starts, ends = word_boundaries(context)
    start = draw.draw(st.sampled_from(starts))
    end = draw.draw(st.sampled_from([end for end in ends if end > start]))
    constraint = SpanConstraint(Spans(context, TOKENS))
    (token_ids,) = encode_answers(small_tokenizer(), [context[start:end]])
    for token in token_ids:
        assert token in constraint.allowed_ids()
        constraint.append(token)
    assert constraint.may_end
    first, last = constraint.span()
    assert context[first:last] == context[start:end]
    assert first <= start


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 10th.", ["It", "'", "s", "10th", "."]),
        ("nai\u0308ve e\u0301", ["nai\u0308ve", "e\u0301"]),
        ("東京 is", ["東", "京", "is"]),
        ("👩\u200d👧👍🏽!", ["👩\u200d👧", "👍🏽", "!"]),
        ("\u00a0a\tb\n", ["a", "b"]),
        ("русский 한국어", ["русский", "한국어"]),
        (" \n", []),
    ],
)
def test_words_are_what_a_reader_takes_for_them(text, words):
    starts, ends = word_boundaries(text)
    assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == words


def test_end_of_text_is_no_token_of_a_context():
    end_of_text = small_tokenizer().token_to_id("<|endoftext|>")
    assert end_of_text not in TOKENS.bytes_of
    assert len(TOKENS.bytes_of) == small_tokenizer().get_vocab_size() - 1


@pytest.mark.parametrize(
    ("text", "context", "span"),
    [
        ("on", "London lies on it", (12, 14)),
        ("Lon", "London", (0, 3)),
        ("it", "London", None),
        ("", "London", None),
        ("a b", "a b a b", (0, 3)),
    ],
)
def test_text_is_found_as_whole_words_first(text, context, span):
    assert find_span(text, context) == span


def test_spans_are_counted_by_their_texts():
    assert Spans("no", TOKENS).count(9) == 1
    assert Spans("no no", TOKENS).count(9) == 2
    assert Spans("one two three", TOKENS).count(9) == 6
    assert Spans(CONTEXT, TOKENS).count(9) == 9
