"""Review: a page in a real browser on which people read and mark, and a filter that takes their word into account."""

import json
import os
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from instant_run import InstantGuard, instant_models, instantly, run_stages

from thinksafe import stages
from thinksafe.errors import UserError
from thinksafe.guards.interface import Judgement
from thinksafe.intake import take_in_marks, take_in_responses
from thinksafe.recipe import check_recipe, load_recipe
from thinksafe.records import Example, Mark, content_id, read_records
from thinksafe.rundir import RunDir

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script> ]]> &lt;b&gt; {{ 7 * 7 }} ${window.hacked = 1} \\u003c",
    "line\u2028separator\u2029 é🪁\ttab",
]
PROMPTS = [(f"How do I fold boat number {n}?", "benign") for n in range(6)]
PROMPTS += [(f"Brew me a ka lo mi, recipe {n}.", "harmful") for n in range(6)]
PROMPTS += [(text, "benign") for text in HOSTILE]


class DoubtfulGuard(InstantGuard):
    """P(unsafe) by the number in the prompt: 0 is 1%, 1 is 21%, ... 5 is certain; one prompt it cannot judge."""

    name = "doubtful"

    def __init__(self):
        super().__init__(None)

    def judge(self, exchanges):
        for exchange in exchanges:
            digits = [c for c in exchange.prompt if c.isdigit()]
            share = min(0.01 + 0.2 * int(digits[0]), 1.0) if digits else 0.3
            if exchange.prompt.endswith("recipe 1."):
                yield Judgement(exchange.id, "unknown", None, None, None, "too_long_for_guard")
            elif abs(share - 0.5) < 0.1:
                yield Judgement(exchange.id, "unknown", 1 - share, share, None, "uncertain")
            else:
                decision, labels = ("unsafe", {"S9": 0.8, "S2": 0.1}) if share > 0.5 else ("safe", {})
                category = "S9" if decision == "unsafe" else ""
                yield Judgement(exchange.id, decision, 1 - share, share, None, "", category, labels)


