"""What the page says of errors, and that everyone can use it: keyboard, screen reader, phone, dark mode."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from qa_onnx.serve.config import Limits
from tests.serve.page_service import KEY, page_service
from tests.serve.pages import PASSAGE, PHONE, ask, drop, needs_chromium

pytestmark = needs_chromium


# errors


def test_asks_for_what_is_missing(page):
    page.click("#ask")
    expect(page.locator("#passage-error")).to_have_text("Paste a passage first, or open a file.")
    expect(page.locator("#passage")).to_be_focused()
    expect(page.locator("#passage")).to_have_attribute("aria-invalid", "true")
    page.fill("#passage", PASSAGE)
    expect(page.locator("#passage-error")).to_be_hidden()
    page.click("#ask")
    expect(page.locator("#error-text")).to_have_text("Type a question first.")
    expect(page.locator("#question")).to_be_focused()


def test_says_when_the_service_is_busy_and_tries_again(open_page):
    with page_service(limits=Limits(queue_questions=1, items=1)) as service:
        first, second = open_page(service), open_page(service)
        ask(first, "hold")
        expect(first.locator("#answer-text")).to_have_text("So far")
        ask(second, "find Ariane 6")
        expect(second.locator("#error-text")).to_have_text(
            re.compile(r"The service is busy\. Try again in \d+\sseconds?\.")
        )
        first.click("#cancel")
        expect(first.locator("#cancel")).to_be_hidden()
        second.wait_for_timeout(300)
        second.click("#again")
        expect(second.locator("mark")).to_have_text("Ariane 6")
        expect(second.locator("#error")).to_be_hidden()


def test_says_what_is_too_large(open_page):
    limits = Limits(body_bytes=3_000, context_characters=2_000, question_characters=20)
    with page_service(limits=limits) as service:
        page = open_page(service)
        ask(page, "find a", "a" * 2_001)
        expect(page.locator("#passage-error")).to_have_text(
            "The passage has 2,001 characters; this service takes up to 2,000."
        )
        ask(page, "find a" + "a" * 20, "a")
        expect(page.locator("#error-text")).to_have_text("The question has 26 characters; this service takes up to 20.")
        ask(page, "find é", "é" * 2_000)
        expect(page.locator("#error-text")).to_contain_text("too large for this service, which takes up to 3 KiB")
        drop(page, "large.txt", b"a" * 5_000)
        expect(page.locator("#passage-error")).to_have_text(
            "large.txt has 5 KiB; this service takes files up to 3 KiB."
        )


def test_says_when_an_answer_takes_too_long(open_page):
    with page_service(limits=Limits(timeout_seconds=0.3)) as service:
        page = open_page(service)
        ask(page, "hold")
        expect(page.locator("#error-text")).to_contain_text("The answer took too long.")
        expect(page.locator("#result")).to_be_hidden()


def test_says_when_the_network_is_gone(page):
    page.context.set_offline(True)
    ask(page, "find Ariane 6")
    expect(page.locator("#error-text")).to_contain_text("The service cannot be reached.")
    page.context.set_offline(False)
    page.click("#again")
    expect(page.locator("mark")).to_have_text("Ariane 6")


def test_says_when_a_stream_breaks_off(open_page):
    with page_service(limits=Limits(drain_seconds=0.2)) as service:
        page = open_page(service)
        ask(page, "hold")
        expect(page.locator("#answer-text")).to_have_text("So far")
        service.drain()
        expect(page.locator("#error-text")).to_contain_text("The service is shutting down")
        expect(page.locator("#again")).to_be_visible()


def test_asks_for_a_key_and_keeps_it_in_memory(browser):
    with page_service(api_keys=[KEY]) as service:
        page = browser.new_page()
        page.goto(service.url)
        ask(page, "find Ariane 6")
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "a wrong key")
        page.keyboard.press("Enter")
        expect(page.locator("#error-text")).to_contain_text("no spaces")
        page.fill("#key", "a-wrong-key")
        page.keyboard.press("Enter")
        expect(page.locator("#error-text")).to_have_text("The service did not accept this key.")
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("mark")).to_have_text("Ariane 6")
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("qa_onnx")
        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert KEY not in page.evaluate(stored)
        assert page.input_value("#key") == ""
        page.close()


# people


def test_works_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for name in ("#open", "#passage"):
        page.keyboard.press("Tab")
        expect(page.locator(name)).to_be_focused()
    page.keyboard.type("The rocket Ariane 6 left.")
    order = [*[page.locator("#examples button").nth(index) for index in range(3)], page.locator("#question")]
    for element in order:
        page.keyboard.press("Tab")
        expect(element).to_be_focused()
    page.keyboard.type("find Ariane 6")
    page.keyboard.press("Control+Enter")
    expect(page.locator("mark")).to_have_text("Ariane 6")
    for name in ("#extractive", "#ask", "#show", "#more"):
        page.keyboard.press("Tab")
        expect(page.locator(name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#others button").nth(0)).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("mark")).to_have_text("The")
    page.focus("#question")
    page.keyboard.press("Control+A")
    page.keyboard.type("hold")
    page.keyboard.press("Enter")
    expect(page.locator("#cancel")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#cancel")).to_be_hidden()


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, PHONE, PHONE | {"color_scheme": "dark"}],
    ids=["light", "dark", "phone", "phone-dark"],
)
def test_has_no_accessibility_violation_in_any_state(open_page, service, options):
    page = open_page(service, reduced_motion="reduce", **options)

    def check(state):
        found = Axe().run(page).response["violations"]
        assert found == [], f"{state}: {[(one['id'], [node['html'] for node in one['nodes']]) for one in found]}"

    check("empty")
    page.click("#ask")
    check("error")
    ask(page, "hold")
    expect(page.locator("#answer-text")).to_have_text("So far")
    check("busy")
    page.click("#cancel")
    ask(page, "find Ariane 6")
    page.click("#more")
    expect(page.locator("#others button")).to_have_count(3)
    check("answer")
    ask(page, "Why?", None)
    expect(page.locator("#no-answer")).to_have_text("91%")
    check("no answer")
    page.evaluate("for (const id of ['key-form', 'error', 'again', 'drop']) document.getElementById(id).hidden = false")
    check("key")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def test_its_policy_allows_only_its_own_script_and_style(browser, service):
    page = browser.new_page()
    policy = page.goto(service.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    failures = []
    page.on("console", lambda entry: failures.append(entry.text))
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in failures)
    page.close()


def test_answers_with_a_real_model(open_page, starter_bundle):
    from qa_onnx import Answerer

    passage = "Apollo 11 was launched in 1969 🚀. Michael Collins stayed in orbit, while Neil Armstrong landed."
    with Answerer.from_pretrained(starter_bundle) as answerer:
        expected = answerer.answer("Who stayed in orbit?", passage)
        with page_service(answerer=answerer) as service:
            page = open_page(service)
            ask(page, "Who stayed in orbit?", passage)
            expect(page.locator("#answer-text")).to_have_text(expected.text)
            if expected.start is not None:
                expect(page.locator("mark")).to_have_text(passage[expected.start : expected.end])
            page.click("#more")
            expect(page.locator("#others button")).to_have_count(3)
