"""The bundle: one directory that `export.to_onnx` writes and `Answerer` loads, described by its manifest.

The manifest, `qa_onnx.json`, lists every other file with its size and SHA-256. Nothing is loaded before all of them
were checked, nothing in a bundle is code, and no file is read that the manifest does not list. Manifest, configuration,
tokenizer and graphs must agree. A file may be a link, as in the cache of the Hugging Face hub or in a volume of
Kubernetes: its SHA-256 decides.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from qa_onnx.engine.kv_cache import ALIGNMENT, aligned
from qa_onnx.engine.session import Session, Signature
from qa_onnx.engine.signature import copier_inputs, copier_outputs, decoder_inputs, decoder_outputs
from qa_onnx.errors import BundleError, InvalidInputError, short_repr
from qa_onnx.graph_file import PRECISION_OPERATORS, GraphFile
from qa_onnx.manifest import (
    CACHE_COPY_NAME,
    CONFIG_NAME,
    KERNEL_MODEL_NAME,
    MODEL_NAME,
    REQUIRED_FILES,
    TOKENIZER_NAME,
    Manifest,
    check_size,
    list_problems,
    read_json_object,
    read_manifest,
    save_manifest,
    sha256_of,
)
from qa_onnx.text.prompt import MAX_TOKENIZER_BYTES, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files are complete and checked."""

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
            manifest = read_manifest(directory)
        except OSError as error:  # such as a directory of another user
            raise BundleError(f"{directory} cannot be read ({error.strerror}); expected read permission") from error
        problems = [problem for name in sorted(manifest.files) for problem in _file_problems(directory, name, manifest)]
        required = (*manifest.graphs, *REQUIRED_FILES)
        problems += [f"{name}: not listed in the manifest" for name in required if name not in manifest.files]
        if problems:
            raise BundleError(
                f"{directory} is not a whole bundle: {list_problems(problems)}. "
                "Copy it again, or write it again with python -m export.to_onnx"
            )
        return cls(directory=directory, manifest=manifest)

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer, and checks it against the manifest.

        Raises:
            BundleError: It cannot be loaded, is too large, or is not that of the model.
        """
        path, manifest = self.tokenizer_path, self.manifest
        check_size(path, MAX_TOKENIZER_BYTES)
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
        config = read_json_object(self.directory / CONFIG_NAME)
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
            raise BundleError(f"{self.directory} contradicts itself: {list_problems(problems)}. Export the model again")

    def keep(self, found: dict[str, dict[str, Any]]) -> Bundle:
        """Writes the result of a calibration into the manifest on disk; returns the changed bundle.

        Args:
            found: Some of the manifest's fields `windows`, `no_answer` and `scores`.

        Raises:
            BundleError: The manifest cannot be written.
        """
        manifest = replace(self.manifest, **cast(dict[str, Any], found))
        try:
            save_manifest(manifest, self.directory)
        except InvalidInputError as error:
            raise BundleError(str(error)) from error
        return replace(self, manifest=manifest)


def _graph_problems(decoder: GraphFile, graph: str, manifest: Manifest) -> list[str]:
    """Differences between a decoder's file and the manifest."""
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


def _file_problems(directory: Path, name: str, manifest: Manifest) -> list[str]:
    """Checks one file: its name, that it exists, its size and its checksum."""
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
    """Differences between a signature and the one that the manifest implies."""
    problems = [f"{what} {short_repr(name)} is not expected" for name in got if name not in expected]
    for name, kind in expected.items():
        if name not in got:
            problems.append(f"{what} {name} is missing")
        elif not kind.matches(got[name]):
            problems.append(f"{what} {name} is {short_repr(str(got[name]), quote=False)}, the manifest says {kind}")
    if not problems and list(got) != list(expected):
        problems.append(f"{what}s are in another order")
    return problems
