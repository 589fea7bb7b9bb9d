"""The runtime's graph against PyTorch: log-probabilities, tokens, and the same bits in any batch, in fp32 and int8."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from export.decoder import build_decoder
from export.parity import torch_reference
from export.weights import extract_weights
from qa_onnx import GenerationConfig, InvalidInputError, ParityError
from qa_onnx.engine.scheduler import generate
from qa_onnx.engine.session import Binding, Session
from tests.kernels import needs_kernels
from tests.parity.engines import EOS, load_engine, mixed_prompts, prefill, run, save_graphs, torch_weights


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module", params=["fp32", "int8", "fp32 kernels", "int8 kernels", "bf16 kernels"])
def graphs(request, tiny, tmp_path_factory):
    """A directory with the graphs of the tiny model, their cache layout, the precision, and whether it has kernels."""
    directory = tmp_path_factory.mktemp("graphs")
    precision, *kernels = request.param.split()
    if kernels:
        needs_kernels(precision)
    layout = save_graphs(tiny, directory, precision=precision, has_kernels=bool(kernels))
    return directory, layout, precision, bool(kernels)


def engine_of(graphs, **options):
    directory, layout, _, has_kernels = graphs
    return load_engine(directory, layout, has_kernels=has_kernels, **options)


def decode(graphs, prompts, batch_size, **options):
    config = GenerationConfig(max_new_tokens=20)
    return generate(engine_of(graphs, **options), prompts, config, batch_size=batch_size)


def test_logprobs_and_tokens_are_pytorchs(tiny, graphs):
    prompts = mixed_prompts()
    references = [torch_reference(tiny, prompt) for prompt in prompts]
    engine = engine_of(graphs)
    batch, order, predictions = prefill(engine, prompts)
    for step in range(8):
        expected = np.stack([references[number].logprobs[step] for number in order])
        if graphs[2] == "fp32":
            np.testing.assert_allclose(predictions.logprobs, expected, atol=1e-4)
        else:  # nothing is left of a tiny random model but the likeness
            assert np.corrcoef(predictions.logprobs.ravel(), expected.ravel())[0, 1] > 0.99
        predictions = engine.decode_step(batch, [references[number].tokens[step] for number in order])


def test_the_token_that_the_graph_chooses_is_that_of_its_logprobs(graphs):
    """On the CPU the engine chooses in numpy; on CUDA the graph does, and its log-probabilities stay there."""
    if graphs[3]:
        pytest.skip("the graph with kernels is for the CPU, and chooses nothing")

    class Choosing(Session):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.limits = replace(self.limits, chooses_on_host=False)

    prompts = mixed_prompts(seed=8)
    engines = engine_of(graphs), engine_of(graphs, session_class=Choosing)
    (batch, order, here), (other, same_order, there) = (prefill(engine, prompts) for engine in engines)
    assert order == same_order
    for _ in range(4):
        assert here.logprobs is not None
        assert there.logprobs is None
        for name in ("token_ids", "token_logprobs", "eos_logprobs"):
            np.testing.assert_array_equal(getattr(there, name), getattr(here, name), err_msg=name)
        token_ids = here.token_ids.copy()
        here, there = engines[0].decode_step(batch, token_ids), engines[1].decode_step(other, token_ids)


def test_a_prompt_gets_the_same_bits_alone_and_in_any_batch(graphs):
    prompts = mixed_prompts(seed=2)
    _, order, together = prefill(engine_of(graphs), prompts)
    for logprobs, number in zip(together.logprobs, order, strict=True):
        _, _, alone = prefill(engine_of(graphs), [prompts[number]], max_rows=1)
        np.testing.assert_array_equal(alone.logprobs[0], logprobs)


def steps_of(engine, prompts, tokens):
    """The log-probabilities, float32 [N, V], of prompts that are fed given tokens (int [N, T]), by prompt."""
    batch, order, predictions = prefill(engine, prompts)
    found = [predictions.logprobs.copy()]
    for step in range(tokens.shape[1]):
        found.append(engine.decode_step(batch, tokens[order, step]).logprobs.copy())
    engine.release(batch)
    return {number: np.stack([rows[place] for rows in found]) for place, number in enumerate(order)}


def test_every_step_gives_the_same_bits_after_neighbors_left_the_batch(graphs):
    prompts = mixed_prompts(seed=6)
    tokens = np.random.default_rng(6).integers(1, 600, (len(prompts), 24))
    engine = engine_of(graphs)
    batch, order, predictions = prefill(engine, prompts)
    found = {number: [predictions.logprobs[place].copy()] for place, number in enumerate(order)}
    draw = np.random.default_rng(0)
    for step in range(tokens.shape[1]):
        if step % 4 == 3 and len(order) > 2:
            kept = sorted(draw.permutation(len(order))[: len(order) * 2 // 3].tolist())
            batch.keep(kept)
            order = [order[place] for place in kept]
        logprobs = engine.decode_step(batch, tokens[order, step]).logprobs
        for place, number in enumerate(order):
            found[number].append(logprobs[place].copy())
    assert len({len(steps) for steps in found.values()}) > 4
    for number, steps in found.items():
        count = len(steps) - 1
        alone = steps_of(engine_of(graphs), [prompts[number]], tokens[[number], :count])[0]
        np.testing.assert_array_equal(np.stack(steps), alone)


def test_every_step_gives_the_same_bits_in_a_batch_that_was_refilled(graphs):
    prompts = mixed_prompts(seed=9)
    config = GenerationConfig(max_new_tokens=18, ignore_eos=True)
    alone = [run(engine_of(graphs), [prompt], config, batch_size=1)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens, *_ in alone}) > 12
    for batch_size in (2, 5, 64):
        assert run(engine_of(graphs), prompts, config, batch_size=batch_size) == alone


def test_a_prefix_gives_the_same_bits_from_the_cache_and_after_it_was_evicted(graphs):
    prompts = mixed_prompts(seed=10)
    config = GenerationConfig(max_new_tokens=10, ignore_eos=True)
    expected = [run(engine_of(graphs), [prompt], config, batch_size=1)[0] for prompt in prompts]
    engine = engine_of(graphs, cache_bytes=2 * 128 * graphs[1].bytes_per_token)  # room for two or three of seven
    for batch_size in (1, 4, 1):
        for number in np.random.default_rng(batch_size).permutation(len(prompts)).tolist():
            assert run(engine, [prompts[number]], config, batch_size=batch_size) == [expected[number]]
    assert run(engine, prompts, config, batch_size=4) == expected
    stats = engine.prefix_cache.stats()
    assert stats.hits > 3
    assert stats.evictions > 10
    engine.release_memory()
    assert engine.prefix_cache.stats().entries == 0
    assert run(engine, prompts, config, batch_size=64) == expected


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_sequences_get_the_same_bits_when_neighbors_are_aborted(graphs, batch_size):
    prompts = mixed_prompts(seed=12)
    config = GenerationConfig(max_new_tokens=16, ignore_eos=True)
    alone = [run(engine_of(graphs), [prompt], config, batch_size=1)[0] for prompt in prompts]
    aborted = set(range(0, len(prompts), 2))
    for steps in (0, 1, 6):
        engine = engine_of(graphs, cache_bytes=10**6)
        found = run(engine, prompts, config, batch_size=batch_size, aborted=aborted, abort_after=steps)
        for number, (got, expected) in enumerate(zip(found, alone, strict=True)):
            if number in aborted:
                assert len(got[0]) < 16 or batch_size < len(prompts)
                assert got[0] == expected[0][: len(got[0])]
                assert got[1] == expected[1][: len(got[1])]
            else:
                assert got == expected
        assert sum(len(found[number][0]) < 16 for number in aborted) > 6


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_batch_size_refilling_and_cached_prefixes_change_no_token(graphs, batch_size):
    prompts = mixed_prompts(seed=3, count=40)
    expected = [decode(graphs, [prompt], 1)[0] for prompt in prompts]
    assert decode(graphs, prompts, batch_size) == expected
    engine, config = engine_of(graphs, cache_bytes=10**6), GenerationConfig(max_new_tokens=20)
    for _ in range(2):
        assert generate(engine, prompts, config, batch_size=batch_size) == expected
    assert engine.prefix_cache.stats().hits > 0


def test_the_tiny_model_says_different_things(tiny):
    assert len({tuple(torch_reference(tiny, prompt).tokens) for prompt in mixed_prompts()}) > 12


def test_what_is_written_in_place_is_what_a_plain_run_gives(graphs):
    """`TensorScatter` writes into its input; ONNX Runtime without bindings makes a new array."""

    def array_of(view):
        return np.array(view.memory.numpy()[view.offset :][: int(np.prod(view.shape))]).reshape(view.shape)

    class ComparedBinding(Binding):
        def __init__(self, session, plain):
            super().__init__(session)
            self.plain, self.given, self.written = plain, {}, {}

        def set_array(self, name, array):
            super().set_array(name, array)
            self.given[name] = lambda: array

        def set_input(self, name, view):
            super().set_input(name, view)
            self.given[name] = lambda: array_of(view)

        def set_output(self, name, view):
            super().set_output(name, view)
            self.written[name] = view

        def run(self, *, graph_id=None):
            names = [value.name for value in self.plain.get_outputs()]
            arrays = {name: give() for name, give in self.given.items()}
            expected = dict(zip(names, self.plain.run(None, arrays), strict=True))
            outputs = super().run(graph_id=graph_id)
            written = {name: array_of(view) for name, view in self.written.items()}
            for name, value in (outputs | written).items():
                np.testing.assert_array_equal(value, expected[name], err_msg=name)
            compared.append(len(outputs) + len(written))
            return outputs

    class Compared(Session):
        def make_binding(self):
            return ComparedBinding(self, self._session)

    compared = []
    decode(graphs, mixed_prompts(seed=4), 8, session_class=Compared, cache_bytes=10**6)
    assert {4, 5} == set(compared)  # copies and prefixes write keys and values of two layers; the rest give logprobs
    assert len(compared) > 30


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
    assert extract_weights(plain_graph(embedding, embedding.T.copy())).keys() == {"wte.weight"}


def test_output_weights_of_their_own_are_kept():
    embedding, output_weights = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    weights = extract_weights(plain_graph(embedding, output_weights.T.copy()))
    np.testing.assert_array_equal(weights["lm_head.weight"], output_weights)


def test_a_graph_that_ends_in_something_else_is_refused():
    embedding = np.ones((9, 4), np.float32)
    model = plain_graph(embedding, embedding.T.copy())
    model.graph.node[1].op_type = "Einsum"
    with pytest.raises(ParityError, match="logits by Einsum; expected MatMul"):
        extract_weights(model)


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
        build_decoder(torch_weights(tiny), config, eos_token_id=EOS)


def test_a_float16_graph_keeps_residuals_in_float32_and_is_near_pytorch(tiny, tmp_path):
    """fp16 runs on CUDA; the CPU computes the same graph through conversions."""
    tiny = copy.deepcopy(tiny)
    with torch.no_grad():  # a residual channel of GPT-2's kind, beyond what float16 holds
        tiny.transformer.h[0].mlp.c_proj.bias[3] = 60_000
        tiny.transformer.h[1].mlp.c_proj.bias[3] = 60_000
    layout = save_graphs(tiny, tmp_path, precision="fp16")
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    engine = load_engine(tmp_path, layout)
    prompts = mixed_prompts(seed=5)
    references = [torch_reference(tiny, prompt) for prompt in prompts]
    batch, order, predictions = prefill(engine, prompts)
    assert batch.suffix.memory.numpy().dtype == batch.prefix.memory.numpy().dtype == np.float16
    for step in range(4):
        expected = np.stack([references[number].logprobs[step] for number in order])
        assert np.isfinite(predictions.logprobs).all()
        assert np.corrcoef(predictions.logprobs.ravel(), expected.ravel())[0, 1] > 0.999
        predictions = engine.decode_step(batch, [references[number].tokens[step] for number in order])


def test_a_weight_beyond_float16_is_refused(tiny):
    weights = torch_weights(tiny) | {"h.0.mlp.c_fc.weight": np.full((32, 128), 1e5, np.float32)}
    with pytest.raises(ParityError, match=r"'h\.0\.mlp\.c_fc\.weight' is too large for float16"):
        build_decoder(weights, tiny.config, eos_token_id=EOS, float16=True)
