"""Answers for tables, on any engine that hands a function one batch of columns after another (Ray, Spark, Dask).

    answers = AnswerBatch("bundle", on_error="null")
    answers({"question": ["Who crossed it?"], "context": ["Ada crossed the bridge."]})["answer"]

An `AnswerBatch` holds settings only, so it can be pickled and sent to other machines, where the bundle is at the same
path. Each process loads the bundle at its first batch, once, and keeps it for all batches.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qa_onnx.answer import Answer
from qa_onnx.answerer import Answerer
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.errors import EngineError, InvalidInputError, OutOfMemoryError, QAOnnxError, one_line, short_repr

RESULTS = ("answer", "score", "start", "end", "no_answer_probability", "finish_reason")
"""Columns that every batch gets; with `on_error="null"` it gets `ERROR`, too."""
ERROR = "error"
ON_ERROR = ("raise", "null")
ROW_ERRORS = (InvalidInputError, EngineError, OutOfMemoryError)
"""Errors that one row may have while others have none."""

_loaded: dict[tuple[int, str, str, EngineConfig], Answerer] = {}
"""The answerers of this process, and those of the process that it was forked from, which must not be freed here."""
_loading = threading.Lock()


class AnswerBatch:
    """Answers a batch of rows: a function from columns to columns.

    Rows are answered in the order of their contexts, so that the prefix cache serves the questions of one context, and
    the results come in the order of the input. A row has the same answer alone and in any batch.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        question: str = "question",
        context: str = "context",
        prefix: str = "",
        on_error: str = "raise",
        generation: GenerationConfig | None = None,
        provider: str = "auto",
        engine: EngineConfig | None = None,
    ) -> None:
        """Checks the settings; nothing is loaded before the first batch.

        Args:
            model: The bundle's directory, in every process that answers. It is made absolute.
            question: Name of the column with the questions.
            context: Name of the column with the contexts.
            prefix: Begins the names of the columns that are added, where the input has columns of their names.
            on_error: `raise` fails a batch that has a row without an answer. `null` leaves that row's results None and
                says why in the column `error`, which is None in all other rows.
            generation: How to answer; None is `GenerationConfig()`. `num_answers` has to be 1.
            provider: As of `Answerer.from_pretrained`.
            engine: As of `Answerer.from_pretrained`. Where several processes share a machine, give each its `threads`.

        Raises:
            InvalidInputError: An unknown `on_error`, more than one answer per row, or two columns of one name.
        """
        generation, engine = generation or GenerationConfig(), engine or EngineConfig()
        if on_error not in ON_ERROR:
            raise InvalidInputError(f"got on_error {short_repr(on_error)}; expected one of {', '.join(ON_ERROR)}")
        if question == context:
            raise InvalidInputError(
                f"got {question!r} as the column of questions and of contexts; expected two columns"
            )
        if not isinstance(generation, GenerationConfig) or not isinstance(engine, EngineConfig):
            given = f"generation of type {type(generation).__name__} and engine of type {type(engine).__name__}"
            raise InvalidInputError(f"got {given}; expected a GenerationConfig and an EngineConfig")
        if generation.num_answers > 1:
            raise InvalidInputError(
                f"got num_answers {generation.num_answers}; a row has columns for one answer. Leave it out, or call "
                "Answerer.answer_batch, whose answers have alternatives"
            )
        self.model = Path(model).absolute()
        self.question, self.context, self.prefix = question, context, prefix
        self.on_error, self.generation = on_error, generation
        self.provider, self.engine = provider, engine

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are added, in their order."""
        results = (*RESULTS, ERROR) if self.on_error == "null" else RESULTS
        return tuple(self.prefix + name for name in results)

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Answers the rows of a batch.

        Args:
            columns: Each column by its name, all of one length: lists, NumPy or Arrow arrays, pandas Series, or what
                else has a length and yields values. Two of them hold strings: questions and contexts.

        Returns:
            The columns as they came, and as lists `answer` (string), `score` (float), `start` and `end` (characters of
            the context, or None), `no_answer_probability` (float) and `finish_reason` (string): the fields of `Answer`.
            With `on_error="null"` also `error`, and None in the others where it is not None.

        Raises:
            InvalidInputError: A column is missing, has another length, or has the name of a result; or, with
                `on_error="raise"`, a row has no text or its question is too long. The message names the row.
            EngineError, OutOfMemoryError: As from `Answerer.answer_batch`; with `on_error="null"` only where no row of
                the batch can be computed.
            BundleError, ProviderError: As from `Answerer.from_pretrained`, in either case.
        """
        self.check_names(columns)
        questions, contexts = _values(columns[self.question]), _values(columns[self.context])
        for name, column in columns.items():
            if len(column) != len(questions):
                raise InvalidInputError(
                    f"got {len(column)} values of {name!r} and {len(questions)} of {self.question!r}; expected one of "
                    "each in every row"
                )
        rows = self._answer_rows(questions, contexts)
        fields: dict[str, Any] = {
            self.prefix + name: [getattr(row, "text" if name == "answer" else name, None) for row in rows]
            for name in RESULTS
        }
        if self.on_error == "null":
            fields[self.prefix + ERROR] = [None if isinstance(row, Answer) else one_line(row) for row in rows]
        return {**columns, **fields}

    def check_names(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        """Checks the names of a table's columns.

        Raises:
            InvalidInputError: The columns of questions and contexts are not among them, or one has a result's name.
        """
        missing = [name for name in (self.question, self.context) if name not in names]
        if missing:
            has = ", ".join(map(repr, names)) or "none"
            raise InvalidInputError(
                f"no column {' and '.join(map(repr, missing))} among {has}; expected questions and contexts. Pass the "
                "names of their columns"
            )
        taken = [name for name in self.columns if name in names]
        if taken:
            raise InvalidInputError(
                f"the column {' and '.join(map(repr, taken))} is in the input already, where a result would go; "
                "expected other names. Rename it, or pass a prefix for the results, such as qa_"
            )

    def close(self) -> None:
        """Frees the model in this process, where it is loaded. The next batch loads it again."""
        with _loading:
            answerer = _loaded.pop(self._key(), None)
        if answerer is not None:
            answerer.close()

    def _key(self) -> tuple[int, str, str, EngineConfig]:
        return os.getpid(), str(self.model), self.provider, self.engine

    def _load(self) -> Answerer:
        key = self._key()
        with _loading:
            answerer = _loaded.get(key)
            if answerer is None:
                answerer = Answerer.from_pretrained(self.model, provider=self.provider, config=self.engine)
                _loaded[key] = answerer
        answerer.answer_batch([], [], config=self.generation)  # options that do not fit the model are no row's error
        return answerer

    def _answer_rows(self, questions: list[Any], contexts: list[Any]) -> list[Answer | QAOnnxError]:
        """The answer of each row, or with `on_error="null"` its error."""
        rows: list[Answer | QAOnnxError] = [
            InvalidInputError(text_problem(self.question, question) or text_problem(self.context, context))
            for question, context in zip(questions, contexts, strict=True)
        ]
        good = [index for index, error in enumerate(rows) if not str(error)]
        if self.on_error == "raise":
            for index, error in enumerate(rows):
                if str(error):
                    raise InvalidInputError(f"row {index}: {error}")
        good.sort(key=contexts.__getitem__)  # stable
        answerer = self._load()
        for index, found in self._answer_some(answerer, questions, contexts, good):
            if self.on_error == "raise" and not isinstance(found, Answer):
                raise type(found)(f"row {index}: {found}") from found
            rows[index] = found
        failed = [rows[index] for index in good if isinstance(rows[index], EngineError | OutOfMemoryError)]
        if failed and len(failed) == len(good) and isinstance(failed[0], QAOnnxError):
            raise failed[0]  # a device that fails is no row's error
        return rows

    def _answer_some(
        self, answerer: Answerer, questions: list[Any], contexts: list[Any], rows: list[int]
    ) -> Iterator[tuple[int, Answer | QAOnnxError]]:
        """Each of some rows with its answer or its error, which is found by halving: most batches have none."""
        try:
            answers = answerer.answer_batch(
                [questions[row] for row in rows], [contexts[row] for row in rows], config=self.generation
            )
        except ROW_ERRORS as error:
            if len(rows) == 1:
                message = re.sub(r"^(question|context) 0 ", r"\1 ", str(error))  # counted in a batch of one
                yield rows[0], type(error)(message)
                return
            middle = len(rows) // 2
            yield from self._answer_some(answerer, questions, contexts, rows[:middle])
            yield from self._answer_some(answerer, questions, contexts, rows[middle:])
        else:
            yield from zip(rows, answers, strict=True)


def _values(column: Any) -> list[Any]:
    """The values of a column; an Arrow array yields scalars of its own, and has a method for Python's."""
    return list(column.to_pylist() if hasattr(column, "to_pylist") else column)


def text_problem(name: str, value: object) -> str:
    """What is wrong with a value that should be a text; empty where nothing is."""
    if not isinstance(value, str):
        kind = type(value).__name__
        is_missing = value is None or kind == "NAType" or (isinstance(value, float) and math.isnan(value))
        return f"{name} is {'missing' if is_missing else f'of type {kind}'}; expected some text"
    return "" if value.strip() else f"{name} is empty or only white space; expected some text"


def _renew_lock() -> None:
    """In a fork: another thread may have held the lock, and that thread is not here."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
