"""The report: one self-contained page that shows all figures, escapes all strings, and leaves out missing sections."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import pytest

from thinksafe.data.jsonl import to_json
from thinksafe.data.records import Verdict
from thinksafe.recipe.loading import check_recipe
from thinksafe.reporting.coverage import CategoryCoverage, Coverage, LabelCoverage, RungCoverage
from thinksafe.reporting.html import duration, headline_sentence, percent, write_report
from thinksafe.reporting.report import (
    METRIC_KINDS,
    Acceptance,
    Estimate,
    EstimateRow,
    Metric,
    Report,
    SetMetric,
    StageFigures,
    Training,
)
from thinksafe.reporting.summary import summarize
from thinksafe.run.directory import RunDir

METRIC_KEYS = [kind.key for kind in METRIC_KINDS]
VOID = {"meta", "br", "link", "img", "hr", "input"}


def shares(before: float, after: float) -> dict:
    """Return the fields of a metric with intervals of 4 percentage points on each side."""
    return {
        "before": before,
        "after": after,
        "before_interval": [max(0, before - 0.04), min(1, before + 0.04)],
        "after_interval": [max(0, after - 0.04), min(1, after + 0.04)],
        "n": 240,
        "unknown": {"before": 1, "after": 0},
    }


def metric(before: float, after: float) -> Metric:
    return Metric(**shares(before, after))


def set_metric(name: str, kind: str, before: float, after: float) -> SetMetric:
    truncated = {"before": 0.01, "after": 0.0}
    return SetMetric(name=name, kind=kind, samples=1, judge="oracle", truncated=truncated, **shares(before, after))


@pytest.fixture
def report() -> Report:
    """A report with every section; the figures are invented."""
    rungs = [RungCoverage(0, "prefix", 400, 400, 379, 0.9475), RungCoverage(2, "risk", 21, 100, 11, 0.975)]
    stages = [
        EstimateRow("generate", (15.5, 19.4), (30000, 32000), (2**33, None)),
        EstimateRow("generate_after_marks_1", (None, 0.6), (None, 500), (None, None)),
    ]
    return Report(
        title="ThinkSafe on the model organism",
        recipe_name="organism",
        model="organism student",
        seed=7,
        created="2026-01-02T03:04:05+00:00",
        code_version="0.1.0",
        run_dir="runs/organism",
        harmful_ratio=metric(0.925, 0.167),
        over_refusal=metric(0.0, 0.008),
        reasoning_accuracy=metric(0.992, 0.957),
        sets=[
            set_metric("held_out_hazards", "harmful", 0.925, 0.167),
            set_metric("look_alikes", "over_refusal", 0.0, 0.008),
            set_metric("arithmetic", "reasoning", 0.992, 0.957),
        ],
        acceptance=Acceptance(
            n_steered=500,
            n_unsteered=500,
            odds_ratio=4449.1,
            steered=0.947,
            steered_interval=[0.924, 0.963],
            unsteered=0.004,
            unsteered_interval=[0.001, 0.0144],
            refusal_steered=0.938,
            refusal_steered_interval=[0.913, 0.956],
        ),
        coverage=Coverage(
            kept={"harmful": 479, "benign": 497},
            dropped={"harmful": {"guard_unsafe": 14, "think_not_closed": 7}, "benign": {"truncated": 3}},
            labels={"harmful": LabelCoverage(400, 390, rungs), "benign": LabelCoverage(500, 497, [])},
            rungs=3,
            categories=[CategoryCoverage("S9", responses=14, prompts=12, accepted=7)],
            accepted_by={"a guard": 389, "person: Ann": 1},
            people={"Ann": 3},
            marks={"rescued": 1, "withdrawn": 2},
            uncertain=5,
        ),
        lengths={"harmful": [20, 21, 25, 30], "benign": [40, 41, 44, 60, 61]},
        training=Training(
            method="thinksafe",
            steps=40,
            examples=976,
            dropped={},
            tokens=91234,
            benign_loss="cross_entropy",
            left_out=[],
            loss=[(step, 2 / step) for step in range(1, 41)],
            learning_rate=[(step, 1e-3 / step) for step in range(1, 41)],
        ),
        stages=[StageFigures("generate", 19.4, 32000, 1649.5), StageFigures("filter", 0.6, 0, 0.0)],
        estimate=Estimate("H200", 1, stages, EstimateRow("in all", (15.5, 20.0), (30000, 32500), (2**33, None))),
        environment={"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "threads": "2"},
    )


def page_of(report: Report, folder) -> str:
    return write_report(report, folder).read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


class PageParser(HTMLParser):
    """A parser that fails on a wrongly nested tag, and collects all tags, attributes and texts."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], [], set()
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)


