"""A GPT-2 checkpoint on disk, checked before it is loaded: the only place that reads a model of others for PyTorch.

A checkpoint is a directory, or a repository of the hub, with `config.json`, `model.safetensors` (or shards and their
index) and `tokenizer.json`; or a LoRA adapter of PEFT, which is merged into its base. `starter` is the embedded model.
All of it is data: JSON of bounded size, and tensors of safetensors files inside the directory. Of the configuration
only the fields of `ModelSettings` are used, so that no other field reaches transformers, which fetches and runs code
for some of them (CVE-2026-4372).

Importing this module imports neither PyTorch nor transformers; `load_checkpoint` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from qa_onnx.checkpoint.adapter import locate_base, merge, read_adapter
from qa_onnx.checkpoint.files import STARTER, STARTER_DIRECTORY, TOKENIZER_NAME, file_in, locate
from qa_onnx.checkpoint.settings import ModelSettings, read_settings
from qa_onnx.checkpoint.tokenizer import read_tokenizer, wrap
from qa_onnx.checkpoint.weights import build, check_weights, read_weights, weight_files
from qa_onnx.errors import InvalidInputError, one_line
from qa_onnx.text.prompt import encode_prompts

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

__all__ = ["STARTER", "STARTER_DIRECTORY", "load_checkpoint", "load_tokenizer"]


def load_checkpoint(
    name: str | Path, *, model_class: type[GPT2LMHeadModel] | None = None, dropout: float | None = None
) -> tuple[GPT2LMHeadModel, GPT2TokenizerFast]:
    """Loads a GPT-2, and its tokenizer set up for `qa_onnx.text.prompt`.

    Args:
        name: `starter`, a directory, or a hub id such as `gpt2`. Of a LoRA adapter of PEFT the merged model is loaded.
        model_class: A class with the weights of transformers' `GPT2LMHeadModel`, which None is.
        dropout: Of embeddings, attention and residuals; None leaves the model's own.

    Returns:
        The model, float32 on the CPU in evaluation mode, and the tokenizer.

    Raises:
        InvalidInputError: There is no such model, it is not a plain GPT-2, its weights do not fit its configuration or
            are not finite, or its tokenizer is another model's, not a byte-level BPE or without an end-of-text token.
    """
    with _naming("model", name):
        folder = locate(name)
        adapter = read_adapter(folder)
        base = folder if adapter is None else locate_base(folder, adapter)
        settings = read_settings(base)
        sources = check_weights(weight_files(base), settings)
        bpe, options = read_tokenizer(folder if file_in(folder, TOKENIZER_NAME) else base)
        _check_fit(bpe, options["eos_token"], settings)
        tokenizer = wrap(bpe, options)
        weights = read_weights(sources, settings)
        if adapter is not None:
            merge(weights, folder, adapter)
        model = build(weights, settings, eos_token_id=tokenizer.eos_token_id, model_class=model_class, dropout=dropout)
    return model, tokenizer


def load_tokenizer(name: str | Path) -> GPT2TokenizerFast:
    """Loads the tokenizer of `starter`, a directory or a hub id, set up for `qa_onnx.text.prompt`.

    Raises:
        InvalidInputError: There is none, or it is not a byte-level BPE.
    """
    with _naming("tokenizer", name):
        return wrap(*read_tokenizer(locate(name)))


@contextmanager
def _naming(kind: str, name: str | Path) -> Iterator[None]:
    """Puts what could not be loaded in front of an error, and makes one of a file that cannot be read."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"no {kind} could be loaded from {name}: {error}") from error
    except OSError as error:
        raise InvalidInputError(
            f"no {kind} could be loaded from {name}: {one_line(error):.300}; expected files with read permission"
        ) from error


def _check_fit(bpe: Tokenizer, end_of_text: str, settings: ModelSettings) -> None:
    """Refuses a tokenizer that is not that of the model."""
    if bpe.token_to_id(end_of_text) is None:
        raise InvalidInputError(
            f"the tokenizer has no {end_of_text} among the {settings.vocab_size} tokens of its model; answers could "
            "not be ended. Add the token and train its embedding, or take another tokenizer.json"
        )
    tokens = max(bpe.get_vocab().values()) + 1
    if tokens > settings.vocab_size:
        raise InvalidInputError(
            f"the tokenizer has {tokens} tokens and its model embeds {settings.vocab_size}; expected at most as many. "
            "Is tokenizer.json another model's?"
        )
    (shortest,) = encode_prompts(bpe, ["?"], ["."])
    if len(shortest) >= settings.n_positions:
        raise InvalidInputError(
            f"the model has {settings.n_positions} positions, and its tokenizer makes {len(shortest)} tokens of the "
            "shortest prompt; expected more positions than that"
        )
