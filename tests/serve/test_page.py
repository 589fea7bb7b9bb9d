"""The page in a real Chromium, against the real service with answers that the test knows (`page_service`)."""

from __future__ import annotations

import re
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from qa_onnx.serve import routes
from qa_onnx.serve.config import Limits
from tests.serve.page_service import KEY, page_service
from tests.serve.pdf_files import make_encrypted, make_pdf

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; make browser (Debian, as root)")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
EMOJI = "👩‍🚀 launched 🚀 from 𝕂ourou 🇫🇷. "  # noqa: RUF001 - a letter of two UTF-16 units
PASSAGE = f"{EMOJI}The rocket Ariane 6 left the pad at noon. 🌼 Nothing else was seen."
SEEN = "(mark) => {const [a, b] = [mark, mark.parentElement].map((e) => e.getBoundingClientRect()); "
SEEN += "return a.top >= b.top && a.bottom <= b.bottom && a.bottom <= innerHeight && a.top >= 0}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def service():
    with page_service() as running:
        yield running


@pytest.fixture
def open_page(browser):
    """Opens the page of a service. At the end, nothing has failed in it and nothing was loaded from elsewhere."""
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


# answers


def test_the_answer_is_highlighted_where_it_is_after_emoji(page):
    ask(page, "find Ariane 6")
    expect(page.locator("mark")).to_have_text("Ariane 6")
    expect(page.locator("#answer-text")).to_have_text("Ariane 6")
    before, after = PASSAGE.split("Ariane 6")
    texts = page.locator("mark").evaluate(
        "(mark) => [...mark.parentElement.childNodes].map((node) => node.textContent)"
    )
    assert texts == [before, "Ariane 6", after]
    expect(page.locator("#score")).to_have_text("87%")
    expect(page.locator("#no-answer")).to_have_text("4%")
    expect(page.locator("#status")).to_have_text("Answer: Ariane 6. Probability 87%.")


def test_a_pdf_that_is_opened_takes_the_answer_before_away(page):
    ask(page, "find Ariane 6")
    expect(page.locator("#score")).to_have_text("87%")
    drop(page, "paper.pdf", make_pdf(["The Vega left."]), "application/pdf")
    expect(page.locator("#passage")).to_have_value("The Vega left.")
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#status")).to_have_text("paper.pdf was opened.")
    ask(page, "find Vega", None)
    expect(page.locator("mark")).to_have_text("Vega")


def test_a_text_file_that_is_read_while_an_answer_comes_does_not_replace_the_passage(page):
    page.evaluate(
        "() => { const read = Blob.prototype.arrayBuffer; window.release = null; "
        "Blob.prototype.arrayBuffer = async function () { "
        "await new Promise((go) => { window.release = go; }); return read.call(this); }; }"
    )
    page.fill("#passage", PASSAGE)
    drop(page, "notes.txt", b"Another text.", "text/plain")
    page.wait_for_function("() => window.release !== null")
    ask(page, "hold", None)
    expect(page.locator("#answer-text")).to_have_text("So far")
    page.evaluate("() => window.release()")
    page.wait_for_timeout(300)
    page.click("#cancel")
    expect(page.locator("#cancel")).to_be_hidden()
    assert page.input_value("#passage") == PASSAGE


def test_the_answer_of_a_long_passage_is_scrolled_into_view(page):
    ask(page, "find the needle", "Some hay. " * 20_000 + "Here is the needle. " + "More hay. " * 20_000)
    expect(page.locator("mark")).to_have_text("the needle")
    assert page.locator("mark").evaluate(SEEN)
    page.locator("#reader").evaluate("(reader) => { reader.scrollTop = 0; }")
    page.click("#show")
    assert page.locator("mark").evaluate(SEEN)


def test_a_long_passage_is_shown_as_it_is(page):
    emoji = "🌾" * 5_000
    for passage in ("A line.\n" * 3_000, "One long line. " * 3_000, emoji, f"A {emoji}\n\n\nend\n"):
        page.evaluate("(text) => setPassage(text)", f"{passage}the needle")
        ask(page, "find the needle", None)
        expect(page.locator("mark")).to_have_text("the needle")
        assert page.locator("#reader").evaluate("(reader) => reader.textContent") == f"{passage}the needle"


def test_the_answer_streams_and_cancel_frees_the_request(page, service):
    ask(page, "hold")
    expect(page.locator("#answer-text")).to_have_text("So far")
    expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
    assert page.locator("#ask").get_attribute("aria-disabled") == "true"
    page.click("#cancel")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#ask")).to_be_focused()
    expect(page.locator("#status")).to_have_text("Canceled.")
    page.wait_for_timeout(500)
    assert service.answerer.held[-1].cancelled()
    ask(page, "find Ariane 6", None)
    expect(page.locator("mark")).to_have_text("Ariane 6")


def test_escape_cancels_and_the_answer_before_comes_back(page):
    ask(page, "find Ariane 6")
    expect(page.locator("#score")).to_have_text("87%")
    ask(page, "hold", None)
    expect(page.locator("#answer-text")).to_have_text("So far")
    page.keyboard.press("Escape")
    expect(page.locator("#answer-text")).to_have_text("Ariane 6")
    expect(page.locator("mark")).to_have_text("Ariane 6")


