"""The command line as a table: every command with its options. commands.py runs the commands.

Help, version and usage errors need only the standard library, so nothing else is imported here.
"""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from thinksafe import __version__
from thinksafe.cli import commands
from thinksafe.paths import bundled_recipes

_INTRODUCTION = """\
Restore the safety of a reasoning model with its own data.

  thinksafe run --recipe organism        all stages on a bundled model organism
  thinksafe run --recipe qwen3-0.6b      the paper's settings on one GPU
  thinksafe estimate --recipe qwen3-8b   expected time and memory of a run
  torchrun --nproc-per-node gpu -m thinksafe.cli run ...      on all GPUs

A model organism is a small model made to show a known fault: here, a student that lost its safety.

A run directory holds the recipe, every record and the report. Any command can be killed and run again: it continues
where it stopped. Each stage is also a command, which works on the same --out folder.
"""

_RECIPE_HELP = """\
A recipe is YAML; --recipe takes a file or a bundled name, and --set changes single keys:

  --set model=/path/to/checkpoint --set prompts=prompts.jsonl
  --set generation.steering=risk --set 'lora={rank: 16, alpha: 16}'

Without --recipe, the recipe in the --out folder is used. `thinksafe recipe` explains every key.
"""

Option = tuple[str, dict[str, Any]]
"""A flag, such as `--out`, and the keyword arguments for `add_argument`."""


def _option(flag: str, metavar: str, help: str, **settings: Any) -> Option:
    """Return an option; `settings` are further arguments for `add_argument`."""
    return flag, {"metavar": metavar, "help": help, **settings}


def _positive_integer(text: str) -> int:
    """Return the whole number of 1 or more that a text spells in digits; for others raise ArgumentTypeError."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, found {text!r}")
    return int(text)


def _non_negative_integer(text: str) -> int:
    """Return the whole number of 0 or more that a text spells in digits; for others raise ArgumentTypeError."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, found {text!r}")
    return int(text)


class Command(NamedTuple):
    """One command of the command line; `build_parser` makes its subparser from it.

    Attributes:
        name: word that selects the command.
        run: function that runs the command, with the parsed options.
        summary: one line for the list of commands; it also opens the help of the command.
        details: paragraphs that follow the summary in the help of the command; may be empty.
        options: its options, in the order of the help.
        epilog: text below the options in the help of the command; may be empty.
    """

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    details: str = ""
    options: tuple[Option, ...] = ()
    epilog: str = ""


_RECIPE_OPTIONS = (
    _option("--recipe", "FILE", f"recipe file, or one of: {', '.join(bundled_recipes())}"),
    _option("--set", "KEY=VALUE", "change one key; repeatable", action="append", default=[]),
)
_RUN_OPTIONS = (
    *_RECIPE_OPTIONS,
    _option("--seed", "N", "the same as --set seed=N", type=int),
    _option("--out", "DIR", "run directory (default: runs/NAME of the recipe)", type=Path),
)
_NEW_FOLDER = _option("--to", "DIR", "a new folder", type=Path, required=True)

