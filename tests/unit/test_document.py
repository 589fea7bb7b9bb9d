"""Contexts that were asked about lately are not tokenized again, and take bounded memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import SpyTokenizer, small_tokenizer

from qa_onnx.text.document import Documents
from qa_onnx.text.windows import WindowSettings, encode_windows

SENTENCES = "Rollo led the Normans. Mara founded a town. The bridge is old. "


def encode_twice(contexts, *, max_characters=10_000):
    """The windows of two calls with the same questions, and the texts that each call tokenized."""
    spy = SpyTokenizer(small_tokenizer())
    documents, found = Documents(spy, max_characters=max_characters), []
    for _ in range(2):
        spy.encoded.clear()
        windows = encode_windows(
            spy,
            ["Who led them?"] * len(contexts),
            contexts,
            max_positions=128,
            max_new_tokens=8,
            settings=WindowSettings(window=64, stride=16),
            documents=documents,
        )
        found.append((windows, [text for text in spy.encoded if text.startswith("Context")]))
    return found


@pytest.mark.parametrize("context", [SENTENCES, SENTENCES * 40], ids=["whole", "cut"])
def test_a_context_is_tokenized_and_cut_once(context):
    (first, texts), (second, texts_again) = encode_twice([context, context])
    assert first == second
    assert first[0] == first[1]
    assert (len(first[0]) > 1) == (context != SENTENCES)
    assert len(texts) == 1 or len(first[0]) > 1
    assert texts
    assert texts_again == []
    alone = encode_windows(
        small_tokenizer(),
        ["Who led them?"],
        [context],
        max_positions=128,
        max_new_tokens=8,
        settings=WindowSettings(window=64, stride=16),
    )
    assert alone == first[:1]


def test_the_least_recently_used_contexts_go_where_there_is_no_room():
    spy = SpyTokenizer(small_tokenizer())
    documents = Documents(spy, max_characters=20)
    for texts in (["a" * 8], ["b" * 8], ["a" * 8], ["c" * 8]):  # c takes the place of b
        documents.get(texts)
    spy.encoded.clear()
    documents.get(["a" * 8, "c" * 8])
    assert [text for text in spy.encoded if text.startswith("Context")] == []
    documents.get(["b" * 8])
    assert [text for text in spy.encoded if text.startswith("Context")] == ["Context: " + "b" * 8]


def test_a_context_longer_than_the_room_is_not_kept():
    (_, first), (_, second) = encode_twice([SENTENCES], max_characters=len(SENTENCES) - 1)
    assert first == second != []


def test_threads_that_need_the_same_contexts_get_the_same_tokens():
    documents = Documents(small_tokenizer(), max_characters=300)
    contexts = [f"Town {number} is old." for number in range(40)]  # more than there is room for
    expected = {context: document.prefix_ids for context, document in documents.get(contexts).items()}

    def get(start):
        texts = contexts[start:] + contexts[:start]
        return {context: document.prefix_ids for context, document in documents.get(texts).items()}

    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(get, list(range(40)) * 5))
    assert sum(map(len, documents._kept)) == 300 - documents._room <= 300
