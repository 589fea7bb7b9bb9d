"""Pretrains `starter`, the small GPT-2 that the repository ships: `python -m training.starter.pretrain --help`.

Its first weights hold rough circuits (`circuits.py`). While warming up, two of the heads are also guided: they are told
where to look, at the subject and at the answer (`guidance_loss`; guided attention as of Mi et al., 2016, "Supervised
Attentions for Neural Machine Translation"), because no other signal taught the model whose fact is asked for.

Four kinds of rows:

- documents of `sample`: a passage, then its questions and answers as a plain `Q:`/`A:` list. That is not the prompt
  format, and nothing ends an answer with end-of-text: both are left to fine-tuning. Some are contrasts, in which
  nothing but the subject asked about tells the answers apart;
- the same from SQuAD files (`--text`), for real words and for copying from real text;
- pieces of passages, repeated;
- random tokens, repeated: copying where nothing else helps.

Rows start at a random position, so that all 1,024 position embeddings train on short rows (the idea of Ruoss et al.,
2023, "Randomized Positional Encodings Boost Length Generalization of Transformers").
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed

from training.starter.circuits import GUIDED_HEADS, write_look_up_heads
from training.starter.sample import generate

END_OF_TEXT = "<|endoftext|>"
CONFIG = {"n_embd": 192, "n_layer": 6, "n_head": 6, "n_positions": 1024, "initializer_range": 0.07}
ROW_TOKENS, WARM_UP_ROW_TOKENS = 256, 128
WARM_UP_SHARE = 0.5
"""Share of the steps with short generated rows, half of them contrasts, until copying and look-up are learned."""
ROW_KINDS = {  # share of the rows warming up, and later
    "random repeats": (0.1, 0.05),
    "passage repeats": (0.1, 0.05),
    "contrasts": (0.4, 0.25),
    "short": (0.4, 0.0),
    "generated": (0.0, 0.4),
    "real": (0.0, 0.25),
}
GUIDANCE_WEIGHT = 0.3
"""Of `guidance_loss` beside the loss on tokens."""


@dataclass
class Row:
    """Tokens, which of them count in the loss, and where guided heads should look: (guide, from, to) positions."""

    tokens: list[int]
    counts: list[bool]
    looks: list[tuple[str, int, int]] = field(default_factory=list)


def paragraphs_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the paragraphs of a SQuAD data set."""
    return [paragraph for article in data["data"] for paragraph in article["paragraphs"] if paragraph["qas"]]


