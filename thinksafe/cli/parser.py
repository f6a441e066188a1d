"""The command line as a table: every command with its options. commands.py runs the commands.

The docstring of a command is its help: the first line is its summary in the list of commands. Help, version and usage
errors need only the standard library, so nothing else is imported here.
"""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thinksafe import __version__
from thinksafe.cli import commands
from thinksafe.paths import bundled_methods, bundled_recipes

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
    return flag, {"metavar": metavar, "help": help, **settings}


def _path(flag: str, metavar: str, help: str, **settings: Any) -> Option:
    return _option(flag, metavar, help, type=Path, **settings)


def _integer(minimum: int) -> Callable[[str], int]:
    """Return the parser of a whole number that is at least `minimum`, which is not negative."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of {minimum} or more, found {text!r}")
        return int(text)

    return parse


_RECIPE_OPTIONS = (
    _option("--recipe", "FILE", f"recipe file, or one of: {', '.join(bundled_recipes())}"),
    _option(
        "--method",
        "NAME",
        f"train by this method instead of the recipe's: {', '.join(bundled_methods())}; NAME@BUDGET picks one of its "
        "budgets as_in_the_paper (the default), own_recipe and matched",
    ),
    _option("--set", "KEY=VALUE", "change one key; repeatable", action="append", default=[]),
)
_RUN_OPTIONS = (
    *_RECIPE_OPTIONS,
    _option("--seed", "N", "the same as --set seed=N", type=int),
    _path("--out", "DIR", "run directory (default: runs/NAME of the recipe)"),
)
_NEW_FOLDER = _path("--to", "DIR", "a new folder", required=True)

COMMANDS = {
    "run": (commands.run, *_RUN_OPTIONS),
    "generate": (commands.generate, *_RUN_OPTIONS, _option("--prompts", "FILE", "the same as --set prompts=FILE")),
    "filter": (
        commands.filter_responses,
        *_RUN_OPTIONS,
        _path(
            "--responses",
            "FILE",
            "judge these responses, each with `prompt`, `label` and `text`; or a run directory: judge all of its "
            "responses again as first attempts, and keep its human marks",
        ),
        _path("--marks", "FILE", "human marks, downloaded from the page of `thinksafe review`"),
    ),
    "train": (
        commands.train,
        *_RUN_OPTIONS,
        _path("--data", "FILE", "train on these examples: `prompt`, `response`, `label`"),
    ),
    "evaluate": (commands.evaluate, *_RUN_OPTIONS, _path("--adapter", "DIR", "evaluate this PEFT adapter as `after`")),
    "report": (commands.report, *_RUN_OPTIONS),
    "review": (
        commands.review,
        *_RUN_OPTIONS,
        _option("--max-responses", "N", "size of the page (default: 500)", type=_integer(1), default=500),
    ),
    "export-data": (commands.export_data, *_RUN_OPTIONS, _NEW_FOLDER),
    "export-model": (commands.export_model, *_RUN_OPTIONS, _NEW_FOLDER),
    "estimate": (
        commands.estimate,
        *_RECIPE_OPTIONS,
        _option("--gpu", "NAME", "H200 (the default), H100, A100, L40S or RTX4090", default="H200"),
        _option("--gpus", "N", "number of GPUs (default: 1)", type=_integer(1), default=1),
        _option("--price", "AMOUNT", "price of one GPU for an hour, such as 3.5, '$3.5' or '3.5 EUR'"),
        _path("--out", "DIR", "run directory whose response lengths are used"),
    ),
    "recipe": (commands.print_recipe, *_RECIPE_OPTIONS),
}
"""Commands by name: the function that runs a command with its parsed options, then the options."""
ORGANISM_COMMANDS = {
    "build": (
        commands.build_organism,
        _option("--seed", "N", "seed of the world (default: 0)", type=_integer(0), default=0),
        _path("--out", "DIR", "a new folder", required=True),
    ),
}
"""Commands below `thinksafe organism`."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line.

    The namespace that it parses has the options of the chosen command and the attribute `command`: the function that
    runs the command, to be called with this namespace.
    """
    parser = _Parser("thinksafe", description=_INTRODUCTION)
    parser.add_argument("--version", action="version", version=f"thinksafe {__version__}")
    subparsers = _add_commands(parser, COMMANDS)
    _add_commands(subparsers.add_parser("organism", help="build a model organism from a seed"), ORGANISM_COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, table: dict[str, tuple]) -> Any:
    """Add a subparser for each command of a table, and return argparse's object that adds further ones."""
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (command, *options) in table.items():
        summary, _, details = command.__doc__.partition("\n")
        subparser = subparsers.add_parser(
            name,
            help=summary[0].lower() + summary[1:].removesuffix("."),
            description=f"{summary}\n{textwrap.dedent(details)}",
            epilog=_RECIPE_HELP if {"--recipe", "--out"} <= dict(options).keys() else None,
        )
        for flag, settings in options:
            subparser.add_argument(flag, **settings)
        subparser.set_defaults(command=command)
    return subparsers


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


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, formatter_class=_HelpFormatter, allow_abbrev=False, **settings)
