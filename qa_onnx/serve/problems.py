"""What goes wrong, as RFC 9457 problem details. None of them repeats what a request contained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from qa_onnx.errors import ClosedError, InvalidInputError, QAOnnxError, QueueFullError
from qa_onnx.serve.log import describe_error, write_event

CONTENT_TYPE = "application/problem+json"
DRAINING = "The service is shutting down. Ask another replica, or ask again later."
FAILED = "The service failed; its log has more."
MAX_ERRORS = 100
"""A body with more errors gets none of them listed: a description of each would take seconds and gigabytes."""
SHOWN_ERRORS = 5
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")

STATUS_OF = {
    "invalid_json": (400, "The body is not JSON"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden_host": (403, "This host name is not served"),
    "not_found": (404, "There is nothing at this path"),
    "method_not_allowed": (405, "The path does not take this method"),
    "body_timeout": (408, "The body took too long to arrive"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The body is of a type that is not read"),
    "invalid_request": (422, "The request is not what it has to be"),
    "queue_full": (429, "Too many questions wait"),
    "engine_failed": (500, "The answer could not be computed"),
    "draining": (503, "The service is shutting down"),
    "timeout": (504, "The answer took too long"),
}
"""Status and title of each stable code."""


class Problem(Exception):  # noqa: N818 - the name that RFC 9457 gives it
    """A request cannot be answered, and why."""

    def __init__(self, code: str, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        """Describes it.

        Args:
            code: A key of `STATUS_OF`.
            detail: What was given, what was expected, how to mend it; never a question, a context or a key.
            headers: More headers of the response.
        """
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.status, self.title = STATUS_OF[code]

    def to_dict(self, request_id: str) -> dict[str, Any]:
        """The problem's members, for JSON."""
        return {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
        }

    def to_json(self, request_id: str, *, path: str = "") -> bytes:
        """The problem as a body of `CONTENT_TYPE`; clients of KServe v2 look for the member `error`."""
        more = {"error": self.detail} if path.startswith("/v2/") else {}
        return json.dumps(self.to_dict(request_id) | more).encode()


def problem_of(error: QAOnnxError | TimeoutError) -> Problem:
    """The problem that an error of the answerer is to a client."""
    if isinstance(error, InvalidInputError):
        return Problem("invalid_request", str(error))
    if isinstance(error, QueueFullError):
        return Problem("queue_full", "Too many questions wait. Ask again later.", headers={"Retry-After": "1"})
    if isinstance(error, ClosedError):
        return Problem("draining", DRAINING)
    if isinstance(error, TimeoutError):
        return Problem("timeout", "The answer was not there in time. Shorten the context, or ask again later.")
    return Problem("engine_failed", f"The engine failed ({type(error).__name__}); the service's log has more.")


def log_failure(problem: Problem, request_id: str) -> None:
    """Logs the error behind a problem that is the service's own, without its message."""
    if problem.code == "engine_failed" and problem.__cause__ is not None:
        write_event("failed", request_id=request_id, **describe_error(problem.__cause__))


def problem_of_validation(invalid: ValidationError) -> Problem:
    """The problem of a body that does not fit its schema: what is wrong at which place, never the value there."""
    count = invalid.error_count()
    if count > MAX_ERRORS:
        return Problem(
            "invalid_request",
            f"{count:,} fields are unknown, missing or wrong. /docs describes those that are expected.",
        )
    errors = invalid.errors(include_url=False, include_context=False, include_input=False)
    for error in errors:
        if error["type"] == "json_invalid":  # the parser tells what and where, never the text
            return Problem("invalid_json", f"{error['msg']}. Send one JSON object in UTF-8, without lone surrogates.")
    shown = [f"{_place(error['loc'])}: {_expected(error)}" for error in errors[:SHOWN_ERRORS]]
    more = f"; and {count - SHOWN_ERRORS} more" if count > SHOWN_ERRORS else ""
    return Problem("invalid_request", "; ".join(shown) + more)


def _place(location: Sequence[str | int]) -> str:
    """Such as `items.3.question`. The name of an unknown field may be any text: it is shown only where it is a name."""
    parts = [str(part) for part in location if part != "body"]
    return ".".join(part if part.isdecimal() or _FIELD.fullmatch(part) else "(a name)" for part in parts) or "the body"


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "no such field"
    message: str = error["msg"]
    return message[0].lower() + message[1:]
