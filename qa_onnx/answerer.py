"""The public class: load a bundle once, then answer questions about contexts, one or many at a time."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NoReturn

from tokenizers import Tokenizer

from qa_onnx.answer import Answer
from qa_onnx.bundle import Bundle, Manifest
from qa_onnx.config import EngineConfig, GenerationConfig
from qa_onnx.engine.engine import Engine, EngineStats
from qa_onnx.engine.look_ahead import LookAhead
from qa_onnx.engine.prefix_cache import PrefixCacheStats
from qa_onnx.engine.scheduler import Scheduler
from qa_onnx.engine.session import Session, load_copier, resolve_provider
from qa_onnx.errors import ClosedError, InvalidInputError
from qa_onnx.kernels import KernelChoice, choose_kernels
from qa_onnx.loop import EngineLoop
from qa_onnx.progress import Progress
from qa_onnx.request import Request
from qa_onnx.text.constraint import Spans, TokenBytes, check_byte_level
from qa_onnx.text.windows import encode_windows, estimate_windows

INLINE_CHARACTERS = 10_000
"""Contexts shorter than this are tokenized in the event loop, which takes a millisecond or two."""
CACHED_SPANS = 256
"""Contexts (or windows of them) whose words are kept, for extractive answers to the next question on them."""


@dataclass(frozen=True, kw_only=True)
class AnswererStats:
    """What an answerer does now, and has done since it was loaded.

    Attributes:
        provider: `cpu` or `cuda`.
        requests: Requests that wait or run.
        waiting: Sequences that wait; a request has one per window of its context, or more with `num_answers`.
        running: Sequences that are computed.
        answered: Requests that were answered.
        batch_size: Maximum number of sequences computed together; lower than `EngineConfig.batch_size` after a batch
            for which there was no memory.
        kernels: The instruction set of the kernels that compute (`amx`, `avx512`...); None where ONNX Runtime's own do.
        kernels_reason: Why it is None.
        uses_cuda_graphs: Whether decode steps are captured in CUDA graphs.
        engine: Counts of what was computed.
        prefix_cache: What the prefix cache holds, and how often it helped.
    """

    provider: str
    requests: int
    waiting: int
    running: int
    answered: int
    batch_size: int
    kernels: str | None
    kernels_reason: str
    uses_cuda_graphs: bool
    engine: EngineStats
    prefix_cache: PrefixCacheStats


def choose_backend(precision: str, *, provider: str, kernels: str) -> tuple[str, KernelChoice]:
    """Decides what a bundle is run with on this machine: the provider, and whether with kernels.

    Args:
        precision: Of the bundle.
        provider: As of `Answerer.from_pretrained`.
        kernels: `EngineConfig.kernels`.

    Raises:
        InvalidInputError: An unknown provider.
        ProviderError: The provider or the kernels are not there, or do not run the precision.
    """
    found = resolve_provider(provider, precision)
    return found, choose_kernels(kernels, provider=found, precision=precision)


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
        self._tokenizer = tokenizer
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
        self._token_bytes: TokenBytes | None = None
        self._find_spans = lru_cache(maxsize=CACHED_SPANS)(self._compute_spans)

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
        bundle = Bundle.open(path)
        provider, kernels = choose_backend(bundle.manifest.precision, provider=provider, kernels=config.kernels)
        bundle.check_files()
        tokenizer = bundle.load_tokenizer()
        path = bundle.graph_path(has_kernels=kernels.library is not None)
        session = Session(path, provider=provider, config=config, kernels=kernels.library)
        copier = load_copier(bundle.cache_copy_path, provider=provider, config=config)
        bundle.check_graphs(session, copier)
        return cls(
            manifest=bundle.manifest,
            engine=Engine(
                session,
                copier,
                layout=bundle.manifest.cache_layout,
                eos_token_id=bundle.manifest.eos_token_id,
                max_positions=bundle.manifest.max_positions,
                prefix_cache_bytes=config.prefix_cache_bytes,
            ),
            tokenizer=tokenizer,
            provider=session.provider,
            config=config,
            kernels=kernels,
        )

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
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
        """Answers one question about one context. Arguments and errors are those of `answer_batch`."""
        (request,) = self._make_requests([question], [context], self._resolve(config, max_new_tokens))
        return self._wait_for([request], is_bulk=False)[0]

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
        requests = self._make_batch(questions, contexts, self._resolve(config, max_new_tokens))
        return self._wait_for(requests, is_bulk=True, progress=progress, on_answer=on_answer)

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
        future = self._submit(question, context, self._resolve(config, max_new_tokens), on_text=pieces.put)
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
        return self._submit(question, context, self._resolve(config, max_new_tokens), on_text)

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
        requests = self._make_batch(questions, contexts, self._resolve(config))
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

        A long context is tokenized in another thread, so that the event loop goes on.
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
        config = self._resolve(config)
        return estimate_windows(
            questions,
            contexts,
            max_positions=self._manifest.max_positions,
            max_new_tokens=config.max_new_tokens,
            settings=self._manifest.window_settings.with_given(window=config.window, stride=config.stride),
        )

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

    def _resolve(self, config: GenerationConfig | None, max_new_tokens: int | None = None) -> GenerationConfig:
        """The caller's options, with the bundle's threshold where the caller gave none."""
        config = config or GenerationConfig()
        if not isinstance(config, GenerationConfig):
            raise InvalidInputError(f"got config of type {type(config).__name__}; expected a GenerationConfig")
        if max_new_tokens is not None:
            config = replace(config, max_new_tokens=max_new_tokens)
        if config.no_answer_threshold is None and not config.ignore_eos:
            config = replace(config, no_answer_threshold=self._manifest.no_answer_threshold)
        return config

    def _make_batch(
        self, questions: Iterable[str], contexts: Iterable[str] | str, config: GenerationConfig
    ) -> list[Request]:
        self._check_open()
        asked = _as_list("questions", questions)
        given = [contexts] * len(asked) if isinstance(contexts, str) else _as_list("contexts", contexts)
        return self._make_requests(asked, given, config)

    def _make_requests(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> list[Request]:
        engine = self._check_open()
        windows = encode_windows(
            self._tokenizer,
            questions,
            contexts,
            max_positions=engine.max_positions,
            max_new_tokens=config.max_new_tokens,
            settings=self._manifest.window_settings.with_given(window=config.window, stride=config.stride),
        )
        if config.extractive and config.num_answers > 1:
            for index, context in enumerate(contexts):
                spans = self._find_spans(context).count(config.num_answers)
                if spans < config.num_answers:
                    raise InvalidInputError(
                        f"got num_answers {config.num_answers}; context {index} has only {spans} different spans. "
                        "Ask for fewer"
                    )
        return [
            Request(
                parts,
                config,
                tokenizer=self._tokenizer,
                eos_token_id=engine.eos_token_id,
                max_positions=engine.max_positions,
                find_spans=self._find_spans,
                calibration=self._manifest.calibration,
                on_text=on_text,
            )
            for parts in windows
        ]

    def _submit(
        self,
        question: str,
        context: str,
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> Future[Answer]:
        (request,) = self._make_requests([question], [context], config, on_text)
        return self._loop.submit([request], is_limited=True)[0]

    def _wait_for(
        self,
        requests: Sequence[Request],
        *,
        is_bulk: bool,
        progress: bool = False,
        on_answer: Callable[[int, Answer], object] | None = None,
    ) -> list[Answer]:
        """The answers of requests; the first error, or Ctrl-C, cancels the others."""
        done: SimpleQueue[Future[Answer]] = SimpleQueue()
        futures = self._loop.submit(requests, is_bulk=is_bulk)
        index_of = {future: index for index, future in enumerate(futures)}
        try:
            for future in futures:
                future.add_done_callback(done.put)
            with Progress(len(futures), "answering", enabled=progress) as bar:
                for _ in futures:
                    future = done.get()
                    answer = future.result()
                    if on_answer is not None:
                        on_answer(index_of[future], answer)
                    bar.advance(1)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return [future.result() for future in futures]

    def _compute_spans(self, context: str) -> Spans:
        if self._token_bytes is None:
            self._token_bytes = check_byte_level(self._tokenizer)
        return Spans(context, self._token_bytes)


class AnswerStream(Iterator[str]):
    """The pieces of an answer's text. One that is closed, or not held any more, frees what its request takes."""

    def __init__(self, pieces: SimpleQueue[str | None], future: Future[Answer]) -> None:
        """Takes the queue of the pieces, with None at their end, and the answer's future."""
        self._pieces = pieces
        self._future = future
        self._told = 0
        self._is_over = False

    def __next__(self) -> str:
        """The next piece.

        Raises:
            QAOnnxError: As from `Answerer.submit`.
        """
        if self._is_over:
            raise StopIteration
        piece = self._pieces.get()
        if piece is not None:
            self._told += len(piece)
            return piece
        self._is_over = True
        if self._future.cancelled():
            raise StopIteration
        rest = self._future.result().text[self._told :]
        if not rest:
            raise StopIteration
        return rest

    def close(self) -> None:
        """Ends the stream."""
        self._is_over = True
        self._future.cancel()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _as_list(name: str, texts: Iterable[str]) -> list[str]:
    """The texts of an iterable.

    Raises:
        InvalidInputError: It is one text, or nothing with an order.
    """
    dimensions = getattr(texts, "ndim", 1)  # of NumPy and pandas: a DataFrame yields the names of its columns
    if dimensions == 1 and isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | Set):
        return list(texts)
    raise InvalidInputError(
        f"got {name} of type {type(texts).__name__}; expected a list of strings, or a column of a table. For a single "
        "question call answer(question, context)"
    )


def _cancel_result(submitted: asyncio.Future[Future[Answer]]) -> None:
    """Cancels a request whose caller was cancelled as it was submitted."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
