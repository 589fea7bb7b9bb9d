"""The columns of flat rows: which one holds which field, and what to type where no column has a known name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache

from qa_onnx.data.json_text import shown
from qa_onnx.errors import InvalidInputError

NAMES: dict[str, tuple[str, ...]] = {
    "context": ("context", "passage", "text"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "reply"),
    "answer_start": ("answer_start",),
    "is_impossible": ("is_impossible",),
    "id": ("id",),
    "title": ("title",),
}
"""What the fields of a row may be called (see `column_key`). The first name, the field's own, wins over the others."""
FIELDS = tuple(NAMES)
REQUIRED = ("context", "question")
GOLD_FIELDS = ("answers", "answer_start", "is_impossible")
"""Fields that questions alone do not need."""
MAX_COLUMNS_SHOWN = 20
WORDS = {
    "question": "question query ask asked prompt q frage pregunta pergunta domanda vraag",
    "answers": "answer answers reply response solution gold label target span a ans antwort respuesta resposta "
    "risposta reponse réponse antwoord",
    "context": "context passage paragraph document doc article source ctx kontext absatz contexto contexte contesto "
    "text body content texto texte testo",
}
"""Words of column names that are probably a field's, for the hint in an error."""
WEAK_WORDS = frozenset("text body content source texto texte testo a q".split())
"""These say less of the field than another word in the same name, such as in `answer_text`."""
OTHER_WORDS = frozenset("id ids idx index start end offset score type kind length count num number url".split())
"""A column with such a word holds no text."""
MIN_LIKENESS = 0.8


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """What fields are called, from texts of the form `FIELD=NAME`.

    Raises:
        InvalidInputError: A text of another form, or a field that is none of `FIELDS`.
    """
    names = {}
    for column in columns:
        name, _, value = column.partition("=")
        if name not in FIELDS or not value:
            raise InvalidInputError(f"got column {column!r}; expected FIELD=NAME, with a field of {', '.join(FIELDS)}")
        names[name] = value
    return names


@lru_cache(maxsize=1024)
def column_key(name: str) -> str:
    """A column's name as it is compared: in lower case, without spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", name).lower()


def find_columns(
    header: Collection[str],
    *,
    columns: Mapping[str, str] | None = None,
    required: Iterable[str] = (),
    fields: Iterable[str] = FIELDS,
) -> dict[str, str]:
    """Finds the column of each field by `NAMES`, in any case and with any of space, hyphen and underscore.

    Args:
        header: The names of the columns.
        columns: What fields are called, where not by one of `NAMES`; None where they cannot have other names.
        required: Fields that must have a column.
        fields: Fields to look for.

    Returns:
        The column of each field; a field without a column is left out.

    Raises:
        InvalidInputError: A required field has no column, or several columns fit one field. The message says which
            `--columns` to give.
    """
    given = columns or {}
    found: dict[str, str] = {}
    by_key: dict[str, list[str]] = {}
    for name in header:
        if name not in given.values():
            by_key.setdefault(column_key(name), []).append(name)
    for field in fields:
        if field in given:
            found[field] = given[field]
            continue
        own, *others = (by_key.get(column_key(name), []) for name in NAMES[field])
        fitting = [field] if field in own else own or [name for names in others for name in names]
        if len(fitting) > 1:
            named = " and ".join(shown(name) for name in fitting)
            typed = " or ".join(f"--columns {_option(field, name)}" for name in fitting)
            advice = "" if columns is None else f". Pass {typed}"
            raise InvalidInputError(
                f"columns {named} {'both' if len(fitting) == 2 else 'all'} fit {field}; expected one of them{advice}"
            )
        if fitting:
            found[field] = fitting[0]
    for field in required:
        if found.get(field) not in header:
            raise InvalidInputError(missing_column(field, header, columns=columns, found=found, required=required))
    return found


def missing_column(
    field: str,
    header: Collection[str],
    *,
    columns: Mapping[str, str] | None,
    found: Mapping[str, str],
    required: Iterable[str],
) -> str:
    """What to say where a field has no column: the columns there are, and the `--columns` to give.

    Args:
        field: The field.
        header: The names of the columns.
        columns: As of `find_columns`.
        found: The columns of the other fields, from `find_columns`.
        required: All fields that must have a column.
    """
    has = ", ".join([shown(name) for name in header][:MAX_COLUMNS_SHOWN]) or "none"
    given = columns or {}
    missing = [name for name in dict.fromkeys((*given, field, *required)) if found.get(name) not in header]
    taken = {found[name] for name in found if name not in missing}
    guessed = _guesses([name for name in header if name not in taken], missing, given)
    problem = f"no column {shown(given.get(field, field))} among {has}; expected it"
    if columns is None:
        return f"{problem} ({shown(guessed[field])} may be meant)" if field in guessed else problem
    typed = {name: column for name, column in given.items() if name not in missing}
    typed |= {name: guessed.get(name, "NAME") for name in missing}
    return f"{problem}, or its name. Pass --columns {' '.join(_option(*pair) for pair in typed.items())}"


def _guesses(names: Collection[str], fields: Collection[str], columns: Mapping[str, str]) -> dict[str, str]:
    """A column for each field, where its name resembles the field's or what the field was said to be called."""
    likely = []
    for field in fields:
        near = get_close_matches(columns[field].lower(), [name.lower() for name in names]) if field in columns else ()
        for name in names:
            likeness = 2.0 if name.lower() in near[:1] else _likeness(name, field)
            likely.append((likeness, field, name))
    guessed: dict[str, str] = {}
    for likeness, field, name in sorted(likely, key=lambda guess: -guess[0]):
        if likeness >= MIN_LIKENESS and field not in guessed and name not in guessed.values():
            guessed[field] = name
    return guessed


def _likeness(name: str, field: str) -> float:
    """From 0 to 1 how much a column's name resembles a field's; the last of its words counts more than the others."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    expected = WORDS.get(field, "").split()
    if not words or not OTHER_WORDS.isdisjoint(words):
        return 0.0
    if words[-1] in expected and (len(words) == 1 or words[-1] not in WEAK_WORDS):
        return 1.0
    if not set(expected).isdisjoint(words):
        return 0.9 if not set(expected).isdisjoint({*words} - WEAK_WORDS) else MIN_LIKENESS
    return max((SequenceMatcher(None, column_key(name), word).ratio() for word in expected if len(word) > 3), default=0)


def _option(field: str, name: str) -> str:
    """`FIELD=NAME` as it is typed into a shell."""
    if re.fullmatch(r"[\w.]+", name):
        return f"{field}={name}"
    return f'{field}="{name}"' if not re.search(r'["$`\\!]', name) else f"{field}={shlex.quote(name)}"
