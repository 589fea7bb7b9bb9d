from __future__ import annotations

import dataclasses
import os
import sys
from types import SimpleNamespace

import pytest

from qa_onnx import EngineConfig
from qa_onnx.engine import provider, session
from qa_onnx.engine.provider import import_onnxruntime, resolve_provider, with_batch_tokens
from qa_onnx.engine.session import Binding, Session, TensorType, load_copier
from qa_onnx.errors import BundleError, EngineError, InvalidInputError, OutOfMemoryError, ProviderError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FOLDING = {"optimization.constant_folding_max_output_size_in_bytes": str(2**30)}


class FakeRuntime:
    """ONNX Runtime as built with the `available` providers, of which those in `working` start."""

    def __init__(self, available, working=None, version="1.31.0", error=None, printed=""):
        self.available = available
        self.working = available if working is None else working
        self.__version__ = version
        self.error, self.printed = error, printed
        self.asked_for = self.options = None
        self.calls = []

    GraphOptimizationLevel = SimpleNamespace(ORT_ENABLE_BASIC="basic", ORT_ENABLE_EXTENDED="extended")

    def get_available_providers(self):
        return self.available

    def set_default_logger_severity(self, severity):
        self.calls.append(f"log severity {severity}")

    def preload_dlls(self):
        self.calls.append("preload_dlls")
        print(self.printed)  # noqa: T201

    def SessionOptions(self):  # noqa: N802
        entries = {}
        return SimpleNamespace(intra_op_num_threads=0, entries=entries, add_session_config_entry=entries.__setitem__)

    def InferenceSession(  # noqa: N802
        self, path, options, providers, provider_options, disabled_optimizers, enable_fallback
    ):
        assert not enable_fallback  # it prints, and runs on another provider
        self.disabled_optimizers = disabled_optimizers
        self.calls.append("InferenceSession")
        self.asked_for, self.options, self.provider_options = providers, options, provider_options
        if self.error is not None:
            raise self.error
        started = [name for name in providers if name in self.working]
        return SimpleNamespace(
            get_providers=lambda: [*started, CPU],
            get_inputs=lambda: [
                SimpleNamespace(name="input_ids", type="tensor(int64)", shape=["N"]),
                SimpleNamespace(name="prefix.0.key", type="tensor(float16)", shape=["G", 2, 1, None, 4]),
            ],
            get_outputs=lambda: [SimpleNamespace(name="logprobs", type="tensor(double)", shape=[])],
        )


class OnnxRuntimeError(Exception):
    """As ONNX Runtime's own, which have no base in common but this one."""


OnnxRuntimeError.__module__ = "onnxruntime.capi.onnxruntime_pybind11_state"


@pytest.fixture
def use(monkeypatch):
    def install(*available, **options):
        runtime = FakeRuntime(list(available), **options)
        for module in (provider, session):
            monkeypatch.setattr(module, "import_onnxruntime", lambda: runtime)
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
    assert made.inputs == {
        "input_ids": TensorType("int64", ("N",)),
        "prefix.0.key": TensorType("float16", ("G", 2, 1, None, 4)),
    }
    assert made.outputs == {"logprobs": TensorType("tensor(double)", ())}


def test_cuda_computes_in_full_fp32(use, tmp_path):
    runtime = use(CUDA, CPU)
    Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.provider_options[0]["use_tf32"] == "0"


@pytest.mark.parametrize(
    ("config", "version", "more"),
    [
        ({}, "1.31.0", {"enable_cuda_graph": "1"}),
        ({}, "1.40.1", {"enable_cuda_graph": "1"}),
        ({}, "2.0.0", {"enable_cuda_graph": "1"}),
        ({}, "1.30.9", {}),
        ({}, "1.27.0", {}),
        ({"cuda_graphs": False}, "1.31.0", {}),
        ({"device_id": 3}, "1.31.0", {"enable_cuda_graph": "1", "device_id": "3"}),
        ({"memory_limit": 10**9}, "1.30.0", {"gpu_mem_limit": "1000000000"}),
    ],
)
def test_cuda_gets_its_device_its_limit_and_cuda_graphs(use, tmp_path, config, version, more):
    runtime = use(CUDA, CPU, version=version)
    made = Session(tmp_path / "model.onnx", provider="cuda", config=EngineConfig(**config))
    given = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert runtime.provider_options == [given | more]
    assert made.has_cuda_graphs == ("enable_cuda_graph" in more)


def test_the_cpu_has_no_options_of_a_device(use, tmp_path):
    runtime = use(CPU)
    made = Session(tmp_path / "model.onnx", config=EngineConfig(device_id=3, memory_limit=1))
    assert runtime.provider_options == [{}]
    assert not made.has_cuda_graphs


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_the_copier_has_one_thread_and_no_cuda_graphs(use, tmp_path, provider):
    runtime = use(CUDA, CPU)
    config = EngineConfig(threads=2, device_id=1, memory_limit=10**9)
    copier = load_copier(tmp_path / "cache_copy.onnx", provider=provider, config=config)
    assert (copier.provider, copier.has_cuda_graphs) == (provider, False)
    assert runtime.options.intra_op_num_threads == 1
    (options,) = runtime.provider_options
    assert "enable_cuda_graph" not in options
    assert (options.get("device_id"), options.get("gpu_mem_limit")) == (
        ("1", "1000000000") if provider == "cuda" else (None, None)
    )


