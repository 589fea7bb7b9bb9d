"""The weights that pretraining of `starter` begins with: rough circuits that copy and look up, written by hand.

What copies from a context is a pair of heads: one that looks at the previous token, and one that finds where the
current token stood before (Olsson et al., 2022, "In-context Learning and Induction Heads"). To answer, a model also has
to find the place whose words are most like the question's, and to tell whose fact stands there. From random weights
these circuits take longer to appear than two cores have time for; the idea to begin with structured attention is
Trockman and Kolter's (2023, "Mimetic Initialization of Self-Attention Layers"). Training makes of them what it likes.
"""

from __future__ import annotations

import math

import torch
from transformers import GPT2LMHeadModel

GUIDED_HEADS = {"subject": (1, 4), "answer": (3, 4)}
"""Layer and head that learn, while warming up, to look at the subject told or asked about, and at the answer."""
POSITION_GAIN, PREVIOUS_MATCH_GAIN, WINDOW_MATCH_GAIN, SUBJECT_MATCH_GAIN, COPY_GAIN = 1.5, 2.0, 1.0, 1.5, 4.0
"""Scales of the written heads: of their queries and keys, and of what the looking-up ones write."""


@torch.no_grad()
def write_look_up_heads(model: GPT2LMHeadModel) -> None:
    """Initialises the weights so that the model roughly copies and looks up before it has learned anything.

    The first `head_size` dimensions hold sines and cosines of the position, the others the token. In layer 0 three
    heads look back by position and write what they find into frames (random orthonormal directions) of their own: the
    token before, and two blurred windows over the last words. In every later layer two heads look for the place whose
    previous token is this token, two for a place whose window is like this one, and each writes the token it finds
    back into the directions it was read from. All other projections into the residual stream start at zero, so that
    nothing drowns the copies.
    """
    config = model.config
    width, head_size = config.n_embd, config.n_embd // config.n_head
    frequencies = torch.logspace(math.log10(0.05), math.log10(3.1), head_size // 2)  # no position looks like another
    angles = torch.arange(config.n_positions)[:, None] * frequencies
    amplitude = config.initializer_range * math.sqrt(2)
    scale = config.initializer_range  # from layer norm's unit variance back to the embeddings' scale
    positions, tokens = model.transformer.wpe.weight, model.transformer.wte.weight
    positions *= 0.1
    positions[:, :head_size] = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)
    tokens[:, :head_size] = 0.0
    for block in model.transformer.h:
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()

    def frame() -> torch.Tensor:
        directions = torch.linalg.qr(torch.randn(width - head_size, head_size))[0]
        return torch.cat([torch.zeros(head_size, head_size), directions])  # [E, D]

    def write(
        layer: int, head: int, queries_keys_values: tuple[torch.Tensor | None, ...], written: torch.Tensor
    ) -> None:
        attention = model.transformer.h[layer].attn
        for projection, matrix in enumerate(queries_keys_values):  # c_attn is [E, 3E]: the three side by side
            start = projection * width + head * head_size
            if matrix is not None:  # else it stays random
                attention.c_attn.weight[:, start : start + head_size] = matrix
        attention.c_proj.weight[head * head_size : (head + 1) * head_size] = written.T

    def looking_back(by: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        used = torch.zeros(head_size // 2)
        used[first:last] = 1.0
        sine, cosine = torch.diag((by * frequencies).sin() * used), torch.diag((by * frequencies).cos() * used)
        query, key = torch.zeros(width, head_size), torch.zeros(width, head_size)
        query[:head_size] = torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
        key[:head_size] = torch.eye(head_size)
        return POSITION_GAIN * query, POSITION_GAIN * key

    token, previous, near, wide = frame(), frame(), frame(), frame()
    # All frequencies together make a sharp peak, a few low ones a wide window.
    for head, (by, first, last, found) in enumerate(
        ((1, 0, head_size // 2, previous), (4, 4, 10, near), (9, 2, 7, wide))
    ):
        write(0, head, (*looking_back(by, first, last), token), 2 * scale * found)
    for layer in range(1, config.n_layer):
        for head, (query, key) in enumerate(((token, previous), (token, previous), (near, near), (wide, wide))):
            copied = frame()
            gain = PREVIOUS_MATCH_GAIN if head < 2 else WINDOW_MATCH_GAIN
            write(layer, head, (gain * query, gain * key, copied), COPY_GAIN * scale * copied)
    # The guided heads: where the first looks is left to training, and what it finds there the second compares.
    subject, copied, half = frame(), frame(), head_size // 2
    name = torch.cat([previous[:, :half], near[:, :half]], dim=1)
    layer, head = GUIDED_HEADS["subject"]
    write(layer, head, (None, None, name), COPY_GAIN * scale * subject)
    layer, head = GUIDED_HEADS["answer"]
    write(layer, head, (SUBJECT_MATCH_GAIN * subject, SUBJECT_MATCH_GAIN * subject, copied), COPY_GAIN * scale * copied)
