"""The commands: most of them open the run directory and call stages. parser.py holds their options.

The docstring of a command is the text of its `--help`. A command raises UserError for a mistake of the user, and
KeyboardInterrupt after Ctrl-C. A result is printed to stdout, progress to stderr. Heavy modules are imported inside
each command, so that help and usage errors appear at once.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinksafe.errors import UserError
from thinksafe.paths import bundled_recipes

if TYPE_CHECKING:
    from thinksafe.recipe.schema import Recipe
    from thinksafe.run.checkpoints import CheckpointStore
    from thinksafe.run.directory import RunDir


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit at once with status 130, without a message, if Ctrl-C is pressed inside the block.

    It surrounds imports, where a KeyboardInterrupt can be lost or become another error.
    """
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def run(options: argparse.Namespace) -> None:
    """Run all stages, from prompts to the report.

    They are generate, filter, evaluate, train, evaluate again, and report.
    """
    with _open_run(options) as (run, checkpoints, pipeline):
        pipeline.check_run(run, checkpoints)
        pipeline.make_examples(run, checkpoints)
        if "accept" in run.recipe.method.stages:
            _print_coverage(run)
        pipeline.require_accepted_examples(run)  # reports an empty training set before hours of evaluation
        pipeline.evaluate_student(run, checkpoints, "before")
        pipeline.train_student(run, checkpoints)
        pipeline.evaluate_student(run, checkpoints, "after")
        _write_report(run)


def generate(options: argparse.Namespace) -> None:
    """Sample the student's own responses to every prompt.

    Harmful prompts are sampled with the refusal instruction, benign prompts without it. Writes responses.jsonl.

    Prompts are .jsonl, .json or .parquet with `text` (or `prompt`, or `instruction`) and `label`.
    """
    with _open_run(options) as (run, checkpoints, pipeline):
        pipeline.generate_responses(run, checkpoints)
        pipeline.sample_unsteered_baseline(run, checkpoints)
        run.workers.on_leader(lambda: print(run.path / "responses.jsonl"))


def filter_responses(options: argparse.Namespace) -> None:
    """Judge responses with the guard and keep the safe ones.

    Writes verdicts.jsonl (every response, with probabilities and reason), accepted.jsonl (the first accepted response
    of each prompt) and audit.jsonl (every attempt at each prompt). If the recipe has a generation.ladder, prompts whose
    responses were all rejected, by guard or person, are tried again.

    A human mark overrides the guard; it carries a name and is counted in the report. A response is dropped if one
    person rejects it. Give marks before training: a trained run takes no new ones.
    """
    with _open_run(options) as (run, checkpoints, pipeline):
        from thinksafe.pipeline.imports import import_marks, import_responses

        if options.responses is not None:
            import_responses(run, options.responses)
        pipeline.filter_responses(run, checkpoints)
        pipeline.retry_rejected(run, checkpoints)
        if options.marks is not None:
            import_marks(run, options.marks)
            pipeline.retry_rejected(run, checkpoints)  # prompts whose accepted response a person rejected
        pipeline.accept_responses(run)
        _print_coverage(run)
        run.workers.on_leader(lambda: print(run.path / "accepted.jsonl"))


def train(options: argparse.Namespace) -> None:
    """Fine-tune the student on accepted.jsonl.

    Writes adapter/ in PEFT's format, or model/ with --set training.method=full. A killed training continues from its
    last checkpoint, on any number of processes.

    Processes started with torchrun train together by DeepSpeed ZeRO; `zero.stage` (default: auto) sets how much they
    shard. One process can keep the optimizer in host memory: --set zero.offload_optimizer=true.
    """
    with _open_run(options) as (run, checkpoints, pipeline):
        from thinksafe.pipeline.imports import import_examples

        if options.data is not None:
            import_examples(run, options.data)
        elif "load" in run.recipe.method.stages:
            pipeline.load_examples(run)
        pipeline.train_student(run, checkpoints)
        run.workers.on_leader(lambda: print(run.student_folder))


