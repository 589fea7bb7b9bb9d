"""Who may ask: the names of this host, and API keys."""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from html.parser import HTMLParser
from urllib.parse import urlsplit

from qa_onnx.serve.config import ServeConfig
from qa_onnx.serve.problems import Problem

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"})
"""What needs no key: it has no text in it, and browsers, probes and Prometheus send none."""
PROBE_PATHS = frozenset({"/healthz", "/readyz"})
"""What is answered under any name: orchestrators ask the bare address."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Gatekeeper:
    """Checks the `Host` header and the API key of requests."""

    def __init__(self, config: ServeConfig) -> None:
        """Keeps digests of the keys only."""
        self._hosts = {host.lower() for host in config.allowed_hosts}
        if config.is_loopback:
            self._hosts |= LOOPBACK_NAMES | {config.host.lower()}
        self._digests = [_digest(key) for key in config.api_keys]

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Lets a request through.

        Args:
            path: Of the request.
            headers: By names in lower case.

        Raises:
            Problem: `forbidden_host` or `unauthorized`.
        """
        if self._hosts and path not in PROBE_PATHS and _host_name(headers.get("host", "")) not in self._hosts:
            raise Problem(
                "forbidden_host",
                "The Host header names no host that is served here. Ask by one of the names of this service, or start "
                "it with --allowed-host NAME.",
            )
        if self._digests and path not in OPEN_PATHS and not self._has_key(headers):
            raise Problem(
                "unauthorized",
                "Expected an API key of this service in the header `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        """Compares in constant time: digests of one length, and every key."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = _digest(bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        return sum([hmac.compare_digest(given, digest) for digest in self._digests]) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@lru_cache(maxsize=256)
def _host_name(host: str) -> str:
    """The name in a `Host` header, without its port, in lower case; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if "@" not in host and "/" not in host else ""
    except ValueError:
        return ""


def content_security_policy(page: str) -> str:
    """The policy of a self-contained page: its own inline scripts and styles, by hash, and calls of this service.

    Args:
        page: HTML. Scripts and styles are elements in it; attributes such as `style` and `onclick` do not run.
    """
    parser = _InlineParser()
    parser.feed(page)
    parser.close()
    scripts, styles = (
        " ".join(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts) or "'none'"
        for texts in (parser.texts["script"], parser.texts["style"])
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _InlineParser(HTMLParser):
    """Collects what is in script and style elements, as it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.texts:
            self._inside = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside][-1] += data
