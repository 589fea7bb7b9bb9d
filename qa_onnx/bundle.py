"""The bundle: one directory that `export.to_onnx` writes and `Answerer` loads, described by its manifest.

The manifest, `qa_onnx.json`, names every other file with its size and SHA-256. Nothing is loaded before all of them
were checked, nothing in a bundle is code, and no file is read that the manifest does not list. Manifest, configuration,
tokenizer and graphs must agree. A file may be a link, as in the cache of the Hugging Face hub or in a volume of
Kubernetes: its SHA-256 decides.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from qa_onnx.config import DEFAULT_STRIDE
from qa_onnx.engine.kv_cache import ALIGNMENT, CacheLayout, aligned
from qa_onnx.engine.session import Session, Signature
from qa_onnx.engine.signature import copier_inputs, copier_outputs, decoder_inputs, decoder_outputs
from qa_onnx.errors import BundleError, InvalidInputError, short_repr
from qa_onnx.files import write_file
from qa_onnx.graph_file import PRECISION_OPERATORS, GraphFile
from qa_onnx.scores import ScoreCalibration
from qa_onnx.text.prompt import MAX_TOKENIZER_BYTES, PROMPT_TEMPLATE, load_tokenizer
from qa_onnx.text.windows import WindowSettings

FORMAT_VERSION = 7
MANIFEST_NAME = "qa_onnx.json"
MODEL_NAME = "model.onnx"
KERNEL_MODEL_NAME = "model.kernels.onnx"
"""The decoder of this package's own operators (`qa_onnx.kernels`), for the CPU."""
DATA_NAME = "model.onnx_data"
"""The weights of both."""
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
"""The decoder's graphs in each precision: ONNX Runtime multiplies in bfloat16 on no x86 processor."""
PRECISIONS = tuple(GRAPHS)
MAX_JSON_BYTES = 2**20
"""Of the manifest, and of the model's configuration."""
MAX_COUNTS = {"max_positions": 2**20, "layers": 1000, "heads": 2**12, "head_size": 2**16, "vocab_size": 2**24}
"""Upper limits of a model's dimensions."""
SHOWN_PROBLEMS = 10
"""Maximum number of problems that an error names."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        format_version: `FORMAT_VERSION` of the code that wrote it.
        precision: One of `PRECISIONS`.
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
        windows: `window` and `stride`, how long contexts are read (`WindowSettings`), and how they were chosen.
        no_answer: What calibration found (`qa_onnx.calibration`), `threshold` among it; empty before.
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
        """What keys and values of this model look like."""
        dtype = "float16" if self.precision == "fp16" else "float32"
        return CacheLayout(layers=self.layers, heads=self.heads, head_size=self.head_size, dtype=dtype)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of the decoder's graphs."""
        return GRAPHS[self.precision]

    @property
    def no_answer_threshold(self) -> float | None:
        """The probability of no answer above which there is none; None where the bundle was not calibrated."""
        threshold: float | None = self.no_answer.get("threshold")
        return threshold

    @property
    def window_settings(self) -> WindowSettings:
        """How long contexts are read, where a call does not say it."""
        return WindowSettings(window=self.windows.get("window"), stride=self.windows.get("stride", DEFAULT_STRIDE))

    @property
    def calibration(self) -> ScoreCalibration:
        """What makes scores of the model's probabilities."""
        return ScoreCalibration(slope=self.scores.get("slope", 1.0), intercept=self.scores.get("intercept", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """The manifest as the JSON object that is on disk."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files were all found and checked."""

    directory: Path
    manifest: Manifest

    def graph_path(self, *, has_kernels: bool = False) -> Path:
        """The decoder's graph; with `has_kernels`, the one of this package's own operators."""
        return self.directory / (KERNEL_MODEL_NAME if has_kernels else MODEL_NAME)

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
            BundleError: There is no bundle there, it is of another format version, or files are missing, unreadable,
                cut short, altered or named so that they lie outside; the message lists them.
        """
        if not isinstance(directory, str | os.PathLike):
            raise BundleError(f"got a bundle of type {type(directory).__name__}; expected the path of its directory")
        directory = Path(directory)
        try:
            manifest = _read_manifest(directory)
        except OSError as error:  # such as a directory of another user
            raise BundleError(f"{directory} cannot be read ({error.strerror}); expected read permission") from error
        problems = [problem for name in sorted(manifest.files) for problem in _file_problems(directory, name, manifest)]
        required = (*manifest.graphs, *REQUIRED_FILES)
        problems += [f"{name}: not listed in the manifest" for name in required if name not in manifest.files]
        if problems:
            raise BundleError(
                f"{directory} is not a whole bundle: {_listed(problems)}. "
                "Copy it again, or write it again with python -m export.to_onnx"
            )
        return cls(directory=directory, manifest=manifest)

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer, and checks it against the manifest.

        Raises:
            BundleError: It cannot be loaded, is too large, or is not that of the model.
        """
        path, manifest = self.tokenizer_path, self.manifest
        _check_size(path, MAX_TOKENIZER_BYTES)
        try:
            tokenizer = load_tokenizer(str(path))
        except InvalidInputError as error:
            raise BundleError(f"{path}: {error}. Export the model again") from error
        highest = max(tokenizer.get_vocab().values(), default=-1)
        if highest >= manifest.vocab_size:
            raise BundleError(
                f"{path} has a token {highest}; the manifest says that the model has {manifest.vocab_size} tokens. "
                "Export the model again"
            )
        if tokenizer.id_to_token(manifest.eos_token_id) is None:
            raise BundleError(f"{path} has no token {manifest.eos_token_id}, the manifest's eos_token_id")
        return tokenizer

    def check_files(self) -> None:
        """Checks configuration and graphs against the manifest, before ONNX Runtime opens the graphs.

        Raises:
            BundleError: They contradict each other, or a graph holds what the export does not write (see `GraphFile`).
        """
        manifest = self.manifest
        width = manifest.heads * manifest.head_size
        config = _read_json(self.directory / CONFIG_NAME)
        expected = {
            "model_type": "gpt2",
            "n_layer": manifest.layers,
            "n_head": manifest.heads,
            "n_embd": width,
            "n_positions": manifest.max_positions,
            "vocab_size": manifest.vocab_size,
        }
        problems = [
            f"{CONFIG_NAME} has {name} {short_repr(config.get(name))}, the manifest says {value}"
            for name, value in expected.items()
            if type(config.get(name)) is not type(value) or config[name] != value
        ]
        copier = GraphFile.read(self.cache_copy_path)
        data_files = set(copier.data_files)
        for graph in manifest.graphs:
            decoder = GraphFile.read(self.directory / graph)
            problems += _graph_problems(decoder, graph, manifest)
            data_files |= decoder.data_files
            for name in sorted(decoder.data_files & manifest.files.keys()):
                if (self.directory / name).resolve().parent != (self.directory / graph).resolve().parent:
                    problems.append(
                        f"{graph} and {name} are links to different directories, and ONNX Runtime wants one; "
                        "copy the files themselves into the bundle"
                    )
        unlisted = sorted(data_files - manifest.files.keys())
        problems += [f"{short_repr(name)}, which a graph reads, is not listed in the manifest" for name in unlisted]
        self._raise(problems)

    def check_graphs(self, decoder: Session, copier: Session) -> None:
        """Checks the inputs and outputs of the loaded graphs against the manifest.

        Raises:
            BundleError: They differ.
        """
        layout, name = self.manifest.cache_layout, decoder.path.name
        inputs = decoder_inputs(layout, has_kernels=decoder.has_kernels)
        outputs = decoder_outputs(layout, self.manifest.vocab_size, has_kernels=decoder.has_kernels)
        self._raise(
            [
                *_differences(f"{name} input", decoder.inputs, inputs),
                *_differences(f"{name} output", decoder.outputs, outputs),
                *_differences(f"{CACHE_COPY_NAME} input", copier.inputs, copier_inputs(layout)),
                *_differences(f"{CACHE_COPY_NAME} output", copier.outputs, copier_outputs(layout)),
            ]
        )

    def _raise(self, problems: list[str]) -> None:
        if problems:
            raise BundleError(f"{self.directory} contradicts itself: {_listed(problems)}. Export the model again")

    def keep(self, found: dict[str, dict[str, Any]]) -> Bundle:
        """Keeps what a calibration found in the manifest on disk; returns the bundle as it is then.

        Args:
            found: Some of the manifest's fields `windows`, `no_answer` and `scores`.

        Raises:
            BundleError: The manifest cannot be written.
        """
        manifest = replace(self.manifest, **cast(dict[str, Any], found))
        try:
            _save(manifest, self.directory)
        except InvalidInputError as error:
            raise BundleError(str(error)) from error
        return replace(self, manifest=manifest)


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
    values = _read_json(path)
    version = values.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format_version {short_repr(version)}; this version of qa_onnx reads {FORMAT_VERSION}. "
            "Export the model again with the qa_onnx that will load it"
        )
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
    if not problems and values["prompt_template"] != PROMPT_TEMPLATE:
        problems.append(f"prompt_template is {short_repr(values['prompt_template'])}, not {PROMPT_TEMPLATE!r}")
    if not problems and values["precision"] not in PRECISIONS:
        problems.append(f"precision {short_repr(values['precision'])} is not one of {', '.join(PRECISIONS)}")
    if not problems:
        problems += [
            f"{name} is {short_repr(values[name])}, not a number from 1 to {limit}"
            for name, limit in MAX_COUNTS.items()
            if not 1 <= values[name] <= limit
        ]
        if not 0 <= values["eos_token_id"] < values["vocab_size"]:
            problems.append(
                f"eos_token_id {short_repr(values['eos_token_id'])} is not one of {values['vocab_size']} tokens"
            )
        problems += _calibration_problems(values)
    if problems:
        raise BundleError(f"{path} is not a valid manifest: {_listed(problems)}. Export the model again")
    return Manifest(**values)


def _graph_problems(decoder: GraphFile, graph: str, manifest: Manifest) -> list[str]:
    """How a decoder's file contradicts the manifest."""
    width = manifest.heads * manifest.head_size
    shapes: dict[str, tuple[int, ...]] = {"wpe.weight": (manifest.max_positions, width)}
    if graph == MODEL_NAME:
        shapes["columns"] = (2 * aligned(manifest.max_positions) + 8 * ALIGNMENT,)
    group = {"bf16": 2, "int8": 4}.get(manifest.precision)
    if group is not None and "wte.weight.packed" in decoder.shapes:  # int8 may have left it in float32
        panels = aligned(manifest.vocab_size) // ALIGNMENT
        shapes["wte.weight.packed"] = (panels, aligned(width, group) // group, ALIGNMENT, group)
    else:
        shapes["wte.weight"] = (manifest.vocab_size, width)
    problems = [
        f"{name} in {graph} is {decoder.shapes.get(name)}, the manifest says {shape}"
        for name, shape in shapes.items()
        if decoder.shapes.get(name) != shape
    ]
    if decoder.constants.get("eos_token_id") != manifest.eos_token_id.to_bytes(8, "little"):
        problems.append(f"{graph} has another eos_token_id than the manifest's {manifest.eos_token_id}")
    for precision, operators in PRECISION_OPERATORS.items():
        if bool(operators & decoder.operators) != (manifest.precision == precision):
            problems.append(f"{graph} is not of the manifest's precision, {manifest.precision}")
            break
    return problems


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


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of at most `MAX_JSON_BYTES`."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    _check_size(path, MAX_JSON_BYTES)
    try:
        values = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as JSON ({error}). Copy or export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path} is not a JSON object. Copy or export the bundle again")
    return values


def _check_size(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise BundleError(f"{path} has {size} bytes; expected at most {limit}. Copy or export the bundle again")


def _file_problems(directory: Path, name: str, manifest: Manifest) -> list[str]:
    """Checks one file: inside the directory, there, of its size, with its checksum."""
    path = directory / name
    listed = manifest.files[name]
    shown = short_repr(name, quote=False)
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        return [f"{short_repr(name)}: not a plain file name"]
    if not isinstance(listed, dict):
        listed = {"bytes": listed}
    try:
        if not path.is_file():
            return [f"{shown}: missing"]
        if path.stat().st_size != listed.get("bytes"):
            return [f"{shown}: {path.stat().st_size} bytes instead of {short_repr(listed.get('bytes'))}"]
        if sha256_of(path) != listed.get("sha256"):
            return [f"{shown}: wrong SHA-256, the content was altered"]
    except OSError as error:  # such as a file that belongs to another user, or a name that is too long
        return [f"{shown}: cannot be read ({error.strerror})"]
    return []


def _differences(what: str, got: Signature, expected: Signature) -> list[str]:
    """How a signature differs from the one that the manifest implies."""
    problems = [f"{what} {short_repr(name)} is not expected" for name in got if name not in expected]
    for name, kind in expected.items():
        if name not in got:
            problems.append(f"{what} {name} is missing")
        elif not kind.matches(got[name]):
            problems.append(f"{what} {name} is {short_repr(str(got[name]), quote=False)}, the manifest says {kind}")
    if not problems and list(got) != list(expected):
        problems.append(f"{what}s are in another order")
    return problems


def _listed(problems: list[str]) -> str:
    """The first problems, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
