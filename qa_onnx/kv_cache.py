"""past_key_values as an object: the keys and values of the tokens that the model has already read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qa_onnx.session import Session

if TYPE_CHECKING:
    import onnxruntime

PAST_PREFIX, PRESENT_PREFIX = "past_key_values.", "present."


class KVCache:
    """Keys and values of every layer, each float32 [B, H, P, D] on the session's device."""

    def __init__(self, session: Session, values: Mapping[str, onnxruntime.OrtValue]) -> None:
        """Takes the values by their input names, `past_key_values.{layer}.key` and `.value`."""
        self._session = session
        self.values = dict(values)

    @classmethod
    def empty(cls, session: Session, *, batch_size: int, heads: int, head_size: int) -> KVCache:
        """A cache of no tokens for `batch_size` rows."""
        nothing = session.to_device(np.zeros((batch_size, heads, 0, head_size), np.float32))
        return cls(session, {name: nothing for name in session.input_names if name.startswith(PAST_PREFIX)})

    def updated(self, outputs: Mapping[str, onnxruntime.OrtValue]) -> KVCache:
        """The cache after a run: the graph's `present.*` outputs become the next run's past."""
        return KVCache(
            self._session,
            {name: outputs[PRESENT_PREFIX + name.removeprefix(PAST_PREFIX)] for name in self.values},
        )

    def select_rows(self, rows: Sequence[int] | np.ndarray) -> KVCache:
        """A cache of the given rows only, in the given order."""
        index = np.asarray(rows, np.int64)
        return KVCache(
            self._session, {name: self._session.select_rows(value, index) for name, value in self.values.items()}
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows, heads, tokens and head size: [B, H, P, D]."""
        rows, heads, tokens, head_size = next(iter(self.values.values())).shape()
        return rows, heads, tokens, head_size

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take."""
        return len(self.values) * int(np.prod(self.shape)) * np.dtype(np.float32).itemsize
