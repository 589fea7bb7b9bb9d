"""An answer as server-sent events: `text` as it grows, then `answer` or `error`, and comments where it is quiet."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qa_onnx.answer import Answer
from qa_onnx.serve.problems import FAILED, Problem, log_failure


class EventStream(Response):
    """Sends what `Service.stream` yields. However it ends, the generator is closed, and what it takes is free."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[str | Answer | None], *, request_id: str) -> None:
        """Sends nothing yet. Of `pieces` the first was taken: the request was valid and had room in the queue."""
        self.status_code = 200
        self.background = None
        self._pieces = pieces
        self._request_id = request_id
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with aclosing(self._pieces) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": self._event(piece), "more_body": True})
            except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an event and the log its place
                problem = error if isinstance(error, Problem) else _unforeseen(error)
                log_failure(problem, self._request_id)
                event = _format("error", problem.to_dict(self._request_id))
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _event(self, piece: str | Answer | None) -> bytes:
        if piece is None:
            return b": waiting\n\n"
        if isinstance(piece, str):
            return _format("text", {"text": piece})
        return _format("answer", {"request_id": self._request_id, "answer": piece.to_dict()})


def _unforeseen(error: Exception) -> Problem:
    problem = Problem("engine_failed", FAILED)
    problem.__cause__ = error
    return problem


def _format(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()
