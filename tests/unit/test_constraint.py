from __future__ import annotations

import random

import numpy as np
import pytest
from fakes import CONTEXT, small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qa_onnx import GenerationConfig
from qa_onnx.engine.sampling import Predictions, accept
from qa_onnx.engine.sequence import Prompt, make_sequence
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
    for tokens_left in range(max_tokens, 0, -1):
        ids = constraint.allowed_ids(tokens_left).tolist()
        assert ids or constraint.may_end or tokens_left == max_tokens
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
def test_an_answer_of_few_tokens_ends_where_a_word_does_or_there_is_none(context, seed, max_tokens):
    constraint = draw_span(Spans(context, TOKENS), seed, max_tokens)
    span = constraint.span()
    assert constraint.may_end == (span is not None)
    if span is None:  # every word has more tokens
        assert SpanConstraint(Spans(context, TOKENS)).allowed_ids(max_tokens).size == 0
    else:
        starts, ends = word_boundaries(context)
        assert (span[0] in starts, span[1] in ends) == (True, True)


def spell(word):
    """The least number of tokens that a word at the beginning of a context has: by trying all ways."""
    fewest = {0: 0}
    text = f" {word}".encode()
    for place in range(len(text)):
        for token in TOKENS.beginnings(text, place) if place in fewest else []:
            end = place + len(TOKENS.bytes_of[token])
            fewest[end] = min(fewest.get(end, 10**9), fewest[place] + 1)
    return fewest[len(text)]


@pytest.mark.parametrize("word", ["Normans", "discovered", "Przewalski", "\u6771", "na\u00efve", "x" * 50])
def test_a_word_is_allowed_from_its_fewest_tokens_on(word):
    fewest = spell(word)
    spans = Spans(word, TOKENS)
    assert SpanConstraint(spans).allowed_ids(fewest).size > 0
    assert SpanConstraint(spans).allowed_ids(fewest - 1).size == 0


@settings(deadline=None, max_examples=200)
@given(context=contexts.filter(lambda text: text.strip()), draw=st.data())
def test_every_span_of_words_can_be_spelled_as_the_tokenizer_spells_it(context, draw):
    starts, ends = word_boundaries(context)
    start = draw.draw(st.sampled_from(starts))
    end = draw.draw(st.sampled_from([end for end in ends if end > start]))
    constraint = SpanConstraint(Spans(context, TOKENS))
    (token_ids,) = encode_answers(small_tokenizer(), [context[start:end]])
    for index, token in enumerate(token_ids):
        assert token in constraint.allowed_ids(len(token_ids) - index)
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


@pytest.mark.parametrize("phrase", ["Rollo", "Rollo and", "15:00 and", "the Normans, the"])
def test_an_answer_does_not_repeat_a_phrase_for_ever(phrase):
    """A model that never wants to end: the constraint's tokens are all likelier than the end-of-text."""
    context = " ".join([phrase] * 60)
    sequence = make_sequence(
        Prompt(prefix_ids=[], suffix_ids=[1]),
        GenerationConfig(extractive=True, max_new_tokens=100),
        eos_token_id=0,
        max_positions=999,
        constraint=SpanConstraint(Spans(context, TOKENS)),
    )
    logprobs = np.full((1, small_tokenizer().get_vocab_size()), -3.0, np.float32)
    logprobs[0, 0] = -9.0
    while not sequence.is_finished:
        accept(sequence, Predictions.from_logprobs(logprobs, 0), 0, eos_token_id=0)
    assert sequence.finish_reason == "stop"
    start, end = sequence.constraint.span()
    assert context[start:end].count(phrase.split()[0]) <= 7
