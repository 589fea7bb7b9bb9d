"""The engine loop: the one thread that steps the scheduler, and gives each request's future its answer.

The thread computes as long as there is something to compute, and ends then; the next request starts another. Only it
touches the scheduler, the sequences and the requests; callers hand requests over and get futures.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread, current_thread

from qa_onnx.answer import Answer
from qa_onnx.engine.scheduler import Scheduler
from qa_onnx.engine.sequence import Sequence
from qa_onnx.errors import ClosedError, QueueFullError
from qa_onnx.progress import Progress
from qa_onnx.request import Request

_CLOSED = "this Answerer was closed; load the bundle again with Answerer.from_pretrained"


@dataclass(frozen=True, kw_only=True, eq=False)
class Ticket:
    """A request and its future; see `EngineLoop.submit`."""

    request: Request
    future: Future[Answer]
    is_bulk: bool
    is_limited: bool


class EngineLoop:
    """Answers requests in the background. Safe to use from any number of threads."""

    def __init__(self, scheduler: Scheduler, *, batch_size: int, max_wait_ms: float, max_queue: int) -> None:
        """Starts nothing yet.

        Args:
            scheduler: What the requests' sequences run in; nobody else may use it.
            batch_size: This number of requests does not wait for others.
            max_wait_ms: How long a limited request that comes when nothing is computed waits for others, in
                milliseconds.
            max_queue: Maximum number of limited requests that wait or run.
        """
        self._scheduler: Scheduler | None = scheduler
        self._batch_size = batch_size
        self._max_wait = max_wait_ms / 1000
        self._max_queue = max_queue
        self._pid = os.getpid()
        self._changed = Condition()
        self._arrived: list[list[Ticket]] = []
        self._is_urgent = False
        """Whether one of them does not wait for others."""
        self._limited = self._answered = 0
        self._cancelled: deque[Request] = deque()
        self._tickets: dict[Request, Ticket] = {}
        self._owners: dict[Sequence, Request] = {}
        self._thread: Thread | None = None
        self._is_closed = self._is_failing = False
        _loops.add(self)

    @property
    def scheduler(self) -> Scheduler:
        """What the sequences run in; callers may only read its counts.

        Raises:
            ClosedError: The loop was closed.
        """
        scheduler = self._scheduler
        if scheduler is None:
            raise ClosedError(_CLOSED)
        return scheduler

    @property
    def requests(self) -> int:
        """Requests that wait or run."""
        with self._changed:
            return len(self._tickets) + sum(map(len, self._arrived))

    @property
    def answered(self) -> int:
        """Requests that were answered."""
        return self._answered

    def submit(
        self, requests: SequenceOf[Request], *, is_bulk: bool = False, is_limited: bool = False
    ) -> list[Future[Answer]]:
        """Has the requests of one call answered. Cancelling a future frees what its request takes, at any time.

        Args:
            requests: Of one call.
            is_bulk: Plan them for throughput, not first come, first served.
            is_limited: They count for `max_queue`, and may wait for others to share their batch.

        Raises:
            ClosedError: The loop was closed.
            QueueFullError: `max_queue` requests are there already.
        """
        tickets = [
            Ticket(request=request, future=Future(), is_bulk=is_bulk, is_limited=is_limited) for request in requests
        ]
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._note_cancelled, ticket.request))
        try:
            self._hand_over(tickets, is_limited=is_limited)
        except BaseException:  # Ctrl-C may come when they were handed over
            for ticket in tickets:
                ticket.future.cancel()
            raise
        return [ticket.future for ticket in tickets]

    def _hand_over(self, tickets: list[Ticket], *, is_limited: bool) -> None:
        with self._changed:
            if self._is_closed:
                raise ClosedError(_CLOSED)
            if is_limited:
                if self._limited + len(tickets) > self._max_queue:
                    raise QueueFullError(
                        f"{self._limited} requests wait for an answer, and max_queue is {self._max_queue}. Wait for "
                        "some of them, or load the bundle with EngineConfig(max_queue=...)"
                    )
                self._limited += len(tickets)
            self._arrived.append(tickets)
            self._is_urgent |= not is_limited
            if self._thread is None:
                self._thread = Thread(target=self._run, name="qa_onnx", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, *, cancel_waiting: bool) -> None:
        """Takes no more requests, and waits until those that are there were answered, or fails them at once.

        In a process that was forked after the loop was made there is nothing to close.
        """
        if self._pid != os.getpid():
            return
        with self._changed:
            self._is_closed = True
            self._is_failing |= cancel_waiting
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not current_thread():
            thread.join()
            thread = None
        if thread is None:
            self._scheduler = None  # and with it the model

    def _note_cancelled(self, request: Request, future: Future[Answer]) -> None:
        if future.cancelled():
            self._cancelled.append(request)

    def _run(self) -> None:
        try:
            while self._take_arrived():
                for sequence in self.scheduler.step():
                    self._finish(sequence)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to the callers that wait
            self._fail_all(error)
            with self._changed:
                self._thread = None

    def _take_arrived(self) -> bool:
        """Takes what callers have handed over or cancelled; returns whether there is something to compute."""
        with self._changed:
            if self.scheduler.is_idle:
                self._changed.wait_for(
                    lambda: self._is_urgent or self._limited >= self._batch_size or self._is_closed, self._max_wait
                )
            is_failing = self._is_failing
            arrived = self._open_tickets()
        if is_failing:
            self._fail_all(ClosedError("this Answerer was closed before the request was answered"))
        while self._cancelled:
            self._drop(self._cancelled.popleft())
        for call in arrived:
            sequences = [one for ticket in call for one in self._own(ticket.request, ticket.request.sequences)]
            if sequences:
                self.scheduler.add(sequences, is_bulk=call[0].is_bulk)
        with self._changed:
            if self.scheduler.is_idle and not self._arrived:
                self._thread = None
                return False
        return True

    def _open_tickets(self) -> list[list[Ticket]]:
        """Takes what callers have handed over; the lock is held."""
        arrived, self._arrived, self._is_urgent = self._arrived, [], False
        self._tickets |= {ticket.request: ticket for call in arrived for ticket in call}
        return arrived

    def _own(self, request: Request, sequences: list[Sequence]) -> list[Sequence]:
        """Notes the request of sequences; of one that nobody waits for, there are none."""
        if request not in self._tickets:
            return []
        self._owners |= dict.fromkeys(sequences, request)
        return sequences

    def _finish(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended: the request gets more of them, or its answer, or an error of its own."""
        request = self._owners.pop(sequence)
        if request not in self._tickets:
            return
        try:
            if sequence.error is not None:
                raise sequence.error
            following = self._own(request, request.finish(sequence))
            answer = request.answer() if request.is_done else None
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the request's caller
            self._fail(request, error)
            return
        if following:
            self.scheduler.add(following, is_bulk=self._tickets[request].is_bulk)
        if answer is not None:
            future = self._forget(request)
            if future.set_running_or_notify_cancel():
                self._answered += 1
                future.set_result(answer)

    def _fail(self, request: Request, error: BaseException) -> None:
        """Gives a request's caller an error, and frees what the request takes."""
        future = self._forget(request)
        self._abort(request)
        if future.set_running_or_notify_cancel():
            future.set_exception(error)

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            self._open_tickets()
        for request in list(self._tickets):
            self._fail(request, error)

    def _drop(self, request: Request) -> None:
        """Frees what a cancelled request takes."""
        if request in self._tickets:
            self._forget(request)
            self._abort(request)

    def _forget(self, request: Request) -> Future[Answer]:
        with self._changed:
            ticket = self._tickets.pop(request)
            self._limited -= ticket.is_limited
        return ticket.future

    def _abort(self, request: Request) -> None:
        for sequence in request.sequences:
            self.scheduler.abort(sequence)


_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()


def _close_all() -> None:
    """At the interpreter's exit requests that wait fail, so that the process does not answer its whole queue first."""
    for loop in list(_loops):
        loop.close(cancel_waiting=True)


atexit.register(_close_all)


def wait_for_answers(
    futures: SequenceOf[Future[Answer]],
    *,
    progress: bool = False,
    on_answer: Callable[[int, Answer], object] | None = None,
) -> list[Answer]:
    """Waits for requests; the first error, or Ctrl-C, cancels the others.

    Args:
        futures: From `EngineLoop.submit`.
        progress: Draw a progress line on standard error where that is a terminal.
        on_answer: Called with the index of each request and its answer, as soon as it is there.

    Returns:
        The answers in the order of the futures.
    """
    done: SimpleQueue[Future[Answer]] = SimpleQueue()
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
