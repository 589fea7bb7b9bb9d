"""Answers a Parquet data set with Spark (`mapInPandas`); the same command continues after the driver was killed.

    python examples/spark.py BUNDLE questions.parquet answers --key id [--master local[2,4]]

Every Python worker loads the bundle once and keeps it for all of its partitions. Rows whose key is in the answers
already are left out. `local[2,4]` repeats a task up to 4 times; plain `local[2]` does not, a cluster does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)

import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.types import DoubleType, LongType, StringType, StructField, StructType

from qa_onnx import EngineConfig, GenerationConfig
from qa_onnx.batch import AnswerBatch

TYPES = {"score": DoubleType(), "start": LongType(), "end": LongType(), "no_answer_probability": DoubleType()}


def main(arguments: argparse.Namespace) -> None:
    """Answers what has no answer yet."""
    spark = (
        SparkSession.builder.master(arguments.master)
        .appName("qa_onnx")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", arguments.batch_rows)
        # Each task's file takes its place as the task ends, so that they outlive a driver that is killed.
        .config("spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version", "2")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    generation = GenerationConfig(max_new_tokens=arguments.max_new_tokens)
    # One thread: a task of Spark has one core.
    answers = AnswerBatch(arguments.bundle, on_error="null", generation=generation, engine=EngineConfig(threads=1))

    def answer(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            answered = pd.DataFrame(answers(dict(frame.items())))
            yield answered.astype({"start": "Int64", "end": "Int64"})

    questions = spark.read.parquet(str(arguments.input.absolute()))
    total = questions.count()
    output = arguments.output.absolute()
    if any(output.glob("part-*.parquet")):
        answered = spark.read.parquet(str(output)).select(arguments.key)
        questions = questions.join(answered, arguments.key, "left_anti")
    schema = StructType(
        [*questions.schema, *(StructField(name, TYPES.get(name, StringType())) for name in answers.columns)]
    )
    # A small file is one partition, which one core would answer alone. Rows of one context stay together.
    parted = questions.repartition(arguments.partitions, answers.context)
    parted.mapInPandas(answer, schema).write.mode("append").parquet(str(output))
    print(f"{spark.read.parquet(str(output)).select(arguments.key).distinct().count()} of {total} rows are answered")
    spark.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--key", default="id", help="a column with a value of its own in each row; default: id")
    parser.add_argument("--master", default="local[2,4]", help="default: %(default)s")
    parser.add_argument("--partitions", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batch-rows", type=int, default=256, help="rows that are answered at once; default: 256")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    main(parser.parse_args())
