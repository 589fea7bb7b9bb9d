"""The queue, deadlines, clients that leave, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import pytest

from qa_onnx import InvalidInputError
from qa_onnx.serve import server, service
from qa_onnx.serve.admission import Admission
from qa_onnx.serve.config import Limits
from qa_onnx.serve.problems import Problem
from tests.serve.conftest import CONTEXT, in_thread, read_events, wait_until


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_retry_after_is_the_measured_rate():
    clock = Clock()
    admission = Admission(max_questions=10, max_characters=1000, clock=clock)
    for _ in range(20):  # two questions a second
        with admission.admit(questions=2, characters=2):
            clock.seconds += 1.0
    with admission.admit(questions=10, characters=10):
        with pytest.raises(Problem) as caught, admission.admit(questions=6, characters=6):
            pass
        assert caught.value.code == "queue_full"
        assert caught.value.headers == {"Retry-After": "3"}
    with admission.admit(questions=1, characters=1000):
        with pytest.raises(Problem) as caught, admission.admit(questions=1, characters=4):
            pass
        assert caught.value.headers == {"Retry-After": "2"}  # 4 characters; 50 took 20 seconds
    assert (admission.questions, admission.characters) == (0, 0)


def test_what_was_not_answered_is_no_part_of_the_rate():
    clock = Clock()
    admission = Admission(max_questions=10, max_characters=1000, clock=clock)
    for _ in range(10):  # a question a second, and many that were cancelled
        with admission.admit(questions=1, characters=1):
            clock.seconds += 1.0
        with contextlib.suppress(asyncio.CancelledError), admission.admit(questions=10, characters=10):
            raise asyncio.CancelledError
    assert admission.questions == 0
    with (
        admission.admit(questions=10, characters=10),
        pytest.raises(Problem) as caught,
        admission.admit(questions=5, characters=5),
    ):
        pass
    assert caught.value.headers == {"Retry-After": "5"}


def test_before_anything_was_answered_retry_after_is_a_second():
    admission = Admission(max_questions=1, max_characters=10, clock=Clock())
    one = {"questions": 1, "characters": 1}
    with admission.admit(**one), pytest.raises(Problem) as caught, admission.admit(**one):
        pass
    assert caught.value.headers == {"Retry-After": "1"}
    with pytest.raises(Problem, match="11 characters") as caught, admission.admit(questions=1, characters=11):
        pass
    assert caught.value.code == "invalid_request"


@pytest.mark.parametrize(
    "fields",
    [
        {"items": 0},
        {"windows": 0},
        {"body_bytes": 1.5},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"items": 2000},
        {"items": 20_000, "queue_questions": 20_000},
        {"queue_characters": 1000},
    ],
)
def test_limits_are_checked(fields):
    with pytest.raises(InvalidInputError, match="got "):
        Limits(**fields)


def test_a_full_queue_refuses_whole_requests_and_takes_more_later(start_held):
    running = start_held(limits=Limits(queue_questions=4, items=4))
    thread, results = in_thread(lambda: running.ask("Who led them, all of them?"))
    wait_until(running.reached.is_set)
    items = [{"question": f"Who? {index}"} for index in range(4)]
    body = {"items": items, "context": CONTEXT}
    refused = running.client.post("/v1/answers", json=body)
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert running.answerer.stats().requests == 1, "a part of the batch was taken"
    assert running.client.get("/healthz").status_code == 200
    running.release.set()
    thread.join(10)
    assert results[0].status_code == 200
    assert len(running.client.post("/v1/answers", json=body).json()["answers"]) == 4


def test_the_queue_counts_characters_of_each_question(start_held):
    running = start_held(limits=Limits(queue_characters=100, context_characters=60, question_characters=10))
    thread, results = in_thread(lambda: running.ask("Who led?", "x" * 60))
    wait_until(running.reached.is_set)
    assert running.ask("Who led?", "x" * 25).status_code == 429
    running.release.set()
    thread.join(10)
    assert results[0].status_code == 200
    assert running.ask("Who led?", "x" * 25).status_code == 200


def test_a_request_of_too_many_windows_is_refused_before_it_is_tokenized(start, monkeypatch):
    """Small windows, or a question that leaves no room for larger ones, make millions of prompts of one body."""
    running = start(max_positions=1024)
    monkeypatch.setattr(running.answerer, "submit", None)
    monkeypatch.setattr(running.answerer, "submit_batch", None)
    body = {"items": [{"question": "Who?"}] * 256, "context": "word " * 12_000}
    for options in ({"window": 16}, {"window": 32, "stride": 31}):
        refused = running.client.post("/v1/answers", json=body | {"options": options})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert "expected at most 10,000. Ask" in refused.json()["detail"]
    for stream in (False, True):
        refused = running.ask("?!" * 490, "word " * 190_000, stream=stream)
        assert "windows" in refused.json()["detail"]


def test_windows_are_limited_as_they_are_set(start):
    running = start(limits=Limits(windows=5))
    assert running.ask(context=CONTEXT * 5, window=32, stride=0).json()["answer"]["windows"] > 1
    assert running.ask(context=CONTEXT * 50, window=32, stride=0).status_code == 422
    assert running.client.get("/v1/model").json()["limits"]["windows"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_frees_what_the_request_takes(start_held, stream):
    running = start_held(limits=Limits(timeout_seconds=0.3))
    response = running.ask("Who led them?", stream=stream)
    if stream:
        assert response.status_code == 200
        name, problem = read_events(response.text)[-1]
        assert name == "error"
    else:
        assert response.status_code == 504
        problem = response.json()
    assert (problem["code"], problem["status"]) == ("timeout", 504)
    running.release.set()
    wait_until(running.is_idle)
    assert running.ask("Who led them?").status_code == 200


@pytest.mark.serial
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/answer", {"question": "Who led them?", "context": CONTEXT}),
        ("/v1/answer", {"question": "Who led them?", "context": CONTEXT, "stream": True}),
        ("/v1/answers", {"items": [{"question": f"Who led them? {n}"} for n in range(50)], "context": CONTEXT}),
        ("/hf/question-answering", {"inputs": {"question": "Who led them?", "context": CONTEXT}}),
    ],
    ids=["single", "stream", "batch", "hf"],
)
def test_a_client_that_leaves_frees_what_it_asked_for(start_held, capfd, path, body):
    running = start_held()
    with running.post_raw(path, body):
        wait_until(running.reached.is_set)
        assert running.service.admission.questions == len(body.get("items", [0]))
    left = time.monotonic()
    wait_until(lambda: running.service.admission.questions == 0)
    assert time.monotonic() - left < 0.5
    running.release.set()
    wait_until(running.is_idle)
    assert running.answerer.stats().answered == 0
    wait_until(lambda: f'route="{path}",status="499"' in running.client.get("/metrics").text)
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_leaves_while_its_context_is_tokenized(start, monkeypatch):
    running = start()
    reached, release = threading.Event(), threading.Event()
    submit = running.answerer.submit

    def wait_and_submit(*arguments, **options):
        reached.set()
        assert release.wait(10)
        return submit(*arguments, **options)

    monkeypatch.setattr(running.answerer, "submit", wait_and_submit)
    with running.post_raw("/v1/answer", {"question": "Who?", "context": CONTEXT * 400}):
        wait_until(reached.is_set)
        assert running.client.get("/healthz").status_code == 200, "the event loop waits for the tokenizer"
    wait_until(lambda: running.service.admission.questions == 0)
    release.set()
    wait_until(running.is_idle)
    assert running.answerer.stats().answered == 0


def test_many_long_questions_are_tokenized_in_another_thread(start, monkeypatch):
    running = start(max_positions=1024)
    names = []
    submit_batch = running.answerer.submit_batch

    def note_and_submit(*arguments, **options):
        names.append(threading.current_thread().name)
        return submit_batch(*arguments, **options)

    monkeypatch.setattr(running.answerer, "submit_batch", note_and_submit)
    body = {"items": [{"question": "Who? " * 50}] * 60, "context": "x"}
    assert running.client.post("/v1/answers", json=body).status_code == 200
    assert names[0].startswith("tokenize")


@pytest.fixture
def hold_tokenizing(monkeypatch):
    """Has the threads that tokenize wait until `release` is set; `asked` has the questions of which they began."""
    release = threading.Event()

    def hold(running):
        asked = []
        submit = running.answerer.submit

        def wait_and_submit(question, context, **options):
            asked.append(question)
            assert release.wait(20)
            return submit(question, context, **options)

        monkeypatch.setattr(running.answerer, "submit", wait_and_submit)
        return asked, release

    yield hold
    release.set()


@pytest.mark.parametrize("seconds", [None, 0.5])
def test_what_nobody_waits_for_leaves_the_queue_of_the_tokenizer(start, hold_tokenizing, seconds):
    """A client that left, or a deadline that passed, costs no thread later."""
    running = start(limits=Limits(timeout_seconds=seconds or 60))
    asked, release = hold_tokenizing(running)
    posts = [
        running.post_raw(
            "/v1/answer", {"question": f"Who? {number}", "context": CONTEXT * 400, "stream": number % 2 == 0}
        )
        for number in range(service.TOKENIZING_THREADS + 4)
    ]
    wait_until(lambda: running.service.admission.questions == len(posts) and len(asked) == service.TOKENIZING_THREADS)
    if seconds is None:
        for connection in posts:
            connection.close()
    wait_until(lambda: running.service.admission.questions == 0)
    release.set()
    wait_until(running.is_idle)
    running.service._tokenizing.submit(int).result(10)  # what was queued before it has begun
    assert len(asked) == service.TOKENIZING_THREADS
    for connection in posts:
        connection.close()


def test_a_stream_is_never_silent_for_long(start_held, monkeypatch):
    monkeypatch.setattr(service, "KEEP_ALIVE_SECONDS", 0.1)
    running = start_held()
    with running.client.stream(
        "POST", "/v1/answer", json={"question": "Who led them?", "context": CONTEXT, "stream": True}
    ) as response:
        lines = response.iter_lines()
        comments = 0
        for line in lines:
            comments += line.startswith(":")
            if comments == 3:
                running.release.set()
                break
        rest = "\n".join(lines)
    assert "event: answer" in rest


def test_a_drain_lets_answers_end_and_takes_no_more(start_held, capfd):
    running = start_held()
    thread, results = in_thread(lambda: running.ask("Who led them?"))
    with running.post_raw(
        "/v1/answer", {"question": "Who led them, at last?", "context": CONTEXT, "stream": True}
    ) as stream:
        wait_until(lambda: running.service.admission.questions == 2)
        running.drain()
        wait_until(lambda: running.client.get("/readyz").status_code == 503)
        assert running.client.get("/healthz").status_code == 200
        refused = running.ask()
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        running.release.set()
        text = b""
        while chunk := stream.recv(65536):
            text += chunk
    assert b"event: answer" in text
    thread.join(10)
    assert results[0].status_code == 200
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert "Traceback" not in capfd.readouterr().err


def test_a_drain_that_takes_too_long_fails_what_is_left(start_held, capfd):
    running = start_held(limits=Limits(drain_seconds=0.3))
    thread, results = in_thread(lambda: running.ask("Who led them?"))
    other, streamed = in_thread(lambda: running.ask("Who led them, all of them?", stream=True))
    wait_until(lambda: running.service.admission.questions == 2)
    threading.Timer(0.6, running.release.set).start()  # the step ends by itself after the drain has failed
    running.drain()
    thread.join(10)
    other.join(10)
    assert (results[0].status_code, results[0].json()["code"]) == (503, "draining")
    name, problem = read_events(streamed[0].text)[-1]
    assert (name, problem["code"]) == ("error", "draining")
    running.thread.join(10)
    events = capfd.readouterr().err
    assert "Traceback" not in events
    assert json.loads(events.splitlines()[-1])["questions_failed"] == 2


def test_a_drain_that_takes_too_long_fails_what_is_tokenized_or_waits_for_it(start, hold_tokenizing, monkeypatch):
    monkeypatch.setattr(server, "CLOSING_SECONDS", 1)
    running = start(limits=Limits(drain_seconds=0.3))
    asked, _ = hold_tokenizing(running)
    asks = [
        in_thread(lambda stream=stream: running.ask("Who led them?", CONTEXT * 400, stream=stream))
        for stream in (False, True) * service.TOKENIZING_THREADS
    ]
    wait_until(lambda: running.service.admission.questions == len(asks) and len(asked) == service.TOKENIZING_THREADS)
    running.drain()
    for thread, results in asks:
        thread.join(10)
        assert (results[0].status_code, results[0].json()["code"]) == (503, "draining")
