"""The public class: load a bundle once, then answer questions about contexts, one or many at a time."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NoReturn

from tokenizers import Tokenizer

from qa_onnx.answer import Answer
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.look_ahead import LookAhead
from qa_onnx.engine.scheduler import Scheduler
from qa_onnx.errors import ClosedError, InvalidInputError
from qa_onnx.kernels import KernelChoice
from qa_onnx.loading import load_bundle
from qa_onnx.loop import EngineLoop, wait_for_answers
from qa_onnx.manifest import Manifest
from qa_onnx.request import Request
from qa_onnx.request_factory import RequestFactory, pair_texts
from qa_onnx.stats import AnswererStats
from qa_onnx.stream import AnswerStream

INLINE_CHARACTERS = 10_000
"""Contexts shorter than this are tokenized in the event loop, which takes a millisecond or two."""


class Answerer:
    """Answers questions with a bundle. Make one with `from_pretrained`; call it from any number of threads.

    All calls share one scheduler: questions that come while others are answered join their batch.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        engine: Engine,
        tokenizer: Tokenizer,
        provider: str,
        config: EngineConfig | None = None,
        kernels: KernelChoice | None = None,
    ) -> None:
        """Takes the loaded parts; `from_pretrained` loads them."""
        config = config or EngineConfig()
        self._manifest = manifest
        self._engine: Engine | None = engine
        self._provider = provider
        self._config = config
        self._kernels = kernels or KernelChoice(reason="loaded without them")
        self._pid = os.getpid()
        self._loop = EngineLoop(
            Scheduler(engine, batch_size=config.batch_size, look_ahead=LookAhead() if config.look_ahead else None),
            batch_size=config.batch_size,
            max_wait_ms=config.max_wait_ms,
            max_queue=config.max_queue,
        )
        self._requests = RequestFactory(
            manifest, tokenizer, eos_token_id=engine.eos_token_id, max_positions=engine.max_positions
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, provider: str = "auto", config: EngineConfig | None = None
    ) -> Answerer:
        """Loads a bundle.

        Args:
            path: The directory that `python -m export.to_onnx` wrote.
            provider: `cpu`, `cuda`, or `auto`: CUDA where this ONNX Runtime has it, else the CPU. A provider that does
                not start is an error; none is ever replaced by another.
            config: Threads, device, batches and caches; None is `EngineConfig()`.

        Raises:
            BundleError: The bundle is missing, incomplete, altered, of another format version or contradicts itself.
            ProviderError: ONNX Runtime or the provider is not there, or does not run the bundle's precision.
            InvalidInputError: An unknown provider, or `max_batch_bytes` without room for one prompt.
        """
        if config is not None and not isinstance(config, EngineConfig):
            raise InvalidInputError(f"got config of type {type(config).__name__}; expected an EngineConfig")
        config = config or EngineConfig()
        loaded = load_bundle(path, provider=provider, config=config)
        return cls(
            manifest=loaded.manifest,
            engine=loaded.engine,
            tokenizer=loaded.tokenizer,
            provider=loaded.provider,
            config=config,
            kernels=loaded.kernels,
        )

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def provider(self) -> str:
        """The provider that runs the graph: `cpu` or `cuda`."""
        return self._provider

    def answer(
        self,
        question: str,
        context: str,
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """Answers one question about one context. Arguments and errors are those of `answer_batch`.

        Options other than `max_new_tokens` go into `config`: `config=GenerationConfig(extractive=True)`.
        """
        (request,) = self._make_requests([question], [context], self._requests.resolve(config, max_new_tokens))
        return wait_for_answers(self._loop.submit([request]))[0]

    def answer_batch(
        self,
        questions: Iterable[str],
        contexts: Iterable[str] | str,
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        progress: bool = False,
        on_answer: Callable[[int, Answer], object] | None = None,
    ) -> list[Answer]:
        """Answers many questions; each as if it had been asked alone.

        Args:
            questions: The questions: a list, a NumPy array, a pandas Series or anything else that yields strings.
            contexts: The context of each question, in the same order; or one string, the context of all of them. A
                context may be of any length: what does not fit into the model's positions is read in overlapping
                windows, and the best answer of all windows is taken.
            config: How to answer; None is `GenerationConfig()`.
            max_new_tokens: Replaces the one in `config`.
            progress: Draw a progress line on standard error where that is a terminal.
            on_answer: Called in this thread with the index of each question and its answer, as soon as it is there.

        Returns:
            One answer per question, in the order given.

        Raises:
            InvalidInputError: The two differ in length, an entry is not a string or has no text, or an option is out of
                range. Everything is checked before anything is computed.
            PromptTooLongError: A question leaves no room for a part of its context.
            OutOfMemoryError: There is no memory for a batch of one question.
            ClosedError: The answerer was closed, or belongs to the process that this one was forked from.
        """
        requests = self._make_batch(questions, contexts, self._requests.resolve(config, max_new_tokens))
        futures = self._loop.submit(requests, is_bulk=True)
        return wait_for_answers(futures, progress=progress, on_answer=on_answer)

    def answer_iter(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[Answer]:
        """Answers a stream of (question, context) in its order, which may be endless: memory stays bounded.

        The stream is read ahead of the answers, by twice the batch size at most.

        Raises:
            InvalidInputError: As from `answer_batch`, when the pair's turn has come; so do the other errors.
        """
        ahead: deque[Future[Answer]] = deque()
        limit = min(2 * self._config.batch_size, self._config.max_queue)
        try:
            for pair in pairs:
                if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                    raise InvalidInputError(f"got {pair!r}; expected a pair of question and context")
                ahead.append(self.submit(*pair, config=config, max_new_tokens=max_new_tokens))
                if len(ahead) == limit:  # half of them make room, so that many come together and share their work
                    while len(ahead) > limit // 2:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def stream(
        self,
        question: str,
        context: str,
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
    ) -> AnswerStream:
        """The text of an answer as it grows: pieces which together are `Answer.text`.

        Of a context of several windows, and with `num_answers`, nothing is certain before the end: it is one piece
        then.

        Raises:
            QAOnnxError: As from `submit`, at the call.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = self._submit(question, context, self._requests.resolve(config, max_new_tokens), on_text=pieces.put)
        future.add_done_callback(lambda _: pieces.put(None))
        return AnswerStream(pieces, future)

    def submit(
        self,
        question: str,
        context: str,
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], object] | None = None,
    ) -> Future[Answer]:
        """Has a question answered in the background; it joins the batch that is being computed.

        Requests are served first come, first served, and the windows of a long context take turns with other requests:
        it keeps them waiting for no more than the batch that is being read. Cancelling the future frees what the
        request takes, at any time. At the interpreter's exit, requests that still wait fail with `ClosedError`.

        Args:
            question: The question.
            context: Its context.
            config: How to answer; None is `GenerationConfig()`.
            max_new_tokens: Replaces the one in `config`.
            on_text: Called in the engine's thread with pieces of the answer's text as it grows, as `stream` gives them;
                together they are the text, or the beginning of it. It must not block.

        Raises:
            InvalidInputError, PromptTooLongError, ClosedError: As from `answer_batch`.
            QueueFullError: `max_queue` requests wait already.
        """
        return self._submit(question, context, self._requests.resolve(config, max_new_tokens), on_text)

    def submit_batch(
        self,
        questions: Iterable[str],
        contexts: Iterable[str] | str,
        *,
        config: GenerationConfig | None = None,
    ) -> list[Future[Answer]]:
        """Has many questions answered in the background, planned together as by `answer_batch`: all of them or none.

        Arguments are those of `answer_batch`. Each future is cancelled by itself, as from `submit`.

        Raises:
            InvalidInputError, PromptTooLongError, ClosedError: As from `answer_batch`.
            QueueFullError: With them, more than `max_queue` requests would wait. Nothing is computed.
        """
        requests = self._make_batch(questions, contexts, self._requests.resolve(config))
        return self._loop.submit(requests, is_bulk=True, is_limited=True)

    async def answer_async(
        self,
        question: str,
        context: str,
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
    ) -> Answer:
        """As `submit`, for asyncio. A task that is cancelled frees what its request takes.

        A long context is tokenized in another thread, so that the event loop is not blocked.
        """
        submit = partial(self.submit, question, context, config=config, max_new_tokens=max_new_tokens)
        if not isinstance(context, str) or len(context) < INLINE_CHARACTERS:
            return await asyncio.wrap_future(submit())
        submitted = asyncio.get_running_loop().run_in_executor(None, submit)
        try:
            future = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_result)
            raise
        return await asyncio.wrap_future(future)

    def estimate_windows(
        self, questions: Sequence[str], contexts: Sequence[str], *, config: GenerationConfig | None = None
    ) -> int:
        """About how many windows the contexts would be read in, one context per question; nothing is tokenized.

        Raises:
            InvalidInputError: `config` is no `GenerationConfig`.
        """
        return self._requests.estimate_windows(questions, contexts, self._requests.resolve(config))

    def stats(self) -> AnswererStats:
        """What the answerer does now, and has done since it was loaded.

        Raises:
            ClosedError: The answerer was closed.
        """
        engine, scheduler = self._check_open(), self._loop.scheduler
        return AnswererStats(
            provider=self._provider,
            requests=self._loop.requests,
            waiting=scheduler.waiting,
            running=scheduler.running,
            answered=self._loop.answered,
            batch_size=scheduler.batch_size,
            kernels=self._kernels.instruction_set,
            kernels_reason=self._kernels.reason,
            uses_cuda_graphs=engine.uses_cuda_graphs,
            engine=replace(engine.stats),
            prefix_cache=engine.prefix_cache.stats(),
        )

    def close(self, *, cancel_waiting: bool = False) -> None:
        """Frees the model. Later calls raise `ClosedError`. Closing twice is harmless.

        Args:
            cancel_waiting: Fail requests that wait or are computed with `ClosedError`, instead of waiting for them.
        """
        self._loop.close(cancel_waiting=cancel_waiting)
        self._engine = None

    def __enter__(self) -> Answerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes; where an error leaves the block, requests that wait are failed instead of waited for."""
        self.close(cancel_waiting=kind is not None)

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied, as for another process.

        Raises:
            InvalidInputError: Always.
        """
        raise InvalidInputError(
            "an Answerer cannot be pickled or copied: its model, caches and threads belong to this process. Load the "
            "bundle in each process, as in ProcessPoolExecutor(initializer=...); threads can share one Answerer"
        )

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"provider={self._provider!r}"
        return f"Answerer({self._manifest.source_model!r}, precision={self._manifest.precision!r}, {state})"

    def _check_open(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise ClosedError("this Answerer was closed; load the bundle again with Answerer.from_pretrained")
        if self._pid != os.getpid():
            raise ClosedError(
                f"this Answerer was loaded in process {self._pid}, and this is {os.getpid()}, forked from it: the "
                "threads of ONNX Runtime are not here. Load the bundle after the fork"
            )
        return engine

    def _make_batch(
        self, questions: Iterable[str], contexts: Iterable[str] | str, config: GenerationConfig
    ) -> list[Request]:
        self._check_open()
        return self._make_requests(*pair_texts(questions, contexts), config)

    def _make_requests(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> list[Request]:
        self._check_open()
        return self._requests.make(questions, contexts, config, on_text)

    def _submit(
        self,
        question: str,
        context: str,
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> Future[Answer]:
        (request,) = self._make_requests([question], [context], config, on_text)
        return self._loop.submit([request], is_limited=True)[0]


def _cancel_result(submitted: asyncio.Future[Future[Answer]]) -> None:
    """Cancels a request whose caller was cancelled as it was submitted."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
