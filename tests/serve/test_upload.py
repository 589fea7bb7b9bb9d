"""`POST /v1/text`: a PDF in, its text out; problems for all else, and nothing left running."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from qa_onnx.serve import server, upload
from qa_onnx.serve.config import Limits
from tests.serve.conftest import in_thread, wait_until
from tests.serve.page_service import KEY, page_service
from tests.serve.pdf_files import make_encrypted, make_pdf, make_slow
from tests.serve.test_pdf import workers

PDF = {"Content-Type": "application/pdf"}


@pytest.fixture(scope="module")
def url():
    with page_service(limits=Limits(body_bytes=8 * 2**20)) as service:
        yield f"{service.url}/v1/text"


def problem(response, status, code):
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert (response.status_code, found["status"], found["code"]) == (status, status, code)
    assert found["request_id"] == response.headers["x-request-id"]
    return found["detail"]


def test_gives_the_text(url):
    response = httpx.post(url, content=make_pdf(["One."], ["Two."]), headers=PDF)
    assert response.status_code == 200
    assert response.json() == {"request_id": response.headers["x-request-id"], "text": "One.\n\nTwo.", "pages": 2}


def test_refuses_what_is_no_pdf_or_cannot_be_read(url, monkeypatch):
    assert "%PDF-" in problem(httpx.post(url, content=b"no", headers=PDF), 422, "invalid_request")
    encrypted = make_encrypted("a password")
    assert "is encrypted" in problem(httpx.post(url, content=encrypted, headers=PDF), 422, "invalid_request")
    problem(httpx.post(url, json={"text": "a"}), 415, "unsupported_media_type")
    problem(httpx.post(url, content=b" " * (9 * 2**20), headers=PDF), 413, "body_too_large")
    problem(httpx.get(url), 405, "method_not_allowed")
    monkeypatch.setattr(upload, "reads_pdf", lambda: False)
    response = httpx.post(url, content=make_pdf(["One."]), headers=PDF)
    assert "in the checkout: pip install '.[pdf]'" in problem(response, 415, "unsupported_media_type")


def test_asks_for_the_key():
    with page_service(api_keys=[KEY]) as service:
        data, text = make_pdf(["One."]), f"{service.url}/v1/text"
        problem(httpx.post(text, content=data, headers=PDF), 401, "unauthorized")
        assert httpx.post(text, content=data, headers=PDF | {"X-API-Key": KEY}).json()["text"] == "One."


def test_reads_nothing_while_it_drains():
    with page_service() as service:
        service.service.is_draining = True
        problem(httpx.post(f"{service.url}/v1/text", content=make_pdf(["One."]), headers=PDF), 503, "draining")


@pytest.fixture
def hold_parsing(monkeypatch):
    """Files are read once this is set."""
    release = threading.Event()
    extract_text = upload.extract_text

    async def wait_and_extract(data, *, limits):
        while not release.is_set():
            await asyncio.sleep(0.01)
        return await extract_text(data, limits=limits)

    monkeypatch.setattr(upload, "extract_text", wait_and_extract)
    yield release
    release.set()


def send_in_thread(service, data):
    return in_thread(lambda: httpx.post(f"{service.url}/v1/text", content=data, headers=PDF, timeout=30))


def test_parses_a_few_at_once_and_refuses_more(hold_parsing):
    with page_service() as service:
        data = make_pdf(["One."])
        taken = [send_in_thread(service, data) for _ in range(upload.MAX_PARSING)]
        wait_until(lambda: service.service.parsing == upload.MAX_PARSING)
        response = httpx.post(f"{service.url}/v1/text", content=data, headers=PDF)
        problem(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        hold_parsing.set()
        for thread, results in taken:
            thread.join(20)
            assert results[0].status_code == 200
        assert httpx.post(f"{service.url}/v1/text", content=data, headers=PDF).status_code == 200


def test_a_drain_waits_for_files_that_are_read(hold_parsing, monkeypatch):
    monkeypatch.setattr(server, "CLOSING_SECONDS", 1)
    with page_service() as service:
        thread, results = send_in_thread(service, make_pdf(["One."]))
        wait_until(lambda: service.service.parsing == 1)
        service.drain()
        service.thread.join(server.CLOSING_SECONDS + 1)
        hold_parsing.set()
        thread.join(20)
        assert results[0].json()["text"] == "One."


def test_a_drain_that_takes_too_long_fails_the_files_that_are_read(hold_parsing, monkeypatch):
    monkeypatch.setattr(server, "CLOSING_SECONDS", 1)
    with page_service(limits=Limits(drain_seconds=0.2)) as service:
        thread, results = send_in_thread(service, make_pdf(["One."]))
        wait_until(lambda: service.service.parsing == 1)
        service.drain()
        thread.join(20)
        problem(results[0], 503, "draining")


@pytest.mark.serial
def test_a_client_that_leaves_ends_the_process(url):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, content=make_slow(), headers=PDF, timeout=httpx.Timeout(10, read=1))
    deadline = time.monotonic() + 3  # the process would go on for `PdfLimits.cpu_seconds`
    while workers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workers() == []
    assert httpx.post(url, content=make_pdf(["One."]), headers=PDF).status_code == 200
