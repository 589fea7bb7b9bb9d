"""The inputs and outputs of a bundle's two graphs: what the export builds, and what a loaded graph is checked against.

`export/decoder.py` tells what the tensors mean. A letter in a shape is any number: N packed tokens, M of them whose
next token is wanted, G groups of R sequences with T new tokens each, P prefix columns, C columns of their own.
"""

from __future__ import annotations

from qa_onnx.engine.kv_cache import (
    ALIGNMENT,
    COPY_INDEX,
    PAST_NAME,
    PREFIX_NAME,
    PRESENT_NAME,
    SOURCE_NAME,
    TARGET_NAME,
    CacheLayout,
)
from qa_onnx.engine.session import Signature, TensorType


def decoder_inputs(layout: CacheLayout, *, has_kernels: bool = False) -> Signature:
    """The inputs of the decoder of a model with such caches; of `export/kernel_decoder.py`'s, if it has kernels."""
    shapes: dict[str, tuple[int | str, ...]] = {"input_ids": ("N",), "position_ids": ("N",)}
    if has_kernels:
        shapes |= {"output_index": ("M",), "segments": ("S", 5)}
    else:
        shapes |= {
            "slot_index": ("G", "R", "T"),
            "context_index": ("N", layout.heads),
            "output_index": ("M",),
            "output_slot_index": ("G", "R", 1),
            "output_context_index": ("M", layout.heads),
            "write_index": ("G",),
        }
    shapes |= {"prefix_lengths": ("G",), "suffix_starts": ("G", "R")}
    arrays = {name: TensorType("int64", shape) for name, shape in shapes.items()}
    return arrays | _caches(layout, PREFIX_NAME, 1, "P") | _caches(layout, PAST_NAME, "R", "C")


def decoder_outputs(layout: CacheLayout, vocab_size: int, *, has_kernels: bool = False) -> Signature:
    """The outputs of the decoder of a model with such caches and so many tokens.

    With kernels, which are for the CPU, the most probable token is found in numpy.
    """
    outputs = {
        "logprobs": TensorType("float32", ("M", vocab_size)),
        "eos_logprobs": TensorType("float32", ("M", 1)),
    }
    if not has_kernels:
        outputs |= {"token_ids": TensorType("int64", ("M", 1)), "token_logprobs": TensorType("float32", ("M", 1))}
    return outputs | _caches(layout, PRESENT_NAME, "R", "C")


def copier_inputs(layout: CacheLayout) -> Signature:
    """The inputs of the graph that copies KV caches: chunks of `ALIGNMENT` columns, and which of them to copy."""
    return {COPY_INDEX: TensorType("int64", ("B",))} | _chunks(layout, SOURCE_NAME, "A")


def copier_outputs(layout: CacheLayout) -> Signature:
    """The outputs of the graph that copies KV caches."""
    return _chunks(layout, TARGET_NAME, "B")


def _caches(layout: CacheLayout, prefix: str, rows: int | str, columns: str) -> Signature:
    kind = TensorType(layout.dtype, ("G", layout.heads, rows, columns, layout.head_size))
    return {f"{prefix}{name}": kind for name in layout.names}


def _chunks(layout: CacheLayout, prefix: str, rows: str) -> Signature:
    kind = TensorType(layout.dtype, (rows, ALIGNMENT * layout.head_size))
    return {f"{prefix}{name}": kind for name in layout.names}
