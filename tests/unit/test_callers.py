"""Many callers of one answerer: futures, asyncio and threads share batches; errors reach only their callers."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import CONTEXT, Gate, echo_answerer, small_tokenizer, wait_until

from qa_onnx import GenerationConfig, InvalidInputError, PromptTooLongError, QueueFullError


def test_futures_and_tasks_get_what_a_batch_gets(answerer):
    questions = [f"Question {index}?" + " long" * (index % 7) for index in range(60)]
    expected = answerer.answer_batch(questions, [CONTEXT] * 60)
    futures = [answerer.submit(question, CONTEXT) for question in questions]
    assert [future.result(10) for future in futures] == expected

    async def ask():
        return await asyncio.gather(*(answerer.answer_async(question, CONTEXT) for question in questions))

    assert asyncio.run(ask()) == expected


def test_a_long_context_is_tokenized_outside_of_the_event_loop(answerer):
    """And by a call that frees the interpreter's lock: the loop ticks meanwhile."""
    long, threads = CONTEXT * 400, []
    tokenizer = answerer._requests._tokenizer

    class Spy:
        def encode_batch(self, texts, **options):
            threads.append(threading.current_thread())
            return tokenizer.encode_batch(texts, **options)

        def __getattr__(self, name):
            assert name != "encode"  # which keeps the interpreter's lock
            return getattr(tokenizer, name)

    answerer._requests._tokenizer = Spy()

    async def ask(context):
        return await answerer.answer_async("Who?", context)

    assert asyncio.run(ask(long)).windows > 1
    assert threading.main_thread() not in threads
    threads.clear()
    asyncio.run(ask(CONTEXT))
    assert set(threads) == {threading.main_thread()}


@pytest.mark.parametrize(("characters", "is_elsewhere"), [(9_999, False), (10_000, True)])
def test_contexts_of_10000_characters_and_more_are_tokenized_in_another_thread(answerer, characters, is_elsewhere):
    threads, make = [], answerer._make_requests

    def note_thread(*arguments):
        threads.append(threading.current_thread())
        return make(*arguments)

    answerer._make_requests = note_thread
    asyncio.run(answerer.answer_async("Who?", (CONTEXT * 400)[:characters]))
    assert [thread is not threading.main_thread() for thread in threads] == [is_elsewhere]


def test_a_task_that_is_cancelled_while_its_context_is_tokenized_frees_its_place(answerer):
    begun, go_on = threading.Event(), threading.Event()
    make = answerer._make_requests

    def wait(*arguments):
        begun.set()
        assert go_on.wait(10)
        return make(*arguments)

    answerer._make_requests = wait

    async def cancel():
        task = asyncio.create_task(answerer.answer_async("Who?", CONTEXT * 400))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(cancel())
    until = time.monotonic() + 10
    while answerer.stats().requests and time.monotonic() < until:
        time.sleep(0.001)
    assert answerer.stats().requests == 0


def test_errors_of_a_long_context_reach_its_task(answerer):
    async def ask():
        await answerer.answer_async("long " * 200, CONTEXT * 400)

    with pytest.raises(PromptTooLongError):
        asyncio.run(ask())


def test_each_answer_of_a_batch_is_told_with_its_index(answerer):
    questions = [f"Question {index}?" + " long" * (index % 7) for index in range(60)]
    told = {}
    answers = answerer.answer_batch(questions, [CONTEXT] * 60, on_answer=told.__setitem__)
    assert [told[index] for index in range(60)] == answers


def test_requests_that_arrive_while_others_run_join_the_batch(held):
    first = held.submit("A question that takes many steps?", CONTEXT)
    assert held.reached.wait(10)
    second = held.submit("Another question that does?", CONTEXT)
    held.release.set()
    assert [first.result(10).text, second.result(10).text] == [
        "A question that takes many steps?",
        "Another question that does?",
    ]
    assert 2 in held._engine.sequence_counts


