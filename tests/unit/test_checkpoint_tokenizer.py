"""The tokenizer of a checkpoint is a byte-level BPE that fits its model, or is refused; without PyTorch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from checkpoint_folder import (
    CONFIG,
    change_config,
    refusal,
    save_file,
    tensors,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qa_onnx.checkpoint import STARTER_DIRECTORY
from qa_onnx.checkpoint.tokenizer import read_tokenizer
from qa_onnx.errors import InvalidInputError
from qa_onnx.text.constraint import check_byte_level

TEXT = ["Context: The Aller is 211 km long.\nQuestion: How long is it?\nAnswer: 211 km"] * 4


SPECIAL = ["<|endoftext|>", "<unk>"]


def trained(model, trainer, *, pre_tokenizer=None, decoder=None, normalizer=None):
    tokenizer = Tokenizer(model)
    for name, step in (("pre_tokenizer", pre_tokenizer), ("decoder", decoder), ("normalizer", normalizer)):
        if step is not None:
            setattr(tokenizer, name, step)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def bpe(alphabet=(), **steps):
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>"), trainer, **steps)


BYTES = pre_tokenizers.ByteLevel.alphabet()


BYTE_LEVEL = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}


OTHERS = {
    "metaspace": lambda: bpe(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "metaspace with bytes": lambda: bpe(BYTES, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "characters": lambda: bpe(),
    "words apart": lambda: bpe(BYTES, pre_tokenizer=pre_tokenizers.Whitespace(), decoder=decoders.BPEDecoder()),
    "no decoder": lambda: bpe(BYTES, pre_tokenizer=BYTE_LEVEL["pre_tokenizer"]),
    "lower case": lambda: bpe(BYTES, normalizer=normalizers.Lowercase(), **BYTE_LEVEL),
    "stripped": lambda: bpe(BYTES, normalizer=normalizers.Strip(), **BYTE_LEVEL),
    "compatibility": lambda: bpe(BYTES, normalizer=normalizers.NFKC(), **BYTE_LEVEL),
    "without accents": lambda: bpe(
        BYTES, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), **BYTE_LEVEL
    ),
    "not all bytes": lambda: bpe(**BYTE_LEVEL),
    "unigram": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
    "unigram of bytes": lambda: trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=BYTES, show_progress=False
        ),
        **BYTE_LEVEL,
    ),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "words": lambda: trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.Whitespace(),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(folder, kind):
    OTHERS[kind]().save(str(folder / "tokenizer.json"))
    assert "expected a byte-level BPE such as GPT-2's" in refusal(folder)


@pytest.mark.parametrize(
    "steps",
    [
        BYTE_LEVEL,
        {**BYTE_LEVEL, "normalizer": normalizers.NFC()},
        {**BYTE_LEVEL, "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {
            **BYTE_LEVEL,
            "pre_tokenizer": pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        },
    ],
)
def test_byte_level_bpes_of_all_kinds_are_accepted(steps):
    check_byte_level(bpe(BYTES, **steps))


def test_a_folder_from_before_tokenizer_json_has_the_same_tokenizer(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(STARTER_DIRECTORY / name, old)
    (found, options), (expected, _) = read_tokenizer(old), read_tokenizer(STARTER_DIRECTORY)
    text = " Zoë's 7 words,\n<|endoftext|> 東京\t."
    assert found.encode(text).ids == expected.encode(text).ids
    assert found.decode(found.encode(text).ids) == text
    assert options["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"[PAD]": 8192, "<|endoftext|>": 0}, None),
        ({"[SEP]": 8193, "[PAD]": 8192}, None),
        ({"[PAD]": 8200}, "'[PAD]' as token 8200; expected 8192"),
        ({"<|endoftext|>": 8192}, "'<|endoftext|>' as token 8192; expected 0"),
        ({"[PAD]": "8192"}, "expected 8192, the next one"),
        ({"[PAD]": 8192, "[SEP]": None}, "is no tokenizer"),
    ],
)
def test_added_tokens_have_the_ids_that_they_were_trained_with(tmp_path, added, message):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(STARTER_DIRECTORY / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if message is None:
        found, _ = read_tokenizer(tmp_path)
        assert {token: found.token_to_id(token) for token in added} == added
    else:
        with pytest.raises(InvalidInputError) as refused:
            read_tokenizer(tmp_path)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}', "is no tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", b'{"eos_token": 7}', "has eos_token 7; expected a string"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "has no </s> among the 8192 tokens of its model"),
        ("special_tokens_map.json", b'{"eos_token": {"content": ["x"]}}', "expected a string"),
    ],
)
def test_a_damaged_tokenizer_is_refused(folder, name, content, message):
    if name == "special_tokens_map.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_bytes(content)
    assert message in refusal(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    small = {**CONFIG, "vocab_size": 8191}
    (folder / "config.json").write_text(json.dumps(small))
    save_file({**tensors(), "transformer.wte.weight": np.ones((8191, 4), np.float32)}, folder / "model.safetensors")
    assert "has 8192 tokens and its model embeds 8191; expected at most as many" in refusal(folder)


@pytest.mark.parametrize("positions", [1, 4, 12])
def test_a_model_without_positions_for_any_prompt_is_refused(folder, positions):
    change_config(folder, n_positions=positions)
    save_file(
        {**tensors(), "transformer.wpe.weight": np.ones((positions, 4), np.float32)}, folder / "model.safetensors"
    )
    assert f"has {positions} positions, and its tokenizer makes 12 tokens of the shortest prompt" in refusal(folder)
