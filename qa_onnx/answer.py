"""What a question gets back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from qa_onnx.engine.sequence import FinishReason


@dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """An answer to one question.

    Attributes:
        text: The answer, without white space around it; empty where there is none.
        score: Probability from 0 to 1 that the answer is right: that of the model, calibrated where the bundle was
            (`Manifest.scores`). Where the text is empty, `no_answer_probability`.
        logprob: Logarithm of the probability under the model of the answer's tokens and of its end. Of a context of
            several windows, of the text in any of them (`qa_onnx.text.windows.answer_logprobs`).
        mean_logprob: Mean over its tokens and its end, in its window, which does not fall with the answer's length.
        start: The character of the context at which `text` occurs first (as whole words, if it does); None where it
            does not occur.
        end: The character behind it, so that `context[start:end] == text`; None where `start` is.
        no_answer_probability: Probability under the model that the context holds no answer. Of a context of several
            windows, of all of it (`qa_onnx.text.windows.weigh_windows`).
        finish_reason: `stop` where the model ended the answer, `length` where `max_new_tokens` or its positions did,
            `no_answer` where there is none.
        prompt_tokens: Tokens of the prompt; of all windows' prompts together.
        token_ids: The answer's tokens, without the end-of-text.
        window: The window that the answer is from, counted from 0.
        windows: How many windows the context was read in: 1 unless it is longer than a window.
        alternatives: With `GenerationConfig.num_answers` above 1 the other answers, the most probable first.
    """

    text: str
    score: float
    logprob: float
    mean_logprob: float
    start: int | None
    end: int | None
    no_answer_probability: float
    finish_reason: FinishReason
    prompt_tokens: int
    token_ids: tuple[int, ...]
    window: int = 0
    windows: int = 1
    alternatives: tuple[Answer, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer, without the end-of-text."""
        return len(self.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """All of it by name, `new_tokens` included, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"new_tokens": self.new_tokens}
        return values | {"alternatives": [answer.to_dict() for answer in self.alternatives]}

    def __repr__(self) -> str:
        where = "" if self.start is None else f", start={self.start}, end={self.end}"
        more = f", {len(self.alternatives)} alternatives" if self.alternatives else ""
        return f"Answer({self.text!r}, score={self.score:.3f}{where}, {self.finish_reason}{more})"
