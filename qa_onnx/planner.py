"""From requests to work: which prompts are answered together."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qa_onnx.prompt import Prompt

MAX_GROUP_ROWS = 16
"""The most questions of one group; the questions on a passage that has more are spread over several groups."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Questions on one passage.

    Attributes:
        passage_ids: The passage's tokens; empty where the whole prompt is in `question_ids`.
        prompts: Which prompts they are, by their numbers.
    """

    passage_ids: tuple[int, ...]
    prompts: list[int]


def plan_groups(prompts: Mapping[int, Prompt], *, max_rows: int) -> deque[Group]:
    """Groups prompts by passage.

    Groups of about as many questions (1, 2, up to 4, up to 8...) follow each other, longer passages first, and groups
    of one passage are neighbours: what is read together is of like size, and little of attention's grid is padding.

    Args:
        prompts: The prompts by their numbers.
        max_rows: The most rows of a batch, and so of a group.
    """
    prompts_of: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in prompts.items():
        prompts_of.setdefault(tuple(prompt.passage_ids), []).append(number)
    most = min(MAX_GROUP_ROWS, max_rows)
    rows_of = {passage: -(-len(members) // -(-len(members) // most)) for passage, members in prompts_of.items()}
    return deque(
        Group(passage_ids=passage, prompts=prompts_of[passage][first : first + rows_of[passage]])
        for passage in sorted(prompts_of, key=lambda passage: (-(rows_of[passage] - 1).bit_length(), -len(passage)))
        for first in range(0, len(prompts_of[passage]), rows_of[passage])
    )


def take_batch(groups: deque[Group], prompts: Mapping[int, Prompt], *, max_rows: int, max_tokens: int) -> list[Group]:
    """Takes the next groups off the front of the queue, as many as go together but at least one prompt.

    Of a first group of too many rows a part is taken, and the rest stays at the front.

    Args:
        groups: From `plan_groups`.
        prompts: The prompts that they were made from.
        max_rows: The most prompts to take.
        max_tokens: The most tokens to take, counted as the cache holds them: each passage as wide as the longest, and
            each row as wide as the longest question.
    """
    first = groups[0]
    widest = max(len(prompts[index].question_ids) for index in first.prompts)
    fitting = min(max_rows, max((max_tokens - len(first.passage_ids)) // widest, 1))
    if len(first.prompts) > fitting:
        groups[0] = replace(first, prompts=first.prompts[fitting:])
        return [replace(first, prompts=first.prompts[:fitting])]
    batch: list[Group] = []
    rows = passage_width = row_width = 0
    while groups:
        group = groups[0]
        rows += len(group.prompts)
        passage_width = max(passage_width, len(group.passage_ids))
        row_width = max(row_width, *(len(prompts[index].question_ids) for index in group.prompts))
        tokens = (len(batch) + 1) * passage_width + rows * row_width
        if batch and (rows > max_rows or tokens > max_tokens):
            break
        batch.append(groups.popleft())
    return batch
