"""Lists and dicts that a text writes out, as a cell of CSV does: in JSON, in Python, or with NumPy's arrays in them."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

MAX_CHARACTERS, MAX_DEPTH = 1_000_000, 20
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
      | (?P<word>[A-Za-z_][\w.]*)
      | (?P<mark>[\[\](){}:,=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"None": None, "null": None, "nan": None, "NaN": None, "True": True, "true": True, "False": False} | {
    "false": False
}
_ARRAY = re.compile(r"array|(?:np|numpy)\.\w+")


def parse_literal(text: str) -> Any:
    """The value that a text writes out, such as `{'text': array(['211 km'], dtype=object), 'answer_start': [38]}`.

    Nothing is evaluated. Arrays and tuples are lists. In a list commas may be missing, as NumPy prints arrays.

    Raises:
        ValueError: The text writes out no value; the message says what is wrong.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        parser = _Parser(text)
        value = parser.value(0)
        parser.end()
        return value


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            found = _TOKEN.match(text, place)
            if found is None:
                raise ValueError(f"character {place} of it begins no value")
            self.tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            place = found.end()
        self.next = 0

    def end(self) -> None:
        if self.next < len(self.tokens):
            raise ValueError("more than one value")

    def take(self) -> tuple[str, str]:
        if self.next == len(self.tokens):
            raise ValueError("it is cut short")
        self.next += 1
        return self.tokens[self.next - 1]

    def skip(self, mark: str) -> bool:
        is_there = self.tokens[self.next : self.next + 1] == [("mark", mark)]
        self.next += is_there
        return is_there

    def expect(self, mark: str) -> None:
        if not self.skip(mark):
            raise ValueError(f"{mark} is missing in it")

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        kind, token = self.take()
        if kind == "string":
            return _unquoted(token)
        if kind == "number":
            return float(token) if re.search(r"[.eE]", token) else int(token)
        if token in ("[", "("):
            return self.items("]" if token == "[" else ")", depth)
        if token == "{":
            return self.pairs(depth)
        if kind == "word" and token in _WORDS:
            return _WORDS[token]
        if kind == "word" and _ARRAY.fullmatch(token):
            self.expect("(")
            value = self.value(depth + 1)
            while self.skip(","):  # dtype=object
                self.take()
                self.expect("=")
                self.take()
            self.expect(")")
            return value
        raise ValueError(f"{token} in it is no value")

    def items(self, end: str, depth: int) -> list[Any]:
        values = []
        has_comma = False
        while not self.skip(end):
            values.append(self.value(depth + 1))
            has_comma |= self.skip(",")
        if end == ")" and values and not has_comma:
            raise ValueError("parentheses in it hold no tuple")
        return values

    def pairs(self, depth: int) -> dict[Any, Any]:
        values = {}
        while not self.skip("}"):
            kind, token = self.tokens[self.next] if self.next < len(self.tokens) else ("", "")
            key = self.value(depth + 1)
            if kind != "string":
                raise ValueError(f"{token} in it is no name")
            self.expect(":")
            values[key] = self.value(depth + 1)
            self.skip(",")
        return values


def _unquoted(token: str) -> str:
    if "\\" not in token:
        return token[1:-1]
    try:
        with warnings.catch_warnings(action="ignore"):  # such as of `\d`, which stays as it is
            return str(ast.literal_eval(token.replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0")))
    except SyntaxError as error:
        raise ValueError("a text in it has a backslash that begins no character") from error
