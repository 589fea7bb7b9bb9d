"""Many callers of one answerer: futures, asyncio, streams, generators; and what goes wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fakes import CONTEXT, Gate, echo_answerer, small_tokenizer

from qa_onnx import ClosedError, GenerationConfig, InvalidInputError, PromptTooLongError, QueueFullError
from qa_onnx.text.windows import WindowSettings, encode_windows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def answerer():
    with echo_answerer() as answerer:
        yield answerer


@pytest.fixture
def held():
    """An answerer whose engine waits at each step until `release` is set."""
    answerer = echo_answerer(config={"max_queue": 3, "max_wait_ms": 0})
    gate = Gate(answerer._engine)
    answerer.release, answerer.reached = gate.release, gate.reached
    yield answerer
    gate.release.set()
    answerer.close()


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
    tokenizer = answerer._tokenizer

    class Spy:
        def encode_batch(self, texts, **options):
            threads.append(threading.current_thread())
            return tokenizer.encode_batch(texts, **options)

        def __getattr__(self, name):
            assert name != "encode"  # which keeps the interpreter's lock
            return getattr(tokenizer, name)

    answerer._tokenizer = Spy()

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


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


def test_close_finishes_what_waits(held):
    futures = [held.submit("Who?", CONTEXT) for _ in range(3)]
    threading.Timer(0.05, held.release.set).start()
    held.close()
    assert {future.result(0).text for future in futures} == {"Who?"}
    with pytest.raises(ClosedError):
        held.submit("Who?", CONTEXT)
    held.close()


def test_close_can_fail_what_waits(held):
    futures = [held.submit("Who?", CONTEXT) for _ in range(3)]
    threading.Timer(0.05, held.release.set).start()
    held.close(cancel_waiting=True)
    for future in futures:
        with pytest.raises(ClosedError, match="closed before the request was answered"):
            future.result(0)


def test_a_block_left_by_an_error_does_not_wait_for_what_waits(held):
    futures = []

    def ask_and_fail():
        with held:
            futures.append(held.submit("Who?", CONTEXT))
            raise KeyboardInterrupt

    threading.Timer(0.05, held.release.set).start()
    with pytest.raises(KeyboardInterrupt):
        ask_and_fail()
    with pytest.raises(ClosedError):
        futures[0].result(0)


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


def test_whatever_ends_the_loop_fails_those_who_wait_and_later_calls_work(answerer):
    step = answerer._engine.decode_step

    def leave(*_):
        raise SystemExit

    answerer._engine.decode_step = leave
    with pytest.raises(SystemExit):
        answerer.submit("Who was it?", CONTEXT).result(10)
    answerer._engine.decode_step = step
    assert answerer.submit("Who was it?", CONTEXT).result(10).text == "Who was it?"
    assert answerer.stats().requests == answerer.stats().running == answerer.stats().waiting == 0


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


def test_interrupting_a_batch_cancels_it_and_later_calls_work(held):
    """Ctrl-C comes while the main thread waits for answers."""
    questions = [f"Question {index} of very many steps that nobody waits for any more?" for index in range(200)]

    def interrupt():
        assert held.reached.wait(10)
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores the signal
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            held.answer_batch(questions, [CONTEXT] * 200)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    read = len(held._engine.prompts)
    held.release.set()
    assert held.answer("Who?", CONTEXT).text == "Who?"
    wait_until(lambda: held.stats().requests == held.stats().running == held.stats().waiting == 0)
    assert len(held._engine.prompts) == read + 1 < 200
    assert held._engine.batches == []


@pytest.mark.parametrize("cancel_waiting", [False, True])
def test_closing_during_a_step_waits_for_it(held, cancel_waiting):
    future = held.submit("Who?", CONTEXT)
    assert held.reached.wait(10)
    closing = threading.Thread(target=held.close, kwargs={"cancel_waiting": cancel_waiting})
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    with pytest.raises(ClosedError):
        held.submit("Who?", CONTEXT)
    held.release.set()
    closing.join(10)
    assert not closing.is_alive()
    if cancel_waiting:
        with pytest.raises(ClosedError, match="closed before the request was answered"):
            future.result(0)
    else:
        assert future.result(0).text == "Who?"
    with pytest.raises(ClosedError):
        held.stats()


EXIT_WITH_REQUESTS = """
import atexit, sys, time

def report():
    errors = {type(future.exception(0)).__name__ if future.done() else "not done" for future in futures}
    print(len(futures), *sorted(errors))

atexit.register(report)  # runs last
sys.path.insert(0, "tests/unit")
from fakes import CONTEXT, echo_answerer

answerer = echo_answerer()
step = answerer._engine.decode_step

def wait_and_step(batch, token_ids):
    time.sleep(0.2)
    return step(batch, token_ids)

answerer._engine.decode_step = wait_and_step
futures = [answerer.submit(f"Question {index} that takes many steps?", CONTEXT) for index in range(200)]
time.sleep(0.5)
"""


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise KeyboardInterrupt", "del answerer"])
def test_the_end_of_the_interpreter_does_not_wait_for_requests(ending):
    """All 200 would take 20 seconds and more."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT_WITH_REQUESTS + ending], cwd=ROOT, capture_output=True, text=True, timeout=15
    )
    assert done.stdout.split() == ["200", "ClosedError"]
    assert ("Traceback" in done.stderr) == ("Interrupt" in ending)


