"""Writes the graphs of a bundle, and their weights in one file that they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, external_data_helper

ALIGNMENT = 64
"""Alignment of each weight in bytes: a cache line, and a vector of AVX-512."""
MAX_INLINE_BYTES = 1024
"""Weights up to this size are stored in the graph itself."""


def save_graphs(models: Mapping[Path, onnx.ModelProto], data: Path) -> None:
    """Writes the graphs of a directory, and their weights into one file, which ONNX Runtime maps into memory.

    Weights inside a graph would be in memory two or three times during loading.

    Args:
        models: The graphs by their paths. Weights of the same name are equal, and are written once.
        data: The file of the weights, in the same directory.
    """
    written: dict[str, tuple[int, bytes]] = {}
    with data.open("wb") as file:
        for model in models.values():
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) <= MAX_INLINE_BYTES:
                    continue
                if tensor.name not in written:
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    written[tensor.name] = file.tell(), tensor.raw_data
                    file.write(tensor.raw_data)
                offset, content = written[tensor.name]
                assert content == tensor.raw_data, f"two weights are called {tensor.name}"
                external_data_helper.set_external_data(tensor, data.name, offset=offset, length=len(content))
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
    for path, model in models.items():
        onnx.save_model(model, path)
