"""Mutations of a bundle's tokenizer: well-formed parts that are costly, huge or of another kind."""

from __future__ import annotations

import json
from random import Random

from bench.fuzz.mutable_bundle import MutableBundle
from qa_onnx.manifest import TOKENIZER_NAME


def replace_tokenizer_part(random: Random, bundle: MutableBundle) -> str:
    """Puts a well-formed part of another tokenizer into the tokenizer: a costly or huge one, or one of another kind."""
    try:
        values = json.loads(bundle.read(TOKENIZER_NAME))
        model = values["model"]
        vocabulary = list(model["vocab"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "nothing"
    name, text = random.choice(_TOKENIZER_PARTS).split(" ", 1)
    choices = {
        "REGEX": (r"(a+)+$", r"(\w+\s?)+\d$", r"(?=(a|b|ab)*c)", "", ".", "(", "(.*)*x", r"\p{L}{1,60000}", "\u00e9|"),
        "HUGE": ("", "x", " " * 1000, "x" * 10_000_000),
        "TOKEN": (" ", "the", "", "Context", "\n", "\u00e9", random.choice(vocabulary)),
        "ID": (0, 5, len(vocabulary), 2**31, 2**32 - 1),
        "SIZE": (0, 1, 100, 2**33, 2**60),
        "NUMBER": (0.0, 1e308, -1e308, 0.5, -1),
        "BOOLEAN": (True, False),
    }
    for word, values_of_word in choices.items():
        while word in text:
            text = text.replace(word, json.dumps(random.choice(values_of_word)), 1)
    part = json.loads(text)
    if name == "model" and "type" not in part:  # changes the model that is there
        part = model | part
    elif name == "vocab":
        name, step = "model", part
        part = model | {"vocab": {token: place * step for place, token in enumerate(vocabulary)}}
    values[name] = part
    bundle.write(TOKENIZER_NAME, json.dumps(values).encode())
    return f"{TOKENIZER_NAME}: {name} is {text[:160]}"


_TOKENIZER_PARTS = """\
normalizer {"type": "Replace", "pattern": {"Regex": REGEX}, "content": HUGE}
normalizer {"type": "Replace", "pattern": {"String": TOKEN}, "content": HUGE}
normalizer {"type": "Prepend", "prepend": HUGE}
normalizer {"type": "Lowercase"}
normalizer {"type": "NFKD"}
normalizer {"type": "StripAccents"}
normalizer {"type": "Nmt"}
normalizer {"type": "ByteLevel"}
normalizer {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
normalizer {"type": "Sequence", "normalizers": [REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E, REPLACE_E]}
pre_tokenizer {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": BOOLEAN}
pre_tokenizer {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}
pre_tokenizer {"type": "Whitespace"}
pre_tokenizer {"type": "UnicodeScripts"}
pre_tokenizer null
decoder {"type": "Replace", "pattern": {"Regex": REGEX}, "content": HUGE}
decoder {"type": "ByteFallback"}
decoder {"type": "WordPiece", "prefix": "##", "cleanup": BOOLEAN}
decoder {"type": "Strip", "content": "e", "start": SIZE, "stop": SIZE}
decoder null
post_processor {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
truncation {"direction": "Left", "max_length": SIZE, "strategy": "LongestFirst", "stride": SIZE}
padding {"strategy": {"Fixed": SIZE}, "direction": "Left", "pad_to_multiple_of": SIZE, "pad_id": ID, "pad_type_id": 0, \
"pad_token": TOKEN}
model {"type": "WordLevel", "vocab": {"a": 0, "Context": ID}, "unk_token": TOKEN}
model {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##", \
"max_input_chars_per_word": SIZE}
model {"type": "Unigram", "vocab": [["a", NUMBER], ["Context", NUMBER]], "unk_id": ID, "byte_fallback": BOOLEAN}
model {"type": "BPE", "vocab": {"a": 0}, "merges": []}
model {"dropout": NUMBER}
model {"unk_token": TOKEN, "byte_fallback": true}
model {"end_of_word_suffix": "</w>", "continuing_subword_prefix": TOKEN}
model {"ignore_merges": true, "merges": []}
vocab ID
added_tokens [{"id": ID, "content": TOKEN, "single_word": BOOLEAN, "lstrip": BOOLEAN, "rstrip": BOOLEAN, \
"normalized": BOOLEAN, "special": BOOLEAN}]""".replace(
    "REPLACE_E", '{"type": "Replace", "pattern": {"String": "e"}, "content": "eeeeeeee"}'
).splitlines()
"""Parts of a `tokenizer.json`; the words in capitals are drawn from lists."""