@pytest.mark.parametrize(
    ("provider", "version", "words"),
    [
        ("cpu", "1.24.4", r"onnxruntime 1\.25 or later. In the checkout: pip install --upgrade '\.\[cpu\]'"),
        ("cpu", "0.99.0", r"onnxruntime 1\.25 or later"),
        ("cuda", "1.26.0", r"onnxruntime-gpu 1\.27 or later. In the checkout: pip install --upgrade '\.\[gpu\]'"),
        ("auto", "1.26.0", r"onnxruntime-gpu 1\.27 or later. In the checkout: pip install --upgrade '\.\[gpu\]'"),
    ],
)
def test_a_runtime_that_is_too_old_is_refused_with_the_extra_to_install(use, tmp_path, provider, version, words):
    runtime = use(CUDA, CPU, version=version)
    with pytest.raises(ProviderError, match=rf"ONNX Runtime {version} lacks operators.*expected {words}"):
        Session(tmp_path / "model.onnx", provider=provider)
    assert runtime.asked_for is None


@pytest.mark.parametrize(("provider", "version"), [("cpu", "1.25.0"), ("cuda", "1.27.0"), ("cpu", "1.26.0")])
def test_the_oldest_runtime_that_is_not_too_old_is_used(use, provider, version):
    use(CUDA, CPU, version=version)
    assert resolve_provider(provider) == provider


@pytest.mark.parametrize("name", ["max_prefill_tokens", "max_batch_tokens", "max_batch_bytes"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_budgets_replace_those_of_the_provider(use, tmp_path, provider, name):
    use(CUDA, CPU)
    usual = Session(tmp_path / "model.onnx", provider=provider).limits
    changed = Session(tmp_path / "model.onnx", provider=provider, config=EngineConfig(**{name: 7})).limits
    assert changed == dataclasses.replace(usual, **{name: 7})
    assert (usual.fixed_shapes, usual.chooses_on_host) == ((False, True) if provider == "cpu" else (True, False))


@pytest.mark.parametrize(
    ("provider", "given", "weight_bytes", "expected"),
    [
        ("cpu", None, 500_000_000, 2_500),
        ("cpu", None, 1_000_000, 1_536),
        ("cpu", 100, 500_000_000, 100),
        ("cuda", None, 500_000_000, 65_536),
    ],
)
def test_a_batchs_tokens_grow_with_the_weights_on_the_cpu(use, tmp_path, provider, given, weight_bytes, expected):
    use(CUDA, CPU)
    config = EngineConfig(max_batch_tokens=given)
    config = with_batch_tokens(config, provider, weight_bytes=weight_bytes, token_bytes=100_000)
    assert Session(tmp_path / "model.onnx", provider=provider, config=config).limits.max_batch_tokens == expected


def test_what_preloading_prints_is_not_on_standard_output(use, tmp_path, capfd):
    runtime = use(CUDA, CPU, printed="Failed to load libcublas.so.13: no such file\nLoaded libcudart")
    Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.calls == ["preload_dlls", "log severity 4", "InferenceSession"]
    assert capfd.readouterr().out == ""


def test_the_cpu_preloads_nothing(use, tmp_path):
    runtime = use(CPU)
    runtime.preload_dlls = lambda: 1 / 0
    Session(tmp_path / "model.onnx")


def test_a_library_that_was_not_preloaded_is_in_the_error(use, tmp_path, capfd):
    use(CUDA, CPU, working=[CPU], printed="Failed to load libcublas.so.13: no such file\nLoaded libcudart")
    words = rf"{CUDA} was asked for.*Failed to load libcublas\.so\.13: no such file\. Check that.*'\.\[gpu\]'"
    with pytest.raises(ProviderError, match=words) as caught:
        Session(tmp_path / "model.onnx", provider="cuda")
    assert "libcudart" not in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("words", ["CUDA failure 100: no CUDA-capable device is detected", "invalid Device ordinal"])
def test_a_device_that_cannot_be_used_is_named(use, tmp_path, words):
    use(CUDA, CPU, error=OnnxRuntimeError(words))
    with pytest.raises(ProviderError, match=f"CUDA device 2 cannot be used: {words}.*nvidia-smi.*device_id"):
        Session(tmp_path / "model.onnx", provider="cuda", config=EngineConfig(device_id=2))


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("no\nline"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        IndexError(),
        OnnxRuntimeError("Load model failed"),
    ],
)
def test_whatever_loading_raises_is_a_bundle_error_of_one_line(use, tmp_path, error):
    use(CPU, error=error)
    with pytest.raises(BundleError, match=r"model.onnx cannot be loaded by ONNX Runtime on CPU.*: \S.*$") as caught:
        Session(tmp_path / "model.onnx")
    assert caught.value.__cause__ is error


def test_a_graph_with_names_that_are_not_utf8_is_a_bundle_error(use, tmp_path):
    runtime = use(CPU)
    make, inputs = runtime.InferenceSession, SimpleNamespace(get_inputs=lambda: b"\xff".decode())
    runtime.InferenceSession = lambda *positional, **named: (make(*positional, **named), inputs)[1]
    with pytest.raises(BundleError, match="codec can't decode"):
        Session(tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), OnnxRuntimeError("out of memory")])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_loading_without_memory_says_so(use, tmp_path, provider, error):
    use(CUDA, CPU, error=error)
    with pytest.raises(OutOfMemoryError, match=r"no memory to load .*model\.onnx"):
        Session(tmp_path / "model.onnx", provider=provider)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("Failed to allocate memory for requested buffer of size 7"),
        RuntimeError("CUDA failure 2: out of memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_errors_of_memory_are_told_apart(error):
    def fail(*_):
        raise error

    binding = Binding(session_that_runs(fail))
    with pytest.raises(OutOfMemoryError) as caught:
        binding.run()
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ZeroDivisionError("division"), OnnxRuntimeError("[Fail]\nbad node"), ValueError()])
def test_other_errors_of_a_run_are_errors_of_the_engine(error):
    def run(*_):
        raise error

    with pytest.raises(EngineError, match=r"ONNX Runtime failed: \S.*$") as caught:
        Binding(session_that_runs(run)).run()
    assert caught.value.__cause__ is error


