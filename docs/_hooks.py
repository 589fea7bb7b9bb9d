"""What the documentation site adds to MkDocs: texts from elsewhere in the repository, and the command line's reference.

A page whose front matter says `include: FILE` shows that file of the repository, so each text is in one place. The line
`<!-- commands -->` is replaced by a table for every command, made from the parsers that the commands themselves use.
Links to files outside of `docs/` become code, images outside of it are copied into the site.
"""

from __future__ import annotations

import argparse
import html
import importlib
import logging
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = {
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/NOTES.md": "lab-notes.md",
    "training/starter/NOTES.md": "starter.md",
    "README.md": "index.md",
}
"""Files of the repository that the site has as pages: links to them lead there."""

PROGRAMS = (
    "qa_onnx.cli",
    "training.finetune",
    "export.to_onnx",
    "bench.accuracy",
    "bench.reliability",
    "bench.long_documents",
    "bench.throughput",
    "bench.latency",
    "bench.scaling",
    "bench.training",
    "bench.look_ahead",
    "bench.roofline",
    "bench.bulk",
    "bench.serve",
    "bench.report",
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.qa_onnx")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the plots of the benchmarks, under the same path as in the repository."""
    for path in sorted(ROOT.glob("bench/results/*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Includes what the page asks for, then rewrites links that leave `docs/`."""
    source = posixpath.join("docs", page.file.src_uri)
    if "include" in page.meta:
        source = page.meta["include"]
        markdown = (ROOT / source).read_text(encoding="utf-8")
    markdown = rewrite_links(markdown, source, page.file.src_uri)
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", describe_commands())
    return markdown


def rewrite_links(markdown: str, source: str, page: str) -> str:
    """Makes links of a file of the repository fit a page of the site.

    Args:
        markdown: The text of `source`.
        source: The file's path in the repository, which its links are relative to.
        page: The path of the page, relative to `docs/`.
    """

    def rewrite(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            log.warning("%s: the link to %s leads to no file of the repository", source, link["target"])
            return link[0]
        inside = INCLUDED.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if link["image"]:
            inside = inside or path
        if inside is None:
            text = link["text"].strip("`")
            return f"`{text}`" if text == path or "/" in text else f"{link['text']} (`{path}`)"
        where = posixpath.relpath(inside, posixpath.dirname(page) or ".")
        return f"{link['image']}[{link['text']}]({where}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(rewrite, part) for number, part in enumerate(parts))


def describe_commands() -> str:
    """The reference of all commands, in Markdown."""
    sys.path.insert(0, str(ROOT))
    try:
        parsers = [importlib.import_module(name).make_parser() for name in PROGRAMS]
    finally:
        sys.path.remove(str(ROOT))
    return "\n\n".join(line for parser in parsers for line in describe_parser(parser, level=2))


def describe_parser(parser: argparse.ArgumentParser, *, level: int, about: str = "") -> Iterator[str]:
    """Yields the blocks of one command: heading, description, its options, its subcommands."""
    yield f"{'#' * level} `{parser.prog}`"
    about = escape(parser.description or about).rstrip(".")
    yield f"{about[:1].upper()}{about[1:]}."
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not subcommands:
        for group in parser._action_groups:
            rows = [describe_option(parser, action) for action in group._group_actions if action.dest != "help"]
            if rows:
                title = group.title if group.title not in ("options", "positional arguments") else ""
                yield f"**{escape(title.capitalize())}**" if title else ""
                yield "\n".join(["| option | meaning |", "| --- | --- |", *rows])
    for action in subcommands:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            yield from describe_parser(child, level=level + 1, about=helps.get(name, ""))


def describe_option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One row of a table of options."""
    formatter = parser._get_formatter()
    name = ", ".join(action.option_strings) or formatter._format_args(action, action.dest)
    if action.option_strings and action.nargs != 0:
        name += f" {formatter._format_args(action, formatter._get_default_metavar_for_optional(action))}"
    required = " (required)" if action.required and action.option_strings else ""
    meaning = formatter._expand_help(action).removesuffix(required) if action.help else ""
    return f"| `{name}`{required} | {escape(meaning)} |"


def escape(text: str) -> str:
    """Plain text as Markdown that shows it as it is; what is in backticks stays code."""
    parts: list[Any] = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(
        part if number % 2 else re.sub(r"([*_\[\]|\\])", r"\\\1", html.escape(part, quote=False))
        for number, part in enumerate(parts)
    )
