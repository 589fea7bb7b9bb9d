"""How logits are computed: prefill of passages, prefill of questions, decode steps.

All questions on a passage read its keys and values from one place; a row (a question) keeps only its own. New tokens
are packed, so that there is no padding but in the grid of attention (`export/decoder.py` draws both):

    passage of group 0   C o n t e x t : i t        own tokens of row 0   . . Q u e s t i o n A n s w
                                                                row 1   Q u e s t i o n , t o o A
    passage of group 1   C o n t e x t . . .        own tokens of row 0   . . . . . . W h y ? N o

Questions end in the same column, and the answer grows behind it. Padding is masked. Passages start in the first
column, for a product adds up its columns in blocks from there, and questions are aligned. So a row's numbers do not
depend on its neighbours, to the last bit, unless its question is longer than such a block (256 columns).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qa_onnx.grid import GROWTH, Grid, Text
from qa_onnx.kv_cache import (
    PASSAGE_PREFIX,
    PAST_PREFIX,
    PRESENT_PREFIX,
    CacheLayout,
    CachePool,
    KVCache,
    PassageCache,
    aligned,
)
from qa_onnx.planner import Group
from qa_onnx.prompt import Prompt
from qa_onnx.session import Limits, Session

LOWEST = np.finfo(np.float32).min
"""Added to the scores of keys that a token does not attend to. Not infinite: a row of nothing else would give NaN."""


@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch between two steps: M unfinished rows, each in a place of the grid.

    Attributes:
        grid: What was read so far. A step writes into it.
        passages, own: The caches of the grid, on the session's device.
        prompts: int64 [M], the number of the prompt that each row answers.
        groups: int64 [M], the row's group in the grid.
        rows: int64 [M], the row within the group.
        positions: int64 [M], the position of the row's next token.
        logits: float32 [M, V], what the model says of that token.
    """

    grid: Grid
    passages: KVCache
    own: KVCache
    prompts: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    logits: np.ndarray

    def select(self, chosen: np.ndarray) -> DecodeState:
        """The batch with only the given unfinished rows (int64 [N], indices into M). The grid is not copied."""
        return replace(
            self,
            prompts=self.prompts[chosen],
            groups=self.groups[chosen],
            rows=self.rows[chosen],
            positions=self.positions[chosen],
            logits=self.logits[chosen],
        )


