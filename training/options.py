"""Command-line options made of dataclass fields: one place for name, type, default, range and help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qa_onnx.errors import InvalidInputError

Range = Literal["positive", "not negative", "share"]


def option(help: str, default: Any = MISSING, *, metavar: str | None = None, limits: Range | None = None) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        help: For `--help` and the documentation.
        default: Without one the option is required.
        metavar: What stands for the value in `--help`.
        limits: What `check_ranges` accepts: numbers above 0, of at least 0, or shares from 0 up to 1.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "limits": limits})


def check_ranges(config: Any) -> None:
    """Checks the numbers of a dataclass of `option` fields.

    Raises:
        InvalidInputError: One is out of its range.
    """
    for declared in fields(config):
        value = getattr(config, declared.name)
        if value is None:
            continue
        limits = declared.metadata.get("limits")
        if limits == "positive" and not 0 < value < math.inf:
            raise InvalidInputError(f"got {declared.name} {value}; expected a number above 0")
        if limits == "not negative" and value < 0:
            raise InvalidInputError(f"got {declared.name} {value}; expected a whole number of at least 0")
        if limits == "share" and not 0 <= value < 1:
            raise InvalidInputError(f"got {declared.name} {value}; expected a share from 0 up to 1")


def add_options(group: argparse._ActionsContainer, config_class: type, names: Sequence[str] | None = None) -> None:
    """Adds an option for each field of a dataclass, or for some of them: `--batch-size` for `batch_size`."""
    types = get_type_hints(config_class)
    for declared in fields(config_class):
        if "help" in declared.metadata and (names is None or declared.name in names):
            group.add_argument(
                f"--{declared.name.replace('_', '-')}",
                help=_describe(declared),
                required=declared.default is MISSING,
                **_argparse_type(types[declared.name], declared.metadata["metavar"]),
            )


def _describe(declared: Field[Any]) -> str:
    """The help of a field with its default, escaped for argparse."""
    words: str = declared.metadata["help"]
    if declared.default is MISSING:
        words += " (required)"
    if declared.default is not False and declared.default not in (MISSING, None, ()):
        words += f" (default: {declared.default})"
    return words.replace("%", "%%")


def _argparse_type(annotation: Any, metavar: str | None) -> dict[str, Any]:
    """The arguments of `add_argument` for a field's type: T, T | None, tuple[T, ...], bool or a Literal."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation), "metavar": metavar}
    if get_origin(annotation) is tuple:
        return {"type": get_args(annotation)[0], "nargs": "+", "metavar": metavar}
    return {"type": annotation, "metavar": metavar or {int: "N", float: "X", Path: "DIR"}.get(annotation)}
