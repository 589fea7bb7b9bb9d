"""Look-ahead on real models: the same bits with it and without, in fewer steps."""

from __future__ import annotations

import pytest

from export.to_onnx import export
from qa_onnx import Answerer, EngineConfig, GenerationConfig
from qa_onnx.data.reader import read_examples
from qa_onnx.engine.look_ahead import LookAhead
from tests.kernels import needs_kernels


@pytest.fixture(scope="module", params=["fp32", "int8", "bf16"])
def bundle(request, starter_bundle, tmp_path_factory):
    needs_kernels(request.param)
    if request.param == "fp32":
        return starter_bundle
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    export("starter", path, precision=request.param, max_f1_drop=100)
    return path


@pytest.fixture(scope="module")
def pairs(heldout_file):
    """Questions on contexts of mixed lengths."""
    examples = read_examples(heldout_file)
    words = " ".join(example.context for example in examples).split()
    return [
        (example.question, " ".join([example.context, *words[: 20 * (index % 5)]]))
        for index, example in enumerate(examples[:12])
    ]


CONFIGS = {
    "greedy": GenerationConfig(),
    "short": GenerationConfig(max_new_tokens=2),
    "extractive": GenerationConfig(extractive=True),
    "several in windows": GenerationConfig(num_answers=2, window=64, stride=16),
    "sampled": GenerationConfig(temperature=0.9, seed=7),
    "ngrams": GenerationConfig(no_repeat_ngram_size=3, max_new_tokens=12),
    "fixed": GenerationConfig(ignore_eos=True, max_new_tokens=9),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_look_ahead_changes_no_bit_of_an_answer(bundle, pairs, name, monkeypatch):
    monkeypatch.setattr(LookAhead, "_is_worth_it", lambda *_: True)  # whatever this machine is good at
    config = CONFIGS[name]
    with Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(look_ahead=False)) as answerer:
        expected = [answerer.answer(*pair, config=config) for pair in pairs]
        plain = answerer.stats().engine
    with Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(batch_size=5)) as answerer:
        assert answerer.answer_batch(*zip(*pairs, strict=True), config=config) == expected
        assert [answerer.answer(*pair, config=config) for pair in pairs] == expected
        stats = answerer.stats().engine
    assert plain.draft_tokens == 0
    assert stats.draft_tokens >= stats.accepted_draft_tokens > 0


def test_answers_that_are_copied_take_fewer_steps(bundle, pairs, monkeypatch):
    monkeypatch.setattr(LookAhead, "_is_worth_it", lambda *_: True)
    steps = []
    for look_ahead in (False, True):
        config = EngineConfig(look_ahead=look_ahead)
        with Answerer.from_pretrained(bundle, provider="cpu", config=config) as answerer:
            for pair in pairs:
                answerer.answer(*pair)
            steps.append(answerer.stats().engine.decode_steps)
    assert steps[1] < 0.7 * steps[0]


def test_without_kernels_there_are_no_drafts(starter_bundle, pairs):
    with Answerer.from_pretrained(starter_bundle, provider="cpu", config=EngineConfig(kernels="off")) as answerer:
        for pair in pairs[:5]:
            answerer.answer(*pair)
        assert answerer.stats().engine.draft_tokens == 0
