"""`POST /v1/text`: the text of a PDF that is uploaded, for the page and for clients that have no parser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from qa_onnx.errors import QAOnnxError
from qa_onnx.serve.pdf import PdfLimits, extract_text, reads_pdf
from qa_onnx.serve.problems import DRAINING, Problem, problem_of
from qa_onnx.serve.service import Service

MAX_PARSING = 2
"""PDF files that are parsed at the same time: answers need the processors more."""
RETRY_SECONDS = 2

router = APIRouter()


class TextResponse(BaseModel):
    """The text of a file."""

    request_id: str
    text: str = Field(description="Its text, with a blank line between pages.")
    pages: int = Field(description="Its number of pages.")


PDF_BODY = {"requestBody": {"required": True, "content": {"application/pdf": {"schema": {"type": "string"}}}}}


@router.post("/v1/text", tags=["service"], openapi_extra=PDF_BODY)
async def text(request: Request) -> TextResponse:
    """Reads the text of a PDF, which is the body. Needs the extra `pdf`."""
    if not reads_pdf():
        raise Problem(
            "unsupported_media_type",
            "This service reads no PDF files. Send the text, or, in the checkout: pip install '.[pdf]'",
        )
    service: Service = request.app.state.service
    if service.is_draining:
        raise Problem("draining", DRAINING)
    limits = PdfLimits(
        file_bytes=service.limits.body_bytes,
        characters=service.limits.context_characters,
        seconds=min(service.limits.timeout_seconds, PdfLimits.seconds),
    )
    if service.parsing >= MAX_PARSING:
        raise Problem(
            "queue_full",
            f"{MAX_PARSING} PDF files are being read. Send this one again in {RETRY_SECONDS} s.",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    service.parsing += 1
    try:
        found = await extract_text(await request.body(), limits=limits)
    except QAOnnxError as error:
        raise problem_of(error) from error
    finally:
        service.parsing -= 1
    return TextResponse(request_id=request.state.request_id, text=found.text, pages=found.pages)
