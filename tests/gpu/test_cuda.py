"""The CUDA provider gives the CPU's answers, with and without CUDA graphs, and says what it cannot do."""

from __future__ import annotations

import onnxruntime
import pytest

from export.to_onnx import export
from qa_onnx import Answerer, EngineConfig, GenerationConfig, OutOfMemoryError, ProviderError
from qa_onnx.data.reader import read_examples

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason=f"this ONNX Runtime has no CUDA provider, only {', '.join(onnxruntime.get_available_providers())}",
)
CAPTURES = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)


@pytest.fixture(scope="module")
def texts(heldout_file):
    """Questions and their contexts."""
    examples = read_examples(heldout_file)
    return [e.question for e in examples], [e.context for e in examples]


@pytest.fixture(scope="module")
def expected(starter_bundle, texts):
    """The CPU's answers."""
    with Answerer.from_pretrained(starter_bundle, provider="cpu") as answerer:
        return answerer.answer_batch(*texts, max_new_tokens=12)


@pytest.fixture(scope="module")
def fp16_bundle(heldout_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp16") / "bundle"
    export("starter", path, precision="fp16", verify=[heldout_file], max_f1_drop=5)
    return path


def load(bundle, **options):
    return Answerer.from_pretrained(bundle, provider="cuda", config=EngineConfig(**options))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_cuda_gives_the_answers_of_the_cpu(starter_bundle, texts, expected, batch_size):
    with load(starter_bundle, batch_size=batch_size) as answerer:
        assert answerer.provider == "cuda"
        answers = answerer.answer_batch(*texts, max_new_tokens=12)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    scores = [answer.score for answer in expected]
    assert [answer.score for answer in answers] == pytest.approx(scores, rel=1e-2)


def test_auto_takes_cuda(starter_bundle):
    with Answerer.from_pretrained(starter_bundle) as answerer:
        assert answerer.provider == "cuda"


def test_fp16_on_cuda_gives_nearly_the_answers_of_fp32(starter_bundle, fp16_bundle, texts):
    with load(starter_bundle) as answerer:
        expected = answerer.answer_batch(*texts, max_new_tokens=12)
    with load(fp16_bundle) as answerer:
        answers = answerer.answer_batch(*texts, max_new_tokens=12)
        alone = [answerer.answer(*pair, max_new_tokens=12) for pair in zip(*texts, strict=True)]
    equal = sum(answer.text == other.text for answer, other in zip(answers, expected, strict=True))
    assert equal >= 0.9 * len(expected)
    same = sum(answer.text == other.text for answer, other in zip(answers, alone, strict=True))
    assert same >= 0.95 * len(expected)


CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=12),
    "until caches grow": GenerationConfig(max_new_tokens=80, ignore_eos=True),
    "extractive": GenerationConfig(max_new_tokens=12, extractive=True),
    "several answers": GenerationConfig(max_new_tokens=12, num_answers=3),
}


@pytest.mark.skipif(not CAPTURES, reason=f"onnxruntime-gpu {onnxruntime.__version__} captures no graph; 1.31 does")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cuda_graphs_change_no_answer(starter_bundle, fp16_bundle, texts, precision, config):
    bundle = starter_bundle if precision == "fp32" else fp16_bundle
    found = []
    for cuda_graphs in (True, False):
        with load(bundle, cuda_graphs=cuda_graphs, batch_size=16) as answerer:
            rounds = [answerer.answer_batch(*texts, config=config) for _ in range(2)]  # the second only replays
            stats = answerer.stats()
        assert stats.uses_cuda_graphs == cuda_graphs
        assert (stats.engine.cuda_graphs > 0) == cuda_graphs
        found.append(rounds)
    (captured, replayed), (plain, plain_again) = found
    assert [one.text for one in plain] == [one.text for one in plain_again]
    for rounds in (captured, replayed):
        assert [one.token_ids for one in rounds] == [one.token_ids for one in plain]
        assert [one.score for one in rounds] == pytest.approx([one.score for one in plain], rel=1e-5)


def test_a_batch_without_memory_is_halved(starter_bundle, texts, expected):
    """The weights take 22 MB; a prefill of all 60 prompts takes 96 MB with them, one of 13 of them fits."""
    with load(starter_bundle, memory_limit=48 * 2**20, cuda_graphs=False) as answerer:
        answers = answerer.answer_batch(*texts, max_new_tokens=12)
        assert answerer.stats().batch_size < 64
    assert [answer.text for answer in answers] == [answer.text for answer in expected]


def test_too_little_memory_for_one_prompt_is_an_error_that_ends_only_the_call(starter_bundle, texts):
    with load(starter_bundle, memory_limit=24 * 2**20, cuda_graphs=False) as answerer:
        for _ in range(2):
            with pytest.raises(OutOfMemoryError, match="no memory for a batch of one prompt"):
                answerer.answer("Who?", texts[1][0] * 6, max_new_tokens=4)
        assert answerer.stats().running == answerer.stats().waiting == 0


def test_a_device_that_does_not_exist_is_named_and_nothing_runs_elsewhere(starter_bundle, capfd):
    with pytest.raises(ProviderError, match="CUDA device 99"):
        load(starter_bundle, device_id=99)
    assert "Falling back" not in capfd.readouterr().out
