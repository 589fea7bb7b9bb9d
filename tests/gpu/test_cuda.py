"""The CUDA provider gives the CPU's answers."""

from __future__ import annotations

import onnxruntime
import pytest

from export.to_onnx import export
from qa_onnx import Answerer
from qa_onnx.squad import read_squad
from training.model import STARTER

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason=f"this ONNX Runtime has no CUDA provider, only {', '.join(onnxruntime.get_available_providers())}",
)


def test_cuda_gives_the_answers_of_the_cpu(starter_bundle, heldout_file):
    examples = read_squad(heldout_file)
    questions, contexts = [e.question for e in examples], [e.context for e in examples]
    with Answerer.from_pretrained(starter_bundle, provider="cpu") as answerer:
        expected = answerer.answer_batch(questions, contexts, max_new_tokens=12)
    with Answerer.from_pretrained(starter_bundle, provider="cuda") as answerer:
        assert answerer.provider == "cuda"
        answers = answerer.answer_batch(questions, contexts, max_new_tokens=12, batch_size=7)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    scores = [answer.score for answer in expected]
    assert [answer.score for answer in answers] == pytest.approx(scores, rel=1e-2)


def test_auto_takes_cuda(starter_bundle):
    with Answerer.from_pretrained(starter_bundle) as answerer:
        assert answerer.provider == "cuda"


def test_fp16_on_cuda_gives_nearly_the_answers_of_fp32(starter_bundle, heldout_file, tmp_path):
    examples = read_squad(heldout_file)
    questions, contexts = [e.question for e in examples], [e.context for e in examples]
    with Answerer.from_pretrained(starter_bundle, provider="cuda") as answerer:
        expected = answerer.answer_batch(questions, contexts, max_new_tokens=12)
    export(str(STARTER), tmp_path / "fp16", precision="fp16", verify=heldout_file, max_f1_drop=5)
    with Answerer.from_pretrained(tmp_path / "fp16", provider="cuda") as answerer:
        answers = answerer.answer_batch(questions, contexts, max_new_tokens=12)
        alone = [answerer.answer(*pair, max_new_tokens=12) for pair in zip(questions, contexts, strict=True)]
    equal = sum(answer.text == other.text for answer, other in zip(answers, expected, strict=True))
    assert equal >= 0.9 * len(examples)
    same = sum(answer.text == other.text for answer, other in zip(answers, alone, strict=True))
    assert same >= 0.95 * len(examples)
