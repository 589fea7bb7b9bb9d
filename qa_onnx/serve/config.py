"""Where the service listens, who may ask it, and how much."""

from __future__ import annotations

import ipaddress
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from qa_onnx.config import MAX_WHOLE_NUMBER
from qa_onnx.errors import InvalidInputError, short_repr

API_KEY_VARIABLE = "QA_ONNX_API_KEY"
MIN_KEY_CHARACTERS = 16
MAX_PORT = 65_535
MAX_SECONDS = 86_400.0
MAX_ITEMS = 16_384
"""Of any service: more of them in a body are not parsed, which takes the event loop as long as it takes."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may ask for. `GET /v1/model` tells those of one request.

    Attributes:
        body_bytes: Maximum size of a request's body.
        question_characters: Maximum length of a question, in Unicode code points.
        context_characters: Maximum length of a context, in Unicode code points.
        items: Maximum number of questions of one request.
        windows: Maximum number of windows that the contexts of one request are read in, as they are estimated before
            anything is tokenized (`Answerer.estimate_windows`).
        queue_questions: Maximum number of questions that wait or are answered.
        queue_characters: Maximum number of characters of their contexts and questions; a context that several questions
            share counts for each of them, as each of them reads it.
        timeout_seconds: Maximum time that a request waits for its answers.
        body_seconds: Maximum time that a request's body may take to arrive.
        drain_seconds: Maximum time that answers under way get to end after SIGTERM.

    Raises:
        InvalidInputError: A value is out of range, or a limit of one request is above that of all.
    """

    body_bytes: int = 4 * 2**20
    question_characters: int = 2_000
    context_characters: int = 1_000_000
    items: int = 256
    windows: int = 10_000
    queue_questions: int = 1_024
    queue_characters: int = 16_000_000
    timeout_seconds: float = 60.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "body_bytes",
            "question_characters",
            "context_characters",
            "items",
            "windows",
            "queue_questions",
            "queue_characters",
        ):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < MAX_WHOLE_NUMBER:
                raise InvalidInputError(f"got {name} {short_repr(value)}; expected a whole number of at least 1")
        for name in ("timeout_seconds", "body_seconds", "drain_seconds"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and 0 < value <= MAX_SECONDS):
                raise InvalidInputError(f"got {name} {short_repr(value)}; expected seconds above 0, at most a day")
        if self.items > MAX_ITEMS:
            raise InvalidInputError(f"got items {self.items}; expected at most {MAX_ITEMS}")
        if self.items > self.queue_questions:
            raise InvalidInputError(
                f"got items {self.items} and queue_questions {self.queue_questions}; expected a queue that holds at "
                "least one request of so many items. Raise queue_questions, or lower items"
            )
        if self.context_characters + self.question_characters > self.queue_characters:
            raise InvalidInputError(
                f"got context_characters {self.context_characters} and queue_characters {self.queue_characters}; "
                "expected a queue that holds at least one context and its question. Raise queue_characters, or lower "
                "context_characters"
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the service listens.

    Attributes:
        host: Address or name to listen on.
        port: TCP port; 0 takes a free one.
        api_keys: Keys of which a request has to carry one; none asks for no key.
        allow_anonymous: Allow another host than this one without a key.
        allowed_hosts: Names in the `Host` header that are answered, in addition to those of this machine on loopback;
            elsewhere none allows every name.
        cors_origins: Origins whose pages may call the service.
        access_log: Write a line of JSON for each request to standard output.

    Raises:
        InvalidInputError: A value is out of range, or the host can be reached by others and nothing protects it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    access_log: bool = True

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port <= MAX_PORT:
            raise InvalidInputError(f"got port {short_repr(self.port)}; expected a whole number from 0 to {MAX_PORT}")
        for key in self.api_keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise InvalidInputError(
                    f"got an API key of {len(key)} characters; expected at least {MIN_KEY_CHARACTERS} printable ASCII "
                    "characters without a space, such as `openssl rand -hex 32` makes"
                )
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise InvalidInputError(
                    f"got the origin {short_repr(origin)}; expected one such as https://app.example.com"
                )
        if not (self.is_loopback or self.api_keys or self.allow_anonymous):
            raise InvalidInputError(
                f"got the host {self.host}, which other machines can reach, and no API key; expected a key, in "
                f"--api-key-file FILE or the environment variable {API_KEY_VARIABLE}, or --allow-anonymous for a "
                "network that is protected otherwise"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file, one a line, and that of the environment variable `QA_ONNX_API_KEY`.

    Args:
        path: The file; blank lines and lines that begin with # are skipped. None reads the environment only.

    Raises:
        InvalidInputError: The file cannot be read, has no key, or every user of the machine can read or change it.
    """
    given = os.environ.get(API_KEY_VARIABLE, "").strip()
    keys = [given] if given else []
    if path is None:
        return tuple(keys)
    try:
        with path.open(encoding="ascii") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & stat.S_IRWXO:
                raise InvalidInputError(
                    f"--api-key-file {path}: every user of this machine can read or change it (mode {mode:04o}); "
                    f"expected a file of your own. chmod 600 {path}"
                )
            lines = [line.strip() for line in file]
    except OSError as error:
        raise InvalidInputError(
            f"--api-key-file {path}: cannot be read ({error.strerror}); expected a text file with a key in each line"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"--api-key-file {path}: is not ASCII; expected a key in each line") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InvalidInputError(f"--api-key-file {path}: has no key; expected one in each line")
    return tuple(dict.fromkeys([*keys, *found]))