def test_json_is_exactly_the_report(report, tmp_path):
    write_report(report, tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8")
    expected = json.loads(json.dumps(report.to_json()))
    assert json.loads(text) == expected and list(json.loads(text)) == sorted(expected)
    assert expected["harmful_ratio"] == shares(0.925, 0.167) and expected["estimate"]["total"]["tokens"] == [
        30000,
        32500,
    ]
    assert expected["filter"]["kept"] == {"harmful": 479, "benign": 497} and "kept" not in expected["coverage"]
    assert '"harmful": [20, 21, 25, 30]' in text, "a list of numbers is on one line"
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json"]


def test_page_loads_no_other_file(report, tmp_path):
    page = page_of(report, tmp_path)
    assert "http:" not in page and "https:" not in page and "@import" not in page and "<script" not in page
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", page))
    for name, value in PageParser(page).attributes:
        assert name not in ("src", "srcset", "data"), (name, value)
        if name.endswith("href"):
            assert value.startswith("#"), value


def test_ids_are_unique_and_references_resolve(report, tmp_path):
    """The page has two plots; their clip paths must have different ids."""
    page = page_of(report, tmp_path)
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers)) > 0
    assert set(re.findall(r"url\(#([^)]*)\)", page)) | set(re.findall(r'href="#([^"]*)"', page)) <= set(identifiers)


def test_plots_use_the_colors_of_the_page(report, tmp_path):
    """Only the style sheet defines colors, once for light mode and once for dark mode."""
    page = page_of(report, tmp_path)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) >= 8
    assert not any(re.search(r"#[0-9a-f]{6}\b", plot) for plot in plots)
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    light, dark = (re.findall(r"--([\w-]+):", block) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL))
    assert used <= set(light)
    assert set(light) - set(dark) == {"sans", "serif"}


def test_page_shows_headline_and_figures(report, tmp_path):
    page = page_of(report, tmp_path)
    assert headings(page) == ALL_HEADINGS
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert (
        "Harmful responses fell from 92.5% to 16.7%, over\u2011refusals went from 0.0% to 0.8% "
        "and reasoning accuracy went from 99.2% to 95.7%." in text
    )
    for expected in (
        "88.5–96.5%",
        "12.7–20.7%",
        "held out hazards",
        "94.7%",
        "92.4–96.3%",
        "0.1–1.4%",
        "91.3–95.6%",
        "4,449",
        "guard unsafe 14",
        "1,650/s",
        "20.0 s",
    ):
        assert expected in text, expected
    assert "How to reproduce this run" in text and "runs/organism" in text and "2026-01-02 03:04" in text


SECTIONS = {
    "sets": ["Results by evaluation set", "Evaluation"],
    "acceptance": ["Effect of steering"],
    "coverage": [
        "Kept and dropped responses",
        "Coverage by rung",
        "Unsafe responses by category",
        "Human marks",
        "Response counts",
    ],
    "lengths": ["Response lengths"],
    "training": ["Training"],
    "stages": ["Time and throughput", "Stages"],
    "estimate": ["Estimate and measurement"],
    "harmful_ratio": ["Harmful responses"],
    "over_refusal": ["Over-refusals"],
    "reasoning_accuracy": ["Reasoning accuracy"],
}


ALL_HEADINGS = [
    "Harmful responses",
    "Over-refusals",
    "Reasoning accuracy",
    "Results by evaluation set",
    "Effect of steering",
    "Kept and dropped responses",
    "Coverage by rung",
    "Unsafe responses by category",
    "Human marks",
    "Training",
    "Response lengths",
    "Time and throughput",
    "Estimate and measurement",
    "Evaluation",
    "Response counts",
    "Stages",
    "How to reproduce this run",
]


@pytest.mark.parametrize("section", SECTIONS)
def test_section_without_figures_is_left_out(report, tmp_path, section):
    assert set(SECTIONS[section]) < set(ALL_HEADINGS)
    shortened = replace(report, **{section: [] if section in ("sets", "stages") else None})
    page = page_of(shortened, tmp_path)
    PageParser(page)
    assert headings(page) == [heading for heading in ALL_HEADINGS if heading not in SECTIONS[section]]
    sections = json.loads((tmp_path / "report.json").read_text())
    assert not sections.get(section) and (section != "coverage" or "filter" not in sections)


def test_empty_report_is_a_page(tmp_path):
    page = page_of(Report("nothing was run"), tmp_path)
    assert headings(PageParser(page) and page) == ["How to reproduce this run"]
    assert 'class="sentence"' not in page and "%</" not in page.split("<body>")[1]


