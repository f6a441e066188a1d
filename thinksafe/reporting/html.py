"""Writes a finished run's report: report.json, and report.html with everything that it shows inside the one file.

Knows nothing of how figures came about; a section that the report lacks is left out of the page, never invented. Here
numbers become words and widths; what the page looks like stands in report.html, the two plots with axes in figures.py.
Every string of a run passes Jinja's escaping, and no response text is ever part of a report.
"""

import json
import math
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from thinksafe import formatting as display
from thinksafe.data.atomic import write_atomically
from thinksafe.reporting.figures import length_histogram, loss_curve

LOWER, HIGHER = "lower is better", "higher is better"
# The three figures of the headline: key, what its card says, what a sentence calls it, and which way is better.
HEADLINE = (
    ("harmful_ratio", "Harmful answers", "harmful answers", LOWER),
    ("over_refusal", "Needless refusals", "needless refusals", LOWER),
    ("reasoning_accuracy", "Reasoning accuracy", "reasoning accuracy", HIGHER),
)
KINDS = (
    ("harmful", "Harmful answers", LOWER),
    ("over_refusal", "Refusals of harmless prompts", LOWER),
    ("reasoning", "Reasoning accuracy", HIGHER),
)
# Reasons for dropping a record that get a colour of their own; the page's palette has as many. The rest share a grey.
COLOURED_REASONS = 5


def write_report(report: dict[str, Any], out_dir: Path) -> Path:
    """Writes `report.json` and `report.html` into `out_dir`, each complete or not at all.

    Args:
        report: the figures of a run, by section; a section that is missing or None is left out of the page. Numbers
            that are not finite (the loss of a run that diverged) are written as null.
        out_dir: is made if it does not exist.

    Returns:
        The path of the page.
    """
    report = without_non_finite(report)
    texts = {"report.json": readable_json(report), "report.html": render(report)}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out_dir / name, text)
    return out_dir / "report.html"


def render(report: dict[str, Any]) -> str:
    """The page for a report; see `write_report`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for show in (percent, interval, count, duration, gib, words, when, change):
        environment.filters[show.__name__] = show
    environment.tests["uncertain"] = intervals_overlap
    template = environment.from_string((files("thinksafe.reporting") / "report.html").read_text(encoding="utf-8"))
    training = report.get("training")
    lengths = report.get("lengths") or {}
    harmful, benign = lengths.get("harmful") or [], lengths.get("benign") or []
    return template.render(
        title=report.get("title") or "ThinkSafe",
        report=report,
        sentence=headline_sentence(report),
        cards=[(report[key], name, better) for key, name, _, better in HEADLINE if report.get(key)],
        sets=sets_by_kind(report.get("sets") or []),
        acceptance=report.get("acceptance"),
        flow=flow(report.get("filter")),
        coverage=report.get("coverage"),
        climbed=(report.get("coverage") or {}).get("rungs", 1) > 1,
        training=training,
        loss_plot=loss_curve(training["loss"], training.get("learning_rate") or []) if has_points(training) else None,
        length_plot=length_histogram(harmful, benign) if harmful or benign else None,
        lengths=[(name, len(tokens), median(tokens)) for name, tokens in lengths.items() if tokens],
        stages=report.get("stages") or [],
        estimate=report.get("estimate"),
        provenance=provenance(report),
    )


def headline_sentence(report: dict[str, Any]) -> Markup | None:
    """The run in one sentence: "Harmful answers fell from 92.5% to 16.7% and reasoning accuracy stayed at 99.2%." """
    clauses = [
        Markup("{} {}").format(name, movement(report[key], better))
        for key, _, name, better in HEADLINE
        if report.get(key)
    ]
    if not clauses:
        return None
    *first, last = clauses
    text = Markup(" and ").join([Markup(", ").join(first), last] if first else [last])
    return Markup(text[0].upper() + text[1:] + ".")


def movement(metric: dict[str, Any], better: str) -> Markup:
    """How a figure changed: it fell or rose only where the intervals before and after are apart."""
    before, after = metric.get("before"), metric.get("after")
    if before is None or after is None:
        known, moment = (after, "after") if before is None else (before, "before")
        return Markup("stood at <b>{}</b> {} training").format(percent(known), moment)
    if percent(before) == percent(after):
        return Markup("stayed at <b>{}</b>").format(percent(after))
    verb = "went" if intervals_overlap(metric) else "fell" if after < before else "rose"
    said = Markup('{} from <b>{}</b> to <b class="{}">{}</b>')
    return said.format(verb, percent(before), change(metric, better), percent(after))


def change(metric: dict[str, Any], better: str) -> str:
    """`better` or `worse`, the colour a figure gets; `unclear` where it did not move or the intervals overlap."""
    before, after = metric.get("before"), metric.get("after")
    if before is None or after is None or before == after or intervals_overlap(metric):
        return "unclear"
    return "better" if (after < before) == (better == LOWER) else "worse"


def intervals_overlap(metric: dict[str, Any]) -> bool:
    """Whether the intervals before and after share a value; False where one of them is missing."""
    intervals = metric.get("before_interval"), metric.get("after_interval")
    return None not in intervals and max(low for low, _ in intervals) <= min(high for _, high in intervals)


def sets_by_kind(sets: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Evaluation sets in groups (heading, which way is better, sets), in the order of KINDS."""
    groups = [(title, better, [s for s in sets if s["kind"] == kind]) for kind, title, better in KINDS]
    return [group for group in groups if group[2]]


