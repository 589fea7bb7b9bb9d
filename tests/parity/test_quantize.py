"""int8: calibration, the report in the manifest, and the limit on what it may lose."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2LMHeadModel

from export import quantize as quantize_module
from export import to_onnx
from export.quantize import MAX_MATMUL_ERROR, compare_precisions, quantize, quantize_model
from qa_onnx import Answerer, EngineConfig, ParityError, ProviderError
from qa_onnx.engine.scheduler import Generation
from qa_onnx.engine.sequence import Prompt
from tests.parity.engines import torch_weights
from training.starter.sample import generate

PROMPTS = [Prompt(prefix_ids=list(range(1, 40)), suffix_ids=[5, length, 9]) for length in range(1, 9)]


@pytest.fixture
def tiny(tiny_model_dir):
    return GPT2LMHeadModel.from_pretrained(tiny_model_dir).eval()


def write_sample(path, questions):
    path.write_text(json.dumps(generate("heldout", questions=questions)))
    return path


def test_each_column_is_rounded_on_its_own():
    matrix = np.array([[1.0, -1000.0, 0.0], [-0.5, 3.0, 0.0]], np.float32)
    quantized = quantize(matrix)
    assert quantized.values.dtype == np.int8
    assert quantized.values.tolist() == [[127, -127, 0], [-64, 0, 0]]
    np.testing.assert_allclose(quantized.values * quantized.scales, matrix, atol=1000 / 127)
    np.testing.assert_allclose((quantized.values * quantized.scales)[:, 0], matrix[:, 0], atol=1 / 127)


def logprobs_of(weights, model, prompt):
    """What a model with other weights says of the next token."""
    changed = copy.deepcopy(model)
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    changed.transformer.load_state_dict(state, strict=False)
    with torch.no_grad():
        return changed(torch.tensor([prompt.ids])).logits[0, -1].log_softmax(dim=-1)


def test_an_input_with_an_outlier_is_smoothed_and_the_model_computes_the_same(tiny):
    with torch.no_grad():  # the same function; but the other channels' scale follows one of 100 times their size
        for layer, target in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            tiny.get_submodule(f"transformer.h.1.{layer}").weight[3] *= 100
            tiny.get_submodule(f"transformer.h.1.{layer}").bias[3] *= 100
            tiny.get_submodule(f"transformer.h.1.{target}").weight[3] /= 100
    weights = torch_weights(tiny)
    quantized = quantize_model(tiny, weights, PROMPTS)
    assert quantized.kept == {}
    assert {"h.1.attn.c_attn.weight", "h.1.mlp.c_fc.weight"} <= quantized.alphas.keys()
    assert quantized.matrices.keys() == {name for name in weights if is_matrix(name)}
    # With each smoothed matrix in float32, what is computed has not changed.
    smoothed = dict(quantized.weights)
    for name, matrix in quantized.matrices.items():
        if matrix.smoothing is not None and name != "wte.weight":
            smoothed[name] = smoothed[name] * matrix.smoothing[:, None]
    smoothing = quantized.matrices["wte.weight"].smoothing
    if smoothing is not None:
        for part in ("weight", "bias"):
            smoothed[f"ln_f.{part}"] = smoothed[f"ln_f.{part}"] * smoothing
    for prompt in PROMPTS[:3]:
        expected = logprobs_of(weights, tiny, prompt)
        np.testing.assert_allclose(logprobs_of(smoothed, tiny, prompt), expected, atol=1e-4)
    for name, matrix in quantized.matrices.items():
        scales = 1 if matrix.smoothing is None else matrix.smoothing[:, None]
        exact = quantized.weights[name].T if name == "wte.weight" else quantized.weights[name]
        error = matrix.values * matrix.scales - exact * scales
        assert np.abs(error).max() <= matrix.scales.max() / 2 * 1.001


def test_a_matmul_with_outliers_that_cannot_be_smoothed_stays_in_float32(tiny):
    with torch.no_grad():  # the output of the activation function
        tiny.transformer.h[1].mlp.c_fc.bias[3] += 1000
        tiny.transformer.h[1].mlp.c_proj.weight[3] /= 1000
    quantized = quantize_model(tiny, torch_weights(tiny), PROMPTS)
    assert quantized.kept.keys() == {"h.1.mlp.c_proj.weight"}
    assert quantized.kept["h.1.mlp.c_proj.weight"] > MAX_MATMUL_ERROR
    matrices = {name for name in torch_weights(tiny) if is_matrix(name)}
    assert quantized.matrices.keys() == matrices - quantized.kept.keys()


def is_matrix(name):
    return name == "wte.weight" or (name.endswith(".weight") and ("attn" in name or "mlp" in name))


def test_the_report_counts_equal_answers_tokens_and_the_loss_of_f1(monkeypatch):
    def answers(*token_ids):
        return [Generation(token_ids=list(ids), finish_reason="stop") for ids in token_ids]

    monkeypatch.setattr(quantize_module, "generate", lambda side, *_, **__: side)

    gold = [SimpleNamespace(id=name, answers=[SimpleNamespace(text=text)]) for name, text in (("a", "1 2"), ("b", "7"))]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    report = compare_precisions(answers([1, 2], [7], [4]), answers([1, 2], [8, 7], [4]), [None] * 3, gold, tokenizer)
    assert report["equal_answers_percent"] == pytest.approx(200 / 3)
    assert report["equal_tokens_percent"] == pytest.approx(60)
    assert (report["fp32"]["f1"], report["quantized"]["exact_match"]) == (100, 50)
    assert report["f1_drop"] == pytest.approx(100 - report["quantized"]["f1"])


@pytest.fixture(scope="module")
def int8_bundle(tiny_model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8")
    data = write_sample(directory / "data.json", 12)
    to_onnx.export(str(tiny_model_dir), directory / "bundle", precision="int8", verify=[data], max_f1_drop=100)
    return directory / "bundle"


def test_the_manifest_holds_the_report_and_the_weights_are_int8(int8_bundle):
    manifest = json.loads((int8_bundle / "qa_onnx.json").read_text())
    assert manifest["precision"] == "int8"
    assert manifest["precision_loss"]["questions"] == 12
    assert {"equal_answers_percent", "equal_tokens_percent", "f1_drop"} <= manifest["precision_loss"].keys()
    stored = {}
    for name in ("model.onnx", "model.kernels.onnx"):
        weights = [one for one in onnx.load(int8_bundle / name).graph.initializer if len(one.dims) > 1]
        in_float = {one.name for one in weights if one.data_type == onnx.TensorProto.FLOAT}
        assert in_float == {"wpe.weight"}
        stored[name] = {one.name: one.raw_data for one in weights if one.data_type == onnx.TensorProto.INT8}
        assert [one for one in stored[name] if one.startswith("wte")] == ["wte.weight.packed"]
    assert stored["model.onnx"] == stored["model.kernels.onnx"]
    size = sum(len(data) for data in stored["model.onnx"].values())
    assert size < (int8_bundle / "model.onnx_data").stat().st_size < 2 * size  # once for both graphs


def test_an_int8_bundle_answers_the_same_alone_and_in_any_batch(int8_bundle):
    data = generate("heldout", questions=12)
    pairs = [
        (question["question"], paragraph["context"])
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    words = " ".join(context for _, context in pairs).split()
    pairs += [(question, " ".join(words[: 5 * index + 8])) for index, (question, _) in enumerate(pairs)]
    with Answerer.from_pretrained(int8_bundle, provider="cpu", config=EngineConfig(prefix_cache_bytes=0)) as answerer:
        alone = [answerer.answer(*pair, max_new_tokens=6) for pair in pairs]
    assert 150 < max(answer.prompt_tokens for answer in alone) <= 200
    for batch_size in (3, 64):
        config = EngineConfig(batch_size=batch_size, prefix_cache_bytes=0)
        with Answerer.from_pretrained(int8_bundle, provider="cpu", config=config) as answerer:
            assert answerer.answer_batch(*zip(*pairs, strict=True), max_new_tokens=6) == alone


def test_a_loss_beyond_the_limit_fails_the_export(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(to_onnx, "compare_precisions", lambda *_: {"f1_drop": 0.7})
    data = write_sample(tmp_path / "data.json", 4)
    with pytest.raises(ParityError, match=r"int8 loses 0\.70 points of F1 on .*data\.json; at most 0\.5 are allowed"):
        to_onnx.export(str(tiny_model_dir), tmp_path / "bundle", precision="int8", verify=[data])
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    to_onnx.export(str(tiny_model_dir), tmp_path / "bundle", precision="int8", verify=[data], max_f1_drop=0.7)


def test_an_fp16_bundle_is_measured_and_asks_for_cuda(tiny_model_dir, tmp_path, capsys):
    data = write_sample(tmp_path / "data.json", 8)
    options = ("--model", tiny_model_dir, "--output", tmp_path / "bundle", "--precision", "fp16", "--verify", data)
    assert to_onnx.main([*map(str, options), "--max-f1-drop", "100"]) == 0
    line = re.search(
        r"^fp16 compared with fp32: (\S+) % of tokens and \S+ % of answers equal on 8 prompts; "
        r"F1 \S+ before and \S+ after on 8 questions$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert float(line[1]) > 90
    with pytest.raises(ProviderError, match="fp16 does not run on provider 'cpu'"):
        Answerer.from_pretrained(tmp_path / "bundle", provider="cpu")
