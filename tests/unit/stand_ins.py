"""What the unit tests use in place of a trained model: a small tokenizer, an engine that echoes, a small bundle."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qa_onnx.answerer import Answerer
from qa_onnx.bundle import FORMAT_VERSION, Manifest
from qa_onnx.prompt import prepare_tokenizer
from qa_onnx.session import Limits

SENTENCES = (
    "Context: The Normans were led by Rollo, and settled in Normandy in the tenth century.",
    "Question: Who led the Normans?\nAnswer: Rollo",
    "Question: In which century did the Normans settle in France?\nAnswer: the 10th century",
    "Context: Oxygen is the third most abundant element; it was discovered in 1774 by Joseph Priestley.",
)
END_OF_TEXT = "<|endoftext|>"
PASSAGE = "The Normans were led by Rollo, and settled in Normandy."


@cache
def small_tokenizer(*, trim_offsets: bool = False) -> Tokenizer:
    """A byte-level BPE of the same make as GPT-2's, with 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    prepare_tokenizer(tokenizer)
    return tokenizer


class SpyTokenizer:
    """Notes every text that is encoded, and fails the test where there are more of them than `at_most`."""

    def __init__(self, tokenizer, at_most=200):
        self.tokenizer = tokenizer
        self.at_most = at_most
        self.encoded = []

    def encode(self, text, **options):
        self._note([text])
        return self.tokenizer.encode(text, **options)

    def encode_batch(self, texts, **options):
        self._note(texts)
        return self.tokenizer.encode_batch(texts, **options)

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def _note(self, texts):
        self.encoded += texts
        assert len(self.encoded) <= self.at_most, "it encodes again and again"


class EchoState:
    """A batch of `EchoEngine`: for each row the tokens that are still to come."""

    grid = SimpleNamespace(give_back=lambda: None)

    def __init__(self, rests):
        self.rests = rests
        self.prompts = np.array(list(rests))
        self.logits = np.zeros((len(rests), 400), np.float32)
        for logits, rest in zip(self.logits, rests.values(), strict=True):
            logits[rest[0] if rest else 0] = 10.0

    def select(self, chosen):
        return EchoState({number: self.rests[number] for number in self.prompts[chosen].tolist()})


class EchoEngine:
    """Answers with the question. Notes the prompts that it read, and how many rows each step had."""

    eos_token_id = 0
    limits = Limits(prefill_tokens=512, batch_tokens=1536)

    def __init__(self, tokenizer, max_positions):
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.prompts, self.row_counts = [], []

    def prefill(self, prompts, groups, *, carried=None, known=None):
        rests = {number: self._echo(prompts[number]) for group in groups for number in group.prompts}
        self.prompts += [prompts[number] for number in rests]
        return EchoState(rests | (carried.rests if carried else {}))

    def decode_step(self, state, token_ids):
        self.row_counts.append(len(token_ids))
        return EchoState(
            {
                number: rest[1:] if rest[:1] == [token] else rest
                for (number, rest), token in zip(state.rests.items(), token_ids.tolist(), strict=True)
            }
        )

    def keep_passages(self, grid, queue):
        return {}

    def _echo(self, prompt):
        asked, _, begun = self.tokenizer.decode(prompt.ids).rpartition("\nQuestion:")[2].partition("\nAnswer:")
        ids = self.tokenizer.encode(asked, add_special_tokens=False).ids
        return ids[len(self.tokenizer.encode(begun, add_special_tokens=False).ids) :]


def manifest_fields(**changes):
    """A manifest's fields but those that `write_manifest` fills in."""
    return {
        "precision": "fp32",
        "inputs": ["input_ids"],
        "outputs": ["logits"],
        "eos_token_id": 0,
        "max_positions": 128,
        "layers": 1,
        "heads": 1,
        "head_size": 2,
        "vocab_size": 400,
        "source_model": "small",
        "package_versions": {"qa_onnx": "0"},
        "parity": {},
        "precision_loss": {},
    } | changes


def echo_answerer(no_answer=None, options=None, **manifest_changes):
    """An answerer that answers each question with the question."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        prompt_template="",
        files={},
        no_answer=no_answer or {},
        **manifest_fields(**manifest_changes),
    )
    tokenizer = small_tokenizer()
    engine = EchoEngine(tokenizer, manifest.max_positions)
    return Answerer(manifest=manifest, engine=engine, tokenizer=tokenizer, provider="cpu", **(options or {}))


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def squad_data():
    """Two passages with three questions; the last is the v2.0 kind that its passage does not answer."""

    def question(name, text, *answers, **more):
        golds = [{"text": answer, "answer_start": PASSAGE.index(answer)} for answer in answers]
        return {"id": name, "question": text, "answers": golds} | more

    return {
        "version": "v2.0",
        "data": [
            {
                "title": "Normans",
                "paragraphs": [
                    {
                        "context": PASSAGE,
                        "qas": [
                            question("q1", "Who led the Normans?", "Rollo", "led by Rollo"),
                            question("q2", "Where did they settle?", "in Normandy", is_impossible=False),
                        ],
                    },
                    {"context": "Nothing.", "qas": [question("q3", "Why?", is_impossible=True)]},
                ],
            }
        ],
    }
