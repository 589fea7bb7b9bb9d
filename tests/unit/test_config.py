from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
import pytest

from qa_onnx import EngineConfig, GenerationConfig, InvalidInputError

MANY = {
    "max_new_tokens": 5,
    "temperature": 0.5,
    "top_k": 3,
    "seed": 7,
    "extractive": True,
    "no_answer_threshold": 0.25,
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "got max_new_tokens 0; expected a whole number of at least 1"),
        ({"num_answers": 0}, "got num_answers 0"),
        ({"num_answers": True}, "got num_answers True"),
        ({"no_repeat_ngram_size": -1}, "got no_repeat_ngram_size -1; expected a whole number of at least 0"),
        ({"stride": -1}, "got stride -1"),
        ({"temperature": -0.1}, "got temperature -0.1; expected 0 (greedy), or a number from 0.001 on"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"temperature": math.inf}, "got temperature inf"),
        ({"temperature": "1"}, "got temperature '1'"),
        ({"temperature": 1e-310}, "got temperature 1e-310"),
        ({"temperature": 0.0009}, "got temperature 0.0009"),
        ({"temperature": 10**400}, "got temperature a number of 1329 bits"),
        ({"temperature": True}, "got temperature True"),
        ({"temperature": np.array([1.0])}, "got temperature array([1.])"),
        ({"max_new_tokens": 10**400}, "got max_new_tokens a number of 1329 bits"),
        ({"max_new_tokens": 10**5000}, "got max_new_tokens a number of"),
        (
            {"max_new_tokens": 2**63},
            "got max_new_tokens 9223372036854775808; expected a whole number of less than 2^63",
        ),
        ({"max_new_tokens": np.float32(2)}, "got max_new_tokens np.float32(2.0)"),
        ({"max_new_tokens": "x" * 10**6}, "got max_new_tokens 'xxx"),
        ({"num_answers": 101}, "got num_answers 101; expected at most 100"),
        ({"temperature": 1.0, "seed": 10**400}, "got seed a number of"),
        ({"no_answer_threshold": np.nan}, "got no_answer_threshold nan"),
        ({"no_answer_threshold": 10**400}, "got no_answer_threshold a number of"),
        ({"extractive": np.int64(1)}, "got extractive np.int64(1)"),
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
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "options",
    [{"num_answers": 100}, {"temperature": 0.001}, {"temperature": 0}, {"no_answer_threshold": 1}, {"top_k": 0}],
    ids=str,
)
def test_options_at_their_limits_are_taken(options):
    config = GenerationConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_numpy_numbers_are_taken_and_kept_as_pythons():
    config = GenerationConfig(
        max_new_tokens=np.int64(5),
        num_answers=np.uint8(1),
        temperature=np.float32(0.5),
        top_k=np.int32(3),
        top_p=1,
        seed=np.uint64(7),
        extractive=np.bool_(True),
        no_answer_threshold=np.float64(0.25),
    )
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert {name: type(value) for name, value in values.items()} == {
        name: type(value) for name, value in (dataclasses.asdict(GenerationConfig()) | MANY).items()
    }
    assert config == GenerationConfig(**MANY)
    engine = EngineConfig(batch_size=np.int16(4), max_wait_ms=np.float32(1), cuda_graphs=np.bool_(False))
    assert engine == EngineConfig(batch_size=4, max_wait_ms=1.0, cuda_graphs=False)
    assert (type(engine.batch_size), type(engine.max_wait_ms), type(engine.cuda_graphs)) == (int, float, bool)


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