COMMANDS = (
    Command(
        "run",
        commands.run,
        "all stages, from prompts to the report",
        "generate, filter, train, evaluate before and after, report.",
        _RUN_OPTIONS,
        _RECIPE_HELP,
    ),
    Command(
        "generate",
        commands.generate,
        "sample the student's own responses to every prompt",
        "Harmful prompts are sampled with the refusal instruction, benign prompts without it. Writes responses.jsonl.\n"
        "\n"
        "Prompts are .jsonl, .json or .parquet with `text` (or `prompt`, or `instruction`) and `label`.",
        (*_RUN_OPTIONS, _option("--prompts", "FILE", "the same as --set prompts=FILE")),
        _RECIPE_HELP,
    ),
    Command(
        "filter",
        commands.filter_responses,
        "judge responses with the guard and keep the safe ones",
        "Writes verdicts.jsonl (every response, with probabilities and reason), accepted.jsonl (the first accepted "
        "response of each prompt) and audit.jsonl (every attempt at each prompt). If the recipe has a "
        "generation.ladder, prompts whose responses were all rejected, by guard or person, are tried again.\n\n"
        "A human mark overrides the guard; it carries a name and is counted in the report. A response is dropped if "
        "one person rejects it. Give marks before training: a trained run takes no new ones.",
        (
            *_RUN_OPTIONS,
            _option(
                "--responses",
                "FILE",
                "judge these responses, each with `prompt`, `label` and `text`; or a run directory: judge all of its "
                "responses again as first attempts, and keep its human marks",
                type=Path,
            ),
            _option("--marks", "FILE", "human marks, downloaded from the page of `thinksafe review`", type=Path),
        ),
        _RECIPE_HELP,
    ),
    Command(
        "train",
        commands.train,
        "fine-tune the student on accepted.jsonl",
        "Writes adapter/ in PEFT's format, or model/ with --set training.method=full. A killed training continues from "
        "its last checkpoint, on any number of processes.\n\n"
        "Processes started with torchrun train together by DeepSpeed ZeRO; `zero.stage` (default: auto) sets how much "
        "they shard. One process can keep the optimizer in host memory: --set zero.offload_optimizer=true.",
        (
            *_RUN_OPTIONS,
            _option("--data", "FILE", "train on these examples: `prompt`, `response`, `label`", type=Path),
        ),
        _RECIPE_HELP,
    ),
    Command(
        "evaluate",
        commands.evaluate,
        "measure harm, over-refusal and reasoning, before and after",
        "`after` is measured if the run directory holds a trained student or --adapter names one. ThinkSafe adapters "
        "record their base weights in base.json and are rejected for any other base. Other adapters only need matching "
        "shapes.",
        (*_RUN_OPTIONS, _option("--adapter", "DIR", "evaluate this PEFT adapter as `after`", type=Path)),
        _RECIPE_HELP,
    ),
    Command(
        "report",
        commands.report,
        "write report.html and report.json from the records so far",
        options=_RUN_OPTIONS,
        epilog=_RECIPE_HELP,
    ),
    Command(
        "review",
        commands.review,
        "write review.html, where a person marks uncertain responses",
        "One file that needs no network: open it in a browser, mark, download marks.jsonl, and pass that file to "
        "`thinksafe filter --out DIR --marks marks.jsonl` before training. Harmful text is blurred until clicked.",
        (
            *_RUN_OPTIONS,
            _option("--max-responses", "N", "size of the page (default: 500)", type=_positive_integer, default=500),
        ),
        _RECIPE_HELP,
    ),
    Command(
        "export-data",
        commands.export_data,
        "write the accepted set as a Hugging Face data set folder",
        "Parquet, and a card with counts, filter rates, lengths, guard, recipe and hashes. datasets.load_dataset(DIR) "
        "reads the folder; `thinksafe train --data` reads the parquet file.",
        (*_RUN_OPTIONS, _NEW_FOLDER),
        _RECIPE_HELP,
    ),
    Command(
        "export-model",
        commands.export_model,
        "write the trained student as one checkpoint, adapter merged",
        "In Hugging Face's format, for programs that read no adapters. Needs host memory for the student's weights, "
        "and no GPU.",
        (*_RUN_OPTIONS, _NEW_FOLDER),
        _RECIPE_HELP,
    ),
    Command(
        "estimate",
        commands.estimate,
        "time, memory and cost of every stage on a named GPU",
        "Computed from the shapes of student and guard, before anything runs. It needs no weights, no GPU and no "
        "network. With --out DIR it uses the response lengths of that run directory.",
        (
            *_RECIPE_OPTIONS,
            _option("--gpu", "NAME", "H200 (the default), H100, A100, L40S or RTX4090", default="H200"),
            _option("--gpus", "N", "number of GPUs (default: 1)", type=_positive_integer, default=1),
            _option("--price", "AMOUNT", "price of one GPU for an hour, such as 3.5, '$3.5' or '3.5 EUR'"),
            _option("--out", "DIR", "run directory whose response lengths are used", type=Path),
        ),
        _RECIPE_HELP,
    ),
    Command(
        "recipe",
        commands.print_recipe,
        "print a recipe with every key, its meaning and its default",
        "The output is itself a recipe: save it, change it, and pass it to --recipe. Without --recipe it holds the "
        "defaults, with --set alone the recipe qwen3-0.6b with the change.",
        _RECIPE_OPTIONS,
    ),
)
# The commands below `thinksafe organism`.
ORGANISM_COMMANDS = (
    Command(
        "build",
        commands.build_organism,
        "build the model organism, its prompts and evaluation sets from a seed",
        "Trains the tiny student through its history on a CPU. Each seed gives another world.",
        (
            _option("--seed", "N", "seed of the world (default: 0)", type=_non_negative_integer, default=0),
            _option("--out", "DIR", "a new folder", type=Path, required=True),
        ),
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    The namespace that it parses has the options of the chosen command and the attribute `command`: the function that
    runs the command, to be called with this namespace.
    """
    parser = argparse.ArgumentParser(
        "thinksafe", description=_INTRODUCTION, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"thinksafe {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        _add_command(subparsers, command)
    organism = subparsers.add_parser(
        "organism", help="build a model organism from a seed", formatter_class=_HelpFormatter
    )
    organism_subparsers = organism.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in ORGANISM_COMMANDS:
        _add_command(organism_subparsers, command)
    return parser


def _add_command(subparsers: argparse._SubParsersAction, command: Command) -> None:
    """Add the subparser of a command."""
    parser = subparsers.add_parser(
        command.name,
        help=command.summary,
        description=f"{command.summary[0].upper()}{command.summary[1:]}.\n\n{command.details}",
        epilog=command.epilog,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for flag, settings in command.options:
        parser.add_argument(flag, **settings)
    parser.set_defaults(command=command.run)


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that fills paragraphs to the terminal's width, keeps indented lines, and lists commands by name."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # recipe names contain hyphens

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)
