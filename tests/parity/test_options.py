"""The options of generation against transformers' own, and what PyTorch says of scores."""

from __future__ import annotations

import asyncio
import shutil

import numpy as np
import pytest
import torch
from transformers import GenerationConfig as TorchConfig
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qa_onnx import Answerer, EngineConfig, GenerationConfig
from qa_onnx.bundle import Bundle
from qa_onnx.data.reader import read_examples
from qa_onnx.engine.sampling import sampling_probabilities
from qa_onnx.text.constraint import SpanConstraint, Spans, TokenBytes
from qa_onnx.text.prompt import encode_answers, encode_prompts, load_tokenizer
from tests.conftest import ROOT
from training.model import load_model
from training.padding import pad_left

GPT2_TOKENIZER = ROOT.parent / "shared" / "tokenizer" / "gpt2" / "tokenizer.json"


@pytest.fixture(scope="module")
def starter():
    model, tokenizer = load_model("starter")
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def plain_bundle(starter_bundle, tmp_path_factory):
    """The starter's bundle without threshold, calibration of scores and windows, which PyTorch's side has not."""
    path = tmp_path_factory.mktemp("plain") / "bundle"
    shutil.copytree(starter_bundle, path)
    Bundle.open(path).keep({"no_answer": {}, "scores": {}, "windows": {}})
    return path


@pytest.fixture(scope="module")
def answerer(plain_bundle):
    with Answerer.from_pretrained(plain_bundle, provider="cpu") as answerer:
        yield answerer


def texts_of(examples):
    return [example.question for example in examples], [example.context for example in examples]


def generate(model, tokenizer, examples, *, batch_size=20, **options):
    """transformers' greedy answers to examples, in batches."""
    prompts = encode_prompts(tokenizer.backend_tokenizer, *texts_of(examples))
    texts = []
    for first in range(0, len(prompts), batch_size):
        rows = [prompt.ids for prompt in prompts[first : first + batch_size]]
        input_ids, mask = pad_left(rows, tokenizer.eos_token_id)
        config = TorchConfig(
            do_sample=False, pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **options
        )
        with torch.inference_mode():
            generated = model.generate(
                torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask), generation_config=config
            )
        for row in generated[:, input_ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            texts.append(tokenizer.backend_tokenizer.decode(row[:end]).strip())
    return texts


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_ngram_size_is_transformers(starter, answerer, heldout_file, size):
    examples = read_examples(heldout_file)
    # With single tokens transformers also forbids the padding, which is the end-of-text: rows are padded no more then.
    batch_size = 1 if size == 1 else 20
    expected = generate(*starter, examples, batch_size=batch_size, max_new_tokens=12, no_repeat_ngram_size=size)
    config = GenerationConfig(max_new_tokens=12, no_repeat_ngram_size=size)
    assert [answer.text for answer in answerer.answer_batch(*texts_of(examples), config=config)] == expected
    assert expected != generate(*starter, examples, max_new_tokens=12)


def test_the_notebooks_setting_on_real_prompts(starter, answerer, real_data):
    examples = read_examples(real_data / "squad" / "dev.json")[::9][:200]
    expected = generate(*starter, examples, max_new_tokens=8, no_repeat_ngram_size=2)
    config = GenerationConfig(max_new_tokens=8, no_repeat_ngram_size=2)
    assert len(examples) == 200
    assert [answer.text for answer in answerer.answer_batch(*texts_of(examples), config=config)] == expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_the_probabilities_of_draws_are_transformers(temperature, top_k, top_p):
    scores = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3
    scores[5] = -np.inf
    expected = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores)[None])
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = sampling_probabilities(scores, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(got, expected.softmax(dim=-1)[0].numpy(), atol=1e-6)
    assert scores[5] == -np.inf


def test_draws_follow_the_models_probabilities_and_their_seed(answerer, heldout_file):
    examples = read_examples(heldout_file)
    scores = [answer.score for answer in answerer.answer_batch(*texts_of(examples), max_new_tokens=6)]
    example = min(zip(examples, scores, strict=True), key=lambda pair: abs(pair[1] - 0.5))[0]  # not all but sure
    pair = [example.question], [example.context]

    def draw(seed, temperature):
        config = GenerationConfig(temperature=temperature, seed=seed, max_new_tokens=6)
        return answerer.answer_batch(*pair, config=config)[0]

    greedy = answerer.answer(example.question, example.context, max_new_tokens=6)
    assert draw(7, 3.0) == draw(7, 3.0)
    assert len({draw(seed, 3.0).text for seed in range(10)}) > 5
    assert draw(1, 0.01).text == greedy.text
    draws = [draw(seed, 1.0).text == greedy.text for seed in range(300)]
    deviation = np.sqrt(greedy.score * (1 - greedy.score) / 300)
    assert np.mean(draws) >= greedy.score - 4 * deviation  # other tokens may spell the same text


def test_a_draw_is_the_same_alone_and_in_any_batch(answerer, plain_bundle, heldout_file):
    examples = read_examples(heldout_file)[:12]
    config = GenerationConfig(temperature=1.5, top_k=50, top_p=0.95, seed=3, max_new_tokens=8)
    with Answerer.from_pretrained(plain_bundle, provider="cpu", config=EngineConfig(batch_size=5)) as other:
        together = other.answer_batch(*texts_of(examples), config=config)
    assert together == [answerer.answer(e.question, e.context, config=config) for e in examples]


def test_scores_are_what_pytorch_says(starter, answerer, heldout_file):
    model, tokenizer = starter
    examples = read_examples(heldout_file)[:20]
    for example, answer in zip(examples, answerer.answer_batch(*texts_of(examples)), strict=True):
        prompt = encode_prompts(tokenizer.backend_tokenizer, [example.question], [example.context])[0].ids
        closed = [*answer.token_ids, *([tokenizer.eos_token_id] if answer.finish_reason != "length" else [])]
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + closed])).logits[0].log_softmax(dim=-1)
        chosen = logprobs[range(len(prompt) - 1, len(prompt) + len(closed) - 1), closed]
        assert answer.score == pytest.approx(chosen.sum().exp().item(), rel=1e-3)
        assert answer.mean_logprob == pytest.approx(chosen.mean().item(), rel=1e-3)
        none = logprobs[len(prompt) - 1, tokenizer.eos_token_id].exp().item()
        assert answer.no_answer_probability == pytest.approx(none, rel=1e-3)


