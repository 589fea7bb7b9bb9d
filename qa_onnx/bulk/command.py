"""The command `python -m qa_onnx answer-file`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.data.columns import parse_columns
from qa_onnx.errors import InvalidInputError


def add_bulk_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only `answer_file` reads; `BulkConfig` checks them."""
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, metavar="FILE", help="Parquet, JSON lines or CSV; or folders"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="a folder of its own; where a run was interrupted, the same command continues there",
    )
    parser.add_argument("--output-format", default="parquet", metavar="parquet|jsonl|csv", help="default: %(default)s")
    parser.add_argument("--shard-rows", type=int, default=1000, metavar="N", help="of a file; default: %(default)s")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="each with a model of its own; default: %(default)s"
    )
    parser.add_argument(
        "--on-error",
        default="raise",
        metavar="raise|null",
        help="null answers the other rows and says why in a column `error`; default: %(default)s",
    )
    parser.add_argument("--prefix", default="", metavar="TEXT", help="begins the names of the columns that are added")


def answer_file(arguments: argparse.Namespace, *, generation: GenerationConfig, engine: EngineConfig) -> str:
    """Runs the command; returns what to say at its end.

    Raises:
        InvalidInputError: pyarrow is not installed, or as from `qa_onnx.bulk.run.answer_files`.
    """
    try:
        from qa_onnx.bulk.run import BulkConfig, answer_files
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise InvalidInputError(
            "answer-file needs the package pyarrow; pip install pyarrow, or, in the checkout, '.[bulk]'"
        ) from error
    if engine.threads is None and arguments.processes > 1:
        engine = replace(engine, threads=max(1, (os.cpu_count() or 1) // arguments.processes))
    report = answer_files(
        BulkConfig(
            inputs=arguments.input,
            output=arguments.output,
            model=arguments.model,
            columns=parse_columns(arguments.columns),
            prefix=arguments.prefix,
            on_error=arguments.on_error,
            output_format=arguments.output_format,
            shard_rows=arguments.shard_rows,
            processes=arguments.processes,
            generation=generation,
            provider=arguments.provider,
            engine=engine,
        )
    )
    before = f", {report.rows_before:,} were there already" if report.rows_before else ""
    errors = f", {report.errors:,} with an error" if report.errors else ""
    return f"answered {report.rows:,} rows{errors}{before}: {report.shards:,} files in {arguments.output}"
