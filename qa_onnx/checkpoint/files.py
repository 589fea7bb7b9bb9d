"""The files of a checkpoint: found inside its directory, or fetched from the hub, and read as data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_onnx.errors import InvalidInputError, one_line
from qa_onnx.files import read_text
from qa_onnx.hub import problem_of_hub

STARTER = "starter"
"""The name of the embedded model, wherever a model's name is taken. A directory of that name is `./starter`."""
STARTER_DIRECTORY = Path(__file__).parents[2] / "training" / "starter" / "model"
"""Where it is in a checkout. The wheel does not have it."""
CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER_NAME, VOCABULARY_NAME, MERGES_NAME = "tokenizer.json", "vocab.json", "merges.txt"
TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS_NAME, WINDOWS_NAME = "added_tokens.json", "windows.json"
DOWNLOADED = [CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors", ADAPTER_CONFIG_NAME, ADAPTER_NAME]
DOWNLOADED += [TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME]
DOWNLOADED += [VOCABULARY_NAME, MERGES_NAME, ADDED_TOKENS_NAME, WINDOWS_NAME]
"""What is fetched of a repository of the hub: no pickles and no code."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")

MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 2**20, 16 * 2**20
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
NAMES_SHOWN, MAX_NAME_LENGTH = 3, 100


def locate(name: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: that of `STARTER`, itself, or the snapshot of a hub id.

    A snapshot is fetched where the hub's cache lacks it; where the hub does not reply, the cache alone is asked.
    """
    if name == STARTER:
        if not STARTER_DIRECTORY.is_dir():
            raise InvalidInputError(
                f"the embedded model is not in {STARTER_DIRECTORY}: it comes with a checkout of the project, and not "
                f"with the installed package. Run the command in a checkout, or give a directory (./{STARTER} for one "
                "of that name)"
            )
        return STARTER_DIRECTORY
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InvalidInputError(f"it is a file; expected a directory with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if HUB_ID.fullmatch(str(name)) is None:
        raise InvalidInputError(f"there is no such directory; expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    from huggingface_hub import snapshot_download

    problem = problem_of_hub()
    options = {} if problem is None else {"local_files_only": True}
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=DOWNLOADED, **options))
    except (OSError, ValueError) as error:  # the hub's own errors and those of the connection are OSErrors
        raise InvalidInputError(
            f"there is no such directory, and the hub gave no model of that name ({problem or one_line(error)}). "
            f"Expected a directory with {CONFIG_NAME} and {WEIGHTS_NAME}, a hub id and a connection to the hub, or "
            f"{STARTER}, the embedded model"
        ) from error


def file_in(folder: Path, name: str) -> Path | None:
    """A file of a checkpoint; None where there is none.

    Raises:
        InvalidInputError: It is no regular file, or lies outside the directory. Blobs of the hub's cache may be linked
            to, which its snapshots and older downloads consist of.
    """
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise InvalidInputError(f"{name} is a link to a file that is not there; copy the file instead")
        return None
    root, target = folder.resolve(), path.resolve()
    is_blob = target.parent.name == "blobs" and (
        target.parents[1].name.startswith("models--") or root.parent == target.parents[1] / "snapshots"
    )
    if not target.is_relative_to(root) and not is_blob:
        raise InvalidInputError(f"{name} lies outside the model's directory, in {target}; copy it into the directory")
    if not path.is_file():
        raise InvalidInputError(f"{name} is not a file")
    return path


def read_file(folder: Path, name: str, max_bytes: int) -> str | None:
    """The text of a file; None where there is no such file."""
    path = file_in(folder, name)
    if path is None:
        return None
    size = path.stat().st_size
    if size > max_bytes:
        raise InvalidInputError(f"{name} has {size:,} bytes; expected at most {max_bytes:,}")
    return read_text(path, expected="a file of a model")


def read_json(folder: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    text = read_file(folder, name, max_bytes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} is not JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{name} holds a {type(value).__name__}; expected a JSON object")
    return value


@contextmanager
def open_tensors(path: Path, *, framework: str) -> Iterator[Any]:
    """Opens a safetensors file, `safetensors.safe_open`; what is wrong with it is an `InvalidInputError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise InvalidInputError(
            f"{path.name} is no whole safetensors file ({one_line(error)}); copy it again"
        ) from error


def no_weights(folder: Path, expected: str) -> InvalidInputError:
    """The error where a file of weights is not there; where there is a pickle in its place, it says so."""
    for name in PICKLES:
        if (folder / name).exists():
            return InvalidInputError(
                f"its weights are in {name}, a pickle, which can run code when it is opened; expected {expected}. "
                "If you trust it, convert it: load it with transformers or peft, and save_pretrained(DIR)"
            )
    return InvalidInputError(
        f"{expected} is not there; expected a model with its weights in safetensors, as training.finetune and "
        "save_pretrained write them"
    )


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(name[:MAX_NAME_LENGTH] for name in names[:NAMES_SHOWN])}{more}"
