from __future__ import annotations

import time
from itertools import pairwise

import pytest
from fakes import CONTEXT, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx.errors import PromptTooLongError
from qa_onnx.text.prompt import encode_prompts
from qa_onnx.text.windows import encode_windows

WORDS = ("Rollo", "the", "Normans,", "東京タワー", "e\u0301", "🙂🙂", "(1911)", "x" * 60, "\n\n", "\t", "\u00a0")
documents = st.lists(st.sampled_from(WORDS), min_size=1, max_size=150).flatmap(
    lambda words: st.sampled_from(["", " ", "  "]).map(lambda space: space.join(words))
)


def windows_of(context, question="Who led them?", *, max_positions=128, max_new_tokens=8, stride=16):
    (windows,) = encode_windows(
        small_tokenizer(),
        [question],
        [context],
        max_positions=max_positions,
        max_new_tokens=max_new_tokens,
        stride=stride,
    )
    return windows


@settings(deadline=None, max_examples=150)
@given(context=documents.filter(lambda text: text.strip()), stride=st.integers(0, 200))
def test_windows_fit_and_cover_the_document(context, stride):
    windows = windows_of(context, stride=stride)
    covered = set()
    for window in windows:
        assert context.startswith(window.text, window.start)
        assert len(window.prompt) + 7 <= 128
        assert window.prompt == encode_prompts(small_tokenizer(), ["Who led them?"], [window.text])[0]
        covered |= set(range(window.start, window.start + len(window.text)))
    assert {index for index, character in enumerate(context) if not character.isspace()} <= covered
    starts = [window.start for window in windows]
    assert starts == sorted(set(starts))
    whole = encode_prompts(small_tokenizer(), ["Who led them?"], [context])[0]
    assert (len(windows) == 1) == (len(whole) + 7 <= 128) or len(windows) == 1


def test_a_document_that_fits_is_one_window_unchanged():
    (window,) = windows_of(CONTEXT + "  ")
    assert (window.start, window.text) == (0, CONTEXT + "  ")


def test_neighbors_share_about_the_stride_and_start_at_words():
    context = " ".join(f"word{index}" for index in range(200))
    windows = windows_of(context, stride=20)
    assert len(windows) > 3
    for left, right in pairwise(windows):
        shared = context[right.start : left.start + len(left.text)]
        assert context[right.start - 1] == " "
        assert not context[left.start + len(left.text)].isalnum()
        assert 15 <= len(small_tokenizer().encode(shared).ids) <= 40


def test_the_number_of_windows_grows_with_the_document_alone():
    for stride in (0, 10, 1000):
        windows = windows_of(" ".join(["Rollo"] * 600), stride=stride)
        assert len(windows) < 100


def test_questions_of_like_length_share_windows():
    context = " ".join(f"word{index}" for index in range(200))
    short, long = windows_of(context, "Who led?"), windows_of(context, "Who led them?")
    assert [window.prompt.prefix_ids for window in short] == [window.prompt.prefix_ids for window in long]


def test_a_question_longer_than_the_model_is_refused_with_the_way_out():
    with pytest.raises(PromptTooLongError, match=r"question 0 has \d+ tokens.*Shorten the question"):
        windows_of("Rollo.", "Who led them? " * 40)


def test_a_book_is_cut_in_time_that_grows_with_its_length():
    """Looking a list up again for each token would take minutes."""

    def seconds(words):
        context = " ".join(f"word{index % 97}" for index in range(words))
        started = time.process_time()
        windows_of(context)
        return time.process_time() - started

    assert seconds(16_000) < 16 * max(seconds(2_000), 0.05)
