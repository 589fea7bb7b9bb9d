"""Reading SQuAD v1.1 and v2.0 files, and predictions, with errors that name the file and the place in it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qa_onnx.errors import InvalidInputError
from qa_onnx.files import read_text


@dataclass(frozen=True, kw_only=True)
class GoldAnswer:
    """A gold answer and the character of the passage at which it starts."""

    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its passage. `answers` is empty where the passage does not answer it (SQuAD v2.0)."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[GoldAnswer, ...]


def read_squad(path: str | Path) -> list[Example]:
    """Reads a SQuAD v1.1 or v2.0 JSON file.

    Raises:
        InvalidInputError: The file cannot be read, is not JSON, or is not in SQuAD's format; the message names the
            file and the path inside it, such as `data[0].paragraphs[3].qas[1].question`.
    """
    return parse_squad(read_json(path), source=str(path))


def parse_squad(data: Any, *, source: str, skipped: list[str] | None = None) -> list[Example]:
    """Reads SQuAD data that is already in memory.

    Args:
        data: As of `json.load`.
        source: Its name in errors.
        skipped: Takes what is wrong with each paragraph or question that is not in SQuAD's format, which is left out
            then. Without it the first one is an error.
    """
    reader = _Reader(source)
    examples = []
    seen: dict[str, str] = {}
    for article_path, article in reader.items(data, "", "data"):
        title = article.get("title", "")
        if not isinstance(title, str):
            reader.fail(f"{article_path}.title", f"a JSON {_kind(title)}", "a string")
        for paragraph_path, paragraph in reader.items(article, article_path, "paragraphs"):
            try:
                context = reader.text(paragraph, paragraph_path, "context")
                qas = reader.items(paragraph, paragraph_path, "qas")
            except InvalidInputError as error:
                _skip(error, skipped)
                continue
            for qa_path, qa in qas:
                try:
                    example = reader.example(qa, qa_path, title=title, context=context)
                    if example.id in seen:
                        other = seen[example.id]
                        reader.fail(f"{qa_path}.id", f"{example.id!r}", f"an id of its own ({other} has it too)")
                except InvalidInputError as error:
                    _skip(error, skipped)
                    continue
                seen[example.id] = qa_path
                examples.append(example)
    if not examples and not skipped:
        reader.fail("data", "no questions", "at least one")
    return examples


def read_predictions(path: str | Path) -> dict[str, str]:
    """Reads a predictions file: one JSON object of question id to answer text.

    Raises:
        InvalidInputError: The file cannot be read or is not such an object.
    """
    predictions = read_json(path)
    if not isinstance(predictions, dict):
        raise InvalidInputError(f"{path}: got a JSON {_kind(predictions)}; expected an object of question id to answer")
    for key, value in predictions.items():
        if not isinstance(value, str):
            raise InvalidInputError(f"{path}: the answer of {key!r} is a JSON {_kind(value)}; expected a string")
    return predictions


def read_answers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads what `predict --answers` writes: a JSON object a line, `id`, `text` and the rest of `Answer` in each.

    Raises:
        InvalidInputError: The file cannot be read, or a line is not such an object; the message names the line.
    """
    answers = {}
    for number, line in enumerate(io.StringIO(read_text(path, expected="a JSON lines file")), 1):  # only \n ends a line
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"{path}: line {number} is not valid JSON ({error}); is the file whole?") from error
        if not isinstance(answer, dict):
            raise InvalidInputError(f"{path}: line {number} is a JSON {_kind(answer)}; expected an object")
        kinds = {"id": str, "text": str, "score": float, "no_answer_probability": float, "windows": int}
        for name, kind in kinds.items():
            if type(answer.get(name)) is not kind:
                raise InvalidInputError(
                    f"{path}: line {number}: {name} is {answer.get(name)!r}; expected the answers that "
                    "`python -m qa_onnx predict --answers FILE` writes"
                )
        answers[answer["id"]] = answer
    return answers


def _skip(error: InvalidInputError, skipped: list[str] | None) -> None:
    if skipped is None:
        raise error
    skipped.append(str(error))


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        InvalidInputError: The file cannot be read or is not JSON; the message names the line.
    """
    text = read_text(path, expected="a JSON file")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InvalidInputError(f"{path}: not valid JSON that can be read (nested too deep)") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); is the file whole?"
        ) from error
    except ValueError as error:  # such as a number of thousands of digits
        raise InvalidInputError(f"{path}: not valid JSON that can be read ({error})") from error


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


class _Reader:
    """Takes fields out of nested JSON and says where a wrong one stands."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, path: str, given: str, expected: str) -> NoReturn:
        raise InvalidInputError(
            f"{self.source}: {path or 'the top level'}: got {given}; expected {expected} (SQuAD v1.1 or v2.0 format)"
        )

    def items(self, parent: Any, parent_path: str, key: str) -> list[tuple[str, dict[str, Any]]]:
        """Lists the objects of the array `parent[key]`, each with its path."""
        if not isinstance(parent, dict):
            self.fail(parent_path, f"a JSON {_kind(parent)}", f"an object with {key!r}")
        path = f"{parent_path}.{key}".lstrip(".")
        values = parent.get(key)
        if not isinstance(values, list):
            self.fail(path, f"a JSON {_kind(values)}" if key in parent else "nothing", "an array")
        items = []
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                self.fail(f"{path}[{index}]", f"a JSON {_kind(value)}", "an object")
            items.append((f"{path}[{index}]", value))
        return items

    def text(self, parent: dict[str, Any], path: str, key: str) -> str:
        value = parent.get(key)
        if not isinstance(value, str):
            self.fail(f"{path}.{key}", f"a JSON {_kind(value)}" if key in parent else "nothing", "a string")
        if not value.strip():
            self.fail(f"{path}.{key}", "an empty string", "some text")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            self.fail(f"{path}.{key}", "a lone surrogate", "text that can be written as UTF-8")
        return value

    def example(self, qa: dict[str, Any], path: str, *, title: str, context: str) -> Example:
        answers = []
        impossible = qa.get("is_impossible", False)
        if not isinstance(impossible, bool):
            self.fail(f"{path}.is_impossible", f"a JSON {_kind(impossible)}", "true or false")
        if not impossible:
            for answer_path, answer in self.items(qa, path, "answers"):
                start = answer.get("answer_start")
                if isinstance(start, bool) or not isinstance(start, int):
                    given = f"a JSON {_kind(start)}" if "answer_start" in answer else "nothing"
                    self.fail(f"{answer_path}.answer_start", given, "a whole number")
                answers.append(GoldAnswer(text=self.text(answer, answer_path, "text"), start=start))
        return Example(
            id=self.text(qa, path, "id"),
            title=title,
            context=context,
            question=self.text(qa, path, "question"),
            answers=tuple(answers),
        )
