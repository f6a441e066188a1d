"""The command line's options. What commands do stands in commands.py."""

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path

from thinksafe import __version__
from thinksafe.cli import commands
from thinksafe.paths import bundled_recipes

_INTRODUCTION = """\
Restore the safety of a reasoning model with its own data.

  thinksafe run --recipe organism        all of it on a bundled synthetic world
  thinksafe run --recipe qwen3-0.6b      the paper's settings on one GPU
  thinksafe estimate --recipe qwen3-8b   what that will take, before it runs
  torchrun --nproc-per-node gpu -m thinksafe.cli run ...      on all GPUs

A run directory holds the recipe, every record and the report. Any command can be killed and given again: it goes on
where it stopped. The stages can be run one by one on the same --out folder.
"""

_RECIPE_HELP = """\
A recipe is YAML; --recipe takes a file or a bundled name, and --set changes single keys:

  --set model=/path/to/checkpoint --set prompts=prompts.jsonl
  --set generation.steering=risk --set 'lora={rank: 16, alpha: 16}'

Without --recipe the one in the --out folder is used. `thinksafe recipe` explains every key.
"""

class _Help(argparse.HelpFormatter):
    """Paragraphs as wide as the terminal, indented lines as they are, and commands under a heading of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # which names of recipes have many of

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("thinksafe", description=_INTRODUCTION, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"thinksafe {__version__}")
    known = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, work: Callable, summary: str, more: str = "", epilog: str = "") -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}.\n\n{more}"
        about = {"help": summary, "description": description, "epilog": epilog}
        sub = known.add_parser(name, **about, formatter_class=_Help, allow_abbrev=False)
        sub.add_argument("--recipe", metavar="FILE", help="recipe file, or one of: " + ", ".join(bundled_recipes()))
        sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
        sub.set_defaults(command=work)
        return sub

    def stage(name: str, work: Callable, summary: str, more: str = "") -> argparse.ArgumentParser:
        sub = command(name, work, summary, more, _RECIPE_HELP)
        sub.add_argument("--seed", metavar="N", type=int, help="the same as --set seed=N")
        sub.add_argument("--out", metavar="DIR", type=Path, help="run directory (default: runs/NAME of the recipe)")
        return sub

    stage(
        "run",
        commands.run,
        "all stages, from prompts to the report",
        "generate, filter, train, evaluate before and after, report.",
    )
    sub = stage(
        "generate",
        commands.generate,
        "sample the student's own responses to every prompt",
        "Harmful prompts are sampled with the refusal instruction, benign ones without. Writes responses.jsonl.\n\n"
        "Prompts are .jsonl, .json or .parquet with `text` (or `prompt`, or `instruction`) and `label`.",
    )
    sub.add_argument("--prompts", metavar="FILE", help="the same as --set prompts=FILE")
    sub = stage(
        "filter",
        commands.filter_responses,
        "judge responses with the guard and keep the safe ones",
        "Writes verdicts.jsonl (every response, with probabilities and reason), accepted.jsonl (of every prompt the "
        "first response that was accepted) and audit.jsonl (every prompt's whole story). Where the recipe has a "
        "generation.ladder, prompts whose responses were all rejected, by guard or person, are tried again.\n\n"
        "People's marks go before the guard's word, each with a name and counted in the report; a response that "
        "somebody rejects is never kept. Marks come before training: a run that is trained refuses new ones.",
    )
    responses = (
        "judge these; needs `prompt`, `label`, `text`; or another run's DIR: all its responses, every one judged anew "
        "as a first attempt, and people's marks on them"
    )
    sub.add_argument("--responses", metavar="FILE", type=Path, help=responses)
    sub.add_argument("--marks", metavar="FILE", type=Path, help="take in what people marked on the `review` page")
    sub = stage(
        "train",
        commands.train,
        "fine-tune the student on accepted.jsonl",
        "Writes adapter/ in PEFT's format, or model/ with --set training.method=full. Killed, it goes on from its last "
        "checkpoint, on any number of processes.\n\n"
        "Several processes, started with torchrun, train together by DeepSpeed ZeRO; `zero.stage`, auto by default, "
        "says how much they share out. One process can keep the optimiser in host memory: --set "
        "zero.offload_optimizer=true.",
    )
    sub.add_argument("--data", metavar="FILE", type=Path, help="train on these; needs `prompt`, `response`, `label`")
    sub = stage(
        "evaluate",
        commands.evaluate,
        "measure harm, over-refusal and reasoning, before and after",
        "`after` is measured where the run directory holds a trained student, or --adapter names one. An adapter that "
        "thinksafe trained tells in its base.json on which weights, and is refused on others; one from elsewhere is "
        "taken where its shapes fit the student's.",
    )
    sub.add_argument("--adapter", metavar="DIR", type=Path, help="evaluate this PEFT adapter as `after`")
    stage("report", commands.report, "write report.html and report.json from what is there")
    sub = stage(
        "review",
        commands.review,
        "write review.html, where a person marks uncertain responses",
        "One file without any network: open it in a browser, mark, download marks.jsonl, and give that back with "
        "`thinksafe filter --out DIR --marks marks.jsonl` before training. Harmful text is blurred until clicked.",
    )
    sub.add_argument("--most", metavar="N", type=_count, default=500, help="responses on the page (default: 500)")
    sub = stage(
        "export-data",
        commands.export_data,
        "write the accepted set as a Hugging Face data set folder",
        "Parquet, and a card with counts, filter rates, lengths, guard, recipe and hashes. datasets.load_dataset(DIR) "
        "reads it; so does `thinksafe train --data` with the parquet file.",
    )
    sub.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")
    sub = stage(
        "export-model",
        commands.export_model,
        "write the trained student as one checkpoint, adapter merged",
        "In Hugging Face's format, for whatever reads no adapters. Needs host memory for the student's weights, and no "
        "GPU.",
    )
    sub.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder")

    sub = command(
        "estimate",
        commands.estimate,
        "time, memory and cost of every stage on a named GPU",
        "Counted from the shapes of student and guard, before anything runs: no weights, no GPU and no network are "
        "needed. With --out DIR, response lengths are those that the run directory holds already.",
        _RECIPE_HELP,
    )
    sub.add_argument("--gpu", metavar="NAME", default="H200", help="H200 (the default), H100, A100, L40S or RTX4090")
    sub.add_argument("--gpus", metavar="N", type=_count, default=1, help="how many of them share the work (default: 1)")
    sub.add_argument("--price", metavar="AMOUNT", help="of one GPU for an hour, such as 3.5, '$3.5' or '3.5 EUR'")
    sub.add_argument("--out", metavar="DIR", type=Path, help="run directory that tells how long responses are")
    command(
        "recipe",
        commands.print_recipe,
        "print a recipe with every key, its meaning and its default",
        "The output is a recipe itself: keep it, change it, and give it back with --recipe.",
    )

    organism = known.add_parser("organism", help="the bundled synthetic world", formatter_class=_Help)
    build = organism.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser(
        "build",
        help="re-create its student, prompts and evaluation sets from nothing",
        description="Trains the tiny student through its history on a CPU. Another seed is another world.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    build.add_argument("--seed", metavar="N", type=_seed, default=0)
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    build.set_defaults(command=commands.build_organism)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, found {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, found {text!r}")
    return int(text)