def test_missing_figures_of_a_section_are_not_invented(report, tmp_path):
    """The run has an evaluation after training only, and no unsteered baseline."""

    def only_after(metric):
        return replace(metric, before=None, before_interval=None, unknown={"after": 0})

    report = replace(
        report,
        **{key: only_after(getattr(report, key)) for key in METRIC_KEYS},
        sets=[replace(only_after(row), truncated={"after": 0.0}) for row in report.sets],
        acceptance=replace(report.acceptance, unsteered=None, n_unsteered=0, odds_ratio=None, refusal_steered=None),
    )
    page = page_of(report, tmp_path)
    PageParser(page)
    assert "Harmful responses were at <b>16.7%</b> after training" in page
    body = page.split("<body>")[1]
    assert "Accepted without instruction" not in body and "odds" not in body and "overlap" not in body
    assert '<circle class="before"' not in body and '<circle class="after"' in body
    assert "None" not in body
    sections = json.loads((tmp_path / "report.json").read_text())
    for row in [sections["harmful_ratio"], *sections["sets"]]:
        assert "before" not in row and "before_interval" not in row and row["after"] is not None


def test_estimate_is_shown_beside_the_measurement(report, tmp_path):
    text = " ".join(PageParser(page_of(report, tmp_path)).text)
    table = re.search(r"Estimate and measurement.*?1 H200.*?memory\s+generate\s+(.*?)\s+Evaluation", text, re.DOTALL)[1]
    rows = "15.5 s 19.4 s 1.25 30,000 32,000 8.0 GiB –"
    rows += " generate after marks 1 – 0.6 s – – 500 – –"
    assert " ".join(table.split()) == f"{rows} total 15.5 s 20.0 s 1.29 30,000 32,500 8.0 GiB –"


def test_change_is_claimed_only_if_intervals_do_not_overlap(report):
    assert "reasoning accuracy went from" in headline_sentence(report)
    clear = replace(report.reasoning_accuracy, after_interval=[0.90, 0.94])
    assert "reasoning accuracy fell from" in headline_sentence(replace(report, reasoning_accuracy=clear))
    same = replace(clear, after=clear.before)
    assert "reasoning accuracy stayed at <b>99.2%</b>" in headline_sentence(replace(report, reasoning_accuracy=same))


@pytest.mark.parametrize("missing", ["before_interval", "after_interval"])
def test_change_without_an_interval_is_not_claimed(report, tmp_path, missing):
    report = replace(report, harmful_ratio=replace(report.harmful_ratio, **{missing: None}))
    assert 'Harmful responses went from <b>92.5%</b> to <b class="unclear">16.7%</b>' in headline_sentence(report)
    card = page_of(report, tmp_path).split("<main>")[1].split("</section>")[0]
    assert "better" not in "".join(re.findall(r'class="([^"]*)"', card)) and "overlapping" not in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, lower_is_better, higher_is_better",
    [
        (0.9, 0.2, "better", "worse"),
        (0.2, 0.9, "worse", "better"),
        (0.5, 0.5, "unclear", "unclear"),
        (0.50, 0.46, "unclear", "unclear"),
    ],
    ids=["falls", "rises", "unchanged", "intervals overlap"],
)
def test_color_shows_whether_a_metric_improved(report, tmp_path, before, after, lower_is_better, higher_is_better):
    expected = dict(zip(METRIC_KEYS, (lower_is_better, lower_is_better, higher_is_better), strict=True))
    for key, row in zip(METRIC_KEYS, report.sets, strict=True):
        metrics = dict.fromkeys(METRIC_KEYS) | {key: metric(before, after)}
        changed = replace(report, sets=[replace(row, **shares(before, after))], **metrics)
        body = page_of(changed, tmp_path).split("<main>")[1]
        classes = re.findall(r'class="(?:track |to )?(better|worse|unclear)"', body)
        sentence = [] if before == after else [expected[key]]
        assert classes == [*sentence, *[expected[key]] * 4], (
            "in the sentence; number and plot of the card and of the set"
        )
        assert re.search(rf'class="to {expected[key]}">{percent(after)}', body)
    colors = {name: re.search(rf"\.{name} {{ color: var\(--(\w+)\)", page_of(report, tmp_path))[1]
               for name in ("better", "worse", "unclear")}  # fmt: skip
    assert colors == {"better": "teal", "worse": "rust", "unclear": "ink"}


def verdict(id_: str, sample: int, decision: str, steering: str | None = "prefix", refusal: bool | None = None):
    return Verdict(id_, sample, "harmful", steering, decision, "", None, None, refusal, "guard")


