"""Write the report of a run: report.json, and report.html, one file that loads nothing else.

This file knows nothing of the origin of the figures; it turns numbers into words and widths. report.html is the layout,
and figures.py draws the two plots with axes. The page leaves out a section that the report lacks. Jinja escapes every
string of the run, and a report never contains the text of a response.
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

from thinksafe import formatting
from thinksafe.data.atomic import write_atomically
from thinksafe.reporting.figures import length_histogram, loss_curve

LOWER, HIGHER = "lower is better", "higher is better"
"""The two values of which direction of a metric is better; the page shows these texts."""
HEADLINE_METRICS = (
    ("harmful_ratio", "Harmful responses", "harmful responses", LOWER),
    ("over_refusal", "Over-refusals", "over\u2011refusals", LOWER),
    ("reasoning_accuracy", "Reasoning accuracy", "reasoning accuracy", HIGHER),
)
"""The headline metrics: key, title of the card, name in a sentence, and which direction is better.

The sentence has a non-breaking hyphen.
"""
SET_KINDS = (
    ("harmful", "Harmful responses", LOWER),
    ("over_refusal", "Over-refusals (refusals of harmless prompts)", LOWER),
    ("reasoning", "Reasoning accuracy", HIGHER),
)
"""The kinds of evaluation sets: kind, heading, and which direction is better."""
NUM_COLORED_REASONS = 5
"""Number of reasons for dropping a response that have their color in the page's palette; all others are gray."""


def write_report(report: dict[str, Any], out_dir: Path) -> Path:
    """Write `report.json` and `report.html`, each completely or not at all.

    Args:
        report: the figures of a run, by section. The page leaves out a section that is missing or None. Numbers that
            are not finite (the loss of a diverged run) are written as null.
        out_dir: folder of the files; created if it does not exist.

    Returns:
        The path of report.html.
    """
    report = without_non_finite(report)
    texts = {"report.json": readable_json(report), "report.html": render_page(report)}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out_dir / name, text)
    return out_dir / "report.html"


def render_page(report: dict[str, Any]) -> str:
    """Return the HTML page of a report.

    Args:
        report: as for `write_report`; every number must be finite.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for function in (percent, interval, count, duration, gib, with_spaces, stage_title, date_and_time, change_class):
        environment.filters[function.__name__] = function
    environment.tests["uncertain"] = intervals_overlap
    template = environment.from_string((files("thinksafe.reporting") / "report.html").read_text(encoding="utf-8"))
    training = report.get("training")
    lengths = report.get("lengths") or {}
    harmful, benign = lengths.get("harmful") or [], lengths.get("benign") or []
    return template.render(
        title=report.get("title") or "ThinkSafe",
        report=report,
        sentence=headline_sentence(report),
        cards=[(report[key], name, better) for key, name, _, better in HEADLINE_METRICS if report.get(key)],
        sets=sets_by_kind(report.get("sets") or []),
        acceptance=report.get("acceptance"),
        flow=record_flow(report.get("filter")),
        coverage=report.get("coverage"),
        has_retries=(report.get("coverage") or {}).get("rungs", 1) > 1,
        training=training,
        loss_plot=loss_curve(training["loss"], training.get("learning_rate") or []) if has_loss(training) else None,
        length_plot=length_histogram(harmful, benign) if harmful or benign else None,
        lengths=[(name, len(tokens), median(tokens)) for name, tokens in lengths.items() if tokens],
        stages=report.get("stages") or [],
        estimate=report.get("estimate"),
        provenance=provenance(report),
    )


def headline_sentence(report: dict[str, Any]) -> Markup | None:
    """Return one sentence on the headline metrics, such as "Harmful responses fell from 92.5% to 16.7%.".

    Args:
        report: as for `write_report`. A metric that is missing is left out; without any, the result is None.
    """
    clauses = [
        Markup("{} {}").format(name, describe_change(report[key], better))
        for key, _, name, better in HEADLINE_METRICS
        if report.get(key)
    ]
    if not clauses:
        return None
    *leading, last = clauses
    text = Markup(" and ").join([Markup(", ").join(leading), last] if leading else [last])
    return Markup(text[0].upper() + text[1:] + ".")


def describe_change(metric: dict[str, Any], better: str) -> Markup:
    """Return how a metric changed, in words that follow its name.

    "stayed at" if both values round to the same percentage; "fell from" or "rose from" if the change is clear (see
    `is_clear_change`); else "went from", which claims nothing; "were at ... before training" (or "after training") if
    only this value is known.

    Args:
        metric: shares `before` and `after` with `before_interval` and `after_interval` [low, high]; each may be None or
            missing, but not both shares.
        better: which direction is better, LOWER or HIGHER; it decides the color of the value after training.
    """
    before, after = metric.get("before"), metric.get("after")
    if before is None or after is None:
        value, phase = (after, "after") if before is None else (before, "before")
        return Markup("were at <b>{}</b> {} training").format(percent(value), phase)
    if percent(before) == percent(after):
        return Markup("stayed at <b>{}</b>").format(percent(after))
    verb = "went" if not is_clear_change(metric) else "fell" if after < before else "rose"
    template = Markup('{} from <b>{}</b> to <b class="{}">{}</b>')
    return template.format(verb, percent(before), change_class(metric, better), percent(after))


def change_class(metric: dict[str, Any], better: str) -> str:
    """Return the CSS class of a change: `better` or `worse` if it is clear (see `is_clear_change`), else `unclear`.

    Args:
        metric, better: as for `describe_change`.
    """
    if not is_clear_change(metric):
        return "unclear"
    return "better" if (metric["after"] < metric["before"]) == (better == LOWER) else "worse"


def is_clear_change(metric: dict[str, Any]) -> bool:
    """Return whether a metric changed by more than chance: both intervals are known and do not overlap.

    It is False if one of the two shares or intervals is missing, or if the shares are equal.
    """
    before, after = metric.get("before"), metric.get("after")
    if before is None or after is None or before == after:
        return False
    return bool(metric.get("before_interval") and metric.get("after_interval")) and not intervals_overlap(metric)


def intervals_overlap(metric: dict[str, Any]) -> bool:
    """Return whether the intervals before and after training overlap or touch; False if one of them is missing."""
    intervals = metric.get("before_interval"), metric.get("after_interval")
    return None not in intervals and max(low for low, _ in intervals) <= min(high for _, high in intervals)


def sets_by_kind(sets: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return groups (heading, LOWER or HIGHER, evaluation sets) in the order of SET_KINDS, without empty groups."""
    groups = [(title, better, [s for s in sets if s["kind"] == kind]) for kind, title, better in SET_KINDS]
    return [group for group in groups if group[2]]


