"""The runtime beside PyTorch on the same weights: the same texts, alone and in batches, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.verify import torch_reference
from qa_onnx import Answerer
from qa_onnx.bundle import Bundle
from qa_onnx.engine import Engine, pad_left, position_ids_of
from qa_onnx.kv_cache import KVCache
from qa_onnx.session import Session
from qa_onnx.squad import parse_squad, read_squad
from training.evaluation import generate_answers
from training.model import STARTER, load_model
from training.starter.sample import generate

WORDS = "The river Tolvik is 40 metres wide, and Mara founded a town on it in 1803. Who? Where? Élan 東京 🙂".split()
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def tiny_session(tiny_bundle):
    return Session(Bundle.open(tiny_bundle).model_path, provider="cpu")


@pytest.fixture(scope="module")
def tiny_engine(tiny_session):
    return Engine(tiny_session, heads=4, head_size=8, eos_token_id=0, max_positions=256)


@pytest.fixture(scope="module")
def tiny_answerer(tiny_bundle):
    with Answerer.from_pretrained(tiny_bundle, provider="cpu") as answerer:
        yield answerer


def mixed_prompts(count, seed=1, vocab_size=600):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, vocab_size, draw.integers(1, 120)).tolist() for _ in range(count)]


def test_the_tiny_model_says_different_things(tiny):
    tokens = {tuple(torch_reference(tiny[0], prompt).tokens) for prompt in mixed_prompts(8)}
    assert len(tokens) == 8


def test_left_padding_of_any_width_changes_no_logits(tiny, tiny_session):
    prompt = mixed_prompts(1)[0]
    expected = torch_reference(tiny[0], prompt).logits[0]
    for padding in (0, 1, 50):
        attention_mask = np.array([[0] * padding + [1] * len(prompt)])
        outputs = tiny_session.run(
            {
                "input_ids": np.array([[7] * padding + prompt]),
                "attention_mask": attention_mask,
                "position_ids": position_ids_of(attention_mask),
                **KVCache.empty(tiny_session, batch_size=1, heads=4, head_size=8).values,
            }
        )
        np.testing.assert_allclose(outputs["logits"].numpy()[0], expected, atol=1e-4)


def test_padding_between_the_past_and_the_new_token_changes_no_logits(tiny, tiny_session):
    """What right padding leaves behind: a gap in the cache, between the prompt and the tokens after it."""
    prompt = mixed_prompts(1, seed=3)[0]
    expected = torch_reference(tiny[0], prompt).logits[0]
    first, last = prompt[:-1], prompt[-1:]
    mask = np.array([[1] * len(first) + [0] * 9])
    outputs = tiny_session.run(
        {
            "input_ids": np.array([first + [7] * 9]),
            "attention_mask": mask,
            "position_ids": position_ids_of(mask),
            **KVCache.empty(tiny_session, batch_size=1, heads=4, head_size=8).values,
        }
    )
    cache = KVCache.empty(tiny_session, batch_size=1, heads=4, head_size=8).updated(outputs)
    mask = np.concatenate([mask, [[1]]], axis=1)
    outputs = tiny_session.run(
        {
            "input_ids": np.array([last]),
            "attention_mask": mask,
            "position_ids": position_ids_of(mask)[:, -1:],
            **cache.values,
        }
    )
    np.testing.assert_allclose(outputs["logits"].numpy()[0], expected, atol=1e-4)


def test_a_row_of_nothing_but_padding_makes_no_nan_and_does_not_touch_its_neighbour(tiny, tiny_session):
    prompt = mixed_prompts(1)[0]
    input_ids, attention_mask = pad_left([prompt, prompt], pad_id=0)
    attention_mask[1] = 0
    outputs = tiny_session.run(
        {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids_of(attention_mask),
            **KVCache.empty(tiny_session, batch_size=2, heads=4, head_size=8).values,
        }
    )
    assert all(np.isfinite(value.numpy()).all() for value in outputs.values())
    np.testing.assert_allclose(outputs["logits"].numpy()[0], torch_reference(tiny[0], prompt).logits[0], atol=1e-4)


def test_bound_runs_give_what_plain_runs_give(tiny_bundle, tiny_session):
    import onnxruntime

    input_ids, attention_mask = pad_left(mixed_prompts(4), pad_id=0)
    empty = np.zeros((4, 4, 0, 8), np.float32)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids_of(attention_mask)}
    inputs |= {name: empty for name in tiny_session.input_names if name not in inputs}
    plain = onnxruntime.InferenceSession(str(tiny_bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    for (name, bound), expected in zip(tiny_session.run(inputs).items(), plain.run(None, inputs), strict=True):
        np.testing.assert_array_equal(bound.numpy(), expected, err_msg=name)


def test_greedy_tokens_are_pytorchs_in_a_batch_of_mixed_lengths(tiny, tiny_engine):
    prompts = mixed_prompts(24)
    generations = tiny_engine.greedy_decode(prompts, max_new_tokens=8)
    for prompt, generation in zip(prompts, generations, strict=True):
        tokens = torch_reference(tiny[0], prompt).tokens
        assert generation.token_ids == (tokens[: tokens.index(0)] if 0 in tokens else tokens)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=12), batch_size=st.integers(1, 12))
def test_a_question_gets_the_same_answer_alone_and_in_any_batch(tiny_answerer, pairs, batch_size):
    questions, contexts = [question for question, _ in pairs], [context for _, context in pairs]
    together = tiny_answerer.answer_batch(questions, contexts, max_new_tokens=6, batch_size=batch_size)
    alone = [
        tiny_answerer.answer(question, context, max_new_tokens=6)
        for question, context in zip(questions, contexts, strict=True)
    ]
    assert together == alone


def test_threads_share_an_answerer(tiny_answerer):
    examples = parse_squad(generate("heldout", questions=24), source="sample")
    expected = tiny_answerer.answer_batch([e.question for e in examples], [e.context for e in examples])
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda example: tiny_answerer.answer(example.question, example.context), examples)
        assert list(answers) == expected


def test_the_trained_starter_answers_as_pytorch_does(starter_bundle, heldout_file):
    examples = read_squad(heldout_file)
    model, tokenizer = load_model(str(STARTER))
    expected = generate_answers(model, tokenizer, examples, max_new_tokens=12, progress=False)
    with Answerer.from_pretrained(starter_bundle, provider="cpu") as answerer:
        answers = answerer.answer_batch(
            [e.question for e in examples], [e.context for e in examples], max_new_tokens=12, batch_size=7
        )
    assert {e.id: answer.text for e, answer in zip(examples, answers, strict=True)} == expected


def test_real_questions_get_pytorchs_answers(starter_bundle, real_data):
    examples = read_squad(real_data / "squad" / "dev.json")[::50]
    model, tokenizer = load_model(str(STARTER))
    expected = generate_answers(model, tokenizer, examples, max_new_tokens=12, progress=False)
    with Answerer.from_pretrained(starter_bundle, provider="cpu") as answerer:
        answers = answerer.answer_batch(
            [e.question for e in examples], [e.context for e in examples], max_new_tokens=12
        )
    assert {e.id: answer.text for e, answer in zip(examples, answers, strict=True)} == expected


def test_the_torch_side_does_not_depend_on_batching_either(tiny):
    model, tokenizer = tiny
    examples = parse_squad(generate("heldout", questions=20), source="sample")
    together = generate_answers(model, tokenizer, examples, max_new_tokens=6, progress=False)
    alone = generate_answers(model, tokenizer, examples, max_new_tokens=6, batch_size=1, progress=False)
    assert together == alone
    assert not model.training
    assert torch.is_grad_enabled()
