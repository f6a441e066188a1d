"""The commands: most of them open the run directory and call stages. parser.py holds their options.

Each command takes its parsed options and returns nothing. It raises UserError for a mistake of the user, and
KeyboardInterrupt after Ctrl-C. A result is printed to stdout, progress to stderr.

Heavy modules are imported inside each command, so that help and usage errors appear at once.
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
    from thinksafe.run.checkpoints import CheckpointStore
    from thinksafe.run.directory import RunDir


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Exit at once with status 130 if Ctrl-C is pressed inside the block, without an exception and a message.

    It surrounds imports, where a KeyboardInterrupt can be lost or become another error.
    """
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def run(options: argparse.Namespace) -> None:
    """Run all stages, from prompts to the report; print the headline metrics and the path of the report."""
    with _open_run(options) as (run, checkpoints, pipeline):
        pipeline.check_run(run, checkpoints)
        pipeline.generate_responses(run, checkpoints)
        pipeline.sample_unsteered_baseline(run, checkpoints)
        pipeline.filter_responses(run, checkpoints)
        pipeline.retry_rejected(run, checkpoints)
        pipeline.accept_responses(run)
        _print_coverage(run)
        pipeline.require_accepted_examples(run)  # reports an empty training set before hours of evaluation
        pipeline.evaluate_student(run, checkpoints, "before")
        pipeline.train_student(run, checkpoints)
        pipeline.evaluate_student(run, checkpoints, "after")
        _write_report(run)


def generate(options: argparse.Namespace) -> None:
    """Sample responses to every prompt and the unsteered baseline; print the path of responses.jsonl."""
    if options.prompts is not None:
        options.set = [*options.set, f"prompts={json.dumps(options.prompts)}"]
    with _open_run(options) as (run, checkpoints, pipeline):
        pipeline.generate_responses(run, checkpoints)
        pipeline.sample_unsteered_baseline(run, checkpoints)
        run.workers.on_leader(lambda: print(run.path / "responses.jsonl"))


def filter_responses(options: argparse.Namespace) -> None:
    """Judge responses, retry rejected prompts, import marks, and write the accepted set; print its path."""
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
    """Train the adapter, or the whole model; print the path of its folder."""
    with _open_run(options) as (run, checkpoints, pipeline):
        from thinksafe.pipeline.imports import import_examples

        if options.data is not None:
            import_examples(run, options.data)
        pipeline.train_student(run, checkpoints)
        run.workers.on_leader(lambda: print(run.student_folder))


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate the student before training, and after it if it is trained or --adapter names an adapter.

    The headline metrics and the path of the report are printed.
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
    """Write the report from the records so far; print the headline metrics and the path of the page."""
    with _open_run(options) as (run, _, _):
        _write_report(run)


def review(options: argparse.Namespace) -> None:
    """Write the page on which people mark responses; print its path."""
    with _open_run(options) as (run, _, pipeline):
        run.workers.on_leader(lambda: print(pipeline.make_review_page(run, options.max_responses)))


def export_data(options: argparse.Namespace) -> None:
    """Write the accepted set as a data set folder; print its path."""
    with _open_run(options) as (run, _, _):
        from thinksafe.export.dataset import export_data

        run.workers.on_leader(lambda: print(export_data(run, options.to)))


def export_model(options: argparse.Namespace) -> None:
    """Write the student as one checkpoint, with the adapter from LoRA training merged; print the path of the folder.

    Raises:
        UserError: see `thinksafe.export.model.export_model`; one case is full fine-tuning, which writes a checkpoint.
    """
    with _open_run(options) as (run, checkpoints, _):
        from thinksafe.export.model import export_model

        run.workers.on_leader(lambda: print(export_model(run, checkpoints, options.to)))


def estimate(options: argparse.Namespace) -> None:
    """Print the estimated time, memory and cost of a run on the GPU that --gpu names; nothing is run or written."""
    with exit_on_interrupt():
        from thinksafe.estimate.stages import estimate
        from thinksafe.estimate.table import Price, estimate_table
        from thinksafe.hardware import hardware_named
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.run.directory import RunDir

    hardware = hardware_named(options.gpu)
    price = None if options.price is None else Price.parse(options.price)
    recipe = load_recipe(_recipe_source(options), options.set)
    run = None if options.out is None else RunDir(options.out, recipe)
    run_estimate = estimate(recipe, hardware, options.gpus, run)
    _print_page(estimate_table(run_estimate, recipe.name, hardware.memory_bytes, price) + "\n")