def session_that_runs(run):
    runtime = SimpleNamespace(RunOptions=SimpleNamespace)
    inner = SimpleNamespace(io_binding=SimpleNamespace, run_with_iobinding=run)
    return SimpleNamespace(_ort=runtime, _session=inner, has_cuda_graphs=False)


def test_cuda_that_is_not_built_in_is_an_error_and_nothing_is_loaded(use, tmp_path):
    runtime = use(CPU)
    with pytest.raises(
        ProviderError, match=rf"'cuda' was asked for.*has {CPU}.*pip install '\.\[gpu\]'.*provider='cpu'"
    ):
        Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.asked_for is None


@pytest.mark.parametrize("provider", ["cuda", "auto"])
def test_a_provider_that_does_not_start_is_never_replaced(use, tmp_path, provider):
    use(CUDA, CPU, working=[CPU])
    with pytest.raises(ProviderError, match=f"{CUDA} was asked for.*started with {CPU}.*provider='cpu'"):
        Session(tmp_path / "model.onnx", provider=provider)


@pytest.mark.parametrize(("threads", "set_to"), [(None, 0), (3, 3)])
def test_threads_are_those_of_one_operator(use, tmp_path, monkeypatch, threads, set_to):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    runtime = use(CPU)
    Session(tmp_path / "model.onnx", config=EngineConfig(threads=threads))
    assert runtime.options.intra_op_num_threads == set_to


@pytest.mark.parametrize(("saturates", "level"), [(False, "basic"), (True, "extended")])
def test_the_graph_is_not_fused_further(use, tmp_path, monkeypatch, saturates, level):
    monkeypatch.setattr(session, "int8_saturates", lambda: saturates)
    runtime = use(CPU)
    Session(tmp_path / "model.onnx")
    assert runtime.options.graph_optimization_level == level
    assert runtime.options.entries == FOLDING | ({"session.x64quantprecision": "1"} if saturates else {})
    assert {"SkipLayerNormFusion", "BiasGeluFusion"} <= set(runtime.disabled_optimizers)


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ("flags : fpu avx2 avx512f avx512bw", True),
        ("flags : avx512f avx512_vnni", False),
        ("flags : avx2 avx_vnni", False),
        (None, True),
    ],
)
def test_int8_saturates_on_processors_without_vnni(monkeypatch, tmp_path, flags, saturates):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(provider, "Path", lambda _: tmp_path / "cpuinfo")
    assert provider.int8_saturates.__wrapped__() is saturates


def test_cuda_has_no_optimizations_of_the_cpu(use, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "int8_saturates", lambda: True)
    runtime = use(CUDA, CPU)
    Session(tmp_path / "model.onnx", provider="cuda")
    assert runtime.options.graph_optimization_level == "basic"
    assert runtime.options.entries == FOLDING


def test_without_onnxruntime_the_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r"In the checkout: pip install '\.\[cpu\]', or '\.\[gpu\]'"):
        import_onnxruntime()


@pytest.mark.parametrize(("chosen", "seen"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_before_the_import_unless_the_user_chose(monkeypatch, tmp_path, chosen, seen):
    (tmp_path / "onnxruntime.py").write_text("import os\nseen = os.environ.get('ORT_DISABLE_TELEMETRY')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # so that teardown takes the fake away again
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
