"""The manifest of a bundle, `qa_onnx.json`: its fields, how it is written, and how it is read and checked."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qa_onnx.config import DEFAULT_STRIDE
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.errors import BundleError, InvalidInputError, short_repr
from qa_onnx.files import write_file
from qa_onnx.scores import ScoreCalibration
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from qa_onnx.text.windows import WindowSettings

FORMAT_VERSION = 7
MANIFEST_NAME = "qa_onnx.json"
MODEL_NAME = "model.onnx"
KERNEL_MODEL_NAME = "model.kernels.onnx"
"""The decoder of this package's own operators (`qa_onnx.kernels`), for the CPU."""
DATA_NAME = "model.onnx_data"
"""The weights of both graphs."""
CACHE_COPY_NAME = "cache_copy.onnx"
TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "config.json"
REQUIRED_FILES = (CACHE_COPY_NAME, TOKENIZER_NAME, CONFIG_NAME)
GRAPHS = {
    "fp32": (MODEL_NAME, KERNEL_MODEL_NAME),
    "bf16": (KERNEL_MODEL_NAME,),
    "int8": (MODEL_NAME, KERNEL_MODEL_NAME),
    "fp16": (MODEL_NAME,),
}
"""The decoder's graphs in each precision. ONNX Runtime itself has no bfloat16 matmul on x86 processors."""
PRECISIONS = tuple(GRAPHS)
MAX_JSON_BYTES = 2**20
"""Maximum size of the manifest, and of the model's configuration."""
MAX_COUNTS = {"max_positions": 2**20, "layers": 1000, "heads": 2**12, "head_size": 2**16, "vocab_size": 2**24}
"""Upper limits of a model's dimensions."""
SHOWN_PROBLEMS = 10
"""Maximum number of problems that an error names."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a bundle.

    Attributes:
        format_version: `FORMAT_VERSION` of the code that wrote it.
        precision: One of `PRECISIONS`.
        prompt_template: The prompt that the model was trained on.
        eos_token_id: The token that ends an answer.
        max_positions: Maximum number of tokens of prompt and answer together.
        layers: Number of decoder layers.
        heads: Attention heads per layer.
        head_size: Size of one head's keys and values.
        vocab_size: Width of the logits.
        source_model: The exported model, as `--model` of the export named it.
        package_versions: Versions of the packages that the export used.
        parity: The report of the export's parity gate, which compares the fp32 graph with PyTorch.
        precision_loss: What the precision loses compared with fp32, as the export measured it; empty for fp32.
        windows: `window` and `stride`, with which long contexts are read (`WindowSettings`), and how they were chosen.
        no_answer: The result of calibration (`qa_onnx.calibration`), with `threshold`; empty before.
        scores: `slope` and `intercept` of `ScoreCalibration`, and how they were found; empty before.
        files: For each file, `bytes` and `sha256`.
    """

    format_version: int
    precision: str
    prompt_template: str
    eos_token_id: int
    max_positions: int
    layers: int
    heads: int
    head_size: int
    vocab_size: int
    source_model: str
    package_versions: dict[str, str]
    parity: dict[str, Any]
    precision_loss: dict[str, Any]
    windows: dict[str, Any]
    no_answer: dict[str, Any]
    scores: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def cache_layout(self) -> CacheLayout:
        """Number, shape and dtype of the model's keys and values."""
        dtype = "float16" if self.precision == "fp16" else "float32"
        return CacheLayout(layers=self.layers, heads=self.heads, head_size=self.head_size, dtype=dtype)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of the decoder's graphs."""
        return GRAPHS[self.precision]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, which the graphs share."""
        return int(self.files[DATA_NAME]["bytes"]) if DATA_NAME in self.files else 0

    @property
    def no_answer_threshold(self) -> float | None:
        """An answer is given up to this probability of no answer; None for a bundle that was not calibrated."""
        threshold: float | None = self.no_answer.get("threshold")
        return threshold

    @property
    def window_settings(self) -> WindowSettings:
        """How long contexts are read, unless a call gives its own settings."""
        return WindowSettings(window=self.windows.get("window"), stride=self.windows.get("stride", DEFAULT_STRIDE))

    @property
    def calibration(self) -> ScoreCalibration:
        """Turns the model's probabilities into scores."""
        return ScoreCalibration(slope=self.scores.get("slope", 1.0), intercept=self.scores.get("intercept", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """The manifest as the JSON object that is on disk."""
        return asdict(self)


def write_manifest(directory: Path, description: dict[str, Any]) -> Manifest:
    """Completes a bundle: lists the files of the directory with their checksums and writes the manifest.

    Args:
        directory: Holds every file of the bundle but the manifest.
        description: The manifest's fields but `format_version`, `prompt_template`, `no_answer`, `scores` and `files`.
    """
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_NAME)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        prompt_template=PROMPT_TEMPLATE,
        no_answer={},
        scores={},
        files={path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
        **description,
    )
    save_manifest(manifest, directory)
    return manifest


def save_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes the manifest of a bundle, whole or not at all."""
    write_file(directory / MANIFEST_NAME, json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest of a bundle.

    Raises:
        BundleError: There is none, it is of another format version, or fields of it are wrong; the message lists them.
        OSError: It cannot be read.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        what = f"it has no {MANIFEST_NAME}" if directory.is_dir() else "there is no such directory"
        expected = "Expected a directory written by python -m export.to_onnx"
        if directory.name == "starter" or (directory / "config.json").is_file():
            expected = f"It is a model to export: python -m export.to_onnx --model {directory} --output BUNDLE"
        raise BundleError(f"{directory} is not a bundle: {what}. {expected}")
    values = read_json_object(path)
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {short_repr(version)}; this version of qa_onnx reads {FORMAT_VERSION}. "
            "Export the model again with the qa_onnx that will load it"
        )
    problems = _field_problems(values) or _value_problems(values)
    if problems:
        raise BundleError(f"{path} is not a valid manifest: {list_problems(problems)}. Export the model again")
    return Manifest(**values)


def _field_problems(values: dict[str, Any]) -> list[str]:
    """Fields that are missing, unknown or of another type."""
    problems = [
        f"{field.name} should be {expected.__name__}, got {short_repr(values[field.name])}"
        if field.name in values
        else f"{field.name} is missing"
        for field in fields(Manifest)
        for expected in (_json_type(str(field.type)),)
        if type(values.get(field.name)) is not expected  # a bool is an int to isinstance
    ]
    unknown = values.keys() - {field.name for field in fields(Manifest)}
    problems += [f"{short_repr(name, quote=False)} is not a known field" for name in sorted(unknown)]
    return problems


def _value_problems(values: dict[str, Any]) -> list[str]:
    """Values out of their range, of fields that are all there."""
    if values["prompt_template"] != PROMPT_TEMPLATE:
        return [f"prompt_template is {short_repr(values['prompt_template'])}, not {PROMPT_TEMPLATE!r}"]
    if values["precision"] not in PRECISIONS:
        return [f"precision {short_repr(values['precision'])} is not one of {', '.join(PRECISIONS)}"]
    problems = [
        f"{name} is {short_repr(values[name])}, not a number from 1 to {limit}"
        for name, limit in MAX_COUNTS.items()
        if not 1 <= values[name] <= limit
    ]
    if not 0 <= values["eos_token_id"] < values["vocab_size"]:
        problems.append(
            f"eos_token_id {short_repr(values['eos_token_id'])} is not one of {values['vocab_size']} tokens"
        )
    return problems + _calibration_problems(values)


def _calibration_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with the settings that calibration may change."""
    problems = []
    threshold = values["no_answer"].get("threshold")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        problems.append(f"no_answer.threshold is {short_repr(threshold)}, not a probability")
    for name, least in (("slope", 0.0), ("intercept", -math.inf)):
        value = values["scores"].get(name, 1.0)
        if not (_is_number(value) and least <= value < math.inf):
            problems.append(f"scores.{name} is {short_repr(value)}; expected a number from {least:g} on")
    windows = {name: values["windows"][name] for name in ("window", "stride") if name in values["windows"]}
    try:
        WindowSettings(**windows).check_fit(values["max_positions"])
    except InvalidInputError as error:
        problems.append(f"windows: {error}")
    return problems


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _json_type(annotation: str) -> type:
    return {"int": int, "str": str, "list": list, "dict": dict}[annotation.split("[")[0]]


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most `MAX_JSON_BYTES`."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    check_size(path, MAX_JSON_BYTES)
    try:
        values = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}). Copy or export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} is not a JSON object. Copy or export the bundle again")
    return values


def check_size(path: Path, limit: int) -> None:
    """Refuses a file of more than `limit` bytes."""
    size = path.stat().st_size
    if size > limit:
        raise BundleError(f"{path} has {size} bytes; expected at most {limit}. Copy or export the bundle again")


def list_problems(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
