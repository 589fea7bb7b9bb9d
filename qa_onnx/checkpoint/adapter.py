"""LoRA adapters of PEFT, merged into their base: a matrix product each, so that PEFT is not needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa_onnx.checkpoint.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    INDEX_NAME,
    MAX_NAME_LENGTH,
    WEIGHTS_NAME,
    file_in,
    listed,
    locate,
    no_weights,
    open_tensors,
    read_json,
)
from qa_onnx.errors import InvalidInputError, one_line

if TYPE_CHECKING:
    import torch

LORA_TENSOR = re.compile(r"base_model\.model\.(?:transformer\.)?(h\.\d+\.(?:attn|mlp)\.c_\w+)\.lora_([AB])\.weight")
LORA_FIELDS = (
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode "
    "r lora_alpha lora_dropout use_rslora fan_in_fan_out bias init_lora_weights "
    "target_modules exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size"
).split()
"""Fields of an adapter's configuration that are used, or say only how it was trained.

The last two are of no effect without `megatron_config` and `use_qalora`.
"""
MERGE_HINT = "Merge it with peft's merge_and_unload and save_pretrained(DIR), and load the result"


def read_adapter(folder: Path) -> dict[str, Any] | None:
    """The configuration of a LoRA adapter; None where the directory holds none."""
    config = read_json(folder, ADAPTER_CONFIG_NAME)
    if config is None:
        return None
    if any((folder / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise InvalidInputError(
            f"the directory holds a whole model and an adapter, {ADAPTER_CONFIG_NAME}; expected one of them. "
            "Remove the other one's files"
        )
    if config.get("peft_type") != "LORA":
        raise InvalidInputError(
            f"it is a PEFT adapter of type {config.get('peft_type')!r}; expected 'LORA'. {MERGE_HINT}"
        )
    used = [name for name, value in config.items() if value and name not in LORA_FIELDS]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    used += ["init_lora_weights"] if config.get("init_lora_weights") not in (None, True, False, "gaussian") else []
    if used:
        raise InvalidInputError(
            f"the adapter uses {listed(used)}; expected plain LoRA, which is merged when it is loaded. {MERGE_HINT}"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 2**31:
        raise InvalidInputError(f"{ADAPTER_CONFIG_NAME} has r {rank!r:.100}; expected a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise InvalidInputError(f"{ADAPTER_CONFIG_NAME} has lora_alpha {alpha!r:.100}; expected a number")
    if file_in(folder, ADAPTER_NAME) is None:
        raise no_weights(folder, ADAPTER_NAME)
    return config


def locate_base(folder: Path, adapter: Mapping[str, Any]) -> Path:
    """The model that an adapter was trained on: a directory, relative to the adapter or to here, or a hub id."""
    name, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not isinstance(name, str) or not name:
        raise InvalidInputError(
            f"it is a LoRA adapter that names no base. {MERGE_HINT}; or write the base's directory into "
            f"{ADAPTER_CONFIG_NAME}, as base_model_name_or_path"
        )
    inside = folder / name
    try:
        base = inside if inside.is_dir() else locate(name, revision=revision if isinstance(revision, str) else None)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"it is a LoRA adapter whose base {name!r:.200} cannot be found: {one_line(error)}. {MERGE_HINT}"
        ) from error
    if (base / ADAPTER_CONFIG_NAME).exists():
        raise InvalidInputError(f"it is a LoRA adapter whose base {name!r:.200} is an adapter itself. {MERGE_HINT}")
    return base


def merge(weights: dict[str, torch.Tensor], folder: Path, adapter: Mapping[str, Any]) -> None:
    """Adds an adapter's products to the weights: `W + alpha / r * (B A)^T` (LoRA, Hu et al., 2021).

    Args:
        weights: Of the base, float32 [in, out] by their names without `transformer.`.
        folder: Of the adapter, with A [r, in] and B [out, r] of each matrix.
        adapter: Its configuration.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    with open_tensors(folder / ADAPTER_NAME, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            match = LORA_TENSOR.fullmatch(name)
            if match is None or f"{match[1]}.weight" not in weights:
                raise InvalidInputError(
                    f"the adapter has the tensor {name[:MAX_NAME_LENGTH]}; expected LoRA's of the matrices in "
                    f"the layers of its base. {MERGE_HINT}"
                )
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = file.get_tensor(name).float()
    if not factors:
        raise InvalidInputError(f"{ADAPTER_NAME} has no tensors; expected LoRA's")
    rank = adapter["r"]
    scale = adapter["lora_alpha"] / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    for name, pair in factors.items():
        rows, columns = weights[name].shape
        shapes = {part: tuple(tensor.shape) for part, tensor in pair.items()}
        if shapes != {"A": (rank, rows), "B": (columns, rank)}:
            raise InvalidInputError(
                f"the adapter's matrices for {name} are {shapes}; expected A {(rank, rows)} and B {(columns, rank)}. "
                "Is its base another model?"
            )
        weights[name] = weights[name] + scale * (pair["B"] @ pair["A"]).T
