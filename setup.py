"""Compiles the kernel library (`qa_onnx/kernels`); everything else about the package is in pyproject.toml.

The library is loaded by ONNX Runtime, not by Python: it has no Python in it, and one wheel serves every version. Where
it cannot be compiled (no C++17 compiler, another processor or system), the installation goes on without it, and
`python -m qa_onnx info` and `Answerer.stats()` say so.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("qa_onnx/kernels/native")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-uninitialized"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # in GCC's headers of intrinsics; not Clang's
AVX512_VNNI = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]
AVX512 = [*AVX512_VNNI, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "amx": ("kAmx", [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]),
    "avx512": ("kAvx512", AVX512),
    "avx512-vnni": ("kAvx512Vnni", AVX512_VNNI),
    "avx-vnni": ("kAvxVnni", ["-mavx2", "-mfma", "-mavxvnni"]),
    "avx2": ("kAvx2", ["-mavx2", "-mfma"]),
}
IS_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"


class BuildKernels(build_ext):
    """Compiles one source for each instruction set, and links them to one library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the version of Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links."""
        output = Path(self.get_ext_fullpath(ext.name))
        extra = os.environ.get("QA_ONNX_CXXFLAGS", "").split()  # such as those of the sanitizers
        objects = self.compiler.compile(
            [str(NATIVE / "operators.cc")], self.build_temp, extra_postargs=[*FLAGS, *extra], depends=ext.depends
        )
        for name, (symbol, flags) in INSTRUCTION_SETS.items():
            objects += self.compiler.compile(
                [str(NATIVE / "kernels.cc")],
                str(Path(self.build_temp) / name),
                macros=[("QA_KERNELS", symbol), ("QA_NAME", f'"{name}"')],
                extra_postargs=[*FLAGS, *flags, *extra],
                depends=ext.depends,
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(output), extra_postargs=extra, target_lang="c++")


class Wheel(bdist_wheel):
    """Tags the wheel for any Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


KERNELS = Extension(
    "qa_onnx.kernels.libqa_onnx_kernels",
    sources=[str(NATIVE / "operators.cc"), str(NATIVE / "kernels.cc")],
    depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
    language="c++",
    optional=True,
)

setup(
    ext_modules=[KERNELS] if IS_SUPPORTED else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel} if IS_SUPPORTED else {},
)
