"""Which kernels onnxruntime-gpu has on CUDA for the operators of the graphs: `python -m bench.cuda_kernels --help`.

Writes the table that `tests/parity/test_cuda_kernels.py` holds the exported graphs against, so that a node which would
run on the CPU, with copies between host and device around it, is found without a GPU. Needs onnxruntime-gpu and numpy.
Listing the kernels loads the providers' libraries: those of CUDA have to be there, and those of TensorRT, which the
wheel also registers, or stand-ins for both (`--preload`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from qa_onnx.engine.provider import import_onnxruntime

OPERATORS = {
    "ai.onnx": (
        *("Add", "And", "Cast", "Concat", "Div", "Expand", "Gather", "Gelu", "Gemm", "GreaterOrEqual"),
        *("LayerNormalization", "Less", "LessOrEqual", "LogSoftmax", "MatMul", "Min", "Mul", "Relu", "Reshape"),
        *("Shape", "Slice", "Softmax", "Split", "Sub", "TensorScatter", "TopK", "Unsqueeze", "Where"),
    ),
    "com.microsoft": ("FastGelu", "FusedMatMul"),
}
"""The operators that `export.decoder` builds graphs of."""


def list_kernels() -> list[dict[str, object]]:
    """CUDA's kernels for `OPERATORS`: opset versions `since` to `until` (null: still), and each kernel's types."""
    import_onnxruntime()
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    found: dict[tuple[str, str, int, int | None], list[dict[str, list[str]]]] = defaultdict(list)
    for kernel in get_all_opkernel_def():
        domain = kernel.domain or "ai.onnx"
        if kernel.provider == "CUDAExecutionProvider" and kernel.op_name in OPERATORS.get(domain, ()):
            since, until = kernel.version_range
            types = {
                name: sorted(one.removeprefix("tensor(").removesuffix(")") for one in allowed)
                for name, allowed in kernel.type_constraints.items()
            }
            found[domain, kernel.op_name, since, until if until < 2**31 - 1 else None].append(types)
    return [
        {"domain": domain, "op": op, "since": since, "until": until, "types": types}
        for (domain, op, since, until), types in sorted(found.items(), key=lambda item: item[0][:3])
    ]


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_kernels", description="List the CUDA kernels of the installed onnxruntime-gpu."
    )
    parser.add_argument("output", type=Path, metavar="FILE", help="JSON, a line an operator")
    parser.add_argument("--preload", type=Path, nargs="+", default=[], metavar="LIBRARY", help="to load first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    onnxruntime = import_onnxruntime()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        print("error: this ONNX Runtime has no CUDA provider; install onnxruntime-gpu", file=sys.stderr)
        return 2
    for path in arguments.preload:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    kernels = list_kernels()
    lines = ",\n".join(json.dumps(kernel, separators=(",", ":")) for kernel in kernels)
    version = onnxruntime.__version__
    arguments.output.write_text(f'{{"onnxruntime-gpu":"{version}","kernels":[\n{lines}\n]}}\n', encoding="utf-8")
    print(f"onnxruntime-gpu {version}: {len(kernels)} rows of {sum(map(len, OPERATORS.values()))} operators")
    return 0


if __name__ == "__main__":
    sys.exit(main())
