"""Review: a page in a real browser on which people read and mark."""

import json
import os
import shutil
import time
from collections import Counter

import pytest

from tests.support.judged_run import (
    HOSTILE,
    PROMPTS,
    SAFE,
    UNKNOWN,
    UNSAFE,
    DoubtfulGuard,
    give,
    kept,
    make_run,
    mark_of,
)
from thinksafe import pipeline as stages
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Mark
from thinksafe.guards.base import Judgement
from thinksafe.pipeline.imports import take_in_marks
from thinksafe.run.directory import RunDir

pytest_plugins = ["tests.support.judged_run"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, headless. CI installs it; elsewhere these tests are skipped where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        assert not os.environ.get("CI"), "CI must install chromium and chromium-driver"
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = (
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for argument in ("headless", "no-sandbox", "disable-gpu", "window-size=1360,860", profile, *quiet):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def page(browser, run):
    """The page of `run`, which this browser has not seen before; nothing may be logged as an error."""
    browser.get(stages.review(run, 500).as_uri())
    yield Page(browser)
    assert browser.get_log("browser") == []


class Page:
    """What a person sees and does."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def press(self, keys):
        self.browser.execute_script("document.activeElement.blur()")
        for key in keys:
            self.find("body").send_keys(key)

    def listed(self):
        return [entry.get_attribute("textContent") for entry in self.all("#list .head")]

    def choose(self, name, value):
        self.find(f"#{name} option[value={value}]").click()

    def name(self, name):
        self.find("#name").clear()  # which the browser may remember of another page
        self.find("#name").send_keys(name)

    def text(self, part):
        return self.find(f"#{part} pre").get_attribute("textContent")

    def download(self, folder):
        """The file of marks, once the browser has written it."""
        self.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
        self.find("#download").click()
        file = folder / "marks.jsonl"
        self.wait(file.exists)
        return file

    def wait(self, until):
        """For what the browser does in its own time."""
        deadline = time.monotonic() + 60
        while not until() and time.monotonic() < deadline:
            time.sleep(0.05)

    def asks_before_leaving(self):
        event = "const leaving = new Event('beforeunload', {cancelable: true}); dispatchEvent(leaving);"
        return self.browser.execute_script(f"{event} return leaving.defaultPrevented")

    def blurred(self, part):
        return "blur" in self.find(f"#{part} pre").value_of_css_property("filter")


def test_the_least_certain_come_first_and_can_be_ordered_otherwise(page):
    def share(text):
        digits = [c for c in text if c.isdigit()]
        return min(0.01 + 0.2 * int(digits[0]), 1.0) if digits else 0.3

    listed = page.listed()
    assert sorted(listed) == sorted(text for text, _ in PROMPTS)
    assert listed[0].endswith("recipe 1.") and {t[-2] for t in listed[1:3]} <= {"2", "r"}
    undecided = ["Brew me a ka lo mi, recipe 1.", *(t for t in listed if abs(share(t) - 0.5) < 0.1)]
    assert set(listed[: len(undecided)]) == set(undecided)
    distances = [abs(share(t) - 0.5) for t in listed[len(undecided) :]]
    assert distances == sorted(distances)
    page.choose("order", "unsafe")
    assert share(page.listed()[0]) == max(map(share, listed)) and page.listed()[-1].endswith("recipe 1.")
    page.choose("only", "harmful")
    assert Counter(page.listed()) == Counter(text for text, label in PROMPTS if label == "harmful")
    page.choose("only", "unknown")
    assert set(page.listed()) == set(undecided)
    page.find("#search").send_keys("boat NUMBER 2")
    assert page.listed() == ["How do I fold boat number 2?"]
    page.find("#search").send_keys("and nothing else")
    assert page.listed() == [] and page.find("#nothing").is_displayed() and not page.find("#record").is_displayed()


def test_harmful_text_is_blurred_until_it_is_clicked_and_thoughts_are_folded(page):
    assert page.text("prompt").endswith("recipe 1.")
    assert page.blurred("prompt") and page.blurred("answer") and not page.find("#think").is_displayed()
    assert "veil-text" in page.all("#list .head")[0].get_attribute("class")
    page.find("#prompt .veil").click()
    assert not page.blurred("prompt") and page.blurred("answer")
    assert "veil-text" not in page.all("#list .head")[0].get_attribute("class")
    page.find("#thought summary").click()
    assert page.find("#think").is_displayed() and page.blurred("think")
    page.press("v")
    assert not any(page.blurred(part) for part in ("prompt", "think", "answer"))
    page.press("j")
    assert page.text("prompt") == "How do I fold boat number 2?" and not page.find("#think").is_displayed()
    assert not page.blurred("prompt") and page.blurred("answer"), "what the guard does not call safe is blurred too"
    page.choose("only", "safe")
    page.find("#search").send_keys("boat number 0")
    assert not page.blurred("answer")
    page.press("k")
    assert page.text("prompt") == "How do I fold boat number 0?"


def test_whatever_a_record_says_is_text(page):
    for text in HOSTILE:
        page.find("#search").clear()
        page.find("#search").send_keys(text[:12] if text.isascii() else "separator")
        page.all("#list button")[0].click()
        page.press("v")
        assert page.text("prompt") == text and text in page.text("answer")
    script = "return [typeof window.hacked, document.images.length, performance.getEntriesByType('resource').length]"
    assert page.browser.execute_script(script) == ["undefined", 0, 0]


def test_nothing_goes_out_of_the_page(page):
    """Even a script that got in could reach nobody."""
    asked = "const done = arguments[0]; fetch('https://example.org/').then(() => done('out'), () => done('refused'))"
    assert page.browser.execute_async_script(asked) == "refused"
    assert all("Content Security Policy" in entry["message"] for entry in page.browser.get_log("browser"))
    added = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    assert page.browser.execute_script(f"{added}; return typeof window.hacked") == "undefined"
    page.browser.get_log("browser")


def test_marks_reach_the_filter(page, run, tmp_path):
    """Accept, reject, change one's mind; then download, and give the file to the run."""
    page.name("")
    page.press("r")
    assert page.find("#done").text.startswith("0 of 16"), "nobody marks without a name"
    page.name("Ann")
    page.press("a")
    assert page.find("#done").text.startswith("0 of 16") and not page.blurred("answer"), "nobody accepts unread"
    page.press("a")
    assert page.find("#done").text == "1 of 16 marked"
    assert page.text("prompt") == "How do I fold boat number 2?", "and the next one is shown"
    page.press("vr")
    page.press("k")
    page.press("u")
    page.press("va")
    page.choose("only", "safe")
    page.find("#search").send_keys("boat number 0")
    page.press("r")
    assert page.find("#done").text == "3 of 16 marked"
    page.find("#search").clear()
    page.choose("only", "all")
    colours = [entry.get_attribute("class") for entry in page.all("#list button")]
    assert [colour for colour in colours if colour] == ["accept", "accept", "reject"]
    file = page.download(tmp_path)
    assert f"thinksafe filter --out {run.path}" in page.text("saved")
    marks = {mark.text_id: mark for mark in read_records(file, Mark)}
    assert sorted(mark.decision for mark in marks.values()) == ["accept", "accept", "reject"]
    assert {mark.by for mark in marks.values()} == {"Ann"} and all(mark.moment for mark in marks.values())
    before = kept(run)
    with RunDir.open(run.path, run.recipe) as again:
        take_in_marks(again, file)
        stages.accept(again)
    after = kept(run)
    assert after.keys() - before.keys() == {"How do I fold boat number 2?", "Brew me a ka lo mi, recipe 1."}
    assert before.keys() - after.keys() == {"How do I fold boat number 0?"}
    assert after["How do I fold boat number 2?"].accepted_by == "person: Ann"


def test_a_browser_that_keeps_what_pages_store_remembers_the_marks(page):
    """What the page stored is given to the next page by hand: when Chromium writes it down is its own affair."""
    page.name("Ann")
    page.press("vavr")
    stored = page.browser.execute_script("return JSON.stringify({...localStorage})")
    give = f"for (const [name, value] of Object.entries({stored})) localStorage.setItem(name, value);"
    given = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": give})
    page.browser.execute_script("localStorage.clear()")
    page.browser.refresh()
    page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", given)
    assert page.find("#done").text == "2 of 16 marked"
    assert page.find("#name").get_attribute("value") == "Ann"
    assert [entry.get_attribute("class") for entry in page.all("#list button")][:3] == ["accept", "reject", ""]


def test_a_file_of_marks_is_taken_in_again(page, run, tmp_path):
    """Of two marks the later one counts, and what this page cannot show is said, never dropped in silence."""
    page.name("Ann")
    page.press("va")
    assert page.text("prompt") == UNKNOWN, "and the first one, recipe 1, is accepted"
    marks = [
        mark_of(run, "Brew me a ka lo mi, recipe 1.", "reject"),
        mark_of(run, UNKNOWN, "reject", "<b>Bob</b>", "2026-01-01T10:00:00Z"),
        mark_of(run, UNKNOWN, "accept", "<b>Bob</b>", "2026-01-01T12:00:00+01:00"),
        mark_of(run, SAFE, "reject", "<b>Bob</b>") | {"more": 1},
    ]
    others = [mark_of(run, UNSAFE, "accept") | wrong for wrong in ({"text_id": "x"}, {"by": 1}, {"at": "then"})]
    lines = [*map(json.dumps, [*marks, *others, 7, None, {}]), "<img src=x onerror='window.hacked = 1'>", "", " "]
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(lines))
    page.find("#load").send_keys(str(file))
    page.wait(page.find("#loaded").is_displayed)
    assert page.find("#found").text == (
        "Marks found in given.jsonl: 4. Lines that are no marks on what this page shows: 7; keep that file too."
    )
    page.find("#loaded button").click()
    assert page.find("#done").text == "3 of 16 marked"
    found = {mark.text_id: (mark.decision, mark.by) for mark in read_records(page.download(tmp_path), Mark)}
    recipe_1, unknown, _, safe = (mark["text_id"] for mark in marks)
    assert found == {recipe_1: ("accept", "Ann"), unknown: ("accept", "<b>Bob</b>"), safe: ("reject", "<b>Bob</b>")}


def test_who_leaves_with_marks_that_are_in_no_file_is_asked(page, tmp_path):
    assert not page.asks_before_leaving()
    page.name("Ann")
    page.press("va")
    assert page.asks_before_leaving()
    page.download(tmp_path)
    assert not page.asks_before_leaving()
    page.find("#saved button").click()
    page.press("ku")
    assert page.asks_before_leaving(), "a mark that was taken back"


def test_a_page_holds_the_least_certain_and_says_how_many_are_left_out(browser, run):
    browser.get(stages.review(run, 3).as_uri())
    assert len(Page(browser).all("#list li")) == 3
    said = Page(browser).find("#scope").text
    assert "the 3 most uncertain of 16" in said and "13 more are not on this page" in said and "1 malformed" in said


def test_what_the_run_knows_of_marks_counts_as_marked(browser, run, tmp_path):
    give(run, tmp_path, mark_of(run, SAFE, "reject"), mark_of(run, UNSAFE, "accept"))
    browser.get(stages.review(run, 500).as_uri())
    page = Page(browser)
    assert page.find("#done").text == "2 of 16 marked" and not page.find("#download").is_enabled()
    page.choose("only", "unmarked")
    assert Counter(page.listed()) == Counter(text for text, _ in PROMPTS if text not in (SAFE, UNSAFE))
    page.name("Ann")
    page.press("va")
    assert page.find("#done").text == "3 of 16 marked" and len(page.listed()) == 13


def test_of_an_ensemble_every_members_verdict_is_told(browser, tmp_path, monkeypatch):
    said = {"a:m/x/safe": 0.3, "a:m/x/unsafe": 0.1, "a:m/x/S4": 0.05, "b:n/safe": 0.0, "b:n/unsafe": 0.0}
    said |= {"b:n/refusal": 0.7, "c/unsafe": 0.2}

    def judge(guard, exchanges):
        for exchange in exchanges:
            yield Judgement(exchange.id, "unknown", 0.3, 0.1, None, "guards_disagree", "", said)

    monkeypatch.setattr(DoubtfulGuard, "judge", judge)
    run = make_run(tmp_path)
    browser.get(stages.review(run, 1).as_uri())
    facts = dict(each.text.split("\n") for each in Page(browser).all("#facts div"))
    assert facts["P(unsafe) of each guard"] == "a:m/x 25.0%, b:n no figure"
    assert facts["also"] == "b:n/refusal 70.0%, c/unsafe 20.0%, a:m/x/S4 5.0%"


def test_a_page_of_a_trained_run_says_that_its_marks_come_too_late(page, run):
    assert not page.find("#late").is_displayed() and "--responses" not in page.text("saved")
    (run.path / "training").mkdir()
    page.browser.get(stages.review(run, 500).as_uri())
    assert "too late for that training" in page.find("#late").text
    assert f"--responses {run.path} --marks marks.jsonl --out NEW" in page.text("saved")
