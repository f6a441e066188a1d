"""Everything a report shows, gathered from the records of a run directory. Pure reading: nothing is computed twice or
made up, and a stage that was not run leaves its section out.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import thinksafe
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response, Verdict
from thinksafe.evaluation.statistics import mean_with_interval
from thinksafe.reporting.coverage import coverage, stories
from thinksafe.run.directory import RunDir
from thinksafe.training.loop import read_metrics

_HEADLINES = {"harmful_ratio": "harmful", "over_refusal": "over_refusal", "reasoning_accuracy": "reasoning"}
_COMPARED = ("seconds", "tokens", "peak_bytes")


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
    if (run.path / "estimate.json").exists():
        report["estimate"] = _against_estimate(json.loads((run.path / "estimate.json").read_text()), stages)
    if "generate" in stages:
        lengths = defaultdict(list)
        for responses_file in [file for file, _ in run.rungs()] or [run.attempts(0)[0]]:
            for response in read_records(responses_file, Response):
                lengths[response.label].append(response.num_tokens)
        report["lengths"] = dict(lengths)
    if "accept" in stages:
        figures = coverage_of(run)
        report["filter"] = {name: figures.pop(name) for name in ("kept", "dropped")}
        report["coverage"] = figures
    if "filter" in stages and (steered := _outcomes(run.path / "verdicts.jsonl", True)):
        report["acceptance"] = _acceptance(steered, _outcomes(run.path / "unsteered_verdicts.jsonl", False))
    if "train" in stages:
        metrics = list(read_metrics(run.path / "training" / "metrics.jsonl"))
        report["training"] = {
            "method": recipe.training.method,
            "steps": len(metrics),
            "examples": stages["train"]["records"],
            "dropped": stages["train"]["dropped"],
            "tokens": stages["train"]["tokens"],
            "benign_loss": recipe.training.benign_loss,
            "left_out": [[step.step, step.note] for step in metrics if step.loss is None],
            "loss": [[step.step, step.loss] for step in metrics if step.loss is not None],
            "learning_rate": [[step.step, step.learning_rate] for step in metrics],
        }
    return report


def coverage_of(run: RunDir) -> dict[str, Any]:
    """What became of every prompt of a run; see `coverage`."""
    return coverage(stories(run), len(run.recipe.generation.rungs))


def _against_estimate(estimate: dict[str, Any], stages: dict[str, Any]) -> dict[str, Any]:
    """What was expected of each stage that is done, beside what happened: [expected, happened], and of all together.
    Nothing is expected of further attempts, whether up the ladder or after marks."""
    foreseen = estimate["stages"]
    rows = [
        {"name": name} | {key: [foreseen.get(name, {}).get(key), stage.get(key)] for key in _COMPARED}
        for name, stage in stages.items()
        if name in foreseen or stage["tokens"]
    ]
    total = {"name": "in all"} | {key: [_over(rows, key, moment) for moment in (0, 1)] for key in _COMPARED}
    return {"gpu": estimate["gpu"], "num_gpus": estimate["num_gpus"], "stages": rows, "total": total}


def _over(rows: list[dict[str, Any]], key: str, moment: int) -> float | None:
    """A figure of several stages, which follow one another."""
    known = [row[key][moment] for row in rows if row[key][moment] is not None]
    return (max if key == "peak_bytes" else sum)(known) if known else None


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


class _Outcome(NamedTuple):
    """What matters of a verdict on a first attempt at a harmful prompt."""

    prompt_id: str
    accepted: bool
    refusal: bool | None


def _outcomes(file: Path, steered: bool) -> list[_Outcome]:
    """Of the harmful prompts' responses, those with steering or those without."""
    return [
        _Outcome(verdict.prompt_id, verdict.decision == "safe", verdict.refusal)
        for verdict in (read_records(file, Verdict) if file.exists() else ())
        if verdict.label == "harmful" and (verdict.steering is not None) == steered
    ]


def _acceptance(steered: list[_Outcome], unsteered: list[_Outcome]) -> dict[str, Any]:
    accepted = [sum(outcome.accepted for outcome in outcomes) for outcomes in (steered, unsteered)]
    rejected = [len(steered) - accepted[0], len(unsteered) - accepted[1]]
    odds_ratio = None
    if all(accepted + rejected):  # with an empty cell the ratio is 0 or infinite, and any figure would be made up
        odds_ratio = accepted[0] * rejected[1] / (rejected[0] * accepted[1])
    figures: dict[str, Any] = {"n_steered": len(steered), "n_unsteered": len(unsteered), "odds_ratio": odds_ratio}
    judged = {
        "steered": [(outcome.prompt_id, outcome.accepted) for outcome in steered],
        "unsteered": [(outcome.prompt_id, outcome.accepted) for outcome in unsteered],
        "refusal_steered": [(outcome.prompt_id, outcome.refusal) for outcome in steered if outcome.refusal is not None],
    }
    for name, found in judged.items():
        by_prompt = defaultdict(list)
        for prompt_id, outcome in found:
            by_prompt[prompt_id].append(outcome)
        shares = [sum(samples) / len(samples) for samples in by_prompt.values()]
        figures[name], figures[f"{name}_interval"] = mean_with_interval(shares) if shares else (None, None)
    return figures
