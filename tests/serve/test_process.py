"""The command itself, on the trained starter: how it begins, how it ends, and what it holds out."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from bench import serve as measurement
from bench.serve_load import serving
from qa_onnx.serve import command
from tests.conftest import ROOT
from tests.serve.conftest import read_events, wait_until


def run(*options, **environment):
    """Runs `serve` where it has to refuse; returns what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "qa_onnx", "serve", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert not done.stdout
    return lines[0]


def test_what_it_refuses_in_one_line(starter_bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run("--model", starter_bundle, "--port", taken.getsockname()[1])
        assert re.search(r"cannot listen on 127.0.0.1, port \d+ \(Address already in use\).*--port", said)
    assert "no.such.host.invalid" in run(
        "--model", starter_bundle, "--host", "no.such.host.invalid", "--allow-anonymous"
    )
    broken = tmp_path / "bundle"
    broken.mkdir()
    assert "bundle" in run("--model", broken, "--port", 0)
    keys = tmp_path / "keys"
    keys.write_text("a-key-that-everyone-can-read\n")
    keys.chmod(0o644)
    said = run("--model", starter_bundle, "--api-key-file", keys)
    assert "chmod 600" in said
    assert "a-key" not in said
    assert "--allow-anonymous" in run("--model", starter_bundle, "--host", "0.0.0.0")
    assert "--name" in run("--model", starter_bundle, "--name", "a/b")
    assert "got items" in run("--model", starter_bundle, "--items", "9999")


def test_without_the_extra_it_says_what_to_install(starter_bundle, tmp_path):
    """A Python in which the packages are not found, as in an environment without the extra."""
    script = (
        "import importlib.util as util, sys; find = util.find_spec; "
        "util.find_spec = lambda name, *more: None if name == 'fastapi' else find(name, *more); "
        "from qa_onnx.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", "--model", str(starter_bundle)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "in the checkout: pip install '.[serve]'" in done.stderr


def test_sigterm_lets_answers_end(starter_bundle, tmp_path, heldout_file):
    """Answers under way come, new requests get 503, the process ends with 0 and without a traceback."""
    context = json.loads(heldout_file.read_text())["data"][0]["paragraphs"][0]["context"]
    document = {"question": "Who was it?", "context": (context + "\n") * 400}
    results = []
    with serving(starter_bundle, tmp_path) as service:

        def ask(stream):
            response = httpx.post(f"{service.url}/v1/answer", json=document | {"stream": stream}, timeout=60)
            results.append((response.status_code, response.text))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in threads:
            thread.start()
        wait_until(lambda: service.metrics()["qa_onnx_sequences_running"] > 0)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: service.client.get("/readyz").status_code == 503)
        refused = service.client.post("/v1/answer", json={"question": "Who?", "context": context})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        for thread in threads:
            thread.join(60)
        assert service.process.wait(20) == 0
    assert [status for status, _ in results] == [200, 200]
    texts = {
        read_events(text)[-1][1]["answer"]["text"] if "event:" in text else json.loads(text)["answer"]["text"]
        for _, text in results
    }
    assert len(texts) == 1


@pytest.fixture(scope="module")
def figures(starter_bundle, heldout_file, tmp_path_factory):
    """What `bench.serve` measures, briefly."""
    output = tmp_path_factory.mktemp("figures") / "figures.json"
    arguments = [
        "--model",
        starter_bundle,
        "--data",
        heldout_file,
        "--questions",
        "60",
        "--rounds",
        "1",
        "--seconds",
        "2",
    ]
    more = ["--overload-seconds", "4", "--soak-seconds", "4", "--document-characters", "200000"]
    assert measurement.main(list(map(str, [*arguments, *more, "--output", output]))) == 0
    return json.loads(output.read_text())


needs_wrk = pytest.mark.skipif(
    subprocess.run(["which", "wrk"], capture_output=True, check=False).returncode != 0, reason="wrk is not installed"
)


@needs_wrk
def test_every_route_gives_the_bits_of_answer_batch(figures):
    equality = figures["equality"]
    assert equality.pop("questions") == 60
    assert set(equality.values()) == {60}, equality


@needs_wrk
def test_overload_is_refused_and_counted(figures):
    overload = figures["overload"]
    assert overload["counts_agree"], overload
    assert set(overload["statuses_of_client"]) == {"200", "429"}, overload
    assert figures["throughput"]["failed"] == 0


@needs_wrk
def test_a_document_stops_neither_probes_nor_the_end_of_its_work(figures):
    document = figures["document"]
    assert document["health_ms_meanwhile"]["p99"] < 1000 * document["seconds_of_document"] / 10, document
    assert document["idle_seconds_after_client_left"] < document["seconds_of_document"], document


def test_memory_of_a_service_does_not_grow_with_requests(starter_bundle, tmp_path):
    """Of refused, cancelled and answered requests: after a first thousand, as many more take no more memory."""
    with serving(starter_bundle, tmp_path) as service:
        body = {"question": "Who?", "context": "They were led by Rollo."}

        def ask_many():
            for index in range(300):
                service.client.post("/v1/answer", json=body | ({"nothing": 1} if index % 3 else {}))
            return service.rss_mib()

        ask_many()
        first = ask_many()
        assert ask_many() < 1.1 * first


def test_what_was_loaded_is_not_collected_again():
    thresholds = gc.get_threshold()
    try:
        command._spare_collections()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] > thresholds[0]
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