def test_threads_that_ask_at_once_share_their_batches():
    question = (
        "Who was it that led them, who were they, and in which century did they settle in Normandy, or elsewhere?"
    )
    with echo_answerer() as answerer:
        gate = Gate(answerer._engine)
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(answerer.answer, question, CONTEXT) for _ in range(8)]
            wait_until(lambda: answerer.stats().requests == 8)
            gate.release.set()
            answers = [future.result(10) for future in futures]
        assert {(answer.new_tokens, answer.finish_reason) for answer in answers} == {(32, "length")}
        assert answerer._engine.stats.decode_tokens == 8 * 32
        assert len(answerer._engine.sequence_counts) <= 40


def test_callers_of_all_kinds_share_one_batch(held):
    config = GenerationConfig(max_new_tokens=8)
    question = "A question that takes many steps?"
    with ThreadPoolExecutor(3) as threads:
        futures = [
            threads.submit(held.answer, question, CONTEXT, config=config),
            threads.submit(held.answer_batch, [question] * 2, [CONTEXT] * 2, config=config),
            threads.submit(list, held.stream(question, CONTEXT, config=config)),
            held.submit(question, CONTEXT, config=config),
        ]
        wait_until(lambda: held.stats().requests == 5)
        held.release.set()
        for future in futures:
            future.result(10)
    assert held.stats().answered == 5
    assert max(held._engine.sequence_counts) >= 4
    assert len(held._engine.sequence_counts) <= 16


def test_threads_that_ask_cancel_and_leave_get_their_own_answers_and_leave_nothing_over():
    def ask(seed):
        draw = random.Random(seed)
        for turn in range(25):
            questions = [
                f"{'long ' * draw.randrange(4)}{seed} {turn} {index}?" for index in range(draw.randrange(1, 5))
            ]
            kind = draw.choice(["answer", "answer_batch", "submit", "cancel", "stream", "leave"])
            if kind == "answer":
                assert answerer.answer(questions[0], CONTEXT).text == questions[0]
            elif kind == "answer_batch":
                answers = answerer.answer_batch(questions, [CONTEXT] * len(questions))
                assert [answer.text for answer in answers] == questions
            elif kind == "stream":
                assert "".join(answerer.stream(questions[0], CONTEXT)) == questions[0]
            elif kind == "leave":
                next(answerer.stream(questions[0], CONTEXT))
            else:
                futures = [answerer.submit(question, CONTEXT) for question in questions]
                if kind == "cancel":
                    futures.pop().cancel()
                assert [future.result(20).text for future in futures] == questions[: len(futures)]

    with echo_answerer(config={"batch_size": 5, "max_wait_ms": 0.1}) as answerer:
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(ask, seed) for seed in range(8)]:
                done.result(60)
        wait_until(lambda: answerer.stats().requests == answerer.stats().running == answerer.stats().waiting == 0)
        assert answerer._engine.batches == []
        assert answerer._engine.prefix_cache._pins == {}
        assert max(answerer._engine.sequence_counts) == 5


@pytest.mark.parametrize("call", ["answer", "answer_batch"])
def test_max_queue_does_not_limit_whoever_waits_for_answers(held, call):
    futures = [held.submit("Who?", CONTEXT) for _ in range(3)]
    threading.Timer(0.05, held.release.set).start()
    if call == "answer":
        assert held.answer("Who?", CONTEXT).text == "Who?"
    else:
        assert [answer.text for answer in held.answer_batch(["Who?"] * 20, [CONTEXT] * 20)] == ["Who?"] * 20
    assert {future.result(10).text for future in futures} == {"Who?"}
    assert held.submit("Who?", CONTEXT).result(10).text == "Who?"


def test_one_request_too_many_is_refused_and_the_others_are_answered(held):
    futures = [held.submit("Who?", CONTEXT) for _ in range(3)]
    with pytest.raises(QueueFullError, match=r"3 requests wait.*max_queue is 3"):
        held.submit("Who?", CONTEXT)
    held.release.set()
    assert {future.result(10).text for future in futures} == {"Who?"}
    assert held.submit("And now?", CONTEXT).result(10).text == "And now?"