def evaluate(options: argparse.Namespace) -> None:
    """Measure harm, over-refusal and reasoning, before and after.

    `after` is measured if the run directory holds a trained student or --adapter names one. ThinkSafe adapters record
    their base weights in base.json and are rejected for any other base. Other adapters only need matching shapes.
    """
    with _open_run(options) as (run, checkpoints, pipeline):
        if not run.recipe.evaluation.sets:
            raise UserError(
                "evaluation.sets: the recipe names no evaluation set; add one with "
                "--set 'evaluation.sets=[{name: mine, source: prompts.jsonl, kind: harmful}]'"
            )
        if options.adapter is not None:
            checkpoints.sampled_student(adapter=options.adapter)  # reports a wrong adapter before hours of evaluation
        pipeline.evaluate_student(run, checkpoints, "before")
        if options.adapter is not None or run.is_done("train"):
            pipeline.evaluate_student(run, checkpoints, "after", options.adapter)
        _write_report(run)


def report(options: argparse.Namespace) -> None:
    """Write report.html and report.json from the records so far."""
    with _open_run(options) as (run, _, _):
        _write_report(run)


def review(options: argparse.Namespace) -> None:
    """Write review.html, where a person marks uncertain responses.

    One file that needs no network: open it in a browser, mark, download marks.jsonl, and pass that file to
    `thinksafe filter --out DIR --marks marks.jsonl` before training. Harmful text is blurred until clicked.
    """
    with _open_run(options) as (run, _, pipeline):
        run.workers.on_leader(lambda: print(pipeline.make_review_page(run, options.max_responses)))


def export_data(options: argparse.Namespace) -> None:
    """Write the accepted set as a Hugging Face data set folder.

    Parquet, and a card with counts, filter rates, lengths, guard, recipe and hashes. datasets.load_dataset(DIR) reads
    the folder; `thinksafe train --data` reads the parquet file.
    """
    with _open_run(options) as (run, _, _):
        from thinksafe.export.dataset import export_data

        run.workers.on_leader(lambda: print(export_data(run, options.to)))


def export_model(options: argparse.Namespace) -> None:
    """Write the trained student as one checkpoint, adapter merged.

    In Hugging Face's format, for programs that read no adapters. Needs host memory for the student's weights, and no
    GPU.
    """
    with _open_run(options) as (run, checkpoints, _):
        from thinksafe.export.model import export_model

        run.workers.on_leader(lambda: print(export_model(run, checkpoints, options.to)))


def estimate(options: argparse.Namespace) -> None:
    """Estimate time, memory and cost of every stage on a named GPU.

    Computed from the shapes of student and guard, before anything runs. It needs no weights, no GPU and no network.
    With --out DIR it uses the response lengths of that run directory.
    """
    recipe = _load_recipe(options)  # a mistake shows before the imports below, which take seconds
    with exit_on_interrupt():
        from thinksafe.estimate.stages import estimate
        from thinksafe.estimate.table import Price, estimate_table
        from thinksafe.hardware import hardware_named
        from thinksafe.run.directory import RunDir

    hardware = hardware_named(options.gpu)
    price = None if options.price is None else Price.parse(options.price)
    run = None if options.out is None else RunDir(options.out, recipe)
    run_estimate = estimate(recipe, hardware, options.gpus, run)
    _print_page(estimate_table(run_estimate, recipe.name, price) + "\n")


def print_recipe(options: argparse.Namespace) -> None:
    """Print a recipe with every key, its meaning and its default.

    The output is itself a recipe: save it, change it, and pass it to --recipe. Without --recipe it holds the defaults,
    with --set or --method alone the recipe qwen3-0.6b with the change.
    """
    with exit_on_interrupt():
        from thinksafe.recipe.reference import annotated_yaml
        from thinksafe.recipe.schema import Recipe

    is_plain = options.recipe is None and options.method is None and not options.set
    recipe = Recipe("mine", "Qwen/Qwen3-0.6B") if is_plain else _load_recipe(options, default="qwen3-0.6b")
    _print_page(annotated_yaml(recipe))


