"""The page in a real Chromium, against the real service with answers that the test knows (`page_service`)."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from qa_onnx.serve import routes
from tests.serve.page_service import page_service
from tests.serve.pages import PASSAGE, ask, drop, needs_chromium
from tests.serve.pdf_files import make_encrypted, make_pdf

pytestmark = needs_chromium
SEEN = "(mark) => {const [a, b] = [mark, mark.parentElement].map((e) => e.getBoundingClientRect()); "
SEEN += "return a.top >= b.top && a.bottom <= b.bottom && a.bottom <= innerHeight && a.top >= 0}"


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
    expect(page.locator("#score-name")).to_have_text("Probability that it is right")
    expect(page.locator("#status")).to_have_text("Answer: Ariane 6. Probability 87%.")


def test_a_probability_that_is_not_calibrated_is_called_so(page):
    page.route("**/v1/model", lambda route: route.fulfill(json=route.fetch().json() | {"calibrated": False}))
    page.reload()
    expect(page.locator("#score-name")).to_have_text("Probability under the model, not calibrated")


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
    expect(page.locator("#answer-text")).to_have_text("No answer was found.")
    expect(page.locator("#no-answer")).to_have_text("91%")
    expect(page.locator("#score")).to_be_hidden()
    expect(page.locator("mark")).to_have_count(0)


def test_lists_what_would_have_been_answered_where_there_is_no_answer(page, service):
    ask(page, "Why?")
    expect(page.locator("#more")).to_have_text("Show possible answers")
    page.click("#more")
    expect(page.locator("#others button")).to_have_count(3)
    asked = service.answerer.asked[-1][2]
    assert (asked.no_answer_threshold, asked.num_answers) == (1.0, 3)
    ask(page, "find Ariane 6")
    expect(page.locator("#more")).to_have_text("Show other answers")
    page.click("#more")
    expect(page.locator("#others button")).to_have_count(3)
    assert service.answerer.asked[-1][2].no_answer_threshold is None


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
