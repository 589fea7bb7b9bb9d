"""The service on a fake engine, behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

from qa_onnx.serve.app import make_app
from qa_onnx.serve.config import Limits, ServeConfig
from qa_onnx.serve.server import Server, bind
from qa_onnx.serve.service import Service
from tests.serve.pages import browser, open_page, page, service  # noqa: F401 - fixtures
from tests.unit.fakes import Gate, echo_answerer

CONTEXT = "The Normans were led by Rollo, and settled in Normandy."


class ServerOfTest(Server):
    """A server in a thread, where Python takes no signals."""

    capture_signals = staticmethod(contextlib.nullcontext)


class Running:
    """A service that runs in a thread of this process."""

    def __init__(self, answerer, *, limits=None, config=None, name="echo"):
        self.answerer = answerer
        self.service = Service(answerer, name=name, limits=limits or Limits())
        config = config or ServeConfig(port=0)
        self.socket = bind(config)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = ServerOfTest(make_app(self.service, config), self.service)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def _run(self):
        async def run():
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[self.socket])

        asyncio.run(run())

    def ask(self, question="Who led them?", context=CONTEXT, **more):
        return self.client.post("/v1/answer", json={"question": question, "context": context, **more})

    def drain(self):
        self.loop.call_soon_threadsafe(self.server.begin_drain)

    def is_idle(self):
        return self.answerer.stats().requests == 0 and self.service.admission.questions == 0

    def raw(self, head, body=b""):
        """A connection on which a request, or a part of one, was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(head.encode() + body)
        return connection

    def post_raw(self, path, value):
        """As `raw`: the whole request for a JSON value."""
        body = json.dumps(value).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return self.raw(f"{head}Content-Length: {len(body)}\r\n\r\n", body)

    def close(self):
        self.client.close()
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.begin_drain)
            self.thread.join(20)
        assert not self.thread.is_alive()


def wait_until(condition, seconds=10.0):
    """Waits for a condition; fails the test where it does not come."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it does not come"
        time.sleep(0.005)


def in_thread(call):
    """Runs a call in a thread; its result comes in the list."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def read_events(text):
    """The server-sent events of a stream, as pairs of name and data; comments are named by a colon."""
    events = []
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.partition(": ")[::2] for line in block.splitlines())
        events.append((fields["event"], json.loads(fields["data"])) if "event" in fields else (":", block))
    return events


@pytest.fixture
def start():
    """Starts services on echo answerers, and ends them."""
    with contextlib.ExitStack() as stack:

        def start_one(*, engine=None, limits=None, config=None, **manifest):
            answerer = stack.enter_context(echo_answerer(config={"max_wait_ms": 0, **(engine or {})}, **manifest))
            running = Running(answerer, limits=limits, config=config)
            stack.callback(running.close)
            return running

        yield start_one


@pytest.fixture(scope="module")
def running():
    """A service with the defaults, for all tests of a file."""
    with echo_answerer(config={"max_wait_ms": 0}) as answerer, contextlib.closing(Running(answerer)) as running:
        yield running


@pytest.fixture
def start_held(start):
    """As `start`; the engines wait at each step until `release` is set."""
    gates = []

    def start_one(**options):
        running = start(**options)
        gate = Gate(running.answerer._engine)
        gates.append(gate)
        running.release, running.reached = gate.release, gate.reached
        return running

    yield start_one
    for gate in gates:
        gate.release.set()
