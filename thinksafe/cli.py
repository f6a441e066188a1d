"""The command line. It parses, opens the run directory, calls stages, and turns a user's mistake into one line."""

import sys

try:
    import argparse
    import errno
    import json
    import os
    import re
    import signal
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import contextmanager, redirect_stderr, redirect_stdout
    from pathlib import Path
    from typing import Any

    from thinksafe import __version__
    from thinksafe.errors import UserError, is_out_of_memory
except KeyboardInterrupt:  # before `main` could answer for it
    sys.exit(130)

_INTRODUCTION = """\
Restore the safety of a reasoning model with its own data.

  thinksafe run --recipe organism --out runs/demo     everything, on a bundled synthetic world, in minutes on a CPU
  thinksafe run --recipe qwen3-0.6b --out runs/qwen   the paper's settings on one GPU
  thinksafe estimate --recipe qwen3-8b --gpu H100     what that will take, before anything runs
  torchrun --nproc-per-node gpu -m thinksafe.cli run ...     all GPUs of a machine; launch/README.md has more

A run directory holds the recipe, every record and the report. Any command can be killed and given again: it goes on
where it stopped. The stages can be run one by one on the same --out folder:
"""

_MEMORY_SETTINGS = "sampler.kv_cache_gib, sampler.max_running or training.max_tokens_per_pack"
_RECIPE_HELP = """\
A recipe is YAML; --recipe takes a file or a bundled name, and --set changes single keys:

  --set model=/path/to/checkpoint --set prompts=prompts.jsonl --set training.epochs=1
  --set generation.steering=risk --set 'generation.sampling={temperature: 1.0, top_p: 1.0, top_k: 0}'

Without --recipe the one in the --out folder is used. `thinksafe recipe` explains every key.
"""


_USERS_TO_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for the user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a store that is gone would be told of in stack traces
    status = _answer(arguments)
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from thinksafe.workers import end

        end(status)
    return status