def test_a_long_document_does_not_keep_others_waiting(held):
    book = held.submit("Who was it?", " ".join(f"word{index}" for index in range(3000)))
    assert held.reached.wait(10)
    first = len(held._engine.prompts)
    other = held.submit("And who was that?", CONTEXT)
    held.release.set()
    assert other.result(10).text == "And who was that?"
    windows = book.result(20).windows
    places = [place for place, prompt in enumerate(held._engine.prompts) if "that" in text_of(prompt)]
    assert windows > 100
    assert first <= places[0] <= 3 * first < windows


def text_of(prompt):
    return small_tokenizer().decode(prompt.suffix_ids)


def test_a_cancelled_request_frees_its_slot(held):
    first = held.submit("A question of very many steps that nobody waits for any more?", CONTEXT)
    assert held.reached.wait(10)
    second = held.submit("Who?", CONTEXT)
    assert first.cancel()
    held.release.set()
    assert second.result(10).text == "Who?"
    counts = held._engine.sequence_counts
    assert counts.count(1) >= len(counts) - 1


def test_a_cancelled_task_cancels_its_request(held):
    async def ask():
        task = asyncio.create_task(held.answer_async("Who was it that led them?", CONTEXT))
        while not held.reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        held.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await held.answer_async("Who?", CONTEXT)

    assert asyncio.run(ask()).text == "Who?"


def test_an_error_of_the_engine_reaches_its_callers_and_later_calls_work(answerer):
    step = answerer._engine.decode_step
    answerer._engine.decode_step = lambda *_: 1 / 0
    futures = [answerer.submit("Who was it?", CONTEXT) for _ in range(3)]
    for future in futures:
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    answerer._engine.decode_step = step
    assert answerer.submit("Who was it?", CONTEXT).result(10).text == "Who was it?"


def test_an_error_of_the_prefill_reaches_its_callers_and_later_calls_work(answerer):
    prefill = answerer._engine.prefill
    answerer._engine.prefill = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        answerer.answer("Who was it?", CONTEXT)
    with pytest.raises(ZeroDivisionError):
        answerer.answer_batch(["Who was it?"] * 3, [CONTEXT] * 3)
    answerer._engine.prefill = prefill
    assert answerer.answer("Who was it?", CONTEXT).text == "Who was it?"


def test_an_error_in_a_batch_frees_what_the_others_take(answerer):
    """The first error is raised; the batch does not go on behind the caller's back."""
    calls = itertools.count()
    prefill = answerer._engine.prefill

    def fail_second(groups, *, carried=None):
        if next(calls) == 1:
            raise ZeroDivisionError
        return prefill(groups, carried=carried)

    answerer._engine.prefill = fail_second
    questions = [f"Question {index}?" for index in range(300)]
    with pytest.raises(ZeroDivisionError):
        answerer.answer_batch(questions, [CONTEXT] * 300)
    wait_until(lambda: answerer.stats().requests == answerer.stats().running == answerer.stats().waiting == 0)
    assert len(answerer._engine.prompts) < 300


def test_a_batch_in_the_background_is_taken_whole_or_not_at_all(held):
    questions = ["Who led?", "Who settled?", "Where?"]
    with pytest.raises(QueueFullError):
        held.submit_batch([*questions, "When?"], CONTEXT)
    with pytest.raises(InvalidInputError, match="question 1"):
        held.submit_batch(["Who led?", " "], CONTEXT)
    assert held.stats().requests == 0
    futures = held.submit_batch(questions, CONTEXT)
    assert held.reached.wait(10)
    with pytest.raises(QueueFullError):
        held.submit("Who?", CONTEXT)
    assert futures[1].cancel()
    held.release.set()
    assert [futures[index].result(10).text for index in (0, 2)] == ["Who led?", "Where?"]
    assert [future.result(10) for future in held.submit_batch(questions, [CONTEXT] * 3)] == held.answer_batch(
        questions, CONTEXT
    )


def test_a_caller_in_the_background_is_told_the_text_as_it_grows(answerer):
    pieces = []
    answer = answerer.submit("How long did they stay in Normandy?", CONTEXT, on_text=pieces.append).result(10)
    assert len(pieces) > 3
    assert answer.text.startswith("".join(pieces))
    assert list(answerer.stream("How long did they stay in Normandy?", CONTEXT)) == pieces
