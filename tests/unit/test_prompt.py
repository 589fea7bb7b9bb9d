from __future__ import annotations

import json

import pytest
from fakes import CONTEXT, END_OF_TEXT, SpyTokenizer, small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers

from qa_onnx.errors import InvalidInputError
from qa_onnx.text.prompt import (
    ANSWER_TEMPLATE,
    PROMPT_TEMPLATE,
    check_cost,
    decode,
    encode,
    encode_answers,
    encode_prompts,
    load_tokenizer,
)

QUESTION = "Who led the Normans?"
pieces = st.sampled_from(
    [" ", "\n", "\t", "\r\n", "\u00a0", "😀", "👩‍🚀", "ノルマン", "the", "Rollo", "'s", ".", "{x}", END_OF_TEXT]
)
texts = st.one_of(st.text(max_size=40), st.lists(pieces, max_size=12).map("".join)).filter(str.strip)


def context_of(prompt):
    text = small_tokenizer().decode(prompt.prefix_ids)
    return text.removeprefix("Context:").removesuffix("\nQuestion:")


def ids_of(text):
    return small_tokenizer().encode(text, add_special_tokens=False).ids


LABEL_IDS = ids_of("\nQuestion:")


def encode_one(question, context):
    return encode_prompts(small_tokenizer(), [question], [context])[0]


def test_the_template_is_the_contract():
    assert PROMPT_TEMPLATE == "Context: {context}\nQuestion: {question}\nAnswer:"
    assert ANSWER_TEMPLATE == " {answer}"


def test_the_parts_of_a_prompt_are_the_context_and_the_question():
    prompt = encode_one("  Who? \n", "By Rollo.")
    assert small_tokenizer().decode(prompt.prefix_ids) == "Context: By Rollo.\nQuestion:"
    assert small_tokenizer().decode(prompt.suffix_ids) == " Who?\nAnswer:"
    assert len(prompt) == len(prompt.ids) == len(prompt.prefix_ids) + len(prompt.suffix_ids)


@settings(deadline=None)
@given(question=texts, context=texts)
@example(question="?", context="trailing space ")
@example(question="?", context="trailing lines \n\n")
@example(question="😀", context="ノルマン人\u3000")
@example(question="{context}", context="{question}")
def test_the_parts_have_the_tokens_of_the_whole(question, context):
    whole = f"Context: {context}\nQuestion: {question.strip()}\nAnswer:"
    assert encode_one(question, context).ids == ids_of(whole)


@settings(deadline=None)
@given(answer=texts)
def test_prompt_and_answer_have_the_tokens_of_the_whole(answer):
    prompt, (answer_ids,) = encode_one(QUESTION, CONTEXT), encode_answers(small_tokenizer(), [answer])
    whole = f"Context: {CONTEXT}\nQuestion: {QUESTION}\nAnswer: {answer.strip()}"
    assert prompt.ids + answer_ids == ids_of(whole)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_has_no_tokens(answer):
    assert encode_answers(small_tokenizer(), [answer, "Rollo"]) == [[], ids_of(" Rollo")]


def test_control_tokens_in_text_stay_text(tmp_path):
    # As saved, the tokenizer would make a control token of it, and would cut and pad.
    saved = type(small_tokenizer()).from_str(small_tokenizer().to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=300)
    saved.save(str(tmp_path / "tokenizer.json"))
    control = saved.token_to_id(END_OF_TEXT)
    assert saved.encode(END_OF_TEXT).ids[0] == control

    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = f"before {END_OF_TEXT} after"
    prompt = encode_prompts(tokenizer, [text], [text])[0]
    assert control not in prompt.ids
    assert tokenizer.decode(prompt.ids) == PROMPT_TEMPLATE.format(context=text, question=text)


def test_each_distinct_context_is_encoded_once():
    spy = SpyTokenizer(small_tokenizer())
    prompts = encode_prompts(spy, ["a", "b", "c"], ["one", "two", "one"])
    assert sorted(text for text in spy.encoded if text.startswith("Context")) == ["Context: one", "Context: two"]
    assert [context_of(prompt).strip() for prompt in prompts] == ["one", "two", "one"]