def test_extractive_answers_are_in_the_context_and_spans_stay_as_they_were(answerer, plain_bundle, heldout_file):
    examples = read_examples(heldout_file)
    # Short answers are cut where a word may end.
    free = answerer.answer_batch(*texts_of(examples), max_new_tokens=2)
    config = GenerationConfig(extractive=True, max_new_tokens=2)
    extractive = answerer.answer_batch(*texts_of(examples), config=config)
    tokens = TokenBytes(load_tokenizer(str(plain_bundle / "tokenizer.json")))
    spans = kept = 0
    for example, before, after in zip(examples, free, extractive, strict=True):
        if after.start is not None:
            assert example.context[after.start : after.end] == after.text != ""
        else:
            assert after.finish_reason == "no_answer"
        constraint = SpanConstraint(Spans(example.context, tokens))
        for index, token in enumerate(before.token_ids):
            if token not in constraint.allowed_ids(2 - index):
                break
            constraint.append(token)
        else:
            if constraint.may_end:
                spans += 1
                kept += (before.text, before.score) == (after.text, after.score)
    assert kept == spans > len(examples) // 3


def test_the_gold_answer_of_every_real_question_can_be_spelled(real_data):
    if not GPT2_TOKENIZER.is_file():
        pytest.skip(f"no tokenizer in {GPT2_TOKENIZER.parent}")
    tokenizer = load_tokenizer(str(GPT2_TOKENIZER))
    tokens = TokenBytes(tokenizer)
    examples = read_examples(real_data / "squad" / "dev.json")
    spans = {context: Spans(context, tokens) for context in {example.context for example in examples}}
    unspelled = []
    for example in examples:
        constraint = SpanConstraint(spans[example.context])
        token_ids = encode_answers(tokenizer, [example.answers[0].text])[0]
        for index, token in enumerate(token_ids):
            if token not in constraint.allowed_ids(len(token_ids) - index):
                break
            constraint.append(token)
        else:
            if constraint.may_end:
                continue
        unspelled.append(example.answers[0].text)
    # Both start or end within a word: "at|tempted to enter the test site", "Japan|ese".
    assert sorted(unspelled) == ["Japan", "tempted to enter the test site"]
    assert 1 - len(unspelled) / len(examples) >= 0.995


def test_two_hundred_tasks_get_what_each_gets_alone(answerer, heldout_file):
    examples = [example for example in read_examples(heldout_file) for _ in range(4)][:200]

    async def ask():
        return await asyncio.gather(*(answerer.answer_async(e.question, e.context) for e in examples))

    alone = {e.id: answerer.answer(e.question, e.context) for e in examples}
    assert asyncio.run(ask()) == [alone[example.id] for example in examples]


@pytest.mark.parametrize("extractive", [False, True])
def test_the_first_of_several_answers_is_no_worse_than_the_greedy_one(answerer, heldout_file, extractive):
    examples = read_examples(heldout_file)[:12]
    greedy = answerer.answer_batch(*texts_of(examples), config=GenerationConfig(extractive=extractive))
    best = answerer.answer_batch(*texts_of(examples), config=GenerationConfig(extractive=extractive, num_answers=3))
    for one, other in zip(greedy, best, strict=True):
        assert other.score >= one.score - 1e-9
        scores = [other.score, *(alternative.score for alternative in other.alternatives)]
        assert scores == sorted(scores, reverse=True)
        assert len({other.text, *(alternative.text for alternative in other.alternatives)}) == 3
