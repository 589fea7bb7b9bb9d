"""The weights that pretraining of `starter` begins with: rough circuits that look an answer up, written by hand.

A GPT-2 that reads the passage first cannot know there what will be asked. What it can do when it is asked: find the
words of the question in the passage, gather where they stand, and look there for an answer of the right kind.

    layer 0   previous, near, before   what stands one, some three and two tokens before
              side                     whether this token is in the passage or after its "Question:"
    layer 1   match (two heads)        from a token to the same word in the passage; writes where that is
              repeat                   to the token behind an earlier one of the same kind, as it may come next again
    layer 2   gather                   the mean of what the question's words found: their votes for a place
              repeat (two heads)
    layer 3   point                    looks where the votes are, among the passage, not at the question's own words,
    4, 5      point                    and copies what stands there

A word that stands nowhere in the passage has found everywhere: its waves cancel, and it has no vote. So it is with
words that stand all over. From random weights such circuits take longer to appear than two cores have time for (copying
ones are Olsson et al.'s, 2022, "In-context Learning and Induction Heads"); to begin with structured attention is
Trockman and Kolter's idea (2023, "Mimetic Initialization of Self-Attention Layers"). Training makes of them what it
likes, but for one thing: a few dimensions of the residual stream stay apart (`writable`), or else positions could not
be read in later layers.
"""

from __future__ import annotations

import math

import torch
from transformers import GPT2Config, GPT2TokenizerFast

from qa_onnx.text.prompt import PASSAGE_TEMPLATE, QUESTION_LABEL
from training.model import GPT2LMHeadModel

WIDTH, HEADS, LAYERS, INNER, POSITIONS = 256, 4, 6, 512, 1024
HEAD_SIZE = WIDTH // HEADS
FREQUENCIES = torch.logspace(math.log10(0.006), math.log10(3.1), 20)
"""Of position waves, in radians a token: no position of 1,024 looks like another."""
VOTE_FREQUENCIES = 12
"""The lowest of them are what is gathered: a place, some seven tokens wide."""
WAVES, VOTE_WAVES = 2 * len(FREQUENCIES), 2 * VOTE_FREQUENCIES
LOW = [*range(VOTE_FREQUENCIES), *range(len(FREQUENCIES), len(FREQUENCIES) + VOTE_FREQUENCIES)]

# The residual stream, E = 256 dimensions:
PLACE = slice(0, WAVES)
"""Sines, then cosines, of where a token stands; nothing writes there."""
SIDE = WAVES
"""Positive behind `Question:`, negative before."""
FOUND = slice(SIDE + 1, SIDE + 1 + VOTE_WAVES)
"""Waves of where the same word stands."""
VOTES = slice(FOUND.stop, FOUND.stop + VOTE_WAVES)
"""Their mean over the question."""
RARITY = VOTES.stop
"""Of the token, by its embedding."""
FREE = slice(RARITY + 1, WIDTH)
"""The token's vector, and what all heads and MLPs write."""
FREE_WIDTH = WIDTH - FREE.start

SCALE = 0.07
"""Of the stream's components before the first layer, which layer norm makes 1."""
MATCH_LOGIT, REPEAT_LOGIT, SIDE_LOGIT = 14.0, 10.0, 8.0
"""Attention logits where a word is the same, where a token is repeated, and between the two sides."""
RARITY_LOGIT = 1.5
POINT_GAIN, OWN_WORDS_GAIN = 2.0, 0.4
NARROW, WIDE = 0.15, 0.03
"""Frequencies between which `point` takes votes at full weight: narrower and wider neighbourhoods count less."""
POINT_HEADS = ((3, 0), (4, 0), (5, 0))
"""Layer and head; training tells them where to look (`pretrain.pointing_loss`)."""


class Head:
    """Views on the weights of one head: what is written to them is written to the model."""

    def __init__(self, model: GPT2LMHeadModel, layer: int, head: int) -> None:
        """Takes the place of the head."""
        attention = model.transformer.h[layer].attn
        rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        weights, biases = attention.c_attn.weight.split(WIDTH, dim=1), attention.c_attn.bias.split(WIDTH)
        self.query, self.key, self.value = (weight[:, rows] for weight in weights)  # each [E, D]
        self.query_bias = biases[0][rows]  # [D]
        self.output = attention.c_proj.weight[rows]  # [D, E]

    def clear(self) -> None:
        """Forgets the random weights."""
        for weight in (self.query, self.key, self.value, self.output):
            weight.zero_()