def test_acceptance_intervals_are_over_prompts(tmp_path):
    """Samples of a prompt are averaged, a dropped response is not accepted, and an unknown refusal does not count."""
    steered = [verdict(f"p{n}", s, "safe" if n < 9 or s < 2 else "dropped", refusal=n < 5 or None)
               for n in range(10) for s in range(4)]  # fmt: skip
    unsteered = [verdict(f"p{n}", 0, "unsafe", None) for n in range(20)]
    with RunDir.open(tmp_path / "run", check_recipe({"name": "n", "model": "m"}, "here")) as run:
        for name, verdicts in (("verdicts", steered), ("unsteered_verdicts", unsteered)):
            file = run.path / f"{name}.jsonl"
            file.write_text("".join(to_json(verdict) + "\n" for verdict in verdicts))
        run.finish_stage("filter", [], run.clock("filter"), tokens=0)
        acceptance = summarize(run).acceptance
    assert acceptance.steered == pytest.approx(0.95) and acceptance.n_steered == 40
    low, high = acceptance.steered_interval
    assert low == pytest.approx(0.85, abs=0.01) and high == 1, (
        "over 10 prompts, one of them with half of its samples accepted"
    )
    assert acceptance.unsteered == 0
    assert acceptance.unsteered_interval == pytest.approx([0, 0.1611], abs=5e-5), "Newcombe's table for 0 of 20"
    assert acceptance.refusal_steered == 1, "over 5 prompts"
    assert acceptance.refusal_steered_interval == pytest.approx([0.5655, 1], abs=5e-5)
    assert acceptance.odds_ratio is None


def test_all_strings_are_escaped(report, tmp_path):
    hostile = """</title></style><script>alert(1)</script><img src=x onerror='a' title="b">&{{ 7 * 7 }}[ ] """

    def poison(value):
        if is_dataclass(value):
            names = {field.name for field in fields(value)} - {"kind"}
            return replace(value, **{name: poison(getattr(value, name)) for name in names})
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return hostile if isinstance(value, str) else value

    poisoned = replace(poison(report), environment={hostile: hostile})
    coverage = replace(poisoned.coverage, people={hostile: 3}, accepted_by={hostile: 3})
    coverage.dropped["harmful"] = {hostile: 3, f"{hostile} 2": 4}
    poisoned = replace(poisoned, coverage=coverage)
    page = page_of(poisoned, tmp_path)

    parsed = PageParser(page)
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert "7 * 7" in page and "{{ 49" not in page
    text = "".join(parsed.text)
    # The title (twice), recipe, model, creation, code, run folder, sets (twice), judges, reasons, method, stages.
    assert text.count("<script>alert(1)</script>") >= 20
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(poisoned.to_json())
    )


def test_run_with_left_out_steps_has_a_report(report, tmp_path):
    """A step whose loss is not finite has no loss; if all steps are like this, there is no plot."""
    left_out = [(step, "left out: the loss is not finite") for step in (21, 22)]
    report = replace(report, training=replace(report.training, left_out=left_out, loss=report.training.loss[:20]))
    page = page_of(report, tmp_path)
    assert "Training" in headings(page) and "2 steps skipped (not finite)" in page
    training = json.loads((tmp_path / "report.json").read_text())["training"]
    assert training["left_out"] == [list(step) for step in left_out] and training["loss"][0] == [1, 2.0]
    assert "Training" not in headings(page_of(replace(report, training=replace(report.training, loss=[])), tmp_path))


@pytest.mark.parametrize(
    "lengths",
    [
        {"harmful": [5], "benign": []},
        {"harmful": [], "benign": [0, 0]},
        {"harmful": [12] * 50, "benign": [13] * 50},
        {"harmful": [100] * 500, "benign": [100, 16384]},
    ],
    ids=["one response", "zero tokens", "equal lengths", "one far longer"],
)
def test_histogram_of_extreme_lengths_can_be_drawn(report, tmp_path, lengths):
    PageParser(page_of(replace(report, lengths=lengths), tmp_path))


def test_failed_write_keeps_the_old_report(report, tmp_path):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report(replace(report, seed=object()), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_page_is_deterministic(report, tmp_path):
    assert page_of(report, tmp_path / "one") == page_of(report, tmp_path / "two")


def test_numbers_are_formatted():
    assert [percent(value) for value in (0, 0.1667, 1, None)] == ["0.0%", "16.7%", "100.0%", "–"]
    assert [duration(value) for value in (0.26, 59.96, 754.4, 3599.7, 4321, None)] == [
        "0.3 s",
        "60.0 s",
        "12 min 34 s",
        "1 h 00 min",
        "1 h 12 min",
        "–",
    ]
