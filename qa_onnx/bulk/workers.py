"""Shards are answered here, in this process or in several of its own, and written whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa

from qa_onnx.batch import ERROR, AnswerBatch
from qa_onnx.bulk.plan import InputFile
from qa_onnx.bulk.table_files import encode
from qa_onnx.errors import EngineError, InvalidInputError, QAOnnxError
from qa_onnx.files import write_file

TYPES = {
    "answer": pa.string(),
    "score": pa.float64(),
    "start": pa.int64(),
    "end": pa.int64(),
    "no_answer_probability": pa.float64(),
    "finish_reason": pa.string(),
    ERROR: pa.string(),
}
"""Of the columns that are added."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows to answer.

    Attributes:
        rows: The rows as an Arrow stream.
        source: The file that they are from.
        question: Name of the column with the questions.
        context: Name of the column with the contexts.
        first_row: Number of the first one in its file, from 0.
        target: The file to write.
    """

    rows: pa.Buffer
    source: Path
    question: str
    context: str
    first_row: int
    target: Path

    @classmethod
    def of(cls, table: pa.Table, file: InputFile, *, first_row: int, target: Path) -> Shard:
        """A shard of a file."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:  # which has these rows alone, not those around a slice
            stream.write_table(table)
        names = {"question": file.question, "context": file.context}
        return cls(rows=sink.getvalue(), source=file.path, first_row=first_row, target=target, **names)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A shard that was written: how many rows it has, and how many of them have an error."""

    rows: int
    errors: int


@dataclass(frozen=True, kw_only=True)
class ShardWriter:
    """Answers shards and writes them.

    Attributes:
        answers: With `on_error="null"`, so that errors are named by their row in the file.
        output_format: One of `OUTPUT_FORMATS`.
        keeps_errors: Whether a row may have an error.
    """

    answers: AnswerBatch
    output_format: str
    keeps_errors: bool

    def __call__(self, shard: Shard) -> Written:
        """Answers a shard and writes it.

        Raises:
            InvalidInputError: A row has an error that is not to be kept, or the file cannot be written.
            QAOnnxError: As from `AnswerBatch`.
        """
        table = pa.ipc.open_stream(shard.rows).read_all()
        texts = {name: table.column(getattr(shard, name)).to_pylist() for name in ("question", "context")}
        found = self.answers(texts)
        errors = [(row, error) for row, error in enumerate(found[self.answers.prefix + ERROR]) if error is not None]
        if errors and not self.keeps_errors:
            row, error = errors[0]
            raise InvalidInputError(
                f"{shard.source}: row {shard.first_row + row} (the first is 0): {error}. Or pass --on-error null, "
                "which answers the others"
            )
        for name, kind in TYPES.items():
            if name != ERROR or self.keeps_errors:
                name = self.answers.prefix + name
                table = table.append_column(pa.field(name, kind), pa.array(found[name], kind))
        write_file(shard.target, encode(table, self.output_format))
        return Written(rows=table.num_rows, errors=len(errors))


def write_shards(shards: Iterator[Shard], write: ShardWriter, *, processes: int) -> Iterator[Written]:
    """Has shards written, each by one of some processes, as soon as one is free: no more are read than are in work.

    Args:
        shards: To be written.
        write: What each process does. It is pickled.
        processes: How many; 1 is this one.

    Raises:
        QAOnnxError: As from `write`; shards that others are at are left out then, and processes ended.
        EngineError: A process ended.
    """
    if processes == 1:
        yield from map(write, shards)
        return
    with _started(processes, write) as workers:
        idle, busy = list(workers), set[Connection]()
        while True:
            while idle and (shard := next(shards, None)) is not None:
                connection = idle.pop()
                _send(connection, shard, workers)
                busy.add(connection)
            if not busy:
                return
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                try:
                    reply = ready.recv()
                except (EOFError, ConnectionError) as error:
                    raise _ended(workers[ready]) from error
                if isinstance(reply, BaseException):
                    raise reply
                yield reply
                busy.remove(ready)
                idle.append(ready)


def _send(connection: Connection, shard: Shard, workers: dict[Connection, BaseProcess]) -> None:
    try:
        connection.send(shard)
    except ConnectionError as error:
        raise _ended(workers[connection]) from error


def _ended(process: BaseProcess) -> EngineError:
    process.join()
    status = process.exitcode or 0
    how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
    hint = "; the system may have been out of memory" if status == -signal.SIGKILL else ""
    return EngineError(f"a process that answers ended {how}{hint}. Pass fewer --processes, or a smaller --batch-size")


@contextmanager
def _started(processes: int, write: ShardWriter) -> Iterator[dict[Connection, BaseProcess]]:
    """Some processes by the connection to each; they are killed at the end, which leaves no half file."""
    context = multiprocessing.get_context("spawn")  # a fork would have none of the threads of ONNX Runtime
    workers: dict[Connection, BaseProcess] = {}
    resource_tracker.ensure_running()  # the first start would start it, which ends with SIGINT unblocked
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs, write), daemon=True)
            with _sigint_blocked():
                process.start()
                workers[ours] = process
            theirs.close()
        yield workers
    finally:
        for process in workers.values():
            process.kill()
        for connection, process in workers.items():
            process.join()
            connection.close()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block, and never come to processes that are started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, write: Callable[[Shard], Written]) -> None:
    """Writes shards until there are no more; one process of `write_shards`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        try:
            reply: Written | QAOnnxError = write(shard)
        except QAOnnxError as error:
            reply = error
        connection.send(reply)


def _end_with_parent() -> None:
    """Ends this process where the one that started it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
