"""What each command does: it opens the run directory and calls stages. How a command is typed stands in cli.py.

Nothing heavy is imported before a command has been found to be well formed, and asked for.
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
    from thinksafe.run.checkpoints import Models
    from thinksafe.run.directory import RunDir


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """For imports: Ctrl-C raised inside one can be lost or come out as another error, and there is nothing to save."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(options: argparse.Namespace) -> None:
    """All stages, from prompts to the report."""
    with _opened(options) as (run, models, stages):
        run.workers.once(lambda: stages.check(run, models))
        stages.generate(run, models)
        stages.probe(run, models)
        stages.filter_responses(run, models)
        stages.retry(run, models)
        run.workers.once(lambda: stages.accept(run))
        run.workers.once(lambda: _print_coverage(run))
        stages.examples_file(run)  # nothing to train on is found before hours of `before`
        stages.evaluate(run, models, "before")
        stages.train(run, models)
        stages.evaluate(run, models, "after")
        run.workers.once(lambda: _print_report(stages.report(run)))


def generate(options: argparse.Namespace) -> None:
    """Responses to every prompt."""
    if options.prompts is not None:
        options.set.append(f"prompts={json.dumps(options.prompts)}")
    with _opened(options) as (run, models, stages):
        stages.generate(run, models)
        stages.probe(run, models)
        run.workers.once(lambda: print(run.path / "responses.jsonl"))


def filter_responses(options: argparse.Namespace) -> None:
    """Verdicts, further attempts, and what is accepted."""
    with _opened(options) as (run, models, stages):
        from thinksafe.pipeline.imports import take_in_marks, take_in_responses

        if options.responses is not None:
            run.workers.once(lambda: take_in_responses(run, options.responses))
        stages.filter_responses(run, models)
        stages.retry(run, models)
        if options.marks is not None:
            run.workers.once(lambda: take_in_marks(run, options.marks))
            stages.retry(run, models)  # whose accepted response a person rejected
        run.workers.once(lambda: stages.accept(run))
        run.workers.once(lambda: _print_coverage(run))
        run.workers.once(lambda: print(run.path / "accepted.jsonl"))


def train(options: argparse.Namespace) -> None:
    """The adapter, or the whole model."""
    with _opened(options) as (run, models, stages):
        from thinksafe.pipeline.imports import take_in_examples

        if options.data is not None:
            run.workers.once(lambda: take_in_examples(run, options.data))
        stages.train(run, models)
        student = run.path / ("adapter" if run.recipe.training.method == "lora" else "model")
        run.workers.once(lambda: print(student))


def evaluate(options: argparse.Namespace) -> None:
    """Figures before training, and after it where there is a trained student."""
    with _opened(options) as (run, models, stages):
        if not run.recipe.evaluation.sets:
            raise UserError(
                "evaluation.sets: the recipe names no evaluation set; add one with "
                "--set 'evaluation.sets=[{name: mine, file: prompts.jsonl, kind: harmful}]'"
            )
        if options.adapter is not None:
            models.sampled_student(adapter=options.adapter)  # a wrong one is found before hours of `before`
        stages.evaluate(run, models, "before")
        if options.adapter is not None or run.is_done("train"):
            stages.evaluate(run, models, "after", options.adapter)
        run.workers.once(lambda: _print_report(stages.report(run)))


def report(options: argparse.Namespace) -> None:
    """The report on whatever is there."""
    with _opened(options) as (run, _, stages):
        run.workers.once(lambda: _print_report(stages.report(run)))


def review(options: argparse.Namespace) -> None:
    """The page on which people mark responses."""
    with _opened(options) as (run, _, stages):
        run.workers.once(lambda: print(stages.review(run, options.most)))


def export_data(options: argparse.Namespace) -> None:
    """The accepted set as a data set folder."""
    with _opened(options) as (run, _, _):
        from thinksafe.export.dataset import export_data

        run.workers.once(lambda: print(export_data(run, options.to)))


def export_model(options: argparse.Namespace) -> None:
    """The trained student as one checkpoint."""
    with _opened(options) as (run, models, _):
        from thinksafe.export.model import export_model

        run.workers.once(lambda: print(export_model(run, models, options.to)))


