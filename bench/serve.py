"""Measures the HTTP service: equal answers, throughput, overload, long documents, clients that leave, memory.

python -m bench.serve --model BUNDLE --data dev.json --output serve.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import publish
from bench.machine import describe_machine
from bench.serve_load import (
    ServiceProcess,
    busy_seconds,
    measure_overhead,
    offer,
    percentile,
    run_in_process,
    run_wrk,
    serving,
    write_bodies,
)
from qa_onnx import Answer, Answerer, EngineConfig, GenerationConfig
from qa_onnx.cli import add_data_options, positive, read_data, run_command
from qa_onnx.files import check_outputs

CONNECTIONS = 64
OVERLOAD = 4
Pairs = Sequence[tuple[str, str]]


def measure_equality(service: ServiceProcess, answerer: Answerer, pairs: Pairs) -> dict[str, Any]:
    """How many answers of each route equal those of `answer_batch`, in text and in the bits of the score."""
    questions, contexts = zip(*pairs, strict=True)
    plain = answerer.answer_batch(questions, contexts)
    extractive = answerer.answer_batch(questions, contexts, config=GenerationConfig(extractive=True))
    client, size = service.client, 50
    single, streamed, hf, batch, v2 = [], [], [], [], []
    for question, context in pairs:
        body = {"question": question, "context": context}
        single.append(_pair(client.post("/v1/answer", json=body).json()["answer"]))
        events = client.post("/v1/answer", json=body | {"stream": True}).text.strip().split("\n\n")
        answer = json.loads(events[-1].partition("\ndata: ")[2])["answer"]
        told = "".join(json.loads(event.partition("\ndata: ")[2])["text"] for event in events if "event: text" in event)
        streamed.append((told, answer["score"]))
        found = client.post("/hf/question-answering", json={"inputs": body}).json()
        hf.append((found["answer"], found["score"]))
    for begin in range(0, len(pairs), size):
        part = pairs[begin : begin + size]
        items = [{"question": question, "context": context} for question, context in part]
        batch += map(_pair, client.post("/v1/answers", json={"items": items}).json()["answers"])
        tensors = [
            {"name": name, "datatype": "BYTES", "shape": [len(part)], "data": list(texts)}
            for name, texts in zip(("question", "context"), zip(*part, strict=True), strict=True)
        ]
        path = f"/v2/models/{client.get('/v1/model').json()['name']}/infer"
        outputs = {one["name"]: one["data"] for one in client.post(path, json={"inputs": tensors}).json()["outputs"]}
        v2 += zip(outputs["text"], outputs["score"], strict=True)
    return {
        "questions": len(pairs),
        **{
            name: _equal(found, expected)
            for name, found, expected in (
                ("single", single, plain),
                ("stream", streamed, plain),
                ("batch", batch, plain),
                ("v2", v2, plain),
                ("hf", hf, extractive),
            )
        },
    }


def _pair(answer: dict[str, Any]) -> tuple[str, float]:
    return answer["text"], answer["score"]


def _equal(found: Sequence[tuple[str, float]], expected: Sequence[Answer]) -> int:
    bits = [np.float64(score).tobytes() for _, score in found]
    return sum(
        text == answer.text and bit == np.float64(answer.score).tobytes()
        for (text, _), bit, answer in zip(found, bits, expected, strict=True)
    )


def measure_throughput(
    service: ServiceProcess, answerer: Answerer, pairs: Pairs, script: Path, *, rounds: int, seconds: int
) -> dict[str, Any]:
    """Answers per second of wrk against the service and of `submit` in process, in turns; the first round warms up."""
    http, inside, others = [], [], []
    for _ in range(rounds + 1):
        time.sleep(0.5)
        started, ours = busy_seconds(), _our_seconds(service)
        inside.append(run_in_process(answerer, pairs, at_once=CONNECTIONS, seconds=seconds))
        time.sleep(0.5)
        before = service.cpu_seconds(thread=True)
        figures = run_wrk(service.url, script, connections=CONNECTIONS, seconds=seconds)
        http.append(figures | {"loop_ms": (service.cpu_seconds(thread=True) - before) / figures["requests"] * 1000})
        others.append(100 * (busy_seconds() - started - (_our_seconds(service) - ours)) / (2 * seconds + 1))
    ratios = [one["per_second"] / other["per_second"] for one, other in zip(http[1:], inside[1:], strict=True)]
    return {
        "connections": CONNECTIONS,
        "http_per_second": statistics.median(one["per_second"] for one in http[1:]),
        "in_process_per_second": statistics.median(one["per_second"] for one in inside[1:]),
        "percent_of_in_process": 100 * statistics.median(ratios),
        "percent_range": [100 * min(ratios), 100 * max(ratios)],
        "event_loop_cpu_ms": statistics.median(one["loop_ms"] for one in http[1:]),
        "submit_cpu_ms": statistics.median(one["submit_ms"] for one in inside[1:]),
        "failed": sum(one["failed"] for one in http),
        "percent_of_a_processor_of_others": statistics.median(others[1:]),
    }


def _our_seconds(service: ServiceProcess) -> float:
    """CPU time of the service, of this process and of those that it has run."""
    times = os.times()
    return service.cpu_seconds() + times.user + times.system + times.children_user + times.children_system


def measure_overload(
    service: ServiceProcess, bodies: Sequence[str], *, capacity: float, seconds: float
) -> dict[str, Any]:
    """Offers several times what the service can do: what is refused, how fast, and whether all is counted."""
    before = service.answered_by_status()
    memory = service.rss_mib()
    taken = asyncio.run(offer(service.url, bodies, per_second=OVERLOAD * capacity, seconds=seconds))
    after = service.answered_by_status()
    counted = {
        status: count - before.get(status, 0) for status, count in after.items() if count > before.get(status, 0)
    }
    sent = {str(status): len(values) for status, values in sorted(taken.items())}
    return {
        "seconds": seconds,
        "offered_per_second": sum(sent.values()) / seconds,
        "statuses_of_client": sent,
        "statuses_of_service": counted,
        "counts_agree": sent == counted,
        "p50_ms_of_429": 1000 * percentile(taken.get(429, []), 0.5),
        "p99_ms_of_429": 1000 * percentile(taken.get(429, []), 0.99),
        "p99_ms_of_200": 1000 * percentile(taken.get(200, []), 0.99),
        "rss_mib": [memory, service.rss_mib()],
    }


def measure_document(service: ServiceProcess, pairs: Pairs, *, characters: int) -> dict[str, Any]:
    """How fast /healthz is while a long document is read, and how soon the service is idle once its client left."""
    text = "\n".join(context for _, context in pairs)
    text = (text * (characters // len(text) + 1))[:characters]
    question = pairs[len(pairs) // 2][0]
    idle = _time_health(service, lambda: time.sleep(2))
    results: list[float] = []

    def ask() -> None:
        started = time.perf_counter()
        service.client.post("/v1/answer", json={"question": question, "context": text}).raise_for_status()
        results.append(time.perf_counter() - started)

    busy = _time_health(service, ask)
    body = json.dumps({"question": question, "context": text[::-1]}).encode()
    host, _, port = service.url.removeprefix("http://").partition(":")
    head = (
        f"POST /v1/answer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\n".encode() + body)
        while service.metrics()["qa_onnx_sequences_running"] == 0:  # it is tokenized
            time.sleep(0.05)
        time.sleep(0.5)
    left = time.perf_counter()
    idle_after = None
    while idle_after is None and time.perf_counter() - left < 10:
        before = service.cpu_seconds()
        time.sleep(0.1)
        if service.cpu_seconds() - before <= 1 / 100:
            idle_after = time.perf_counter() - left - 0.1
    return {
        "characters": characters,
        "seconds_of_document": results[0],
        "health_ms_idle": idle,
        "health_ms_meanwhile": busy,
        "idle_seconds_after_client_left": idle_after,
    }


def _time_health(service: ServiceProcess, work: Callable[[], object]) -> dict[str, float]:
    """Asks /healthz again and again while something is done in another thread."""
    thread = threading.Thread(target=work)
    thread.start()
    taken = []
    while thread.is_alive():
        started = time.perf_counter()
        service.client.get("/healthz").raise_for_status()
        taken.append(1000 * (time.perf_counter() - started))
        time.sleep(0.005)
    return {"requests": len(taken), "p50": percentile(taken, 0.5), "p99": percentile(taken, 0.99), "max": max(taken)}


def measure_soak(service: ServiceProcess, bodies: Sequence[str], *, capacity: float, seconds: float) -> dict[str, Any]:
    """Memory of the service under a steady load of its capacity, at ten moments."""
    memory = []
    for _ in range(10):
        asyncio.run(offer(service.url, bodies, per_second=capacity, seconds=seconds / 10))
        memory.append(round(service.rss_mib(), 1))
    return {"seconds": seconds, "rss_mib": memory, "growth_percent_of_second_half": 100 * (memory[-1] / memory[4] - 1)}


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    add_data_options(parser)
    parser.add_argument("--questions", type=positive, default=300, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="of throughput; default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="a round; default: %(default)s")
    parser.add_argument("--overload-seconds", type=positive, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument("--soak-seconds", type=int, default=600, metavar="N", help="default: %(default)s; 0: none")
    parser.add_argument(
        "--document-characters", type=int, default=1_000_000, metavar="N", help="default: %(default)s; 0: no document"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: _measure(arguments))


def _measure(arguments: argparse.Namespace) -> None:
    check_outputs({"--output": arguments.output}, {"--data": arguments.data, "--model": arguments.model})
    examples = read_data(arguments, needs_answers=False)
    step = max(1, len(examples) // arguments.questions)  # questions of all passages, not of the first few
    pairs = [(example.question, example.context) for example in examples[::step]][: arguments.questions]
    result: dict[str, Any] = {"model": arguments.model.name, **describe_machine()}

    def note(part: str, figures: dict[str, Any]) -> dict[str, Any]:
        sys.stderr.write(f"{part}: {json.dumps(figures)}\n")
        result[part] = figures
        return figures

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        script = write_bodies(pairs, directory)
        bodies = (directory / "bodies.jsonl").read_text(encoding="ascii").splitlines()
        rounds, seconds = arguments.rounds, arguments.seconds
        with (
            Answerer.from_pretrained(arguments.model, config=EngineConfig()) as answerer,
            serving(arguments.model, directory, "--timeout-seconds", "600") as service,
        ):
            note("equality", measure_equality(service, answerer, pairs))
            note("overhead", measure_overhead(answerer.answer(*pairs[0]), script))
            speed = note(
                "throughput", measure_throughput(service, answerer, pairs, script, rounds=rounds, seconds=seconds)
            )
            if arguments.document_characters:
                note("document", measure_document(service, pairs, characters=arguments.document_characters))
        capacity, seconds = speed["http_per_second"], arguments.overload_seconds
        with serving(arguments.model, directory, "--queue-questions", "256") as service:
            note("overload", measure_overload(service, bodies, capacity=capacity, seconds=seconds))
            if arguments.soak_seconds:
                note("soak", measure_soak(service, bodies, capacity=capacity, seconds=arguments.soak_seconds))
    table = "\n".join(f"{part}: {json.dumps(figures)}" for part, figures in result.items())
    publish(result, table, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