def print_recipe(options: argparse.Namespace) -> None:
    """Print a recipe with every key and its meaning; without --recipe and --set, one with all defaults."""
    with exit_on_interrupt():
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.recipe.reference import annotated_yaml
        from thinksafe.recipe.schema import Recipe

    if options.recipe is None and not options.set:
        _print_page(annotated_yaml(Recipe(name="mine", model="Qwen/Qwen3-0.6B")))
    else:
        _print_page(annotated_yaml(load_recipe(options.recipe or "qwen3-0.6b", options.set)))


def build_organism(options: argparse.Namespace) -> None:
    """Build the model organism and its data from a seed in the new folder --out; print the folder."""
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
    """Join the other workers and open the run directory; yield (run, checkpoints, module of the stages).

    Before that, the leader writes the estimate of the run, see `write_estimate`.

    Raises:
        UserError: recipe or run directory are not usable; the message says why.
    """
    with exit_on_interrupt():
        from thinksafe import pipeline
        from thinksafe.distributed.workers import Workers
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.run.checkpoints import CheckpointStore
        from thinksafe.run.directory import RunDir

    seed_override = [] if options.seed is None else [f"seed={options.seed}"]
    with Workers.start() as workers:
        recipe = load_recipe(_recipe_source(options), [*options.set, *seed_override])
        with RunDir.open(options.out or Path("runs") / recipe.name, recipe, workers) as run:
            checkpoints = CheckpointStore(recipe, workers)
            pipeline.write_estimate(run, checkpoints)
            yield run, checkpoints, pipeline


def _recipe_source(options: argparse.Namespace) -> str:
    """Return the value of --recipe; without it, the path of the recipe file in the run directory --out.

    Raises:
        UserError: there is neither, or another version of ThinkSafe wrote the run directory.
    """
    if options.recipe is not None:
        return options.recipe
    if options.out is not None and (options.out / "recipe.yaml").is_file():
        from thinksafe.run.directory import check_format

        check_format(options.out)  # otherwise the keys of an older recipe would look like mistakes
        return str(options.out / "recipe.yaml")
    names = ", ".join(bundled_recipes())
    if options.out is not None:
        raise UserError(f"--out {options.out}: contains no run to resume; use --recipe with a file or one of {names}")
    raise UserError(f"--recipe: missing; use a file or one of {names}, or an --out folder that contains a run")


def _print_page(page: str) -> None:
    """Print a text to stdout without a further newline; if the reader has closed the pipe, stay silent."""
    try:
        print(page, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        # The interpreter flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_coverage(run: "RunDir") -> None:
    """Print the coverage to stderr on the leader, like the progress of the stages; see `coverage_lines`."""
    from thinksafe.reporting.coverage import coverage_lines
    from thinksafe.reporting.summary import read_coverage

    if run.workers.is_leader:
        for name, text in coverage_lines(read_coverage(run)):
            print(f"{name:>30}: {text}", file=sys.stderr)


def _write_report(run: "RunDir") -> None:
    """Write the report on the leader, and print its headline metrics and its path."""
    from thinksafe.pipeline import make_report

    run.workers.on_leader(lambda: _print_headline(make_report(run)))


def _print_headline(page: Path) -> None:
    """Print the headline metrics that the report has, with their intervals, and the path of the report.

    Args:
        page: path of report.html; report.json beside it holds the metrics.
    """
    report = json.loads(page.with_name("report.json").read_text())
    for key, title in (
        ("harmful_ratio", "harmful responses"),
        ("over_refusal", "over-refusals"),
        ("reasoning_accuracy", "reasoning accuracy"),
    ):
        figure = report.get(key) or {}
        columns = []
        for phase in ("before", "after"):
            if phase in figure:
                low, high = figure[f"{phase}_interval"]
                columns.append(f"{phase} {figure[phase]:6.1%}  [{low:.1%}, {high:.1%}]")
            if unknown := figure.get("unknown", {}).get(phase):
                columns.append(f"({unknown} without a verdict {phase})")
        if columns:
            print(f"{title:>20}   {'   '.join(columns)}")
    print(f"{'report':>20}   {page}")
