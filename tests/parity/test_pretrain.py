"""What the pretraining of `starter` writes into the first weights, and where its guided heads are sent."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import set_seed

from qa_onnx.squad import parse_squad
from training.data import Collator
from training.model import load_model
from training.starter import pointing, pretrain, read
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


def test_rows_for_reading_say_where_each_answer_stands():
    _, tokenizer = load_model("starter")
    bpe = tokenizer.backend_tokenizer
    examples = parse_squad(generate("train", questions=60), source="sample")
    rows = read.rows_of(examples, bpe, 0.1, random.Random(0))
    assert len(rows) < len(examples) / 2
    answers = sorted(example.answers[0].text for example in examples)
    found = []
    for row in rows:
        assert len(row["looks"]) == len(row["question_tokens"])
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        for last, passage, first, end in row["looks"]:
            assert first < end <= passage == row["passage_tokens"] <= last
            assert bpe.decode(row["input_ids"][last - 4 : last + 1]).endswith("Answer:")
            found.append(bpe.decode(row["input_ids"][first:end]).strip(" \"'.,"))
    assert len(found) == len(answers)
    assert sum(one in other or other in one for one, other in zip(sorted(found), answers, strict=True)) > 50


def test_the_pointing_loss_is_small_where_the_heads_look_at_the_answer_and_large_where_not():
    width, head_size = 12, 2
    projections = {chain.point[0]: torch.zeros(2, 6, 3 * width) for chain in pointing.CHAINS}
    for chain in pointing.CHAINS:
        layer, head = chain.point
        start = head * head_size
        projections[layer][1, 5, start] = 30.0
        projections[layer][1, 2, width + start] = 1.0  # the token that is looked at
        projections[layer][1, 4, width + start] = 9.0  # no token of the passage
    loss = [pointing.pointing_loss(projections, [(1, 5, 4, *answer)], head_size).item() for answer in ((2, 3), (0, 2))]
    assert loss[0] == pytest.approx(0.0, abs=1e-3)
    assert loss[1] > 30


def test_voting_heads_find_the_words_of_the_question_and_leave_the_model_whole():
    model, tokenizer = load_model("starter")
    examples = parse_squad(generate("train", questions=40), source="sample")
    rows = read.rows_of(examples, tokenizer.backend_tokenizer, 0.0, random.Random(0))[:6]
    batch = Collator(pad_token_id=0, packing=True)(rows)
    model.eval()
    pointing.write_voting_heads(model, batch)
    for chain in pointing.CHAINS:
        for projection in (0, 1):
            written, source = (pointing._rows(model, *place, projection) for place in (chain.match, chain.look_up))
            assert torch.equal(written, source)
    projections = pointing.Projections(model)
    assert torch.isfinite(model(**batch).loss)
    looks = [(index, *look) for index, row in enumerate(rows) for look in row["looks"]]
    loss = pointing.pointing_loss(projections.last, looks, 32)
    loss.backward()
    layer = pointing.CHAINS[0].point[0]
    assert model.transformer.h[layer].attn.c_attn.weight.grad.abs().max() > 0
