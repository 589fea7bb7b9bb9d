"""Documents of any length: overlapping windows, each of which fits into the model's positions with its question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from qa_onnx.config import DEFAULT_STRIDE, MIN_WINDOW_TOKENS
from qa_onnx.engine.sequence import Prompt
from qa_onnx.errors import InvalidInputError, PromptTooLongError, short_repr
from qa_onnx.text.document import Documents, Part, words_of
from qa_onnx.text.prompt import check_texts, encode_label, encode_questions

MIN_NO_ANSWER = 0.01
BYTES_PER_TOKEN = 4
"""Of ordinary English text in UTF-8; no text has less than one."""
RESERVE_STEP = 64
"""What a window leaves to question and answer is a multiple of this, so that questions of like length share windows."""


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """How long contexts are read.

    Attributes:
        window: Maximum number of tokens of a context that are read at once, those of the prompt's `Context:` included;
            None is as many as the model's positions hold with the question and its answer.
        stride: Tokens that neighboring windows share, though no more than half a window.

    Raises:
        InvalidInputError: `window` is below `MIN_WINDOW_TOKENS`, or `stride` below 0, or one is no whole number.
    """

    window: int | None = None
    stride: int = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        if self.window is not None and (type(self.window) is not int or self.window < MIN_WINDOW_TOKENS):
            raise InvalidInputError(
                f"got window {short_repr(self.window)}; expected None or a whole number of at least {MIN_WINDOW_TOKENS}"
            )
        if type(self.stride) is not int or self.stride < 0:
            raise InvalidInputError(f"got stride {short_repr(self.stride)}; expected a whole number of at least 0")

    def with_given(self, *, window: int | None, stride: int | None) -> WindowSettings:
        """These settings, but for what is given: None keeps a setting."""
        return WindowSettings(
            window=self.window if window is None else window, stride=self.stride if stride is None else stride
        )

    def check_fit(self, max_positions: int) -> None:
        """Refuses a window that is longer than a model.

        Raises:
            InvalidInputError: It is.
        """
        if self.window is not None and self.window > max_positions:
            raise InvalidInputError(
                f"got window {self.window}; the model has {max_positions} positions for context, question and answer. "
                "Pass a smaller one"
            )


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a document with its prompt.

    Attributes:
        start: The character of the document at which the part starts.
        text: The part; the whole document where that fits.
        prompt: It and the question as tokens.
        log_prior: Logarithm of the part's share of the document, by the question's words that occur in it
            (`log_priors`); 0 for a whole document.
    """

    start: int
    text: str
    prompt: Prompt
    log_prior: float = 0.0


