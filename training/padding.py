"""Padded batches, as PyTorch's `generate` wants them. The runtime packs its tokens and needs neither."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_BATCH_TOKENS = 8192
"""Prompt tokens in a batch, padding included: bounds the memory of a prefill whatever the batch size."""


def plan_batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> list[list[int]]:
    """Groups prompts of like length, longest first, so that little of a batch is padding.

    Args:
        lengths: Tokens of each prompt.
        max_rows: Maximum number of prompts in a batch.
        max_tokens: Maximum number of tokens in a batch, padding included; a single longer prompt is a batch of its own.

    Returns:
        Batches of indices into `lengths`; every index is in one batch.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token lists to one width: input_ids and attention_mask, each int64 [B, T]."""
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    attention_mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = row
        attention_mask[index, width - len(row) :] = 1
    return input_ids, attention_mask