@torch.no_grad()
def first_model(tokenizer: GPT2TokenizerFast, vectors: torch.Tensor, rarity: torch.Tensor) -> GPT2LMHeadModel:
    """Builds the starter's architecture with the circuits in its weights.

    Args:
        tokenizer: The vocabulary.
        vectors: Of the tokens, float32 [V, `FREE_WIDTH`], of unit variance (`vectors.token_vectors`).
        rarity: Of the tokens, float32 [V] (`vectors.token_rarity`).
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=LAYERS,
        n_inner=INNER,
        n_positions=POSITIONS,
        initializer_range=0.06,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    tokens, positions = model.transformer.wte.weight.zero_(), model.transformer.wpe.weight.zero_()
    tokens[:, FREE], tokens[:, RARITY] = SCALE * vectors, SCALE * rarity
    positions[:, PLACE] = SCALE * math.sqrt(2) * _waves(torch.arange(POSITIONS))
    for block in model.transformer.h:  # nothing else is written to the stream yet
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()

    previous, near, before = (Head(model, 0, number) for number in range(3))
    _look_back(previous, 1, slice(6, None), logit=22.0)
    _look_back(near, 3, slice(9, 15), logit=6.0)
    _look_back(before, 2, slice(6, None), logit=22.0)
    read, written = _directions(HEAD_SIZE), _directions(HEAD_SIZE)
    _copy(previous, read, written, gain=1.0)
    _copy(near, _directions(HEAD_SIZE), _directions(HEAD_SIZE), gain=1.5)
    _copy(before, _directions(HEAD_SIZE), gain=0.8)
    _tell_sides(Head(model, 0, 3), tokenizer, vectors)
    for number, gain in enumerate((1.2, 0.8)):
        _match(Head(model, 1, number), gain)
    for layer, number in ((1, 2), (2, 1), (2, 2)):
        head = Head(model, layer, number)
        gain = math.sqrt(REPEAT_LOGIT * math.sqrt(HEAD_SIZE) / HEAD_SIZE)
        head.query.zero_()[FREE] = gain * read
        head.key.zero_()[FREE] = gain * written
        _copy(head, _directions(HEAD_SIZE), gain=1.0)
    asked = _gather(Head(model, 2, 0))
    for place in POINT_HEADS:
        _point(Head(model, *place), asked)
    return model


def writable(model: GPT2LMHeadModel) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What training may change of the weights that write to the stream: 1 there, 0 where `first_model`'s zeros stay.

    Returns:
        A factor for each such parameter, to multiply it with after each step.
    """
    allowed = torch.zeros(WIDTH)
    allowed[FREE] = 1.0
    factors: dict[torch.nn.Parameter, torch.Tensor] = {}
    for layer, block in enumerate(model.transformer.h):
        attention = allowed.repeat(WIDTH, 1)
        if layer == 0:
            attention[3 * HEAD_SIZE :, SIDE] = 1.0
        elif layer <= 3:
            attention[:, FOUND if layer == 1 else VOTES] = 1.0
        factors[block.attn.c_proj.weight] = attention
        for parameter in (block.attn.c_proj.bias, block.mlp.c_proj.bias, block.mlp.c_proj.weight):
            factors[parameter] = allowed
    embedded = allowed.clone()
    embedded[RARITY] = 1.0
    factors[model.transformer.wte.weight] = embedded
    return factors


def _waves(positions: torch.Tensor) -> torch.Tensor:
    angles = positions[..., None] * FREQUENCIES
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _directions(count: int) -> torch.Tensor:
    """Random orthonormal directions of the free dimensions, [FREE_WIDTH, count]."""
    return torch.linalg.qr(torch.randn(FREE_WIDTH, count))[0]


def _look_back(head: Head, by: int, frequencies: slice, *, logit: float) -> None:
    """Looks at the token so far back: a query turns its own waves to those of that place."""
    used = torch.zeros(len(FREQUENCIES))
    used[frequencies] = 1.0
    gain = math.sqrt(logit * math.sqrt(HEAD_SIZE) / (2.0 * used.sum()))
    sine, cosine = torch.diag((by * FREQUENCIES).sin() * used), torch.diag((by * FREQUENCIES).cos() * used)
    turned = torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
    head.query.zero_()[PLACE, :WAVES] = gain * turned
    head.key.zero_()[PLACE, :WAVES] = gain * torch.eye(WAVES)


