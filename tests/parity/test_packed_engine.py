"""The packed graph over shared passages against PyTorch: tokens, and the same bits in any batch, in fp32 and int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from transformers import GPT2LMHeadModel

from export.decoder import QuantizedWeight, build_decoder
from export.verify import torch_reference
from qa_onnx.packed_engine import PackedEngine
from qa_onnx.planner import plan_groups
from qa_onnx.prompt import Prompt
from qa_onnx.session import Session
from qa_onnx.shared_cache import CacheLayout, PassageCache

LAYOUT = CacheLayout(layers=2, heads=4, head_size=8)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module", params=["fp32", "int8"])
def session(request, tiny, tmp_path_factory):
    weights = {
        name.removeprefix("transformer."): tensor.numpy()
        for name, tensor in tiny.state_dict().items()
        if name != "lm_head.weight"
    }
    quantized = {}
    if request.param == "int8":
        for name, array in weights.items():
            if array.ndim == 2 and name != "wpe.weight":
                matrix = array.T if name == "wte.weight" else array
                scales = (np.abs(matrix).max(axis=0) / 127).astype(np.float32)
                quantized[name] = QuantizedWeight(values=np.round(matrix / scales).astype(np.int8), scales=scales)
    path = tmp_path_factory.mktemp("packed") / "model.onnx"
    onnx.save(build_decoder(weights, tiny.config, quantized), path)
    return Session(path, provider="cpu"), request.param


def engine_of(session, *, cache_bytes=0):
    return PackedEngine(
        session, layout=LAYOUT, eos_token_id=0, max_positions=256, passage_cache=PassageCache(cache_bytes)
    )


def mixed_prompts(seed=1, passages=7, questions=24):
    """Questions of 1 to 40 tokens, on passages of none to 120; some passages have many questions."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(1, 600, draw.integers(1, 120)).tolist() for _ in range(passages)] + [[]]
    return [
        Prompt(
            passage_ids=texts[min(draw.integers(0, passages + 1), draw.integers(0, passages + 1))],
            question_ids=draw.integers(1, 600, draw.integers(1, 40)).tolist(),
        )
        for _ in range(questions)
    ]


def decode(session, prompts, batch_size):
    return engine_of(session).greedy_decode(prompts, max_new_tokens=20, batch_size=batch_size)


def test_logits_and_tokens_are_pytorchs(tiny, session):
    onnx_session, precision = session
    prompts = mixed_prompts()
    references = [torch_reference(tiny, prompt.ids) for prompt in prompts]
    engine = engine_of(onnx_session)
    state = engine.prefill(prompts, list(plan_groups(prompts, max_rows=64)))
    for step in range(8):
        expected = np.stack([references[prompt].logits[step] for prompt in state.prompts])
        if precision == "fp32":
            np.testing.assert_allclose(state.logits, expected, atol=1e-4)
        else:  # nothing is left of a tiny random model but the likeness
            assert np.corrcoef(state.logits.ravel(), expected.ravel())[0, 1] > 0.99
        state = engine.decode_step(state, np.array([references[prompt].tokens[step] for prompt in state.prompts]))


def test_a_prompt_gets_the_same_bits_alone_and_in_any_batch(session):
    onnx_session, _ = session
    prompts = mixed_prompts(seed=2)
    together = engine_of(onnx_session).prefill(prompts, list(plan_groups(prompts, max_rows=64)))
    for logits, prompt in zip(together.logits, together.prompts.tolist(), strict=True):
        single = [prompts[prompt]]
        alone = engine_of(onnx_session).prefill(single, list(plan_groups(single, max_rows=1)))
        np.testing.assert_array_equal(alone.logits[0], logits)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_batch_size_refilling_and_cached_passages_change_no_token(session, batch_size):
    onnx_session, _ = session
    prompts = mixed_prompts(seed=3, questions=40)
    expected = [decode(onnx_session, [prompt], 1)[0] for prompt in prompts]
    assert decode(onnx_session, prompts, batch_size) == expected
    engine = engine_of(onnx_session, cache_bytes=10**6)
    for _ in range(2):
        assert engine.greedy_decode(prompts, max_new_tokens=20, batch_size=batch_size) == expected


def test_the_passage_cache_keeps_to_its_bytes_and_forgets_the_oldest():
    cache = PassageCache(100)
    for name in (1, 2, 3):
        cache.put((name,), np.zeros(10, np.float32))
    assert (cache.get((1,)), len(cache), cache.nbytes) == (None, 2, 80)
    assert cache.get((3,)) is not None