def test_no_thread_is_left_when_nothing_is_asked(answerer):
    answerer.submit("Who?", CONTEXT).result(10)
    deadline = time.monotonic() + 10
    while any(thread.name == "qa_onnx" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


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

        def wait_and_step(batch, token_ids):
            time.sleep(0.002)
            return step(batch, token_ids)

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


@pytest.mark.parametrize("call", ["answer", "submit", "stream"])
@pytest.mark.parametrize(
    ("question", "context", "error"),
    [
        ("", CONTEXT, InvalidInputError),
        ("Who?", " \n\t\u00a0", InvalidInputError),
        ("Who?", "\ud800", InvalidInputError),
        ("Who? " * 200, CONTEXT, PromptTooLongError),
    ],
)
def test_bad_input_is_refused_at_the_call(answerer, call, question, context, error):
    with pytest.raises(error):
        getattr(answerer, call)(question, context)


def test_a_nul_character_is_text(answerer):
    answer = answerer.answer("Rollo\x00?", "He was Rollo\x00? Yes.", config=GenerationConfig(extractive=True))
    assert answer.text == "Rollo\x00?"


def test_a_config_has_to_be_one(answerer):
    with pytest.raises(InvalidInputError, match="got config of type dict; expected a GenerationConfig"):
        answerer.answer("Who?", CONTEXT, config={"num_answers": 2})


def test_more_answers_than_spans_are_refused(answerer):
    config = GenerationConfig(extractive=True, num_answers=4)
    with pytest.raises(InvalidInputError, match="got num_answers 4; context 1 has only 3 different spans"):
        answerer.answer_batch(["Who?"] * 2, [CONTEXT, "a b"], config=config)
    assert answerer._engine.prompts == []


def test_a_process_forked_after_loading_says_so(answerer):
    def ask(sender):
        try:
            answerer.answer("Who?", CONTEXT)
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
    assert answerer.answer("Who?", CONTEXT).text == "Who?"


def test_a_long_document_gives_the_best_window_and_offsets_in_the_whole(answerer):
    words = [f"word{index}" for index in range(150)]
    words[120] = "Rollo"
    document = " ".join(words)
    answer = answerer.answer("Rollo", document, config=GenerationConfig(extractive=True, max_new_tokens=4))
    assert answer.windows > 2
    assert answer.window > 0
    assert document[answer.start : answer.end] == answer.text == "Rollo"
    assert answer.prompt_tokens > 300


def test_an_answer_that_is_whole_in_no_window_is_not_found(answerer):
    document = " ".join(f"word{index}" for index in range(150))

    def ask(question, stride):
        config = GenerationConfig(extractive=True, max_new_tokens=20, stride=stride)
        return answerer.answer(question, document, config=config).text

    (windows,) = encode_windows(
        answerer._tokenizer,
        ["word10 word11"],
        [document],
        max_positions=128,
        max_new_tokens=20,
        settings=WindowSettings(stride=0),
    )
    first = len(windows[0].text.split())
    parted = f"word{first - 1} word{first}"
    assert parted in document
    assert not any(parted in window.text for window in windows)
    assert ask(parted, stride=0) != parted
    assert ask(parted, stride=30) == parted


@pytest.mark.parametrize("num_answers", [1, 2])
def test_where_no_word_has_so_few_tokens_there_is_no_answer(answerer, num_answers):
    config = GenerationConfig(extractive=True, max_new_tokens=2, num_answers=num_answers)
    answer = answerer.answer("Rollo", "Przewalskiczuk Przewalskiczyk", config=config)
    assert (answer.text, answer.finish_reason, answer.start) == ("", "no_answer", None)
    assert answerer.answer("Rollo", f"Przewalskiczuk {CONTEXT}", config=config).text in CONTEXT


def test_an_answer_tells_its_score_place_and_reason(answerer):
    answer = answerer.answer("Rollo", CONTEXT)
    tokens = answer.new_tokens + 1
    logprob = 10.0 - np.log(np.exp(10.0) + 399)
    assert answer.score == pytest.approx(np.exp(tokens * logprob))
    assert answer.mean_logprob == pytest.approx(logprob)
    assert (answer.start, answer.end) == (CONTEXT.index("Rollo"), CONTEXT.index("Rollo") + 5)
    assert answer.no_answer_probability == pytest.approx(1 / (np.exp(10.0) + 399))
    assert (answer.finish_reason, answer.window, answer.windows, answer.alternatives) == ("stop", 0, 1, ())
    assert repr(answer) == f"Answer('Rollo', score={answer.score:.3f}, start=24, end=29, stop)"
    elsewhere = answerer.answer("William", CONTEXT)
    assert (elsewhere.start, elsewhere.end) == (None, None)
    assert answer.to_dict()["text"] == "Rollo"


def test_several_answers_are_alternatives_of_the_first(answerer):
    config = GenerationConfig(num_answers=3, extractive=True, max_new_tokens=6)
    answer = answerer.answer("Rollo", CONTEXT, config=config)
    texts = [answer.text, *(other.text for other in answer.alternatives)]
    assert texts[0] == "Rollo"
    assert len(set(texts)) == 3
    scores = [answer.score, *(other.score for other in answer.alternatives)]
    assert scores == sorted(scores, reverse=True)
    assert answer.to_dict()["alternatives"][0]["text"] == texts[1]


def test_the_bundles_threshold_holds_unless_the_caller_has_one():
    with echo_answerer(no_answer={"threshold": 0.0}) as answerer:
        answer = answerer.answer("Rollo", CONTEXT)
        assert (answer.text, answer.finish_reason, answer.start, answer.new_tokens) == ("", "no_answer", None, 0)
        config = GenerationConfig(no_answer_threshold=1.0)
        assert answerer.answer("Rollo", CONTEXT, config=config).text == "Rollo"


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
