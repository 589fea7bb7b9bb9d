"""`python -m qa_onnx serve`: its options, and what it does."""

from __future__ import annotations

import argparse
import gc
import re
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from qa_onnx.answerer import Answerer
from qa_onnx.config import EngineConfig
from qa_onnx.errors import InvalidInputError, short_repr
from qa_onnx.serve.config import API_KEY_VARIABLE, Limits, ServeConfig, read_api_keys

_NAME = re.compile(r"[\w.-]+", re.ASCII)
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
LIMITS_HELP = {
    "body_bytes": "bytes of a request's body",
    "question_characters": "characters of a question",
    "context_characters": "characters of a context",
    "items": "questions of a request",
    "windows": "windows that the contexts of a request are read in, as estimated from their length",
    "queue_questions": "questions that wait or are answered; more get 429",
    "queue_characters": "characters of their contexts and questions",
    "timeout_seconds": "seconds that a request waits for its answers",
    "body_seconds": "seconds that a body may take to arrive",
    "drain_seconds": "seconds that answers under way get after SIGTERM",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `serve` takes besides the options of the model."""
    defaults = ServeConfig()
    parser.add_argument("--host", default=defaults.host, metavar="ADDRESS", help="default: %(default)s, loopback only")
    parser.add_argument("--port", type=int, default=defaults.port, metavar="N", help="default: %(default)s; 0: any")
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the bundle's directory")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"a key in each line; or one in {API_KEY_VARIABLE}"
    )
    parser.add_argument(
        "--allow-anonymous", action="store_true", help="listen on a host that others can reach without a key"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name in the Host header that is served; again for more. Default: this machine's on loopback, else any",
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="whose pages may call; default: none"
    )
    parser.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a JSON line for each request on standard output; default: on",
    )
    group = parser.add_argument_group("limits")
    for field in fields(Limits):
        option = f"--{field.name.replace('_', '-')}"
        kind = int if isinstance(field.default, int) else float
        text = f"{LIMITS_HELP[field.name]}; default: %(default)s"
        group.add_argument(option, type=kind, default=field.default, metavar="N", help=text)


def _spare_collections() -> None:
    """Has Python's garbage collector look less often, and not at what was loaded: it stops all requests meanwhile.

    At four times the load that it can serve, p99 of a refusal was 129 ms without this, and 51 and 94 ms with it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def run(arguments: argparse.Namespace, *, engine: EngineConfig) -> None:
    """Serves a bundle until SIGTERM or Ctrl-C.

    Args:
        arguments: With the options of `add_options`, `model` and `provider`.
        engine: How the model computes; its queue becomes as long as the service's.

    Raises:
        InvalidInputError: An option is out of range, the port is in use, or the extra `serve` is not installed.
        BundleError, ProviderError: As from `Answerer.from_pretrained`.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InvalidInputError(f"serve needs {', '.join(missing)}; in the checkout: pip install '.[serve]'")
    from qa_onnx.serve.app import make_app
    from qa_onnx.serve.server import bind, serve, url_of
    from qa_onnx.serve.service import Service

    name = arguments.name or arguments.model.resolve().name or "model"
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"got the name {short_repr(name)}; expected letters, digits, points, hyphens and underscores, as in a URL. "
            "Choose one with --name"
        )
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    config = ServeConfig(
        host=arguments.host,
        port=arguments.port,
        api_keys=read_api_keys(arguments.api_key_file),
        allow_anonymous=arguments.allow_anonymous,
        allowed_hosts=tuple(arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
        access_log=arguments.access_log,
    )
    engine = replace(engine, max_queue=2 * limits.queue_questions)  # cancelled requests leave a step later
    with (
        bind(config) as listening,
        Answerer.from_pretrained(arguments.model, provider=arguments.provider, config=engine) as answerer,
    ):
        service = Service(answerer, name=name, limits=limits)
        url = url_of(config, listening)
        app = make_app(service, config)
        _spare_collections()
        serve(
            app,
            service,
            listening,
            lambda: sys.stderr.write(f"serving {service.name} at {url}, its API at {url}/docs; Ctrl-C ends it\n"),
        )
