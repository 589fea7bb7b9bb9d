"""The routes of the service's own API, and those that show what it is."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from qa_onnx import __version__
from qa_onnx.serve.events import EventStream
from qa_onnx.serve.metrics import Metrics
from qa_onnx.serve.pdf import reads_pdf
from qa_onnx.serve.problems import DRAINING, Problem, problem_of_validation
from qa_onnx.serve.schemas import (
    AnswerRequest,
    AnswerResponse,
    AnswersRequest,
    AnswersResponse,
    Health,
    ModelLimits,
    ModelResponse,
)
from qa_onnx.serve.service import Service

router = APIRouter()
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
Body = TypeVar("Body", bound=BaseModel)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
"""A JSON string. It matches at every quotation mark, closed or not, and never goes back: its time is linear."""
STRINGS_PER_ITEM = 4
"""Names and values of a question and its own context."""
OTHER_STRINGS = 100
"""Names and values of everything else in a request, with room to spare."""
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "An event; its data is JSON: `{text}`, an AnswerResponse, or ProblemDetails.",
            "properties": {"event": {"enum": ["text", "answer", "error"]}, "data": {"type": "string"}},
            "required": ["event", "data"],
        }
    }
}
METRICS = {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}


class JSON(Response):
    """JSON as the standard library writes it: floats in as many digits as give the same bits again."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encodes a value."""
        return _ENCODER.encode(content).encode()


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    return cast(Service, request.app.state.service)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Describes the body of a route that reads it with `read_body`; `qa_onnx.serve.app.describe` adds the schema."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def check_strings(body: bytes, at_most: int) -> None:
    """Refuses a body of more strings, field names included, than any request has.

    To parse 400,000 unknown fields and to make an error of each takes most of a second of the event loop; to count as
    many strings as are allowed takes less than a millisecond.

    Raises:
        Problem: It has more.
    """
    if next(islice(_STRING.finditer(body), at_most, None), None) is not None:
        raise Problem(
            "invalid_request",
            f"The body has more than {at_most:,} field names and texts; expected at most that. Remove unknown fields, "
            "or send the questions in several requests.",
        )


async def read_body(model: type[Body], request: Request) -> Body:
    """The body of a request, parsed and checked at once. FastAPI would do both in Python, one after the other.

    Raises:
        Problem: It is no JSON, or does not fit.
    """
    body = await request.body()
    check_strings(body, STRINGS_PER_ITEM * service_of(request).limits.items + OTHER_STRINGS)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise problem_of_validation(error) from error


@router.post(
    "/v1/answer",
    response_model=AnswerResponse,
    responses={200: {"content": EVENTS}},
    openapi_extra=body_of(AnswerRequest),
    tags=["answers"],
)
async def answer(request: Request) -> Response:
    """Answers one question. Offsets are Unicode code points of the context.

    With `"stream": true` the response is `text/event-stream`: events `text` with pieces `{"text"}`, then one event
    `answer` with what the JSON response would be, or `error` with a problem; a comment line where nothing is new. An
    answer from several windows, or one of several answers, is one piece.
    """
    service, request_id = service_of(request), request.state.request_id
    body = await read_body(AnswerRequest, request)
    config = body.to_config()
    if body.stream:
        pieces = service.stream(body.question, body.context, config)
        await anext(pieces)  # what is wrong with the request is a status, not an event
        return EventStream(pieces, request_id=request_id)
    (found,) = await service.answer([body.question], [body.context], config)
    return JSON({"request_id": request_id, "answer": found.to_dict()})


@router.post("/v1/answers", response_model=AnswersResponse, openapi_extra=body_of(AnswersRequest), tags=["answers"])
async def answers(request: Request) -> Response:
    """Answers several questions, of one context or of several: all of them, or none."""
    body = await read_body(AnswersRequest, request)
    contexts = [body.context if item.context is None else item.context for item in body.items]
    given = [context for context in contexts if context is not None]
    if len(given) < len(contexts):
        raise Problem(
            "invalid_request",
            f"items.{contexts.index(None)}: has no context, and there is no shared one; expected one of both",
        )
    questions = [item.question for item in body.items]
    found = await service_of(request).answer(questions, given, body.options.to_config())
    return JSON({"request_id": request.state.request_id, "answers": [answer.to_dict() for answer in found]})


@router.get("/v1/model", tags=["service"])
async def model(request: Request) -> ModelResponse:
    """What answers, and what one request may ask for."""
    service = service_of(request)
    manifest, stats, limits = service.answerer.manifest, service.answerer.stats(), service.limits
    return ModelResponse(
        name=service.name,
        version=__version__,
        precision=manifest.precision,
        provider=service.answerer.provider,
        kernels=stats.kernels,
        calibrated="slope" in manifest.scores,
        max_positions=manifest.max_positions,
        limits=ModelLimits(
            body_bytes=limits.body_bytes,
            question_characters=limits.question_characters,
            context_characters=limits.context_characters,
            items=limits.items,
            windows=limits.windows,
        ),
        pdf=reads_pdf(),
    )


@router.get("/healthz", tags=["service"])
async def healthz() -> Health:
    """Whether the process serves: for liveness probes."""
    return Health(status="ok")


@router.get("/readyz", tags=["service"])
async def readyz(request: Request) -> Health:
    """Whether it takes requests: for readiness probes. 503 while it drains."""
    if service_of(request).is_draining:
        raise Problem("draining", DRAINING)
    return Health(status="ready")


@router.get("/metrics", tags=["service"], response_class=Response, responses={200: {"content": METRICS}})
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    registry = cast(Metrics, request.app.state.metrics).registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
