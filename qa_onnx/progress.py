"""A progress line on standard error for long work: silent where that is not a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 30
_SECONDS_BETWEEN_DRAWS = 0.1


class Progress:
    """Counts finished items and draws `label [=====     ] 120/400 35.1/s`; used as a context manager."""

    def __init__(self, total: int, label: str, *, enabled: bool) -> None:
        """Draws nothing unless `enabled` and standard error is a terminal."""
        self._total = total
        self._label = label
        self._enabled = enabled and total > 0 and sys.stderr.isatty()
        self._done = 0
        self._started = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._enabled:
            self._draw()
            sys.stderr.write("\n")

    def advance(self, items: int) -> None:
        """Counts `items` more as finished."""
        self._done += items
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWS:
            self._draw()

    def _draw(self) -> None:
        if not self._enabled:
            return
        self._drawn = time.monotonic()
        filled = _WIDTH * self._done // self._total
        rate = self._done / max(self._drawn - self._started, 1e-9)
        bar = "=" * filled + " " * (_WIDTH - filled)
        sys.stderr.write(f"\r{self._label} [{bar}] {self._done}/{self._total} {rate:.1f}/s ")
        sys.stderr.flush()
