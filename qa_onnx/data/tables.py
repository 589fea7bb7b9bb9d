"""Rows of Arrow tables: Parquet files, folders of `datasets`' `save_to_disk`, and data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_onnx.data.rows import FORMATS, Row
from qa_onnx.errors import InvalidInputError, one_line
from qa_onnx.hub import problem_of_hub

HUB_DATASETS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
ARROW_ERRORS = (OSError, ValueError, RuntimeError, TypeError, LookupError, NotImplementedError)
"""What pyarrow and datasets raise for files that are damaged or not theirs."""


def is_hub_id(name: str) -> bool:
    """Whether a name is one of `HUB_DATASETS`, or could be `owner/name` of the hub."""
    return name in HUB_DATASETS or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def rows_of_parquet(path: Path, *, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a Parquet file.

    Raises:
        InvalidInputError: The file cannot be read, or pyarrow is not installed.
    """
    with _read_with("pyarrow", f"{path}: cannot be read as a Parquet file", f"expected a whole one, or {FORMATS}"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(rows, columns)


def rows_of_directory(path: Path, *, split: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote.

    Args:
        path: The folder.
        split: Which one of a `DatasetDict`.
        columns: See `Row`.

    Raises:
        InvalidInputError: The folder is none of these or has no such split, or datasets is not installed.
    """
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise InvalidInputError(f"{path}: got a folder without a data set; expected {FORMATS}")
    with _read_with("datasets", f"{path}: cannot be read", "expected a whole data set; save it again"):
        import datasets

        found = datasets.load_from_disk(str(path))
    if isinstance(found, dict):
        if split not in found:
            parts = ", ".join(str(path / name) for name in found) or "none"
            raise InvalidInputError(f"{path}: has no split {split!r}; expected it, or one of the folders {parts}")
        found = found[split]
    with _read_with("datasets", f"{path}: cannot be read", "expected a whole data set; save it again"):
        yield from _numbered(found, columns)


def rows_of_hub(name: str, *, split: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a split of a data set of the hub; where the hub does not reply, of its cache.

    Raises:
        InvalidInputError: The data set cannot be loaded, or datasets is not installed.
    """
    problem = f"{name!r} is no file, and its split {split!r} could not be loaded from the hub"
    expected = f"check the name and the connection, or give {FORMATS}. Training also takes sample, generated questions"
    with _read_with("datasets", problem, expected):
        import datasets

        unreachable, offline = problem_of_hub(), datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = offline or unreachable is not None  # else the client tries for half a minute
        try:
            rows = datasets.load_dataset(HUB_DATASETS.get(name, name), split=split)
        except ConnectionError as error:
            raise ConnectionError(unreachable or one_line(error)) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = offline
        yield from _numbered(rows, columns)


@contextmanager
def _read_with(package: str, problem: str, expected: str) -> Iterator[None]:
    """Turns what a package raises into an error that says what is wrong and what was expected."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"{problem}: the package {error.name} is not installed; pip install {package}, or, in the checkout, "
            "'.[train]'"
        ) from error
    except Exception as error:
        if not isinstance(error, ARROW_ERRORS) and not type(error).__module__.startswith(("datasets.", "pyarrow.")):
            raise
        raise InvalidInputError(f"{problem} ({one_line(error)}); {expected}") from error


def _numbered(rows: Iterable[Any], columns: Mapping[str, str]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        yield Row(place=f"row {number}", values=row, columns=columns)
