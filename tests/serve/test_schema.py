"""The OpenAPI document is valid, and the service does what it says: schemathesis tries it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

GETS = ["/v1/model", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}"]
POSTS = ["/v1/answer", "/v1/answers", "/v1/text", "/hf/question-answering", "/v2/models/{name}/infer"]
OPERATIONS = [("GET", path) for path in [*GETS, "/v2/models/{name}/ready"]] + [("POST", path) for path in POSTS]
RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
TRIED = [(*operation, RIGHT) for operation in OPERATIONS] + [("POST", path, WRONG) for path in POSTS]


@schemathesis.serializer("application/pdf")
def write_pdf(_, value):
    return str(value).encode(errors="replace")


def wrong_data_is_refused(context, response, case):
    """As schemathesis checks it, which does not count a body that is too large to be read (413) as refused."""
    return None if response.status_code == 413 else negative_data_rejection(context, response, case)


@pytest.fixture(scope="module")
def api(running):
    api = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    api.validate()
    return api


def test_the_document_names_every_route(api):
    assert {path for _, path in OPERATIONS} == api.raw_schema["paths"].keys()
    assert sum(map(len, api.raw_schema["paths"].values())) == len(OPERATIONS)


@pytest.mark.parametrize(("method", "path", "mode"), TRIED)
def test_no_request_breaks_the_service_and_every_response_is_as_described(api, running, method, path, mode):
    """What the document allows, and what it does not: never a 5xx, and a body of the schema of its status."""
    operation = api[path][method]
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    if mode is WRONG:
        checks.append(wrong_data_is_refused)
    name = {"name": running.service.name} if "{name}" in path else {}

    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=name))
    @settings(
        max_examples=40 if method == "POST" else 3,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    def check(case):
        case.call_and_validate(checks=checks)

    check()
    assert running.ask().status_code == 200
