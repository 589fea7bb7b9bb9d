"""Mutations of bytes and of JSON, drawn at random. Each says in a few words what it did."""

from __future__ import annotations

import json
from random import Random
from typing import Any

DEEP = "\x00deep\x00"
"""In a JSON value: becomes arrays nested to `DEPTH`, which `json` itself cannot write."""
DEPTH = 100_000
ODD_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
    -(2**63),
    0.5,
    1e308,
)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, 1e-310)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\x00",
    "\ud800",
    "a" * 100_000,
    "../x",
    "/etc/passwd",
    "<|endoftext|>",
    "e\u0301",
    "\u017f",
    "\u2028",
)


def mutate_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    """Changes some bytes; returns them and what was done."""
    size = len(data)
    first = random.randrange(size + 1)
    length = min(random.choice((1, 4, 64, 4096)), size - first)
    match random.randrange(8):
        case 0 | 1 if size:
            changed = bytearray(data)
            places = [random.randrange(size) for _ in range(random.choice((1, 1, 4, 100)))]
            for place in places:
                changed[place] ^= 1 << random.randrange(8)
            return bytes(changed), f"{len(places)} bits flipped, the first in byte {places[0]}"
        case 2:
            return data[:first], f"cut after byte {first} of {size}"
        case 3:
            return data[: first + length] + data[first:], f"{length} bytes doubled at {first}"
        case 4:
            return data[:first] + bytes(length) + data[first + length :], f"{length} bytes zeroed at {first}"
        case 5:
            return data[:first] + random.randbytes(length) + data[first + length :], f"{length} bytes random at {first}"
        case 6:
            return data[:first] + data[first + length :], f"{length} bytes left out at {first}"
        case _:
            added = random.choice((b"\xef\xbb\xbf", b"\x00", b"\xff\xfe", b"{", b'"', b",", b"\r", b"\n" * 1000))
            first = random.choice((0, first, size))
            return data[:first] + added + data[first:], f"{added[:4]!r} put in at {first}"


def odd_value(random: Random) -> Any:
    """A JSON value that few readers expect."""
    return random.choice(
        (
            lambda: random.choice(ODD_NUMBERS),
            lambda: random.choice(ODD_FLOATS),
            lambda: random.choice(ODD_TEXTS),
            lambda: random.choice((None, True, False, [], {}, [[]], [None], {"": None})),
            lambda: [random.choice(ODD_NUMBERS)] * random.choice((1, 3, 1000)),
            lambda: {str(index): index for index in range(1000)},
            lambda: DEEP,
        )
    )()


def mutate_json(random: Random, value: Any) -> str:
    """Changes one entry, anywhere in a JSON array or object; returns what was done."""
    path = ""
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return "nothing"
        key = random.choice(keys)
        path += f"[{str(key)[:40]!r}]" if isinstance(holder, dict) else f"[{key}]"
        # Stops at each level alike, so that what is at the top is not hidden by the many leaves below it.
        if not isinstance(holder[key], dict | list) or not holder[key] or random.random() < 0.3:
            break
        holder = holder[key]
    match random.randrange(7):
        case 0:
            del holder[key]
            return f"{path} left out"
        case 1 if isinstance(holder, dict):
            holder[random.choice((f"{key} ", str(key).upper(), *ODD_TEXTS))] = holder.pop(key)
            return f"{path} renamed"
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * random.choice((1, 2, 1000)))
            return f"{path} repeated"
        case 3:
            other = random.choice(keys)
            holder[key], holder[other] = holder[other], holder[key]
            return f"{path} exchanged with [{str(other)[:40]!r}]"
        case 4:
            holder[key] = [holder[key]] if random.random() < 0.5 else {str(key): holder[key]}
            return f"{path} wrapped"
        case 5 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] += random.choice((-1, 1, 0.5, holder[key]))
            return f"{path} is {holder[key]}"
        case _:
            holder[key] = odd_value(random)
            return f"{path} is {repr(holder[key])[:60]}"


def dump_json(random: Random, value: Any) -> bytes:
    """Writes JSON, sometimes with a key twice, in another encoding or with a byte order mark."""
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH)
    match random.randrange(40):
        case 0:
            return text.encode("utf-8-sig")
        case 1:
            return text.encode("utf-16")
        case 2 if isinstance(value, dict) and value:
            key = random.choice(list(value))
            return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value[key])}}}".encode()
    return text.encode()
