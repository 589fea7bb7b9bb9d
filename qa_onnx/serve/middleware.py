"""Every request passes here: its id, host and key, its body, its client's leaving, its log line and its counts."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qa_onnx.serve.admission import Admission
from qa_onnx.serve.config import Limits
from qa_onnx.serve.log import describe_error, write_event, write_line
from qa_onnx.serve.metrics import Metrics
from qa_onnx.serve.problems import CONTENT_TYPE, DRAINING, FAILED, Problem
from qa_onnx.serve.security import Gatekeeper

DRAINED_BYTES = 16 * 2**20
"""How much of a body that is too large is read and dropped: clients that write first then see the answer."""
CLIENT_LEFT = 499
"""Status in log and metrics of a request whose client left; nobody gets it. (Nginx's number.)"""
MEDIA_TYPES = {"/v1/text": "application/pdf"}
"""Of bodies; all others are JSON. A page of another origin cannot send these without this service's consent (CORS)."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ClientLeftError(Exception):
    """The client closed its connection before it had its answer."""


@dataclass(kw_only=True)
class Exchange:
    """A request and what becomes of it."""

    scope: Scope
    send_message: Send
    headers: Mapping[str, str]
    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = CLIENT_LEFT
    is_started: bool = False
    is_complete: bool = False
    has_left: bool = False

    async def send(self, message: Message) -> None:
        """Sends a message of the response; the first gets the request's id as a header."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.is_started = True
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.request_id.encode())]}
        elif not message.get("more_body", False):
            self.is_complete = True
        await self.send_message(message)

    async def send_problem(self, problem: Problem) -> None:
        """Sends a problem as the whole response."""
        body = problem.to_json(self.request_id, path=self.scope["path"])
        headers = {"content-type": CONTENT_TYPE, "content-length": str(len(body)), **problem.headers}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


class RequestMiddleware:
    """Pure ASGI, so that nothing stands between the application and the connection."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Set[str],
        gatekeeper: Gatekeeper,
        admission: Admission,
        limits: Limits,
        metrics: Metrics,
        access_log: bool,
    ) -> None:
        """Wraps an application, whose requests find their id in `request.state.request_id`.

        Args:
            app: The application.
            paths: Those of its routes that have no parameter.
            gatekeeper: Checks hosts and keys.
            admission: Refuses requests of a full queue before they are parsed.
            limits: Of bodies.
            metrics: Counts requests.
            access_log: Write a line for each.
        """
        self._app = app
        self._paths = paths
        self._gatekeeper = gatekeeper
        self._admission = admission
        self._limits = limits
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = Exchange(scope=scope, send_message=send, headers=headers, request_id=request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self._serve(exchange, receive)
        except Problem as problem:
            await exchange.send_problem(problem)
        except ClientLeftError:
            exchange.status = CLIENT_LEFT
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a problem and the log its place
            write_event("failed", request_id=request_id, **describe_error(error))
            if not exchange.is_started:
                await exchange.send_problem(Problem("engine_failed", FAILED))
        finally:
            self._note(exchange)

    async def _serve(self, exchange: Exchange, receive: Receive) -> None:
        scope = exchange.scope
        self._gatekeeper.check(scope["path"], exchange.headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, exchange.send)
            return
        _check_media_type(scope["path"], exchange.headers)
        body = await self._read_body(exchange.headers, receive)
        if scope["path"] not in MEDIA_TYPES:
            self._admission.check_room()
        await self._run_until_client_leaves(exchange, receive, body)

    async def _read_body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Problem: It is too large or too slow.
            ClientLeftError: It breaks off.
        """
        limit = self._limits.body_bytes
        too_large = Problem(
            "body_too_large", f"Expected a body of at most {limit:,} bytes.", headers={"Connection": "close"}
        )
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit and "expect" in headers:
            raise too_large  # it waits for a word before it sends
        chunks: list[bytes] = []
        size, has_more = 0, True
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while has_more and size <= limit + DRAINED_BYTES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        chunks.clear()
                    has_more = message.get("more_body", False)
        except TimeoutError as error:
            raise Problem(
                "body_timeout",
                f"Expected the whole body within {self._limits.body_seconds:g} s.",
                headers={"Connection": "close"},
            ) from error
        if size > limit:
            raise too_large
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _run_until_client_leaves(self, exchange: Exchange, receive: Receive, body: bytes) -> None:
        """Runs the application, and cancels it once the connection is closed: what it computes is freed then.

        Raises:
            ClientLeftError: The client has left.
            Problem: `draining`: the server ends, and cancels what it still runs.
        """
        task = asyncio.current_task()
        assert task is not None
        left = asyncio.Event()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not exchange.is_complete:
                exchange.has_left = True
                left.set()
                task.cancel()

        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        try:
            await self._app(exchange.scope, replay, exchange.send)
        except asyncio.CancelledError as error:
            if exchange.has_left:
                task.uncancel()
                raise ClientLeftError from error
            if exchange.is_started:
                raise
            raise Problem("draining", DRAINING) from error
        finally:
            watcher.cancel()

    def _note(self, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        scope, status = exchange.scope, exchange.status
        route: str = getattr(scope.get("route"), "path", "")  # as it was declared: a path may hold any text
        if not route:
            route = scope["path"] if scope["path"] in self._paths else "unmatched"
        if exchange.has_left:
            status = CLIENT_LEFT
        self._metrics.note(route=route, status=status, seconds=seconds)
        if self._access_log:
            write_line(
                {
                    "request_id": exchange.request_id,
                    "client": (scope.get("client") or ("",))[0],
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "seconds": round(seconds, 6),
                }
            )


def _check_media_type(path: str, headers: Mapping[str, str]) -> None:
    expected = MEDIA_TYPES.get(path, "application/json")
    if path.startswith("/v2/") and "content-type" not in headers and "origin" not in headers:
        return  # tritonclient; browsers send an origin
    given, _, parameters = headers.get("content-type", "").lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    if given.strip() != expected or charset not in ("", "utf-8"):
        raise Problem("unsupported_media_type", f"Expected the header `Content-Type: {expected}`, in UTF-8.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem("unsupported_media_type", "Expected a body that is not compressed.")