def encode_windows(
    tokenizer: Tokenizer,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_positions: int,
    max_new_tokens: int,
    settings: WindowSettings | None = None,
    documents: Documents | None = None,
) -> list[list[Window]]:
    """Tokenizes prompts, and cuts documents that are too long into windows. Questions and answers are never cut.

    A document is cut where it is longer than `settings.window`, or where its question and an answer of
    `max_new_tokens` (of a quarter of the positions at most) would not fit behind it.

    Args:
        tokenizer: From `load_tokenizer`, or any that went through `prepare_tokenizer`.
        questions: One question each.
        contexts: The document of each question, in the same order.
        max_positions: How many tokens prompt and answer may have together.
        max_new_tokens: Maximum number of tokens of an answer.
        settings: Size and overlap of windows; None is `WindowSettings()`.
        documents: Contexts of earlier calls, with the same tokenizer, which are not tokenized again.

    Returns:
        The windows of each question, in the document's order.

    Raises:
        InvalidInputError: As from `encode_prompts`.
        PromptTooLongError: A question leaves no room for a window of `MIN_WINDOW_TOKENS` tokens.
    """
    settings = settings or WindowSettings()
    settings.check_fit(max_positions)
    check_texts(questions, contexts)
    found = (documents or Documents(tokenizer, max_characters=0)).get(contexts)
    suffixes = encode_questions(tokenizer, questions)
    label_tokens = len(encode_label(tokenizer))
    room = min(max_new_tokens, max_positions // 4)
    windows: list[list[Window]] = []
    for index, (question, context, suffix_ids) in enumerate(zip(questions, contexts, suffixes, strict=True)):
        document = found[context]
        prompt = Prompt(prefix_ids=document.prefix_ids, suffix_ids=suffix_ids)
        size = len(prompt.prefix_ids) - label_tokens
        if len(prompt) + room <= max_positions and (settings.window is None or size <= settings.window):
            windows.append([Window(start=0, text=context, prompt=prompt)])
            continue
        budget = _window_budget(index, prompt, label_tokens=label_tokens, room=room, max_positions=max_positions)
        budget = min(budget, settings.window or budget)
        parts = document.cut(budget, min(settings.stride, budget // 2))
        windows.append(_ask_parts(parts, question, suffix_ids))
    return windows


def _ask_parts(parts: Sequence[Part], question: str, suffix_ids: list[int]) -> list[Window]:
    """The parts of a document with a question and its tokens."""
    priors = _log_priors(words_of(question), [part.words for part in parts])
    return [
        Window(
            start=part.start,
            text=part.text,
            prompt=Prompt(prefix_ids=part.prefix_ids, suffix_ids=suffix_ids),
            log_prior=prior,
        )
        for part, prior in zip(parts, priors, strict=True)
    ]


def _window_budget(index: int, prompt: Prompt, *, label_tokens: int, room: int, max_positions: int) -> int:
    """Maximum number of tokens of a window, with question and answer behind it.

    Args:
        index: Of the question, for the error.
        prompt: Question and whole context.
        label_tokens: Tokens of the label between the two.
        room: Tokens of the answer.
        max_positions: How many tokens all of it may have.

    Raises:
        PromptTooLongError: The question leaves no room for a window of `MIN_WINDOW_TOKENS` tokens.
    """
    needed = label_tokens + len(prompt.suffix_ids) + room
    budget = max_positions - -(-needed // RESERVE_STEP) * RESERVE_STEP
    if budget < max_positions // 2:
        budget = max_positions - needed
    if budget < MIN_WINDOW_TOKENS:
        raise PromptTooLongError(
            f"question {index} has {len(prompt.suffix_ids)} tokens; with an answer of {room} it leaves "
            f"{max(budget, 0)} of the model's {max_positions} positions to the context, and a window has at least "
            f"{MIN_WINDOW_TOKENS}. Shorten the question, or lower max_new_tokens"
        )
    return budget


def estimate_windows(
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    max_positions: int,
    max_new_tokens: int,
    settings: WindowSettings,
) -> int:
    """About how many windows `encode_windows` makes, without tokenizing: to refuse what would take too long.

    A context is taken to have a token in `BYTES_PER_TOKEN` bytes, and a question, which leaves the less room the longer
    it is, a token in each. Arguments are those of `encode_windows`.
    """
    sizes = {context: len(context.encode()) // BYTES_PER_TOKEN for context in set(contexts)}
    windows = 0
    for question, context in zip(questions, contexts, strict=True):
        room = max_positions - min(max_new_tokens, max_positions // 4) - len(question.encode())
        budget = max(MIN_WINDOW_TOKENS, min(room, settings.window or room))
        step = budget - min(settings.stride, budget // 2)
        windows += 1 if sizes[context] <= budget else -(-sizes[context] // step)
    return windows


def log_priors(question: str, texts: Sequence[str]) -> list[float]:
    """How likely each part of a document is to hold the answer, before any of them is read by the model.

    The words of the question that occur in a part speak for it, the rarer in the document the more: the inverse
    document frequency of Robertson and Sparck Jones (1976, "Relevance Weighting of Search Terms"), with the parts as
    documents. Words are compared by their first letters, so that inflections are alike.

    Returns:
        Logarithms of probabilities that add up to 1.
    """
    return _log_priors(words_of(question), [words_of(text) for text in texts])


def _log_priors(asked: set[str], words: Sequence[set[str]]) -> list[float]:
    scores = [0.0] * len(words)
    for word in sorted(asked):
        holds = [word in found for found in words]
        rarity = math.log((len(words) + 1) / (sum(holds) + 0.5))
        scores = [score + rarity * is_there for score, is_there in zip(scores, holds, strict=True)]
    best = max(scores)
    total = best + math.log(sum(math.exp(score - best) for score in scores))
    return [score - total for score in scores]


def weigh_windows(windows: Sequence[Window], no_answer: Sequence[float]) -> tuple[list[float], float]:
    """What each window's answers count for, and the probability that the document holds no answer.

    At most one window holds the answer, and before reading each is as likely to as its prior says. Reading one changes
    the odds by (1 - p) / p, where p is its probability of no answer; Bayes' rule gives the rest. Where a model was not
    trained on questions without an answer, p says nothing: below `MIN_NO_ANSWER` all are alike.

    Args:
        windows: Of one document.
        no_answer: For each of them, the probability from 0 to 1 that it holds no answer.

    Returns:
        Logarithms of what the probability of an answer in each window is multiplied with, to get its probability in the
        document; and the probability of no answer. Of a single window these are 0 and its own.
    """
    if len(windows) == 1:
        return [0.0], no_answer[0]
    clipped = [min(max(probability, MIN_NO_ANSWER), 1.0) for probability in no_answer]
    pairs = zip(windows, clipped, strict=True)
    total = 1.0 + sum(math.exp(window.log_prior) * (1.0 - p) / p for window, p in pairs)
    weights = [window.log_prior - math.log(p * total) for window, p in zip(windows, clipped, strict=True)]
    return weights, 1.0 / total


def answer_logprobs(found: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The log-probability of each text as the answer of a document: of equal texts the probabilities add up.

    Args:
        found: Texts, and their log-probabilities in a window, weighed as of `weigh_windows`.
    """
    logprobs: dict[str, float] = {}
    for text, logprob in found:
        known = logprobs.get(text, -math.inf)
        higher, lower = max(known, logprob), min(known, logprob)
        logprobs[text] = higher + math.log1p(math.exp(lower - higher))
    return logprobs
