"""A Chromium, and what tests do with the page in it. Fixtures are taken by `conftest.py`."""

from __future__ import annotations

import shutil

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; make browser (Debian, as root)")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
EMOJI = "👩‍🚀 launched 🚀 from 𝕂ourou 🇫🇷. "  # noqa: RUF001 - a letter of two UTF-16 units
PASSAGE = f"{EMOJI}The rocket Ariane 6 left the pad at noon. 🌼 Nothing else was seen."


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def service():
    from tests.serve.page_service import page_service  # which imports conftest.py, and that this module

    with page_service() as running:
        yield running


@pytest.fixture
def open_page(browser):
    """Opens the page of a service. At the end, nothing has failed in it and nothing was loaded from elsewhere."""
    from playwright.sync_api import expect

    contexts, bad = [], []

    def open_page(service, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("dialog", lambda dialog: bad.append(f"a dialog: {dialog.message}"))
        page.on("console", lambda entry: bad.append(entry.text) if "Content Security Policy" in entry.text else None)
        page.on(
            "request",
            lambda request: bad.append(request.url) if not request.url.startswith((service.url, "data:")) else None,
        )
        page.goto(service.url)
        expect(page.locator("#model")).to_contain_text("qa_onnx")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert bad == []


@pytest.fixture
def page(open_page, service):
    return open_page(service)


def ask(page, question, passage=PASSAGE):
    if passage is not None:
        if page.locator("#edit").is_visible():
            page.click("#edit")
        page.fill("#passage", passage)
    page.fill("#question", question)
    page.click("#ask")


def drop(page, name, data, kind=""):
    from playwright.sync_api import expect

    transfer = page.evaluate_handle(
        "([name, bytes, type]) => { const t = new DataTransfer(); "
        "t.items.add(new File([new Uint8Array(bytes)], name, {type})); return t; }",
        [name, list(data), kind],
    )
    for event in ("dragenter", "dragover"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_hidden()
