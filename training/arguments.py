"""The settings of a run as the arguments of transformers' Trainer, for the device and the launcher that there are."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from qa_onnx.errors import InvalidInputError
from training.settings import FinetuneConfig

LOGGING_SHARE = 1 / 200
"""Steps between two logs, as a share of all steps: 100 to 200 logs per run, or one per step."""
IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")
WARMUP_NAME = "warmup_ratio" if IS_TRANSFORMERS_4 else "warmup_steps"
"""The argument that is a share of the steps; from transformers 5 on `warmup_steps` is one if it is below 1."""


def check_launcher(config: FinetuneConfig) -> None:
    """Refuses launches whose model cannot be evaluated, and several GPUs without a process each.

    FSDP's first version hides the weights, and with FSDP LoRA's matrices cannot be gathered.

    Raises:
        InvalidInputError: The launch is one of these.
    """
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise InvalidInputError(
            f"there are {torch.cuda.device_count()} GPUs; expected one, or a process for each: torchrun "
            "--nproc-per-node N -m training.finetune ..., or hide the others with CUDA_VISIBLE_DEVICES=0"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise InvalidInputError("got FSDP of version 1; expected version 2: accelerate launch --fsdp_version 2")
    if config.model.lora_rank is not None:
        raise InvalidInputError(
            "--lora-rank and FSDP do not go together: LoRA needs little memory, launch without FSDP"
        )


def make_arguments(config: FinetuneConfig) -> TrainingArguments:
    """Makes Trainer's arguments, and sets the environment variables that would override them."""
    optimization, evaluation = config.optimization, config.evaluation
    precision = optimization.resolved_precision
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # Trainer's torch.load would unpickle anything with it
    # Trainer would prefer the value of a launcher or of an earlier run to its own False.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    has_accelerator = torch.accelerator.is_available()
    scheduler = optimization.lr_scheduler_type
    arguments = TrainingArguments(
        output_dir=str(config.output),
        num_train_epochs=optimization.epochs,
        max_steps=optimization.max_steps,
        per_device_train_batch_size=optimization.batch_size,
        gradient_accumulation_steps=optimization.gradient_accumulation,
        learning_rate=config.resolved_learning_rate,
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,
        **{WARMUP_NAME: optimization.warmup_ratio},
        **(_checkpoint_activations() if optimization.gradient_checkpointing else {}),
        weight_decay=optimization.weight_decay,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=False if torch.cuda.is_available() else None,  # torch_compile would turn it on
        torch_compile=optimization.compile,
        use_cpu=not has_accelerator,
        ddp_backend="gloo" if not has_accelerator and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        eval_strategy="epoch" if evaluation.eval_steps is None else "steps",
        eval_steps=evaluation.eval_steps,
        eval_on_start=evaluation.eval_at_start,
        save_strategy="steps",
        save_steps=evaluation.save_steps,
        logging_steps=LOGGING_SHARE,
        logging_first_step=True,
        report_to=[],
        seed=optimization.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # TrainingProgress shows it
    )
    if not has_accelerator:  # several processes get cpu:0, which torch.load cannot put a checkpoint's tensors on
        arguments._setup_devices = torch.device("cpu")
    return arguments


def _checkpoint_activations() -> dict[str, Any]:
    """Trainer's arguments for activations that are recomputed, which transformers 5 has given other names."""
    name = "gradient_checkpointing" if IS_TRANSFORMERS_4 else "activation_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
