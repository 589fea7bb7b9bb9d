"""GPT-2 as this project trains it: the loss costs only what the labelled tokens cost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2TokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from qa_onnx.checkpoint import load_checkpoint, load_tokenizer

ARCHITECTURES = {"gpt2": GPT2Config()}
IGNORED = -100
"""Label of a token that does not count in the loss (PyTorch's `ignore_index`)."""


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """transformers' class with the same weights and the same loss, computed at the labelled positions only.

    With the loss on the answer a row has some 5 labelled tokens among 200, and the 50,257-wide output layer is
    a third of a small GPT-2's work. The name stays the same, so that checkpoints name transformers' own class.

    Attributes:
        label_smoothing: Share of each target that goes to all tokens alike (Szegedy et al., 2016).
    """

    label_smoothing = 0.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Computes the loss where labels are given, and otherwise what transformers' own class computes.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T]; or bool [B, 1, T, T], what each token sees (`training.data.Collator`).
            position_ids: int64 [B, T]. `generate` passes it only to a `forward` that names it, and without it the
                padded rows of a batch go wrong; likewise `logits_to_keep`, without which it computes logits in vain.
            labels: int64 [B, T], `IGNORED` where a token does not count.
            logits_to_keep: As of transformers' class.
            num_items_in_batch: Labelled tokens over all accumulated batches; the loss is their mean then.
            options: As of transformers' class, which gets them unchanged.
        """
        if labels is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **options,
            )
        assert input_ids is not None, "labels are those of tokens"
        if attention_mask is not None and attention_mask.dtype == torch.bool:  # else each layer would convert it
            dtype = (
                torch.get_autocast_dtype(input_ids.device.type)
                if torch.is_autocast_enabled(input_ids.device.type)
                else self.dtype
            )
            added = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
            attention_mask = added.masked_fill_(~attention_mask, torch.finfo(dtype).min)
        self._extend_causal_mask(input_ids.shape[1])
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        targets = labels[:, 1:]
        counted = targets != IGNORED
        logits = self.lm_head(hidden[:, :-1][counted]).float()
        loss = cross_entropy(logits, targets[counted], reduction="sum", label_smoothing=self.label_smoothing)
        loss = loss / (len(logits) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithCrossAttentions(loss=loss)

    def _extend_causal_mask(self, tokens: int) -> None:
        """Eager attention has a causal mask as large as the model's positions; packed rows have more tokens."""
        attentions = [block.attn for block in self.transformer.h]
        if self.config._attn_implementation == "eager" and tokens > attentions[0].bias.shape[-1]:
            mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self.device).tril()
            for attention in attentions:
                attention.bias = mask


def load_model(name: str, *, dropout: float | None = None) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    """Loads a GPT-2 and its tokenizer: `starter`, a directory, or a hub id such as `gpt2`.

    Only safetensors are read, so nothing is unpickled, and no code of a model repository is run.

    Args:
        name: Which.
        dropout: Of embeddings, attention and residuals; None leaves the model's own.

    Raises:
        InvalidInputError: As from `qa_onnx.checkpoint.load_checkpoint`.
    """
    return load_checkpoint(name, model_class=GPT2LMHeadModel, dropout=dropout)


def build_model(
    architecture: str, tokenizer_name: str | Path, *, dropout: float | None = None
) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    """Builds an architecture of `ARCHITECTURES` with random weights (seed them first) for a tokenizer's vocabulary."""
    tokenizer = load_tokenizer(tokenizer_name)
    config = GPT2Config.from_dict(ARCHITECTURES[architecture].to_dict(), attn_implementation="sdpa")
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    if dropout is not None:
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return GPT2LMHeadModel(config), tokenizer


def add_lora(model: GPT2LMHeadModel, *, rank: int, alpha: float, dropout: float) -> PeftModel:
    """Freezes a model and adds trainable products of two thin matrices to its projections (LoRA, Hu et al., 2021).

    Args:
        model: Becomes part of what is returned.
        rank: Width of the thin matrices.
        alpha: Their product is scaled by `alpha / rank`.
        dropout: Before them.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=dropout,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,  # GPT-2's projections are stored [in, out]
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_lora(model: GPT2LMHeadModel | PeftModel) -> GPT2LMHeadModel:
    """The model itself, or a copy in which LoRA's matrices are added to the weights: nothing has to know of LoRA."""
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model


def gather_weights(model: GPT2LMHeadModel | PeftModel) -> GPT2LMHeadModel | PeftModel:
    """The model itself; of one whose weights FSDP has split over the processes, a copy with all of them in each.

    All processes have to call it.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    gathered = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    with torch.device(model.device):
        copied = GPT2LMHeadModel(model.config)
    copied.load_state_dict(gathered)
    return copied
