"""The process: its socket, uvicorn, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from qa_onnx.errors import InvalidInputError
from qa_onnx.serve.config import ServeConfig
from qa_onnx.serve.log import EventHandler, write_event
from qa_onnx.serve.service import Service

KEEP_ALIVE_SECONDS = 75
"""How long a connection without a request is kept; longer than common proxies keep theirs."""
BACKLOG = 2048
CLOSING_SECONDS = 5
"""How long responses that are being sent get at the end."""
SWITCH_SECONDS = 0.001
"""How long the engine's thread keeps the interpreter's lock from the event loop at most; Python's default is 5 ms."""


def bind(config: ServeConfig) -> socket.socket:
    """Takes the port, so that one in use is told before the model is loaded. Nobody can connect yet.

    Raises:
        InvalidInputError: The port is in use or not allowed, or the host is none of this machine.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise _cannot_listen(f"{config.host}, port {config.port}", error) from error
    return bound


def _cannot_listen(address: str, error: OSError) -> InvalidInputError:
    return InvalidInputError(
        f"cannot listen on {address} ({error.strerror}); expected an address of this machine and a port that is free. "
        "Choose others with --host and --port"
    )


def url_of(config: ServeConfig, listening: socket.socket) -> str:
    """Where a browser on this machine finds the service."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listening.getsockname()[1]}"


class Server(uvicorn.Server):
    """Uvicorn, whose SIGTERM first drains the service."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Does not listen yet."""
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes SIGTERM and Ctrl-C while it serves; the second of them ends it at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.begin_drain)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def begin_drain(self) -> None:
        """Takes no more requests; answers under way get `drain_seconds`, then they fail, and the server ends."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        write_event("draining", questions=service.admission.questions)
        ends = loop.time() + service.limits.drain_seconds
        while (service.admission.questions or service.parsing) and loop.time() < ends:
            await asyncio.sleep(0.02)
        failed = service.admission.questions
        await asyncio.to_thread(service.fail_waiting)
        write_event("drained", questions_failed=failed, questions_answered=service.answered)
        self.should_exit = True


def serve(app: ASGIApp, service: Service, listening: socket.socket, tell: Callable[[], object]) -> None:
    """Serves until SIGTERM or Ctrl-C, and returns once everything was answered.

    Args:
        app: The ASGI application.
        service: What it answers with.
        listening: From `bind`.
        tell: Called once connections are accepted.

    Raises:
        InvalidInputError: Another process has begun to listen there since.
    """
    try:
        listening.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen("{}, port {}".format(*listening.getsockname()[:2]), error) from error
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [EventHandler()], False
        logger.setLevel(logging.WARNING)
    server = Server(app, service)

    async def run() -> None:
        asyncio.get_running_loop().call_later(0, tell)
        await server.serve(sockets=[listening])

    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        asyncio.run(run())
    finally:
        sys.setswitchinterval(before)
