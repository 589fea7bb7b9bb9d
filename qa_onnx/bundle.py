"""The bundle: one directory that `export.to_onnx` writes and `Answerer` loads, described by its manifest.

The manifest, `qa_onnx.json`, names every other file with its size and SHA-256. Nothing is loaded before all of them
were checked, nothing in a bundle is code, and file names cannot leave the directory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.errors import BundleError, InvalidInputError
from qa_onnx.files import write_file
from qa_onnx.text.prompt import PROMPT_TEMPLATE

FORMAT_VERSION = 4
MANIFEST_NAME = "qa_onnx.json"
MODEL_NAME = "model.onnx"
CACHE_COPY_NAME = "cache_copy.onnx"
TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "config.json"
REQUIRED_FILES = (MODEL_NAME, CACHE_COPY_NAME, TOKENIZER_NAME, CONFIG_NAME)
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        format_version: `FORMAT_VERSION` of the code that wrote it.
        precision: One of `PRECISIONS`.
        inputs: The graph's input names, in order.
        outputs: The graph's output names, in order.
        prompt_template: The prompt that the model was trained on.
        eos_token_id: The token that ends an answer.
        max_positions: How many tokens prompt and answer may have together.
        layers: Number of decoder layers.
        heads: Attention heads a layer.
        head_size: Size of one head's keys and values.
        vocab_size: Width of the logits.
        source_model: The model that was exported, as the export was told it.
        package_versions: Versions of the packages that made the bundle.
        parity: The report of the export's parity gate, which compares the fp32 graph with PyTorch.
        precision_loss: Where the precision is not fp32, what the export measured beside fp32; else empty.
        no_answer: What `python -m qa_onnx calibrate` found, `threshold` among it; empty before.
        files: For each file, `bytes` and `sha256`.
    """

    format_version: int
    precision: str
    inputs: list[str]
    outputs: list[str]
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
    no_answer: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def cache_layout(self) -> CacheLayout:
        """What keys and values of this model look like."""
        dtype = "float16" if self.precision == "fp16" else "float32"
        return CacheLayout(layers=self.layers, heads=self.heads, head_size=self.head_size, dtype=dtype)

    @property
    def no_answer_threshold(self) -> float | None:
        """The probability of no answer above which there is none; None where the bundle was not calibrated."""
        threshold: float | None = self.no_answer.get("threshold")
        return threshold

    def to_dict(self) -> dict[str, Any]:
        """The manifest as the JSON object that is on disk."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files were all found and checked."""

    directory: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The decoder's graph."""
        return self.directory / MODEL_NAME

    @property
    def cache_copy_path(self) -> Path:
        """The graph that copies KV caches on the device."""
        return self.directory / CACHE_COPY_NAME

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer, in the format of the `tokenizers` library."""
        return self.directory / TOKENIZER_NAME

    @classmethod
    def open(cls, directory: str | Path) -> Bundle:
        """Reads a bundle's manifest and checks every file against it.

        Raises:
            BundleError: There is no bundle there, it is of another format version, or files are missing, cut short,
                altered or named so that they lie outside; the message lists all of them.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        problems = [problem for name in sorted(manifest.files) for problem in _file_problems(directory, name, manifest)]
        problems += [f"{name}: not listed in the manifest" for name in REQUIRED_FILES if name not in manifest.files]
        if problems:
            raise BundleError(
                f"{directory} is not a whole bundle: {'; '.join(problems)}. "
                "Copy it again, or write it again with python -m export.to_onnx"
            )
        return cls(directory=directory, manifest=manifest)

    def check_graph(self, inputs: list[str], outputs: list[str]) -> None:
        """Holds the names of a loaded graph's inputs and outputs against the manifest.

        Raises:
            BundleError: They differ.
        """
        for kind, got, expected in (
            ("inputs", inputs, self.manifest.inputs),
            ("outputs", outputs, self.manifest.outputs),
        ):
            if got != expected:
                raise BundleError(
                    f"{self.model_path} has {kind} {got}; the manifest says {expected}. Export the model again"
                )

    def keep_no_answer(self, found: dict[str, Any]) -> Bundle:
        """Keeps what a calibration found in the manifest on disk; returns the bundle as it is then.

        Raises:
            BundleError: The manifest cannot be written.
        """
        manifest = replace(self.manifest, no_answer=found)
        try:
            _save(manifest, self.directory)
        except InvalidInputError as error:
            raise BundleError(str(error)) from error
        return replace(self, manifest=manifest)


