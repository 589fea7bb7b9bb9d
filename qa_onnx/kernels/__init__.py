"""The kernel library: operators for the CPU that ONNX Runtime has not. It is optional.

`native/` is its source, and `setup.py` compiles it where a C++17 compiler is found. Nothing but this module loads it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qa_onnx.errors import ProviderError, one_line

DOMAIN = "qa_onnx"
LIBRARY = Path(__file__).with_name("libqa_onnx_kernels.so")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KernelLibrary:
    """The loaded library.

    Attributes:
        path: What ONNX Runtime registers.
        instruction_sets: Those of this processor that it has kernels for, best first.
        bfloat16: The ones of them that multiply in bfloat16.
    """

    path: Path
    instruction_sets: tuple[str, ...]
    bfloat16: tuple[str, ...]

    @property
    def instruction_set(self) -> str:
        """The one that is used, unless `use` chose another."""
        return self.instruction_sets[0]

    def use(self, instruction_set: str) -> None:
        """Has all sessions of this process compute with an instruction set (for tests and measurements)."""
        if not ctypes.CDLL(str(self.path)).qa_onnx_use(instruction_set.encode()):
            raise ProviderError(
                f"got instruction set {instruction_set!r}; this processor has {', '.join(self.instruction_sets)}"
            )


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """Whether a bundle is run with kernels: `library`, or None and the `reason`."""

    library: KernelLibrary | None = None
    reason: str = ""

    @property
    def instruction_set(self) -> str | None:
        """That of the kernels; None without them."""
        return None if self.library is None else self.library.instruction_set


def choose_kernels(wanted: str, *, provider: str, precision: str) -> KernelChoice:
    """Decides whether a bundle is run with kernels, and logs it.

    Args:
        wanted: `EngineConfig.kernels`.
        provider: That runs the bundle.
        precision: Of the bundle.

    Raises:
        ProviderError: They are required, or the precision has no graph without them, and they cannot run.
    """
    choice = find_kernels(precision, wanted=wanted, provider=provider)
    if choice.library is not None:
        _log.info("kernels: %s", choice.library.instruction_set)
    elif precision == "bf16":
        raise ProviderError(
            f"bf16 needs kernels, and {choice.reason}. Export the model in fp32 or int8, or run it elsewhere"
        )
    elif wanted == "required":
        raise ProviderError(f"kernels are required, and {choice.reason}. Pass kernels='auto' to do without")
    else:
        _log.info("no kernels: %s", choice.reason)
    return choice


def find_kernels(precision: str, *, wanted: str = "auto", provider: str = "cpu") -> KernelChoice:
    """As `choose_kernels`, but says it instead of raising and logging."""
    if provider != "cpu":
        return KernelChoice(reason=f"provider {provider!r} has its own")
    if precision == "fp16":
        return KernelChoice(reason="there are none for fp16")
    if wanted == "off":
        return KernelChoice(reason="they are switched off (kernels='off')")
    try:
        library = load_kernels()
    except ProviderError as error:
        return KernelChoice(reason=str(error))
    if precision == "bf16" and library.instruction_set not in library.bfloat16:
        return KernelChoice(
            reason=f"this processor's {library.instruction_set} does not multiply in bfloat16; AMX and AVX-512 BF16 do "
            "(AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, and later)"
        )
    return KernelChoice(library=library)


@cache
def load_kernels(path: Path | None = None) -> KernelLibrary:
    """Loads the library; `LIBRARY`, unless another path is given.

    Raises:
        ProviderError: It was not compiled, cannot be loaded, or has nothing for this processor.
    """
    path = path or LIBRARY
    if not path.is_file():
        raise ProviderError(
            f"there are no compiled kernels at {path} (on {platform.machine()}). Either qa_onnx was installed without "
            "them, which need Linux, x86-64 and a C++17 compiler: install g++ or clang++ and install qa_onnx again. Or "
            "Python imported the source in the current folder: run elsewhere, or install with pip install -e"
        )
    try:
        library = ctypes.CDLL(str(path))
        names = library.qa_onnx_instruction_sets
        names.restype = ctypes.c_char_p
        found = tuple(name for name in names().decode().split(",") if name)
        bfloat16 = tuple(name for name in found if library.qa_onnx_has_bfloat16(name.encode()))
    except (OSError, AttributeError) as error:
        raise ProviderError(
            f"the kernels cannot be loaded: {one_line(error)}. Install qa_onnx again, or pass kernels='off'"
        ) from error
    if not found:
        raise ProviderError("this processor has neither AVX-512 nor AVX2, which the kernels need")
    return KernelLibrary(path=path, instruction_sets=found, bfloat16=bfloat16)
