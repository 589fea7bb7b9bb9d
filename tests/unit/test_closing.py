"""How an answerer ends: closed, interrupted, at the interpreter's exit, in a forked process."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import CONTEXT, wait_until

from qa_onnx import ClosedError

ROOT = Path(__file__).parents[2]


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

def wait_and_step(*arguments):
    time.sleep(0.2)
    return step(*arguments)

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