def test_alternatives_are_listed_and_highlighted_when_clicked(page, service):
    ask(page, "find Ariane 6")
    page.click("#more")
    items = page.locator("#others button")
    expect(items).to_have_text(["Ariane 687%", "👩‍🚀5%", "launched5%"])
    assert service.answerer.asked[-1][2].num_answers == 3
    expect(items.nth(0)).to_have_attribute("aria-pressed", "true")
    expect(items.nth(0)).to_be_focused()
    items.nth(2).click()
    expect(page.locator("mark")).to_have_text("launched")
    expect(items.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(items.nth(0)).to_have_attribute("aria-pressed", "false")


def test_says_where_there_are_no_other_answers(page):
    page.check("#extractive")
    ask(page, "find Ariane", "Ariane 6.")
    page.click("#more")
    expect(page.locator("#error-text")).to_have_text("The passage is too short for 3 different answers.")
    expect(page.locator("mark")).to_have_text("Ariane")


def test_says_where_there_is_no_answer(page):
    ask(page, "find nothing of the kind", "A short passage.")
    expect(page.locator("#answer-note")).to_contain_text("not in the passage")
    expect(page.locator("mark")).to_have_count(0)
    ask(page, "Why?")
    expect(page.locator("#answer-text")).to_have_text("The passage has no answer to this question.")
    expect(page.locator("#no-answer")).to_have_text("91%")
    expect(page.locator("#score")).to_be_hidden()
    expect(page.locator("mark")).to_have_count(0)


def test_asks_for_words_of_the_passage_only(page, service):
    page.check("#extractive")
    ask(page, "find Ariane 6")
    expect(page.locator("#score")).to_have_text("87%")
    assert service.answerer.asked[-1][2].extractive


def test_an_answer_is_gone_once_its_passage_is_another(page):
    ask(page, "find Ariane 6")
    page.click("#edit")
    expect(page.locator("#passage")).to_be_focused()
    page.keyboard.press("Control+End")
    page.keyboard.type(" And more.")
    expect(page.locator("#result")).to_be_hidden()
    page.click("#clear")
    expect(page.locator("#passage")).to_have_value("")
    expect(page.locator("#passage-size")).to_have_text("")


def test_examples_are_ready_to_ask(page):
    for name in ("Apollo 11", "Dancing bees", "Eiffel Tower"):
        page.get_by_role("button", name=name).click()
        expect(page.locator("#question")).to_be_focused()
        assert page.input_value("#question").endswith("?")
        assert len(page.input_value("#passage")) > 300


def test_text_and_answer_stay_text(page):
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    ask(page, f"find {attack}", f"Before {attack} after. </textarea><svg onload=alert(3)>")
    expect(page.locator("mark")).to_have_text(attack)
    page.click("#more")
    expect(page.locator("#others button").first).to_contain_text(attack)
    assert page.evaluate("document.querySelectorAll('img, svg, script').length") == 1


def test_lone_surrogates_are_replaced_and_nothing_moves(page):
    page.evaluate("document.getElementById('passage').value = 'A lone \\ud83d half, then Ariane 6.'")
    ask(page, "find Ariane 6", None)
    expect(page.locator("mark")).to_have_text("Ariane 6")


# files


def test_drops_text_markdown_and_pdf(page):
    drop(page, "notes.txt", f"\ufeff{PASSAGE}".encode(), "text/plain")
    expect(page.locator("#passage")).to_have_value(PASSAGE)
    expect(page.locator("#question")).to_be_focused()
    drop(page, "notes.md", "# Title\r\n\r\nWords.".encode("utf-16"))
    expect(page.locator("#passage")).to_have_value("# Title\n\nWords.")
    drop(page, "paper.pdf", make_pdf(["The Ariane 6 left."], ["The end."]), "application/pdf")
    expect(page.locator("#passage")).to_have_value("The Ariane 6 left.\n\nThe end.")
    ask(page, "find Ariane 6", None)
    expect(page.locator("mark")).to_have_text("Ariane 6")


def test_opens_a_file_with_the_button(page):
    with page.expect_file_chooser() as chooser:
        page.click("#open")
    chooser.value.set_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"From a file."})
    expect(page.locator("#passage")).to_have_value("From a file.")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("image.png", b"\x89PNG\r\n\x00\xff", "image.png is not a text file"),
        ("nulls.txt", b"a\0b", "nulls.txt is not a text file"),
        ("secret.pdf", make_encrypted("a password"), "the PDF is encrypted"),
        ("broken.pdf", b"%PDF-1.7 and no more", "it is damaged, or not a PDF"),
        ("scan.pdf", make_pdf([]), "has no text"),
    ],
)
def test_says_why_a_file_is_not_read(page, name, data, message):
    page.fill("#passage", "What was there before.")
    drop(page, name, data)
    expect(page.locator("#passage-error")).to_contain_text(message)
    expect(page.locator("#passage")).to_have_value("What was there before.")


def test_says_that_pdf_is_not_read_here(open_page, monkeypatch):
    monkeypatch.setattr(routes, "reads_pdf", lambda: False)
    with page_service() as service:
        page = open_page(service)
        assert "PDF" not in page.get_attribute("#passage", "placeholder")
        drop(page, "paper.pdf", make_pdf(["A page."]), "application/pdf")
        expect(page.locator("#passage-error")).to_contain_text("does not read PDF files")


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
