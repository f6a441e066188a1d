"""Write the report of a run: report.json, and report.html, one file that loads nothing else.

This file turns figures into words and widths; report.html and report.css are the layout, and figures.py draws the two
plots with axes. Jinja escapes every string of the run, and a report never contains the text of a response.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup

from thinksafe import formatting
from thinksafe.data.atomic import write_atomically
from thinksafe.reporting.coverage import Coverage
from thinksafe.reporting.figures import length_histogram, loss_curve
from thinksafe.reporting.report import LOWER, METRIC_KINDS, Metric, Report

NUM_COLORED_REASONS = 5
"""Number of reasons for dropping a response that have their color in the page's palette; all others are gray."""


def write_report(report: Report, out_dir: Path) -> Path:
    """Write report.json and report.html, each completely or not at all, and return the path of report.html.

    Args:
        out_dir: folder of the files; created if it does not exist.
    """
    texts = {"report.json": readable_json(report.to_json()), "report.html": render_page(report)}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out_dir / name, text)
    return out_dir / "report.html"


def render_page(report: Report) -> str:
    """Return the HTML page of a report."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent,
        "interval": lambda bounds: f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%" if bounds else "–",
        "count": _number_format("{:,.0f}".format),
        "duration": duration,
        "width": "{:.2%}".format,
        "bold": Markup("<b>{}</b>").format,
        "gib": _number_format(lambda size: f"{size / 2**30:.1f} GiB"),
        "stage_title": lambda name: "probe (unsteered)" if name == "probe" else name.replace("_", " "),
        "change_class": change_class,
    }
    folder, lengths, training = files("thinksafe.reporting"), report.lengths or {}, report.training
    return environment.from_string((folder / "report.html").read_text(encoding="utf-8")).render(
        report=report,
        style=Markup("".join((folder / name).read_text(encoding="utf-8") for name in ("page.css", "report.css"))),
        sentence=headline_sentence(report),
        cards=[(getattr(report, kind.key), kind) for kind in METRIC_KINDS if getattr(report, kind.key)],
        sets=[(kind, rows) for kind in METRIC_KINDS if (rows := [row for row in report.sets if row.kind == kind.kind])],
        flow=response_flow(report.coverage) if report.coverage else None,
        loss_plot=loss_curve(training.loss, training.learning_rate) if training and training.loss else None,
        length_plot=length_histogram(lengths) if any(lengths.values()) else None,
        lengths=[(name, len(tokens), median_high(tokens)) for name, tokens in lengths.items() if tokens],
        provenance=_provenance(report),
    )


def headline_sentence(report: Report) -> Markup | None:
    """Return one sentence on the headline metrics, such as "Harmful responses fell from 92.5% to 16.7%."; None without
    a metric."""
    clauses = [
        # A non-breaking hyphen keeps "over-refusals" on one line.
        Markup("{} {}").format(kind.title.lower().replace("-", "\u2011"), describe_change(metric, kind.better))
        for kind in METRIC_KINDS
        if (metric := getattr(report, kind.key))
    ]
    if not clauses:
        return None
    text = Markup(" and ").join([Markup(", ").join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)
    return text[0].upper() + text[1:] + "."


def describe_change(metric: Metric, better: str) -> Markup:
    """Return how a metric changed, in words that follow its name.

    "stayed at" if both values round to the same percentage; "fell from" or "rose from" if the change is clear; else
    "went from", which claims nothing; "were at ... before training" (or "after training") if only this value is known.

    Args:
        better: which direction is better, LOWER or HIGHER; it decides the color of the value after training.
    """
    before, after = percent(metric.before), percent(metric.after)
    if metric.before is None or metric.after is None:
        value, phase = (after, "after") if metric.before is None else (before, "before")
        return Markup("were at <b>{}</b> {} training").format(value, phase)
    if before == after:
        return Markup("stayed at <b>{}</b>").format(after)
    verb = "went" if not metric.is_clear_change else "fell" if metric.after < metric.before else "rose"
    template = Markup('{} from <b>{}</b> to <b class="{}">{}</b>')
    return template.format(verb, before, change_class(metric, better), after)


def change_class(metric: Metric, better: str) -> str:
    """Return the CSS class of a change: `better` or `worse` if it is clear, else `unclear`. The argument `better` is
    LOWER or HIGHER."""
    if not metric.is_clear_change:
        return "unclear"
    return "better" if (metric.after < metric.before) == (better == LOWER) else "worse"


class FlowRow(NamedTuple):
    """The responses of one label.

    Attributes:
        dropped: reason -> number, of every reason in the run, most frequent first.
        segments: (name, CSS class, number) of the parts of a bar.
    """

    label: str
    total: int
    kept: int
    dropped: dict[str, int]
    segments: list[tuple[str, str, int]]


def response_flow(coverage: Coverage) -> list[FlowRow]:
    """Return the numbers of kept and dropped responses of each label."""
    dropped = {label: coverage.dropped.get(label, {}) for label in coverage.labels}
    reasons = [reason for reason, _ in sum(map(Counter, dropped.values()), Counter()).most_common()]
    classes = [f"reason-{rank if rank <= NUM_COLORED_REASONS else 0}" for rank in range(1, len(reasons) + 1)]
    rows = []
    for label in coverage.labels:
        kept, counts = coverage.kept.get(label, 0), [dropped[label].get(reason, 0) for reason in reasons]
        segments = [("kept", "kept", kept), *zip(reasons, classes, counts, strict=True)]
        segments = [segment for segment in segments if segment[2]]
        rows.append(FlowRow(label, kept + sum(counts), kept, dict(zip(reasons, counts, strict=True)), segments))
    return rows


def _provenance(report: Report) -> list[tuple[str, Any]]:
    """Return pairs (name, value) that are needed to reproduce the run, without values that are None."""
    names = ("recipe_name", "model", "seed", "created", "code_version", "run_dir")
    titles = {"recipe_name": "recipe", "run_dir": "run directory"}
    pairs = [(titles.get(name, name), getattr(report, name)) for name in names]
    return [(name, value) for name, value in [*pairs, *report.environment.items()] if value is not None]


def _number_format(function: Callable[[float], str]) -> Callable[[float | None], str]:
    """Return a function that formats a number, and any other value (None, Jinja's placeholder) as a dash."""
    return lambda value: function(value) if isinstance(value, int | float) else "–"


percent = _number_format("{:.1%}".format)
duration = _number_format(formatting.duration)


def readable_json(value: Any) -> str:
    """Return JSON with sorted keys, an indent of two and a final newline, but each list of numbers on one line: a run
    has tens of thousands of lengths."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # JSON strings contain no raw line breaks, so a bracket before a line break opens a list.
    return re.sub(r"\[\n([-+\d.eEnul,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"
