"""The Open Inference Protocol (KServe v2) with JSON tensors, as `tritonclient.http` and others speak it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qa_onnx import __version__
from qa_onnx.answer import Answer
from qa_onnx.serve.problems import DRAINING, Problem, problem_of_validation
from qa_onnx.serve.routes import JSON, service_of
from qa_onnx.serve.schemas import Options

router = APIRouter(prefix="/v2", tags=["compatible"])
OUTPUTS = {"text": "BYTES", "score": "FP64", "start": "INT64", "end": "INT64", "no_answer_probability": "FP64"}


class Tensor(BaseModel):
    """An input: `question` or `context`, BYTES of shape [N] or [N, 1]; further members are not read."""

    model_config = ConfigDict(strict=True)
    name: str
    shape: list[int] = Field(min_length=1, max_length=2)
    datatype: str
    data: list[str] | list[list[str]] = Field(min_length=1)


class InferRequest(BaseModel):
    """Questions and their contexts as tensors; `parameters` has the fields of `GenerationConfig`."""

    model_config = ConfigDict(strict=True)
    id: str | None = None
    inputs: list[Tensor] = Field(min_length=2, max_length=2)
    outputs: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] | None = None


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name and version of the server."""
    return {"name": "qa_onnx", "version": __version__, "extensions": []}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether the server runs."""
    return {"live": True}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Whether the server takes requests; 503 while it drains."""
    if service_of(request).is_draining:
        raise Problem("draining", DRAINING)
    return {"ready": True}


@router.get("/models/{name}")
async def model_metadata(name: str, request: Request) -> dict[str, Any]:
    """Inputs and outputs of the model. `start` and `end` are Unicode code points, -1 where the text is not found."""
    _check_name(name, request)
    inputs = [{"name": one, "datatype": "BYTES", "shape": [-1]} for one in ("question", "context")]
    outputs = [{"name": one, "datatype": kind, "shape": [-1]} for one, kind in OUTPUTS.items()]
    return {"name": name, "versions": ["1"], "platform": "onnxruntime", "inputs": inputs, "outputs": outputs}


@router.get("/models/{name}/ready")
async def model_ready(name: str, request: Request) -> dict[str, bool]:
    """As `/v2/health/ready`."""
    _check_name(name, request)
    return await ready(request)


@router.post("/models/{name}/infer")
async def infer(name: str, body: InferRequest, request: Request) -> Response:
    """Answers each question about the context at the same place."""
    _check_name(name, request)
    tensors = {tensor.name: _texts(tensor) for tensor in body.inputs}
    if tensors.keys() != {"question", "context"} or len(tensors["question"]) != len(tensors["context"]):
        raise Problem("invalid_request", "inputs: expected the tensors question and context, of the same shape")
    given = {key: value for key, value in (body.parameters or {}).items() if key != "binary_data_output"}
    try:
        options = Options.model_validate(given)
    except ValidationError as error:
        raise problem_of_validation(error.errors(include_input=False)) from error
    found = await service_of(request).answer(tensors["question"], tensors["context"], options.to_config())
    asked = OUTPUTS if body.outputs is None else [str(output.get("name")) for output in body.outputs]
    if set(asked) - OUTPUTS.keys():
        raise Problem("invalid_request", f"outputs: expected some of {', '.join(OUTPUTS)}")
    outputs = [
        {
            "name": one,
            "datatype": OUTPUTS[one],
            "shape": [len(found)],
            "data": [_value(answer, one) for answer in found],
        }
        for one in asked
    ]
    identity = {} if body.id is None else {"id": body.id}
    return JSON({"model_name": name, "model_version": "1", **identity, "outputs": outputs})


def _check_name(name: str, request: Request) -> None:
    if name != service_of(request).name:
        raise Problem("not_found", "There is no such model here. /v1/model tells the name of the one that is.")


def _texts(tensor: Tensor) -> list[str]:
    flat = [text for row in tensor.data for text in ([row] if isinstance(row, str) else row)]
    size = tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) == 2 else 1)
    if tensor.datatype != "BYTES" or size != len(flat) or tensor.shape[1:] not in ([], [1]):
        raise Problem("invalid_request", "inputs: expected BYTES of shape [N] or [N, 1] with N texts as JSON strings")
    return flat


def _value(answer: Answer, name: str) -> str | float | int:
    value: str | float | int | None = getattr(answer, name)
    return -1 if value is None else value
