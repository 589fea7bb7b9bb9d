"""The application: routes, middleware, errors, and its description."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_type_hints

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from qa_onnx import __version__
from qa_onnx.errors import QAOnnxError
from qa_onnx.serve import huggingface, pages, routes, schemas, upload, v2
from qa_onnx.serve.config import Limits, ServeConfig
from qa_onnx.serve.metrics import Metrics
from qa_onnx.serve.middleware import RequestMiddleware
from qa_onnx.serve.problems import CONTENT_TYPE, FAILED, STATUS_OF, Problem, log_failure, problem_of
from qa_onnx.serve.security import Gatekeeper
from qa_onnx.serve.service import Service

DESCRIPTION = (
    "Answers questions about texts. Offsets count Unicode code points. Errors are RFC 9457 problem details with a "
    "stable `code`; they never repeat what was asked."
)
MODELS = (
    schemas.AnswerRequest,
    schemas.AnswersRequest,
    huggingface.QuestionAnsweringRequest,
    v2.InferRequest,
    schemas.ProblemDetails,
)
REF = "#/components/schemas/{model}"
POST_PROBLEMS = (400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)
GET_PROBLEMS = (401, 403, 404, 500, 503)


def make_app(service: Service, config: ServeConfig) -> ASGIApp:
    """Makes the ASGI application of a service."""
    app = FastAPI(
        title="qa_onnx",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.metrics = metrics = Metrics(service)
    declared = [route for module in (routes, upload, huggingface, v2, pages) for route in module.router.routes]
    app.router.routes += map(_without_layers, declared)
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(QAOnnxError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_failure)
    description = describe(app, declared, service.limits)
    app.openapi = lambda: description  # type: ignore[method-assign]
    app.state.docs = pages.write_docs(description)
    wrapped: ASGIApp = RequestMiddleware(
        app,
        paths=description["paths"].keys(),
        gatekeeper=Gatekeeper(config),
        admission=service.admission,
        limits=service.limits,
        metrics=metrics,
        access_log=config.access_log,
    )
    if config.cors_origins:
        wrapped = CORSMiddleware(
            wrapped,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return wrapped


def _without_layers(route: BaseRoute) -> BaseRoute:
    """Starlette's route where the endpoint itself reads the body and makes the response.

    FastAPI's layers, which would do both, took half of a request's time.
    """
    if isinstance(route, APIRoute) and route.openapi_extra:
        made = get_type_hints(route.endpoint)["return"]
        if isinstance(made, type) and issubclass(made, Response):
            return Route(route.path, route.endpoint, methods=list(route.methods or ()))
    return route


def describe(app: FastAPI, declared: Sequence[BaseRoute], limits: Limits) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, with the limits of this service and its problems."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=declared)
    components = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    _, models = models_json_schema([(model, "validation") for model in MODELS], ref_template=REF)
    components |= models["$defs"]
    for name in ("AnswerRequest", "Item", "AnswersRequest", "Inputs"):
        for field, most in (("question", limits.question_characters), ("context", limits.context_characters)):
            if field in components[name]["properties"]:
                _limit_length(components[name]["properties"][field], most)
    components["AnswersRequest"]["properties"]["items"]["maxItems"] = limits.items
    content = {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    titles = dict(STATUS_OF.values())
    for path in document["paths"].values():
        for method, operation in path.items():
            for status in POST_PROBLEMS if method == "post" else GET_PROBLEMS:
                operation["responses"][str(status)] = {"description": titles[status], "content": content}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]
    return document


def _limit_length(schema: dict[str, Any], most: int) -> None:
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") == "string":
            kind["maxLength"] = most


async def _on_problem(request: Request, error: Exception) -> Response:
    problem, request_id = cast(Problem, error), request.state.request_id
    log_failure(problem, request_id)
    return Response(
        problem.to_json(request_id, path=request.url.path),
        status_code=problem.status,
        headers=problem.headers,
        media_type=CONTENT_TYPE,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    problem = problem_of(cast(QAOnnxError, error))
    problem.__cause__ = error
    return await _on_problem(request, problem)


async def _on_failure(request: Request, error: Exception) -> Response:
    """Whatever was not foreseen; Starlette raises it again, and the middleware logs it."""
    return await _on_problem(request, Problem("engine_failed", FAILED))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router says: an unknown path or method."""
    known = cast(HTTPException, error)
    codes = {
        404: ("not_found", "There is no such path. /docs lists all of them."),
        405: ("method_not_allowed", "The path does not take this method; the Allow header names those it takes."),
    }
    code, detail = codes.get(known.status_code, ("engine_failed", FAILED))
    return await _on_problem(request, Problem(code, detail, headers=known.headers))
