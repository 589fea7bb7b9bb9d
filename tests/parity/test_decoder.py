"""The runtime's graph against PyTorch: logits, tokens, and the same bits in any batch, in fp32 and int8."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from export.decoder import QuantizedWeight, build_decoder, weights_of
from export.verify import torch_reference
from qa_onnx import InvalidInputError, ParityError
from qa_onnx.decoding import greedy_decode
from qa_onnx.engine import Engine
from qa_onnx.kv_cache import CacheLayout, PassageCache
from qa_onnx.planner import plan_groups
from qa_onnx.prompt import Prompt
from qa_onnx.session import Session

LAYOUT = CacheLayout(layers=2, heads=4, head_size=8)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()


def weights_of_torch(model):
    state = model.state_dict().items()
    return {name.removeprefix("transformer."): tensor.numpy() for name, tensor in state if name != "lm_head.weight"}


@pytest.fixture(scope="module", params=["fp32", "int8"])
def session(request, tiny, tmp_path_factory):
    weights = weights_of_torch(tiny)
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
    return Engine(session, layout=LAYOUT, eos_token_id=0, max_positions=256, passage_cache=PassageCache(cache_bytes))


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
    return greedy_decode(engine_of(session), prompts, max_new_tokens=20, batch_size=batch_size)


def test_logits_and_tokens_are_pytorchs(tiny, session):
    onnx_session, precision = session
    prompts = dict(enumerate(mixed_prompts()))
    references = [torch_reference(tiny, prompt) for prompt in prompts.values()]
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
    prompts = dict(enumerate(mixed_prompts(seed=2)))
    together = engine_of(onnx_session).prefill(prompts, list(plan_groups(prompts, max_rows=64)))
    for logits, prompt in zip(together.logits, together.prompts.tolist(), strict=True):
        single = {0: prompts[prompt]}
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
        assert greedy_decode(engine, prompts, max_new_tokens=20, batch_size=batch_size) == expected


def test_the_tiny_model_says_different_things(tiny):
    assert len({tuple(torch_reference(tiny, prompt).tokens) for prompt in mixed_prompts()}) > 12


def test_what_is_written_in_place_is_what_a_plain_run_gives(session):
    """`TensorScatter` writes into its input; ONNX Runtime without bindings makes a new array."""
    onnx_session, _ = session
    plain = onnxruntime.InferenceSession(str(onnx_session.path), providers=["CPUExecutionProvider"])

    class Compared(Session):
        def run(self, inputs, *, in_place):
            arrays = {
                name: np.array(getattr(value, "numpy", lambda value=value: value)()) for name, value in inputs.items()
            }
            expected = dict(zip(self.output_names, plain.run(None, arrays), strict=True))
            outputs = super().run(inputs, in_place=in_place)
            for name, value in (outputs | in_place).items():
                np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)
            return outputs

    decode(Compared(onnx_session.path, provider="cpu"), mixed_prompts(seed=4), 8)


def plain_graph(embedding, output_weights):
    nodes = [
        onnx.helper.make_node("Gather", ["transformer.wte.weight", "ids"], ["hidden"], name="/transformer/wte/Gather"),
        onnx.helper.make_node("MatMul", ["hidden", "output_weights"], ["logits"]),
    ]
    stored = {"transformer.wte.weight": embedding, "output_weights": output_weights}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", "t"])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", "t", 9])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return onnx.helper.make_model(graph)


def test_a_transposed_copy_of_the_embedding_is_dropped():
    """Larger models are exported with the output weights written a second time."""
    embedding = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert weights_of(plain_graph(embedding, embedding.T.copy())).keys() == {"wte.weight"}


def test_output_weights_of_their_own_are_kept():
    embedding, output_weights = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    weights = weights_of(plain_graph(embedding, output_weights.T.copy()))
    np.testing.assert_array_equal(weights["lm_head.weight"], output_weights)


def test_a_graph_that_ends_in_something_else_is_refused():
    embedding = np.ones((9, 4), np.float32)
    model = plain_graph(embedding, embedding.T.copy())
    model.graph.node[1].op_type = "Einsum"
    with pytest.raises(ParityError, match="logits by Einsum; expected MatMul"):
        weights_of(model)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"activation_function": "silu"}, InvalidInputError, "'silu'; expected one of gelu_new"),
        ({"add_cross_attention": True}, InvalidInputError, "cross-attention"),
        ({"n_layer": 3}, ParityError, "no weight 'h.2.ln_1.weight'"),
        ({"n_layer": 1}, ParityError, "weights that the runtime does not use: h.1"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tiny, setting, error, message):
    config = GPT2Config(**{**tiny.config.to_dict(), **setting})
    with pytest.raises(error, match=message):
        build_decoder(weights_of_torch(tiny), config)


def test_a_half_graph_keeps_residuals_in_float32_and_is_near_pytorch(tiny, tmp_path):
    """fp16 runs on CUDA; the CPU computes the same graph through conversions."""
    tiny = copy.deepcopy(tiny)
    with torch.no_grad():  # a residual channel of GPT-2's kind, beyond what float16 holds
        tiny.transformer.h[0].mlp.c_proj.bias[3] = 60_000
        tiny.transformer.h[1].mlp.c_proj.bias[3] = 60_000
    path = tmp_path / "model.onnx"
    model = build_decoder(weights_of_torch(tiny), tiny.config, half=True)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    half = CacheLayout(layers=2, heads=4, head_size=8, dtype="float16")
    engine = Engine(
        Session(path, provider="cpu"), layout=half, eos_token_id=0, max_positions=256, passage_cache=PassageCache(0)
    )
    prompts = dict(enumerate(mixed_prompts(seed=5)))
    references = [torch_reference(tiny, prompt) for prompt in prompts.values()]
    state = engine.prefill(prompts, list(plan_groups(prompts, max_rows=64)))
    assert state.grid.own.dtype == np.float16
    for step in range(4):
        expected = np.stack([references[prompt].logits[step] for prompt in state.prompts])
        assert np.isfinite(state.logits).all()
        assert np.corrcoef(state.logits.ravel(), expected.ravel())[0, 1] > 0.999
        state = engine.decode_step(state, np.array([references[prompt].tokens[step] for prompt in state.prompts]))


def test_a_weight_beyond_float16_is_refused(tiny):
    weights = weights_of_torch(tiny) | {"h.0.mlp.c_fc.weight": np.full((32, 128), 1e5, np.float32)}
    with pytest.raises(ParityError, match=r"'h\.0\.mlp\.c_fc\.weight' is too large for float16"):
        build_decoder(weights, tiny.config, half=True)