class Engine:
    """Computes with one session. Keeps nothing between calls but passages; safe from several threads."""

    def __init__(
        self,
        session: Session,
        *,
        layout: CacheLayout,
        eos_token_id: int,
        max_positions: int,
        passage_cache: PassageCache,
    ) -> None:
        """Takes the graph and the few facts of the model that decoding needs (see `Manifest`)."""
        self._session = session
        self._layout = layout
        self._pool = CachePool(layout)
        self.eos_token_id = eos_token_id
        self.max_positions = max_positions
        self._passage_cache = passage_cache

    @property
    def limits(self) -> Limits:
        """How much the provider works on at a time."""
        return self._session.limits

    def prefill(
        self,
        prompts: Mapping[int, Prompt],
        groups: Sequence[Group],
        *,
        carried: DecodeState | None = None,
        known: Mapping[tuple[int, ...], np.ndarray] | None = None,
    ) -> DecodeState:
        """Reads the prompts of some groups: each passage once, then all questions.

        Args:
            prompts: The prompts that the groups refer to, by their numbers.
            groups: From `plan_groups`.
            carried: A batch to go on with; its rows follow the new ones.
            known: Keys and values of passages that need not be read, as `PassageCache.get` gives them.
        """
        nothing = np.zeros(self._layout.shape(groups=1, rows=1, columns=0), self._layout.dtype)
        known = {(): nothing[:, 0, :, 0], **(known or {})}
        for group in groups:
            cached = self._passage_cache.get(group.passage_ids)
            if cached is not None:
                known[group.passage_ids] = cached
        # Passages to be read come first, each once, so that their caches are one piece of memory.
        first_with = {group.passage_ids: group for group in reversed(groups)}
        to_read = [
            group for group in groups if group.passage_ids not in known and first_with[group.passage_ids] is group
        ]
        to_read.sort(key=lambda group: -len(group.passage_ids))  # like lengths together
        groups = to_read + [group for group in groups if not any(group is other for other in to_read)]
        grid = self._make_grid(prompts, groups, carried)
        self._read_passages(grid, len(to_read))
        for index, group in enumerate(groups[: len(to_read)]):
            known[group.passage_ids] = grid.passage(index)
        for index in range(len(to_read), len(groups)):
            grid.set_passage(index, known[groups[index].passage_ids])
        state = self._read_questions(grid, prompts, groups)
        if carried is None:
            return state
        return replace(
            state,
            prompts=np.concatenate([state.prompts, carried.prompts]),
            groups=np.concatenate([state.groups, len(groups) + np.unique(carried.groups, return_inverse=True)[1]]),
            rows=np.concatenate([state.rows, carried.rows]),
            positions=np.concatenate([state.positions, carried.positions]),
            logits=np.concatenate([state.logits, carried.logits]),
        )

    def decode_step(self, state: DecodeState, token_ids: np.ndarray) -> DecodeState:
        """Appends one token to each row (int64 [M]) and computes the logits of the next. Writes into the grid."""
        grid, own = state.grid, state.own
        if grid.write_index.max() == grid.own.shape[4]:
            own.to_host()
            grid.grow()
            own = KVCache(self._session, grid.own)
        rows = grid.own.shape[3]
        grid.own_mask[state.groups, state.rows, grid.write_index[state.groups]] = True
        slot_index = np.zeros((*grid.own_mask.shape[:2], 1), np.int64)
        slot_index[state.groups, state.rows, 0] = np.arange(len(token_ids))
        passage_mask = np.broadcast_to(grid.passage_mask[:, None], (*grid.own_mask.shape[:2], grid.passages.shape[4]))
        logits = self._run(
            state.passages,
            own,
            input_ids=token_ids,
            position_ids=state.positions,
            slot_index=slot_index,
            token_index=state.groups * rows + state.rows,
            output_index=np.arange(len(token_ids)),
            write_index=grid.write_index,
            visible=np.concatenate([passage_mask, grid.own_mask], axis=-1)[:, :, None],
        )
        grid.write_index += 1
        return replace(state, own=own, positions=state.positions + 1, logits=logits)

    def _make_grid(self, prompts: Mapping[int, Prompt], groups: Sequence[Group], carried: DecodeState | None) -> Grid:
        """Makes the grid of some groups, and behind them the groups of a carried batch, with all that they hold."""
        passage_ids = [group.passage_ids for group in groups]
        rows = max(len(group.prompts) for group in groups)
        width = aligned(max(len(prompts[index].question_ids) for group in groups for index in group.prompts))
        columns, survivors = width + GROWTH, []
        if carried is not None:
            carried.own.to_host()
            survivors = np.unique(carried.groups).tolist()
            passage_ids += [carried.grid.passage_ids[group] for group in survivors]
            rows = max(rows, int(carried.rows.max()) + 1)
            columns = max(columns, carried.grid.own.shape[4])
        passage_width = aligned(max(map(len, passage_ids)))
        grid = Grid.empty(self._pool, passage_ids, passage_width=passage_width, rows=rows, columns=columns)
        if carried is not None:
            carried_rows = int(carried.rows.max()) + 1
            for index, group in enumerate(survivors, len(groups)):
                grid.copy_group(index, carried.grid, group, rows=carried_rows)
        return grid

    def _read_passages(self, grid: Grid, count: int) -> None:
        """Reads the first `count` passages of a grid into their places."""
        texts = [
            [Text(group=group, row=0, token_ids=ids, position=0)] for group, ids in enumerate(grid.passage_ids[:count])
        ]
        for first, last in self._pieces(texts):
            groups = slice(first, last)
            cache = KVCache(self._session, grid.passages[:, groups])
            nothing = KVCache(self._session, grid.passages[:, groups, ..., :0, :])
            self._read(
                nothing,
                cache,
                np.zeros((last - first, 0), bool),
                grid.passage_mask[groups, None],
                [text for group in texts[groups] for text in group],
                end=None,
                with_logits=False,
            )
            cache.to_host()

    def _read_questions(self, grid: Grid, prompts: Mapping[int, Prompt], groups: Sequence[Group]) -> DecodeState:
        """Reads the questions of the first groups of a grid, whose passages were read."""
        texts = [
            [
                Text(
                    group=index,
                    row=row,
                    token_ids=prompts[prompt].question_ids,
                    position=len(prompts[prompt].passage_ids),
                )
                for row, prompt in enumerate(group.prompts)
            ]
            for index, group in enumerate(groups)
        ]
        end = aligned(max(len(text.token_ids) for group in texts for text in group))
        for text in (text for group in texts for text in group):
            grid.own_mask[text.group, text.row, end - len(text.token_ids) : end] = True
        grid.write_index[: len(groups)] = end
        logits = []
        for first, last in self._pieces(texts):
            piece = slice(first, last)
            own = KVCache(self._session, grid.own[:, piece])
            logits.append(
                self._read(
                    KVCache(self._session, grid.passages[:, piece]),
                    own,
                    grid.passage_mask[piece],
                    grid.own_mask[piece],
                    [text for group in texts[piece] for text in group],
                    end=end,
                    with_logits=True,
                )
            )
            own.to_host()
        flat = [text for group in texts for text in group]
        return DecodeState(
            grid=grid,
            passages=KVCache(self._session, grid.passages),
            own=KVCache(self._session, grid.own),
            prompts=np.array([prompt for group in groups for prompt in group.prompts]),
            groups=np.array([text.group for text in flat]),
            rows=np.array([text.row for text in flat]),
            positions=np.array([text.position + len(text.token_ids) for text in flat]),
            logits=np.concatenate(logits),
        )

    def _pieces(self, texts: Sequence[Sequence[Text]]) -> list[tuple[int, int]]:
        """Cuts the texts of groups into pieces of about `prefill_tokens` tokens: first and last group of each."""
        pieces: list[tuple[int, int]] = []
        first = tokens = 0
        for group, members in enumerate(texts):
            tokens += sum(len(text.token_ids) for text in members)
            if tokens >= self._session.limits.prefill_tokens or group == len(texts) - 1:
                pieces.append((first, group + 1))
                first, tokens = group + 1, 0
        return pieces

    def _read(
        self,
        passages: KVCache,
        own: KVCache,
        passage_mask: np.ndarray,
        own_mask: np.ndarray,
        texts: Sequence[Text],
        *,
        end: int | None,
        with_logits: bool,
    ) -> np.ndarray:
        """Reads texts that end in column `end` of `own`, or that start in its first column where that is None.

        Returns:
            The logits after each text, float32 [M, V]; no rows where they are not wanted.
        """
        groups, rows, columns = own_mask.shape
        first_group = texts[0].group
        lengths = np.array([len(text.token_ids) for text in texts])
        width = aligned(int(lengths.max()))
        starts = np.cumsum(lengths) - lengths
        first_column = 0 if end is None else end - width
        slot_index = np.zeros((groups, rows, width), np.int64)
        slots = np.arange(slot_index.size).reshape(slot_index.shape)
        token_index = np.zeros(lengths.sum(), np.int64)
        for text, start, length in zip(texts, starts.tolist(), lengths.tolist(), strict=True):
            columns_of = slice(length) if end is None else slice(width - length, width)
            place = (text.group - first_group, text.row, columns_of)
            slot_index[place] = np.arange(start, start + length)
            token_index[start : start + length] = slots[place]
        is_past = np.arange(columns) <= first_column + np.arange(width)[:, None]
        passage_columns = passage_mask.shape[-1]
        visible = np.empty((groups, rows, width, passage_columns + columns), bool)
        visible[..., :passage_columns] = passage_mask[:, None, None]
        visible[..., passage_columns:] = own_mask[:, :, None] & is_past
        return self._run(
            passages,
            own,
            input_ids=np.concatenate([np.asarray(text.token_ids, np.int64) for text in texts]),
            position_ids=np.concatenate([text.position + np.arange(len(text.token_ids)) for text in texts]),
            slot_index=slot_index,
            token_index=token_index,
            output_index=starts + lengths - 1 if with_logits else np.zeros(0, np.int64),
            write_index=np.full(groups, first_column),
            visible=visible,
        )

    def _run(self, passages: KVCache, own: KVCache, *, visible: np.ndarray, **indices: np.ndarray) -> np.ndarray:
        """Runs the graph; `visible` (bool [G, R, T, P + C]) says which keys each new token attends to."""
        outputs = self._session.run(
            {
                **indices,
                "attention_bias": np.where(visible, np.float32(0), LOWEST)[:, None],
                **passages.named(PASSAGE_PREFIX),
                **own.named(PAST_PREFIX),
            },
            in_place=own.named(PRESENT_PREFIX),
        )
        logits: np.ndarray = outputs["logits"].numpy()
        return logits

    def keep_passages(self, grid: Grid, queue: deque[Group]) -> dict[tuple[int, ...], np.ndarray]:
        """Keeps passages for later calls, unless the queue's would push them out before; returns what the queue needs.

        Groups of one passage follow each other, so only the queue's first can be on a passage of this batch.
        """
        to_come = sum(aligned(len(ids)) for ids in {group.passage_ids for group in queue})
        has_room = to_come * self._layout.bytes_per_token < self._passage_cache.max_bytes
        needed = {}
        for group, ids in enumerate(grid.passage_ids):
            if has_room:
                self._passage_cache.put(ids, grid.passage(group))
            if queue and queue[0].passage_ids == ids:
                needed[ids] = grid.passage(group).copy()
        return needed
