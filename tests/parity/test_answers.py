"""The runtime against PyTorch on the same weights: the same texts, alone and in batches, from any thread."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from qa_onnx import Answerer, EngineConfig
from qa_onnx.bundle import Bundle
from qa_onnx.data.reader import read_examples
from qa_onnx.data.squad import parse_squad
from qa_onnx.engine.sequence import Prompt
from tests.parity.engines import load_engine, prefill, save_graphs
from training.evaluation import generate_answers
from training.model import load_model
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


@pytest.fixture(scope="module")
def answerer_with(tiny_bundle):
    """Answerers of the tiny bundle by their batch size."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def load(batch_size):
            config = EngineConfig(batch_size=batch_size)
            return opened.enter_context(Answerer.from_pretrained(tiny_bundle, provider="cpu", config=config))

        yield load


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=12), batch_size=st.integers(1, 12))
def test_a_question_gets_the_same_answer_alone_and_in_any_batch(tiny_answerer, answerer_with, pairs, batch_size):
    questions, contexts = [question for question, _ in pairs], [context for _, context in pairs]
    together = answerer_with(batch_size).answer_batch(questions, contexts, max_new_tokens=6)
    alone = [
        tiny_answerer.answer(question, context, max_new_tokens=6)
        for question, context in zip(questions, contexts, strict=True)
    ]
    assert together == alone


def test_questions_of_up_to_200_tokens_get_the_same_bits_alone_and_in_a_batch(starter_bundle, heldout_file):
    """With heads of 64, as GPT-2's are: products of other sizes are added up in other orders."""
    examples = read_examples(heldout_file)
    words = " ".join(example.context for example in examples).split()
    pairs = [(e.question, " ".join(words[index : index + 9 * index + 10])) for index, e in enumerate(examples[:12])]
    config = EngineConfig(prefix_cache_bytes=0)
    with Answerer.from_pretrained(starter_bundle, provider="cpu", config=config) as answerer:
        together = answerer.answer_batch(*zip(*pairs, strict=True), max_new_tokens=6)
        assert 150 < max(answer.prompt_tokens for answer in together) + 6 <= 200
        assert [answerer.answer(*pair, max_new_tokens=6) for pair in pairs] == together


def test_threads_share_an_answerer(tiny_answerer):
    examples = parse_squad(generate("heldout", questions=24), source="sample")
    expected = tiny_answerer.answer_batch([e.question for e in examples], [e.context for e in examples])
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda example: tiny_answerer.answer(example.question, example.context), examples)
        assert list(answers) == expected


def expected_of_starter(bundle, examples):
    """PyTorch's answers, with the bundle's windows and its threshold."""
    model, tokenizer = load_model("starter")
    manifest = Bundle.open(bundle).manifest
    assert manifest.no_answer_threshold is not None
    return generate_answers(
        model,
        tokenizer,
        examples,
        max_new_tokens=12,
        windows=manifest.window_settings,
        no_answer_threshold=manifest.no_answer_threshold,
        progress=False,
    )


def test_the_trained_starter_answers_as_pytorch_does(starter_bundle, heldout_file):
    examples = read_examples(heldout_file)
    expected = expected_of_starter(starter_bundle, examples)
    with Answerer.from_pretrained(starter_bundle, provider="cpu", config=EngineConfig(batch_size=7)) as answerer:
        answers = answerer.answer_batch(
            [e.question for e in examples], [e.context for e in examples], max_new_tokens=12
        )
    assert {e.id: answer.text for e, answer in zip(examples, answers, strict=True)} == expected


def test_real_questions_get_pytorchs_answers(starter_bundle, real_data):
    examples = read_examples(real_data / "squad" / "dev.json")[::50]
    expected = expected_of_starter(starter_bundle, examples)
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


def test_long_documents_are_answered_as_pytorch_answers_their_windows(tiny, tiny_answerer):
    model, tokenizer = tiny
    examples = parse_squad(generate("heldout", questions=8), source="sample")
    together = " ".join(example.context for example in examples)
    examples = [dataclasses.replace(example, context=together[start:]) for start, example in enumerate(examples)]
    expected = generate_answers(model, tokenizer, examples, max_new_tokens=6, progress=False)
    answers = tiny_answerer.answer_batch(
        [e.question for e in examples], [e.context for e in examples], max_new_tokens=6
    )
    assert {answer.windows for answer in answers} > {1} or min(answer.windows for answer in answers) > 1
    assert {e.id: answer.text for e, answer in zip(examples, answers, strict=True)} == expected


def test_long_prefixes_get_the_same_bits_in_any_batch(tmp_path):
    """A product of attention adds up 256 columns at a time (head size 64): padding must not move these blocks."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=700, n_embd=128, n_layer=2, n_head=2, initializer_range=0.2)
    layout = save_graphs(GPT2LMHeadModel(config), tmp_path)
    engine = load_engine(tmp_path, layout, max_positions=700)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(prefix_ids=draw.integers(300, size=length).tolist(), suffix_ids=[1, 2, 3 + index])
        for index, length in enumerate((20, 130, 250, 270, 300, 420, 530, 600))
    ]
    batch, order, together = prefill(engine, prompts)
    tokens = [5 + number for number in order]
    steps = [together.logprobs.copy(), engine.decode_step(batch, tokens).logprobs.copy()]
    for place, number in enumerate(order):
        single, _, alone = prefill(engine, [prompts[number]], max_rows=1)
        np.testing.assert_array_equal(alone.logprobs[0], steps[0][place])
        np.testing.assert_array_equal(engine.decode_step(single, [tokens[place]]).logprobs[0], steps[1][place])


def test_padding_around_a_passage_does_not_drown_its_answer(starter_bundle):
    passage = (
        "Velden Bridge crosses the Tolvik. It was opened in 1803 and is 412 metres long. The engineer Mara Lindqvist "
        "designed it for the town of Aldersund."
    )
    answers = {
        "When was Velden Bridge opened?": "1803",
        "How long is Velden Bridge?": "412 metres",
    }
    padded = f"{'blah ' * 1500}{passage}{' blah' * 1500}"
    with Answerer.from_pretrained(starter_bundle, provider="cpu") as answerer:
        for context in (passage, padded):
            found = answerer.answer_batch(list(answers), context)
            assert [answer.text for answer in found] == list(answers.values())
            assert all(answer.text == context[answer.start : answer.end] for answer in found)
    assert min(answer.windows for answer in found) > 10
