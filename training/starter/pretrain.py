"""Pretrains `starter`, the small GPT-2 that the repository ships: `python -m training.starter.pretrain --help`.

Three kinds of rows, for a model that has to look facts up in its context:

- documents of `sample`: a passage, then its questions and answers as a plain `Q:`/`A:` list. That is not the prompt
  format, and nothing ends an answer with end-of-text: both are left to fine-tuning;
- the same from SQuAD files (`--text`), for real words and for copying from real text;
- random tokens repeated, which bring the copying ("induction") heads up early (Olsson et al., 2022, "In-context
  Learning and Induction Heads").

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
CONFIG = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 1024}
ROW_TOKENS = 320
PASSAGE_LOSS_SHARE = 0.25
"""Share of passage and question tokens that count in the loss; answer tokens always do."""

Row = tuple[list[int], list[bool]]


def paragraphs_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the paragraphs of a SQuAD data set."""
    return [paragraph for article in data["data"] for paragraph in article["paragraphs"] if paragraph["qas"]]


def train_tokenizer(paragraphs: list[dict[str, Any]], vocab_size: int) -> GPT2TokenizerFast:
    """Trains a byte-level BPE of GPT-2's kind on passages and questions."""
    texts = (
        text for paragraph in paragraphs for text in (paragraph["context"], *(qa["question"] for qa in paragraph["qas"]))
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


def document(tokenizer: GPT2TokenizerFast, paragraph: dict[str, Any], draw: random.Random) -> Row:
    """Writes a paragraph as a passage and a `Q:`/`A:` list; returns its tokens and which of them count in the loss."""
    pieces = [(paragraph["context"], False)]
    for qa in draw.sample(paragraph["qas"], len(paragraph["qas"])):
        pieces += [(f"\nQ: {qa['question']}\nA:", False), (f" {qa['answers'][0]['text']}", True)]
    pieces.append((f"\n{END_OF_TEXT}", False))
    tokens: list[int] = []
    counts: list[bool] = []
    for text, is_answer in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        counts += [is_answer or draw.random() < PASSAGE_LOSS_SHARE for _ in ids]
    return tokens, counts


def packed_documents(tokenizer: GPT2TokenizerFast, stream: Iterator[dict[str, Any]], draw: random.Random) -> Row:
    """Fills a row with documents, as long as they fit whole; one that is longer than a row is cut at its end."""
    tokens, counts = document(tokenizer, next(stream), draw)
    while len(tokens) < ROW_TOKENS:
        more_tokens, more_counts = document(tokenizer, next(stream), draw)
        if len(tokens) + len(more_tokens) > ROW_TOKENS:
            break
        tokens, counts = tokens + more_tokens, counts + more_counts
    return tokens[:ROW_TOKENS], counts[:ROW_TOKENS]


def repeated_tokens(vocab_size: int, draw: random.Random) -> Row:
    """Random tokens, repeated to the end of the row; the repeats count in the loss."""
    period = draw.randint(6, ROW_TOKENS // 3)
    first = [draw.randrange(vocab_size) for _ in range(period)]
    tokens = (first * math.ceil(ROW_TOKENS / period))[:ROW_TOKENS]
    return tokens, [index >= period for index in range(ROW_TOKENS)]


def shuffled_forever(paragraphs: list[dict[str, Any]], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Yields the paragraphs in a new random order each time round."""
    while True:
        yield from draw.sample(paragraphs, len(paragraphs))


def batch_of(rows: list[Row], draw: random.Random) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads rows on the right: input_ids, position_ids and the loss mask, each [B, ROW_TOKENS]."""
    input_ids = torch.zeros(len(rows), ROW_TOKENS, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), ROW_TOKENS, dtype=torch.bool)
    offsets = torch.tensor([draw.choice((0, draw.randint(0, CONFIG["n_positions"] - ROW_TOKENS))) for _ in rows])
    for index, (tokens, counts) in enumerate(rows):
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        loss_mask[index, : len(counts)] = torch.tensor(counts)
    return input_ids, offsets[:, None] + torch.arange(ROW_TOKENS), loss_mask


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
    real = [p for path in arguments.text for p in paragraphs_of(json.loads(path.read_text(encoding="utf-8")))]
    heldout = paragraphs_of(generate("heldout", questions=600))[:150]
    tokenizer = train_tokenizer(generated[: len(real) or None] + real, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output)

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **CONFIG,
        )
    )
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, step / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / arguments.steps)) / 2),
    )
    generated_stream = shuffled_forever(generated, draw)
    real_stream = shuffled_forever(real, draw) if real else generated_stream
    started = time.monotonic()
    for step in range(1, arguments.steps + 1):
        repeat_share = 0.5 if step < arguments.steps * 0.15 else 0.08
        rows = []
        for _ in range(arguments.batch_size):
            if draw.random() < repeat_share:
                rows.append(repeated_tokens(len(tokenizer), draw))
            else:
                stream = real_stream if draw.random() < arguments.real_share else generated_stream
                rows.append(packed_documents(tokenizer, stream, draw))
        input_ids, position_ids, loss_mask = batch_of(rows, draw)
        width = max(len(tokens) for tokens, _ in rows)
        input_ids, position_ids, loss_mask = input_ids[:, :width], position_ids[:, :width], loss_mask[:, 1:width]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            hidden = model.transformer(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
            logits = model.lm_head(hidden[:, :-1][loss_mask])
        loss = cross_entropy(logits.float(), input_ids[:, 1:][loss_mask])
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
    parser.add_argument("--real-share", type=float, default=0.25, help="share of document rows taken from --text")
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
