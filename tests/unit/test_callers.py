"""Many callers of one answerer: futures, asyncio, streams, generators; and what goes wrong with them."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
import time

import numpy as np
import pytest
from stand_ins import PASSAGE, echo_answerer, small_tokenizer

from qa_onnx import ClosedError, GenerationConfig, InvalidInputError, PromptTooLongError, QueueFullError


@pytest.fixture
def answerer():
    with echo_answerer() as answerer:
        yield answerer


@pytest.fixture
def held():
    """An answerer whose engine waits at each step until `release` is set."""
    answerer = echo_answerer(options={"max_queue": 3, "max_wait_ms": 0})
    engine, release, reached = answerer._engine, threading.Event(), threading.Event()
    decode_step = engine.decode_step

    def wait_and_step(state, token_ids):
        reached.set()
        assert release.wait(10)
        return decode_step(state, token_ids)

    engine.decode_step = wait_and_step
    answerer.release, answerer.reached = release, reached
    yield answerer
    release.set()
    answerer.close()


def test_futures_and_tasks_get_what_a_batch_gets(answerer):
    questions = [f"Question {index}?" + " long" * (index % 7) for index in range(60)]
    expected = answerer.answer_batch(questions, [PASSAGE] * 60)
    futures = [answerer.submit(question, PASSAGE) for question in questions]
    assert [future.result(10) for future in futures] == expected

    async def ask():
        return await asyncio.gather(*(answerer.answer_async(question, PASSAGE) for question in questions))

    assert asyncio.run(ask()) == expected


def test_requests_that_arrive_while_others_run_join_the_batch(held):
    first = held.submit("A question that takes many steps?", PASSAGE)
    assert held.reached.wait(10)
    second = held.submit("Another question that does?", PASSAGE)
    held.release.set()
    assert [first.result(10).text, second.result(10).text] == [
        "A question that takes many steps?",
        "Another question that does?",
    ]
    assert 2 in held._engine.row_counts


def test_one_request_too_many_is_refused_and_the_others_are_answered(held):
    futures = [held.submit("Who?", PASSAGE) for _ in range(3)]
    with pytest.raises(QueueFullError, match=r"3 requests wait.*max_queue is 3"):
        held.submit("Who?", PASSAGE)
    held.release.set()
    assert {future.result(10).text for future in futures} == {"Who?"}
    assert held.submit("And now?", PASSAGE).result(10).text == "And now?"


def test_a_long_document_does_not_keep_others_waiting(held):
    book = held.submit("Who was it?", " ".join(f"word{index}" for index in range(3000)))
    assert held.reached.wait(10)
    first = len(held._engine.prompts)
    other = held.submit("And who was that?", PASSAGE)
    held.release.set()
    assert other.result(10).text == "And who was that?"
    windows = book.result(20).windows
    places = [place for place, prompt in enumerate(held._engine.prompts) if "that" in text_of(prompt)]
    assert windows > 100
    assert first <= places[0] <= 3 * first < windows


def text_of(prompt):
    return small_tokenizer().decode(prompt.question_ids)


def test_a_cancelled_request_frees_its_row(held):
    first = held.submit("A question of very many steps that nobody waits for any more?", PASSAGE)
    assert held.reached.wait(10)
    second = held.submit("Who?", PASSAGE)
    assert first.cancel()
    held.release.set()
    assert second.result(10).text == "Who?"
    assert held._engine.row_counts.count(1) >= len(held._engine.row_counts) - 1


def test_a_cancelled_task_cancels_its_request(held):
    async def ask():
        task = asyncio.create_task(held.answer_async("Who was it that led them?", PASSAGE))
        while not held.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        held.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await held.answer_async("Who?", PASSAGE)

    assert asyncio.run(ask()).text == "Who?"


def test_close_finishes_what_waits(held):
    futures = [held.submit("Who?", PASSAGE) for _ in range(3)]
    threading.Timer(0.05, held.release.set).start()
    held.close()
    assert {future.result(0).text for future in futures} == {"Who?"}
    with pytest.raises(ClosedError):
        held.submit("Who?", PASSAGE)
    held.close()


def test_close_can_fail_what_waits(held):
    futures = [held.submit("Who?", PASSAGE) for _ in range(3)]
    threading.Timer(0.05, held.release.set).start()
    held.close(cancel_waiting=True)
    for future in futures:
        with pytest.raises(ClosedError, match="closed before the request was answered"):
            future.result(0)


def test_a_block_left_by_an_error_does_not_wait_for_what_waits(held):
    futures = []

    def ask_and_fail():
        with held:
            futures.append(held.submit("Who?", PASSAGE))
            raise KeyboardInterrupt

    threading.Timer(0.05, held.release.set).start()
    with pytest.raises(KeyboardInterrupt):
        ask_and_fail()
    with pytest.raises(ClosedError):
        futures[0].result(0)


def test_an_error_of_the_worker_reaches_its_callers_and_later_calls_work(answerer):
    step = answerer._engine.decode_step
    answerer._engine.decode_step = lambda *_: 1 / 0
    futures = [answerer.submit("Who was it?", PASSAGE) for _ in range(3)]
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    answerer._engine.decode_step = step
    assert answerer.submit("Who was it?", PASSAGE).result(10).text == "Who was it?"


def test_no_thread_is_left_when_nothing_is_asked(answerer):
    answerer.submit("Who?", PASSAGE).result(10)
    deadline = time.monotonic() + 10
    while any(thread.name == "qa_onnx" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("grounded", [False, True])
def test_a_stream_gives_the_text_in_pieces(answerer, grounded):
    config = GenerationConfig(grounded=grounded)
    question = "Normans were led by Rollo"
    pieces = list(answerer.stream(question, PASSAGE, config=config))
    assert len(pieces) > 3
    assert "".join(pieces) == answerer.answer(question, PASSAGE, config=config).text == question


def test_a_stream_never_gives_half_a_character(answerer):
    question = "Who is 東京 🙂 e\u0301?"
    assert "".join(answerer.stream(question, PASSAGE)) == question
    assert all("\ufffd" not in piece for piece in answerer.stream(question, PASSAGE))


def test_an_abandoned_stream_frees_its_row(held):
    stream = held.stream("A question of very many steps that nobody waits for any more?", PASSAGE)
    threading.Timer(0.05, held.release.set).start()
    next(stream)
    stream.close()
    assert held.submit("Who?", PASSAGE).result(10).text == "Who?"
    assert len(held._engine.row_counts) < 60


def test_an_endless_stream_of_questions_is_read_as_far_as_needed():
    taken = itertools.count()
    with echo_answerer(options={"batch_size": 4}) as answerer:
        pairs = ((f"Question {next(taken)}?", PASSAGE) for _ in itertools.count())
        answers = answerer.answer_iter(pairs)
        assert [next(answers).text for _ in range(50)] == [f"Question {index}?" for index in range(50)]
        answers.close()
    assert next(taken) <= 50 + 2 * 4


def test_a_bad_pair_is_an_error_when_its_turn_comes(answerer):
    answers = answerer.answer_iter(iter([("Who?", PASSAGE), ("Why?", "")]))
    with pytest.raises(InvalidInputError, match="context 0 is empty"):
        list(answers)
    for pair in ("ab", ("Who?",), 7):
        with pytest.raises(InvalidInputError, match="expected a pair of question and passage"):
            list(answerer.answer_iter([pair]))


@pytest.mark.parametrize("call", ["answer", "submit", "stream"])
@pytest.mark.parametrize(
    ("question", "context", "error"),
    [
        ("", PASSAGE, InvalidInputError),
        ("Who?", " \n\t\u00a0", InvalidInputError),
        ("Who?", "\ud800", InvalidInputError),
        ("Who? " * 200, PASSAGE, PromptTooLongError),
    ],
)
def test_bad_input_is_refused_at_the_call(answerer, call, question, context, error):
    with pytest.raises(error):
        getattr(answerer, call)(question, context)


def test_a_nul_character_is_text(answerer):
    answer = answerer.answer("Rollo\x00?", "He was Rollo\x00? Yes.", config=GenerationConfig(grounded=True))
    assert answer.text == "Rollo\x00?"


def test_a_config_has_to_be_one(answerer):
    with pytest.raises(InvalidInputError, match="got config of type dict; expected a GenerationConfig"):
        answerer.answer("Who?", PASSAGE, config={"top_k": 2})


def test_more_answers_than_spans_are_refused(answerer):
    config = GenerationConfig(grounded=True, top_k=4)
    with pytest.raises(InvalidInputError, match="got top_k 4; context 1 has only 3 different spans"):
        answerer.answer_batch(["Who?"] * 2, [PASSAGE, "a b"], config=config)
    assert answerer._engine.prompts == []


def test_a_process_forked_after_loading_says_so(answerer):
    def ask(sender):
        try:
            answerer.answer("Who?", PASSAGE)
        except ClosedError as error:
            sender.send(str(error))
        answerer.close()

    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=ask, args=(sender,))
    child.start()
    assert receiver.poll(20)
    assert "Load the bundle after the fork" in receiver.recv()
    child.join(20)
    assert child.exitcode == 0
    assert answerer.answer("Who?", PASSAGE).text == "Who?"


def test_a_long_document_gives_the_best_window_and_offsets_in_the_whole(answerer):
    words = [f"word{index}" for index in range(150)]
    words[120] = "Rollo"
    document = " ".join(words)
    answer = answerer.answer("Rollo", document, config=GenerationConfig(grounded=True, max_new_tokens=4))
    assert answer.windows > 2
    assert answer.window > 0
    assert document[answer.start : answer.end] == answer.text == "Rollo"
    assert answer.prompt_tokens > 300


def test_an_answer_tells_its_score_place_and_reason(answerer):
    answer = answerer.answer("Rollo", PASSAGE)
    tokens = answer.new_tokens + 1
    logprob = 10.0 - np.log(np.exp(10.0) + 399)
    assert answer.score == pytest.approx(np.exp(tokens * logprob))
    assert answer.mean_logprob == pytest.approx(logprob)
    assert (answer.start, answer.end) == (PASSAGE.index("Rollo"), PASSAGE.index("Rollo") + 5)
    assert answer.no_answer_probability == pytest.approx(1 / (np.exp(10.0) + 399))
    assert (answer.finish_reason, answer.window, answer.windows, answer.alternatives) == ("stop", 0, 1, ())
    assert repr(answer) == f"Answer('Rollo', score={answer.score:.3f}, start=24, end=29, stop)"
    elsewhere = answerer.answer("William", PASSAGE)
    assert (elsewhere.start, elsewhere.end) == (None, None)
    assert answer.to_dict()["text"] == "Rollo"


def test_top_k_answers_are_alternatives_of_the_first(answerer):
    config = GenerationConfig(top_k=3, grounded=True, max_new_tokens=6)
    answer = answerer.answer("Rollo", PASSAGE, config=config)
    texts = [answer.text, *(other.text for other in answer.alternatives)]
    assert texts[0] == "Rollo"
    assert len(set(texts)) == 3
    scores = [answer.score, *(other.score for other in answer.alternatives)]
    assert scores == sorted(scores, reverse=True)
    assert answer.to_dict()["alternatives"][0]["text"] == texts[1]


def test_the_bundles_threshold_holds_unless_the_caller_has_one():
    with echo_answerer(no_answer={"threshold": 0.0}) as answerer:
        answer = answerer.answer("Rollo", PASSAGE)
        assert (answer.text, answer.finish_reason, answer.start, answer.new_tokens) == ("", "no_answer", None, 0)
        config = GenerationConfig(no_answer_threshold=1.0)
        assert answerer.answer("Rollo", PASSAGE, config=config).text == "Rollo"
