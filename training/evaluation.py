"""Exact match and F1 of a PyTorch model: every question answered by batched greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, GPT2LMHeadModel, GPT2TokenizerFast, LogitsProcessor, LogitsProcessorList

from qa_onnx.data.example import Example
from qa_onnx.request import CERTAIN
from qa_onnx.text.windows import Window, WindowSettings, answer_logprobs, encode_windows, weigh_windows
from training.padding import MAX_BATCH_TOKENS, pad_left, plan_batches


def encode_examples(
    examples: Sequence[Example],
    tokenizer: GPT2TokenizerFast,
    *,
    max_positions: int,
    max_new_tokens: int,
    settings: WindowSettings | None = None,
) -> list[list[Window]]:
    """The windows that each example is answered in; raises `PromptTooLongError` where a question leaves no room."""
    return encode_windows(
        tokenizer.backend_tokenizer,
        [example.question for example in examples],
        [example.context for example in examples],
        max_positions=max_positions,
        max_new_tokens=max_new_tokens,
        settings=settings,
    )


def generate_answers(
    model: GPT2LMHeadModel,
    tokenizer: GPT2TokenizerFast,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    max_length: int | None = None,
    windows: WindowSettings | None = None,
    no_answer_threshold: float | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Answers questions with transformers' `generate`, in batches of like length, padded on the left.

    Args:
        model: In any mode; it is left in the mode it came in.
        tokenizer: The model's, from `training.model.load_tokenizer`.
        examples: Their gold answers are not looked at.
        max_new_tokens: Maximum number of tokens of an answer.
        batch_size: Maximum number of questions in a batch.
        max_length: Maximum number of tokens of a prompt with its answer; None is what the model has positions for.
        windows: How long contexts are read; None is `WindowSettings()`.
        no_answer_threshold: As of `qa_onnx.GenerationConfig`; None leaves an answer empty where that is most probable.
        progress: Show a progress bar where standard error is a terminal.

    Returns:
        The answer's text by question id, as `qa_onnx` would give it.

    Raises:
        PromptTooLongError: A question leaves no room for a part of its passage.
    """
    positions = max_length or model.config.n_positions
    parted = encode_examples(
        examples, tokenizer, max_positions=positions, max_new_tokens=max_new_tokens, settings=windows
    )
    asked = [
        _AskedWindow(example.id, window, is_one_of_several=len(parts) > 1)
        for example, parts in zip(examples, parted, strict=True)
        for window in parts
    ]
    batches = _plan(asked, positions - max_new_tokens, batch_size)
    found: dict[str, list[_WindowAnswer]] = {example.id: [] for example in examples}
    was_training = model.training
    model.eval()
    with tqdm(total=len(asked), desc="answering", disable=None if progress else True) as bar:
        for batch in batches:
            answers = _answer_batch(
                model,
                tokenizer,
                batch,
                max_new_tokens=max_new_tokens,
                positions=positions,
                threshold=no_answer_threshold,
            )
            for one, answer in zip(batch, answers, strict=True):
                found[one.question_id].append(answer)
            bar.update(len(batch))
    model.train(was_training)
    return {name: _choose_text(answers, no_answer_threshold) for name, answers in found.items()}


@dataclass(frozen=True)
class _AskedWindow:
    """A question about a window of its passage, and whether the passage has more of them."""

    question_id: str
    window: Window
    is_one_of_several: bool


@dataclass(frozen=True)
class _WindowAnswer:
    """The answer in a window, its log-probability, and the probability that the window has no answer."""

    window: Window
    text: str
    logprob: float
    no_answer: float


def _plan(asked: Sequence[_AskedWindow], max_prompt: int, batch_size: int) -> list[list[_AskedWindow]]:
    """Batches of like length; a prompt that can run out of positions is alone, to stop where it would in any batch."""
    roomy = [one for one in asked if len(one.window.prompt) <= max_prompt]
    crowded = [one for one in asked if len(one.window.prompt) > max_prompt]
    lengths = [len(one.window.prompt) for one in roomy]
    batches = plan_batches(lengths, max_rows=batch_size, max_tokens=MAX_BATCH_TOKENS)
    return [[roomy[index] for index in batch] for batch in batches] + [[one] for one in crowded]