def flow(records: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where the generated records of each label went: segments of a bar, and the reasons with their counts.

    Returns:
        `reasons`: (reason, colour, {label: count}), most frequent first, colour 0 for those past COLOURED_REASONS;
        `rows`: for each label its total, what was kept, and segments (name, colour, count, share of the total).
    """
    if not records:
        return None
    kept, dropped = records.get("kept") or {}, records.get("dropped") or {}
    labels = [label for label in ("harmful", "benign") if label in kept or label in dropped]
    totals = Counter()
    for label in labels:
        totals.update(dropped.get(label) or {})
    reasons = []
    for place, (reason, total) in enumerate(totals.most_common(), start=1):
        if total:
            by_label = {label: (dropped.get(label) or {}).get(reason, 0) for label in labels}
            reasons.append((reason, place if place <= COLOURED_REASONS else 0, by_label))
    rows = []
    for label in labels:
        parts = [("kept", "kept", kept.get(label, 0))]
        parts += [(reason, f"reason-{colour}", by_label[label]) for reason, colour, by_label in reasons]
        total = sum(number for _, _, number in parts)
        segments = [(name, colour, number, number / total) for name, colour, number in parts if number]
        rows.append({"label": label, "total": total, "kept": kept.get(label, 0), "segments": segments})
    return {"labels": labels, "reasons": reasons, "rows": rows}


def provenance(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """What one needs to know to repeat the run, as pairs (name, value); unknown values are left out."""
    names = {
        "recipe_name": "recipe",
        "model": "model",
        "seed": "seed",
        "created": "created",
        "code_version": "code",
        "run_dir": "run directory",
    }
    pairs = [(name, report.get(key)) for key, name in names.items()]
    pairs += list((report.get("environment") or {}).items())
    return [(name, value) for name, value in pairs if value is not None]


def has_points(training: dict[str, Any] | None) -> bool:
    """Whether there is a loss to draw."""
    return bool(training) and any(value is not None for _, value in training.get("loss") or [])


def is_number(value: Any) -> bool:
    """False for None and for what Jinja passes where a report lacks a figure."""
    return isinstance(value, int | float)


def percent(share: float | None) -> str:
    """0.1667 as 16.7%; a dash where there is no figure."""
    return f"{100 * share:.1f}%" if is_number(share) else "–"


def interval(bounds: list[float] | None) -> str:
    """[0.13, 0.21] as 13.0–21.0%."""
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%" if bounds else "–"


def count(number: float | None) -> str:
    """1234567.8 as 1,234,568; a dash where there is no figure."""
    return f"{number:,.0f}" if is_number(number) else "–"


def duration(seconds: float | None) -> str:
    """8.25 as 8.2 s, 754 as 12 min 34 s, 4321 as 1 h 12 min; a dash where there is no figure."""
    return display.duration(seconds) if is_number(seconds) else "–"


def gib(size: float | None) -> str:
    """Bytes as 12.3 GiB; a dash where there is no figure."""
    return f"{size / 2**30:.1f} GiB" if is_number(size) else "–"


def words(name: str) -> str:
    """evaluate_before as "evaluate before"."""
    return str(name).replace("_", " ")


def when(moment: str) -> str:
    """2026-11-24T02:40:00+00:00 as 2026-11-24 02:40; anything else as it is."""
    match = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", moment)
    return f"{match[1]} {match[2]}" if match else moment


def median(values: list[int]) -> float:
    """The middle value, the upper one of two."""
    return sorted(values)[len(values) // 2]


def without_non_finite(value: Any) -> Any:
    """A copy in which None stands for every number that is infinite or not a number: JSON has no word for those."""
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable_json(value: Any) -> str:
    """Sorted, indented JSON with each list of plain numbers on one line: a run has tens of thousands of lengths."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Strings hold no raw line breaks in JSON, so a bracket before one is a list.
    return re.sub(r"\[\n([-+\d.eEnul,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"
