"""How answers are computed: prefill, decode step, greedy decoding, over batches of prompts of any lengths.

Rows are padded on the left, so that the last column holds every row's newest token. Positions count real tokens only
and padding is masked, so a row's tokens do not depend on its neighbours:

    input_ids        . . . C o n t e x t      attention_mask   0 0 0 1 1 1 1      position_ids   0 0 0 0 1 2 3
                     C o n t e x t : . .                       1 1 1 1 1 1 1                     0 1 2 3 4 5 6
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qa_onnx.kv_cache import KVCache
from qa_onnx.session import Session

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The new tokens of one prompt, without the end-of-text, and why they ended: `stop` there or `length` used up."""

    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch between two steps.

    Attributes:
        attention_mask: int64 [B, P], 1 where the cache holds a real token, 0 where it holds padding.
        kv_cache: Keys and values of those P columns.
        logits: float32 [B, V], what the model says of each row's next token.
    """

    attention_mask: np.ndarray
    kv_cache: KVCache
    logits: np.ndarray

    def select_rows(self, rows: np.ndarray) -> DecodeState:
        """The same batch with only the given rows (int64 [N]), in the given order."""
        return DecodeState(
            attention_mask=self.attention_mask[rows],
            kv_cache=self.kv_cache.select_rows(rows),
            logits=self.logits[rows],
        )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token lists to one width: input_ids and attention_mask, each int64 [B, T]."""
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    attention_mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = row
        attention_mask[index, width - len(row) :] = 1
    return input_ids, attention_mask


def position_ids_of(attention_mask: np.ndarray) -> np.ndarray:
    """Position of each column among its row's real tokens, int64 [B, P]; padding before them gets position 0."""
    positions: np.ndarray = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
    return positions


class Engine:
    """Decodes batches of token lists with one session. Keeps no state between calls; safe from several threads."""

    def __init__(self, session: Session, *, heads: int, head_size: int, eos_token_id: int, max_positions: int) -> None:
        """Takes the graph and the few facts of the model that decoding needs (see `Manifest`)."""
        self._session = session
        self._heads = heads
        self._head_size = head_size
        self.eos_token_id = eos_token_id
        self._max_positions = max_positions

    def prefill(self, prompts: Sequence[Sequence[int]]) -> DecodeState:
        """Reads whole prompts, each a list of at least one token, at most `max_positions`."""
        input_ids, attention_mask = pad_left(prompts, self.eos_token_id)
        empty = KVCache.empty(self._session, batch_size=len(prompts), heads=self._heads, head_size=self._head_size)
        return self._forward(input_ids, attention_mask, empty)

    def decode_step(self, state: DecodeState, token_ids: np.ndarray) -> DecodeState:
        """Appends one token to each row (int64 [B]) and computes the logits of the next."""
        ones = np.ones((len(token_ids), 1), np.int64)
        attention_mask = np.concatenate([state.attention_mask, ones], axis=1)
        return self._forward(token_ids[:, None], attention_mask, state.kv_cache)

    def greedy_decode(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        """Generates the most likely token again and again; a row that ends leaves the batch.

        Args:
            prompts: Token lists, each of 1 to `max_positions` tokens.
            max_new_tokens: The most tokens a row may get; the model's positions may end it earlier.

        Returns:
            One generation a prompt, in the order given.
        """
        limits = [min(max_new_tokens, self._max_positions - len(prompt) + 1) for prompt in prompts]
        new_ids: list[list[int]] = [[] for _ in prompts]
        finished: dict[int, FinishReason] = {}
        prompt_of_row = np.arange(len(prompts))
        state = self.prefill(prompts)
        while True:
            tokens = state.logits.argmax(axis=-1)
            for index, token in zip(prompt_of_row.tolist(), tokens.tolist(), strict=True):
                if token == self.eos_token_id:
                    finished[index] = "stop"
                    continue
                new_ids[index].append(token)
                if len(new_ids[index]) == limits[index]:
                    finished[index] = "length"
            live = np.flatnonzero([index not in finished for index in prompt_of_row.tolist()])
            if not live.size:
                break
            if live.size < len(prompt_of_row):
                state, tokens, prompt_of_row = state.select_rows(live), tokens[live], prompt_of_row[live]
            state = self.decode_step(state, tokens)
        return [
            Generation(token_ids=token_ids, finish_reason=finished[index]) for index, token_ids in enumerate(new_ids)
        ]

    def _forward(self, input_ids: np.ndarray, attention_mask: np.ndarray, past: KVCache) -> DecodeState:
        new_tokens = input_ids.shape[1]
        outputs = self._session.run(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids_of(attention_mask)[:, -new_tokens:],
                **past.values,
            }
        )
        return DecodeState(
            attention_mask=attention_mask, kv_cache=past.updated(outputs), logits=outputs["logits"].numpy()
        )
