r"""The prompt: the only place that knows how a passage, a question and an answer become text and tokens.

A prompt is `Context: {context}\nQuestion: {question}\nAnswer:`, and training adds ` {answer}<|endoftext|>`. The
passage comes first, so that all questions on a passage share their first tokens, up to the question's first word. What
they share is tokenized separately for the same reason: a passage has the same tokens with any question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import InvalidInputError, one_line

PASSAGE_TEMPLATE = "Context: {context}"
QUESTION_LABEL = "\nQuestion:"
QUESTION_TEMPLATE = " {question}\nAnswer:"
ANSWER_TEMPLATE = " {answer}"
MAX_TOKENIZER_BYTES = 64 * 2**20
"""Of a tokenizer's file. One of 50,000 tokens has 2 to 4 MB."""
REPEATED_GROUP = re.compile(r"(?<!\\)\)(?:[+*]|\{\d*,\})")
PROMPT_TEMPLATE = PASSAGE_TEMPLATE + QUESTION_LABEL + QUESTION_TEMPLATE


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a `tokenizer.json`. Text such as `<|endoftext|>` inside a passage stays text; it is no control token.

    Raises:
        InvalidInputError: It is no tokenizer, or one whose cost has no bound (see `check_cost`).
    """
    with errors_of_tokenizers("it cannot be loaded as a tokenizer"):
        tokenizer = Tokenizer.from_file(path)
    check_cost(tokenizer)
    prepare_tokenizer(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer: Tokenizer) -> None:
    """Sets a tokenizer up for this package: no truncation, padding, dropout, nor control tokens from text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.dropout = None  # the same text has the same tokens


def check_cost(tokenizer: Tokenizer) -> None:
    """Refuses steps that can make a text much longer, or take time that grows exponentially with it.

    Raises:
        InvalidInputError: The tokenizer replaces text by patterns, or has a regular expression that repeats a group
            without bound, whose matching may never end.
    """
    for step in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        pending = [json.loads(step.__getstate__())] if step is not None else []
        while pending:
            part = pending.pop()
            if isinstance(part, list):
                pending += part
            elif isinstance(part, dict):
                pending += part.values()
                if part.get("type") in ("Replace", "Prepend", "Precompiled"):
                    raise InvalidInputError(
                        f"the tokenizer has the step {part['type']}; expected GPT-2's, or one like it"
                    )
                if REPEATED_GROUP.search(str(part.get("Regex", ""))):
                    raise InvalidInputError(
                        f"the tokenizer splits by {part['Regex'][:100]!r}, which repeats a group without bound; "
                        "expected an expression whose time is bounded, such as GPT-2's"
                    )


@contextmanager
def errors_of_tokenizers(what: str) -> Iterator[None]:
    """Turns the errors of `tokenizers` into `InvalidInputError`, with `what` in front."""
    try:
        yield
    except InvalidInputError:
        raise
    except BaseException as error:
        # Errors are plain exceptions; a panic of the library's Rust code is a BaseException of a class of its own.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidInputError(f"{what} ({one_line(error)})") from error


def encode_prompts(tokenizer: Tokenizer, questions: Sequence[str], contexts: Sequence[str]) -> list[Prompt]:
    """Tokenizes prompts; each distinct passage once.

    Args:
        tokenizer: From `load_tokenizer`, or any that went through `prepare_tokenizer`.
        questions: One question a prompt.
        contexts: The passage of each question, in the same order.

    Raises:
        InvalidInputError: The two differ in length, an entry is not a string or has no text in it, or the tokenizer
            fails.
    """
    check_texts(questions, contexts)
    distinct = list(dict.fromkeys(contexts))
    passage_of = dict(zip(distinct, encode_passages(tokenizer, distinct), strict=True))
    return [
        Prompt(prefix_ids=passage_of[context], suffix_ids=suffix_ids)
        for context, suffix_ids in zip(contexts, encode_questions(tokenizer, questions), strict=True)
    ]


def check_texts(questions: Sequence[str], contexts: Sequence[str]) -> None:
    """Checks what prompts are to be made of.

    Raises:
        InvalidInputError: The two differ in length, or an entry is not a string or has no text in it.
    """
    if len(questions) != len(contexts):
        raise InvalidInputError(
            f"got {len(questions)} questions and {len(contexts)} contexts; expected one context for each question"
        )
    for kind, texts in (("question", questions), ("context", contexts)):
        for index, text in enumerate(texts):
            _check_text(text, kind, index)


def encode_passages(tokenizer: Tokenizer, contexts: Sequence[str]) -> list[list[int]]:
    """Tokenizes contexts as prompts begin with them, up to the label of the question.

    Raises:
        InvalidInputError: The tokenizer fails, or makes no tokens of one.
    """
    label = encode_label(tokenizer)
    passages = _encode(tokenizer, [PASSAGE_TEMPLATE.format(context=context) for context in contexts])
    return [ids + label for ids in _check_tokens(passages)]


def encode_label(tokenizer: Tokenizer) -> list[int]:
    """The tokens between a context and its question."""
    return _encode(tokenizer, [QUESTION_LABEL])[0]


def encode_questions(tokenizer: Tokenizer, questions: Sequence[str]) -> list[list[int]]:
    """Tokenizes questions as prompts end with them, without the label.

    Raises:
        InvalidInputError: The tokenizer fails, or makes no tokens of one.
    """
    asked = _encode(tokenizer, [QUESTION_TEMPLATE.format(question=question.strip()) for question in questions])
    return _check_tokens(asked)


def _check_tokens(encoded: list[list[int]]) -> list[list[int]]:
    if not all(encoded):
        raise InvalidInputError(
            "the tokenizer makes no tokens of a text; expected one like GPT-2's, which drops nothing"
        )
    return encoded


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Tokenizes answers as they follow `Answer:` (without the end-of-text); an empty answer has no tokens."""
    return _encode(
        tokenizer, [ANSWER_TEMPLATE.format(answer=answer.strip()) if answer.strip() else "" for answer in answers]
    )


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Tokenizes some texts, without special tokens. It holds the interpreter's lock only at its start and end.

    Raises:
        InvalidInputError: The tokenizer fails.
    """
    with errors_of_tokenizers("the tokenizer cannot encode the text"):
        encodings: list[Encoding] = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return encodings


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of some tokens.

    Raises:
        InvalidInputError: The tokenizer fails.
    """
    with errors_of_tokenizers("the tokenizer cannot decode its tokens"):
        text: str = tokenizer.decode(token_ids)
    return text


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in encode(tokenizer, texts)]


def _check_text(text: object, kind: str, index: int) -> None:
    if not isinstance(text, str):
        raise InvalidInputError(f"{kind} {index} is of type {type(text).__name__}; expected a string")
    if not text.strip():
        raise InvalidInputError(f"{kind} {index} is empty or only white space; expected some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{kind} {index} has a lone surrogate at character {error.start}; expected text that can be written "
            "as UTF-8. Decode the source with the right encoding, or with errors='replace'"
        ) from error
