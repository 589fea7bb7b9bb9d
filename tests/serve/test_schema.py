"""The OpenAPI document is valid, and the service does what it says: schemathesis tries it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.serve.conftest import Running
from tests.unit.fakes import echo_answerer

schemathesis = pytest.importorskip("schemathesis")
PHASES = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def service():
    with echo_answerer(config={"max_wait_ms": 0}) as answerer:
        running = Running(answerer)
        yield running
        running.close()


@pytest.fixture(scope="module")
def api(service):
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


@schemathesis.serializer("application/pdf")
def serialize_pdf(_, value):
    return str(value).encode("utf-8", "replace")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=25, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_breaks_the_service(case):
    case.call_and_validate()


def test_the_document_names_every_route(service):
    paths = service.client.get("/openapi.json").json()["paths"]
    assert paths.keys() == {
        "/v1/answer",
        "/v1/answers",
        "/v1/model",
        "/v1/text",
        "/healthz",
        "/readyz",
        "/metrics",
        "/hf/question-answering",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
    }
