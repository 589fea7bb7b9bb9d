"""The text of an answer as it grows: `Answerer.stream`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType

from qa_onnx.answer import Answer


class AnswerStream(Iterator[str]):
    """The pieces of an answer's text. One that is closed, or not held any more, frees what its request takes."""

    def __init__(self, pieces: SimpleQueue[str | None], future: Future[Answer]) -> None:
        """Takes the queue of the pieces, with None at their end, and the answer's future."""
        self._pieces = pieces
        self._future = future
        self._told = 0
        self._is_over = False

    def __next__(self) -> str:
        """The next piece.

        Raises:
            QAOnnxError: As from `Answerer.submit`.
        """
        if self._is_over:
            raise StopIteration
        piece = self._pieces.get()
        if piece is not None:
            self._told += len(piece)
            return piece
        self._is_over = True
        if self._future.cancelled():
            raise StopIteration
        rest = self._future.result().text[self._told :]
        if not rest:
            raise StopIteration
        return rest

    def close(self) -> None:
        """Ends the stream."""
        self._is_over = True
        self._future.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
