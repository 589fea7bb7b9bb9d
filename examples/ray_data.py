"""Answers a Parquet data set on a Ray cluster with Ray Data: an actor for each model, and files with a key in each row.

    python examples/ray_data.py BUNDLE questions.parquet answers --key id --actors 2 [--address auto]

Bundle, questions and answers are on a file system that all nodes have, at the same path. Each batch is one file that is
written whole or not at all, under a name that its keys decide: a task that Ray repeats after a worker was killed writes
the same file again. After the driver was killed the same command answers only the keys that are in no file yet.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import ray

from qa_onnx import EngineConfig, GenerationConfig
from qa_onnx.batch import AnswerBatch
from qa_onnx.bulk.workers import TYPES
from qa_onnx.files import write_file


class AnswerAndKeep:
    """Answers batches and writes each to a file; every actor of the pool has one."""

    def __init__(self, bundle: str, output: Path, key: str, *, max_new_tokens: int) -> None:
        """Sets it up; the model is loaded with the first batch."""
        generation = GenerationConfig(max_new_tokens=max_new_tokens)
        # One thread: Ray counts an actor as one CPU, and threads that it does not know of disturb the other actors.
        self._answers = AnswerBatch(bundle, on_error="null", generation=generation, engine=EngineConfig(threads=1))
        self._output, self._key = output, key

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        """Answers a batch; only its counts go to the driver."""
        if not batch.num_rows:
            return {"rows": np.array([], np.int64), "errors": np.array([], np.int64)}
        found = self._answers({name: batch[name].to_pylist() for name in batch.column_names})
        table = batch
        for name in self._answers.columns:
            table = table.append_column(name, pa.array(found[name], TYPES[name]))
        content = io.BytesIO()
        pq.write_table(table, content)
        name = hashlib.sha256(repr(found[self._key]).encode()).hexdigest()[:32]
        write_file(self._output / f"part-{name}.parquet", content.getvalue())
        errors = sum(error is not None for error in found["error"])
        return {"rows": np.array([batch.num_rows]), "errors": np.array([errors])}


def keys_in(output: Path, key: str) -> pa.Array:
    """The keys of all rows that have been answered; files that are there are whole."""
    files = sorted(map(str, output.glob("part-*.parquet")))
    if not files:
        return pa.array([], pa.null())
    return pyarrow.dataset.dataset(files).to_table(columns=[key])[key].combine_chunks()


def main(arguments: argparse.Namespace) -> None:
    """Answers what has no answer yet.

    Raises:
        SystemExit: The actors would take all CPUs of the cluster, or rows are missing at the end.
    """
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    ray.init(address=arguments.address, log_to_driver=False)
    processors = int(ray.cluster_resources().get("CPU", 0))
    if arguments.actors >= processors:  # Ray would wait without a word: the tasks that read need a CPU, too
        sys.exit(f"got --actors {arguments.actors} on {processors} CPUs; expected at least one less, for reading")
    answered = keys_in(output, arguments.key)
    known = ray.put(answered)

    def without_answered(batch: pa.Table) -> pa.Table:
        keys = ray.get(known)
        return batch.filter(
            pc.invert(pc.is_in(batch[arguments.key], keys.cast(batch.schema.field(arguments.key).type)))
        )

    questions = ray.data.read_parquet(str(arguments.input.absolute()))
    total = questions.count()
    if len(answered):
        questions = questions.map_batches(without_answered, batch_format="pyarrow")
    done = (
        # A small file is one block, which one actor would answer alone while the others wait.
        questions.repartition(target_num_rows_per_block=arguments.batch_rows)
        .map_batches(
            AnswerAndKeep,
            fn_constructor_args=(arguments.bundle.absolute(), output, arguments.key),
            fn_constructor_kwargs={"max_new_tokens": arguments.max_new_tokens},
            batch_format="pyarrow",
            batch_size=arguments.batch_rows,
            num_cpus=1,
            # The pool grows with the queue. One that is killed is started again, and its task is repeated.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=arguments.actors),
        )
        .take_all()
    )
    rows, errors = sum(row["rows"] for row in done), sum(row["errors"] for row in done)
    in_files = len(keys_in(output, arguments.key))
    print(f"answered {rows} rows, {errors} with an error; {len(answered)} were there already; {in_files} of {total}")
    if in_files != total:
        sys.exit("rows are missing, or two have one key; expected one file row for each key")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--key", default="id", help="a column with a value of its own in each row; default: id")
    parser.add_argument("--actors", type=int, default=1, help="at most so many models; default: 1")
    parser.add_argument("--batch-rows", type=int, default=256, help="rows of a file; default: 256")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--address", help="of a cluster, such as auto; default: one of its own on this machine")
    main(parser.parse_args())
