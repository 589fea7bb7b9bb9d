"""Teaches the starter to read real text: `python -m training.starter.read --help`.

Rows are packed as in fine-tuning, so the prompt is the one that questions are asked with later. Beside the loss on the
answers, heads that vote for a place in the passage (`pointing.py`) are told where the answer is.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import set_seed

from qa_onnx.metrics import evaluate
from qa_onnx.prompt import PASSAGE_TEMPLATE, encode_answers, encode_prompts
from qa_onnx.squad import Example, parse_squad, read_squad
from training.data import MIN_PACKED_TOKENS, Collator, LengthGroupedSampler
from training.evaluation import generate_answers
from training.model import IGNORED, load_model
from training.starter.pointing import Projections, pointing_loss, write_voting_heads
from training.starter.sample import generate

MAX_ROW_TOKENS = 700


def rows_of(
    examples: list[Example], bpe: Tokenizer, text_loss_share: float, draw: random.Random
) -> list[dict[str, Any]]:
    """Packed rows as of `training.data`, with `looks`: (last token of the prompt, passage's, answer's first, its end).

    A passage that is too long is left out.
    """
    prompts = encode_prompts(bpe, [example.question for example in examples], [example.context for example in examples])
    answers = encode_answers(bpe, [example.answers[0].text for example in examples])
    label = PASSAGE_TEMPLATE.index("{")
    eos = bpe.token_to_id("<|endoftext|>")
    contexts: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        contexts.setdefault(example.context, []).append(index)
    rows: list[dict[str, Any]] = []
    for context, asked in contexts.items():
        offsets = bpe.encode(PASSAGE_TEMPLATE.format(context=context), add_special_tokens=False).offsets
        passage_ids = prompts[asked[0]].passage_ids
        if len(passage_ids) > MAX_ROW_TOKENS:
            continue
        draw.shuffle(asked)
        row: dict[str, Any] = {}
        for index in asked:
            tokens = [*prompts[index].question_ids, *answers[index], eos]
            if not row or row["length"] - len(passage_ids) + len(tokens) > MIN_PACKED_TOKENS:
                labels = [token if draw.random() < text_loss_share else IGNORED for token in passage_ids]
                row = {"input_ids": list(passage_ids), "labels": labels, "passage_tokens": len(passage_ids)}
                row |= {"question_tokens": [], "looks": [], "length": len(passage_ids)}
                rows.append(row)
            question = len(prompts[index].question_ids)
            answer = examples[index].answers[0]
            start, end = answer.start + label, answer.start + label + len(answer.text)
            inside = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
            if inside:
                last = len(row["input_ids"]) + question - 1
                row["looks"].append((last, len(passage_ids), inside[0], inside[-1] + 1))
            row["input_ids"] += tokens
            row["labels"] += [IGNORED] * question + tokens[question:]
            row["question_tokens"].append(len(tokens))
            row["length"] += len(tokens)
    return rows


def read(arguments: argparse.Namespace) -> None:
    """Trains and saves to `arguments.output`."""
    set_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    model, tokenizer = load_model(arguments.model)
    bpe = tokenizer.backend_tokenizer
    rows = [row for path in arguments.data for row in rows_of(read_squad(path), bpe, arguments.text_loss_share, draw)]
    sample = parse_squad(
        generate("train", seed=arguments.seed + 3, questions=arguments.sample_questions), source="sample"
    )
    rows += rows_of(sample, bpe, arguments.text_loss_share, draw)
    heldout = draw.sample(read_squad(arguments.eval), arguments.eval_questions)
    collator = Collator(pad_token_id=tokenizer.eos_token_id, packing=True)
    sampler = LengthGroupedSampler(
        [row["length"] for row in rows], batch_rows=arguments.batch_size, seed=arguments.seed
    )

    def batches() -> Any:
        for epoch in range(10_000):
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order) - arguments.batch_size + 1, arguments.batch_size):
                yield [rows[index] for index in order[start : start + arguments.batch_size]]

    if arguments.write_heads:
        write_voting_heads(model.eval(), {**collator(rows[:12])})
    projections = Projections(model)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 60) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / arguments.steps)) / 2),
    )
    print(json.dumps({"rows": len(rows), "tokens": sum(row["length"] for row in rows)}), flush=True)
    head_size = model.config.n_embd // model.config.n_head
    started, sums = time.monotonic(), [0.0, 0.0]
    for step, chosen in zip(range(1, arguments.steps + 1), batches(), strict=False):
        model.train()
        looks = [(index, *look) for index, row in enumerate(chosen) for look in row["looks"]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**collator(chosen)).loss
        pointing = pointing_loss(projections.last, looks, head_size)
        (loss + arguments.pointing_weight * pointing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        sums = [sums[0] + loss.item(), sums[1] + pointing.item()]
        if step % arguments.log_every == 0 or step == 5:
            count = 5 if step == 5 else arguments.log_every
            line = {"step": step, "loss": round(sums[0] / count, 3), "pointing": round(sums[1] / count, 3)}
            print(json.dumps({**line, "seconds": round(time.monotonic() - started)}), flush=True)
            sums = [0.0, 0.0]
        if step % arguments.eval_every == 0 or step == arguments.steps:
            scores = evaluate(heldout, generate_answers(model, tokenizer, heldout, max_new_tokens=16, progress=False))
            print(json.dumps({"step": step, "exact_match": scores.exact_match, "f1": scores.f1}), flush=True)
            copy.deepcopy(model).half().save_pretrained(arguments.output)
            tokenizer.save_pretrained(arguments.output)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Teach the starter to read real text.")
    parser.add_argument("--model", required=True, help="a model of the starter's shape: a directory, or `starter`")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="SQuAD v1.1 JSON files")
    parser.add_argument("--eval", type=Path, required=True, help="SQuAD JSON file; some of it is answered now and then")
    parser.add_argument("--eval-questions", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True, help="directory to write model and tokenizer to")
    parser.add_argument("--write-heads", action="store_true", help="write the voting heads first")
    parser.add_argument("--sample-questions", type=int, default=12_000, help="of the generated set, beside the files")
    parser.add_argument("--text-loss-share", type=float, default=0.05, help="of passage tokens that count in the loss")
    parser.add_argument("--pointing-weight", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    read(parser.parse_args())


if __name__ == "__main__":
    main()
