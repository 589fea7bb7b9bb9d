from __future__ import annotations

import time
from itertools import pairwise

import pytest
from fakes import CONTEXT, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qa_onnx.errors import InvalidInputError, PromptTooLongError
from qa_onnx.text.prompt import encode_prompts
from qa_onnx.text.windows import WindowSettings, encode_windows, estimate_windows

WORDS = ("Rollo", "the", "Normans,", "東京タワー", "e\u0301", "🙂🙂", "(1911)", "x" * 60, "\n\n", "\t", "\u00a0")
documents = st.lists(st.sampled_from(WORDS), min_size=1, max_size=150).flatmap(
    lambda words: st.sampled_from(["", " ", "  "]).map(lambda space: space.join(words))
)


def windows_of(context, question="Who led them?", *, max_positions=128, max_new_tokens=8, **settings):
    (windows,) = encode_windows(
        small_tokenizer(),
        [question],
        [context],
        max_positions=max_positions,
        max_new_tokens=max_new_tokens,
        settings=WindowSettings(**{"stride": 16} | settings),
    )
    return windows


@settings(deadline=None, max_examples=150)
@given(context=documents.filter(lambda text: text.strip()), stride=st.integers(0, 200))
def test_windows_fit_and_cover_the_document(context, stride):
    windows = windows_of(context, stride=stride)
    covered = set()
    for window in windows:
        assert context.startswith(window.text, window.start)
        assert len(window.prompt) + 8 <= 128
        assert window.prompt == encode_prompts(small_tokenizer(), ["Who led them?"], [window.text])[0]
        covered |= set(range(window.start, window.start + len(window.text)))
    assert {index for index, character in enumerate(context) if not character.isspace()} <= covered
    starts = [window.start for window in windows]
    assert starts == sorted(set(starts))
    whole = encode_prompts(small_tokenizer(), ["Who led them?"], [context])[0]
    assert (len(windows) == 1) == (len(whole) + 8 <= 128) or len(windows) == 1


def test_a_document_that_fits_is_one_window_unchanged():
    (window,) = windows_of(CONTEXT + "  ")
    assert (window.start, window.text) == (0, CONTEXT + "  ")


def test_a_window_is_as_long_as_it_is_set_and_the_document_is_covered():
    context = " ".join(f"word{index}" for index in range(200))
    windows = windows_of(context, window=40, stride=8)
    (label,) = small_tokenizer().encode_batch(["\nQuestion:"])
    assert max(len(window.prompt.prefix_ids) - len(label.ids) for window in windows) <= 40
    assert all(f"word{index}" in " ".join(window.text for window in windows) for index in range(200))
    assert len(windows) > len(windows_of(context))


def test_a_context_that_fits_into_the_positions_is_cut_by_its_window():
    twice = f"{CONTEXT} {CONTEXT}"
    assert len(windows_of(twice)) == 1
    assert [window.text for window in windows_of(twice, window=17, stride=0)] == [CONTEXT, CONTEXT]


def test_windows_end_with_paragraphs_and_sentences_where_these_are_near():
    sentence = "Rollo led the Normans to the river and settled there."
    for between in (" ", "\n\n"):
        windows = windows_of(between.join([sentence] * 40), stride=0, max_positions=256)
        assert len(windows) > 2
        assert all(window.text.startswith("Rollo led") and window.text.endswith("there.") for window in windows)
    mixed = "\n".join(" ".join([sentence] * 4) for _ in range(10))
    windows = windows_of(mixed, stride=0, max_positions=512)
    assert len(windows) > 1
    assert all(window.text.count("Rollo") % 4 == 0 for window in windows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 15}, "got window 15; expected None or a whole number of at least 16"),
        ({"window": True}, "got window True"),
        ({"window": "64"}, "got window '64'"),
        ({"stride": -1}, "got stride -1; expected a whole number of at least 0"),
        ({"stride": 1.5}, "got stride 1.5"),
        ({"window": 129}, "got window 129; the model has 128 positions"),
    ],
)
def test_windows_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        windows_of(CONTEXT, **settings)


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


@pytest.mark.serial
def test_a_book_is_cut_in_time_that_grows_with_its_length():
    """Looking a list up again for each token would take minutes."""

    def seconds(words):
        context = " ".join(f"word{index % 97}" for index in range(words))
        started = time.process_time()
        windows_of(context)
        return time.process_time() - started

    assert seconds(16_000) < 16 * max(seconds(2_000), 0.05)


def test_settings_that_are_given_replace_those_of_the_bundle():
    own = WindowSettings(window=64, stride=8)
    assert own.with_given(window=None, stride=None) == own
    assert own.with_given(window=32, stride=0) == WindowSettings(window=32, stride=0)


@pytest.mark.parametrize("window", [None, 64, 16])
@pytest.mark.parametrize("stride", [0, 16, 200])
def test_windows_are_estimated_without_tokenizing(window, stride):
    """About right for ordinary text and questions, and for no text far too few."""
    for text in (CONTEXT * 60, "🙂" * 500):
        for question in ("Who led them?", "?!;" * 28):
            found = len(windows_of(text, question, window=window, stride=stride))
            estimated = estimate_windows(
                [question, question],
                [text, "Short."],
                max_positions=128,
                max_new_tokens=8,
                settings=WindowSettings(window=window, stride=stride),
            )
            assert found + 1 <= 10 * estimated
            if (text, question) == (CONTEXT * 60, "Who led them?"):
                assert found / 2 <= estimated - 1 <= 2 * found
