"""Questions to answers for the routes: limits, admission, a deadline, and cancelling what nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from qa_onnx.answer import Answer
from qa_onnx.answerer import INLINE_CHARACTERS, Answerer
from qa_onnx.config import GenerationConfig
from qa_onnx.errors import QAOnnxError
from qa_onnx.serve.admission import Admission
from qa_onnx.serve.config import Limits
from qa_onnx.serve.problems import DRAINING, Problem, problem_of

TOKENIZING_THREADS = 2
KEEP_ALIVE_SECONDS = 15.0
"""How long a stream is silent at most: proxies cut connections on which nothing comes."""


class Service:
    """One answerer behind one queue. Its methods run in the event loop."""

    def __init__(self, answerer: Answerer, *, name: str, limits: Limits) -> None:
        """Answers nothing yet.

        Args:
            answerer: Computes the answers; its `max_queue` is at least `limits.queue_questions`.
            name: What clients call the model.
            limits: What they may ask for.
        """
        self.answerer = answerer
        self.name = name
        self.limits = limits
        self.admission = Admission(max_questions=limits.queue_questions, max_characters=limits.queue_characters)
        self.answered = 0
        """Questions that were answered."""
        self.parsing = 0
        """PDF files that are being read."""
        self.is_draining = False
        """Whether no more requests are taken."""
        self._tokenizing = ThreadPoolExecutor(TOKENIZING_THREADS, thread_name_prefix="tokenize")

    async def answer(self, questions: Sequence[str], contexts: Sequence[str], config: GenerationConfig) -> list[Answer]:
        """Answers the questions of one request. A task that is cancelled frees what they take.

        Raises:
            Problem: A limit is exceeded, the queue is full, the service drains, or there is no answer in time.
        """
        with self._admitted(questions, contexts, config):
            futures: list[Future[Answer]] = []
            try:
                async with asyncio.timeout(self.limits.timeout_seconds):
                    if len(questions) == 1:
                        futures = await self._submit(
                            lambda: [self.answerer.submit(questions[0], contexts[0], config=config)],
                            [*questions, *contexts],
                        )
                        answers = [await asyncio.wrap_future(futures[0])]
                    else:
                        futures = await self._submit(
                            lambda: self.answerer.submit_batch(questions, contexts, config=config),
                            [*questions, *contexts],
                        )
                        answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
            except (QAOnnxError, TimeoutError) as error:
                raise problem_of(error) from error
            finally:
                for future in futures:
                    future.cancel()
            self.answered += len(answers)
            return answers

    async def stream(
        self, question: str, context: str, config: GenerationConfig
    ) -> AsyncGenerator[str | Answer | None]:
        """Answers one question, and tells its text as it grows. Closing the generator frees what it takes.

        Yields:
            None once the question was taken, and wherever there is nothing new for `KEEP_ALIVE_SECONDS`; pieces of the
            text, which together are `Answer.text`; and the answer, as the last.

        Raises:
            Problem: As from `answer`.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        deadline = loop.time() + self.limits.timeout_seconds
        futures: list[Future[Answer]] = []

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        with self._admitted([question], [context], config):
            try:
                async with asyncio.timeout_at(deadline):
                    futures = await self._submit(
                        lambda: [self.answerer.submit(question, context, config=config, on_text=tell)],
                        [question, context],
                    )
                futures[0].add_done_callback(lambda _: tell(None))
                yield None
                told = 0
                while (piece := await _next(pieces, deadline - loop.time())) is not None:
                    told += len(piece)
                    yield piece or None
                answer = futures[0].result()
                if answer.text[told:]:
                    yield answer.text[told:]
                self.answered += 1
                yield answer
            except (QAOnnxError, TimeoutError) as error:
                raise problem_of(error) from error
            finally:
                for future in futures:
                    future.cancel()

    def fail_waiting(self) -> None:
        """Fails the requests that are under way with the problem `draining`; blocks for one step of the engine."""
        self.answerer.close(cancel_waiting=True)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _admitted(self, questions: Sequence[str], contexts: Sequence[str], config: GenerationConfig) -> Iterator[None]:
        if self.is_draining:
            raise Problem("draining", DRAINING)
        limits = self.limits
        if len(questions) > limits.items:
            raise Problem("invalid_request", f"items: got {len(questions):,}; expected at most {limits.items:,}")
        for name, texts, most in (
            ("question", questions, limits.question_characters),
            ("context", contexts, limits.context_characters),
        ):
            for index, text in enumerate(texts):
                if len(text) > most:
                    place = name if len(texts) == 1 else f"items.{index}.{name}"
                    raise Problem(
                        "invalid_request", f"{place}: got {len(text):,} characters; expected at most {most:,}"
                    )
        windows = self.answerer.estimate_windows(questions, contexts, config=config)
        if windows > limits.windows:
            raise Problem(
                "invalid_request",
                f"the contexts would be read in about {windows:,} windows; expected at most {limits.windows:,}. Ask "
                "fewer questions at once, shorten contexts and questions, or ask for larger windows that share less",
            )
        characters = sum(map(len, questions)) + sum(map(len, contexts))
        with self.admission.admit(questions=len(questions), characters=characters):
            yield

    async def _submit(self, submit: Callable[[], list[Future[Answer]]], texts: Sequence[str]) -> list[Future[Answer]]:
        """Tokenizes and submits, in another thread where that takes long: the event loop serves others meanwhile."""
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            return submit()
        job = self._tokenizing.submit(submit)
        try:
            return await asyncio.shield(asyncio.wrap_future(job))
        except asyncio.CancelledError:
            if job.cancelled():  # by `fail_waiting`; nobody cancelled this task
                raise Problem("draining", DRAINING) from None
            if not job.cancel():  # it has begun
                job.add_done_callback(_cancel_all)
            raise


async def _next(pieces: asyncio.Queue[str | None], seconds_left: float) -> str | None:
    """The next piece; an empty one where none came for `KEEP_ALIVE_SECONDS`.

    Raises:
        TimeoutError: No time is left.
    """
    try:
        async with asyncio.timeout(min(KEEP_ALIVE_SECONDS, max(0.0, seconds_left))):
            return await pieces.get()
    except TimeoutError:
        if seconds_left <= KEEP_ALIVE_SECONDS:
            raise
        return ""


def _cancel_all(job: Future[list[Future[Answer]]]) -> None:
    """Cancels what was submitted for a caller that had left meanwhile."""
    if job.exception() is None:
        for future in job.result():
            future.cancel()
