"""The public class: load a bundle once, then answer questions about passages, one or many at a time."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from tokenizers import Tokenizer

from qa_onnx.answer import Answer
from qa_onnx.bundle import Bundle, Manifest
from qa_onnx.decoding import Decoding
from qa_onnx.engine import Engine
from qa_onnx.errors import BundleError, ClosedError, InvalidInputError
from qa_onnx.generation import GenerationConfig, check_whole_number
from qa_onnx.grounding import Spans, TokenBytes
from qa_onnx.kv_cache import PassageCache
from qa_onnx.progress import Progress
from qa_onnx.prompt import load_tokenizer
from qa_onnx.request import Request
from qa_onnx.session import Session, resolve_provider
from qa_onnx.windows import encode_windows
from qa_onnx.worker import Worker

DEFAULT_BATCH_SIZE = 64
DEFAULT_PASSAGE_CACHE_BYTES = 256 * 2**20
DEFAULT_MAX_WAIT_MS = 2.0
DEFAULT_MAX_QUEUE = 1024
REMEMBERED_SPANS = 256
"""Passages (or windows of them) whose words stay known, for grounded answers to the next question on them."""


class Answerer:
    """Answers questions with a bundle. Make one with `from_pretrained`; call it from any number of threads."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        engine: Engine,
        tokenizer: Tokenizer,
        provider: str,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_wait_ms: float = DEFAULT_MAX_WAIT_MS,
        max_queue: int = DEFAULT_MAX_QUEUE,
    ) -> None:
        """Takes the loaded parts; `from_pretrained` loads them."""
        self._manifest = manifest
        self._engine: Engine | None = engine
        self._tokenizer = tokenizer
        self._provider = provider
        self._batch_size = batch_size
        self._max_queue = max_queue
        self._pid = os.getpid()
        self._worker = Worker(self._make_decoding, batch_size=batch_size, max_wait_ms=max_wait_ms, max_queue=max_queue)
        self._token_bytes: TokenBytes | None = None
        self._spans_of = lru_cache(maxsize=REMEMBERED_SPANS)(self._find_spans)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        passage_cache_bytes: int = DEFAULT_PASSAGE_CACHE_BYTES,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_wait_ms: float = DEFAULT_MAX_WAIT_MS,
        max_queue: int = DEFAULT_MAX_QUEUE,
    ) -> Answerer:
        """Loads a bundle.

        Args:
            path: The directory that `python -m export.to_onnx` wrote.
            provider: `cpu`, `cuda`, or `auto`: CUDA where this ONNX Runtime has it, else the CPU. A provider that does
                not start is an error; none is ever replaced by another.
            threads: CPU threads of one operator, at most as many as the machine has; None is one a physical core.
            passage_cache_bytes: Memory for the keys and values of the passages read last: another question on one of
                them costs only the question. 0 keeps none.
            batch_size: The most questions of `submit`, `answer_async`, `stream` and `answer_iter` computed together.
            max_wait_ms: How long a first such question waits for others to join it, in milliseconds.
            max_queue: The most such questions that wait or are computed; one more raises `QueueFullError`.

        Raises:
            BundleError: The bundle is missing, incomplete, altered or of another format version.
            ProviderError: ONNX Runtime or the provider is not there, or does not run the bundle's precision.
            InvalidInputError: An unknown provider, a thread count that the machine does not have, or another
                option out of range.
        """
        if isinstance(passage_cache_bytes, bool) or not isinstance(passage_cache_bytes, int) or passage_cache_bytes < 0:
            raise InvalidInputError(
                f"got passage_cache_bytes {passage_cache_bytes!r}; expected a whole number of bytes, 0 to keep none"
            )
        check_whole_number("batch_size", batch_size, 1)
        check_whole_number("max_queue", max_queue, 1)
        if isinstance(max_wait_ms, bool) or not isinstance(max_wait_ms, int | float) or not 0 <= max_wait_ms <= 60_000:
            raise InvalidInputError(f"got max_wait_ms {max_wait_ms!r}; expected milliseconds from 0 to 60,000")
        bundle = Bundle.open(path)
        provider = resolve_provider(provider, bundle.manifest.precision)
        tokenizer = _load_tokenizer(bundle.tokenizer_path)
        session = Session(bundle.model_path, provider=provider, threads=threads)
        bundle.check_graph(session.input_names, session.output_names)
        return cls(
            manifest=bundle.manifest,
            engine=Engine(
                session,
                layout=bundle.manifest.cache_layout,
                eos_token_id=bundle.manifest.eos_token_id,
                max_positions=bundle.manifest.max_positions,
                passage_cache=PassageCache(passage_cache_bytes),
            ),
            tokenizer=tokenizer,
            provider=session.provider,
            batch_size=batch_size,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
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
        """Answers one question about one passage. Arguments and errors are those of `answer_batch`."""
        return self.answer_batch([question], [context], config=config, max_new_tokens=max_new_tokens)[0]

    def answer_batch(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        *,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: bool = False,
    ) -> list[Answer]:
        """Answers many questions; each as if it had been asked alone.

        Args:
            questions: The questions.
            contexts: The passage of each question, in the same order. It may be of any length: what does not fit into
                the model's positions is read in overlapping windows, and the best answer of all windows is taken.
            config: How to answer; None is `GenerationConfig()`.
            max_new_tokens: In place of the one in `config`.
            batch_size: The most questions computed together. Batches of long prompts hold fewer.
            progress: Draw a progress line on standard error where that is a terminal.

        Returns:
            One answer a question, in the order given.

        Raises:
            InvalidInputError: The two differ in length, an entry is not a string or has no text, or an option is out of
                range. Everything is checked before anything is computed.
            PromptTooLongError: A question leaves no room for a part of its passage.
            ClosedError: The answerer was closed, or belongs to the process that this one was forked from.
        """
        engine = self._open_engine()
        for name, texts in (("questions", questions), ("contexts", contexts)):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise InvalidInputError(
                    f"got {name} of type {type(texts).__name__}; expected a list of strings. "
                    "For a single question call answer(question, context)"
                )
        check_whole_number("batch_size", batch_size, 1)
        requests = self._make_requests(questions, contexts, self._resolve(config, max_new_tokens))
        owners = {row: request for request in requests for row in request.rows}
        decoding = Decoding(engine, batch_size=batch_size)
        decoding.add(owners)
        with Progress(len(requests), "answering", enabled=progress) as bar:
            while not decoding.is_idle:
                for row in decoding.step():
                    request = owners.pop(row)
                    rows = request.finished(row)
                    owners |= dict.fromkeys(rows, request)
                    decoding.add(rows)
                    bar.advance(request.is_done)
        return [request.answer() for request in requests]

    def answer_iter(
        self, pairs: Iterable[tuple[str, str]], *, config: GenerationConfig | None = None
    ) -> Iterator[Answer]:
        """Answers a stream of (question, passage) in its order, which may be endless: memory stays bounded.

        The stream is read ahead of the answers, by twice the batch size at most.

        Raises:
            InvalidInputError: As from `answer_batch`, when the pair's turn has come; so do the other errors.
        """
        ahead: deque[Future[Answer]] = deque()
        most = min(2 * self._batch_size, self._max_queue)
        try:
            for pair in pairs:
                if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                    raise InvalidInputError(f"got {pair!r}; expected a pair of question and passage")
                ahead.append(self.submit(*pair, config=config))
                if len(ahead) == most:  # half of them make room, so that many come together and share their work
                    while len(ahead) > most // 2:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def stream(self, question: str, context: str, *, config: GenerationConfig | None = None) -> Iterator[str]:
        """The text of an answer as it grows: pieces which together are `Answer.text`.

        Of a document of several windows, and with `top_k`, nothing is certain before the end: it is one piece then.
        A stream that is closed, or not held any more, frees what it takes.

        Raises:
            QAOnnxError: As from `submit`, at the call.
        """
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = self._submit(question, context, config, on_text=pieces.put)
        future.add_done_callback(lambda _: pieces.put(None))
        return self._pieces(pieces, future)

    @staticmethod
    def _pieces(pieces: SimpleQueue[str | None], future: Future[Answer]) -> Iterator[str]:
        told = 0
        try:
            while (piece := pieces.get()) is not None:
                told += len(piece)
                yield piece
            rest = future.result().text[told:]
            if rest:
                yield rest
        finally:
            future.cancel()

    def submit(self, question: str, context: str, *, config: GenerationConfig | None = None) -> Future[Answer]:
        """Has a question answered in the background; it joins the batch that is being computed.

        Requests take turns in the order they came, the windows of a long document too: it keeps others waiting for no
        more than the batch that is being read. Cancelling the future frees what the request takes, at any time.

        Raises:
            InvalidInputError, PromptTooLongError, ClosedError: As from `answer_batch`.
            QueueFullError: `max_queue` requests wait already.
        """
        return self._submit(question, context, config)

    async def answer_async(self, question: str, context: str, *, config: GenerationConfig | None = None) -> Answer:
        """As `submit`, for asyncio. A task that is cancelled frees what its request takes."""
        return await asyncio.wrap_future(self.submit(question, context, config=config))

    def close(self, *, cancel_waiting: bool = False) -> None:
        """Lets go of the model. Later calls raise `ClosedError`. Closing twice is harmless.

        Args:
            cancel_waiting: Fail requests that wait or are computed with `ClosedError`, instead of waiting for them.
        """
        if self._pid == os.getpid():
            self._worker.close(cancel_waiting=cancel_waiting)
        self._engine = None

    def __enter__(self) -> Answerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes; where an error leaves the block, requests that wait are failed instead of waited for."""
        self.close(cancel_waiting=kind is not None)

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"provider={self._provider!r}"
        return f"Answerer({self._manifest.source_model!r}, precision={self._manifest.precision!r}, {state})"

    def _open_engine(self) -> Engine:
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
        if config.no_answer_threshold is None:
            config = replace(config, no_answer_threshold=self._manifest.no_answer_threshold)
        return config

    def _make_requests(
        self,
        questions: Sequence[str],
        contexts: Sequence[str],
        config: GenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> list[Request]:
        engine = self._open_engine()
        windows = encode_windows(
            self._tokenizer,
            questions,
            contexts,
            max_positions=engine.max_positions,
            max_new_tokens=config.max_new_tokens,
            stride=config.stride,
        )
        if config.grounded and config.top_k > 1:
            for index, context in enumerate(contexts):
                spans = self._spans_of(context).count(config.top_k)
                if spans < config.top_k:
                    raise InvalidInputError(
                        f"got top_k {config.top_k}; context {index} has only {spans} different spans. Ask for fewer"
                    )
        return [
            Request(
                parts,
                config,
                tokenizer=self._tokenizer,
                eos_token_id=engine.eos_token_id,
                max_positions=engine.max_positions,
                spans_of=self._spans_of,
                on_text=on_text,
            )
            for parts in windows
        ]

    def _submit(
        self,
        question: str,
        context: str,
        config: GenerationConfig | None,
        on_text: Callable[[str], object] | None = None,
    ) -> Future[Answer]:
        self._open_engine()
        (request,) = self._make_requests([question], [context], self._resolve(config), on_text)
        return self._worker.submit(request)

    def _find_spans(self, passage: str) -> Spans:
        if self._token_bytes is None:
            self._token_bytes = TokenBytes(self._tokenizer)
        return Spans(passage, self._token_bytes)

    def _make_decoding(self) -> Decoding:
        return Decoding(self._open_engine(), batch_size=self._batch_size, oldest_first=True)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(str(path))
    except Exception as error:  # `tokenizers` has no error class of its own
        raise BundleError(f"{path} is no tokenizer ({error}). Export the model again") from error
