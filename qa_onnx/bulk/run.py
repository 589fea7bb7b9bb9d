"""A run of `answer-file`: an output folder with one file for each shard, which the same command continues.

    out/_run.json                  what the run is: inputs, options, bundle
    out/part-00000-00000.parquet   the first shard of the first file
    out/part-00000-00001.parquet   the second
    out/_SUCCESS                   all shards are there

A shard's file is written under another name, synced and renamed: where it is there, it is whole. Readers of data sets
(pyarrow, Spark, DuckDB) leave out names that begin with `_` or `.`, so the folder can be read as one table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import qa_onnx
from qa_onnx.batch import ON_ERROR, AnswerBatch
from qa_onnx.bulk.plan import InputFile, find_files, plan_file
from qa_onnx.bulk.table_files import OUTPUT_FORMATS
from qa_onnx.bulk.workers import Shard, ShardWriter, write_shards
from qa_onnx.bundle import Bundle
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.data.json_text import read_json
from qa_onnx.errors import InvalidInputError, QAOnnxError, short_repr
from qa_onnx.files import write_file
from qa_onnx.loading import choose_backend
from qa_onnx.lock import folder_lock
from qa_onnx.manifest import MANIFEST_NAME, sha256_of
from qa_onnx.progress import Progress

FORMAT_VERSION = 1
RUN_NAME = "_run.json"
DONE_NAME = "_SUCCESS"
LOCK_NAME = ".lock"


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """What to answer, how, and where the answers go.

    Attributes:
        inputs: Files, or folders of them.
        output: The folder for the answers; it is made where it is not there.
        model: The bundle.
        columns: What fields are called, from `qa_onnx.data.columns.parse_columns`.
        prefix: Begins the names of the columns that are added.
        on_error: `raise` ends the run at a row without an answer, `null` says in the column `error` what is wrong.
        output_format: One of `OUTPUT_FORMATS`.
        shard_rows: Maximum number of rows of a file that is written.
        processes: How many processes answer, each with a model of its own.
        generation: How to answer.
        provider: As of `Answerer.from_pretrained`.
        engine: Of each process.

    Raises:
        InvalidInputError: A value is out of range, or answers would be drawn without a seed.
    """

    inputs: Sequence[Path]
    output: Path
    model: Path
    columns: Mapping[str, str]
    prefix: str = ""
    on_error: str = "raise"
    output_format: str = "parquet"
    shard_rows: int = 1000
    processes: int = 1
    generation: GenerationConfig
    provider: str = "auto"
    engine: EngineConfig

    def __post_init__(self) -> None:
        for name, allowed in (("on_error", ON_ERROR), ("output_format", OUTPUT_FORMATS)):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidInputError(f"got {name} {short_repr(value)}; expected one of {', '.join(allowed)}")
        for name in ("shard_rows", "processes"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"got {name} {getattr(self, name)}; expected a whole number of at least 1")
        if self.generation.samples and self.generation.seed is None:
            raise InvalidInputError(
                f"got temperature {self.generation.temperature:g} without a seed; expected one, as a run that is "
                "continued would draw other answers. Pass --seed, such as --seed 0"
            )


@dataclass(frozen=True, kw_only=True)
class BulkReport:
    """What a run did.

    Attributes:
        rows: Rows that it answered.
        rows_before: Rows that were answered before, when it was interrupted.
        shards: Files that are in the output folder.
        errors: How many of `rows` have an error.
    """

    rows: int
    rows_before: int
    shards: int
    errors: int


def answer_files(config: BulkConfig) -> BulkReport:
    """Answers all rows of some files, but for those that an interrupted run of the same has answered.

    Inputs are read and checked to their end before anything is computed.

    Raises:
        InvalidInputError: An input cannot be read, or a row has no answer and has to have one; the output folder is of
            another run, is used by another process, or cannot be written. Finished shards are kept.
        QAOnnxError: As from `Answerer.from_pretrained` and `Answerer.answer_batch`.
    """
    answers = AnswerBatch(
        config.model,
        prefix=config.prefix,
        on_error="null",  # the writers name the row of a file that has an error
        generation=config.generation,
        provider=config.provider,
        engine=config.engine,
    )
    precision = Bundle.open(config.model).manifest.precision
    provider, kernels = choose_backend(precision, provider=config.provider, kernels=config.engine.kernels)
    paths = find_files(config.inputs)
    with _folder(config.output):
        files = [
            plan_file(
                path,
                columns=config.columns,
                results=answers.columns if config.on_error == "null" else answers.columns[:-1],
                needs_texts=config.on_error == "raise",
                output_format=config.output_format,
                shard_rows=config.shard_rows,
            )
            for path in paths
        ]
        if not any(file.shards for file in files):
            raise InvalidInputError(
                f"{' and '.join(map(str, config.inputs))}: there are no rows; expected at least one"
            )
        _check_run(config.output, _manifest(config, files, provider=provider, kernels=kernels.instruction_set))
        report = _answer_shards(config, answers, files)
        write_file(config.output / DONE_NAME, "")
    return report


def _answer_shards(config: BulkConfig, answers: AnswerBatch, files: Sequence[InputFile]) -> BulkReport:
    parts = [
        [(config.output / f"part-{number:05}-{shard:05}.{config.output_format}", rows) for shard, rows in enumerate(of)]
        for number, of in enumerate(file.shards for file in files)
    ]
    before = _rows_there(parts)
    total = sum(rows for of_file in parts for _, rows in of_file)
    if before < total:
        (config.output / DONE_NAME).unlink(missing_ok=True)  # of a run whose shards were deleted since
    write = ShardWriter(answers=answers, output_format=config.output_format, keeps_errors=config.on_error == "null")
    errors = 0
    try:
        with Progress(total - before, "answering", enabled=True) as bar:
            for done in write_shards(_missing_shards(files, parts), write, processes=config.processes):
                errors += done.errors
                bar.advance(done.rows)
    except (QAOnnxError, KeyboardInterrupt) as error:
        kept = _rows_there(parts)
        if kept:
            error.add_note(f"The answers to {kept:,} rows are in {config.output}; the same command continues there")
        raise
    finally:
        answers.close()
    return BulkReport(rows=total - before, rows_before=before, shards=sum(map(len, parts)), errors=errors)


def _rows_there(parts: Sequence[Sequence[tuple[Path, int]]]) -> int:
    """How many rows the files have that are there."""
    return sum(rows for of_file in parts for path, rows in of_file if path.exists())


def _missing_shards(files: Sequence[InputFile], parts: Sequence[Sequence[tuple[Path, int]]]) -> Iterator[Shard]:
    """The shards whose file is not there."""
    for file, of_file in zip(files, parts, strict=True):
        first = 0
        tables = file.tables([not path.exists() for path, _ in of_file])
        for table, (path, rows) in zip(tables, of_file, strict=True):
            if table is not None:
                yield Shard.of(table, file, first_row=first, target=path)
            first += rows


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """Makes and locks the output folder, clears what was left half written, and removes it if it is empty."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"--output {output}: cannot be made ({error.strerror}); expected a folder") from error
    try:
        with folder_lock(output / LOCK_NAME, what=f"a run of answer-file in {output}"):
            _remove_partial_files(output)
            try:
                yield
            finally:
                _remove_partial_files(output)  # of processes that were killed because of an error or Ctrl-C
    finally:
        with suppress(OSError):  # it has files, as it should
            output.rmdir()


