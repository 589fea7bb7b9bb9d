"""The tokenizer of a checkpoint: a byte-level BPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from qa_onnx.checkpoint.files import (
    ADDED_TOKENS_NAME,
    MAX_INDEX_BYTES,
    MERGES_NAME,
    SPECIAL_TOKENS_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    VOCABULARY_NAME,
    read_file,
    read_json,
)
from qa_onnx.errors import InvalidInputError
from qa_onnx.text.constraint import check_byte_level
from qa_onnx.text.prompt import MAX_TOKENIZER_BYTES, check_cost, errors_of_tokenizers, prepare_tokenizer

if TYPE_CHECKING:
    from transformers import GPT2TokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level BPE, and the options that transformers' class takes with it, `eos_token` among them."""
    text = read_file(folder, TOKENIZER_NAME, MAX_TOKENIZER_BYTES)
    with errors_of_tokenizers(f"{TOKENIZER_NAME} is no tokenizer; copy it again from the model that it is of"):
        bpe = _read_vocabulary(folder) if text is None else Tokenizer.from_str(text)
        check_cost(bpe)
        prepare_tokenizer(bpe)
        check_byte_level(bpe)
    config = read_json(folder, TOKENIZER_CONFIG_NAME, MAX_INDEX_BYTES) or {}
    named = {**(read_json(folder, SPECIAL_TOKENS_NAME) or {}), **config}
    options: dict[str, Any] = {"add_prefix_space": config.get("add_prefix_space") is True}
    if isinstance(config.get("model_max_length"), int):
        options["model_max_length"] = config["model_max_length"]
    for name in ("eos_token", "bos_token", "unk_token", "pad_token"):
        token = named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise InvalidInputError(f"{TOKENIZER_CONFIG_NAME} has {name} {token!r:.100}; expected a string")
        if name == "eos_token":
            options[name] = token or END_OF_TEXT
        elif token and bpe.token_to_id(token) is not None:
            options[name] = token
        elif name != "pad_token":
            options[name] = options["eos_token"]
    return bpe, options


def _read_vocabulary(folder: Path) -> Tokenizer:
    """The tokenizer of a directory without `tokenizer.json`, as transformers' GPT2Tokenizer writes it."""
    vocabulary = read_json(folder, VOCABULARY_NAME, MAX_TOKENIZER_BYTES)
    merges = read_file(folder, MERGES_NAME, MAX_TOKENIZER_BYTES)
    if vocabulary is None or merges is None:
        raise InvalidInputError(f"{TOKENIZER_NAME} is not there; copy the tokenizer's files into the model's directory")
    lines = (line for line in merges.split("\n") if line.strip() and not line.startswith("#version"))
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    added = read_json(folder, ADDED_TOKENS_NAME) or {}
    for token in sorted(added, key=lambda token: added[token]):
        bpe.add_special_tokens([token])
        if bpe.token_to_id(token) != added[token]:
            raise InvalidInputError(
                f"{ADDED_TOKENS_NAME} has {token!r:.100} as token {added[token]!r:.100}; expected "
                f"{bpe.token_to_id(token)}, the next one after {VOCABULARY_NAME}. Copy both from the same model"
            )
    return bpe


def wrap(bpe: Tokenizer, options: Mapping[str, Any]) -> GPT2TokenizerFast:
    """The tokenizer as transformers' class, set up for `qa_onnx.text.prompt`."""
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast(tokenizer_object=bpe, **options)
    prepare_tokenizer(tokenizer.backend_tokenizer)
    return tokenizer
