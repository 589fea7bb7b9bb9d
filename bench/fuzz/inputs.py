"""Questions, contexts and options, drawn at random, and the ways to ask with them."""

from __future__ import annotations

import asyncio
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from bench.fuzz.runner import WrongResultError
from qa_onnx import Answer, Answerer, GenerationConfig

CONTEXT = "The bridge was opened in 1803 and is 412 metres long. It was built by Ada Smith in Oslo."
QUESTIONS = ("When was the bridge opened?", "Who built it?")


def make_text(random: Random) -> str:
    """Text: mostly like sentences, with some of all that Unicode has; rarely long, empty or not encodable."""
    kind = random.random()
    if kind < 0.02:
        return random.choice(("", " ", "\t\n", "\u3000", "\u200b", "\ufeff", "\u2028", "\x00", "\ud800", "a\udfff"))
    if kind < 0.04:
        unit = random.choice(("a", "1", "\xe9", "\u6f22", "\U0001f468\u200d\U0001f469", " a", "\u0301"))
        return unit * (random.choice((300, 2500)) // len(unit.encode()))
    if kind < 0.06:
        return " ".join(random.choices(PIECES, k=random.choice((30, 150))))
    pieces = random.choices(PIECES, k=random.choice((1, 2, 4, 8)))
    if random.random() < 0.3:
        pieces.insert(random.randrange(len(pieces)), chr(random.randrange(random.choice((256, 0xD800, 0x110000)))))
    return random.choice((" ", " ", " ", "", "\n")).join(pieces)


PIECES = (
    *CONTEXT.split(". "),
    *QUESTIONS,
    *"(led by 1,234.5 St. e.g. don't naïve Zürich Ærø <|endoftext|> Question: Answer: {context} %s \\n @file -".split(),
    *"e\u0301 a\u0308\u0323 שלום مرحبا \u202eevil\u202c हिन्दी ภาษาไทย 日本語 한국어 \ufb01 \u0130 ß \U00020000".split(),
    *"\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd".split(),
    *("\x00", "\x1b[0m", "\u2028", "\xa0", "\u200d", "\ufffd", "\ufffe", "\ufeff", "\r\n", "\x85", "\x1c"),
    "\nQuestion: who?\nAnswer: me",
    "x" * 30,
)
"""Of texts."""


def make_odd_input(random: Random) -> Any:
    """Something that is no string, or one of a kind of its own."""
    arrays = (np.str_(CONTEXT), np.array("a"), np.float64("nan"), np.array(["a", "b"]))
    values = (
        None,
        5,
        1.5,
        True,
        b"a",
        bytearray(b"a"),
        [],
        ["a"],
        {},
        {"text": "a"},
        float("nan"),
        object(),
        Path("a"),
    )
    return random.choice((*arrays, *values, CONTEXT))


def make_options(random: Random) -> dict[str, Any]:
    """Some options of `GenerationConfig`: most of them sensible, some extreme, a few of another type."""
    made: dict[str, Any] = {"max_new_tokens": random.choice(OPTIONS["max_new_tokens"])}
    if random.random() < 0.002:  # answers up to the model's last position take seconds
        made["max_new_tokens"] = 10**9
    for name in random.sample(list(OPTIONS), random.choice((0, 1, 1, 2, 3))):
        made[name] = random.choice(OPTIONS[name])
    if made.get("temperature"):
        made["seed"] = random.choice((0, 1, 2**32, None))
    if random.random() < 0.05:
        made[random.choice(list(OPTIONS))] = random.choice(ODD_OPTIONS)
    return made


OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (1, 2, 3, 5, 8, 8, 8, 8, 8, 8, 40),
    "extractive": (True, True, False),
    "num_answers": (1, 2, 2, 3, 3, 5, 1000),
    "no_repeat_ngram_size": (0, 1, 2, 3, 100),
    "temperature": (0.0, 0.5, 1.0, 1e-3, 1e3, 1e-310, 1e-30, 1e300, 1),
    "top_k": (0, 1, 5, 8191, 8192, 8193, 10**9),
    "top_p": (1.0, 0.9, 1e-9, 5e-324, 1),
    "seed": (0, 1, 2**32, 2**63, 10**30, None),
    "no_answer_threshold": (0.0, 1.0, 0.5, 1e-300, None),
    "stride": (0, 1, 128, 10**9),
    "ignore_eos": (True, False),
}
ODD_OPTIONS = (
    *(-1, 10**400, -(10**400), 2**63, float("nan"), float("inf"), -0.0, 1e-310, 0.5, 2.0, True, None, "1", b"1", []),
    *(np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(2), np.array([1, 2]), np.uint64(2**63)),
    *(Decimal("0.5"), Fraction(1, 2), 1j, object()),
)
"""Few of them are right for an option."""


def _batch(random: Random, answerer: Answerer, questions: Any, contexts: Any, config: GenerationConfig) -> list[Answer]:
    if random.random() < 0.1:  # other collections of the same texts
        questions = random.choice((tuple, iter, set, dict.fromkeys, str, deque, np.array, _objects))(questions)
    return answerer.answer_batch(questions, contexts, config=config)


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _iter(random: Random, answerer: Answerer, questions: Any, contexts: Any, config: GenerationConfig) -> list[Answer]:
    return list(answerer.answer_iter(zip(questions, contexts, strict=True), config=config))


def _submit(
    random: Random, answerer: Answerer, questions: Any, contexts: Any, config: GenerationConfig
) -> list[Answer]:
    futures = [answerer.submit(*pair, config=config) for pair in zip(questions, contexts, strict=True)]
    cancelled = answerer.submit(questions[0], contexts[0], config=config)
    cancelled.cancel()
    return [future.result() for future in futures]


def _async(random: Random, answerer: Answerer, questions: Any, contexts: Any, config: GenerationConfig) -> list[Answer]:
    async def ask() -> list[Answer]:
        pairs = zip(questions, contexts, strict=True)
        return await asyncio.gather(*(answerer.answer_async(*pair, config=config) for pair in pairs))

    return asyncio.run(ask())


def _stream(
    random: Random, answerer: Answerer, questions: Any, contexts: Any, config: GenerationConfig
) -> list[Answer]:
    answerer.stream(questions[0], contexts[0], config=config).close()
    streamed = ["".join(answerer.stream(*pair, config=config)) for pair in zip(questions, contexts, strict=True)]
    answers = [answerer.answer(*pair, config=config) for pair in zip(questions, contexts, strict=True)]
    for text, answer in zip(streamed, answers, strict=True):
        if text != answer.text and (not config.samples or config.seed is not None):
            raise WrongResultError(f"streamed {text!r} instead of {answer.text!r}")
    return answers


WAYS = (_batch, _batch, _iter, _submit, _async, _stream)
"""The ways to ask; each gives the answers in the order of the questions."""