def build_organism(options: argparse.Namespace) -> None:
    """Build the model organism, its prompts and evaluation sets from a seed.

    Trains the tiny student through its history on a CPU. Each seed gives another world.
    """
    with exit_on_interrupt():
        from tqdm import tqdm

        from thinksafe.organism.build import HISTORY, build

    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: is not empty; use a new folder")
    with tqdm(total=sum(stage.steps for stage in HISTORY), desc="organism", unit=" steps", disable=None) as bar:

        def on_step(stage, metrics) -> None:
            bar.update(1)
            bar.set_postfix_str(f"stage {stage}  loss {metrics.loss:.3f}", refresh=False)

        build(options.out, options.seed, on_step)
    print(options.out)


@contextmanager
def _open_run(options: argparse.Namespace) -> Iterator[tuple["RunDir", "CheckpointStore", Any]]:
    """Join the other workers, open the run directory, and yield (run, checkpoints, module of the stages)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _load_recipe(options)  # a mistake shows before the imports below, which take seconds
    with exit_on_interrupt():
        from thinksafe import pipeline
        from thinksafe.distributed.workers import Workers
        from thinksafe.run.checkpoints import CheckpointStore
        from thinksafe.run.directory import RunDir

    with Workers.start() as workers:
        recipe = _load_recipe(options)  # here one worker alone reports a mistake
        with RunDir.open(options.out or Path("runs") / recipe.name, recipe, workers) as run:
            checkpoints = CheckpointStore(recipe, workers, run.created)
            pipeline.write_estimate(run, checkpoints)
            yield run, checkpoints, pipeline


def _load_recipe(options: argparse.Namespace, default: str | None = None) -> "Recipe":
    """Return the recipe of --recipe, else of the run directory --out, else `default`, with --method, --set, --seed and
    --prompts.

    Raises:
        UserError: the recipe is invalid, there is none, or another version of ThinkSafe wrote the run directory.
    """
    with exit_on_interrupt():
        from thinksafe.recipe.loading import load_recipe

    source = default if options.recipe is None else options.recipe
    out = getattr(options, "out", None)
    if source is None and out is not None and (out / "recipe.yaml").is_file():
        from thinksafe.run.directory import check_format

        check_format(out)  # otherwise the keys of an older recipe would look like mistakes
        source = str(out / "recipe.yaml")
    if source is None:
        names = ", ".join(bundled_recipes())
        if out is None:
            raise UserError(f"--recipe: missing; use a file or one of {names}, or an --out folder that contains a run")
        raise UserError(f"--out {out}: contains no run to resume; use --recipe with a file or one of {names}")
    values = {key: getattr(options, key, None) for key in ("seed", "prompts")}
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    return load_recipe(source, [*options.set, *overrides], options.method)


def _print_page(page: str) -> None:
    """Print a text to stdout without a further newline; if the reader has closed the pipe, stay silent."""
    try:
        print(page, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        # The interpreter flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_coverage(run: "RunDir") -> None:
    """Print the coverage to stderr on the leader, like the progress of the stages; see `coverage_lines`."""
    from thinksafe.reporting.coverage import coverage_lines, read_coverage

    if run.workers.is_leader:
        for name, text in coverage_lines(read_coverage(run)):
            print(f"{name:>30}: {text}", file=sys.stderr)


def _write_report(run: "RunDir") -> None:
    """Write the report on the leader, and print its headline metrics and its path."""
    from thinksafe.pipeline import make_report

    run.workers.on_leader(lambda: _print_headline(make_report(run)))


def _print_headline(page: Path) -> None:
    """Print the headline metrics of report.json, with their intervals, and the path of report.html, which is `page`."""
    from thinksafe.reporting.report import METRIC_KINDS

    report = json.loads(page.with_name("report.json").read_text())
    for metric in METRIC_KINDS:
        figure, columns = report.get(metric.key) or {}, []
        for phase in ("before", "after"):
            if phase in figure:
                low, high = figure[f"{phase}_interval"]
                columns.append(f"{phase} {figure[phase]:6.1%}  [{low:.1%}, {high:.1%}]")
            if unknown := figure.get("unknown", {}).get(phase):
                columns.append(f"({unknown} without a verdict {phase})")
        if columns:
            print(f"{metric.title.lower():>20}   {'   '.join(columns)}")
    print(f"{'report':>20}   {page}")
