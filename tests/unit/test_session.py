from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from qa_onnx import session
from qa_onnx.errors import BundleError, InvalidInputError, ProviderError
from qa_onnx.session import Session, import_onnxruntime, resolve_provider

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class FakeRuntime:
    """ONNX Runtime as built with the `available` providers, of which those in `working` start."""

    def __init__(self, available, working=None):
        self.available = available
        self.working = available if working is None else working
        self.asked_for = self.options = None

    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_BASIC="basic")

    def get_available_providers(self):
        return self.available

    def SessionOptions(self):  # noqa: N802
        return SimpleNamespace(intra_op_num_threads=0)

    def InferenceSession(self, path, options, providers, provider_options):  # noqa: N802
        self.asked_for, self.options, self.provider_options = providers, options, provider_options
        started = [name for name in providers if name in self.working]
        return SimpleNamespace(
            get_providers=lambda: [*started, CPU],
            get_inputs=lambda: [SimpleNamespace(name="input_ids"), SimpleNamespace(name="attention_mask")],
            get_outputs=lambda: [SimpleNamespace(name="logits")],
        )


@pytest.fixture
def use(monkeypatch):
    def install(*available, **options):
        runtime = FakeRuntime(list(available), **options)
        monkeypatch.setattr(session, "import_onnxruntime", lambda: runtime)
        return runtime

    return install


@pytest.mark.parametrize("provider", ["gpu", "CUDA", "", None, ["cpu"]])
def test_an_unknown_provider_is_refused_with_the_known_ones(provider):
    with pytest.raises(InvalidInputError, match="expected one of auto, cpu, cuda"):
        resolve_provider(provider)


@pytest.mark.parametrize(
    ("precision", "available", "resolved"),
    [
        ("fp32", [CUDA, CPU], "cuda"),
        ("fp16", [CUDA, CPU], "cuda"),
        ("int8", [CUDA, CPU], "cpu"),
        ("int8", [CPU], "cpu"),
    ],
)
def test_auto_takes_a_provider_that_runs_the_precision(use, precision, available, resolved):
    use(*available)
    assert resolve_provider("auto", precision) == resolved


@pytest.mark.parametrize(
    ("provider", "precision", "way_out"), [("cpu", "fp16", "cuda"), ("auto", "fp16", "cuda"), ("cuda", "int8", "cpu")]
)
def test_a_precision_that_a_provider_does_not_run_is_an_error(use, provider, precision, way_out):
    use(*([CPU] if provider == "auto" else [CUDA, CPU]))
    with pytest.raises(ProviderError, match=f"a bundle in {precision} does not run on .*Pass provider='{way_out}'"):
        resolve_provider(provider, precision)


@pytest.mark.parametrize(
    ("provider", "available", "resolved"),
    [
        ("auto", [CPU], "cpu"),
        ("auto", [CUDA, CPU], "cuda"),
        ("cpu", [CUDA, CPU], "cpu"),
        ("cuda", [CUDA, CPU], "cuda"),
    ],
)
def test_one_provider_is_asked_for(use, tmp_path, provider, available, resolved):
    runtime = use(*available)
    made = Session(tmp_path / "model.onnx", provider=provider)
    assert (made.provider, runtime.asked_for) == (resolved, [{"cpu": CPU, "cuda": CUDA}[resolved]])
    assert (made.input_names, made.output_names) == (["input_ids", "attention_mask"], ["logits"])


def test_cuda_computes_in_full_fp32(use, tmp_path):
    runtime = use(CUDA, CPU)
    Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.provider_options == [{"use_tf32": "0"}]


def test_cuda_that_is_not_built_in_is_an_error_and_nothing_is_loaded(use, tmp_path):
    runtime = use(CPU)
    with pytest.raises(ProviderError, match=rf"'cuda' was asked for.*has {CPU}.*qa_onnx\[gpu\].*provider='cpu'"):
        Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.asked_for is None


@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_a_provider_that_does_not_start_is_never_replaced(use, tmp_path, provider):
    use(CUDA, CPU, working=[CPU])
    with pytest.raises(ProviderError, match=f"{CUDA} was asked for.*started with {CPU}.*provider='cpu'"):
        Session(tmp_path / "model.onnx", provider=provider)


@pytest.mark.parametrize("threads", [0, -1, True, "2", 2.0])
def test_threads_have_to_be_a_positive_whole_number(use, tmp_path, threads):
    use(CPU)
    with pytest.raises(InvalidInputError, match=f"threads {threads!r}; expected a whole number of at least 1, or None"):
        Session(tmp_path / "model.onnx", threads=threads)


@pytest.mark.parametrize(("threads", "set_to"), [(None, 0), (3, 3)])
def test_threads_are_those_of_one_operator(use, tmp_path, monkeypatch, threads, set_to):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    runtime = use(CPU)
    Session(tmp_path / "model.onnx", threads=threads)
    assert runtime.options.intra_op_num_threads == set_to


def test_more_threads_than_processors_are_refused(use, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    use(CPU)
    with pytest.raises(InvalidInputError, match="got threads 4; this machine has 3 processors"):
        Session(tmp_path / "model.onnx", threads=4)


def test_the_graph_is_not_fused_further(use, tmp_path):
    runtime = use(CPU)
    Session(tmp_path / "model.onnx")
    assert runtime.options.graph_optimization_level == "basic"


def test_without_onnxruntime_the_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"qa_onnx\[cpu\] or qa_onnx\[gpu\]"):
        import_onnxruntime()


@pytest.mark.parametrize(("chosen", "seen"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_before_the_import_unless_the_user_chose(monkeypatch, tmp_path, chosen, seen):
    (tmp_path / "onnxruntime.py").write_text("import os\nseen = os.environ.get('ORT_DISABLE_TELEMETRY')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # so that teardown takes the stand-in away again
    del sys.modules["onnxruntime"]
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", chosen or "")
    if chosen is None:
        del os.environ["ORT_DISABLE_TELEMETRY"]
    assert import_onnxruntime().seen == seen


@pytest.mark.parametrize("content", [None, b"", b"this is no graph"])
def test_a_model_that_cannot_be_loaded_is_a_bundle_error(tmp_path, content):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{path} cannot be loaded by ONNX Runtime on {CPU}"):
        Session(path, provider="cpu")
