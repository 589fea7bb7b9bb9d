"""Many callers: requests that come one by one, and join the batch that is being computed (continuous batching).

A thread computes as long as there is something to compute, and ends then; the next request starts another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread, current_thread

from qa_onnx.answer import Answer
from qa_onnx.decoding import Decoding, Row
from qa_onnx.errors import ClosedError, QueueFullError
from qa_onnx.request import Request


class Worker:
    """Answers requests in the background, in turn. Safe to use from any number of threads."""

    def __init__(
        self, make_decoding: Callable[[], Decoding], *, batch_size: int, max_wait_ms: float, max_queue: int
    ) -> None:
        """Starts nothing yet.

        Args:
            make_decoding: Makes the loop that the rows run in.
            batch_size: So many requests do not wait for others.
            max_wait_ms: How long a request that comes when nothing is computed waits for others to join it, in
                milliseconds.
            max_queue: The most requests that wait or are computed.
        """
        self._make_decoding = make_decoding
        self._batch_size = batch_size
        self._max_wait = max_wait_ms / 1000
        self._max_queue = max_queue
        self._changed = Condition()
        self._arrived: list[Request] = []
        self._futures: dict[Request, Future[Answer]] = {}
        self._thread: Thread | None = None
        self._is_closed = False

    def submit(self, request: Request) -> Future[Answer]:
        """Has a request answered. Cancelling the future frees what the request takes, whenever that is.

        Raises:
            ClosedError: The worker was closed.
            QueueFullError: `max_queue` requests are there already.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._is_closed:
                raise ClosedError("this Answerer was closed; load the bundle again with Answerer.from_pretrained")
            if len(self._futures) >= self._max_queue:
                raise QueueFullError(
                    f"{len(self._futures)} requests wait for an answer, and max_queue is {self._max_queue}. "
                    "Wait for some of them, or load the bundle with a larger max_queue"
                )
            self._futures[request] = future
            self._arrived.append(request)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="qa_onnx")
                self._thread.start()
            self._changed.notify_all()
        return future

    def close(self, *, cancel_waiting: bool) -> None:
        """Takes no more requests, and waits until those that are there were answered, or fails them at once."""
        with self._changed:
            self._is_closed = True
            thread = self._thread
            self._changed.notify_all()
        if cancel_waiting:
            self._fail(ClosedError("this Answerer was closed before the request was answered"))
        if thread is not None and thread is not current_thread():
            thread.join()

    def _run(self) -> None:
        try:
            decoding = self._make_decoding()
            owners: dict[Row, Request] = {}
            while True:
                with self._changed:
                    if decoding.is_idle:
                        self._changed.wait_for(
                            lambda: len(self._arrived) >= self._batch_size or self._is_closed, self._max_wait
                        )
                    arrived, self._arrived = self._arrived, []
                    if not arrived and decoding.is_idle:
                        self._thread = None
                        return
                    for request, future in list(self._futures.items()):
                        if future.cancelled():
                            request.cancel()
                            del self._futures[request]
                for request in arrived:
                    self._add(decoding, owners, request, request.rows)
                for row in decoding.step():
                    request = owners.pop(row)
                    if not row.cancelled:
                        self._add(decoding, owners, request, request.finished(row))
                        if request.is_done:
                            self._deliver(request)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to the callers that wait
            with self._changed:
                self._thread = None
            self._fail(error)

    @staticmethod
    def _add(decoding: Decoding, owners: dict[Row, Request], request: Request, rows: list[Row]) -> None:
        owners |= dict.fromkeys(rows, request)
        decoding.add(rows)

    def _deliver(self, request: Request) -> None:
        answer = request.answer()
        with self._changed:
            future = self._futures.pop(request, None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(answer)

    def _fail(self, error: BaseException) -> None:
        """Gives every caller the error."""
        with self._changed:
            failed, self._futures, self._arrived = self._futures, {}, []
        for request, future in failed.items():
            request.cancel()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
