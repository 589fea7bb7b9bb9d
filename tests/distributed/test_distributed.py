"""The examples on Ray and Spark: the answers of one process, also after kills. `make test-distributed` runs them.

They need an environment of their own (`examples/distributed.txt`); elsewhere they skip.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from qa_onnx import EngineConfig, GenerationConfig
from qa_onnx.batch import RESULTS, AnswerBatch
from qa_onnx.data.reader import read_examples
from tests.conftest import ROOT
from training.starter.sample import generate

pytest.importorskip("ray", reason="make test-distributed installs Ray and Spark")
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 600
MAX_NEW_TOKENS = 8
BATCH_ROWS = "25"


@pytest.fixture(scope="session")
def bundle():
    if "QA_ONNX_BUNDLE" not in os.environ:
        pytest.skip("set QA_ONNX_BUNDLE to a bundle; make test-distributed exports one")
    return Path(os.environ["QA_ONNX_BUNDLE"]).absolute()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """600 questions, real ones where there are any, in one small file, which is one block."""
    real = Path(os.environ.get("QA_ONNX_DATA", ROOT.parent / "shared" / "data")) / "squad" / "dev.json"
    directory = tmp_path_factory.mktemp("source")
    if not real.is_file():
        real = directory / "sample.json"
        real.write_text(json.dumps(generate("train", questions=ROWS + 50)), encoding="utf-8")
    examples = read_examples(real)[:ROWS]
    path = directory / "questions.parquet"
    columns = {name: [getattr(example, name) for example in examples] for name in ("id", "question", "context")}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="session")
def expected(bundle, source):
    """What one process answers, by key."""
    generation = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
    answers = AnswerBatch(bundle, generation=generation, engine=EngineConfig(threads=1))
    found = answers(pq.read_table(source).to_pydict())
    answers.close()
    assert len(found["id"]) == len(set(found["id"])) == ROWS
    assert len(set(found["answer"])) > ROWS // 4
    return {key: tuple(found[name][row] for name in RESULTS) for row, key in enumerate(found["id"])}


def answers_in(output):
    """The answers of a folder by key; a key twice is an error."""
    rows = pq.read_table(output).to_pylist()
    found = {row["id"]: tuple(row[name] for name in RESULTS) for row in rows}
    assert len(found) == len(rows)
    assert all(row["error"] is None for row in rows)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(process):
    """Ends a process that was started in a session of its own, and all of that session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def cluster():
    """Two Ray nodes on loopback that ask for a token: their address, and the environment that has the token."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:  # short: sockets are in it
        token = Path(name) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "PYTHONPATH": str(ROOT),
        }
        address = f"127.0.0.1:{free_port()}"
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--memory=1000000000"]
        ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
        head = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}", f"--temp-dir={name}/t"]
        head += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        log = (Path(name) / "log").open("w+")
        options = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        nodes = [subprocess.Popen([*ray, *head], **options)]
        try:
            wait_for(lambda: _is_open(address), 60)
            second = [f"--address={address}", "--node-ip-address=127.0.0.2"]
            nodes.append(subprocess.Popen([*ray, *second], **options))
            wait_for(lambda: _count_nodes(address, environment) == 2, 90)
            yield address, environment
        except BaseException as error:
            error.add_note((Path(name) / "log").read_text())
            raise
        finally:
            for node in reversed(nodes):
                end(node)
            log.close()


def _is_open(address):
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


COUNT = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
"""


def _count_nodes(address, environment):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, address], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0


def wait_for(happened, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def start(example, *arguments, environment=None):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)],
        env=environment or os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=240):
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, out + errors[-3000:]
    return out


def processes_of(environment, name):
    """The processes with a name that have the token of a cluster, so that no other's are met."""
    mark = f"RAY_AUTH_TOKEN_PATH={environment['RAY_AUTH_TOKEN_PATH']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if name in (path / "cmdline").read_bytes() and mark in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def ray_data(cluster, bundle, source, output, actors=3):
    address, environment = cluster
    return start(
        "ray_data.py",
        *(bundle, source, output, "--address", address, "--actors", actors),
        *("--batch-rows", BATCH_ROWS, "--max-new-tokens", MAX_NEW_TOKENS),
        environment=environment,
    )


def files_in(output):
    return list(output.glob("part-*.parquet"))


def test_two_nodes_give_the_answers_of_one_process(cluster, bundle, source, expected, tmp_path):
    out = finish(ray_data(cluster, bundle, source, tmp_path / "out"))
    assert f"answered {ROWS} rows, 0 with an error; 0 were there already; {ROWS} of {ROWS}" in out
    assert answers_in(tmp_path / "out") == expected
    assert len(files_in(tmp_path / "out")) == ROWS // int(BATCH_ROWS)


