"""The review page in a real browser: a person reads responses and marks them, and the filter imports the marks."""

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
    accepted_examples,
    add_marks,
    make_mark,
    make_run,
)
from thinksafe import pipeline
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Mark, Verdict
from thinksafe.pipeline.imports import import_marks
from thinksafe.run.directory import RunDir

pytest_plugins = ["tests.support.judged_run"]
pytestmark = pytest.mark.slow  # every test drives a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium. CI installs it; elsewhere these tests are skipped if it is missing."""
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
    chromium_driver = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium_driver
    chromium_driver.quit()


@pytest.fixture
def page(browser, run):
    """The review page of `run`; the browser must log no error."""
    browser.get(pipeline.make_review_page(run, 500).as_uri())
    yield Page(browser)
    assert browser.get_log("browser") == []


class Page:
    """The page as a person sees and uses it."""

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
        self.find("#name").clear()  # the browser may fill in the name from another page
        self.find("#name").send_keys(name)

    def text(self, part):
        return self.find(f"#{part} pre").get_attribute("textContent")

    def download(self, folder):
        """Download the marks, and return the file after the browser has written it."""
        self.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
        self.find("#download").click()
        file = folder / "marks.jsonl"
        self.wait(file.exists)
        return file

    def wait(self, condition):
        """Wait until the browser has done something asynchronous, for at most a minute."""
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def asks_before_leaving(self):
        script = "const leaving = new Event('beforeunload', {cancelable: true}); dispatchEvent(leaving);"
        return self.browser.execute_script(f"{script} return leaving.defaultPrevented")

    def blurred(self, part):
        return "blur" in self.find(f"#{part} pre").value_of_css_property("filter")


def test_list_starts_with_uncertain_responses_and_can_be_reordered(page):
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
    page.choose("filter", "harmful")
    assert Counter(page.listed()) == Counter(text for text, label in PROMPTS if label == "harmful")
    page.choose("filter", "unknown")
    assert set(page.listed()) == set(undecided)
    page.find("#search").send_keys("boat NUMBER 2")
    assert page.listed() == ["How do I fold boat number 2?"]
    page.find("#search").send_keys("and nothing else")
    assert page.listed() == [] and page.find("#no-match").is_displayed() and not page.find("#record").is_displayed()


def test_harmful_text_is_blurred_and_think_blocks_are_folded(page):
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
    assert not page.blurred("prompt") and page.blurred("answer"), "a response that is not safe is blurred too"
    page.choose("filter", "safe")
    page.find("#search").send_keys("boat number 0")
    assert not page.blurred("answer")
    page.press("k")
    assert page.text("prompt") == "How do I fold boat number 0?"


def test_markup_in_records_is_shown_as_text(page):
    for text in HOSTILE:
        page.find("#search").clear()
        page.find("#search").send_keys(text[:12] if text.isascii() else "separator")
        page.all("#list button")[0].click()
        page.press("v")
        assert page.text("prompt") == text and text in page.text("answer")
    script = "return [typeof window.hacked, document.images.length, performance.getEntriesByType('resource').length]"
    assert page.browser.execute_script(script) == ["undefined", 0, 0]


def test_content_security_policy_blocks_connections_and_scripts(page):
    """An injected script could not connect to any host."""
    request = (
        "const done = arguments[0]; fetch('https://example.org/').then(() => done('connected'), () => done('blocked'))"
    )
    assert page.browser.execute_async_script(request) == "blocked"
    assert all("Content Security Policy" in entry["message"] for entry in page.browser.get_log("browser"))
    script = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    assert page.browser.execute_script(f"{script}; return typeof window.hacked") == "undefined"
    page.browser.get_log("browser")


def test_downloaded_marks_change_the_accepted_set(page, run, tmp_path):
    """Accept, reject and change a mark; then download the file and import it into the run."""
    page.name("")
    page.press("r")
    assert page.find("#done").text.startswith("0 of 16"), "a mark needs a name"
    page.name("Ann")
    page.press("a")
    assert page.find("#done").text.startswith("0 of 16") and not page.blurred("answer"), (
        "an unread answer cannot be accepted"
    )
    page.press("a")
    assert page.find("#done").text == "1 of 16 marked"
    assert page.text("prompt") == "How do I fold boat number 2?", "the next response is shown"
    page.press("vr")
    page.press("k")
    page.press("u")
    page.press("va")
    page.choose("filter", "safe")
    page.find("#search").send_keys("boat number 0")
    page.press("r")
    assert page.find("#done").text == "3 of 16 marked"
    page.find("#search").clear()
    page.choose("filter", "all")
    classes = [entry.get_attribute("class") for entry in page.all("#list button")]
    assert [name for name in classes if name] == ["accept", "accept", "reject"]
    file = page.download(tmp_path)
    assert f"thinksafe filter --out {run.path}" in page.text("saved")
    marks = {mark.text_id: mark for mark in read_records(file, Mark)}
    assert sorted(mark.decision for mark in marks.values()) == ["accept", "accept", "reject"]
    assert {mark.by for mark in marks.values()} == {"Ann"} and all(mark.timestamp for mark in marks.values())
    before = accepted_examples(run)
    with RunDir.open(run.path, run.recipe) as reopened:
        import_marks(reopened, file)
        pipeline.accept_responses(reopened)
    after = accepted_examples(run)
    assert after.keys() - before.keys() == {"How do I fold boat number 2?", "Brew me a ka lo mi, recipe 1."}
    assert before.keys() - after.keys() == {"How do I fold boat number 0?"}
    assert after["How do I fold boat number 2?"].accepted_by == "person: Ann"