def _remove_partial_files(output: Path) -> None:
    for name in ("part-*", f"{RUN_NAME}.*", f"{DONE_NAME}.*"):
        for path in output.glob(f".{name}.partial"):
            path.unlink()


def _manifest(config: BulkConfig, files: Sequence[InputFile], *, provider: str, kernels: str | None) -> dict[str, Any]:
    """What decides the content of every shard. How it is computed, as by how many processes, does not.

    Args:
        config: What was asked for.
        files: The inputs.
        provider: That runs the bundle here, where the configuration may say `auto`.
        kernels: Their instruction set; None without kernels.
    """
    generation = {field.name: getattr(config.generation, field.name) for field in fields(GenerationConfig)}
    return {
        "format_version": FORMAT_VERSION,
        "qa_onnx": qa_onnx.__version__,
        "bundle": sha256_of(config.model / MANIFEST_NAME),
        "inputs": [file.to_dict() for file in files],
        "shard_rows": config.shard_rows,
        "output_format": config.output_format,
        "on_error": config.on_error,
        "prefix": config.prefix,
        "provider": provider,
        "kernels": kernels,
        "generation": generation,
    }


def _check_run(output: Path, manifest: dict[str, Any]) -> None:
    """Checks that a folder has no run or this one, and writes what this one is.

    Raises:
        InvalidInputError: It has another run, or files that are no run's, or cannot be written.
    """
    path = output / RUN_NAME
    if not path.exists():
        others = sorted(file.name for file in output.iterdir() if file.name != LOCK_NAME)
        if others:
            raise InvalidInputError(
                f"--output {output}: has files already, such as {others[0]}, and no run of answer-file; expected a new "
                "or an empty folder"
            )
        write_file(path, json.dumps(manifest, indent=1) + "\n")
        return
    found = read_json(path)
    if not isinstance(found, dict):
        raise InvalidInputError(
            f"{path}: is not the description of a run; expected it unchanged. Choose a new --output"
        )
    if found != manifest:
        both = {name: (_shown(found.get(name)), _shown(manifest[name])) for name in manifest}
        named = ", ".join(f"{name} {old} instead of {new}" for name, (old, new) in both.items() if old != new)
        raise InvalidInputError(
            f"--output {output}: is of another run ({named or 'with other shards'}); expected the command of then. "
            "Choose a new folder, or delete this one"
        )


def _shown(value: object) -> str:
    """A part of a manifest in an error, which is short."""
    if isinstance(value, list):
        return " and ".join(
            f"{item.get('name')} ({str(item.get('sha256'))[:8]}, {sum(item.get('shards', []))} rows)"
            for item in value
            if isinstance(item, dict)
        )
    text = str(value)
    return text[:12] if len(text) == 64 else text
