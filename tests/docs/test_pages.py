"""All pages: their commands are valid, their recipes load, and their links lead to a file and a heading that exist.

Oracles: the real argument parser, `load_recipe`, the Makefile, setup.py, the pages' headings and the benchmark results.
"""

import doctest
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.support.checkpoints import make_checkpoint
from thinksafe.cli.parser import build_parser
from thinksafe.paths import bundled_recipes
from thinksafe.recipe.loading import check_recipe, load_recipe

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "kernels", "launch", "benchmarks", "thinksafe/organism", "tests/emulation")
PAGES = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.md"))]
USER_PAGES = [file for file in PAGES if file.parent == ROOT / "docs"] + [ROOT / "README.md"]
OTHER_PROGRAMS = {"tar", "git", "nvidia-smi", "hf", "export"}
"""Programs that no test can check."""
LAUNCHER = re.compile(
    r"^(?:torchrun|deepspeed|sbatch)\b.*?(?:thinksafe\.cli|launch/slurm\.sh) |^launch/\S+\.sh (?:launch/hostfile )?"
)
"""A program that starts workers, up to the arguments of thinksafe."""


def page_name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def blocks(file: Path, language: str) -> list[str]:
    """Return the contents of all code blocks of a language."""
    text = file.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(file: Path) -> list[str]:
    """Return all shell commands of a page, without comments; a line that ends in a backslash continues."""
    lines = "".join(blocks(file, "sh")).replace("\\\n", " ").splitlines()
    texts = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [part for text in texts if text for part in re.split(r" '&&' | && ", text)]


def check_thinksafe_command(words: list[str]) -> None:
    """Parse a command of thinksafe; load its recipe if it is a bundled one."""
    options = build_parser().parse_args(words)
    recipe = getattr(options, "recipe", None)
    if recipe in bundled_recipes():
        load_recipe(recipe, options.set)
    elif recipe is None and getattr(options, "set", None):
        load_recipe("qwen3-0.6b", options.set)


def check_command(command: str) -> None:
    command = re.sub(r"^(?:\w+=\S* )+", "", command)
    if match := LAUNCHER.match(command):
        check_thinksafe_command(shlex.split(command[match.end() :]))
        return
    program, *words = shlex.split(command)
    if program == "thinksafe":
        check_thinksafe_command(words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words if "=" not in word and word not in targets] == []
    elif program.startswith("python") and words[0] == "-m":
        assert find_spec(words[1]) is not None
    elif program == "python" and words[0] == "-c":
        compile(words[1], "page", "exec")
    elif program == "pip":
        extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
        named = re.findall(r"(?:thinksafe|\.)\[([\w,]+)\]", command)
        assert {extra for names in named for extra in names.split(",")} <= extras
    else:
        assert program in OTHER_PROGRAMS, command


def anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-").lower() for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=page_name)
def test_every_command_is_valid(file, capsys):
    for command in commands(file):
        try:
            check_command(command)
        except SystemExit:
            raise AssertionError(f"{command}: {capsys.readouterr().err}") from None


@pytest.mark.parametrize("file", USER_PAGES, ids=page_name)
def test_every_recipe_loads(file, tmp_path):
    for block in blocks(file, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        if "base" in yaml.safe_load(block):
            load_recipe(str(path))
        else:
            check_recipe({"name": "n", "model": "m"} | yaml.safe_load(block), page_name(file))


@pytest.mark.parametrize("file", PAGES, ids=page_name)
def test_every_link_leads_to_a_file_and_heading(file):
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_index_lists_every_page():
    links = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "docs/README.md").read_text())
    listed = {(ROOT / "docs" / link).resolve() for link in links}
    listed |= {folder / "README.md" for folder in listed if folder.is_dir()}
    assert {file for file in PAGES if file != ROOT / "docs/README.md"} <= listed


def test_readme_is_short_and_its_python_runs(tmp_path):
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    names = {"checkpoint": make_checkpoint("qwen3", tmp_path / "student")}
    num_failed, num_attempted = doctest.testfile(str(readme), module_relative=False, globs=names)
    assert num_attempted == 11 and num_failed == 0


def test_speeds_of_the_readme_are_those_of_the_results():
    def speedups(suite: str, variant: str) -> list[str]:
        rows = json.loads((ROOT / f"benchmarks/results/cpu/{suite}.json").read_text())["rows"]
        wanted = [row for row in rows if row["variant"].startswith(variant) and row.get("method") != "full"]
        return [f"{row['ThinkSafe is faster by']:.1f}" for row in wanted]

    text = " ".join((ROOT / "README.md").read_text().split())
    stated = re.search(
        r"is (\S+) times as fast as TRL's SFTTrainer at the paper's settings and (\S+) times at TRL's best settings "
        r"for a small model, (\S+) and (\S+) times for a larger one .*?"
        r"sampling is (\S+) times as fast as static batches",
        text,
    )
    small_paper, large_paper = speedups("train", "TRL, the paper's settings")
    small_best, large_best = speedups("train", "TRL, its best settings")
    (sampling,) = speedups("sampler", "transformers generate, static batches")
    assert stated.groups() == (small_paper, small_best, large_paper, large_best, sampling)


@pytest.mark.parametrize("file", USER_PAGES, ids=page_name)
def test_every_python_block_is_a_doctest(file):
    assert all(">>>" in block for block in blocks(file, "python"))


def test_checks_can_fail(tmp_path, capsys):
    for command in (
        "thinksafe run --colour",
        "make nothing",
        "python -m benchmarks.nothing",
        "pip install '.[nothing]'",
    ):
        with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
            check_command(command)
    page = tmp_path / "page.md"
    page.write_text("## `sampler`, `guard.sampler`\n\n```sh\nthinksafe run \\\n  --seed 1  # why\n```\n")
    assert anchors(page) == {"sampler-guardsampler"} and commands(page) == ["thinksafe run --seed 1"]
