"""What `bench.serve` loads the service with: its process, wrk, and a client that times each response."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any, cast

import httpx

from qa_onnx import Answer, Answerer
from qa_onnx.errors import InvalidInputError
from qa_onnx.serve.app import make_app
from qa_onnx.serve.config import Limits, ServeConfig
from qa_onnx.serve.server import Server, bind
from qa_onnx.serve.service import Service

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
"""Clock ticks per second, the unit of CPU time in /proc."""
WRK_SCRIPT = """
local bodies, index = {{}}, 0
for line in io.lines("{path}") do bodies[#bodies + 1] = line end
wrk.method, wrk.headers["Content-Type"] = "POST", "application/json"
function request()
  index = index % #bodies + 1
  return wrk.format(nil, "/v1/answer", nil, bodies[index])
end
"""


@dataclass
class ServiceProcess:
    """A service that runs."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def metrics(self) -> dict[str, float]:
        """The values at /metrics, by name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def answered_by_status(self) -> dict[str, int]:
        """Requests of /v1/answer so far, by status."""
        pattern = re.compile(r'qa_onnx_requests_total\{route="/v1/answer",status="(\d+)"\}')
        return {found[1]: int(value) for name, value in self.metrics().items() if (found := pattern.fullmatch(name))}

    def cpu_seconds(self, *, thread: bool = False) -> float:
        """CPU time of the process, or of its main thread, in which the event loop runs."""
        pid = self.process.pid
        path = f"/proc/{pid}/task/{pid}/stat" if thread else f"/proc/{pid}/stat"
        parts = Path(path).read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / TICKS

    def rss_mib(self) -> float:
        """Memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def serving(bundle: Path, directory: Path, *options: str) -> Iterator[ServiceProcess]:
    """A service on a free port; ended by SIGTERM, which has to give exit status 0 and no traceback."""
    log = directory / "serve.log"
    command = [sys.executable, "-m", "qa_onnx", "serve", "--model", str(bundle), "--port", "0", "--no-access-log"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, text=True, close_fds=True
        )
    try:
        while not (found := re.search(r"at (http://\S+),", log.read_text())):
            if process.poll() is not None:
                raise InvalidInputError(f"the service ended: {log.read_text().strip()}")
            time.sleep(0.05)
        yield ServiceProcess(process, found[1], log)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status or "Traceback" in log.read_text():
            raise InvalidInputError(f"the service ended with status {status}: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait()


def busy_seconds() -> float:
    """CPU time that all processes of the machine have taken."""
    user, nice, system = map(int, Path("/proc/stat").read_text(encoding="ascii").split()[1:4])
    return (user + nice + system) / TICKS


def write_bodies(pairs: Sequence[tuple[str, str]], directory: Path) -> Path:
    """The bodies of /v1/answer, one a line, and a script that has wrk send them in turn; returns the script."""
    bodies = directory / "bodies.jsonl"
    lines = [json.dumps({"question": question, "context": context}) for question, context in pairs]
    bodies.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    script = directory / "post.lua"
    script.write_text(WRK_SCRIPT.format(path=bodies), encoding="ascii")
    return script


def run_wrk(url: str, script: Path, *, connections: int, seconds: int) -> dict[str, float]:
    """Loads /v1/answer with wrk (https://github.com/wg/wrk).

    Returns:
        Requests that were answered, their number per second, and how many were no 200 or failed.

    Raises:
        InvalidInputError: wrk is not installed.
    """
    if shutil.which("wrk") is None:
        raise InvalidInputError("wrk is not installed; expected the load tool (Debian: apt-get install wrk)")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests = int(re.findall(r"(\d+) requests in", text)[0])
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    failed += sum(int(count) for line in re.findall(r"Socket errors: (.*)", text) for count in re.findall(r"\d+", line))
    return {
        "requests": requests,
        "per_second": float(re.findall(r"Requests/sec: *([\d.]+)", text)[0]),
        "failed": failed,
    }


def run_in_process(
    answerer: Answerer, pairs: Sequence[tuple[str, str]], *, at_once: int, seconds: float
) -> dict[str, float]:
    """Answers questions with `submit`, `at_once` of them at a time, from one thread.

    Returns:
        Answers, answers per second, and the CPU seconds of the thread that submits, per answer.
    """
    room, done, figures = Semaphore(at_once), [0], {}

    def count(_: Any) -> None:
        done[0] += 1
        room.release()

    def submit_all() -> None:
        started = time.perf_counter()
        index = 0
        while time.perf_counter() - started < seconds:
            room.acquire()
            question, context = pairs[index % len(pairs)]
            answerer.submit(question, context).add_done_callback(count)
            index += 1
        elapsed = time.perf_counter() - started
        figures.update(requests=done[0], per_second=done[0] / elapsed, submit_ms=time.thread_time() / index * 1000)
        for _ in range(at_once):
            room.acquire()

    thread = Thread(target=submit_all)
    thread.start()
    thread.join()
    return figures


def measure_overhead(answer: Answer, script: Path, *, blocks: int = 5) -> dict[str, float]:
    """CPU time of the event loop for a request whose answer is there at once: all that HTTP adds to `submit`.

    Other work on the machine can only add to it, so the least of several blocks of a second is the closest.
    """
    service = Service(cast(Answerer, _Answered(answer)), name="answered", limits=Limits())
    config = ServeConfig(port=0, access_log=False)
    found: list[float] = []
    with bind(config) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = _ThreadServer(make_app(service, config), service)
        thread = Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        clock = time.pthread_getcpuclockid(thread.ident or 0)
        for _ in range(blocks):
            before = time.clock_gettime(clock)
            requests = run_wrk(url, script, connections=16, seconds=1)["requests"]
            found.append((time.clock_gettime(clock) - before) / requests * 1000)
        server.should_exit = True
        thread.join()
    return {"least_ms": min(found), "median_ms": statistics.median(found)}


class _Answered:
    """As much of an `Answerer` as the service asks, with one answer to everything."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def estimate_windows(self, questions: Sequence[str], contexts: Sequence[str], *, config: Any) -> int:
        """One for each."""
        return len(questions)

    def submit(self, question: str, context: str, *, config: Any = None, on_text: Any = None) -> Future[Answer]:
        """The answer."""
        future: Future[Answer] = Future()
        future.set_result(self._answer)
        return future


class _ThreadServer(Server):
    """A server in a thread, where Python takes no signals."""

    capture_signals = staticmethod(nullcontext)  # type: ignore[assignment]


class _Connection(asyncio.Protocol):
    """One connection that is kept; takes one response at a time."""

    def __init__(self) -> None:
        self.data = b""
        self.response: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if found and self.response is not None:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            if len(body) >= length:
                self.data = b""
                self.response.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self.response is not None and not self.response.done():
            self.response.set_result(0)  # lost: counted as status 0


async def offer(url: str, bodies: Sequence[str], *, per_second: float, seconds: float) -> dict[int, list[float]]:
    """Sends requests at a rate, whatever becomes of them, each on a connection that has no other.

    Returns:
        The seconds that each response took, by status.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    requests = [
        (
            f"POST /v1/answer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode("ascii")
        for body in bodies
    ]
    free: list[_Connection] = []
    taken: dict[int, list[float]] = defaultdict(list)

    async def send(request: bytes) -> None:
        started = loop.time()
        connection = free.pop() if free else (await loop.create_connection(_Connection, host, int(port)))[1]
        connection.response = loop.create_future()
        connection.transport.write(request)  # type: ignore[attr-defined]
        status = await connection.response
        taken[status].append(loop.time() - started)
        if status:
            free.append(connection)

    started, index = loop.time(), 0
    async with asyncio.TaskGroup() as tasks:
        while (now := loop.time()) < started + seconds:
            while index < (now - started) * per_second:
                tasks.create_task(send(requests[index % len(requests)]))
                index += 1
            await asyncio.sleep(0.002)
    for connection in free:
        connection.transport.close()
    return dict(taken)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values is; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
