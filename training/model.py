"""GPT-2 as this project trains it: the loss costs only what the labelled tokens cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, GPT2Config, GPT2TokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from qa_onnx.errors import InvalidInputError, one_line
from qa_onnx.prompt import prepare_tokenizer

STARTER = Path(__file__).parent / "starter" / "model"
ARCHITECTURES = {"gpt2": GPT2Config()}
IGNORED = -100
"""Label of a token that does not count in the loss (PyTorch's `ignore_index`)."""


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """transformers' class with the same weights and the same loss, computed at the labelled positions only.

    With the loss on the answer a row has some 5 labelled tokens among 200, and the 50,257-wide output layer is
    a third of a small GPT-2's work. The name stays the same, so that checkpoints name transformers' own class.
    """

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
            attention_mask: int64 [B, T].
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
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )[0]
        targets = labels[:, 1:]
        counted = targets != IGNORED
        logits = self.lm_head(hidden[:, :-1][counted]).float()
        if num_items_in_batch is None:
            loss = cross_entropy(logits, targets[counted])
        else:
            loss = cross_entropy(logits, targets[counted], reduction="sum") / num_items_in_batch
        return CausalLMOutputWithCrossAttentions(loss=loss)


def load_tokenizer(name: str | Path) -> GPT2TokenizerFast:
    """Loads a GPT-2 tokenizer from a directory or the hub, set up for `qa_onnx.prompt`.

    Raises:
        InvalidInputError: There is none there, or it has no end-of-text token.
    """
    try:
        tokenizer = GPT2TokenizerFast.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(
            f"no tokenizer could be loaded from {name}: {one_line(error)}. Expected a directory with tokenizer.json "
            "or a hub id and a connection to the hub"
        ) from error
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= len(tokenizer):
        raise InvalidInputError(f"the tokenizer of {name} has no <|endoftext|> token; answers could not be ended")
    prepare_tokenizer(tokenizer.backend_tokenizer)
    return tokenizer


def load_model(name: str) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    """Loads a GPT-2 and its tokenizer: `starter`, a directory, or a hub id such as `gpt2`.

    Only safetensors are read, so nothing is unpickled, and no code of a model repository is run.

    Raises:
        InvalidInputError: There is no such model, or it is not a GPT-2.
    """
    source = STARTER if name == "starter" else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    if config.model_type != "gpt2":
        raise InvalidInputError(f"{name} is a {config.model_type!r} model; expected a GPT-2 ('gpt2')")
    try:
        model = GPT2LMHeadModel.from_pretrained(source, config=config, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_model(name, error) from error
    return model, load_tokenizer(source)


def build_model(architecture: str, tokenizer_name: str | Path) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    """Builds an architecture of `ARCHITECTURES` with random weights (seed them first) for a tokenizer's vocabulary."""
    tokenizer = load_tokenizer(tokenizer_name)
    config = GPT2Config.from_dict(ARCHITECTURES[architecture].to_dict())
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    return GPT2LMHeadModel(config), tokenizer


def _no_model(name: str, error: Exception) -> InvalidInputError:
    return InvalidInputError(
        f"no model could be loaded from {name}: {one_line(error)} Expected 'starter', a directory with config.json "
        "and model.safetensors, or a hub id and a connection to the hub"
    )
