"""The real service with answers that a test knows, for the tests of the page.

A question of the form `find WORDS` is answered with WORDS, where the passage has them, and has the passage's first two
words as alternatives. `hold` gets no answer until its request is canceled, and a question of any other form has none.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

from qa_onnx.answer import Answer
from qa_onnx.errors import ClosedError, InvalidInputError
from qa_onnx.serve.config import ServeConfig
from tests.serve.conftest import Running

KEY = "a-key-of-the-tests-only"
PIECE_SECONDS = 0.05
MANIFEST = SimpleNamespace(precision="int8", scores={"slope": 1.0}, max_positions=1024)


def make_answer(text: str, context: str, *, score: float, alternatives: tuple[Answer, ...] = ()) -> Answer:
    start = context.find(text) if text else -1
    return Answer(
        text=text,
        score=score,
        logprob=-0.1,
        mean_logprob=-0.1,
        start=start if start >= 0 else None,
        end=start + len(text) if start >= 0 else None,
        no_answer_probability=0.04 if text else score,
        finish_reason="stop" if text else "no_answer",
        prompt_tokens=10,
        token_ids=(1, 2),
        alternatives=alternatives,
    )


class ScriptedAnswerer:
    """Has what `Service` and its routes use of an `Answerer`."""

    manifest = MANIFEST
    provider = "cpu"

    def __init__(self):
        self.held: list[Future[Answer]] = []
        self.asked: list[tuple[str, str, object]] = []

    def stats(self):
        return SimpleNamespace(kernels="avx512")

    def estimate_windows(self, questions, contexts, *, config):
        return len(questions)

    def close(self, *, cancel_waiting=False):
        for future in self.held:
            if not future.done():
                future.set_exception(ClosedError("closed"))

    def submit(self, question, context, *, config, on_text=None):
        self.asked.append((question, context, config))
        if config.extractive and config.num_answers > len(context.split()):
            raise InvalidInputError(f"got num_answers {config.num_answers}; the context has fewer spans")
        future: Future[Answer] = Future()
        if question == "hold":
            self.held.append(future)
            if on_text:
                on_text("So far")
            return future
        threading.Thread(target=self._answer, args=(future, question, context, config, on_text), daemon=True).start()
        return future

    def _answer(self, future, question, context, config, on_text):
        text = question.removeprefix("find ") if question.startswith("find ") else ""
        others = context.split()[:2] if config.num_answers > 1 else []
        alternatives = tuple(make_answer(word, context, score=0.05) for word in others)
        answer = make_answer(text, context, score=0.874 if text else 0.91, alternatives=alternatives)
        for word in text.split(" ") if on_text and config.num_answers == 1 else []:
            on_text(word if text.startswith(word) else f" {word}")
            time.sleep(PIECE_SECONDS)
        if future.set_running_or_notify_cancel():
            future.set_result(answer)


@contextmanager
def page_service(*, limits=None, api_keys=(), answerer=None):
    """A service in another thread, on a `ScriptedAnswerer` or another one."""
    answerer = answerer or ScriptedAnswerer()
    config = ServeConfig(port=0, api_keys=tuple(api_keys), access_log=False)
    running = Running(answerer, limits=limits, config=config, name="scripted")
    try:
        yield running
    finally:
        answerer.close(cancel_waiting=True)
        running.close()
