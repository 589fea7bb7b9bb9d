"""`POST /hf/question-answering`: the task's API as Hugging Face's clients call it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from qa_onnx.config import DEFAULT_MAX_NEW_TOKENS, MAX_NUM_ANSWERS, MAX_WHOLE_NUMBER, GenerationConfig
from qa_onnx.serve.problems import Problem
from qa_onnx.serve.routes import JSON, body_of, read_body, service_of
from qa_onnx.serve.schemas import Strict, Text

router = APIRouter()


class Inputs(Strict):
    """A question and its context."""

    question: Text
    context: Text


class Parameters(Strict):
    """Those of Hugging Face's question-answering task; what this model has no use for may be null only."""

    top_k: Annotated[int, Field(ge=1, le=MAX_NUM_ANSWERS)] | None = Field(
        default=None, description="Number of answers."
    )
    max_answer_len: Annotated[int, Field(ge=1, lt=MAX_WHOLE_NUMBER)] | None = Field(
        default=None, description="In tokens."
    )
    doc_stride: Annotated[int, Field(ge=0, lt=MAX_WHOLE_NUMBER)] | None = Field(
        default=None, description="Tokens that windows share."
    )
    handle_impossible_answer: bool | None = Field(
        default=None, description="false gives an answer always; else there may be an empty one."
    )
    align_to_words: bool | None = Field(default=None, description="Answers are whole words always.")
    max_question_len: None = None
    max_seq_len: None = None


class QuestionAnsweringRequest(Strict):
    """What `InferenceClient.question_answering` sends."""

    inputs: Inputs
    parameters: Parameters | None = None


class Element(BaseModel):
    """An answer; `start` and `end` count Unicode code points. An empty one is at 0."""

    answer: str
    score: float
    start: int
    end: int


@router.post(
    "/hf/question-answering",
    response_model=Element | list[Element],
    openapi_extra=body_of(QuestionAnsweringRequest),
    tags=["compatible"],
)
async def question_answering(request: Request) -> Response:
    """Extractive answers, as `huggingface_hub.InferenceClient.question_answering` asks: with `top_k` above 1 a list."""
    body = await read_body(QuestionAnsweringRequest, request)
    parameters = body.parameters or Parameters()
    if parameters.align_to_words is False:
        raise Problem("invalid_request", "parameters.align_to_words: got false; answers are whole words. Leave it out")
    config = GenerationConfig(
        extractive=True,
        num_answers=parameters.top_k or 1,
        max_new_tokens=parameters.max_answer_len or DEFAULT_MAX_NEW_TOKENS,
        stride=parameters.doc_stride,
        no_answer_threshold=1.0 if parameters.handle_impossible_answer is False else None,
    )
    (found,) = await service_of(request).answer([body.inputs.question], [body.inputs.context], config)
    elements = [
        {"answer": one.text, "score": one.score, "start": one.start or 0, "end": one.end or 0}
        for one in (found, *found.alternatives)
    ]
    return JSON(elements[0] if config.num_answers == 1 else elements)
