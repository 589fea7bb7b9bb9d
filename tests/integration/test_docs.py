"""The documentation site: it builds strictly, loads nothing from elsewhere, and has all pages, commands and names."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser

import pytest
import yaml

import qa_onnx
from qa_onnx import cli
from tests.conftest import ROOT

pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install '.[docs]'")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
CHROMIUM = shutil.which("chromium")
LOADS = {"src", "srcset", "href", "data", "poster", "action", "formaction"}
"""Attributes that name what a browser loads; `href` of an `a` is a link that only a reader follows."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it."""
    directory = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


class _Loaded(HTMLParser):
    def __init__(self):
        super().__init__()
        self.urls, self.classes = [], set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in LOADS and tag != "a":
                self.urls.append(value or "")
            if name == "class":
                self.classes.update((value or "").split())


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def pages_in(nav):
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from pages_in(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    docs = ROOT / "docs"
    assert sorted(pages_in(nav)) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def test_no_page_or_style_names_anything_to_load_from_elsewhere(site):
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 20
    assert styles
    elsewhere, classes = [], set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = _Loaded()
        loaded.feed(text)
        inline = re.findall(r"<style.*?</style>", text, flags=re.DOTALL)
        urls = loaded.urls + [url for style in inline for url in urls_of_css(style)]
        elsewhere += [f"{page.name}: {url}" for url in urls if re.match(r"\s*(https?:)?//", url)]
        classes |= loaded.classes
    for style in styles:
        urls = urls_of_css(style.read_text(encoding="utf-8"))
        elsewhere += [f"{style.name}: {url}" for url in urls if re.match(r"(https?:)?//", url)]
    assert elsewhere == []
    assert "mermaid" not in classes  # the theme's script would load Mermaid from a CDN


def urls_of_css(text):
    return re.findall(r"url\(\s*['\"]?([^)'\"]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; make browser (Debian, as root)")
def test_in_a_browser_pages_and_search_make_no_request_to_elsewhere(site):
    sync_api = pytest.importorskip("playwright.sync_api")
    handler = functools.partial(_Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    bad = []
    try:
        with sync_api.sync_playwright() as running:
            browser = running.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.on("request", lambda request: bad.append(request.url) if address not in request.url else None)
            page.on("response", lambda response: bad.append(response.url) if response.status >= 400 else None)
            page.on("pageerror", lambda error: bad.append(str(error)))
            for found in sorted(site.rglob("*.html")):
                if found.name == "404.html":
                    continue
                path = found.relative_to(site).as_posix()
                page.goto(f"{address}/{path}")
                width = page.evaluate("document.documentElement.scrollWidth")
                assert width <= 390, f"{path} is {width} pixels wide on a phone"
            page.set_viewport_size({"width": 1300, "height": 900})
            page.goto(f"{address}/index.html")
            page.locator("input.md-search__input").click()
            page.locator("input.md-search__input").press_sequentially("calibrate")
            page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert bad == []


def test_the_reference_has_every_public_name_and_every_option(site):
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    names = [name for name in qa_onnx.__all__ if name != "__version__"]
    modules = {name: getattr(qa_onnx, name).__module__ for name in names}
    documented = {
        name
        for name in names
        if {f'id="qa_onnx.{name}"', f'id="{modules[name]}.{name}"'} & set(re.findall(r'id="[\w.]+"', reference))
    }
    assert documented == set(names)
    commands = cli.make_parser()._subparsers._group_actions[0].choices
    options = {
        option for command in commands.values() for action in command._actions for option in action.option_strings
    }
    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert {option for option in options - {"-h", "--help"} if f"{option}" not in text} == set()
    assert all(f"qa_onnx {name}" in text or f"qa-onnx {name}" in text for name in commands)
