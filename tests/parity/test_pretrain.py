"""What the pretraining of `starter` writes into the first weights, and where its guided heads are sent."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import set_seed

from training.starter import pretrain
from training.starter.circuits import write_look_up_heads
from training.starter.sample import generate


@pytest.fixture(scope="module")
def paragraphs():
    return pretrain.paragraphs_of(generate("train", questions=400))


@pytest.fixture(scope="module")
def tokenizer(paragraphs):
    return pretrain.train_tokenizer(paragraphs, 1024)


@pytest.fixture(scope="module")
def written(tokenizer):
    set_seed(0)
    model = pretrain.random_model(tokenizer).eval()
    model.set_attn_implementation("eager")
    write_look_up_heads(model)
    return model


def test_the_first_head_looks_at_the_token_before_at_any_position(written):
    ids = torch.randint(1, 1000, (2, 60))
    positions = torch.tensor([[0], [900]]) + torch.arange(60)
    attention = written(input_ids=ids, position_ids=positions, output_attentions=True).attentions[0][:, 0]
    assert attention.diagonal(offset=-1, dim1=1, dim2=2).min() > 0.6


def test_repeated_random_tokens_are_copied_far_better_than_by_chance_before_any_training(written):
    rows = [pretrain.repeated_random_tokens(1024, 128, random.Random(seed)) for seed in range(8)]
    ids, positions, counted = pretrain.batch_of(rows, [0, 100, 200, 300, 400, 500, 600, 700])
    with torch.inference_mode():
        guesses = written(input_ids=ids, position_ids=positions).logits[:, :-1].argmax(-1)
    assert (guesses == ids[:, 1:])[counted[:, 1:]].float().mean() > 0.02  # chance: 0.001


def test_guided_heads_are_sent_to_the_subject_and_to_the_answer(tokenizer, paragraphs):
    for paragraph in paragraphs[:40]:
        row = pretrain.document(tokenizer, paragraph, 0.0, random.Random(0))
        subjects = [qa["subject"].lower() for qa in paragraph["qas"]]
        answers = [qa["answers"][0]["text"] for qa in paragraph["qas"]]
        assert sum(look[0] == "answer" for look in row.looks) == len(answers)
        for guide, start, place in row.looks:
            assert place < start
            before = tokenizer.decode(row.tokens[: place + 1]).lower()
            after = tokenizer.decode(row.tokens[place:]).lstrip()
            if guide == "subject":
                assert any(before.rstrip('",.?').endswith(subject.rstrip('"')) for subject in subjects)
            else:
                assert any(after.startswith(answer) for answer in answers)
        counted = tokenizer.decode([token for token, counts in zip(row.tokens, row.counts, strict=True) if counts])
        assert sorted(counted) == sorted("".join(f" {answer}" for answer in answers))


def test_guidance_is_zero_where_heads_look_as_they_should_and_large_where_not():
    right = torch.zeros(2, 6, 5, 5)
    right[:, :, 4, 1] = 1.0
    attentions = (torch.zeros(2, 6, 5, 5), right, torch.zeros(2, 6, 5, 5), right)
    rows = [
        pretrain.Row(tokens=[0] * 5, counts=[True] * 5, looks=[("subject", 4, 1), ("answer", 4, 1)]),
        pretrain.Row(tokens=[0] * 5, counts=[True] * 5),
    ]
    assert pretrain.guidance_loss(attentions, rows).item() == pytest.approx(0.0, abs=1e-5)
    rows[1].looks = [("answer", 4, 2)]
    assert pretrain.guidance_loss(attentions, rows).item() > 5