def estimate(options: argparse.Namespace) -> None:
    """What a run will take."""
    with leaving_at_once():
        from thinksafe.estimate.stages import estimate
        from thinksafe.estimate.table import Price, estimate_table
        from thinksafe.hardware import hardware_named
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.run.directory import RunDir

    hardware = hardware_named(options.gpu)
    price = None if options.price is None else Price.parse(options.price)
    recipe = load_recipe(_recipe_source(options), options.set)
    run = None if options.out is None else RunDir(options.out, recipe)
    found = estimate(recipe, hardware, options.gpus, run)
    _show(estimate_table(found, recipe.name, hardware.memory_bytes, price) + "\n")


def print_recipe(options: argparse.Namespace) -> None:
    """A recipe with every key and its meaning."""
    with leaving_at_once():
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.recipe.reference import explained
        from thinksafe.recipe.schema import Recipe

    if options.recipe is None and not options.set:
        _show(explained(Recipe(name="mine", model="Qwen/Qwen3-0.6B")))
    else:
        _show(explained(load_recipe(options.recipe or "qwen3-0.6b", options.set)))


def build_organism(options: argparse.Namespace) -> None:
    """The synthetic world from nothing."""
    with leaving_at_once():
        from tqdm import tqdm

        from thinksafe.organism.build import HISTORY, build

    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out}: is not empty; give a new folder")
    with tqdm(total=sum(stage.steps for stage in HISTORY), desc="organism", unit=" steps", disable=None) as bar:

        def on_step(stage, metrics) -> None:
            bar.update(1)
            bar.set_postfix_str(f"stage {stage}  loss {metrics.loss:.3f}", refresh=False)

        build(options.out, options.seed, on_step)
    print(options.out)


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple["RunDir", "Models", Any]]:
    """The run directory of a command, its checkpoints, and the module of the stages."""
    with leaving_at_once():
        from thinksafe import pipeline as stages
        from thinksafe.distributed.workers import Workers
        from thinksafe.recipe.loading import load_recipe
        from thinksafe.run.checkpoints import Models
        from thinksafe.run.directory import RunDir

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    with Workers.join() as workers:
        recipe = load_recipe(_recipe_source(options), [*options.set, *seed])
        with RunDir.open(options.out or Path("runs") / recipe.name, recipe, workers) as run:
            models = Models(recipe, workers)
            workers.once(lambda: stages.foresee(run, models))
            yield run, models, stages


def _recipe_source(options: argparse.Namespace) -> str:
    """The recipe that was named, or the one in the run directory."""
    if options.recipe is not None:
        return options.recipe
    if options.out is not None and (options.out / "recipe.yaml").is_file():
        return str(options.out / "recipe.yaml")
    names = ", ".join(bundled_recipes())
    if options.out is not None:
        raise UserError(f"--out {options.out}: holds no run to go on with; give --recipe FILE or one of {names}")
    raise UserError(f"--recipe: give a file or one of {names}, or an --out folder with a run in it")


def _show(page: str) -> None:
    try:
        print(page, end="", flush=True)
    except BrokenPipeError:  # whoever reads it, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter, which flushes once more


def _print_coverage(run: "RunDir") -> None:
    """To stderr, beside the progress of the stages that are summed up."""
    from thinksafe.reporting.coverage import coverage_lines
    from thinksafe.reporting.summary import coverage_of

    for name, text in coverage_lines(coverage_of(run)):
        print(f"{name:>30}: {text}", file=sys.stderr)


def _print_report(page: Path) -> None:
    report = json.loads(page.with_name("report.json").read_text())
    for key, title in (
        ("harmful_ratio", "harmful responses"),
        ("over_refusal", "needless refusals"),
        ("reasoning_accuracy", "reasoning accuracy"),
    ):
        figure = report.get(key) or {}
        moments = []
        for moment in ("before", "after"):
            if moment in figure:
                low, high = figure[f"{moment}_interval"]
                moments.append(f"{moment} {figure[moment]:6.1%}  [{low:.1%}, {high:.1%}]")
            if unknown := figure.get("unknown", {}).get(moment):
                moments.append(f"({unknown} without a verdict {moment})")
        if moments:
            print(f"{title:>20}   {'   '.join(moments)}")
    print(f"{'report':>20}   {page}")
