"""The contents of a report, read from the records of a run directory. It writes nothing.

A section is left out if its stage has not run.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import thinksafe
from thinksafe.data.jsonl import read_records
from thinksafe.data.records import Response, Verdict
from thinksafe.evaluation.statistics import mean_with_interval
from thinksafe.reporting.coverage import count_coverage, read_audit
from thinksafe.run.directory import RunDir
from thinksafe.training.loop import read_metrics

_HEADLINE_KINDS = {"harmful_ratio": "harmful", "over_refusal": "over_refusal", "reasoning_accuracy": "reasoning"}
_COMPARED_FIELDS = ("seconds", "tokens", "peak_bytes")


def summarize(run: RunDir) -> dict[str, Any]:
    """Return the contents of report.json, by section, from the files of all finished stages.

    docs/run-directory.md lists the sections. A section is left out if its stage is not finished.
    """
    manifest, recipe = run.manifest, run.recipe
    stages = manifest["stages"]
    phases = {
        phase: json.loads((run.path / "evaluation" / f"{phase}.json").read_text())
        for phase in ("before", "after")
        if f"evaluate_{phase}" in stages
    }
    report: dict[str, Any] = {
        "title": f"ThinkSafe: {recipe.name}",
        "recipe_name": recipe.name,
        "model": recipe.model,
        "seed": recipe.seed,
        "created": manifest["created"],
        "code_version": thinksafe.__version__,
        "run_dir": str(run.path),
        **{name: headline for name, kind in _HEADLINE_KINDS.items() if (headline := _headline_metric(kind, phases))},
        "sets": _set_rows(phases),
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
        report["estimate"] = _compare_with_estimate(json.loads((run.path / "estimate.json").read_text()), stages)
    if "generate" in stages:
        lengths = defaultdict(list)
        for responses_file in [file for file, _ in run.attempt_files()] or [run.attempt_paths(0)[0]]:
            for response in read_records(responses_file, Response):
                lengths[response.label].append(response.num_tokens)
        report["lengths"] = dict(lengths)
    if "accept" in stages:
        figures = read_coverage(run)
        report["filter"] = {name: figures.pop(name) for name in ("kept", "dropped")}
        report["coverage"] = figures
    if "filter" in stages and (steered := _read_outcomes(run.path / "verdicts.jsonl", True)):
        report["acceptance"] = _acceptance_figures(
            steered, _read_outcomes(run.path / "unsteered_verdicts.jsonl", False)
        )
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


def read_coverage(run: RunDir) -> dict[str, Any]:
    """Return the coverage of a run, read from its audit.jsonl; `count_coverage` describes the result."""
    return count_coverage(read_audit(run), len(run.recipe.generation.rungs))


def _compare_with_estimate(estimate: dict[str, Any], stages: dict[str, Any]) -> dict[str, Any]:
    """Return pairs [estimated, measured] of time, tokens and memory for each finished stage, and for all together.

    A figure that is unknown is None. The estimate does not include retries: rungs of the ladder, and attempts after
    marks; their estimated figures are None.

    Args:
        estimate: contents of estimate.json.
        stages: the finished stages of the manifest.

    Returns:
        `gpu` and `num_gpus` of the estimate; `stages`: rows with `name` and pairs `seconds`, `tokens`, `peak_bytes`;
        `total`: such a row for all stages together.
    """
    expected = estimate["stages"]
    rows = [
        {"name": name} | {key: [expected.get(name, {}).get(key), stage.get(key)] for key in _COMPARED_FIELDS}
        for name, stage in stages.items()
        if name in expected or stage["tokens"]
    ]
    total = {"name": "in all"} | {key: [_combine(rows, key, column) for column in (0, 1)] for key in _COMPARED_FIELDS}
    return {"gpu": estimate["gpu"], "num_gpus": estimate["num_gpus"], "stages": rows, "total": total}


def _combine(rows: list[dict[str, Any]], key: str, column: int) -> float | None:
    """Return a figure of all stages together: the maximum for `peak_bytes`, the sum for `seconds` and `tokens`.

    Values of None do not count; without any value the result is None.

    Args:
        column: 0 for the estimated figure, 1 for the measured one.
    """
    values = [row[key][column] for row in rows if row[key][column] is not None]
    return (max if key == "peak_bytes" else sum)(values) if values else None


def _headline_metric(kind: str, phases: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Return one metric, pooled over the judged prompts of all sets of a kind; None if no set has this kind.

    Args:
        kind: kind of evaluation sets.
        phases: figures of the sets, as `measure` returns them, by phase (`before`, `after`).

    Returns:
        For each phase with a judged prompt its mean under the phase's name and `PHASE_interval`; `n`, the number of
        judged prompts; `unknown`, {phase: number of responses without a verdict}.
    """
    headline: dict[str, Any] = {"unknown": {}}
    for phase, sets in phases.items():
        matching = [evaluation_set for evaluation_set in sets if evaluation_set["kind"] == kind]
        values = [value for evaluation_set in matching for value in evaluation_set["values"]]
        if values:
            headline[phase], headline[f"{phase}_interval"] = mean_with_interval(values)
            headline["n"] = len(values)
        if matching:
            headline["unknown"][phase] = sum(evaluation_set["unknown"] for evaluation_set in matching)
    return headline if headline["unknown"] else None


