"""Heads that vote for a place in the passage, written into a trained starter, and the loss that teaches them to point.

A GPT-2 that reads the passage first cannot know there what will be asked. What it can do when asked: find the words of
the question in the passage, gather where they stand, and look there for an answer of the right kind. Three heads are
meant to do that, one behind the other:

- `match`: from a question's word to the same word in the passage, as one of the
  look-up heads of `circuits.py` does already; it writes *where* that is, as sines and cosines of the position;
- `gather`: from any token to the words just before it; it writes the mean of what they found. Words that were found
  nowhere have found everywhere: their sines and cosines cancel, and their votes do not count;
- `point`: its query is that mean, its keys are positions; so it looks where most words were found.

Written so they are a beginning, no more (`NOTES.md` has the figures); `pointing_loss` then tells the last of them where
the answer is, and training makes of them what it likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from training.starter.circuits import POSITION_GAIN


@dataclass(frozen=True)
class Chain:
    """Layer and head of the three heads, and of the look-up head whose queries and keys `match` takes over."""

    look_up: tuple[int, int]
    match: tuple[int, int]
    gather: tuple[int, int]
    point: tuple[int, int]


CHAINS = (
    Chain(look_up=(1, 0), match=(1, 5), gather=(2, 5), point=(3, 5)),
    Chain(look_up=(2, 0), match=(2, 4), gather=(4, 4), point=(5, 4)),
)
WRITTEN_SHARE = 0.5
"""Norm of what a written head adds, over that of the stream it adds to."""
POINT_SPREAD = 3.0
"""Standard deviation of a `point` head's attention logits over a passage."""
VOTE_WIDTH = 8.0
"""Tokens within which votes count as votes for the same place."""
GATHER_BACK = 8.0
"""How many tokens back `gather` looks."""
RIDGE = 1e-2


