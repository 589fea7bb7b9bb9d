"""The answer to bad input is a problem with a stable code that does not repeat it, and the service still answers."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import time

import pytest

from qa_onnx import Answer
from qa_onnx.errors import EngineError
from qa_onnx.serve import problems, routes, v2
from qa_onnx.serve.config import Limits
from qa_onnx.serve.problems import STATUS_OF
from tests.serve.conftest import CONTEXT, read_events

SECRET = "Geheimnis"
GOOD = {"question": "Who?", "context": SECRET}
POSTS = ["/v1/answer", "/v1/answers", "/hf/question-answering", "/v2/models/echo/infer"]
BODIES = {
    "empty": (b"", "invalid_json"),
    "no JSON": (b"{" + SECRET.encode(), "invalid_json"),
    "bad UTF-8": (b'{"question": "\xff\xfe", "context": "Geheimnis"}', "invalid_json"),
    "nested": (b'{"context":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    "nested objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "invalid_request"),
    "a list": (b'["Geheimnis"]', "invalid_request"),
    "a number": (b"17", "invalid_request"),
    "null": (b"null", "invalid_request"),
    "huge number": (b'{"question": ' + b"9" * 5000 + b"}", ("invalid_request", "invalid_json")),
}
FIELDS = {
    "lone surrogate": ({"context": SECRET + "\ud800"}, "surrogate"),
    "lone surrogate in the question": ({"question": "\udfff"}, "surrogate"),
    "no text": ({"context": ""}, "context"),
    "white space": ({"question": " \n"}, "question"),
    "question of another type": ({"question": 5}, "question"),
    "context of another type": ({"context": [SECRET]}, "context"),
    "null": ({"context": None}, "context"),
    "unknown field": ({"max_tokens": 5}, "max_tokens"),
    "unknown field that is a text": ({SECRET + " in a name": 5}, "no such field"),
    "a number as text": ({"max_new_tokens": "5"}, "max_new_tokens"),
    "a number with a fraction": ({"max_new_tokens": 5.5}, "max_new_tokens"),
    "a boolean as number": ({"num_answers": True}, "num_answers"),
    "a number as boolean": ({"extractive": 1}, "extractive"),
    "below": ({"max_new_tokens": 0}, "max_new_tokens"),
    "above": ({"num_answers": 101}, "num_answers"),
    "far above": ({"max_new_tokens": 2**70}, "max_new_tokens"),
    "NaN": ({"temperature": float("nan")}, "temperature"),
    "Infinity": ({"top_p": float("inf")}, "top_p"),
    "a contradiction": ({"top_k": 5}, "temperature"),
    "temperature between": ({"temperature": 1e-9}, "temperature"),
    "stream of another type": ({"stream": "yes"}, "stream"),
    "window beyond the model": ({"window": 5000}, "window"),
}


def check_problem(response, code):
    problem = response.json()
    codes = (code,) if isinstance(code, str) else code
    assert problem["code"] in codes, problem
    assert (response.status_code, problem["title"]) == STATUS_OF[problem["code"]]
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["x-request-id"]
    assert SECRET not in response.text
    return problem["detail"]


MANY = 200_000
WRONG_ITEMS = b"[" + b",".join([b"0"] * MANY) + b"]"
UNKNOWN_FIELDS = b",".join(b'"%d":0' % number for number in range(MANY))
TENSOR = b'{"name": "question", "datatype": "BYTES", "shape": %s, "data": %s}'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/answers", b'{"context": "x", "items": %s}' % WRONG_ITEMS),
        ("/v1/answers", b'{"context": "x", "items": %s}' % WRONG_ITEMS.replace(b"0", b'{"question": "?"}')),
        ("/v1/answer", b'{"question": "Who?", "context": "x", %s}' % UNKNOWN_FIELDS),
        ("/v1/answers", b'{"context": "x", "items": [{"question": "Who?", %s}]}' % UNKNOWN_FIELDS),
        ("/hf/question-answering", b'{"inputs": {%s}}' % UNKNOWN_FIELDS),
        ("/v2/models/echo/infer", b'{"inputs": %s}' % WRONG_ITEMS),
        ("/v2/models/echo/infer", b'{"inputs": [%s]}' % (TENSOR % (b"[1]", WRONG_ITEMS))),
        ("/v2/models/echo/infer", b'{"inputs": [%s]}' % (TENSOR % (WRONG_ITEMS.replace(b"0", b'"a"'), b'["Who?"]'))),
        (
            "/v2/models/echo/infer",
            b'{"inputs": [%s, %s], "parameters": {%s}}'
            % (
                TENSOR % (b"[1]", b'["Who?"]'),
                (TENSOR % (b"[1]", b'["x"]')).replace(b"question", b"context"),
                UNKNOWN_FIELDS,
            ),
        ),
    ],
    ids=[
        "items",
        "valid items",
        "fields",
        "fields of an item",
        "fields of inputs",
        "inputs",
        "data",
        "shape",
        "parameters",
    ],
)
def test_many_errors_are_neither_collected_nor_described(running, monkeypatch, path, body):
    """Hundreds of thousands of them, or of items, once took seconds and gigabytes, in the event loop.

    Bodies of too many strings are refused before they are parsed; validation stops at the first wrong item of others.
    """
    described = []
    expected = problems._expected
    monkeypatch.setattr(problems, "_expected", lambda error: described.append(error) or expected(error))
    validated = []
    to_problem = routes.problem_of_validation
    for module in (routes, v2):
        monkeypatch.setattr(
            module, "problem_of_validation", lambda invalid: validated.append(invalid) or to_problem(invalid)
        )
    response = running.client.post(path, content=body, headers={"content-type": "application/json"})
    check_problem(response, "invalid_request")
    assert len(response.content) < 2000
    if body.count(b'"') > 10_000:
        assert (validated, described) == ([], [])
        assert "field names and texts" in response.json()["detail"]
    else:
        (invalid,) = validated
        assert invalid.error_count() <= 3


@pytest.mark.parametrize(
    ("body", "strings"),
    [
        (b"{}", 0),
        (b'{"a": "b", "c" : ["d", ""]}', 5),
        (rb'{"a": "\"\\", "\\": "\n"}', 4),
        (rb'"\"\"\"\"\"', 1),
        (b'"' * 7, 4),
        (b'"\\', 1),
    ],
)
def test_strings_are_counted_as_json_has_them(body, strings):
    routes.check_strings(body, strings)
    if strings:
        with pytest.raises(routes.Problem):
            routes.check_strings(body, strings - 1)


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b",".join(b'"%d":1' % number for number in range(400_000)) + b"}",
        b'{"a":1,' * 400_000,
        b'"' + b'\\"' * 2_000_000,
        b'"' + b"x" * 4_000_000 + b'"',
        b"\\" * 4_000_000 + b'"',
    ],
    ids=["unknown fields", "nested", "one string of quotation marks", "one long string", "backslashes"],
)
def test_the_time_to_count_strings_is_bounded(body):
    """The largest bodies that are read by default; 0.8 s of the event loop before there was a limit."""
    began = time.thread_time()
    with contextlib.suppress(routes.Problem):
        routes.check_strings(body, 1_124)
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(running, path, name):
    body, code = BODIES[name]
    response = running.client.post(path, content=body, headers={"content-type": "application/json"})
    check_problem(response, code)
    assert running.ask().status_code == 200


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_not_what_they_have_to_be(running, name):
    fields, named = FIELDS[name]
    body = json.dumps(GOOD | fields).encode()
    response = running.client.post("/v1/answer", content=body, headers={"content-type": "application/json"})
    code = "invalid_json" if named == "surrogate" else "invalid_request"
    assert named in check_problem(response, code)
    streamed = json.dumps({**GOOD, "stream": True} | fields).encode()
    response = running.client.post("/v1/answer", content=streamed, headers={"content-type": "application/json"})
    check_problem(response, code)
    assert running.is_idle()


def test_one_bad_item_refuses_all(start):
    running = start()
    items = [{"question": "Who?"}] * 3 + [{"question": ""}]
    response = running.client.post("/v1/answers", json={"items": items, "context": SECRET})
    assert "items.3.question" in check_problem(response, "invalid_request")
    response = running.client.post(
        "/v1/answers", json={"items": [{"question": "Who?"}, {"question": " "}], "context": SECRET}
    )
    check_problem(response, "invalid_request")
    assert running.service.answered == 0


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", "not_found"),
        ("POST", "/v1/answer/", "not_found"),
        ("GET", "/v1/answer", "method_not_allowed"),
        ("PUT", "/v1/answer", "method_not_allowed"),
        ("DELETE", "/healthz", "method_not_allowed"),
        ("GET", "/v2/models/other", "not_found"),
        ("GET", "/v1/../../etc/passwd", "not_found"),
    ],
)
def test_paths_and_methods(running, method, path, code):
    response = running.client.request(method, path, headers={"content-type": "application/json"})
    check_problem(response, code)
    if code == "method_not_allowed":
        assert response.headers["allow"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ],
)
def test_media_types(running, headers):
    response = running.client.post("/v1/answer", content=json.dumps(GOOD).encode(), headers=headers)
    check_problem(response, "unsupported_media_type")
    kinds = ("application/json", "Application/JSON; charset=UTF-8")
    assert {
        running.client.post("/v1/answer", json=GOOD, headers={"content-type": kind}).status_code for kind in kinds
    } == {200}


def test_texts_that_are_too_long(start):
    limits = Limits(question_characters=20, context_characters=100, items=3, queue_questions=3, queue_characters=150)
    running = start(limits=limits)
    assert running.ask("?" * 20, "😀" * 100).status_code == 200
    assert "question" in check_problem(running.ask("?" * 21), "invalid_request")
    assert "101" in check_problem(running.ask("Who?", SECRET + "." * 92), "invalid_request")
    items = [{"question": "Who?"}] * 4
    response = running.client.post("/v1/answers", json={"items": items, "context": SECRET})
    assert "items" in check_problem(response, "invalid_request")
    response = running.client.post("/v1/answers", json={"items": items[:2], "context": "." * 90})
    assert "188 characters" in check_problem(response, "invalid_request")
    schemas = running.client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["AnswerRequest"]["properties"]["context"]["maxLength"] == 100
    assert schemas["AnswersRequest"]["properties"]["items"]["maxItems"] == 3


def test_a_body_that_is_too_large_is_refused_after_it_was_dropped(start):
    running = start(limits=Limits(body_bytes=1000))
    for content in (b"x" * 5_000_000, (b"x" * 1000 for _ in range(5000))):  # with a length, and in chunks
        response = running.client.post("/v1/answer", content=content, headers={"content-type": "application/json"})
        check_problem(response, "body_too_large")
        assert response.headers["connection"] == "close"
    head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running.raw(f"{head}Content-Length: 9999999999\r\nExpect: 100-continue\r\n\r\n") as connection:
        assert b" 413 " in connection.recv(4096)
    endless = itertools.repeat(b"x" * 100_000, 1000)
    with running.raw(f"{head}Content-Length: 9999999999\r\n\r\n") as connection, pytest.raises(ConnectionError):
        collections.deque(map(connection.sendall, endless))  # some of it is read, and not all


def test_a_slow_body(start):
    running = start(limits=Limits(body_seconds=0.2))
    head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    with running.raw(head, b'{"question"') as connection:
        assert b" 408 " in connection.recv(4096)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"NONSENSE\r\n\r\n"]
)
def test_what_is_no_http(running, data):
    with running.raw("", data) as connection:
        assert b" 400 " in connection.recv(4096)
    assert running.ask().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_a_problem_and_is_logged_with_its_request(start, monkeypatch, capfd, stream):
    running = start()

    def fail(*arguments, **options):
        raise EngineError(f"failed at {CONTEXT}")

    monkeypatch.setattr(running.answerer._engine, "prefill", fail)
    response = running.ask(stream=stream)
    if stream:
        name, problem = read_events(response.text)[-1]
        assert (name, problem["code"], problem["status"]) == ("error", "engine_failed", 500)
    else:
        check_problem(response, "engine_failed")
    running.close()
    written = capfd.readouterr().err
    (event,) = [line for line in map(json.loads, written.splitlines()) if line["event"] == "failed"]
    assert event["request_id"] == response.headers["x-request-id"]
    assert event["error"] == "EngineError"
    assert "test_bad_input.py" in str(event["frames"])
    assert CONTEXT not in written


def test_a_stream_that_fails_in_a_way_nobody_foresaw_ends_with_an_event(start, monkeypatch, capfd):
    running = start()

    def fail(answer):
        raise RuntimeError(f"failed at {CONTEXT}")

    monkeypatch.setattr(Answer, "to_dict", fail)
    response = running.ask(stream=True)
    name, problem = read_events(response.text)[-1]
    assert (name, problem["code"], problem["request_id"]) == (
        "error",
        "engine_failed",
        response.headers["x-request-id"],
    )
    running.close()
    written = capfd.readouterr().err
    (event,) = [line for line in map(json.loads, written.splitlines()) if line["event"] == "failed"]
    assert (event["request_id"], event["error"]) == (problem["request_id"], "RuntimeError")
    assert CONTEXT not in written


def test_an_error_of_the_engine_is_a_problem_without_its_message(start, monkeypatch, capfd):
    running = start()

    def fail(*arguments, **options):
        raise RuntimeError(f"failed at {CONTEXT}")

    monkeypatch.setattr(running.answerer, "submit", fail)
    response = running.ask()
    check_problem(response, "engine_failed")
    assert response.status_code == 500
    running.close()  # the log is written once the response was sent
    logged = capfd.readouterr().err
    assert "RuntimeError" in logged
    assert "test_bad_input.py" in logged
    assert CONTEXT not in logged
