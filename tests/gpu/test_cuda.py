"""The CUDA provider gives the CPU's answers."""

from __future__ import annotations

import onnxruntime
import pytest

from qa_onnx import Answerer
from qa_onnx.squad import read_squad

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
        assert answerer.answer_batch(questions, contexts, max_new_tokens=12, batch_size=7) == expected


def test_auto_takes_cuda(starter_bundle):
    with Answerer.from_pretrained(starter_bundle) as answerer:
        assert answerer.provider == "cuda"