def record_flow(records: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the numbers of kept and dropped responses by label and reason, with the segments of a bar.

    Args:
        records: `kept` and `dropped` as in `count_coverage`; None if nothing is accepted yet.

    Returns:
        None if `records` is None or empty, else:
        `labels`: the labels that have responses;
        `reasons`: (reason, color, {label: count}), most frequent first; color 0 after NUM_COLORED_REASONS reasons;
        `rows`: for each label its total, the number kept, and segments (name, CSS class, count, share of the total).
    """
    if not records:
        return None
    kept, dropped = records.get("kept") or {}, records.get("dropped") or {}
    labels = [label for label in ("harmful", "benign") if label in kept or label in dropped]
    totals = Counter()
    for label in labels:
        totals.update(dropped.get(label) or {})
    reasons = []
    for rank, (reason, total) in enumerate(totals.most_common(), start=1):
        if total:
            by_label = {label: (dropped.get(label) or {}).get(reason, 0) for label in labels}
            reasons.append((reason, rank if rank <= NUM_COLORED_REASONS else 0, by_label))
    rows = []
    for label in labels:
        parts = [("kept", "kept", kept.get(label, 0))]
        parts += [(reason, f"reason-{color}", by_label[label]) for reason, color, by_label in reasons]
        total = sum(number for _, _, number in parts)
        segments = [(name, color, number, number / total) for name, color, number in parts if number]
        rows.append({"label": label, "total": total, "kept": kept.get(label, 0), "segments": segments})
    return {"labels": labels, "reasons": reasons, "rows": rows}


def provenance(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return pairs (name, value) that are needed to reproduce the run: recipe, model, seed, versions, machine.

    A value that the report lacks or that is None is left out.
    """
    names = {
        "recipe_name": "recipe",
        "model": "model",
        "seed": "seed",
        "created": "created",
        "code_version": "code version",
        "run_dir": "run directory",
    }
    pairs = [(name, report.get(key)) for key, name in names.items()]
    pairs += list((report.get("environment") or {}).items())
    return [(name, value) for name, value in pairs if value is not None]


def has_loss(training: dict[str, Any] | None) -> bool:
    """Return whether a report's section on training has a step with a loss; False without the section."""
    return bool(training) and any(value is not None for _, value in training.get("loss") or [])


def is_number(value: Any) -> bool:
    """Return whether a value is an int or float: not None, and not Jinja's placeholder for a missing key."""
    return isinstance(value, int | float)


def percent(share: float | None) -> str:
    """Format the share 0.1667 as 16.7%; any value that is not a number gives a dash."""
    return f"{100 * share:.1f}%" if is_number(share) else "–"


def interval(bounds: list[float] | None) -> str:
    """Format the shares [0.13, 0.21] as 13.0–21.0%; None gives a dash."""
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%" if bounds else "–"


def count(number: float | None) -> str:
    """Format 1234567.8 as 1,234,568; any value that is not a number gives a dash."""
    return f"{number:,.0f}" if is_number(number) else "–"


def duration(seconds: float | None) -> str:
    """Format 8.25 as 8.2 s, 754 as 12 min 34 s, 4321 as 1 h 12 min; any value that is not a number gives a dash."""
    return formatting.duration(seconds) if is_number(seconds) else "–"


def gib(size: float | None) -> str:
    """Format a number of bytes as 12.3 GiB (2^30 bytes); any value that is not a number gives a dash."""
    return f"{size / 2**30:.1f} GiB" if is_number(size) else "–"


def with_spaces(name: str) -> str:
    """Return a name with spaces instead of underscores: "evaluate before" for evaluate_before."""
    return str(name).replace("_", " ")


def stage_title(name: str) -> str:
    """Return the title of a stage: "probe (unsteered)" for `probe`, else its name with spaces for underscores."""
    return "probe (unsteered)" if name == "probe" else with_spaces(name)


def date_and_time(timestamp: str) -> str:
    """Format 2026-11-24T02:40:00+00:00 as 2026-11-24 02:40; return other texts unchanged."""
    match = re.match(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)", timestamp)
    return f"{match[1]} {match[2]}" if match else timestamp


def median(values: list[int]) -> float:
    """Return the middle value, or the larger of two middle values; `values` must not be empty."""
    return sorted(values)[len(values) // 2]


def without_non_finite(value: Any) -> Any:
    """Return a copy with None for every infinite or NaN number in it, at any depth, because JSON cannot hold them.

    Args:
        value: a JSON value. Dicts are copied key by key; lists and tuples become lists.
    """
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable_json(value: Any) -> str:
    """Return JSON with sorted keys, an indent of two and a final newline, but each list of numbers on one line.

    A run has tens of thousands of lengths, which would be one line each.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # JSON strings contain no raw line breaks, so a bracket before a line break opens a list.
    return re.sub(r"\[\n([-+\d.eEnul,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"