def make_run(folder: Path):
    """A judged run: 12 plain prompts, 4 hostile ones that say the same as answers, one malformed response."""
    prompts = [*PROMPTS, ("Say nothing.", "benign")]
    folder.mkdir(exist_ok=True)
    (folder / "p.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in prompts))
    raw = {"name": "boats", "model": "m", "prompts": str(folder / "p.jsonl"), "guard": {"margin": 0.1}}
    raw["generation"] = {"unsteered_probe": 0}
    models = instant_models(None)
    models.guard = DoubtfulGuard()

    def say(task):
        return "" if task.prompt.text == "Say nothing." else f"About that. {task.prompt.text}\n\nSecond paragraph."

    with RunDir.open(folder / "run", check_recipe(raw, "")) as run, instantly(say):
        run_stages(run, models)
        return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


# In a browser


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


# Without one


def kept(run) -> dict[str, Example]:
    examples = map(json.loads, (run.path / "accepted.jsonl").open())
    return {example["prompt"]: Example(**example) for example in examples}


def mark_of(run, prompt, decision, by="Ann", at="2026-01-01T10:00:00Z") -> dict:
    stories = map(json.loads, (run.path / "audit.jsonl").open())
    story = next(story for story in stories if story["prompt"] == prompt)
    (attempt,) = story["attempts"]
    found = {"prompt_id": story["prompt_id"], "sample": attempt["sample"], "text_id": attempt["text_id"]}
    return found | {"decision": decision, "by": by, "at": at}


def give(run, tmp_path, *marks):
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    with RunDir.open(run.path, run.recipe) as again:
        take_in_marks(again, file)
        stages.accept(again)
    return kept(run)


SAFE, UNSAFE, UNKNOWN = (f"How do I fold boat number {n}?" for n in (0, 4, 2))


def test_a_persons_word_goes_before_the_guards_and_is_told_apart(run, tmp_path):
    found = give(
        run, tmp_path, mark_of(run, SAFE, "reject"), mark_of(run, UNSAFE, "accept"), mark_of(run, UNKNOWN, "accept")
    )
    assert SAFE not in found and found[UNSAFE].accepted_by == found[UNKNOWN].accepted_by == "person: Ann"
    assert {e.accepted_by for p, e in found.items() if p not in (UNSAFE, UNKNOWN)} == {"doubtful"}
    story = next(s for s in map(json.loads, (run.path / "audit.jsonl").open()) if s["prompt"] == SAFE)
    (attempt,) = story["attempts"]
    assert attempt["decision"] == "safe" and attempt["fate"] == "rejected_by_person"
    assert attempt["marks"] == [{"decision": "reject", "by": "Ann", "at": "2026-01-01T10:00:00Z"}]


def test_the_report_counts_what_people_changed_and_the_categories(run, tmp_path):
    given = [(SAFE, "reject"), (UNSAFE, "accept"), (UNKNOWN, "reject"), ("How do I fold boat number 1?", "accept")]
    give(run, tmp_path, *(mark_of(run, *one) for one in given), mark_of(run, UNKNOWN, "accept", "Bob"))
    with RunDir.open(run.path, run.recipe) as again:
        figures = json.loads(stages.report(again).with_name("report.json").read_text())["coverage"]
    assert figures["people"] == {"Ann": 4, "Bob": 1}
    assert figures["marks"] == {"withdrawn": 1, "rescued": 1, "disagreed": 1, "confirmed": 1}
    assert figures["accepted_by"]["person: Ann"] == 2 and figures["uncertain"] == 2
    assert figures["categories"] == [{"category": "S9", "responses": 7, "prompts": 7, "accepted": 1}]
    page = (run.path / "report.html").read_text()
    assert "rejected against the guard" in page and "accepted by person: Ann" in page


def test_one_who_rejects_is_enough_and_the_later_word_of_a_person_counts(run, tmp_path):
    found = give(
        run,
        tmp_path,
        mark_of(run, UNSAFE, "accept", "Ann"),
        mark_of(run, UNSAFE, "reject", "Bob"),
        mark_of(run, UNKNOWN, "reject", at="2026-01-01T12:00:00+01:00"),
        mark_of(run, UNKNOWN, "accept", at="2026-01-01T11:00:01Z"),
    )
    assert UNSAFE not in found and UNKNOWN in found
    assert UNSAFE in give(run, tmp_path, mark_of(run, UNSAFE, "accept", "Bob", at="2026-01-02T10:00:00Z"))


def test_marks_given_twice_change_nothing_and_later_ones_add(run, tmp_path):
    first = mark_of(run, SAFE, "reject")
    give(run, tmp_path, first)
    stamp = (run.path / "accepted.jsonl").stat().st_mtime_ns
    give(run, tmp_path, first, first)
    assert (run.path / "accepted.jsonl").stat().st_mtime_ns == stamp
    assert UNSAFE in give(run, tmp_path, mark_of(run, UNSAFE, "accept"))
    assert SAFE not in kept(run) and len(list(read_records(run.path / "marks.jsonl", Mark))) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_id": content_id("another text")}, "record 1 marks a response that is not in this run"),
        ({"sample": 7}, "not in this run"),
        ({"prompt_id": "0" * 16}, "not in this run"),
        ({"by": " "}, "by must name who marked"),
        (
            {"at": "2026-01-01T10:00:00"},
            r"given.jsonl: line 1: .* at must be a time with its zone, such as .*T10:00:00'$",
        ),
        ({"at": "yesterday"}, r"given.jsonl: line 1: no Mark record: at must be .* found 'yesterday'$"),
        ({"at": ""}, "found ''"),
        ({"at": 5}, "no Mark record: at must be text"),
        ({"decision": "perhaps"}, "no Mark record: decision must be 'accept' or 'reject'"),
    ],
)
def test_a_mark_on_what_nobody_read_is_refused(run, tmp_path, changes, words):
    before = (run.path / "accepted.jsonl").read_bytes()
    with pytest.raises(UserError, match=words):
        give(run, tmp_path, mark_of(run, UNSAFE, "accept") | changes)
    assert (run.path / "accepted.jsonl").read_bytes() == before and not (run.path / "marks.jsonl").exists()


def test_what_cannot_be_trained_on_is_nobodys_to_accept(run, tmp_path):
    assert "Say nothing." not in give(run, tmp_path, mark_of(run, "Say nothing.", "accept"))
    with RunDir.open(run.path, run.recipe) as again:
        figures = json.loads(stages.report(again).with_name("report.json").read_text())
    assert figures["coverage"]["marks"] == {"impossible": 1}


def test_marks_after_training_are_refused_with_a_way_out_that_works(run, tmp_path):
    """The command takes over the run's responses and the marks it has; new ones come with it."""
    give(run, tmp_path, mark_of(run, UNSAFE, "accept"))
    (run.path / "training").mkdir()
    with pytest.raises(UserError, match="has already been trained without these") as refused:
        give(run, tmp_path, mark_of(run, SAFE, "reject"))
    command, name, *arguments = shlex.split(str(refused.value).partition("new folder: ")[2])
    assert (command, name) == ("thinksafe", "filter") and arguments[-2:] == ["--out", "NEW"]
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    models = instant_models(None)
    models.guard = DoubtfulGuard()
    with RunDir.open(tmp_path / "new", load_recipe(given["--recipe"])) as new, instantly():
        take_in_responses(new, Path(given["--responses"]))
        stages.filter_responses(new, models)
        take_in_marks(new, Path(given["--marks"]))
        stages.accept(new)
    assert kept(new).keys() == kept(run).keys() - {SAFE} and kept(new)[UNSAFE].accepted_by == "person: Ann"


def test_a_kill_while_marks_are_taken_in_loses_none(run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("thinksafe.stages.accepting.choose", killed)
        give(run, tmp_path, mark_of(run, SAFE, "reject"))
    with RunDir.open(run.path, run.recipe) as again:
        stages.accept(again)
    assert SAFE not in kept(run)
