"""A copy of a bundle whose files can be changed one by one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qa_onnx.manifest import MANIFEST_NAME

WEIGHTS_NAME = "model.onnx_data"
OUTSIDE_NAME = "outside.bin"
"""A file next to the bundle, as large as its weights: nothing may read it."""
MAX_READ_BYTES = 2**26


class MutableBundle:
    """A copy of a bundle that is made of hard links, so that only the files that are mutated are written."""

    def __init__(self, source: Path, directory: Path) -> None:
        """Links the files; the two are on one file system."""
        directory.mkdir()
        for path in source.iterdir():
            os.link(path, directory / path.name)
        self.directory = directory
        self.listed: dict[str, dict[str, Any]] = self.manifest()["files"]
        """What the manifest said of each file before anything was mutated."""
        self.inodes = {name: (directory / name).stat().st_ino for name in self.listed}
        self.must_be_refused = False
        """Whether nobody may load it: data is read from elsewhere, or a checksum is wrong."""

    def read(self, name: str) -> bytes:
        """The content of a file; nothing where it is none any more, or a huge one."""
        path = self.directory / name
        is_readable = path.is_file() and not path.is_symlink() and path.stat().st_size < MAX_READ_BYTES
        return path.read_bytes() if is_readable else b""

    def remove(self, name: str) -> Path:
        """Makes way for something else; returns the path."""
        path = self.directory / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file; the one that it was linked to keeps its content."""
        self.remove(name).write_bytes(content)

    def manifest(self) -> dict[str, Any]:
        """The manifest's JSON object.

        Raises:
            ValueError: It is none any more.
        """
        values: dict[str, Any] = json.loads(self.read(MANIFEST_NAME))
        return values

    def changes(self) -> dict[str, dict[str, Any]]:
        """What the manifest should say of the files that were changed or added."""
        found = {}
        for path in self.directory.iterdir():
            is_regular = path.is_file() and not path.is_symlink()
            if path.name == MANIFEST_NAME or not is_regular or path.stat().st_ino == self.inodes.get(path.name):
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = {"bytes": path.stat().st_size, "sha256": digest}
            if entry != self.listed.get(path.name):
                found[path.name] = entry
        return found
