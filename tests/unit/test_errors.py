"""The errors of the package: one family, and one line from the commands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qa_onnx import cli, errors
from qa_onnx.errors import InvalidInputError, OutOfMemoryError, PromptTooLongError, QAOnnxError

ROOT = Path(__file__).parents[2]
FAMILY = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
INSIDE = {
    "ValueError": {
        *("graph_file.py", "json_text.py", "literal.py", "manifest.py", "rows.py", "table_files.py", "text_files.py")
    },
    "OSError": {"files.py"},
    "StopIteration": {"stream.py"},
    "ArgumentTypeError": {"options.py"},
    "ConnectionError": {"tables.py"},
    "SystemExit": {"__init__.py", "packages.py"},
    "Problem": {
        *("admission.py", "huggingface.py", "middleware.py", "routes.py", "security.py"),
        *("service.py", "upload.py", "v2.py"),
    },
    "ClientLeftError": {"middleware.py"},
}
"""Other classes and the modules that raise them: their callers or argparse catch them; the iterator's end is none. The
service's become responses in its middleware. `export` and training end where their packages are missing."""


def raised_in(path):
    """The names of the classes whose instances a module makes and raises."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
            if name[:1].isupper():
                yield name


def test_every_error_that_is_raised_on_purpose_is_of_the_family():
    raised = {
        (name, path.name)
        for package in ("qa_onnx", "training", "export")
        for path in (ROOT / package).rglob("*.py")
        for name in raised_in(path)
    }
    others = {(name, module) for name, module in raised if name not in {*FAMILY, "TrainingError"}}
    assert others == {(name, module) for name, modules in INSIDE.items() for module in modules}
    assert {name for name, _ in raised} >= FAMILY.keys() - {"QAOnnxError"}


def test_the_family_has_one_base_and_bad_input_is_a_value_error():
    assert all(issubclass(kind, QAOnnxError) for kind in FAMILY.values())
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(PromptTooLongError, InvalidInputError)
    assert not issubclass(OutOfMemoryError, InvalidInputError)


@pytest.mark.parametrize("kind", FAMILY.values())
def test_a_command_prints_an_error_as_one_line_and_exits_with_2(capsys, kind):
    def fail():
        error = kind("of\ntwo lines")
        error.add_note("What was computed before is in out.partial")
        raise error

    assert cli.run_command(fail) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: of two lines. What was computed before is in out.partial\n"
    assert printed.out == ""