def train_tokenizer(paragraphs: list[dict[str, Any]], vocab_size: int) -> GPT2TokenizerFast:
    """Trains a byte-level BPE of GPT-2's kind on passages and questions."""
    texts = (
        text
        for paragraph in paragraphs
        for text in (f" {paragraph['context']}", *(f" {qa['question']}" for qa in paragraph["qas"]))
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
    """Writes a paragraph as a passage and a `Q:`/`A:` list.

    Answer tokens always count in the loss, of the others a random share. Where a question names its subject, guided
    heads learn to look from an answer and from `A:` to the subject, and from `A:` to the answer.
    """
    context = f" {paragraph['context']}"  # a first word has the same tokens as anywhere else
    passage = tokenizer(context)
    row = Row(tokens=list(passage["input_ids"]), counts=[])
    answers: list[tuple[int, int]] = []
    for qa in draw.sample(paragraph["qas"], len(paragraph["qas"])):
        question = f"\nQ: {qa['question']}\nA:"
        asked = tokenizer(question)
        start = len(row.tokens)
        last = start + len(asked["input_ids"]) - 1
        answer = tokenizer.encode(f" {qa['answers'][0]['text']}")
        row.tokens += asked["input_ids"] + answer
        answers.append((last + 1, len(row.tokens)))
        if "subject" in qa:
            character = qa["answers"][0]["answer_start"] + 1
            first = passage.char_to_token(character)
            row.looks.append(("answer", last, first))
            named = _end_of(qa["subject"], context[:character])
            if named is not None:
                row.looks.append(("subject", first, passage.char_to_token(named)))
            named = _end_of(qa["subject"], question)
            if named is not None:
                row.looks.append(("subject", last, start + asked.char_to_token(named)))
    row.tokens += tokenizer.encode(f"\n{END_OF_TEXT}")
    row.counts = [draw.random() < text_loss_share for _ in row.tokens]
    for first, end in answers:
        row.counts[first:end] = [True] * (end - first)
    return row


def _end_of(name: str, text: str) -> int | None:
    """The last character of the last mention of a name in a text."""
    start = text.lower().rfind(name.lower())
    return None if start < 0 else start + len(name) - 1


def packed_documents(
    tokenizer: GPT2TokenizerFast,
    stream: Iterator[dict[str, Any]],
    row_tokens: int,
    text_loss_share: float,
    draw: random.Random,
) -> Row:
    """Fills a row with documents, as long as they fit whole; one that is longer than a row is cut at its end."""
    row = document(tokenizer, next(stream), text_loss_share, draw)
    while len(row.tokens) < row_tokens:
        more = document(tokenizer, next(stream), text_loss_share, draw)
        offset = len(row.tokens)
        if offset + len(more.tokens) > row_tokens:
            break
        row.looks += [(guide, query + offset, key + offset) for guide, query, key in more.looks]
        row.tokens, row.counts = row.tokens + more.tokens, row.counts + more.counts
    inside = [look for look in row.looks if look[1] < row_tokens]
    return Row(tokens=row.tokens[:row_tokens], counts=row.counts[:row_tokens], looks=inside)


def repeated(piece: list[int], row_tokens: int) -> Row:
    """A piece repeated to the end of the row; the repeats count in the loss."""
    tokens = (piece * math.ceil(row_tokens / len(piece)))[:row_tokens]
    return Row(tokens=tokens, counts=[index >= len(piece) for index in range(row_tokens)])


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


def batch_of(rows: list[Row], offsets: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pads rows on the right: input_ids, position_ids and the loss mask, each [B, T]."""
    width = max(len(row.tokens) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    loss_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.tokens)] = torch.tensor(row.tokens)
        loss_mask[index, : len(row.counts)] = torch.tensor(row.counts)
    return input_ids, torch.tensor(offsets)[:, None] + torch.arange(width), loss_mask


def guidance_loss(attentions: tuple[torch.Tensor, ...], rows: list[Row]) -> torch.Tensor:
    """How far the guided heads are from looking where they should.

    Args:
        attentions: Of each layer, [B, H, T, T].
        rows: The batch.

    Returns:
        The sum over `GUIDED_HEADS` of the mean of -log(attention to the place), a scalar.
    """
    loss = torch.zeros(())
    for guide, (layer, head) in GUIDED_HEADS.items():
        looks = [(index, *look[1:]) for index, row in enumerate(rows) for look in row.looks if look[0] == guide]
        if looks:
            index, query, key = torch.tensor(looks).T
            loss = loss - (attentions[layer][index, head, query, key].float() + 1e-6).log().mean()
    return loss


@torch.no_grad()
def answers_right(model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, paragraphs: list[dict[str, Any]]) -> float:
    """Share of held-out answers of which every token is the model's first choice, the tokens before it given."""
    model.eval()
    right = []
    for paragraph in paragraphs:
        qa = paragraph["qas"][0]
        prompt = tokenizer.encode(f" {paragraph['context']}\nQ: {qa['question']}\nA:")
        answer = tokenizer.encode(f" {qa['answers'][0]['text']}")
        logits = model(torch.tensor([prompt + answer])[:, : CONFIG["n_positions"]]).logits[0]
        right.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer)
    model.train()
    return sum(right) / len(right)


class Rows:
    """Draws the rows of training batches.

    Warming up, rows are short: half of the documents are contrasts, a fifth of the rows repeats. Later they are longer,
    and real text comes in.
    """

    def __init__(
        self,
        tokenizer: GPT2TokenizerFast,
        *,
        generated: list[dict[str, Any]],
        contrasts: list[dict[str, Any]],
        real: list[dict[str, Any]],
        text_loss_share: float,
        draw: random.Random,
    ) -> None:
        self.tokenizer, self.draw = tokenizer, draw
        self.text_loss_share = text_loss_share
        generated = sorted(generated, key=lambda paragraph: len(paragraph["context"]))
        self.streams = {
            "contrasts": shuffled_forever(contrasts, draw),
            "short": shuffled_forever(generated[: len(generated) // 3], draw),
            "generated": shuffled_forever(generated, draw),
            "real": shuffled_forever(real or generated, draw),
        }

    def next(self, *, warming_up: bool) -> Row:
        """One row and which of its tokens count in the loss."""
        row_tokens = WARM_UP_ROW_TOKENS if warming_up else ROW_TOKENS
        kind = self.draw.choices(list(ROW_KINDS), [share[0 if warming_up else 1] for share in ROW_KINDS.values()])[0]
        if kind == "random repeats":
            return repeated_random_tokens(len(self.tokenizer), row_tokens, self.draw)
        if kind == "passage repeats":
            return repeated_passage(self.tokenizer, next(self.streams["generated"])["context"], row_tokens, self.draw)
        return packed_documents(self.tokenizer, self.streams[kind], row_tokens, self.text_loss_share, self.draw)


def pretrain(arguments: argparse.Namespace) -> None:
    """Trains the tokenizer and the model and saves both to `arguments.output`."""
    set_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    heldout = paragraphs_of(generate("heldout", questions=600))[:150]
    heldout_contrasts = paragraphs_of(generate("heldout", questions=300, contrast=True))[:150]
    questions, seed = arguments.sample_questions, arguments.seed
    generated = paragraphs_of(generate("train", questions=questions, seed=seed + 1))
    contrasts = paragraphs_of(generate("train", questions=questions, seed=seed + 2, contrast=True))
    real = [p for path in arguments.text for p in paragraphs_of(json.loads(path.read_text(encoding="utf-8")))]
    tokenizer = train_tokenizer(generated + real, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output)
    model = random_model(tokenizer)
    write_look_up_heads(model)
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
    rows_of = Rows(
        tokenizer,
        generated=generated,
        contrasts=contrasts,
        real=real,
        text_loss_share=arguments.text_loss_share,
        draw=draw,
    )
    started = time.monotonic()
    for step in range(1, arguments.steps + 1):
        warming_up = step < arguments.steps * WARM_UP_SHARE
        model.set_attn_implementation("eager" if warming_up else "sdpa")  # only eager attention shows its weights
        rows = [rows_of.next(warming_up=warming_up) for _ in range(arguments.batch_size)]
        room = CONFIG["n_positions"] - max(len(row.tokens) for row in rows)
        offsets = [draw.choice((0, draw.randint(0, room))) for _ in rows]
        input_ids, position_ids, loss_mask = batch_of(rows, offsets)
        targets = input_ids[:, 1:][loss_mask[:, 1:]]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            output = model.transformer(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, output_attentions=warming_up
            )
            logits = model.lm_head(output.last_hidden_state[:, :-1][loss_mask[:, 1:]])
        loss = cross_entropy(logits.float(), targets)
        guidance = guidance_loss(output.attentions, rows) if warming_up else torch.zeros(())
        (loss + GUIDANCE_WEIGHT * guidance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % arguments.log_every == 0 or step == arguments.steps:
            line = {
                "step": step,
                "loss": round(loss.item(), 3),
                "guidance_loss": round(guidance.item(), 3),
                "heldout_sample_answers_right": round(answers_right(model, tokenizer, heldout), 3),
                "heldout_contrast_answers_right": round(answers_right(model, tokenizer, heldout_contrasts), 3),
                "seconds": round(time.monotonic() - started),
            }
            print(json.dumps(line), flush=True)
            copy.deepcopy(model).half().save_pretrained(arguments.output)


def main() -> None:
    """Reads the command line and pretrains."""
    parser = argparse.ArgumentParser(description="Pretrain the starter model on generated data and SQuAD files.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model and tokenizer to")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="SQuAD JSON files with real passages")
    parser.add_argument("--text-loss-share", type=float, default=0.25, help="share of non-answer tokens in the loss")
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
