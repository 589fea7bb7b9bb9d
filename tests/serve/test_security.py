"""Who may ask, what is logged, and what a browser is told."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys

import pytest

from qa_onnx import InvalidInputError
from qa_onnx.serve import pages
from qa_onnx.serve.config import API_KEY_VARIABLE, ServeConfig, read_api_keys
from qa_onnx.serve.problems import Problem
from qa_onnx.serve.security import Gatekeeper, content_security_policy
from tests.conftest import ROOT
from tests.serve.conftest import CONTEXT

KEYS = ("first-key-of-this-test", "other-key-of-this-test")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_another_host_than_loopback_needs_a_key_or_a_word(host):
    with pytest.raises(InvalidInputError, match="--allow-anonymous"):
        ServeConfig(host=host)
    assert not ServeConfig(host=host, api_keys=KEYS).is_loopback
    assert not ServeConfig(host=host, allow_anonymous=True).is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert ServeConfig(host=host).is_loopback


@pytest.mark.parametrize(
    "fields",
    [
        {"port": -1},
        {"port": 70000},
        {"api_keys": ("short",)},
        {"api_keys": ("with space in the key",)},
        {"cors_origins": ("example.com",)},
    ],
)
def test_options_are_checked(fields):
    with pytest.raises(InvalidInputError, match="got "):
        ServeConfig(**fields)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8000", 200),
        ("attacker.example", 403),
        ("attacker.example:8000", 403),
        ("localhost.attacker.example", 403),
        ("localhost@attacker.example", 403),
        ("attacker.example/localhost", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_a_name_that_an_attacker_s_dns_points_here_is_refused(running, host, status):
    body = {"question": "Who?", "context": CONTEXT}
    response = running.client.post("/v1/answer", json=body, headers={"host": host})
    assert response.status_code == status
    assert running.client.get("/", headers={"host": host}).status_code in (status, 200 if status == 200 else 403, 307)
    assert running.client.get("/healthz", headers={"host": host}).status_code == 200


def test_allowed_hosts(start):
    running = start(config=ServeConfig(port=0, allowed_hosts=("qa.example.com",)))
    statuses = [
        running.client.get("/v1/model", headers={"host": host}).status_code
        for host in ("qa.example.com", "localhost", "other.example.com")
    ]
    assert statuses == [200, 200, 403]
    Gatekeeper(ServeConfig(host="0.0.0.0", allow_anonymous=True)).check("/v1/model", {"host": "any.example"})
    with pytest.raises(Problem):
        Gatekeeper(ServeConfig(host="0.0.0.0", allow_anonymous=True, allowed_hosts=("a.example",))).check(
            "/v1/model", {"host": "b.example"}
        )


def test_keys(start, capfd):
    running = start(config=ServeConfig(port=0, api_keys=KEYS))
    body = {"question": "Who?", "context": CONTEXT}

    def ask(headers, path="/v1/answer"):
        return running.client.post(path, json=body, headers=headers)

    for key in KEYS:
        assert ask({"Authorization": f"Bearer {key}"}).status_code == 200
        assert ask({"X-API-Key": key}).status_code == 200
    for headers in (
        {},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": f"Bearer {KEYS[0]}x"},
        {"Authorization": "Bearer"},
        {"X-API-Key": KEYS[0][:-1]},
        {"X-API-Key": "\xe9"},
    ):
        refused = ask({name: value.encode("latin-1") for name, value in headers.items()})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/answers", "/hf/question-answering", "/v2/models/echo/infer", "/nothing"):
        assert ask({}, path).status_code == 401
    assert running.client.get("/v1/model").status_code == 401
    for path in ("/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"):
        assert running.client.get(path).status_code == 200
    logs = "".join(capfd.readouterr())
    assert not [key for key in KEYS if key in logs]


def test_keys_of_a_file_and_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_api_keys(None) == ()
    path = tmp_path / "keys"
    path.write_text(f"# two keys\n{KEYS[0]}\n\n{KEYS[1]}\n")
    path.chmod(0o604)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        read_api_keys(path)
    path.chmod(0o640)
    assert read_api_keys(path) == KEYS
    monkeypatch.setenv(API_KEY_VARIABLE, "key-of-the-environment")
    assert read_api_keys(path) == ("key-of-the-environment", *KEYS)
    path.write_text("# none\n")
    with pytest.raises(InvalidInputError, match="has no key"):
        read_api_keys(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InvalidInputError, match="not ASCII"):
        read_api_keys(path)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_api_keys(tmp_path / "absent")


def test_no_page_of_another_origin_may_call_unless_asked(running, start):
    origin = {"Origin": "https://app.example.com"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in running.client.options("/v1/answer", headers=preflight).headers
    assert "access-control-allow-origin" not in running.client.get("/v1/model", headers=origin).headers
    simple = json.dumps({"question": "Who?", "context": CONTEXT}).encode()
    for kind in ({"content-type": "text/plain"}, {}):  # what a browser sends without a preflight
        for path in ("/v1/answer", "/v2/models/echo/infer"):
            response = running.client.post(path, content=simple, headers={**origin, **kind})
            assert response.status_code == 415
    asked = start(config=ServeConfig(port=0, cors_origins=(origin["Origin"],), api_keys=KEYS))
    assert (
        asked.client.options("/v1/answer", headers=preflight).headers["access-control-allow-origin"] == origin["Origin"]
    )
    refused = asked.client.get("/v1/model", headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin["Origin"])
    other = asked.client.get("/v1/model", headers={"Origin": "https://other.example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_the_access_log_has_no_text_of_requests(start, capfd):
    running = start()
    running.ask("Who is secretive?", "A very secret text.", stream=True)
    running.client.get("/secret-path?secret=query", headers={"X-Request-Id": "mine-1"})
    running.client.get("/healthz", headers={"X-Request-Id": "not one\twith secret"})
    running.close()  # a line is written once its response was sent
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert "secret" not in json.dumps(lines)
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/v1/answer", 200),
        ("GET", "unmatched", 404),
        ("GET", "/healthz", 200),
    ]
    assert lines[1]["request_id"] == "mine-1"
    assert re.fullmatch(r"[0-9a-f]{32}", lines[2]["request_id"])
    assert all(line["seconds"] >= 0 and line["time"].endswith("Z") and line["client"] for line in lines)


def test_the_docs_load_nothing(running):
    response = running.client.get("/docs")
    assert "/v1/answers" in response.text
    assert "num_answers" in response.text
    request = response.text.split("<h2><code>POST /v1/answer<")[1].split("<h3>Response")[0]
    fields = re.findall(r"<tr><td><code>(\w+)</code></td><td>([^<]*)</td>", request)
    assert [name for name, _ in fields[:3]] == ["question", "context", "max_new_tokens"]
    assert ["optional" in kind for _, kind in fields] == [False, False] + [True] * (len(fields) - 2)
    assert "<code>text</code> as it grows" in request
    assert "`" not in response.text
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_is_served_with_hashes_of_its_scripts_and_styles(running, monkeypatch):
    html = "<!doctype html><style>b{}</style><b>x</b><script>let a = 1 < 2 && '</b>' ;\n</script><script>2</script>"
    monkeypatch.setattr(pages, "_read_page", lambda: html)
    response = running.client.get("/")
    assert response.text == html
    policy = response.headers["content-security-policy"]
    for text in ("b{}", "let a = 1 < 2 && '</b>' ;\n", "2"):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "'unsafe" not in policy
    assert "script-src 'none'" in content_security_policy("<p>no script</p>")
    monkeypatch.setattr(pages, "_read_page", lambda: None)
    assert running.client.get("/").headers["location"] == "/docs"


def test_metrics_agree_with_what_was_asked(start):
    running = start()
    items = [{"question": f"Who? {index}"} for index in range(5)]
    for _ in range(3):
        running.client.post("/v1/answers", json={"items": items, "context": CONTEXT})
    running.client.post("/v1/answer", json={})
    text = running.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['qa_onnx_requests_total{route="/v1/answers",status="200"}']) == 3
    assert float(values['qa_onnx_requests_total{route="/v1/answer",status="422"}']) == 1
    assert float(values['qa_onnx_request_seconds_count{route="/v1/answers"}']) == 3
    assert float(values["qa_onnx_questions_total"]) == 15
    assert float(values["qa_onnx_queue_questions"]) == 0
    assert float(values["qa_onnx_prefill_tokens_total"]) == running.answerer.stats().engine.prefill_tokens > 0
    for name in ("prefix_cache_hits_total", "decode_tokens_total", "sequences_running", "queue_characters"):
        assert f"qa_onnx_{name}" in values
    assert "_created" not in text


def test_the_service_loads_no_training_stack_and_the_commands_load_no_service():
    script = "import sys, {}; print(*{{name.partition('.')[0] for name in sys.modules}})"

    def loaded(module):
        command = [sys.executable, "-c", script.format(module)]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())

    heavy = {"torch", "transformers", "datasets", "optimum", "onnx", "training", "export", "bench", "opentelemetry.sdk"}
    assert loaded("qa_onnx.serve.app, qa_onnx.serve.server") & heavy == set()
    assert loaded("qa_onnx.cli") & {"fastapi", "uvicorn", "prometheus_client", "pydantic"} == set()
