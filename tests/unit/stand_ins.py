"""What the unit tests use in place of a trained model: a small tokenizer, an engine that echoes, a small bundle."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qa_onnx.answerer import Answerer
from qa_onnx.bundle import FORMAT_VERSION, Manifest
from qa_onnx.engine import Generation
from qa_onnx.prompt import prepare_tokenizer

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


class EchoEngine:
    """Answers with the question. Notes what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prompts = self.batch_size = None

    def greedy_decode(self, prompts, *, max_new_tokens, batch_size, on_finished):
        self.prompts, self.batch_size = prompts, batch_size
        for _ in prompts:
            on_finished(1)
        return [self._echo(self.tokenizer.decode(prompt.ids), max_new_tokens) for prompt in prompts]

    def _echo(self, prompt, max_new_tokens):
        question = prompt.rpartition("\nQuestion:")[2].removesuffix("\nAnswer:")
        ids = self.tokenizer.encode(question, add_special_tokens=False).ids
        return Generation(
            token_ids=ids[:max_new_tokens], finish_reason="stop" if len(ids) < max_new_tokens else "length"
        )


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


def echo_answerer(**manifest_changes):
    """An answerer that answers each question with the question."""
    manifest = Manifest(
        format_version=FORMAT_VERSION, prompt_template="", files={}, **manifest_fields(**manifest_changes)
    )
    tokenizer = small_tokenizer()
    return Answerer(manifest=manifest, engine=EchoEngine(tokenizer), tokenizer=tokenizer, provider="cpu")


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