def test_a_worker_that_is_killed_is_replaced_and_its_task_repeated(cluster, bundle, source, expected, tmp_path):
    output = tmp_path / "out"
    process = ray_data(cluster, bundle, source, output)
    for wanted in (2, 8):
        wait_for(lambda wanted=wanted: len(files_in(output)) >= wanted or process.poll() is not None, 120)
        workers = processes_of(cluster[1], b"ray::MapWorker")
        assert workers
        os.kill(workers[0], signal.SIGKILL)
    finish(process)
    assert answers_in(output) == expected


def test_a_driver_that_is_killed_is_continued_by_the_same_command(cluster, bundle, source, expected, tmp_path):
    output = tmp_path / "out"
    process = ray_data(cluster, bundle, source, output)
    wait_for(lambda: len(files_in(output)) >= 4 or process.poll() is not None, 120)
    assert process.poll() is None
    process.kill()
    process.communicate()
    time.sleep(3)  # its workers end, or write what they are at
    before = answers_in(output)
    assert 0 < len(before) < ROWS
    out = finish(ray_data(cluster, bundle, source, output))
    assert f"answered {ROWS - len(before)} rows, 0 with an error; {len(before)} were there already" in out
    assert answers_in(output) == expected


def test_a_driver_without_the_token_is_refused(cluster):
    other = cluster[1] | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert _count_nodes(cluster[0], other) == 0
    assert _count_nodes(*cluster) == 2


def test_actors_that_take_all_processors_are_refused_instead_of_hanging(cluster, bundle, source, tmp_path):
    process = ray_data(cluster, bundle, source, tmp_path / "out", actors=4)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("got --actors 4 on 4 CPUs; expected at least one less")


def replicas(environment):
    return processes_of(environment, b"ray::ServeReplica")


def test_replicas_of_ray_serve_answer_alike_and_refuse_what_is_none(cluster, bundle, source, expected):
    """One replica serves at first; requests that wait bring the second."""
    address, environment = cluster
    port = free_port()
    process = start(
        "ray_serve.py", bundle, "--address", address, "--replicas", 2, "--port", port, environment=environment
    )
    try:
        assert process.stdout.readline() == f"ready: http://127.0.0.1:{port}/answer\n", process.stderr.read()
        rows = pq.read_table(source).to_pylist()[:120]

        def ask(row):
            data = json.dumps({"question": row["question"], "context": row["context"]}).encode()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/answer", data, timeout=60) as reply:
                return json.load(reply)

        assert len(replicas(environment)) == 1
        with ThreadPoolExecutor(48) as pool:  # more than `target_ongoing_requests` of one replica
            replies = list(pool.map(ask, rows))
            until = time.monotonic() + 120
            while len(replicas(environment)) < 2:
                assert time.monotonic() < until, "no second replica was started"
                assert list(pool.map(ask, rows)) == replies
            assert list(pool.map(ask, rows)) == replies  # of both
        full = AnswerBatch(bundle, engine=EngineConfig(threads=1))(
            {name: [row[name] for row in rows] for name in ("question", "context")}
        )
        assert [(reply["text"], reply["score"]) for reply in replies] == list(
            zip(full["answer"], full["score"], strict=True)
        )
        with pytest.raises(urllib.error.HTTPError, match="422"):
            ask({"question": " ", "context": "Rollo."})
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=180)


def spark(bundle, source, output):
    pytest.importorskip("pyspark")
    return start("spark.py", bundle, source, output, "--batch-rows", BATCH_ROWS, "--max-new-tokens", MAX_NEW_TOKENS)


def test_spark_gives_the_answers_of_one_process(bundle, source, expected, tmp_path):
    assert f"{ROWS} of {ROWS} rows are answered" in finish(spark(bundle, source, tmp_path / "out"))
    assert answers_in(tmp_path / "out") == expected


def _python_workers(process):
    """Spark's Python workers, which are forks of a daemon in the session of the driver."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == process.pid and b"pyspark" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_spark_repeats_the_task_of_a_worker_that_is_killed(bundle, source, expected, tmp_path):
    process = spark(bundle, source, tmp_path / "out")
    wait_for(lambda: files_in(tmp_path / "out") or process.poll() is not None, 120)
    workers = [pid for pid in _python_workers(process) if pid != process.pid]
    assert workers
    os.kill(max(workers), signal.SIGKILL)  # forks have higher numbers than their daemon
    finish(process)
    assert answers_in(tmp_path / "out") == expected


def test_spark_continues_after_its_driver_was_killed(bundle, source, expected, tmp_path):
    output = tmp_path / "out"
    process = spark(bundle, source, output)
    wait_for(lambda: len(files_in(output)) >= 2 or process.poll() is not None, 120)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {row["id"] for path in files_in(output) for row in pq.read_table(path, columns=["id"]).to_pylist()}
    assert 0 < len(before) < ROWS
    finish(spark(bundle, source, output))
    assert answers_in(output) == expected
