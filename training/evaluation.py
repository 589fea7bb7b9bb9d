"""Exact match and F1 of a PyTorch model: every question answered by batched greedy generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, GPT2LMHeadModel, GPT2TokenizerFast

from qa_onnx.data.example import Example
from qa_onnx.text.windows import Window, WindowSettings, encode_windows
from training.padding import MAX_BATCH_TOKENS, pad_left, plan_batches


def windows_of(
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
    settings: WindowSettings | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Answers questions with transformers' `generate`, in batches of like length, padded on the left.

    Args:
        model: In any mode; it is left in the mode it came in.
        tokenizer: The model's, from `training.model.load_tokenizer`.
        examples: Their gold answers are not looked at.
        max_new_tokens: The most tokens of an answer, its end-of-text included.
        batch_size: The most questions in a batch.
        max_length: The most tokens of a prompt with its answer; None is what the model has positions for.
        settings: Size and overlap of windows; None is `WindowSettings()`.
        progress: Show a progress bar where standard error is a terminal.

    Returns:
        The answer's text by question id, as `qa_onnx` would give it.

    Raises:
        PromptTooLongError: A question leaves no room for a part of its passage.
    """
    positions = max_length or model.config.n_positions
    windows = windows_of(examples, tokenizer, max_positions=positions, max_new_tokens=max_new_tokens, settings=settings)
    asked = [(example, window) for example, parts in zip(examples, windows, strict=True) for window in parts]
    has_windows = {example.id: len(parts) > 1 for example, parts in zip(examples, windows, strict=True)}
    prompts = [window.prompt for _, window in asked]
    lengths = [len(prompt) for prompt in prompts]
    # A row that can run out of positions runs alone, so that it stops where it would stop in any other batch.
    crowded = [index for index, length in enumerate(lengths) if length + max_new_tokens > positions]
    roomy = [index for index, length in enumerate(lengths) if length + max_new_tokens <= positions]
    batches = plan_batches([lengths[index] for index in roomy], max_rows=batch_size, max_tokens=MAX_BATCH_TOKENS)
    best: dict[str, tuple[bool, float, str]] = {}
    was_training = model.training
    model.eval()
    with tqdm(total=len(prompts), desc="answering", disable=None if progress else True) as bar:
        for batch in [[roomy[place] for place in places] for places in batches] + [[index] for index in crowded]:
            input_ids, attention_mask = pad_left([prompts[index].ids for index in batch], tokenizer.eos_token_id)
            is_scored = any(has_windows[asked[index][0].id] for index in batch)
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=min(max_new_tokens, positions - input_ids.shape[1] + 1),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                output_logits=is_scored,
                return_dict_in_generate=True,
            )
            with torch.inference_mode():
                generated = model.generate(
                    torch.from_numpy(input_ids).to(model.device),
                    attention_mask=torch.from_numpy(attention_mask).to(model.device),
                    generation_config=config,
                )
            new_ids = generated.sequences[:, input_ids.shape[1] :]
            logprobs = torch.zeros(new_ids.shape)
            if is_scored:
                scores = torch.stack(generated.logits, dim=1).float().log_softmax(dim=-1)
                logprobs = scores.gather(2, new_ids[..., None])[..., 0].cpu()
            for index, row, row_logprobs in zip(batch, new_ids.tolist(), logprobs, strict=True):
                end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
                text = tokenizer.backend_tokenizer.decode(row[:end]).strip()
                # Of several windows' answers the most probable one, as `qa_onnx` chooses.
                found = (text != "", float(row_logprobs[: end + 1].sum()), text)
                name = asked[index][0].id
                best[name] = max(best.get(name, found), found)
            bar.update(len(batch))
    model.train(was_training)
    return {name: text for name, (_, _, text) in best.items()}
