"""Streams and iterators of answers: their pieces, and what frees their place."""

from __future__ import annotations

import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import CONTEXT, echo_answerer, wait_until

from qa_onnx import GenerationConfig, InvalidInputError


@pytest.mark.parametrize("extractive", [False, True])
def test_a_stream_gives_the_text_in_pieces(answerer, extractive):
    config = GenerationConfig(extractive=extractive)
    question = "Normans were led by Rollo"
    pieces = list(answerer.stream(question, CONTEXT, config=config))
    assert len(pieces) > 3
    assert "".join(pieces) == answerer.answer(question, CONTEXT, config=config).text == question


def test_a_stream_never_gives_half_a_character(answerer):
    question = "Who is 東京 🙂 e\u0301?"
    assert "".join(answerer.stream(question, CONTEXT)) == question
    assert all("\ufffd" not in piece for piece in answerer.stream(question, CONTEXT))


@pytest.fixture
def slow():
    """An answerer that takes a second for an answer of 400 tokens."""
    with echo_answerer(config={"max_wait_ms": 0}, max_positions=600) as answerer:
        step = answerer._engine.decode_step

        def wait_and_step(*arguments):
            time.sleep(0.002)
            return step(*arguments)

        answerer._engine.decode_step = wait_and_step
        yield answerer


def long_stream(answerer):
    config = GenerationConfig(ignore_eos=True, max_new_tokens=400)
    return answerer.stream("A question of very many steps that nobody waits for any more?", CONTEXT, config=config)


def generator_over(stream):
    yield from stream


def close(answerer):
    stream = long_stream(answerer)
    next(stream)
    stream.close()
    assert list(stream) == []


def close_before_the_first_piece(answerer):
    long_stream(answerer).close()


def drop_before_the_first_piece(answerer):
    long_stream(answerer)


def drop(answerer):
    next(long_stream(answerer))


def leave_a_block_by_an_error(answerer):
    with contextlib.suppress(KeyError), long_stream(answerer) as stream:
        for _ in stream:
            raise KeyError


def raise_in_the_loop_over_it(answerer):
    with contextlib.suppress(KeyError):
        for _ in long_stream(answerer):
            raise KeyError


def throw_into_a_generator(answerer):
    pieces = generator_over(long_stream(answerer))
    next(pieces)
    with pytest.raises(KeyError):
        pieces.throw(KeyError)


def close_a_generator(answerer):
    pieces = generator_over(long_stream(answerer))
    next(pieces)
    pieces.close()


@pytest.mark.parametrize(
    "leave",
    [
        close,
        close_before_the_first_piece,
        drop_before_the_first_piece,
        drop,
        leave_a_block_by_an_error,
        raise_in_the_loop_over_it,
        throw_into_a_generator,
        close_a_generator,
    ],
)
def test_an_abandoned_stream_frees_its_slot(slow, leave):
    leave(slow)
    assert slow.submit("Who?", CONTEXT).result(10).text == "Who?"
    wait_until(lambda: slow.stats().requests == slow.stats().running == 0)
    assert len(slow._engine.sequence_counts) < 60
    assert slow._engine.batches == []


def test_a_stream_that_another_thread_closes_ends(held):
    stream = held.stream("A question of very many steps that nobody waits for any more?", CONTEXT)
    assert held.reached.wait(10)
    with ThreadPoolExecutor(1) as pool:
        pieces = pool.submit(list, stream)
        wait_until(pieces.running)
        stream.close()
        held.release.set()
        assert len("".join(pieces.result(10))) < 20


def test_a_stream_that_is_read_to_its_end_stays_at_its_end(answerer):
    stream = answerer.stream("Who?", CONTEXT)
    assert "".join(stream) == "Who?"
    assert list(stream) == []
    stream.close()
    assert answerer.stats().answered == 1


def test_a_stream_raises_what_its_request_raises(answerer):
    answerer._engine.decode_step = lambda *_: 1 / 0
    stream = answerer.stream("Who was it?", CONTEXT)
    with pytest.raises(ZeroDivisionError):
        list(stream)


def test_an_endless_stream_of_questions_is_read_as_far_as_needed():
    taken = itertools.count()
    with echo_answerer(config={"batch_size": 4}) as answerer:
        pairs = ((f"Question {next(taken)}?", CONTEXT) for _ in itertools.count())
        answers = answerer.answer_iter(pairs)
        assert [next(answers).text for _ in range(50)] == [f"Question {index}?" for index in range(50)]
        answers.close()
    assert next(taken) <= 50 + 2 * 4


def test_a_bad_pair_is_an_error_when_its_turn_comes(answerer):
    answers = answerer.answer_iter(iter([("Who?", CONTEXT), ("Why?", "")]))
    with pytest.raises(InvalidInputError, match="context 0 is empty"):
        list(answers)
    for pair in ("ab", ("Who?",), 7):
        with pytest.raises(InvalidInputError, match="expected a pair of question and context"):
            list(answerer.answer_iter([pair]))
