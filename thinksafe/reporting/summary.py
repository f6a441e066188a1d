"""Everything a report shows, gathered from the records of a run directory. Pure reading: nothing is computed twice or
made up, and a stage that was not run leaves its section out.
"""

import json
from collections import Counter, defaultdict
from typing import Any

import thinksafe
from thinksafe.evaluation.statistics import mean_with_interval
from thinksafe.records import Response, Verdict, read_records
from thinksafe.rundir import RunDir
from thinksafe.training.loop import read_metrics

_HEADLINES = {"harmful_ratio": "harmful", "over_refusal": "over_refusal", "reasoning_accuracy": "reasoning"}


def summarise(run: RunDir) -> dict[str, Any]:
    """The contents of report.json."""
    manifest, recipe = run.manifest, run.recipe
    stages = manifest["stages"]
    moments = {
        moment: json.loads((run.path / "evaluation" / f"{moment}.json").read_text())
        for moment in ("before", "after")
        if f"evaluate_{moment}" in stages
    }
    report: dict[str, Any] = {
        "title": f"ThinkSafe: {recipe.name}",
        "recipe_name": recipe.name,
        "model": recipe.model,
        "seed": recipe.seed,
        "created": manifest["created"],
        "code_version": thinksafe.__version__,
        "run_dir": str(run.path),
        **{name: headline for name, kind in _HEADLINES.items() if (headline := _headline(kind, moments))},
        "sets": _sets(moments),
        "stages": [
            {
                "name": name,
                "seconds": stage["seconds"],
                "tokens": stage["tokens"],
                "tokens_per_second": round(stage["tokens"] / max(stage["seconds"], 1e-9), 1),
            }
            for name, stage in stages.items()
        ],
        "environment": manifest["environment"],
    }
    if "generate" in stages:
        lengths = defaultdict(list)
        for response in read_records(run.path / "responses.jsonl", Response):
            lengths[response.label].append(response.num_tokens)
        report["lengths"] = dict(lengths)
    if "filter" in stages:
        report |= _filter_figures(run)
    if "train" in stages:
        metrics = list(read_metrics(run.path / "training" / "metrics.jsonl"))
        report["training"] = {
            "method": recipe.training.method,
            "steps": len(metrics),
            "examples": stages["train"]["records"],
            "dropped": stages["train"]["dropped"],
            "tokens": stages["train"]["tokens"],
            "loss": [[step.step, step.loss] for step in metrics],
            "learning_rate": [[step.step, step.learning_rate] for step in metrics],
        }
    return report


def _headline(kind: str, moments: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """One figure before and after, pooled over the judged prompts of every set of this kind, if any was."""
    headline: dict[str, Any] = {"unknown": {}}
    for moment, sets in moments.items():
        chosen = [entry for entry in sets if entry["kind"] == kind]
        values = [value for entry in chosen for value in entry["values"]]
        if values:
            headline[moment], headline[f"{moment}_interval"] = mean_with_interval(values)
            headline["n"] = len(values)
        if chosen:
            headline["unknown"][moment] = sum(entry["unknown"] for entry in chosen)
    return headline if headline["unknown"] else None


def _sets(moments: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for moment, sets in moments.items():
        for entry in sets:
            shared = {key: entry[key] for key in ("name", "kind", "n", "samples", "judge")}
            row = rows.setdefault(entry["name"], shared | {"truncated": {}, "unknown": {}})
            row[moment], row[f"{moment}_interval"] = entry["value"], entry["interval"]
            row["truncated"][moment], row["unknown"][moment] = entry["truncated"], entry["unknown"]
    return list(rows.values())


def _filter_figures(run: RunDir) -> dict[str, Any]:
    verdicts = list(read_records(run.path / "verdicts.jsonl", Verdict))
    kept, dropped = Counter(), {"harmful": Counter(), "benign": Counter()}
    for verdict in verdicts:
        if verdict.decision == "safe":
            kept[verdict.label] += 1
        else:
            dropped[verdict.label][verdict.reason] += 1
    figures: dict[str, Any] = {
        "filter": {"kept": dict(kept), "dropped": {label: dict(reasons) for label, reasons in dropped.items()}}
    }
    steered = [verdict for verdict in verdicts if verdict.label == "harmful" and verdict.steering]
    if steered:
        unsteered_file = run.path / "unsteered_verdicts.jsonl"
        unsteered = list(read_records(unsteered_file, Verdict)) if unsteered_file.exists() else []
        figures["acceptance"] = _acceptance(steered, unsteered)
    return figures


def _acceptance(steered: list[Verdict], unsteered: list[Verdict]) -> dict[str, Any]:
    def accepted(verdicts: list[Verdict]) -> int:
        return sum(verdict.decision == "safe" for verdict in verdicts)

    odds_ratio = None
    cells = [accepted(v) for v in (steered, unsteered)] + [len(v) - accepted(v) for v in (steered, unsteered)]
    if all(cells):  # with an empty cell the ratio is 0 or infinite, and any figure would be made up
        odds_ratio = cells[0] * cells[3] / (cells[2] * cells[1])
    figures: dict[str, Any] = {"n_steered": len(steered), "n_unsteered": len(unsteered), "odds_ratio": odds_ratio}
    outcomes = {
        "steered": [(verdict, verdict.decision == "safe") for verdict in steered],
        "unsteered": [(verdict, verdict.decision == "safe") for verdict in unsteered],
        "refusal_steered": [(verdict, verdict.refusal) for verdict in steered if verdict.refusal is not None],
    }
    for name, judged in outcomes.items():
        by_prompt = defaultdict(list)
        for verdict, outcome in judged:
            by_prompt[verdict.prompt_id].append(outcome)
        shares = [sum(samples) / len(samples) for samples in by_prompt.values()]
        figures[name], figures[f"{name}_interval"] = mean_with_interval(shares) if shares else (None, None)
    return figures