def test_marks_are_restored_from_local_storage(page):
    """The test copies local storage to the next page, because Chromium writes it to disk at an unknown time."""
    page.name("Ann")
    page.press("vavr")
    stored = page.browser.execute_script("return JSON.stringify({...localStorage})")
    restore = f"for (const [name, value] of Object.entries({stored})) localStorage.setItem(name, value);"
    script = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": restore})
    page.browser.execute_script("localStorage.clear()")
    page.browser.refresh()
    page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    assert page.find("#done").text == "2 of 16 marked"
    assert page.find("#name").get_attribute("value") == "Ann"
    assert [entry.get_attribute("class") for entry in page.all("#list button")][:3] == ["accept", "reject", ""]


def test_loaded_marks_merge_and_skipped_lines_are_counted(page, run, tmp_path):
    """The later mark of a response counts. The page counts lines that are not marks on its responses."""
    page.name("Ann")
    page.press("va")
    assert page.text("prompt") == UNKNOWN, "recipe 1, the first response, is accepted"
    marks = [
        make_mark(run, "Brew me a ka lo mi, recipe 1.", "reject"),
        make_mark(run, UNKNOWN, "reject", "<b>Bob</b>", "2026-01-01T10:00:00Z"),
        make_mark(run, UNKNOWN, "accept", "<b>Bob</b>", "2026-01-01T12:00:00+01:00"),
        make_mark(run, SAFE, "reject", "<b>Bob</b>") | {"more": 1},
    ]
    foreign_marks = [
        make_mark(run, UNSAFE, "accept") | wrong for wrong in ({"text_id": "x"}, {"by": 1}, {"at": "then"})
    ]
    lines = [
        *map(json.dumps, [*marks, *foreign_marks, 7, None, {}]),
        "<img src=x onerror='window.hacked = 1'>",
        "",
        " ",
    ]
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(lines))
    page.find("#load").send_keys(str(file))
    page.wait(page.find("#loaded").is_displayed)
    assert page.find("#load-result").text == (
        "Marks loaded from given.jsonl: 4. "
        "Lines skipped because they are not marks on responses of this page: 7; keep that file too."
    )
    page.find("#loaded button").click()
    assert page.find("#done").text == "3 of 16 marked"
    downloaded = {mark.text_id: (mark.decision, mark.by) for mark in read_records(page.download(tmp_path), Mark)}
    recipe_1, unknown, _, safe = (mark["text_id"] for mark in marks)
    assert downloaded == {
        recipe_1: ("accept", "Ann"),
        unknown: ("accept", "<b>Bob</b>"),
        safe: ("reject", "<b>Bob</b>"),
    }


def test_browser_asks_before_unsaved_marks_are_lost(page, tmp_path):
    assert not page.asks_before_leaving()
    page.name("Ann")
    page.press("va")
    assert page.asks_before_leaving()
    page.download(tmp_path)
    assert not page.asks_before_leaving()
    page.find("#saved button").click()
    page.press("ku")
    assert page.asks_before_leaving(), "a removed mark is a change too"


def test_page_shows_how_many_responses_are_left_out(browser, run):
    browser.get(pipeline.make_review_page(run, 3).as_uri())
    assert len(Page(browser).all("#list li")) == 3
    scope = Page(browser).find("#scope").text
    assert "the 3 most uncertain of 16" in scope and "13 more certain ones" in scope and "1 malformed" in scope


def test_marks_of_the_run_count_as_marked(browser, run, tmp_path):
    add_marks(run, tmp_path, make_mark(run, SAFE, "reject"), make_mark(run, UNSAFE, "accept"))
    browser.get(pipeline.make_review_page(run, 500).as_uri())
    page = Page(browser)
    assert page.find("#done").text == "2 of 16 marked" and not page.find("#download").is_enabled()
    page.choose("filter", "unmarked")
    assert Counter(page.listed()) == Counter(text for text, _ in PROMPTS if text not in (SAFE, UNSAFE))
    page.name("Ann")
    page.press("va")
    assert page.find("#done").text == "3 of 16 marked" and len(page.listed()) == 13


def test_page_shows_the_verdict_of_each_ensemble_member(browser, tmp_path, monkeypatch):
    labels = {"a:m/x/safe": 0.3, "a:m/x/unsafe": 0.1, "a:m/x/S4": 0.05, "b:n/safe": 0.0, "b:n/unsafe": 0.0}
    labels |= {"b:n/refusal": 0.7, "c/unsafe": 0.2}

    def judge(guard, responses):
        for response in responses:
            fields = {"p_safe": 0.3, "p_unsafe": 0.1, "labels": labels}
            yield Verdict.of(response, guard.name, "unknown", "guards_disagree", **fields)

    monkeypatch.setattr(DoubtfulGuard, "judge", judge)
    run = make_run(tmp_path)
    browser.get(pipeline.make_review_page(run, 1).as_uri())
    facts = dict(fact.text.split("\n") for fact in Page(browser).all("#facts div"))
    assert facts["P(unsafe) of each guard"] == "a:m/x 25.0%, b:n no probability"
    assert facts["label probabilities"] == "b:n/refusal 70.0%, c/unsafe 20.0%, a:m/x/S4 5.0%"


def test_page_of_a_trained_run_warns_that_marks_are_late(page, run):
    assert not page.find("#too-late").is_displayed() and "--responses" not in page.text("saved")
    (run.path / "training").mkdir()
    page.browser.get(pipeline.make_review_page(run, 500).as_uri())
    assert "already been trained" in page.find("#too-late").text
    assert f"--responses {run.path} --marks marks.jsonl --out NEW" in page.text("saved")
