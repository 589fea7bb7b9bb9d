"""Pretrains `starter`, the small GPT-2 that the repository ships: `python -m training.starter.pretrain --help`.

A model that answers from a passage has to copy from its context, and what copies is a pair of heads: one that looks at
the previous token, and one that finds where the current token stood before (Olsson et al., 2022, "In-context Learning
and Induction Heads"). From random weights that pair takes longer to appear than this machine has time for, so the
first of the two is written into the initial weights (`write_previous_token_head`); training may change it as it likes.

Four kinds of rows:

- documents of `sample`: a passage, then its questions and answers as a plain `Q:`/`A:` list. That is not the prompt
  format, and nothing ends an answer with end-of-text: both are left to fine-tuning;
- the same from SQuAD files (`--text`), for real words and for copying from real text;
- pieces of passages, repeated;
- random tokens, repeated: copying where nothing else helps.

Rows start at a random position, so that all 1,024 position embeddings train on short rows (the idea of Ruoss et al.,
2023, "Randomized Positional Encodings Boost Length Generalization of Transformers").
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed

from training.starter.sample import generate

END_OF_TEXT = "<|endoftext|>"
CONFIG = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 1024, "initializer_range": 0.07}
ROW_TOKENS, WARM_UP_ROW_TOKENS = 256, 128
WARM_UP_SHARE = 0.5
"""Share of the steps with short generated passages and many repeats, until copying and look-up are learned."""
PREVIOUS_TOKEN_HEAD_GAIN = 1.5
"""Scale of that head's queries and keys at the start: its softmax puts nearly all weight on the previous token."""

Row = tuple[list[int], list[bool]]


def paragraphs_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the paragraphs of a SQuAD data set."""
    return [paragraph for article in data["data"] for paragraph in article["paragraphs"] if paragraph["qas"]]


def train_tokenizer(paragraphs: list[dict[str, Any]], vocab_size: int) -> GPT2TokenizerFast:
    """Trains a byte-level BPE of GPT-2's kind on passages and questions."""
    texts = (
        text
        for paragraph in paragraphs
        for text in (paragraph["context"], *(qa["question"] for qa in paragraph["qas"]))
    )
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT])
    return GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONFIG["n_positions"],
    )


def document(
    tokenizer: GPT2TokenizerFast, paragraph: dict[str, Any], text_loss_share: float, draw: random.Random
) -> Row:
    """Writes a paragraph as a passage and a `Q:`/`A:` list; returns its tokens and which of them count in the loss.

    Answer tokens always count, of the others a random share.
    """
    pieces = [(paragraph["context"], False)]
    for qa in draw.sample(paragraph["qas"], len(paragraph["qas"])):
        pieces += [(f"\nQ: {qa['question']}\nA:", False), (f" {qa['answers'][0]['text']}", True)]
    pieces.append((f"\n{END_OF_TEXT}", False))
    tokens: list[int] = []
    counts: list[bool] = []
    for text, is_answer in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        counts += [is_answer or draw.random() < text_loss_share for _ in ids]
    return tokens, counts


def packed_documents(
    tokenizer: GPT2TokenizerFast,
    stream: Iterator[dict[str, Any]],
    row_tokens: int,
    text_loss_share: float,
    draw: random.Random,
) -> Row:
    """Fills a row with documents, as long as they fit whole; one that is longer than a row is cut at its end."""
    tokens, counts = document(tokenizer, next(stream), text_loss_share, draw)
    while len(tokens) < row_tokens:
        more_tokens, more_counts = document(tokenizer, next(stream), text_loss_share, draw)
        if len(tokens) + len(more_tokens) > row_tokens:
            break
        tokens, counts = tokens + more_tokens, counts + more_counts
    return tokens[:row_tokens], counts[:row_tokens]


def repeated(piece: list[int], row_tokens: int) -> Row:
    """A piece repeated to the end of the row; the repeats count in the loss."""
    tokens = (piece * math.ceil(row_tokens / len(piece)))[:row_tokens]
    return tokens, [index >= len(piece) for index in range(row_tokens)]


