"""Mutations of bundles, drawn at random: files, manifest, tokenizer, graphs and weights."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from random import Random

from bench.fuzz.graphs import mutate_graph
from bench.fuzz.mutable_bundle import OUTSIDE_NAME, WEIGHTS_NAME, MutableBundle
from bench.fuzz.mutations import ODD_NUMBERS, dump_json, mutate_bytes, mutate_json
from bench.fuzz.tokenizers import replace_tokenizer_part
from qa_onnx.manifest import CACHE_COPY_NAME, CONFIG_NAME, KERNEL_MODEL_NAME, MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME

UNLISTED_NAMES = ("unlisted.bin", "link.bin")
"""Files that a graph may name and the manifest does not."""


def mutate_bundle(random: Random, bundle: MutableBundle) -> str:
    """Mutates some files of a bundle; its manifest mostly has their new checksums, as an attacker's would.

    Returns:
        What was done.
    """
    chosen = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=random.choice((1, 1, 1, 2)))
    done = [mutation(random, bundle) for mutation in chosen if mutation is not _manifest]
    changes = {name: listed for name, listed in bundle.changes().items() if name not in UNLISTED_NAMES}
    if random.random() < _CORRECTED:
        try:
            values = bundle.manifest()
            values["files"] |= changes
            bundle.write(MANIFEST_NAME, json.dumps(values).encode())
        except (ValueError, RecursionError):
            done.append("no manifest")
    elif bundle.listed.keys() & changes.keys():
        bundle.must_be_refused = True
        done.append("checksums of before")
    if _manifest in chosen:
        done.append(_manifest(random, bundle))
    return "; ".join(done)


def _bytes(random: Random, bundle: MutableBundle) -> str:
    name = random.choice((MODEL_NAME, KERNEL_MODEL_NAME, CACHE_COPY_NAME, TOKENIZER_NAME, CONFIG_NAME))
    content, done = mutate_bytes(random, bundle.read(name))
    bundle.write(name, content)
    return f"{name}: {done}"


def _json(random: Random, bundle: MutableBundle) -> str:
    name = random.choice((TOKENIZER_NAME, TOKENIZER_NAME, CONFIG_NAME))
    try:
        value = json.loads(bundle.read(name))
    except (ValueError, RecursionError):
        return "nothing"
    done = [mutate_json(random, value) for _ in range(random.choice((1, 1, 3)))]
    bundle.write(name, dump_json(random, value))
    return f"{name}: {', '.join(done)}"


def _weights(random: Random, bundle: MutableBundle) -> str:
    """Changes the weights: NaN, infinity, huge numbers, other bytes."""
    data = bundle.read(WEIGHTS_NAME)
    number = random.choice(
        (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", bytes(4), b"\x01\x00\x00\x00")
    )
    match random.randrange(3):
        case 0:
            place = 4 * random.randrange(max(len(data) // 4, 1))
            length = 4 * random.choice((1, 256, 10**5))
            data = data[:place] + number * (length // 4) + data[place + length :]
            done = f"{length} bytes from {place} are {number.hex()}"
        case 1:
            data, done = number * (len(data) // 4), f"all are {number.hex()}"
        case _:
            data, done = mutate_bytes(random, data)
    bundle.write(WEIGHTS_NAME, data)
    return f"{WEIGHTS_NAME}: {done}"


def _kind_of_file(random: Random, bundle: MutableBundle) -> str:
    """Puts something that is no file in a file's place, or another file, or none."""
    name = random.choice(
        (
            MODEL_NAME,
            KERNEL_MODEL_NAME,
            CACHE_COPY_NAME,
            TOKENIZER_NAME,
            CONFIG_NAME,
            WEIGHTS_NAME,
            MANIFEST_NAME,
            "extra",
        )
    )
    outside = bundle.directory.parent / OUTSIDE_NAME
    kind = random.choice(
        (
            "missing",
            "empty",
            "directory",
            "pipe",
            "socket",
            "zeros",
            "null",
            "loop",
            "outside",
            "inside",
            "huge",
            "other",
        )
    )
    path = bundle.remove(name)
    match kind:
        case "empty":
            path.touch()
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "null":
            path.symlink_to("/dev/null")
        case "loop":
            path.symlink_to(path)
        case "outside":
            path.symlink_to(outside)
        case "inside":
            path.symlink_to(random.choice((MODEL_NAME, TOKENIZER_NAME, ".")))
        case "huge":
            path.touch()
            os.truncate(path, 2**28)
        case "other":
            os.link(outside, path)
    return f"{name}: {kind}"


def _manifest(random: Random, bundle: MutableBundle) -> str:
    """Changes the manifest: its bytes, any entry, or a field to what contradicts the other files."""
    try:
        values = bundle.manifest()
    except (ValueError, RecursionError):
        return "nothing"
    match random.randrange(5):
        case 0:
            content, done = mutate_bytes(random, bundle.read(MANIFEST_NAME))
            bundle.write(MANIFEST_NAME, content)
            return f"manifest: {done}"
        case 1:
            done = mutate_json(random, values)
        case 2:
            name = random.choice(_FILE_NAMES)
            values["files"][name] = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
            done = f"lists {name[:40]!r}"
        case 3:
            name = random.choice(list(values["files"]))
            done = f"{name} is not listed"
            del values["files"][name]
            bundle.must_be_refused = True
        case _:
            name = random.choice(_NUMBERS)
            wrong = (values[name] + 1, values[name] - 1, 2 * values[name], *ODD_NUMBERS, "12", None, True)
            values[name] = random.choice(wrong)
            done = f"{name} is {repr(values[name])[:40]}"
    bundle.write(MANIFEST_NAME, dump_json(random, values))
    return f"manifest: {done}"


_NUMBERS = ("format_version", "eos_token_id", "max_positions", "layers", "heads", "head_size", "vocab_size")
_FILE_NAMES = (
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/dev/null",
    "a\\b",
    "\x00",
    "\ud800",
    "x" * 300,
    MANIFEST_NAME,
    "con",
    "é",
    "e\u0301",
)
_CORRECTED = 0.95
"""How often the manifest has the new checksums."""
_WEIGHTS: dict[Callable[[Random, MutableBundle], str], int] = {
    _bytes: 4,
    _json: 4,
    replace_tokenizer_part: 4,
    mutate_graph: 8,
    _weights: 1,
    _kind_of_file: 2,
    _manifest: 4,
}
"""How often each mutation is chosen."""
