"""Makes requests of questions and contexts: options resolved, texts checked, contexts tokenized in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import lru_cache

from tokenizers import Tokenizer

from qa_onnx.config import GenerationConfig
from qa_onnx.errors import InvalidInputError
from qa_onnx.manifest import Manifest
from qa_onnx.request import Request
from qa_onnx.text.constraint import Spans, TokenBytes, check_byte_level
from qa_onnx.text.document import Documents
from qa_onnx.text.windows import WindowSettings, encode_windows, estimate_windows

CACHED_CHARACTERS = 1_000_000
"""Of contexts whose tokens are kept for the next question on them: with their tokens, some 15 MB."""
CACHED_SPANS = 256
"""Contexts (or windows of them) whose words are kept, for extractive answers to the next question on them."""


class RequestFactory:
    """Makes the requests of one bundle; may be called from any thread."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, *, eos_token_id: int, max_positions: int) -> None:
        """Takes the bundle's manifest and tokenizer, and the engine's token and limit."""
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._eos_token_id = eos_token_id
        self._max_positions = max_positions
        self._token_bytes: TokenBytes | None = None
        self._documents = Documents(tokenizer, max_characters=CACHED_CHARACTERS)
        self._find_spans = lru_cache(maxsize=CACHED_SPANS)(self._compute_spans)

    def resolve(self, config: GenerationConfig | None, max_new_tokens: int | None = None) -> GenerationConfig:
        """Checks a caller's options, and adds the bundle's threshold where they have none.

        Raises:
            InvalidInputError: They are not a `GenerationConfig`, or out of range.
        """
        config = config or GenerationConfig()
        if not isinstance(config, GenerationConfig):
            raise InvalidInputError(f"got config of type {type(config).__name__}; expected a GenerationConfig")
        if max_new_tokens is not None:
            config = replace(config, max_new_tokens=max_new_tokens)
        if config.no_answer_threshold is None and not config.ignore_eos:
            config = replace(config, no_answer_threshold=self._manifest.no_answer_threshold)
        return config

    def make(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> list[Request]:
        """Makes the request of each question about its context.

        Args:
            questions: The questions.
            contexts: As many contexts.
            config: From `resolve`.
            on_text: Called with each new piece of an answer's text.

        Raises:
            InvalidInputError: A text is not a string or empty, or a context has fewer spans than `num_answers`.
            PromptTooLongError: A question leaves no room for a part of its context.
        """
        windows = encode_windows(
            self._tokenizer,
            questions,
            contexts,
            max_positions=self._max_positions,
            max_new_tokens=config.max_new_tokens,
            settings=self._window_settings(config),
            documents=self._documents,
        )
        if config.extractive and config.num_answers > 1:
            for index, context in enumerate(contexts):
                spans = self._find_spans(context).count(config.num_answers)
                if spans < config.num_answers:
                    raise InvalidInputError(
                        f"got num_answers {config.num_answers}; context {index} has only {spans} different spans. "
                        "Ask for fewer"
                    )
        return [
            Request(
                parts,
                config,
                tokenizer=self._tokenizer,
                eos_token_id=self._eos_token_id,
                max_positions=self._max_positions,
                find_spans=self._find_spans,
                calibration=self._manifest.calibration,
                on_text=on_text,
            )
            for parts in windows
        ]

    def estimate_windows(self, questions: Sequence[str], contexts: Sequence[str], config: GenerationConfig) -> int:
        """About how many windows the contexts would be read in, one context per question; nothing is tokenized."""
        return estimate_windows(
            questions,
            contexts,
            max_positions=self._manifest.max_positions,
            max_new_tokens=config.max_new_tokens,
            settings=self._window_settings(config),
        )

    def _window_settings(self, config: GenerationConfig) -> WindowSettings:
        return self._manifest.window_settings.with_given(window=config.window, stride=config.stride)

    def _compute_spans(self, context: str) -> Spans:
        if self._token_bytes is None:
            self._token_bytes = check_byte_level(self._tokenizer)
        return Spans(context, self._token_bytes)


def pair_texts(questions: Iterable[str], contexts: Iterable[str] | str) -> tuple[list[str], list[str]]:
    """Questions and their contexts as lists; one string is the context of all questions.

    Raises:
        InvalidInputError: One of the two is no ordered collection of texts.
    """
    asked = _as_list("questions", questions)
    return asked, [contexts] * len(asked) if isinstance(contexts, str) else _as_list("contexts", contexts)


def _as_list(name: str, texts: Iterable[str]) -> list[str]:
    """The texts of an iterable.

    Raises:
        InvalidInputError: It is one text, or nothing with an order.
    """
    dimensions = getattr(texts, "ndim", 1)  # of NumPy and pandas: a DataFrame yields the names of its columns
    if dimensions == 1 and isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | Set):
        return list(texts)
    raise InvalidInputError(
        f"got {name} of type {type(texts).__name__}; expected a list of strings, or a column of a table. For a single "
        "question call answer(question, context)"
    )