def _copy(head: Head, read: torch.Tensor, written: torch.Tensor | None = None, *, gain: float) -> None:
    """Writes what is found; back into the directions that it was read from, it makes that token likelier to be next."""
    head.value.zero_()[FREE] = read
    head.output.zero_()[:, FREE] = gain * SCALE * (read if written is None else written).T


def _tell_sides(head: Head, tokenizer: GPT2TokenizerFast, vectors: torch.Tensor) -> None:
    """Looks at the prompt's `Question` where there is one before, at its `Context` else, and writes which."""
    bpe = tokenizer.backend_tokenizer
    question = vectors[bpe.encode(QUESTION_LABEL).ids[1]] / math.sqrt(FREE_WIDTH)  # behind the line feed
    context = vectors[bpe.encode(PASSAGE_TEMPLATE).ids[0]] / math.sqrt(FREE_WIDTH)
    context = context - question * (context @ question)
    head.clear()
    head.query_bias[0] = 1.0
    scale = math.sqrt(HEAD_SIZE / FREE_WIDTH)
    head.key[FREE, 0] = scale * (16.0 * question + 9.0 * context)
    head.value[FREE, 0] = (question - context) / math.sqrt(FREE_WIDTH)
    head.output[0, SIDE] = 2.0 * SCALE


def _only(head: Head, sign: float) -> None:
    """Looks at the question (+1) or at the passage (-1) only; takes the head's last dimension."""
    head.query_bias[-1] = 1.0
    head.key[SIDE, -1] = sign * SIDE_LOGIT * math.sqrt(HEAD_SIZE)


def _match(head: Head, gain: float) -> None:
    """Looks at the passage's tokens that are most like this one, and writes where they stand."""
    head.clear()
    compared = HEAD_SIZE - 2
    directions = math.sqrt(MATCH_LOGIT * math.sqrt(HEAD_SIZE) / compared) * _directions(compared)
    head.query[FREE, :compared] = directions
    head.key[FREE, :compared] = directions
    _only(head, -1.0)
    rest = HEAD_SIZE - VOTE_WAVES
    head.value[LOW, :VOTE_WAVES] = torch.eye(VOTE_WAVES)
    head.output[:VOTE_WAVES, FOUND] = gain * SCALE * torch.eye(VOTE_WAVES)
    head.value[FREE, VOTE_WAVES:] = _directions(rest)
    head.output[VOTE_WAVES:, FREE] = 0.3 * SCALE * _directions(rest).T


def _gather(head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the mean of what the question's tokens found, the rare ones most, and of what they are.

    Returns:
        The directions that what they are was read from and written to, each [FREE_WIDTH, n].
    """
    head.clear()
    _only(head, 1.0)
    head.key[RARITY, -1] = RARITY_LOGIT * math.sqrt(HEAD_SIZE)
    read, written = (_directions(HEAD_SIZE - VOTE_WAVES) for _ in range(2))
    head.value[FOUND, :VOTE_WAVES] = torch.eye(VOTE_WAVES)
    head.output[:VOTE_WAVES, VOTES] = 2.5 * SCALE * torch.eye(VOTE_WAVES)
    head.value[FREE, VOTE_WAVES:] = read
    head.output[VOTE_WAVES:, FREE] = SCALE * written.T
    return read, written


def _point(head: Head, asked: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Looks where the votes are, away from the question's own words, and copies; the rest of it stays random."""
    frequencies = FREQUENCIES[:VOTE_FREQUENCIES]
    weights = (frequencies / WIDE).clamp(max=1.0) / (1.0 + (frequencies / NARROW) ** 2)
    votes = POINT_GAIN * torch.diag(weights.repeat(2).sqrt())
    rest = slice(VOTE_WAVES, HEAD_SIZE - 1)
    own = slice(VOTE_WAVES, VOTE_WAVES + (HEAD_SIZE - 1 - VOTE_WAVES) // 2)
    for weight, sign, directions, waves in ((head.query, -1.0, asked[1], VOTES), (head.key, 1.0, asked[0], LOW)):
        weight.zero_()[FREE, rest] = 0.06 * torch.randn(FREE_WIDTH, rest.stop - rest.start)
        weight[FREE, own] += sign * OWN_WORDS_GAIN * directions[:, : own.stop - own.start]
        weight[waves, :VOTE_WAVES] = votes
    _only(head, -1.0)
    _copy(head, _directions(HEAD_SIZE), gain=1.0)
