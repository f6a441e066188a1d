"""Summary of a run: reads the records of a run directory and returns the figures of its report. It writes nothing."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import thinksafe
from thinksafe.data.jsonl import read_records, read_rows
from thinksafe.data.records import Response, Verdict
from thinksafe.evaluation.metrics import SetFigures
from thinksafe.evaluation.statistics import mean_with_interval
from thinksafe.reporting.coverage import read_coverage
from thinksafe.reporting.report import (
    METRIC_KINDS,
    Acceptance,
    Estimate,
    EstimateRow,
    Interval,
    Metric,
    Report,
    SetMetric,
    StageFigures,
    Training,
)
from thinksafe.run.directory import RunDir
from thinksafe.training.metrics import read_metrics


def summarize(run: RunDir) -> Report:
    """Return the report of a run, from the files of all finished stages."""
    manifest, recipe = run.manifest, run.recipe
    stages = manifest["stages"]
    phases = {
        phase: [SetFigures(**row.values) for row in read_rows(run.path / "evaluation" / f"{phase}.json")]
        for phase in ("before", "after")
        if f"evaluate_{phase}" in stages
    }
    return Report(
        title=f"ThinkSafe: {recipe.name}",
        recipe_name=recipe.name,
        model=recipe.model,
        seed=recipe.seed,
        created=manifest["created"],
        code_version=thinksafe.__version__,
        run_dir=str(run.path),
        environment=manifest["environment"],
        sets=_set_metrics(phases),
        stages=[_stage_figures(name, stage["seconds"], stage["tokens"]) for name, stage in stages.items()],
        estimate=_estimate(run, stages),
        lengths=_response_lengths(run) if "generate" in stages else None,
        coverage=read_coverage(run) if "accept" in stages else None,
        acceptance=_acceptance(run) if "filter" in stages else None,
        training=_training(run, stages["train"]) if "train" in stages else None,
        **{metric.key: _headline_metric(metric.kind, phases) for metric in METRIC_KINDS},
    )


def _stage_figures(name: str, seconds: float, tokens: int) -> StageFigures:
    return StageFigures(name, seconds, tokens, round(tokens / max(seconds, 1e-9), 1))


def _headline_metric(kind: str, phases: dict[str, list[SetFigures]]) -> Metric | None:
    """Return one metric, pooled over the judged prompts of all sets of a kind; None if no set has this kind."""
    figures, unknown = {}, {}
    for phase, all_sets in phases.items():
        sets = [figures for figures in all_sets if figures.kind == kind]
        if sets:
            unknown[phase] = sum(set_figures.unknown for set_figures in sets)
        if values := [value for set_figures in sets for value in set_figures.values]:
            figures[phase], figures[f"{phase}_interval"] = mean_with_interval(values)
            figures["n"] = len(values)
    return Metric(unknown=unknown, **figures) if unknown else None


def _set_metrics(phases: dict[str, list[SetFigures]]) -> list[SetMetric]:
    """Return the metric of each evaluation set, in the order of the recipe."""
    rows: dict[str, dict[str, Any]] = {}
    for phase, sets in phases.items():
        for figures in sets:
            shared = {name: getattr(figures, name) for name in ("name", "kind", "n", "samples", "judge")}
            row = rows.setdefault(figures.name, shared | {"truncated": {}, "unknown": {}})
            row |= {phase: figures.value, f"{phase}_interval": figures.interval}
            row["truncated"][phase], row["unknown"][phase] = figures.truncated, figures.unknown
    return [SetMetric(**row) for row in rows.values()]


def _estimate(run: RunDir, stages: dict[str, Any]) -> Estimate | None:
    """Return the estimate beside the measured figures of each finished stage; None if there is no estimate.json.

    The estimate does not include retries: rungs of the ladder, and attempts after marks.
    """
    if not (run.path / "estimate.json").exists():
        return None
    estimate = json.loads((run.path / "estimate.json").read_text())
    expected, keys = estimate["stages"], ("seconds", "tokens", "peak_bytes")
    rows = [
        EstimateRow(name, *((expected.get(name, {}).get(key), stage.get(key)) for key in keys))
        for name, stage in stages.items()
        if name in expected or stage["tokens"]
    ]
    totals = ((_total(rows, key, 0), _total(rows, key, 1)) for key in keys)
    return Estimate(estimate["gpu"], estimate["num_gpus"], rows, EstimateRow("in all", *totals))


def _total(rows: list[EstimateRow], key: str, column: int) -> float | None:
    values = [value for row in rows if (value := getattr(row, key)[column]) is not None]
    return (max if key == "peak_bytes" else sum)(values) if values else None


def _response_lengths(run: RunDir) -> dict[str, list[int]]:
    """Return label -> number of tokens of each response of all attempts."""
    lengths = defaultdict(list)
    for file in [responses for responses, _ in run.attempt_files()] or [run.attempt_paths(0)[0]]:
        for response in read_records(file, Response):
            lengths[response.label].append(response.num_tokens)
    return dict(lengths)


def _acceptance(run: RunDir) -> Acceptance | None:
    """Return what steering gains on first attempts at harmful prompts; None if no response was steered."""
    steered = _harmful_verdicts(run.path / "verdicts.jsonl", is_steered=True)
    unsteered = _harmful_verdicts(run.path / "unsteered_verdicts.jsonl", is_steered=False)
    if not steered:
        return None
    accepted, baseline = (sum(v.decision == "safe" for v in verdicts) for verdicts in (steered, unsteered))
    numerator, denominator = accepted * (len(unsteered) - baseline), (len(steered) - accepted) * baseline
    return Acceptance(
        len(steered),
        len(unsteered),
        numerator / denominator if numerator and denominator else None,  # else it is 0, infinite or 0 / 0
        *_mean_over_prompts((v.prompt_id, v.decision == "safe") for v in steered),
        *_mean_over_prompts((v.prompt_id, v.decision == "safe") for v in unsteered),
        *_mean_over_prompts((v.prompt_id, v.refusal) for v in steered if v.refusal is not None),
    )


def _harmful_verdicts(file: Path, is_steered: bool) -> list[Verdict]:
    """Return the verdicts on steered or on unsteered responses to harmful prompts; none if there is no such file."""
    verdicts = read_records(file, Verdict) if file.exists() else ()
    return [v for v in verdicts if v.label == "harmful" and (v.steering is not None) == is_steered]


def _mean_over_prompts(outcomes: Iterable[tuple[str, bool]]) -> tuple[float | None, Interval | None]:
    """Return the mean over prompts of the share of true outcomes, and its interval, from pairs (prompt id, outcome);
    None for both without pairs."""
    by_prompt = defaultdict(list)
    for prompt_id, outcome in outcomes:
        by_prompt[prompt_id].append(outcome)
    shares = [sum(samples) / len(samples) for samples in by_prompt.values()]
    return mean_with_interval(shares) if shares else (None, None)


def _training(run: RunDir, stage: dict[str, Any]) -> Training:
    """Return the figures of training, from its metrics and its entry in the manifest."""
    steps = list(read_metrics(run.path / "training" / "metrics.jsonl"))
    return Training(
        method=run.recipe.training.method,
        steps=len(steps),
        examples=stage["records"],
        dropped=stage["dropped"],
        tokens=stage["tokens"],
        benign_loss="kl" if "benign" in run.recipe.method.kl_labels else "cross_entropy",
        left_out=[(step.step, step.note) for step in steps if step.loss is None],
        loss=[(step.step, step.loss) for step in steps if step.loss is not None],
        learning_rate=[(step.step, step.learning_rate) for step in steps],
    )
