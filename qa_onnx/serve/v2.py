"""The Open Inference Protocol (KServe v2) with JSON tensors, as `tritonclient.http` speaks it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from qa_onnx.serve.config import MAX_ITEMS
from qa_onnx.serve.problems import Problem, problem_of_validation
from qa_onnx.serve.routes import JSON, body_of, healthz, read_body, readyz, service_of
from qa_onnx.serve.schemas import Health, Options

router = APIRouter(prefix="/v2", tags=["compatible"])
OUTPUTS = {"text": "BYTES", "score": "FP64", "start": "INT64", "end": "INT64", "no_answer_probability": "FP64"}


class Tensor(BaseModel):
    """An input: `question` or `context`, of datatype BYTES and shape [N]. Members that are not here are not read."""

    model_config = ConfigDict(strict=True)
    name: str
    shape: list[int] = Field(max_length=1)
    datatype: str
    data: Annotated[list[str], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]


class InferRequest(BaseModel):
    """Questions and their contexts; `parameters` may have the fields of `GenerationConfig`."""

    model_config = ConfigDict(strict=True)
    id: str | None = None
    inputs: list[Tensor] = Field(max_length=2)
    parameters: dict[str, Any] | None = None


router.add_api_route("/health/live", healthz)
router.add_api_route("/health/ready", readyz)


@router.get("/models/{name}/ready")
async def model_ready(name: str, request: Request) -> Health:
    """Whether the model takes requests; 503 while the service drains."""
    _check_name(name, request)
    return await readyz(request)


@router.get("/models/{name}")
async def model_metadata(name: str, request: Request) -> dict[str, Any]:
    """Inputs and outputs of the model. `start` and `end` are Unicode code points, -1 where the text is not found."""
    _check_name(name, request)
    inputs = [{"name": one, "datatype": "BYTES", "shape": [-1]} for one in ("question", "context")]
    outputs = [{"name": one, "datatype": kind, "shape": [-1]} for one, kind in OUTPUTS.items()]
    return {"name": name, "versions": ["1"], "platform": "onnxruntime", "inputs": inputs, "outputs": outputs}


@router.post("/models/{name}/infer", openapi_extra=body_of(InferRequest))
async def infer(request: Request) -> Response:
    """Answers each question about the context at the same place: all of them, or none."""
    name = request.path_params["name"]
    _check_name(name, request)
    body = await read_body(InferRequest, request)
    tensors = {tensor.name: tensor.data for tensor in body.inputs}
    count = len(body.inputs[0].data) if body.inputs else 0
    if tensors.keys() != {"question", "context"} or any(
        (tensor.datatype, tensor.shape, len(tensor.data)) != ("BYTES", [count], count) for tensor in body.inputs
    ):
        raise Problem("invalid_request", "inputs: expected question and context, BYTES of one shape [N], with N texts")
    given = {key: value for key, value in (body.parameters or {}).items() if key != "binary_data_output"}
    try:
        config = Options.model_validate(given).to_config()
    except ValidationError as error:
        raise problem_of_validation(error) from error
    found = await service_of(request).answer(tensors["question"], tensors["context"], config)
    columns = {one: [-1 if (value := getattr(each, one)) is None else value for each in found] for one in OUTPUTS}
    outputs = [{"name": one, "datatype": OUTPUTS[one], "shape": [count], "data": columns[one]} for one in OUTPUTS]
    return JSON({"model_name": name, "model_version": "1", "id": body.id or "", "outputs": outputs})


def _check_name(name: str, request: Request) -> None:
    if name != service_of(request).name:
        raise Problem("not_found", "There is no such model here. /v1/model tells the name of the one that is.")
