"""Serves a bundle with Ray Serve: replicas of the model on a cluster, as many as the requests need.

    python examples/ray_serve.py BUNDLE [--replicas 2] [--address auto]
    curl -d '{"question": "Who led the Normans?", "context": "The Normans were led by Rollo."}' localhost:8000/answer

Each replica is one `Answerer`, which computes the requests that it has at a time in one batch: Ray Serve's own
batching, which would wait for a batch to end before the next begins, is not used.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import JSONResponse

from qa_onnx import Answerer, EngineConfig, InvalidInputError, QueueFullError


@serve.deployment(max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})
class Answers:
    """A replica: a model in a process of its own, on one CPU."""

    def __init__(self, bundle: str) -> None:
        """Loads the bundle; the replica gets no requests before."""
        self._answerer = Answerer.from_pretrained(bundle, config=EngineConfig(threads=1))

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers one question. A request that is cancelled frees its place in the batch."""
        try:
            body = await request.json()
            answer = await self._answerer.answer_async(body["question"], body["context"])
        except (ValueError, KeyError, TypeError) as error:  # InvalidInputError is a ValueError
            detail = str(error) if isinstance(error, InvalidInputError) else "expected JSON with question and context"
            return JSONResponse({"error": detail}, status_code=422)
        except QueueFullError as error:
            return JSONResponse({"error": str(error)}, status_code=429)
        return JSONResponse(answer.to_dict())

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica where this raises."""
        self._answerer.stats()


def main(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C.

    Raises:
        SystemExit: The replicas would take all CPUs of the cluster.
    """
    ray.init(address=arguments.address, log_to_driver=False)
    processors = int(ray.cluster_resources().get("CPU", 0))
    if arguments.replicas > processors:  # Ray would wait for CPUs that do not come
        sys.exit(f"got --replicas {arguments.replicas} on {processors} CPUs; expected at most one for each")
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=arguments.port))
    scaling = {
        "min_replicas": 1,
        "max_replicas": arguments.replicas,
        "target_ongoing_requests": 16,
        "upscale_delay_s": 2,
        "downscale_delay_s": 60,
    }
    answers = Answers.options(autoscaling_config=scaling).bind(str(arguments.bundle.absolute()))
    # The proxy listens before, and says 404 until the application is deployed, which is when this returns.
    serve.run(answers, route_prefix="/answer")
    print(f"ready: http://127.0.0.1:{arguments.port}/answer", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=1, help="at most; default: 1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a cluster, such as auto; default: one of its own on this machine")
    main(parser.parse_args())