def _answer_batch(
    model: GPT2LMHeadModel,
    tokenizer: GPT2TokenizerFast,
    batch: Sequence[_AskedWindow],
    *,
    max_new_tokens: int,
    positions: int,
    threshold: float | None,
) -> list[_WindowAnswer]:
    eos = tokenizer.eos_token_id
    input_ids, attention_mask = pad_left([one.window.prompt.ids for one in batch], eos)
    several = torch.tensor([one.is_one_of_several for one in batch], device=model.device)
    is_weighed = bool(several.any())
    decision = NoAnswerDecision(threshold, several, eos)
    config = GenerationConfig(
        do_sample=False,
        # One more where answers are weighed: an answer that is cut counts the probability of its end.
        max_new_tokens=min(max_new_tokens + is_weighed, positions - input_ids.shape[1] + 1),
        eos_token_id=eos,
        pad_token_id=eos,
        output_logits=is_weighed,
        return_dict_in_generate=True,
    )
    with torch.inference_mode():
        generated = model.generate(
            torch.from_numpy(input_ids).to(model.device),
            attention_mask=torch.from_numpy(attention_mask).to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([decision]),
        )
    new_ids = generated.sequences[:, input_ids.shape[1] :].clone()
    logprobs = torch.zeros(new_ids.shape)
    if is_weighed:
        new_ids[:, max_new_tokens:] = eos
        scores = torch.stack(generated.logits, dim=1).float().log_softmax(dim=-1)
        logprobs = scores.gather(2, new_ids[..., None])[..., 0].cpu()
    answers = []
    for one, row, row_logprobs, no_answer in zip(
        batch, new_ids.tolist(), logprobs, decision.probabilities.tolist(), strict=True
    ):
        end = row.index(eos) if eos in row else len(row)
        text = tokenizer.backend_tokenizer.decode(row[:end]).strip()
        answers.append(_WindowAnswer(one.window, text, float(row_logprobs[: end + 1].sum()), no_answer))
    return answers


def _choose_text(answers: Sequence[_WindowAnswer], threshold: float | None) -> str:
    """The text that `qa_onnx` chooses of the texts of all windows."""
    if len(answers) == 1:
        return answers[0].text
    weights, probability = weigh_windows([one.window for one in answers], [one.no_answer for one in answers])
    if threshold is not None and probability > threshold:
        return ""
    logprobs = answer_logprobs((one.text, weight + one.logprob) for one, weight in zip(answers, weights, strict=True))
    return max(logprobs, key=lambda text: (text != "", logprobs[text]))


class NoAnswerDecision(LogitsProcessor):
    """At the first new token, takes the end-of-text where its probability is above a threshold, and only there.

    Attributes:
        probabilities: float32 [B], of the end-of-text in place of a first token; empty before that.
    """

    def __init__(self, threshold: float | None, several: torch.Tensor, eos_token_id: int) -> None:
        """Takes the threshold, which of the batch are windows of several (bool [B]), and the end-of-text."""
        self._threshold = threshold
        self._several = several
        self._eos = eos_token_id
        self.probabilities = torch.zeros(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the tokens so far, int64 [B, T], and logits, float32 [B, V]; returns the logits to choose from."""
        if len(self.probabilities):
            return scores
        self.probabilities = scores.float().softmax(dim=-1)[:, self._eos]
        if self._threshold is None:
            return scores
        limits = torch.where(self._several, max(self._threshold, CERTAIN), self._threshold)
        decided = scores.clone()
        decided[:, self._eos] = torch.where(self.probabilities > limits, torch.inf, -torch.inf)
        return decided
