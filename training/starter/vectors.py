"""The starter's first token embeddings: how tokens are spelled, what is next to them, how rare they are.

A model of this size has no time to find out that "founder" and "founded" are alike, or that years are of one kind.
Spelling: the sum of random vectors of a token's character n-grams (Bojanowski et al., 2017, "Enriching Word Vectors
with Subword Information"), its stem and itself. Neighbours: the singular vectors of the positive pointwise mutual
information of tokens and their neighbours (Levy and Goldberg, 2014, "Neural Word Embedding as Implicit Matrix
Factorization").
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from qa_onnx.data.json_text import read_json
from training.model import GPT2LMHeadModel
from training.starter.circuits import FREE, FREE_WIDTH

NEIGHBOUR_DIMENSIONS = 72
NEIGHBOUR_SHARE = 0.4
"""Of a token vector's squared length; spelling has the rest."""
WINDOW = 3
"""Tokens to either side that count as neighbours, the nearer the more."""
COMMON_WORDS, WORD_DIMENSIONS, WORD_SHARE = 40_000, 80, 0.5
"""Of `add_word_vectors`: words that directions are found in, dimensions kept, length over that of a token's vector."""
NOT_ASKED_FOR = ("\n", "Answer", ":", "?", "Question", "Context", ".", ",")
"""Tokens of the prompt and of every sentence: as if they were the most frequent of all."""


def token_vectors(bpe: Tokenizer, texts: Sequence[str], width: int) -> torch.Tensor:
    """A vector for each token, float32 [V, width], with components of about unit variance.

    Args:
        bpe: The tokenizer.
        texts: Where neighbours are counted.
        width: More than `NEIGHBOUR_DIMENSIONS`.
    """
    spelling = _spelling(bpe, width - NEIGHBOUR_DIMENSIONS)
    neighbours = _neighbours([encoding.ids for encoding in bpe.encode_batch(texts)], bpe.get_vocab_size())
    parts = [neighbours * NEIGHBOUR_SHARE**0.5, spelling * (1.0 - NEIGHBOUR_SHARE) ** 0.5]
    return torch.cat(parts, dim=1) * width**0.5


@torch.no_grad()
def add_word_vectors(model: GPT2LMHeadModel, bpe: Tokenizer, path: Path) -> None:
    """Adds pretrained word vectors to the embeddings of the tokens that are whole words.

    GloVe (Pennington et al., 2014): words are alike that are used alike. Without their mean and two largest directions
    (Mu and Viswanath, 2018, "All-but-the-Top"), in random orthonormal directions of the stream's free dimensions, in
    which the model compares words.

    Args:
        model: Of `circuits.first_model`'s shape; trained already or not.
        bpe: Its tokenizer.
        path: JSON with `vectors`: for each word, the most frequent first, 100 numbers and what follows them.
    """
    table = read_json(path)["vectors"]
    words = np.array([values[:100] for values in table.values()], np.float32)
    words /= np.linalg.norm(words, axis=1, keepdims=True).clip(1e-6)
    mean = words[:COMMON_WORDS].mean(0)
    basis = np.linalg.svd(words[:COMMON_WORDS] - mean, full_matrices=False)[2][2 : 2 + WORD_DIMENSIONS]
    place_of = {word: place for place, word in enumerate(table)}
    found = torch.zeros(bpe.get_vocab_size(), WORD_DIMENSIONS)
    for token in range(len(found)):
        text = bpe.decode([token])
        word = text.strip().lower()
        if word in place_of and (text.startswith(" ") or not word.isalpha()):
            found[token] = torch.tensor((words[place_of[word]] - mean) @ basis.T)
    directions = torch.linalg.qr(torch.randn(FREE_WIDTH, WORD_DIMENSIONS))[0].T
    embeddings = model.transformer.wte.weight[:, FREE]
    embeddings += WORD_SHARE * embeddings.norm(dim=1).mean() * (_unit(found) @ directions)


def token_rarity(bpe: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """How rare each token is in the texts, float32 [V]: 0 for the mean of all text, from -3 to 2."""
    counts = np.bincount(np.concatenate([encoding.ids for encoding in bpe.encode_batch(texts)]))
    smoothed = np.concatenate([counts, np.zeros(bpe.get_vocab_size() - len(counts))]) + 1.0
    rarity = -np.log(smoothed)
    rarity = np.clip((rarity - np.average(rarity, weights=counts)) / 1.5, -2.0, 2.0)
    for text in NOT_ASKED_FOR:
        rarity[bpe.encode(text).ids[0]] = -3.0
    return torch.tensor(rarity, dtype=torch.float32)


def _spelling(bpe: Tokenizer, width: int) -> torch.Tensor:
    """Unit vectors by spelling, [V, width]; upper and lower case are alike."""

    def drawn(name: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(width)

    vectors = np.zeros((bpe.get_vocab_size(), width))
    for token in range(len(vectors)):
        text = bpe.decode([token]).strip().lower()
        vectors[token] = 0.6 * drawn(f"token {token}") + drawn(f"word {text}")
        if len(text) >= 4:
            closed = f"<{text}>"
            grams = {closed[start : start + size] for size in (3, 4, 5) for start in range(len(closed) - size + 1)}
            vectors[token] += 1.2 / len(grams) ** 0.5 * sum(drawn(f"gram {gram}") for gram in sorted(grams))
            vectors[token] += 0.8 * drawn(f"stem {text[:5]}")
    return _unit(torch.tensor(vectors, dtype=torch.float32))


def _neighbours(texts: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """Unit vectors by what stands before and behind, [V, NEIGHBOUR_DIMENSIONS]."""
    pairs: defaultdict[tuple[int, int], float] = defaultdict(float)
    for distance in range(1, WINDOW + 1):
        for ids in texts:
            for pair in zip(ids, ids[distance:], strict=False):
                pairs[pair] += 1.0 / distance
    behind = torch.zeros(vocab_size, vocab_size)
    rows, columns = torch.tensor(list(pairs)).T
    behind[rows, columns] = torch.tensor(list(pairs.values()), dtype=torch.float32)
    counts = torch.cat([behind, behind.T], dim=1)
    context_counts = counts.sum(0) ** 0.75  # smoothed, so that rare neighbors do not outweigh all others
    expected = counts.sum(1, keepdim=True) * (context_counts / context_counts.sum())
    information = (counts / expected.clamp(min=1e-9)).clamp(min=1e-9).log().clamp(min=0.0)
    left, values, _ = torch.svd_lowrank(information, q=NEIGHBOUR_DIMENSIONS + 8, niter=4)
    vectors = (left * values.sqrt())[:, :NEIGHBOUR_DIMENSIONS]
    return _unit(vectors - vectors.mean(0))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-6)
