"""The runtime beside PyTorch on the same weights: the same texts, alone and in batches, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qa_onnx import Answerer
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
def tiny_answerer(tiny_bundle):
    with Answerer.from_pretrained(tiny_bundle, provider="cpu") as answerer:
        yield answerer


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
