"""A model hub that is away, or does not reply, is an error in seconds. Local servers replace the hub."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from qa_onnx.checkpoint import load_checkpoint, load_tokenizer
from qa_onnx.checkpoint.files import STARTER_DIRECTORY, locate
from qa_onnx.errors import InvalidInputError
from qa_onnx.hub import problem_of_hub

http = pytest.importorskip("huggingface_hub.utils", reason="comes with the extras train and export")
REPLY_SECONDS = 0.3


@contextmanager
def server(reply):
    """Accepts connections and gives each to `reply`, in a thread of its own; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        open_connections = []

        def accept():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                open_connections.append(connection)
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in open_connections:
            connection.close()


def says(status):
    def reply(connection):
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        connection.close()

    return reply


def says_nothing(connection):
    connection.recv(4096)


def hangs_up(connection):
    connection.close()


def dribbles(connection):
    """A byte now and then: no single read takes longer than a time-out."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            time.sleep(REPLY_SECONDS / 3)
            connection.sendall(b"x")
    except OSError:
        return


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets the hub's address; its cache is empty."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("qa_onnx.hub.REPLY_SECONDS", REPLY_SECONDS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def set_address(address):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        http.reset_sessions()

    yield set_address
    http.reset_sessions()


@pytest.mark.parametrize("status", ["200 OK", "307 Temporary Redirect", "401 Unauthorized", "404 Not Found"])
def test_a_hub_that_replies_is_there(hub, status):
    with server(says(status)) as address:
        hub(f"http://{address}")
        assert problem_of_hub() is None


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (says_nothing, "(no reply within 0.3 seconds|timed out)"),
        (dribbles, "no reply within 0.3 seconds"),
        (hangs_up, "cannot be reached: ."),
        (says("503 Service Unavailable"), "it replies with status 503"),
    ],
)
def test_a_hub_that_gives_no_reply_is_named_in_time(hub, reply, problem):
    with server(reply) as address:
        hub(f"http://{address}")
        for load in (load_checkpoint, load_tokenizer):
            started = time.monotonic()
            with pytest.raises(InvalidInputError, match=rf"http://{address} cannot be reached: .*starter") as refused:
                load("gpt2")
            assert time.monotonic() - started < 2
            assert refused.match(problem)
            assert "\n" not in str(refused.value)


def test_a_name_that_is_not_resolved_or_a_closed_port_says_so(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    hub(f"http://127.0.0.1:{port}")
    assert "Connection refused" in problem_of_hub()

    def getaddrinfo(*arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    hub("https://hub.invalid")
    assert problem_of_hub().endswith("Name or service not known")


def test_a_name_server_that_hangs_is_not_waited_for(hub, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: released.wait(10))
    hub("https://hub.invalid")
    started = time.monotonic()
    assert "no reply within 0.3 seconds" in problem_of_hub()
    assert time.monotonic() - started < 2
    released.set()


def test_a_proxy_that_refuses_says_so(hub, monkeypatch):
    with server(says("403 Forbidden")) as address:
        monkeypatch.setenv("https_proxy", f"http://{address}")
        hub("https://hub.invalid")
        assert "403 Forbidden" in problem_of_hub()


def test_offline_mode_is_named(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub("https://hub.invalid")
    assert "HF_HUB_OFFLINE" in problem_of_hub()


def test_a_model_in_the_cache_needs_no_hub(hub, tmp_path):
    repository = tmp_path / "cache" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    with server(says_nothing) as address:
        hub(f"http://{address}")
        assert locate("owner/model") == snapshot


@pytest.mark.parametrize("load", [load_checkpoint, load_tokenizer])
def test_the_starter_is_a_name_and_a_directory_of_that_name_is_a_path(load, tmp_path, monkeypatch):
    (tmp_path / "starter").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("starter") == STARTER_DIRECTORY
    with pytest.raises(InvalidInputError, match=r"could be loaded from \./starter: .*(config|tokenizer)\.json is not"):
        load("./starter")
    monkeypatch.setattr("qa_onnx.checkpoint.files.STARTER_DIRECTORY", tmp_path / "site-packages" / "model")
    with pytest.raises(InvalidInputError, match=r"loaded from starter: .*comes with a checkout.*\./starter"):
        load("starter")
