"""Options that several commands share, and what is made of them: questions, a model, its configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from qa_onnx.answerer import Answerer
from qa_onnx.cli.output import on_one_line
from qa_onnx.config import DEFAULT_BATCH_SIZE, DEFAULT_MAX_NEW_TOKENS, KERNELS, EngineConfig, GenerationConfig
from qa_onnx.data.columns import FIELDS, parse_columns
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_sources
from qa_onnx.data.rows import check_skipped, skipped_lines
from qa_onnx.engine.provider import PROVIDERS

DATA_HELP = (
    "questions: SQuAD JSON, JSON lines, CSV, TSV, Parquet, a folder of `save_to_disk` or a hub id; one or several"
)


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str
) -> argparse.ArgumentParser:
    """Adds a command, with what it does in the list of commands and in its own help."""
    return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return value


def add_columns_option(parser: argparse._ActionsContainer) -> None:
    """Adds `--columns`, which `qa_onnx.data.columns.parse_columns` reads."""
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=NAME",
        help=f"names of columns, where rows are flat, such as question=ask; fields: {', '.join(FIELDS)}",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--data`, `--columns` and `--skip-bad-rows`, which `read_data` reads."""
    parser.add_argument("--data", required=True, nargs="+", type=Path, metavar="FILE", help=DATA_HELP)
    add_columns_option(parser)
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave bad rows out and name them; default: the first bad row is an error",
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `GenerationConfig` but `max_new_tokens` and `ignore_eos`; it checks them."""
    group = parser.add_argument_group("how to answer")
    group.add_argument("--extractive", action="store_true", help="only answers that are spans of the context")
    for name, kind, text in (
        ("num_answers", int, "different answers per question, the most probable first; default: 1"),
        ("no_repeat_ngram_size", int, "no n-gram of N tokens twice in prompt and answer; default: 0, no limit"),
        ("temperature", float, "draw tokens; default: 0, take the most probable"),
        ("top_k", int, "draw from the N most probable tokens; default: 0, all"),
        ("top_p", float, "draw from the most probable tokens that add up to X; default: 1, all"),
        ("seed", int, "of the draws; default: another each time"),
        ("no_answer_threshold", float, "no answer above this probability of none; default: the bundle's"),
        ("window", int, "tokens of a context read at once; default: the bundle's"),
        ("stride", int, "tokens that windows of a long context share; default: the bundle's"),
    ):
        default = next(field.default for field in fields(GenerationConfig) if field.name == name)
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, default=default, metavar="X" if kind is float else "N", help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the bundle, and the options of which `engine_config` makes its configuration."""
    add_bundle_option(parser)
    parser.add_argument("--provider", choices=PROVIDERS, default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per physical core")
    parser.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        help="the project's own operators, on the CPU; default: %(default)s",
    )
    parser.add_argument("--device-id", type=int, default=0, metavar="N", help="GPU; default: %(default)s")


def add_bundle_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, a bundle."""
    parser.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")


def add_batch_size_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--batch-size`."""
    parser.add_argument(
        "--batch-size", type=positive, default=DEFAULT_BATCH_SIZE, metavar="N", help="default: %(default)s questions"
    )


def add_limit_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--limit`, of the questions of `--data`."""
    parser.add_argument("--limit", type=positive, metavar="N", help="answer only the first N questions")


def add_max_new_tokens_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--max-new-tokens`."""
    parser.add_argument(
        "--max-new-tokens", type=positive, default=DEFAULT_MAX_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )


def read_data(arguments: argparse.Namespace, *, needs_answers: bool = True) -> list[Example]:
    """Reads the questions of a command, and tells on standard error of bad rows that are skipped.

    Args:
        arguments: With the options of `add_data_options`.
        needs_answers: False leaves gold answers aside.

    Raises:
        InvalidInputError: A bad row that is not to be skipped, or as of `qa_onnx.data.reader.read_sources`.
    """
    skipped: list[str] = []
    columns = parse_columns(arguments.columns)
    examples = read_sources(arguments.data, columns=columns, skipped=skipped, needs_answers=needs_answers)
    if not arguments.skip_bad_rows:
        check_skipped(skipped, len(examples))
    for line in skipped_lines(skipped):
        sys.stderr.write(f"{on_one_line(line)}\n")
    return examples


def source_names(sources: Sequence[Path]) -> str:
    """The names of data files, for messages."""
    return " and ".join(map(str, sources))


def load_answerer(arguments: argparse.Namespace) -> Answerer:
    """Loads the bundle of the options of `add_model_options`."""
    return Answerer.from_pretrained(arguments.model, provider=arguments.provider, config=engine_config(arguments))


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The configuration of the engine; without `--batch-size` that is the default."""
    return EngineConfig(
        threads=arguments.threads,
        kernels=arguments.kernels,
        device_id=arguments.device_id,
        batch_size=getattr(arguments, "batch_size", DEFAULT_BATCH_SIZE),
    )


def generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """The options of `add_generation_options` and `add_max_new_tokens_option` as a configuration."""
    names = {field.name for field in fields(GenerationConfig)} - {"ignore_eos"}
    return GenerationConfig(**{name: getattr(arguments, name) for name in names})