def _set_rows(phases: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each evaluation set, with its figures of every phase; `phases` as for `_headline_metric`."""
    rows: dict[str, dict[str, Any]] = {}
    for phase, sets in phases.items():
        for evaluation_set in sets:
            shared = {key: evaluation_set[key] for key in ("name", "kind", "n", "samples", "judge")}
            row = rows.setdefault(evaluation_set["name"], shared | {"truncated": {}, "unknown": {}})
            row[phase], row[f"{phase}_interval"] = evaluation_set["value"], evaluation_set["interval"]
            row["truncated"][phase], row["unknown"][phase] = evaluation_set["truncated"], evaluation_set["unknown"]
    return list(rows.values())


class _Outcome(NamedTuple):
    """The part of a verdict on a first attempt at a harmful prompt that the report counts.

    Attributes:
        accepted: whether the guard's decision is `safe`.
        refusal: whether the response refuses; None if the guard does not say.
    """

    prompt_id: str
    accepted: bool
    refusal: bool | None


def _read_outcomes(file: Path, steered: bool) -> list[_Outcome]:
    """Return the outcomes of the responses to harmful prompts in a file of verdicts; [] if there is no such file.

    Args:
        steered: True for the responses with steering only, False for the responses without steering only.
    """
    return [
        _Outcome(verdict.prompt_id, verdict.decision == "safe", verdict.refusal)
        for verdict in (read_records(file, Verdict) if file.exists() else ())
        if verdict.label == "harmful" and (verdict.steering is not None) == steered
    ]


def _acceptance_figures(steered: list[_Outcome], unsteered: list[_Outcome]) -> dict[str, Any]:
    """Return what steering gains on first attempts at harmful prompts.

    Returns:
        `n_steered`, `n_unsteered`: numbers of responses;
        `odds_ratio`: (accepted / rejected with steering) / (accepted / rejected without it); None if one of the four
        counts is 0;
        `steered`, `unsteered`: share of accepted responses, as the mean over prompts, each with `NAME_interval`;
        `refusal_steered`: such a share of refusals, among the responses for which the guard says it.
        A share and its interval are None without responses.
    """
    accepted = [sum(outcome.accepted for outcome in outcomes) for outcomes in (steered, unsteered)]
    rejected = [len(steered) - accepted[0], len(unsteered) - accepted[1]]
    odds_ratio = None
    if all(accepted + rejected):  # with an empty cell the odds ratio is 0 or infinite
        odds_ratio = accepted[0] * rejected[1] / (rejected[0] * accepted[1])
    figures: dict[str, Any] = {"n_steered": len(steered), "n_unsteered": len(unsteered), "odds_ratio": odds_ratio}
    judged = {
        "steered": [(outcome.prompt_id, outcome.accepted) for outcome in steered],
        "unsteered": [(outcome.prompt_id, outcome.accepted) for outcome in unsteered],
        "refusal_steered": [(outcome.prompt_id, outcome.refusal) for outcome in steered if outcome.refusal is not None],
    }
    for name, pairs in judged.items():
        by_prompt = defaultdict(list)
        for prompt_id, outcome in pairs:
            by_prompt[prompt_id].append(outcome)
        shares = [sum(samples) / len(samples) for samples in by_prompt.values()]
        figures[name], figures[f"{name}_interval"] = mean_with_interval(shares) if shares else (None, None)
    return figures
