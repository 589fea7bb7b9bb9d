r"""The prompt: the only place that knows how a passage, a question and an answer become text and tokens.

A prompt is `Context: {context}\nQuestion: {question}\nAnswer:`, and training adds ` {answer}<|endoftext|>`. The
passage comes first, so that all questions on a passage share their first tokens, up to the question's first word. What
they share is tokenised apart for the same reason: a passage has the same tokens whatever is asked about it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import InvalidInputError

PASSAGE_TEMPLATE = "Context: {context}"
QUESTION_LABEL = "\nQuestion:"
QUESTION_TEMPLATE = " {question}\nAnswer:"
ANSWER_TEMPLATE = " {answer}"
PROMPT_TEMPLATE = PASSAGE_TEMPLATE + QUESTION_LABEL + QUESTION_TEMPLATE


def load_tokenizer(path: str) -> Tokenizer:
    """Loads a `tokenizer.json`. Text such as `<|endoftext|>` inside a passage stays text; it is no control token."""
    tokenizer = Tokenizer.from_file(path)
    prepare_tokenizer(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer: Tokenizer) -> None:
    """Sets a tokenizer up as this package needs it: no truncation, no padding, no control tokens from text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True


def encode_prompts(tokenizer: Tokenizer, questions: Sequence[str], contexts: Sequence[str]) -> list[Prompt]:
    """Tokenises prompts; each distinct passage once.

    Args:
        tokenizer: From `load_tokenizer`, or any that went through `prepare_tokenizer`.
        questions: One question a prompt.
        contexts: The passage of each question, in the same order.

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
    distinct = list(dict.fromkeys(contexts))
    passages = _encode(tokenizer, [PASSAGE_TEMPLATE.format(context=context) for context in distinct])
    (label,) = _encode(tokenizer, [QUESTION_LABEL])
    passage_of = {context: ids + label for context, ids in zip(distinct, passages, strict=True)}
    asked = _encode(tokenizer, [QUESTION_TEMPLATE.format(question=question.strip()) for question in questions])
    return [
        Prompt(prefix_ids=passage_of[context], suffix_ids=suffix_ids)
        for context, suffix_ids in zip(contexts, asked, strict=True)
    ]


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Tokenises answers as they follow `Answer:` (without the end-of-text); an empty answer has no tokens."""
    return _encode(
        tokenizer, [ANSWER_TEMPLATE.format(answer=answer.strip()) if answer.strip() else "" for answer in answers]
    )


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


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
