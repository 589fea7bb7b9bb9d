"""Which kernels are chosen, and the reasons and errors where there are none."""

from __future__ import annotations

import pytest

from qa_onnx import EngineConfig, InvalidInputError, ProviderError, kernels
from qa_onnx.kernels import choose_kernels, find_kernels, load_kernels

try:
    LIBRARY = load_kernels()
except ProviderError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_a_library_that_is_missing_or_damaged_is_told(tmp_path, monkeypatch):
    with pytest.raises(ProviderError, match=r"C\+\+17 compiler.*the source in the current folder: .*-e") as missed:
        load_kernels(tmp_path / "missing.so")
    assert f"no compiled kernels at {tmp_path / 'missing.so'} " in str(missed.value)
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(ProviderError, match=r"cannot be loaded: .*kernels='off'"):
        load_kernels(tmp_path / "damaged.so")

    def missing():
        raise ProviderError("the kernels are away")

    monkeypatch.setattr(kernels, "load_kernels", missing)
    assert choose_kernels("auto", provider="cpu", precision="int8").library is None
    for wanted, precision, message in (
        ("required", "int8", "kernels are required, and the kernels are away. Pass kernels='auto'"),
        ("auto", "bf16", "bf16 needs kernels, and the kernels are away"),
        ("off", "bf16", "bf16 needs kernels, and they are switched off"),
    ):
        with pytest.raises(ProviderError, match=message):
            choose_kernels(wanted, provider="cpu", precision=precision)


def test_kernels_are_for_the_cpu_and_for_some_precisions(caplog):
    caplog.set_level("INFO", "qa_onnx")
    assert choose_kernels("auto", provider="cpu", precision="fp32").library == LIBRARY
    assert "has its own" in choose_kernels("auto", provider="cuda", precision="fp32").reason
    assert "none for fp16" in find_kernels("fp16").reason
    assert "switched off" in choose_kernels("off", provider="cpu", precision="fp32").reason
    assert [record.message.split(":")[0] for record in caplog.records] == ["kernels", "no kernels", "no kernels"]
    assert caplog.records[0].message == f"kernels: {LIBRARY.instruction_set}"
    with pytest.raises(ProviderError, match="got instruction set 'sse'; this processor has "):
        LIBRARY.use("sse")


def test_a_processor_without_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr(
        kernels,
        "load_kernels",
        lambda: kernels.KernelLibrary(path=LIBRARY.path, instruction_sets=("avx2",), bfloat16=()),
    )
    with pytest.raises(ProviderError, match="avx2 does not multiply in bfloat16; AMX and AVX-512 BF16 do "):
        choose_kernels("auto", provider="cpu", precision="bf16")


def test_kernels_are_chosen_by_name():
    assert EngineConfig(kernels="off").kernels == "off"
    with pytest.raises(InvalidInputError, match="got kernels 'fast'; expected one of auto, off, required"):
        EngineConfig(kernels="fast")