def _answer(arguments: Sequence[str] | None) -> int:
    options = None
    try:
        with _leaving_at_once():
            options = _parsed(arguments)
        options.command(options)
        return 0
    except UserError as error:
        print(f"thinksafe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        why = str(interrupt) or "interrupted"
        print(f"\nthinksafe: {why}; nothing finished is lost, the same command goes on from here", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"thinksafe: out of memory: {str(error).splitlines()[0]}; lower {_MEMORY_SETTINGS}", file=sys.stderr)
        return 2
    except _disk_errors() as error:
        said = re.search(r"os error (\d+)", str(error))
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number not in _USERS_TO_MEND:
            raise
        where = getattr(error, "filename", None) or getattr(options, "out", None)  # a write does not tell its file
        place = f" ({where})" if where else ""
        print(f"thinksafe: {os.strerror(number)}{place}; mend that and give the same command again", file=sys.stderr)
        return 2


def _disk_errors() -> tuple[type[Exception], ...]:
    """safetensors tells of a full disk by an error of its own; asked for only once something has gone wrong."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of several workers, which are all given the same, one explains and complains."""
    if os.environ.get("RANK", "0") == "0":
        return _parser().parse_args(arguments)
    with open(os.devnull, "w") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        return _parser().parse_args(arguments)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """For imports: Ctrl-C raised inside one can be lost or come out as another error, and there is nothing to save."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "thinksafe", description=_INTRODUCTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"thinksafe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def stage(name: str, command: Callable, summary: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{description}".strip(),
            epilog=_RECIPE_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--recipe", metavar="FILE", help="recipe file, or one of: " + ", ".join(_bundled()))
        sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
        sub.add_argument("--seed", type=int, help="the same as --set seed=N")
        sub.add_argument("--out", metavar="DIR", type=Path, help="run directory (default: runs/NAME of the recipe)")
        sub.set_defaults(command=command)
        return sub

    stage(
        "run",
        _run,
        "all stages, from prompts to the report",
        "generate, filter, train, evaluate before and after, report.",
    )
    sub = stage(
        "generate",
        _generate,
        "sample the student's own responses to every prompt",
        "Harmful prompts are sampled with the refusal instruction, benign ones without. Writes responses.jsonl.\n"
        "Prompts are .jsonl, .json or .parquet with `text` (or `prompt`, or `instruction`) and `label`.",
    )
    sub.add_argument("--prompts", metavar="FILE", help="the same as --set prompts=FILE")
    sub = stage(
        "filter",
        _filter,
        "judge responses with the guard and keep the safe ones",
        "Writes verdicts.jsonl (every response, with probabilities and reason), accepted.jsonl (of every prompt the\n"
        "first response that was accepted) and audit.jsonl (every prompt's whole story). Where the recipe has a\n"
        "generation.ladder, prompts whose responses were all rejected, by guard or person, are tried again. People's\n"
        "marks go before the guard's word, each with a name and counted in the report; a response that somebody\n"
        "rejects is never kept. Marks come before training: a run that is trained refuses new ones.",
    )
    sub.add_argument(
        "--responses",
        metavar="FILE",
        type=Path,
        help="judge these; needs `prompt`, `label`, `text`; or another run's DIR: all its responses, every one judged "
        "anew as a first attempt, and people's marks on them",
    )
    sub.add_argument("--marks", metavar="FILE", type=Path, help="take in what people marked on the `review` page")
    sub = stage(
        "train",
        _train,
        "fine-tune the student on accepted.jsonl",
        "Writes adapter/ in PEFT's format, or model/ with --set training.method=full.\n"
        "Several processes, started with torchrun, train together by DeepSpeed ZeRO; `zero.stage`, auto by default,\n"
        "says how much they share out. One process can keep the optimiser in host memory: --set\n"
        "zero.offload_optimizer=true. Killed, it goes on from its last checkpoint, on any number of processes.",
    )
    sub.add_argument("--data", metavar="FILE", type=Path, help="train on these; needs `prompt`, `response`, `label`")
    sub = stage(
        "evaluate",
        _evaluate,
        "measure harm, over-refusal and reasoning, before and after",
        "`after` is measured where the run directory holds a trained student, or --adapter names one. An adapter that\n"
        "thinksafe trained tells in its base.json on which weights, and is refused on others; one from elsewhere is\n"
        "taken where its shapes fit the student's.",
    )
    sub.add_argument("--adapter", metavar="DIR", type=Path, help="evaluate this PEFT adapter as `after`")
    stage("report", _report, "write report.html and report.json from what is there")
    sub = stage(
        "review",
        _review,
        "write review.html, in which a person reads the most uncertain responses and marks them",
        "One file without any network: open it in a browser, mark, download marks.jsonl, and give that back\n"
        "with `thinksafe filter --out DIR --marks marks.jsonl` before training. Harmful text is blurred until clicked.",
    )
    sub.add_argument("--most", metavar="N", type=_count, default=500, help="responses on the page (default: 500)")

    sub = stage(
        "export-data",
        _export_data,
        "write the accepted set as a Hugging Face data set folder",
        "Parquet, and a card with counts, filter rates, lengths, guard, recipe and hashes. datasets.load_dataset(DIR)\n"
        "reads it; so does `thinksafe train --data` with the parquet file.",
    )
    sub.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")

    sub = stage(
        "export-model",
        _export_model,
        "write the trained student as one Hugging Face checkpoint, its adapter merged",
        "For whatever reads no adapters. Needs host memory for the student's weights, and no GPU.",
    )
    sub.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")

    sub = commands.add_parser(
        "estimate",
        help="time, memory and cost of every stage on a named GPU, before anything runs",
        description="Counted from the shapes of student and guard: no weights, no GPU and no network are needed.\n"
        "With --out DIR, response lengths are those that the run directory holds already.",
        epilog=_RECIPE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.add_argument("--recipe", metavar="FILE", help="recipe file, or one of: " + ", ".join(_bundled()))
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    sub.add_argument("--gpu", metavar="NAME", default="H200", help="H200 (the default), H100, A100, L40S or RTX4090")
    sub.add_argument("--gpus", metavar="N", type=_count, default=1, help="how many of them share the work (default: 1)")
    sub.add_argument("--price", metavar="AMOUNT", help="of one GPU for an hour, such as 3.5, '$3.5' or '3.5 EUR'")
    sub.add_argument("--out", metavar="DIR", type=Path, help="run directory that tells how long responses are")
    sub.set_defaults(command=_estimate)

    sub = commands.add_parser(
        "recipe",
        help="print a recipe with every key, its meaning and its default",
        description="The output is a recipe itself: keep it, change it, and give it back with --recipe.",
        allow_abbrev=False,
    )
    sub.add_argument("--recipe", metavar="FILE", help="recipe file, or one of: " + ", ".join(_bundled()))
    sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    sub.set_defaults(command=_print_recipe)

    organism = commands.add_parser("organism", help="the bundled synthetic world").add_subparsers(
        required=True, metavar="COMMAND"
    )
    build = organism.add_parser(
        "build",
        help="re-create the world's student, prompts and evaluation sets from nothing",
        description="Trains the tiny student through its history on a CPU. Another seed is another world.",
    )
    build.add_argument("--seed", type=_seed, default=0)
    build.add_argument("--out", metavar="DIR", type=Path, required=True)
    build.set_defaults(command=_build_organism)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, found {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, found {text!r}")
    return int(text)


def _bundled() -> list[str]:
    from thinksafe.paths import bundled_recipes

    return bundled_recipes()


def _run(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
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

    _in_run_directory(options, work)


def _generate(options: argparse.Namespace) -> None:
    if options.prompts is not None:
        options.set.append(f"prompts={json.dumps(options.prompts)}")

    def work(run, models, stages) -> None:
        stages.generate(run, models)
        stages.probe(run, models)
        run.workers.once(lambda: print(run.path / "responses.jsonl"))

    _in_run_directory(options, work)


def _filter(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
        if options.responses is not None:
            from thinksafe.intake import take_in_responses

            run.workers.once(lambda: take_in_responses(run, options.responses))
        stages.filter_responses(run, models)
        stages.retry(run, models)
        if options.marks is not None:
            from thinksafe.intake import take_in_marks

            run.workers.once(lambda: take_in_marks(run, options.marks))
            stages.retry(run, models)  # whose accepted response a person rejected
        run.workers.once(lambda: stages.accept(run))
        run.workers.once(lambda: _print_coverage(run))
        run.workers.once(lambda: print(run.path / "accepted.jsonl"))

    _in_run_directory(options, work)


def _train(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
        if options.data is not None:
            from thinksafe.intake import take_in_examples

            run.workers.once(lambda: take_in_examples(run, options.data))
        stages.train(run, models)
        student = run.path / ("adapter" if run.recipe.training.method == "lora" else "model")
        run.workers.once(lambda: print(student))

    _in_run_directory(options, work)


def _evaluate(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
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

    _in_run_directory(options, work)


def _report(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
        run.workers.once(lambda: _print_report(stages.report(run)))

    _in_run_directory(options, work)


def _review(options: argparse.Namespace) -> None:
    def work(run, models, stages) -> None:
        run.workers.once(lambda: print(stages.review(run, options.most)))

    _in_run_directory(options, work)


def _export_data(options: argparse.Namespace) -> None:
    from thinksafe.export import export_data

    def work(run, models, stages) -> None:
        run.workers.once(lambda: print(export_data(run, options.to)))

    _in_run_directory(options, work)


def _export_model(options: argparse.Namespace) -> None:
    from thinksafe.merged import export_model

    def work(run, models, stages) -> None:
        run.workers.once(lambda: print(export_model(run, models, options.to)))

    _in_run_directory(options, work)


def _estimate(options: argparse.Namespace) -> None:
    with _leaving_at_once():
        from thinksafe.display import Price, estimate_table
        from thinksafe.estimate import estimate
        from thinksafe.hardware import hardware_named
        from thinksafe.recipe import load_recipe
        from thinksafe.rundir import RunDir

    hardware = hardware_named(options.gpu)
    price = None if options.price is None else Price.parse(options.price)
    recipe = load_recipe(_recipe_source(options), options.set)
    run = None if options.out is None else RunDir(options.out, recipe)
    found = estimate(recipe, hardware, options.gpus, run)
    _show(estimate_table(found, recipe.name, hardware.memory_bytes, price) + "\n")


def _print_recipe(options: argparse.Namespace) -> None:
    with _leaving_at_once():
        from thinksafe.manual import explained
        from thinksafe.recipe import Recipe, load_recipe

    if options.recipe is None and not options.set:
        _show(explained(Recipe(name="mine", model="Qwen/Qwen3-0.6B")))
    else:
        _show(explained(load_recipe(options.recipe or "qwen3-0.6b", options.set)))


def _show(page: str) -> None:
    try:
        print(page, end="", flush=True)
    except BrokenPipeError:  # whoever reads it, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter, which flushes once more


def _recipe_source(options: argparse.Namespace) -> str:
    """The recipe that was named, or the one in the run directory."""
    if options.recipe is not None:
        return options.recipe
    if options.out is None or not (options.out / "recipe.yaml").is_file():
        names = ", ".join(_bundled())
        if options.out is not None and options.out.exists():
            raise UserError(f"--out {options.out}: holds no run; give --recipe FILE or one of {names}")
        raise UserError(f"--recipe: give a file or one of {names}, or an --out folder with a run in it")
    return str(options.out / "recipe.yaml")


def _in_run_directory(options: argparse.Namespace, work: Callable[[Any, Any, Any], None]) -> None:
    """Everything heavy is imported here, after the arguments are known to be good."""
    with _leaving_at_once():
        from thinksafe import stages
        from thinksafe.models import Models
        from thinksafe.recipe import load_recipe
        from thinksafe.rundir import RunDir
        from thinksafe.workers import Workers

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    with Workers.join() as workers:
        recipe = load_recipe(_recipe_source(options), [*options.set, *seed])
        with RunDir.open(options.out or Path("runs") / recipe.name, recipe, workers) as run:
            models = Models(recipe, workers)
            workers.once(lambda: stages.foresee(run, models))
            work(run, models, stages)


def _print_coverage(run: Any) -> None:
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


def _build_organism(options: argparse.Namespace) -> None:
    with _leaving_at_once():
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


if __name__ == "__main__":
    sys.exit(main())
