from __future__ import annotations

import dataclasses
import math
import os

import pytest

from qa_onnx import EngineConfig, GenerationConfig, InvalidInputError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "got max_new_tokens 0; expected a whole number of at least 1"),
        ({"num_answers": 0}, "got num_answers 0"),
        ({"num_answers": True}, "got num_answers True"),
        ({"no_repeat_ngram_size": -1}, "got no_repeat_ngram_size -1; expected a whole number of at least 0"),
        ({"stride": -1}, "got stride -1"),
        ({"temperature": -0.1}, "got temperature -0.1; expected a number of at least 0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"temperature": math.inf}, "got temperature inf"),
        ({"temperature": "1"}, "got temperature '1'"),
        ({"temperature": 1.0, "top_p": 0.0}, "got top_p 0.0; expected a number above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "got top_p 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "got top_k -1"),
        ({"temperature": 1.0, "seed": -1}, "got seed -1"),
        ({"no_answer_threshold": 1.1}, "got no_answer_threshold 1.1; expected a probability"),
        ({"no_answer_threshold": -0.1}, "got no_answer_threshold -0.1"),
        ({"extractive": 1}, "got extractive 1; expected True or False"),
        ({"ignore_eos": 1}, "got ignore_eos 1; expected True or False"),
        ({"top_p": 0.9}, "without a temperature; they have no effect"),
        ({"top_k": 5}, "without a temperature"),
        ({"seed": 1}, "without a temperature"),
        ({"temperature": 1.0, "num_answers": 2}, "got num_answers 2 with a temperature"),
        ({"extractive": True, "no_repeat_ngram_size": 2}, "got extractive with no_repeat_ngram_size"),
        ({"ignore_eos": True, "extractive": True}, "got ignore_eos with extractive"),
        ({"ignore_eos": True, "num_answers": 2}, "got ignore_eos with extractive, num_answers"),
        ({"ignore_eos": True, "no_answer_threshold": 0.5}, "or no_answer_threshold, which decide where"),
    ],
)
def test_options_out_of_range_or_at_odds_are_refused_when_made(options, words):
    with pytest.raises(InvalidInputError) as caught:
        GenerationConfig(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("config", [GenerationConfig(), EngineConfig()])
def test_a_config_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 2


@pytest.mark.parametrize("name", ["batch_size", "max_queue"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_counts_are_positive_whole_numbers(name, value):
    with pytest.raises(InvalidInputError, match=f"got {name} {value!r}; expected a whole number of at least 1$"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "name", ["threads", "memory_limit", "max_batch_tokens", "max_prefill_tokens", "max_batch_bytes"]
)
@pytest.mark.parametrize("value", [0, -1, True, "2", 2.0])
def test_budgets_are_positive_whole_numbers_or_none(name, value):
    words = f"got {name} {value!r}; expected a whole number of at least 1; None is the provider's default"
    with pytest.raises(InvalidInputError, match=words):
        EngineConfig(**{name: value})
    assert getattr(EngineConfig(**{name: None}), name) is None
    assert getattr(EngineConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", ["device_id", "prefix_cache_bytes"])
@pytest.mark.parametrize("value", [-1, True, "1", 2.5, None])
def test_device_and_prefix_cache_are_whole_numbers_of_at_least_0(name, value):
    with pytest.raises(InvalidInputError, match=f"got {name} {value!r}; expected a whole number of at least 0"):
        EngineConfig(**{name: value})
    assert getattr(EngineConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 60_001, "2", True, None])
def test_the_wait_is_of_milliseconds(value):
    with pytest.raises(InvalidInputError, match=f"got max_wait_ms {value!r}; expected milliseconds from 0 to 60,000"):
        EngineConfig(max_wait_ms=value)


def test_cuda_graphs_are_on_or_off():
    with pytest.raises(InvalidInputError, match="got cuda_graphs 1; expected True or False"):
        EngineConfig(cuda_graphs=1)


def test_more_threads_than_processors_are_refused(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert EngineConfig(threads=3).threads == 3
    with pytest.raises(InvalidInputError, match="got threads 4; this machine has 3 processors"):
        EngineConfig(threads=4)
