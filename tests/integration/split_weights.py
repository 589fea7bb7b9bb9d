"""Splits a model's weights over the processes as FSDP does, gathers them, and saves what each process got."""

from __future__ import annotations

import sys

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from training.model import gather_weights, load_model

source, output = sys.argv[1:]
torch.distributed.init_process_group("gloo")
model, _ = load_model(source)
for block in model.transformer.h:
    fully_shard(block)
fully_shard(model)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
gather_weights(model).save_pretrained(f"{output}/{torch.distributed.get_rank()}")
torch.distributed.destroy_process_group()
