"""The model hub: whether it replies at all, asked once before its clients, which try for minutes."""

from __future__ import annotations

from queue import Empty, SimpleQueue
from threading import Thread

from qa_onnx.errors import one_line

REPLY_SECONDS = 10.0
"""Time that the hub has for its reply, name resolution and connection included."""


def problem_of_hub() -> str | None:
    """Why the hub cannot be reached, on one line; None where it replies.

    Its clients retry a request with pauses, and take one address after the other. One request in a thread of its own
    ends in time, whatever hangs: a name server, a proxy or the hub. Any reply is one, except an error of the server.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    problems: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=REPLY_SECONDS).status_code
        except Exception as error:  # noqa: BLE001 (of requests or httpx, as the version of huggingface_hub uses)
            problems.put(_innermost(error))
        else:
            problems.put(f"it replies with status {status}" if status >= 500 else None)

    Thread(target=ask, daemon=True).start()
    try:
        problem = problems.get(timeout=REPLY_SECONDS)
    except Empty:
        problem = f"no reply within {REPLY_SECONDS:g} seconds"
    return None if problem is None else f"{constants.ENDPOINT} cannot be reached: {problem}"


def _innermost(error: BaseException) -> str:
    """What went wrong first, such as `Connection refused`: the errors above it repeat it with an address each."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return one_line(error)
