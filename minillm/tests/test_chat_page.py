"""The chat page in a real browser without a window; skipped where there is none.

It needs the package playwright, and Chromium as a command or as `playwright install chromium`
brings it.
"""
import shutil

import pytest
import torch

from minillm.serving import server
from minillm.tests.server import TOKENIZER, script, until
# fixtures: pytest finds them here, by name
from minillm.tests.server import running_port, tiny_model  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
END = TOKENIZER.special_tokens["<|endoftext|>"]


@pytest.fixture(scope="module")
def browser():
    command = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        try:
            running = driver.chromium.launch(executable_path=command, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture
def page(browser, port):
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"http://127.0.0.1:{port}")
    page.wait_for_function("document.getElementById('name').textContent === 'tiny'")
    yield page
    page.close()
    assert not errors


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def answers(page):
    """The texts of the model, without the label for screen readers."""
    return page.eval_on_selector_all(".turn:not(.user) span:last-child",
                                     "turns => turns.map(turn => turn.textContent)")


def ids(text):
    return TOKENIZER.encode(text)


def test_an_answer_streams_in(page, monkeypatch):
    made, seen = script(monkeypatch, [*ids("The fox has the kite, my friend."), END], 0.05), []
    ask(page, "Who has the kite?")

    def whole():
        text = (answers(page) or [""])[0]
        seen.append(text)
        return text == "The fox has the kite, my friend."
    until(whole)
    assert made and len({text for text in seen if text}) > 2, "it came all at once"
    page.wait_for_selector("#send:visible")
    assert page.text_content(".user span:last-child") == "Who has the kite?"


def test_the_second_question_has_the_first_before_it(page, monkeypatch):
    prompts = []

    def steps(model, prompt, *_, **__):
        prompts.append(TOKENIZER.decode(prompt[0]))
        yield from (torch.tensor([i]) for i in [*ids("Yes."), END])
    monkeypatch.setattr(server, "steps", steps)
    for question in "A?", "B?":
        ask(page, question)
        page.wait_for_selector("#send:visible")
        until(lambda: len(answers(page)) == len(prompts))
    assert "A?<|assistant|>Yes.<|endoftext|><|user|>B?" in prompts[1]
    page.click("#anew")
    assert page.locator(".turn").count() == 0
    ask(page, "C?")
    until(lambda: answers(page) == ["Yes."])
    assert "A?" not in prompts[2]


def test_an_error_is_shown_and_the_question_can_be_asked_again(page, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("boom")
        yield
    monkeypatch.setattr(server, "steps", broken)
    ask(page, "Who?")
    page.wait_for_selector(".alert")
    assert "the server failed" in page.text_content(".alert")
    assert page.input_value("#text") == "Who?"
    script(monkeypatch, [*ids("Me."), END])
    page.press("#text", "Enter")
    until(lambda: answers(page)[-1:] == ["Me."])


def test_markup_stays_text(page, monkeypatch):
    markup = "<b>bold</b><img src=x onerror='document.title=1'>"
    script(monkeypatch, [*ids("x"), END])

    def at_once(tokenizer, made):           # one bit of text: in several, no tag is ever whole
        list(made)
        yield markup
    monkeypatch.setattr(server, "pieces", at_once)
    ask(page, markup)
    until(lambda: answers(page) == [markup])
    assert page.text_content(".user span:last-child") == markup
    assert page.locator("main b, main img").count() == 0 and page.title() == "minillm chat"


@pytest.mark.parametrize("width", [320, 1200])
def test_a_narrow_screen(page, monkeypatch, width):
    page.set_viewport_size({"width": width, "height": 480})
    script(monkeypatch, [*ids("x" * 300), END])
    ask(page, "y" * 300)
    until(lambda: answers(page) == ["x" * 300])
    page.wait_for_selector("#send:visible")
    for part in "document.documentElement", "document.getElementById('talk')":
        assert page.evaluate(f"{part}.scrollWidth - {part}.clientWidth") <= 0
    box = page.locator("#send").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 480


def test_an_answer_can_be_stopped(page, monkeypatch):
    script(monkeypatch, ids("word " * 80), 0.05)
    ask(page, "Go on.")
    until(lambda: answers(page) and answers(page)[0])
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert "Stopped." in page.text_content("#talk")
