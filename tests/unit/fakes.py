"""Fakes of the unit tests: a small tokenizer, an engine that echoes, an answerer of them, the fields of a manifest."""

from __future__ import annotations

import json
import threading
import time
from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qa_onnx.answerer import Answerer
from qa_onnx.config import EngineConfig
from qa_onnx.engine.kv_cache import CacheLayout
from qa_onnx.engine.prefix_cache import PrefixCache
from qa_onnx.engine.provider import Limits
from qa_onnx.engine.sampling import Predictions
from qa_onnx.engine.sequence import Prompt
from qa_onnx.engine.stats import EngineStats
from qa_onnx.manifest import FORMAT_VERSION, Manifest
from qa_onnx.text.prompt import prepare_tokenizer

SENTENCES = (
    "Context: The Normans were led by Rollo, and settled in Normandy in the tenth century.",
    "Question: Who led the Normans?\nAnswer: Rollo",
    "Question: In which century did the Normans settle in France?\nAnswer: the 10th century",
    "Context: Oxygen is the third most abundant element; it was discovered in 1774 by Joseph Priestley.",
)
END_OF_TEXT = "<|endoftext|>"
CONTEXT = "The Normans were led by Rollo, and settled in Normandy."


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


class FakeBatch:
    """Running sequences of a `FakeEngine`, and the tokens that are still to come of each."""

    def __init__(self, sequences, rests):
        self.sequences = list(sequences)
        self.rests = rests

    def keep(self, indices):
        self.sequences = [self.sequences[index] for index in indices]


class FakeEngine:
    """What the scheduler uses of an engine. The "model" answers a prompt with its suffix, and then ends.

    Attributes:
        prompts: The prompts that were read, in order.
        prefills: For each prefill its new sequences.
        sequence_counts: How many sequences each decode step had.
        drafts: The drafts that were computed, in order.
        batches: The batches whose memory is in use.
    """

    eos_token_id = 0
    uses_cuda_graphs = False
    can_verify_drafts = True

    def __init__(self, *, vocab_size=400, max_positions=128, max_batch_tokens=1536):
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        self.max_batch_tokens = max_batch_tokens
        self.max_row_scores = 10**9
        self.limits = Limits(max_prefill_tokens=512, max_batch_tokens=max_batch_tokens, max_batch_bytes=2**30)
        self.prefix_cache = PrefixCache(0, CacheLayout(layers=1, heads=1, head_size=2))
        self.stats = EngineStats()
        self.prompts, self.prefills, self.sequence_counts, self.batches = [], [], [], []
        self.drafts = []
        self.memory_releases = 0

    def prefill(self, groups, *, carried=None):
        assert carried is None or carried in self.batches
        sequences = [sequence for group in groups for sequence in group.sequences]
        for group in groups:
            assert {sequence.prefix_ids for sequence in group.sequences} == {group.prefix_ids}
        rests = {sequence: self.rest_of(sequence) for sequence in sequences}
        self.prompts += [
            Prompt(prefix_ids=list(sequence.prefix_ids), suffix_ids=list(sequence.suffix_ids)) for sequence in sequences
        ]
        self.prefills.append(sequences)
        self.stats.prefills += 1
        self.stats.prefill_tokens += sum(map(len, sequences))
        batch = FakeBatch(sequences, rests)
        if carried is not None:
            batch.sequences += carried.sequences
            batch.rests |= carried.rests
            self.release(carried)
        self.batches.append(batch)
        return batch, self._predictions(batch, sequences)

    def decode_step(self, batch, token_ids, drafts=None):
        assert batch in self.batches
        drafts = drafts or [[]] * len(token_ids)
        self.drafts += filter(None, drafts)
        self.sequence_counts.append(len(token_ids))
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(token_ids)
        for sequence, token in zip(batch.sequences, token_ids, strict=True):
            rest = batch.rests[sequence]
            batch.rests[sequence] = rest[1:] if rest[:1] == [token] else rest
        return self._predictions(batch, batch.sequences, drafts)

    def append_drafts(self, batch, counts):
        self.stats.decode_tokens += sum(counts)
        self.stats.accepted_draft_tokens += sum(counts)
        for sequence, count in zip(batch.sequences, counts, strict=True):
            batch.rests[sequence] = batch.rests[sequence][count:]

    def release(self, batch):
        self.batches.remove(batch)

    def release_memory(self):
        self.memory_releases += 1

    def rest_of(self, sequence):
        """The tokens that are to come of a sequence that was just read."""
        return list(sequence.suffix_ids)

    def _predictions(self, batch, sequences, drafts=None):
        nexts = []
        for sequence, draft in zip(sequences, drafts or [[]] * len(sequences), strict=True):
            rest = batch.rests[sequence]
            nexts.append(rest[:1])
            for token in draft:  # behind a wrong token comes something else
                rest = rest[1:] if rest[:1] == [token] else [self.vocab_size - 1]
                nexts.append(rest[:1])
        logits = np.zeros((len(nexts), self.vocab_size), np.float32)
        for row, token in zip(logits, nexts, strict=True):
            row[token or self.eos_token_id] = 10.0
        return Predictions.from_logprobs(log_softmax(logits), self.eos_token_id)


class EchoEngine(FakeEngine):
    """Answers with the question."""

    def __init__(self, tokenizer, max_positions):
        super().__init__(max_positions=max_positions)
        self.tokenizer = tokenizer

    def rest_of(self, sequence):
        text = self.tokenizer.decode([*sequence.prefix_ids, *sequence.suffix_ids])
        asked, _, begun = text.rpartition("\nQuestion:")[2].partition("\nAnswer:")
        ids = self.tokenizer.encode(asked, add_special_tokens=False).ids
        return ids[len(self.tokenizer.encode(begun, add_special_tokens=False).ids) :]


def log_softmax(logits):
    """Log-probabilities of logits, float32 [B, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))).astype(np.float32)


class Gate:
    """Has an engine wait at each decode step until `release` is set; `reached` tells that it does."""

    def __init__(self, engine):
        self.reached, self.release = threading.Event(), threading.Event()
        self._step = engine.decode_step
        engine.decode_step = self._wait_and_step

    def _wait_and_step(self, batch, token_ids, drafts=None):
        self.reached.set()
        assert self.release.wait(20)
        return self._step(batch, token_ids, drafts)


def manifest_fields(**changes):
    """A manifest's fields but those that `write_manifest` fills in."""
    return {
        "precision": "fp32",
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
        "windows": {},
    } | changes


def echo_answerer(no_answer=None, config=None, **manifest_changes):
    """An answerer that answers each question with the question; `config` holds fields of `EngineConfig`."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        prompt_template="",
        files={},
        no_answer=no_answer or {},
        scores={},
        **manifest_fields(**manifest_changes),
    )
    tokenizer = small_tokenizer()
    engine = EchoEngine(tokenizer, manifest.max_positions)
    return Answerer(
        manifest=manifest, engine=engine, tokenizer=tokenizer, provider="cpu", config=EngineConfig(**(config or {}))
    )


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def squad_data():
    """Two contexts with three questions; the last is the v2.0 kind that its context does not answer."""

    def question(name, text, *answers, **more):
        golds = [{"text": answer, "answer_start": CONTEXT.index(answer)} for answer in answers]
        return {"id": name, "question": text, "answers": golds} | more

    return {
        "version": "v2.0",
        "data": [
            {
                "title": "Normans",
                "paragraphs": [
                    {
                        "context": CONTEXT,
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


def wait_until(condition):
    """Fails where a condition does not come true within some seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