def test_no_prompts_are_no_error():
    assert encode_prompts(small_tokenizer(), [], []) == []


@pytest.mark.parametrize(
    ("questions", "contexts", "words"),
    [
        (["a", "b"], ["c"], ["2 questions", "1 contexts", "one context for each question"]),
        (["a", 5], ["c", "d"], ["question 1", "int", "expected a string"]),
        (["a"], [None], ["context 0", "NoneType", "expected a string"]),
        (["a"], [b"c"], ["context 0", "bytes", "expected a string"]),
        (["a", ""], ["c", "d"], ["question 1", "empty", "expected some text"]),
        (["a", "b", "c"], ["d", "e", " \n\t"], ["context 2", "white space", "expected some text"]),
        (["a", "who \ud83d?"], ["c", "d"], ["question 1", "lone surrogate at character 4", "right encoding"]),
        (["a"], ["\udfff"], ["context 0", "lone surrogate at character 0", "right encoding"]),
    ],
)
def test_bad_texts_are_named_by_index_and_way_out(questions, contexts, words):
    with pytest.raises(InvalidInputError) as caught:
        encode_prompts(small_tokenizer(), questions, contexts)
    assert [word for word in words if word not in str(caught.value)] == []


class PanicException(BaseException):
    pass


@pytest.mark.parametrize("error", [Exception("Missing [UNK] token"), PanicException("index 7"), ValueError()])
def test_whatever_the_tokenizer_raises_is_an_error_of_this_package(error):
    class Broken:
        def encode_batch(self, texts, **options):
            raise error

        def decode(self, token_ids):
            raise error

    for call in (lambda: encode(Broken(), ["text"]), lambda: decode(Broken(), [1])):
        with pytest.raises(InvalidInputError, match=r"the tokenizer cannot (en|de)code .*\(\S.*\)") as caught:
            call()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()])
def test_what_ends_the_program_is_no_error_of_the_tokenizer(error):
    def interrupt(*arguments, **options):
        raise error

    with pytest.raises(type(error)):
        encode(type("Interrupted", (), {"encode_batch": interrupt})(), ["text"])


@pytest.mark.parametrize(
    "changes",
    [{"model": {}}, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}],
    ids=["an error", "a panic of Rust"],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, changes):
    content = json.loads(small_tokenizer().to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match="cannot be loaded as a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_the_same_text_has_the_same_tokens_though_the_tokenizer_has_a_dropout(tmp_path):
    content = json.loads(small_tokenizer().to_str())
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert {tuple(tokenizer.encode(CONTEXT).ids) for _ in range(20)} == {tuple(small_tokenizer().encode(CONTEXT).ids)}


@pytest.mark.parametrize("dropped", ["Context", "Answer"])
def test_a_tokenizer_that_drops_a_text_is_an_error(dropped):
    class Dropping:
        def encode_batch(self, texts, **options):
            encodings = small_tokenizer().encode_batch(texts, **options)
            return [Encoding() if dropped in text else one for text, one in zip(texts, encodings, strict=True)]

    with pytest.raises(InvalidInputError, match="makes no tokens of a text"):
        encode_prompts(Dropping(), ["Who?"], [CONTEXT])


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x|y)*z", "(?:ab){2,}", "((a)b)+"])
def test_an_expression_that_may_never_end_is_refused(pattern):
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    with pytest.raises(InvalidInputError, match="repeats a group without bound"):
        check_cost(tokenizer)


@pytest.mark.parametrize("pattern", [r"\)+", r"(ab)?", r"(ab){2}", r"[()]+", r"\p{N}{1,3}", r"(?i:'s|'t)|\s+(?!\S)"])
def test_an_expression_whose_time_is_bounded_is_taken(pattern):
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    check_cost(tokenizer)