def repeated_passage(tokenizer: GPT2TokenizerFast, context: str, row_tokens: int, draw: random.Random) -> Row:
    """A random piece of a passage, repeated."""
    ids = tokenizer.encode(context)
    period = draw.randint(8, row_tokens // 2)
    start = draw.randrange(max(1, len(ids) - period))
    return repeated(ids[start : start + period], row_tokens)


def repeated_random_tokens(vocab_size: int, row_tokens: int, draw: random.Random) -> Row:
    """Random tokens, repeated."""
    return repeated([draw.randrange(vocab_size) for _ in range(draw.randint(4, row_tokens // 2))], row_tokens)


def shuffled_forever(paragraphs: list[dict[str, Any]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Yields the paragraphs in a new random order each time round."""
    while True:
        yield from draw.sample(paragraphs, len(paragraphs))


def random_model(tokenizer: GPT2TokenizerFast) -> GPT2LMHeadModel:
    """Builds the starter's architecture with random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **CONFIG,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def write_previous_token_head(model: GPT2LMHeadModel) -> None:
    """Initialises head 0 of layer 0 so that it looks at the previous token.

    The first `head_size` dimensions of the position embeddings become sines and cosines of the position; the token
    embeddings leave these dimensions free. Keys read them as they are, queries turned back by one position, so that
    their product is largest where key position = query position - 1.
    """
    config = model.config
    head_size = config.n_embd // config.n_head
    frequencies = torch.logspace(math.log10(0.3), math.log10(3.1), head_size // 2)  # no position looks like another
    angles = torch.arange(config.n_positions)[:, None] * frequencies
    amplitude = config.initializer_range * math.sqrt(2)
    positions, tokens = model.transformer.wpe.weight, model.transformer.wte.weight
    positions *= 0.1
    positions[:, :head_size] = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)
    tokens[:, :head_size] = 0.0
    sine, cosine = torch.diag(frequencies.sin()), torch.diag(frequencies.cos())
    back_by_one = torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
    weight = model.transformer.h[0].attn.c_attn.weight  # [E, 3E]: queries, keys and values side by side
    for projection, matrix in enumerate((back_by_one, torch.eye(head_size), torch.zeros(head_size, head_size))):
        columns = slice(projection * config.n_embd, projection * config.n_embd + head_size)
        if projection < 2:
            weight[:, columns] = 0.0
        weight[:head_size, columns] = PREVIOUS_TOKEN_HEAD_GAIN * matrix


def batch_of(rows: list[Row], offsets: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads rows on the right: input_ids, position_ids and the loss mask, each [B, T]."""
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (tokens, counts) in enumerate(rows):
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        loss_mask[index, : len(counts)] = torch.tensor(counts)
    return input_ids, torch.tensor(offsets)[:, None] + torch.arange(width), loss_mask


@torch.no_grad()
def answers_right(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, paragraphs: list[dict[str, Any]]) -> float:
    """Share of held-out answers of which every token is the model's first choice, the tokens before it given."""
    model.eval()
    right = []
    for paragraph in paragraphs:
        qa = paragraph["qas"][0]
        prompt = tokenizer.encode(f"{paragraph['context']}\nQ: {qa['question']}\nA:")
        answer = tokenizer.encode(f" {qa['answers'][0]['text']}")
        logits = model(torch.tensor([prompt + answer])[:, : CONFIG["n_positions"]]).logits[0]
        right.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer)
    model.train()
    return sum(right) / len(right)


def pretrain(arguments: argparse.Namespace) -> None:
    """Trains the tokenizer and the model and saves both to `arguments.output`."""
    set_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    generated = paragraphs_of(generate("train", questions=arguments.sample_questions, seed=arguments.seed + 1))
    contrasts = paragraphs_of(
        generate("train", questions=arguments.sample_questions, seed=arguments.seed + 2, contrast=True)
    )
    real = [p for path in arguments.text for p in paragraphs_of(json.loads(path.read_text(encoding="utf-8")))]
    heldout = paragraphs_of(generate("heldout", questions=600))[:150]
    if arguments.start is None:
        tokenizer = train_tokenizer(generated[: len(real) or None] + real, arguments.vocab_size)
        model = random_model(tokenizer)
        write_previous_token_head(model)
    else:
        tokenizer = GPT2TokenizerFast.from_pretrained(arguments.start)
        model = GPT2LMHeadModel.from_pretrained(arguments.start, use_safetensors=True)
    tokenizer.save_pretrained(arguments.output)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = 60
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / arguments.steps)) / 2),
    )
    generated.sort(key=lambda paragraph: len(paragraph["context"]))
    short_stream = shuffled_forever(generated[: len(generated) // 3], draw)
    generated_stream = shuffled_forever(generated, draw)
    contrast_stream = shuffled_forever(contrasts, draw)
    real_stream = shuffled_forever(real, draw) if real else generated_stream
    started = time.monotonic()
    for step in range(1, arguments.steps + 1):
        warming_up = arguments.start is None and step < arguments.steps * WARM_UP_SHARE
        row_tokens = WARM_UP_ROW_TOKENS if warming_up else ROW_TOKENS
        rows = []
        for _ in range(arguments.batch_size):
            kind = draw.random() / (1.0 if warming_up else 0.2)  # repeats: 50 % of the rows, later 10 %
            if kind < 0.2:
                rows.append(repeated_passage(tokenizer, next(generated_stream)["context"], row_tokens, draw))
            elif kind < 0.5:
                rows.append(repeated_random_tokens(len(tokenizer), row_tokens, draw))
            elif warming_up:
                rows.append(packed_documents(tokenizer, short_stream, row_tokens, arguments.text_loss_share, draw))
            else:
                source = draw.random()
                if source < arguments.contrast_share:
                    stream = contrast_stream
                elif source < arguments.contrast_share + arguments.real_share:
                    stream = real_stream
                else:
                    stream = generated_stream
                rows.append(packed_documents(tokenizer, stream, row_tokens, arguments.text_loss_share, draw))
        room = 0 if warming_up else CONFIG["n_positions"] - row_tokens
        offsets = [draw.choice((0, draw.randint(0, room))) for _ in rows]
        input_ids, position_ids, loss_mask = batch_of(rows, offsets)
        targets = input_ids[:, 1:][loss_mask[:, 1:]]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            hidden = model.transformer(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
            logits = model.lm_head(hidden[:, :-1][loss_mask[:, 1:]])
        loss = cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % arguments.log_every == 0 or step == arguments.steps:
            line = {
                "step": step,
                "loss": round(loss.item(), 3),
                "heldout_sample_answers_right": round(answers_right(model, tokenizer, heldout), 3),
                "seconds": round(time.monotonic() - started),
            }
            print(json.dumps(line), flush=True)
            model.save_pretrained(arguments.output)


def main() -> None:
    """Reads the command line and pretrains."""
    parser = argparse.ArgumentParser(description="Pretrain the starter model on generated data and SQuAD files.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model and tokenizer to")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="SQuAD JSON files with real passages")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from a model of this command, without warm-up")
    parser.add_argument("--text-loss-share", type=float, default=0.25, help="share of non-answer tokens in the loss")
    parser.add_argument("--real-share", type=float, default=0.25, help="share of document rows taken from --text")
    parser.add_argument("--contrast-share", type=float, default=0.0, help="share of rows that tell subjects apart")
    parser.add_argument("--sample-questions", type=int, default=120_000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
