"""The bodies of requests and responses. What they say is `/openapi.json`, too."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from qa_onnx.config import (
    DEFAULT_MAX_NEW_TOKENS,
    MAX_NUM_ANSWERS,
    MAX_WHOLE_NUMBER,
    MIN_WINDOW_TOKENS,
    GenerationConfig,
)
from qa_onnx.serve.config import MAX_ITEMS

Count = Annotated[int, Field(ge=0, lt=MAX_WHOLE_NUMBER)]
Text = Annotated[str, Field(min_length=1)]


@lru_cache(maxsize=256)
def _make_config(*values: Any) -> GenerationConfig:
    """Checks options once: most requests have those of others."""
    return GenerationConfig(**dict(zip(Options.model_fields, values, strict=True)))


class Strict(BaseModel):
    """A request's object: no field more, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Options(Strict):
    """How to answer: the fields of `qa_onnx.GenerationConfig`."""

    max_new_tokens: int = Field(
        default=DEFAULT_MAX_NEW_TOKENS, ge=1, lt=MAX_WHOLE_NUMBER, description="Maximum number of tokens of an answer."
    )
    extractive: bool = Field(default=False, description="Only answers that are a span of the context.")
    num_answers: int = Field(
        default=1, ge=1, le=MAX_NUM_ANSWERS, description="Number of different answers, the most probable first."
    )
    no_repeat_ngram_size: Count = Field(
        default=0, description="No n-gram of this size occurs twice in prompt and answer; 0 is no limit."
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="0 takes the most probable token; from 0.001 on, tokens are drawn from logits divided by it.",
    )
    top_k: Count = Field(default=0, description="Draw from this number of most probable tokens; 0 is all of them.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Draw from the most probable tokens that add up to this.",
    )
    seed: Count | None = Field(default=None, description="Seed of the draws; null draws differently each time.")
    no_answer_threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="No answer where the probability of none is above it; null takes the bundle's.",
    )
    window: Annotated[int, Field(ge=MIN_WINDOW_TOKENS, lt=MAX_WHOLE_NUMBER)] | None = Field(
        default=None, description="Maximum number of tokens of a context read at once; null takes the bundle's."
    )
    stride: Count | None = Field(
        default=None, description="Tokens that neighboring windows share; null takes the bundle's."
    )
    ignore_eos: bool = Field(default=False, description="Continue after the end-of-text token. For benchmarks.")

    def to_config(self) -> GenerationConfig:
        """The options of the library.

        Raises:
            InvalidInputError: Two of them contradict each other.
        """
        return _make_config(*(getattr(self, name) for name in Options.model_fields))


class Asked(Strict):
    """What has to be given: a base of its own, whose fields come first in the description of the API."""

    question: Text = Field(description="The question.")
    context: Text = Field(description="The text that has the answer. Longer ones are read in windows.")


class AnswerRequest(Options, Asked):
    """One question about one context, and how to answer it."""

    stream: bool = Field(
        default=False, description="Answer with server-sent events: `text` as it grows, then `answer`."
    )


class Item(Strict):
    """A question of several."""

    question: Text = Field(description="The question.")
    context: Text | None = Field(default=None, description="Its own context; null is the shared one.")


class AnswersRequest(Strict):
    """Several questions: all of them are answered, or none."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS), FailFast()] = Field(
        description="The questions."
    )
    context: Text | None = Field(default=None, description="The context of every item that has none of its own.")
    options: Options = Field(default=Options(), description="How to answer all of them.")


class Answer(BaseModel):
    """An answer. Offsets count Unicode code points of the context, as Python does; JavaScript's strings do not."""

    text: str = Field(description="The answer; empty where there is none.")
    score: float = Field(description="Probability from 0 to 1 that it is right.")
    logprob: float = Field(description="Logarithm of its probability under the model.")
    mean_logprob: float = Field(description="Mean of it over the answer's tokens.")
    start: int | None = Field(
        description="The Unicode code point of the context at which the text is; null where it is not in the context."
    )
    end: int | None = Field(description="The code point behind it; null where `start` is.")
    no_answer_probability: float = Field(description="Probability that the context holds no answer.")
    finish_reason: Literal["stop", "length", "no_answer"] = Field(description="Why the answer ended.")
    prompt_tokens: int = Field(description="Tokens of the prompt, of all windows together.")
    new_tokens: int = Field(description="Tokens of the answer.")
    token_ids: list[int] = Field(description="The answer's tokens.")
    window: int = Field(description="The window that it is from, counted from 0.")
    windows: int = Field(description="How many windows the context was read in.")
    alternatives: list[Answer] = Field(description="With `num_answers` above 1 the other answers.")


class AnswerResponse(BaseModel):
    """The answer to one question."""

    request_id: str
    answer: Answer


class AnswersResponse(BaseModel):
    """The answers to several questions, in their order."""

    request_id: str
    answers: list[Answer]


class ModelLimits(BaseModel):
    """What one request may ask for."""

    body_bytes: int
    question_characters: int
    context_characters: int
    items: int
    windows: int


class ModelResponse(BaseModel):
    """What answers, and what it takes."""

    name: str
    version: str = Field(description="Of qa_onnx.")
    precision: str
    provider: str
    kernels: str | None = Field(description="The instruction set of the kernels that compute; null is ONNX Runtime's.")
    calibrated: bool = Field(description="Whether scores were calibrated.")
    max_positions: int = Field(description="Tokens that the model reads at once.")
    limits: ModelLimits
    pdf: bool = Field(description="Whether the service reads PDF files.")


class Health(BaseModel):
    """That the service is there."""

    status: Literal["ok", "ready"]


class ProblemDetails(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="A stable name of the problem, for programs.")
    request_id: str
