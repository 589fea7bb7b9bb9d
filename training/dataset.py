"""What a run trains on and is evaluated with: sources are loaded, held out, weighted, limited and tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import datasets
from transformers import GPT2TokenizerFast

from qa_onnx.checkpoint.windows import read_windows
from qa_onnx.data.columns import parse_columns
from qa_onnx.data.example import Example
from qa_onnx.data.pairs import normalized
from qa_onnx.errors import InvalidInputError, PromptTooLongError
from qa_onnx.text.windows import WindowSettings
from training.data import RowSettings, cached_rows, too_long
from training.evaluation import encode_examples
from training.holdout import DEFAULT_EVAL, Overlap, hold_out, measure_overlap, parse_share
from training.settings import DataConfig, FinetuneConfig
from training.sources import Source, apply_weight, hash_examples, load_source
from training.unanswerable import make_unanswerable
from training.windows import select_windows

Parts = Sequence[Sequence[Example]]
"""The questions to train on of each source."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on and is evaluated with.

    Attributes:
        sources: The sources of training questions, as given.
        eval_source: The source of the questions to evaluate with.
        eval_examples: The first of these, as many as are wanted.
        rows: Tokenized training rows.
        train_questions: Number of questions of the sources in the rows.
        without_answer: Number of these that have no answer.
        made_without_answer: Number of further questions without an answer in the rows, which were made of the others.
        windows: How long passages are read, in training, evaluation and use.
        too_long: What is wrong with each question that was skipped because it fits into no window.
        is_held_out: Whether the questions to evaluate were held out of the sources.
        overlap: What the questions to evaluate share with those trained on.
    """

    sources: list[Source]
    eval_source: Source
    eval_examples: list[Example]
    rows: datasets.Dataset
    train_questions: int
    without_answer: int
    made_without_answer: int
    windows: WindowSettings
    too_long: list[str]
    is_held_out: bool
    overlap: Overlap

    def warnings(self) -> list[str]:
        """What a user has to know, one line each."""
        lines = [line for source in (*self.sources, self.eval_source) for line in source.warnings()]
        if self.too_long:
            lines.append(f"skipped {len(self.too_long)} questions that do not fit, the first: {self.too_long[0]}")
        if self.overlap:
            lines.append(f"{self.overlap} Scores are too high by that; --eval {DEFAULT_EVAL} holds out by passage")
        return lines

    def to_metrics(self) -> dict[str, Any]:
        """The numbers of `metrics.json` that are about the data."""
        return {
            "train_questions": self.train_questions,
            "train_questions_without_answer": self.without_answer,
            "questions_made_without_answer": self.made_without_answer,
            "questions_that_do_not_fit": len(self.too_long),
            "window": self.windows.window,
            "stride": self.windows.stride,
            "eval_questions": len(self.eval_examples),
            "eval_passages": len({normalized(example.context) for example in self.eval_examples}),
            "eval_questions_trained_on": self.overlap.same_question,
            "eval_questions_on_passages_trained_on": self.overlap.same_passage,
        }


def load_data(config: FinetuneConfig, tokenizer: GPT2TokenizerFast, positions: int) -> TrainingData:
    """Loads, checks and tokenizes what a run needs.

    Args:
        config: The settings of the run.
        tokenizer: From `training.model.load_tokenizer`.
        positions: Number of positions of the model.

    Raises:
        InvalidInputError: A source, a question or a setting is not what it has to be.
    """
    max_length = _check_lengths(config.data, positions)
    sources, eval_source, is_held_out = _load_sources(config)
    parts = _choose_examples(sources, config)
    base = config.model.model
    windows = select_windows(
        list(chain(*parts)),
        tokenizer.backend_tokenizer,
        window=config.data.window,
        stride=config.data.stride,
        max_positions=max_length,
        least=(read_windows(base).window or 0) if base is not None else 0,
    )
    limit = config.data.limit_eval
    asked = eval_source.examples if is_held_out else eval_source.examples[:limit]
    fitting, unfit = _split_by_fit(asked, tokenizer, max_length, windows, config)
    if is_held_out:  # `heldout.jsonl` has only questions that a bundle can answer
        eval_source = replace(eval_source, examples=tuple(fitting), sha256=hash_examples(fitting))
    settings = RowSettings(
        loss_on=config.data.loss_on,
        text_loss_share=config.data.text_loss_share,
        max_positions=max_length,
        windows=windows,
        no_answer_windows=config.data.no_answer_windows,
        seed=config.optimization.seed,
        packing=config.data.packing,
    )
    parts, made, rows, problems = _make_rows(parts, tokenizer, settings, config)
    examples = list(chain(*parts))
    return TrainingData(
        sources=sources,
        eval_source=eval_source,
        eval_examples=fitting[:limit],
        rows=rows,
        train_questions=len(examples),
        without_answer=sum(not example.answers for example in examples),
        made_without_answer=len(made),
        windows=windows,
        too_long=[*problems, *unfit],
        is_held_out=is_held_out,
        overlap=measure_overlap(examples, fitting[:limit]),
    )


def _check_lengths(config: DataConfig, positions: int) -> int:
    """Returns the maximum number of tokens of a prompt with its answer."""
    max_length = config.max_length or positions
    for name, tokens in (("--max-length", max_length), ("--pad-to", config.pad_to)):
        if tokens > positions:
            raise InvalidInputError(
                f"got {name} {tokens}; the model has {positions} positions, expected at most as many"
            )
    return max_length


def _load_sources(config: FinetuneConfig) -> tuple[list[Source], Source, bool]:
    """The sources to train on, the source to evaluate with, and whether that was held out of the others."""
    given, columns = config.data, parse_columns(config.data.columns)
    sources = [load_source(name, "train", columns=columns, skip_bad_rows=given.skip_bad_rows) for name in given.train]
    if parse_share(given.eval) is not None:
        sources, eval_source = hold_out(sources, given.eval, seed=config.optimization.seed)
        return sources, eval_source, True
    return sources, load_source(given.eval, "eval", columns=columns, skip_bad_rows=given.skip_bad_rows), False


def _choose_examples(sources: Sequence[Source], config: FinetuneConfig) -> Parts:
    """The questions of each source, as often as their weights say; of all together at most `limit_train`."""
    weights = config.data.weights or (1.0,) * len(sources)
    seed = config.optimization.seed
    weighted = [apply_weight(source, weight, seed) for source, weight in zip(sources, weights, strict=True)]
    left = sum(map(len, weighted)) if config.data.limit_train is None else config.data.limit_train
    parts = []
    for examples in weighted:
        parts.append(examples[:left])
        left -= len(parts[-1])
    if not any(parts):
        raise InvalidInputError(f"weights {list(weights)} leave no question to train on; expected larger ones")
    return parts


def _make_rows(
    parts: Parts, tokenizer: GPT2TokenizerFast, settings: RowSettings, config: FinetuneConfig
) -> tuple[Parts, list[Example], datasets.Dataset, list[str]]:
    """Tokenizes questions, and questions without an answer that are made of them.

    Returns:
        The questions that fit, those that were made, the rows of both, and what is wrong with each that does not fit.

    Raises:
        PromptTooLongError: A question fits into no window, and bad rows are not to be skipped, or it is all of them.
    """
    share, seed, cache_dir = config.data.no_answer_share, config.optimization.seed, config.data.cache_dir
    made = make_unanswerable(parts, share, seed=seed)
    try:
        return parts, made, cached_rows([*chain(*parts), *made], tokenizer, settings, cache_dir=cache_dir), []
    except PromptTooLongError as error:
        checked = [[(example, too_long(example, tokenizer, settings)) for example in part] for part in parts]
        problems = [problem for part in checked for _, problem in part if problem is not None]
        count = sum(map(len, parts))
        if len(problems) == count:
            raise
        if problems and not config.data.skip_bad_rows:
            raise PromptTooLongError(
                f"{error}. Or leave such questions out, {len(problems)} of {count}, with --skip-bad-rows"
            ) from error
    parts = [[example for example, problem in part if problem is None] for part in checked]
    made = make_unanswerable(parts, share, seed=seed)
    made = [example for example in made if too_long(example, tokenizer, settings) is None]
    return parts, made, cached_rows([*chain(*parts), *made], tokenizer, settings, cache_dir=cache_dir), problems


def _split_by_fit(
    examples: Sequence[Example],
    tokenizer: GPT2TokenizerFast,
    max_length: int,
    windows: WindowSettings,
    config: FinetuneConfig,
) -> tuple[list[Example], list[str]]:
    """The questions that can be evaluated, and what is wrong with each other one.

    Raises:
        InvalidInputError: Two have the same id.
        PromptTooLongError: One leaves no room for a window, and bad rows are not to be skipped, or it is all of them.
    """
    (name, count), *_ = Counter(example.id for example in examples).most_common(1)
    if count > 1:
        raise InvalidInputError(f"{count} questions to evaluate have the id {name!r}; expected one of its own for each")

    def check(asked: Sequence[Example]) -> None:
        max_new_tokens = config.evaluation.max_new_tokens
        encode_examples(asked, tokenizer, max_positions=max_length, max_new_tokens=max_new_tokens, settings=windows)

    try:
        check(examples)
    except PromptTooLongError:
        fitting, problems = [], []
        for example in examples:
            try:
                check([example])
                fitting.append(example)
            except PromptTooLongError as error:
                problems.append(str(error).replace("question 0 ", f"question {example.id} "))
        if not fitting or not config.data.skip_bad_rows:
            raise PromptTooLongError(
                f"{problems[0]}. Or leave such questions out of the evaluation, {len(problems)} of {len(examples)}, "
                "with --skip-bad-rows"
            ) from None
        return fitting, problems
    return list(examples), []