@torch.no_grad()
def write_voting_heads(model: GPT2LMHeadModel, batch: dict[str, torch.Tensor]) -> None:
    """Overwrites the heads of `CHAINS`.

    What a head has to read (a position, what another head wrote) is somewhere in the stream after some training; where,
    is found by linear regression on a batch.

    Args:
        model: Of the starter's shape, with look-up heads that find the same word again.
        batch: Of `training.data.Collator`, packed.
    """
    head_size = model.config.n_embd // model.config.n_head
    frequencies = torch.logspace(math.log10(0.05), math.log10(3.1), head_size // 2)
    angles = batch["position_ids"][..., None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [B, T, D]
    weights = (1.0 / (1.0 + (VOTE_WIDTH * frequencies) ** 2)).repeat(2)
    for chain in CHAINS:
        layer, head = chain.match
        position = _readout(_stream(model, layer, batch), waves)
        look_up = [_rows(model, *chain.look_up, projection).clone() for projection in (0, 1)]
        _write(model, layer, head, query=(look_up[0], None), key=(look_up[1], None), value=position)
        found = _write_output(model, layer, head, batch)

        layer, head = chain.gather
        stream = _stream(model, layer, batch)
        position = _readout(stream, waves)
        turn = _turned_back(frequencies)
        query = (POSITION_GAIN * position[0] @ turn, POSITION_GAIN * position[1] @ turn)
        key = (POSITION_GAIN * position[0], POSITION_GAIN * position[1])
        _write(model, layer, head, query=query, key=key, value=_readout(stream, found))
        gathered = _write_output(model, layer, head, batch)

        layer, head = chain.point
        stream = _stream(model, layer, batch)
        position, votes = _readout(stream, waves), _readout(stream, gathered)
        query = (votes[0] * weights, votes[1] * weights)
        logits = (stream @ query[0] + query[1]) @ (stream @ position[0] + position[1]).transpose(1, 2)
        seen = batch["attention_mask"][:, 0] & (batch["labels"][:, :, None] >= 0)  # from answers
        scale = POINT_SPREAD * math.sqrt(head_size) / logits[seen].std()
        _write(model, layer, head, query=(query[0] * scale, query[1] * scale), key=position, value=None)
        _rows(model, layer, head, 2).copy_(_rows(model, layer, 0, 2))  # it copies what it finds, as its neighbour does
        attention = model.transformer.h[layer].attn.c_proj.weight
        attention[head * head_size : (head + 1) * head_size] = attention[:head_size]


def _stream(model: GPT2LMHeadModel, layer: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a layer's attention reads, [B, T, E]."""
    return _caught(model, model.transformer.h[layer].attn.c_attn, batch)


def _caught(model: GPT2LMHeadModel, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A module's input when the model computes a batch."""
    caught: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, __: caught.append(inputs[0]))
    model(**batch)
    hook.remove()
    return caught[0]


def _readout(stream: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [E, D] and the bias [D] that come nearest to computing `wanted` [B, T, D] from a stream [B, T, E]."""
    inputs, targets = stream.flatten(0, 1), wanted.flatten(0, 1)
    means = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - means[0], targets - means[1]
    ridge = RIDGE * len(inputs) * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets)
    return weights, means[1] - means[0] @ weights


def _turned_back(frequencies: torch.Tensor) -> torch.Tensor:
    """Turns waves of a position into those of one `GATHER_BACK` tokens earlier, high frequencies left out, [D, D]."""
    used = (frequencies < 1.0 / VOTE_WIDTH * 3).float()
    sine, cosine = (torch.diag(wave(GATHER_BACK * frequencies) * used) for wave in (torch.sin, torch.cos))
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])


def _write_output(model: GPT2LMHeadModel, layer: int, head: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Lets a head write into random directions, and returns what it found, [B, T, D]."""
    width, head_size = model.config.n_embd, model.config.n_embd // model.config.n_head
    block, rows = model.transformer.h[layer], slice(head * head_size, (head + 1) * head_size)
    found = _caught(model, block.attn.c_proj, batch)[..., rows]
    output = torch.linalg.qr(torch.randn(width, head_size))[0].T
    norm = _caught(model, block, batch).norm(dim=-1).mean() / (found @ output).norm(dim=-1).mean()
    block.attn.c_proj.weight[rows] = WRITTEN_SHARE * norm * output
    return found


def pointing_loss(
    projections: dict[int, torch.Tensor], looks: Sequence[tuple[int, int, int, int, int]], head_size: int
) -> torch.Tensor:
    """How far the `point` heads are from the answers.

    Args:
        projections: Of each layer with such a head, what its `c_attn` computes: [B, T, 3E].
        looks: (row, last token of the prompt, tokens of the passage, first token of the answer, behind its last).
        head_size: D.

    Returns:
        The sum over the heads of the mean of -log(attention to the answer, among the passage), a scalar.
    """
    row, place, passage, first, last = torch.tensor(looks).T
    columns = torch.arange(int(passage.max()))
    inside = columns < passage[:, None]
    answer = (columns >= first[:, None]) & (columns < last[:, None])
    loss = torch.zeros(())
    for chain in CHAINS:
        layer, head = chain.point
        width = projections[layer].shape[-1] // 3
        start = head * head_size
        queries = projections[layer][row, place, start : start + head_size].float()
        keys = projections[layer][:, : len(columns), width + start : width + start + head_size].float()
        logits = torch.einsum("nd,ntd->nt", queries, keys[row]) / math.sqrt(head_size)
        logits = logits.masked_fill(~inside, -1e9)
        loss = loss + (logits.logsumexp(1) - logits.masked_fill(~answer, -1e9).logsumexp(1)).mean()
    return loss


class Projections:
    """Keeps what `c_attn` computes in the layers of `point` heads, for `pointing_loss`."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.last: dict[int, torch.Tensor] = {}
        for chain in CHAINS:
            layer = chain.point[0]
            model.transformer.h[layer].attn.c_attn.register_forward_hook(self._keep(layer))

    def _keep(self, layer: int) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.last[layer] = output

        return hook


def _rows(model: GPT2LMHeadModel, layer: int, head: int, projection: int) -> torch.Tensor:
    """A view on a head's queries (0), keys (1) or values (2) in `c_attn`, [E, D]."""
    head_size = model.config.n_embd // model.config.n_head
    start = projection * model.config.n_embd + head * head_size
    return model.transformer.h[layer].attn.c_attn.weight[:, start : start + head_size]


def _write(
    model: GPT2LMHeadModel,
    layer: int,
    head: int,
    *,
    query: tuple[torch.Tensor, torch.Tensor | None],
    key: tuple[torch.Tensor, torch.Tensor | None],
    value: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> None:
    """Writes weights and biases of a head's projections; None leaves values as they are, and is a bias of 0."""
    head_size = model.config.n_embd // model.config.n_head
    for projection, written in enumerate((query, key, value)):
        if written is not None:
            _rows(model, layer, head, projection).copy_(written[0])
            start = projection * model.config.n_embd + head * head_size
            bias = model.transformer.h[layer].attn.c_attn.bias[start : start + head_size]
            bias.copy_(torch.zeros(head_size) if written[1] is None else written[1])
