"""What the pretraining of `starter` writes into the first weights, and where its heads are told to look."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import set_seed

from qa_onnx.data.squad import parse_squad
from qa_onnx.text.prompt import PROMPT_TEMPLATE
from training.data import Collator
from training.starter import augment, circuits, pretrain, vectors
from training.starter.sample import generate


@pytest.fixture(scope="module")
def tokenizer():
    paragraphs = pretrain.list_paragraphs(generate("train", questions=1200))
    prompt = {"context": PROMPT_TEMPLATE.format(context="x", question="y"), "qas": []}
    return pretrain.train_tokenizer([*paragraphs, *[prompt] * 300], 2048)


@pytest.fixture(scope="module")
def texts():
    paragraphs = pretrain.list_paragraphs(generate("train", questions=1200))
    return [f" {paragraph['context']}" for paragraph in paragraphs]


@pytest.fixture(scope="module")
def written(tokenizer, texts):
    set_seed(0)
    bpe = tokenizer.backend_tokenizer
    known = vectors.token_vectors(bpe, texts, circuits.FREE_WIDTH)
    return circuits.first_model(tokenizer, known, vectors.token_rarity(bpe, texts)).eval()


@pytest.fixture(scope="module")
def rows(tokenizer):
    examples = parse_squad(generate("heldout", questions=120), source="sample")
    return pretrain.make_rows(examples, tokenizer.backend_tokenizer, 0.1, random.Random(0))


@pytest.fixture(scope="module")
def attentions(written, rows):
    """Of each layer, [B, H, T, T], for the first rows."""
    batch = Collator(pad_token_id=0, packing=True)(rows[:8])
    mask = torch.zeros(batch["attention_mask"].shape).masked_fill(~batch["attention_mask"], -1e9)
    written.set_attn_implementation("eager")
    with torch.inference_mode():
        found = written.transformer(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask,
            output_attentions=True,
        ).attentions
    written.set_attn_implementation("sdpa")
    return found


def question_of(row):
    """Tokens of the row's first question: places, the prompt's own words at its end left out."""
    first = row["passage_tokens"]
    return range(first, first + row["question_tokens"][0] - 8)


def test_the_first_head_looks_at_the_token_before_at_any_position(written):
    ids = torch.randint(1, 1000, (2, 60))
    positions = torch.tensor([[0], [900]]) + torch.arange(60)
    written.set_attn_implementation("eager")
    attention = written(input_ids=ids, position_ids=positions, output_attentions=True).attentions[0][:, 0]
    written.set_attn_implementation("sdpa")
    assert attention.diagonal(offset=-1, dim1=1, dim2=2).min() > 0.9


def test_what_came_behind_the_same_token_before_is_looked_at(written):
    piece = torch.randperm(1800)[:40] + 100
    ids = piece.repeat(3)[None]
    written.set_attn_implementation("eager")
    attention = written(input_ids=ids, output_attentions=True).attentions[1][0, 2]
    written.set_attn_implementation("sdpa")
    behind = [attention[place, [place - 39, max(0, place - 79)]].sum().item() for place in range(40, 120)]
    assert sum(behind) / len(behind) > 0.3  # chance is 0.03


def test_words_of_a_question_find_themselves_in_the_passage(rows, attentions):
    shares = []
    for index, row in enumerate(rows[:8]):
        ids = row["input_ids"]
        for place in question_of(row):
            same = [other for other in range(row["passage_tokens"]) if ids[other] == ids[place]]
            if len(same) == 1:
                shares.append(attentions[1][index, 0, place, same[0]].item())
    assert len(shares) > 15
    assert sum(shares) > 0.6 * len(shares)  # chance is 0.01


def test_votes_are_gathered_in_the_question_only(rows, attentions):
    for index, row in enumerate(rows[:8]):
        last = question_of(row)[-1]
        assert attentions[2][index, 0, last, row["passage_tokens"] :].sum() > 0.8


def test_heads_point_nearer_to_the_answer_than_by_chance_before_any_training(rows, attentions):
    found, chance = [], []
    for index, row in enumerate(rows[:8]):
        for place, first, _ in row["points"]:
            if row["labels"][place] == -100:  # the last token of a prompt
                near = slice(max(0, first - 4), first + 5)
                attention = attentions[3][index, 0, place, : row["passage_tokens"]]
                found.append((attention[near].sum() / attention.sum()).item())
                chance.append(9 / row["passage_tokens"])
    assert sum(found) > 1.3 * sum(chance)


def test_what_stays_apart_of_the_stream_is_not_changed_by_a_step(written, rows):
    batch = Collator(pad_token_id=0, packing=True)(rows[:2])
    model = pretrain.copy.deepcopy(written)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        for parameter, factor in circuits.writable(model).items():
            parameter.mul_(factor)
    for layer, (block, before) in enumerate(zip(model.transformer.h, written.transformer.h, strict=True)):
        for module in (block.attn.c_proj, block.mlp.c_proj):
            for parameter in (module.weight, module.bias):
                assert not parameter[..., circuits.PLACE].any()
        assert not torch.equal(block.attn.c_proj.weight, before.attn.c_proj.weight)
        assert block.attn.c_proj.weight[:, circuits.FOUND].any() == (layer == 1)
        assert block.attn.c_proj.weight[:, circuits.SIDE].any() == (layer == 0)
    assert not model.transformer.wte.weight[:, : circuits.RARITY].any()


def test_rows_say_where_each_answer_and_each_of_its_tokens_stands(tokenizer, rows):
    bpe = tokenizer.backend_tokenizer
    assert sum(len(row["question_tokens"]) for row in rows) == 120
    assert len(rows) < 60
    same = points = 0
    for row in rows:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        for place, first, last in row["votes"]:
            assert 0 <= first < last <= row["passage_tokens"] < place
        for place, token, _ in row["points"]:
            points += 1
            same += row["input_ids"][place + 1] == row["input_ids"][token]
            assert row["labels"][place + 1] == row["input_ids"][place + 1]
        prompts = [place for place, _, _ in row["points"] if row["labels"][place] == -100]
        assert all(bpe.decode(row["input_ids"][place - 1 : place + 1]) == "Answer:" for place in prompts)
        assert len(prompts) == len(row["question_tokens"])
    assert same > 0.9 * points  # else the answer's first or last token is cut otherwise in the passage


def test_a_passage_that_is_too_long_and_an_answer_elsewhere_are_left_out(tokenizer):
    paragraph = {"context": "word " * 2000, "qas": [{"id": "1", "question": "Who?", "answers": []}]}
    other = {"context": "Mara founded Tolvik.", "qas": [{"id": "2", "question": "Who?", "answers": []}]}
    paragraph["qas"][0]["answers"] = [{"text": "word", "answer_start": 0}]
    other["qas"][0]["answers"] = [{"text": "Tom", "answer_start": 0}]
    data = {"data": [{"paragraphs": [paragraph, other]}]}
    (row,) = pretrain.make_rows(parse_squad(data, source="x"), tokenizer.backend_tokenizer, 0.0, random.Random(0))
    assert (row["votes"], row["points"]) == ([], [])


def test_the_pointing_loss_is_small_where_a_head_looks_at_the_answer_and_large_where_not():
    projected = torch.zeros(2, 6, 3 * circuits.WIDTH)
    first = 2 * circuits.HEAD_SIZE
    projected[1, 5, first] = 30.0
    projected[1, 2, circuits.WIDTH + first] = 9.0  # the token that is looked at
    projected[1, 4, circuits.WIDTH + first] = 99.0  # no token of the passage
    rows = [{"passage_tokens": 3, "votes": []}, {"passage_tokens": 4, "votes": [(5, 2, 3)]}]
    assert pretrain.pointing_loss(projected, 2, rows, "votes").item() == pytest.approx(0.0, abs=1e-3)
    rows[1]["votes"] = [(5, 0, 2)]
    assert pretrain.pointing_loss(projected, 2, rows, "votes").item() > 20


def test_vectors_know_spelling_and_neighbours(tokenizer, texts):
    bpe = tokenizer.backend_tokenizer
    known = vectors.token_vectors(bpe, texts, 160)
    assert known.shape == (len(tokenizer), 160)
    assert known.square().mean().item() == pytest.approx(1.0, abs=0.05)

    def alike(one, other):
        places = [bpe.encode(text).ids for text in (one, other)]
        assert [len(ids) for ids in places] == [1, 1]
        return torch.nn.functional.cosine_similarity(known[places[0]], known[places[1]]).item()

    assert alike(" The", " the") > alike(" The", " bridge") + 0.2
    assert alike(" January", " April") > alike(" January", " bridge") + 0.1
    rarity = vectors.token_rarity(bpe, texts)
    assert rarity[bpe.encode(" the").ids[0]] < rarity[bpe.encode(" April").ids[0]]
    assert rarity[bpe.encode("?").ids[0]] == -3


def test_a_few_steps_are_trained_and_gone_on_from(tmp_path):
    data = generate("train", questions=40)
    (tmp_path / "data.json").write_text(json.dumps(data))
    shared = ["--text", tmp_path / "data.json", "--copies", "1", "--cloze", "1", "--eval", tmp_path / "data.json"]
    shared += [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--sample-questions",
        "20",
        "--vocab-size",
        "600",
        "--eval-questions",
        "4",
    ]
    pretrain.main([*map(str, shared), "--output", str(tmp_path / "first")])
    pretrain.main([*map(str, shared), "--output", str(tmp_path / "second"), "--model", str(tmp_path / "first")])
    for name in ("first", "second"):
        assert (tmp_path / name / "model.safetensors").stat().st_size > 1_000_000


def test_questions_without_an_answer_are_of_other_passages_and_lost_sentences():
    data = [generate("train", questions=300)]
    data[0]["data"] = [
        {"title": str(number), "paragraphs": data[0]["data"][0]["paragraphs"][4 * number : 4 * number + 4]}
        for number in range(10)
    ]
    made = augment.augment(data, copies=2, cloze=0, seed=1, no_answer_share=0.5, joined_share=0.5)
    examples = parse_squad(made, source="made")
    without = [example for example in examples if not example.answers]
    assert 0.2 < len(without) / len(examples) < 0.5
    answers = {
        qa["question"]: qa["answers"][0]["text"].lower()
        for article in data[0]["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    }
    known = [example for example in without if example.question in answers]
    assert len(known) > 10
    assert not any(answers[example.question] in example.context.lower() for example in known)
    for example in examples:
        for answer in example.answers:
            assert example.context.startswith(answer.text, answer.start)
    lengths = [len(example.context) for example in examples]
    assert max(lengths) > 1.5 * max(len(p["context"]) for a in data[0]["data"] for p in a["paragraphs"])
    assert max(lengths) < augment.MAX_JOINED_CHARACTERS + 20


def test_a_question_without_an_answer_is_followed_by_the_end_of_text_and_points_nowhere(tokenizer):
    paragraph = {"context": "Mara founded Tolvik.", "qas": [{"id": "1", "question": "Who left?", "answers": []}]}
    examples = parse_squad({"data": [{"paragraphs": [paragraph]}]}, source="x")
    (row,) = pretrain.make_rows(examples, tokenizer.backend_tokenizer, 0.0, random.Random(0))
    assert (row["votes"], row["points"]) == ([], [])
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    assert sum(label != -100 for label in row["labels"]) == 1


def test_word_vectors_bring_words_of_like_use_together_in_the_free_dimensions(tokenizer, written, tmp_path):
    draw = torch.Generator().manual_seed(0)
    words = {word: torch.randn(100, generator=draw) for word in ("january", "april", "bridge", "the", "river")}
    words["april"] = words["january"] + 0.1 * words["april"]
    filler = {f"word{number}": torch.randn(100, generator=draw) for number in range(300)}
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({"vectors": {word: vector.tolist() for word, vector in (words | filler).items()}}))
    model, bpe = pretrain.copy.deepcopy(written), tokenizer.backend_tokenizer
    before = model.transformer.wte.weight.detach().clone()
    vectors.add_word_vectors(model, bpe, path)
    added = model.transformer.wte.weight.detach() - before
    ids = {word: bpe.encode(f" {word}").ids for word in ("January", "April", "bridge")}
    assert all(len(found) == 1 for found in ids.values())
    january, april, bridge = (added[found[0]] for found in ids.values())
    assert torch.nn.functional.cosine_similarity(january, april, dim=0) > 0.9
    assert abs(torch.nn.functional.cosine_similarity(january, bridge, dim=0)) < 0.5
    assert not added[:, : circuits.FREE.start].any()
    assert not added[bpe.encode("\n").ids[0]].any()