def write_manifest(directory: Path, description: dict[str, Any]) -> Manifest:
    """Completes a bundle: lists the files of the directory with their checksums and writes the manifest.

    Args:
        directory: Holds every file of the bundle but the manifest.
        description: The manifest's fields but `format_version`, `prompt_template`, `no_answer` and `files`.
    """
    paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_NAME)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        prompt_template=PROMPT_TEMPLATE,
        no_answer={},
        files={path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
        **description,
    )
    _save(manifest, directory)
    return manifest


def _save(manifest: Manifest, directory: Path) -> None:
    write_file(directory / MANIFEST_NAME, json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    if not path.is_file():
        what = f"it has no {MANIFEST_NAME}" if directory.is_dir() else "there is no such directory"
        raise BundleError(
            f"{directory} is not a bundle: {what}. Expected a directory written by python -m export.to_onnx"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}). Copy or export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} is not a JSON object. Copy or export the bundle again")
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {version!r}; this version of qa_onnx reads {FORMAT_VERSION}. "
            "Export the model again with the qa_onnx that will load it"
        )
    problems = [
        f"{field.name} should be {expected.__name__}, got {values[field.name]!r}"
        if field.name in values
        else f"{field.name} is missing"
        for field in fields(Manifest)
        for expected in (_json_type(str(field.type)),)
        if type(values.get(field.name)) is not expected  # a bool is an int to isinstance
    ]
    unknown = values.keys() - {field.name for field in fields(Manifest)}
    problems += [f"{name} is not a known field" for name in sorted(unknown)]
    if not problems and values["prompt_template"] != PROMPT_TEMPLATE:
        problems.append(f"prompt_template is {values['prompt_template']!r}, not {PROMPT_TEMPLATE!r}")
    if not problems and values["precision"] not in PRECISIONS:
        problems.append(f"precision {values['precision']!r} is not one of {', '.join(PRECISIONS)}")
    if not problems:
        counts = ("max_positions", "layers", "heads", "head_size", "vocab_size")
        problems += [f"{name} is {values[name]}, not a positive number" for name in counts if values[name] < 1]
        if not 0 <= values["eos_token_id"] < values["vocab_size"]:
            problems.append(f"eos_token_id {values['eos_token_id']} is not one of {values['vocab_size']} tokens")
        threshold = values["no_answer"].get("threshold")
        if threshold is not None and (not isinstance(threshold, int | float) or not 0 <= threshold <= 1):
            problems.append(f"no_answer.threshold is {threshold!r}, not a probability")
    if problems:
        raise BundleError(f"{path} is not a valid manifest: {'; '.join(problems)}. Export the model again")
    return Manifest(**values)


def _json_type(annotation: str) -> type:
    return {"int": int, "str": str, "list": list, "dict": dict}[annotation.split("[")[0]]


def _file_problems(directory: Path, name: str, manifest: Manifest) -> list[str]:
    """Checks one file: inside the directory, there, of its size, with its checksum."""
    path = directory / name
    listed = manifest.files[name]
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        return [f"{name!r}: not a plain file name"]
    if not path.is_file():
        return [f"{name}: missing"]
    if path.resolve().parent != directory.resolve():
        return [f"{name}: a link that leads outside the bundle"]
    if not isinstance(listed, dict) or path.stat().st_size != listed.get("bytes"):
        expected = listed.get("bytes") if isinstance(listed, dict) else listed
        return [f"{name}: {path.stat().st_size} bytes instead of {expected}"]
    if sha256_of(path) != listed.get("sha256"):
        return [f"{name}: wrong SHA-256, the content was altered"]
    return []
