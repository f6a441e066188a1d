"""Help, version and usage errors: they need only the standard library, and little CPU time."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from thinksafe import __version__
from thinksafe.cli.__main__ import main
from thinksafe.cli.parser import COMMANDS, ORGANISM_COMMANDS, build_parser

ROOT = Path(__file__).parents[2]
NAMES = [*COMMANDS, "organism"]
HELP = [["--help"]] + [[name, "--help"] for name in NAMES]
HELP += [["organism", name, "--help"] for name in ORGANISM_COMMANDS]
USAGE_ERRORS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["walk"], "invalid choice: 'walk'"),
    "unknown option": (["run", "--colour"], "unrecognized arguments: --colour"),
    "shortened option": (["run", "--rec", "organism"], "unrecognized arguments: --rec"),
    "missing option": (["export-data"], "required: --to"),
    "wrong number": (["review", "--max-responses", "0"], "must be a whole number of 1 or more, found '0'"),
    "wrong seed": (["organism", "build", "--seed", "-1", "--out", "x"], "must be a whole number of 0 or more"),
}
RUN_MAIN = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from thinksafe.cli.__main__ import main; sys.exit(main())"


def run_without_packages(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command line in a Python that has no site-packages."""
    return subprocess.run([sys.executable, "-I", "-S", "-c", RUN_MAIN, *arguments], capture_output=True, text=True)


def cpu_seconds(*command: str) -> float:
    """Return the least CPU time of several successful runs of a process."""
    seconds = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_needs_only_the_standard_library(arguments):
    process = run_without_packages(*arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("usage: ")


def test_version_needs_only_the_standard_library():
    process = run_without_packages("--version")
    assert (process.returncode, process.stdout, process.stderr) == (0, f"thinksafe {__version__}\n", "")


@pytest.mark.parametrize("mistake", USAGE_ERRORS)
def test_usage_error_needs_only_the_standard_library(mistake):
    arguments, message = USAGE_ERRORS[mistake]
    process = run_without_packages(*arguments)
    assert (process.returncode, process.stdout) == (2, "")
    usage, error = process.stderr.split("\n", 1)[0], process.stderr.splitlines()[-1]
    assert usage.startswith("usage: thinksafe") and message in error


def test_command_without_packages_fails():
    """So the tests above can fail: site-packages are absent."""
    assert "No module named 'yaml'" in run_without_packages("recipe").stderr


def test_help_takes_little_cpu_time():
    """At most three times that of starting Python. Measured: 1.8 times (0.05 s); with pydantic imported, 3.3 times."""
    python_start = cpu_seconds(sys.executable, "-c", "pass")
    assert cpu_seconds(sys.executable, "-m", "thinksafe.cli", "--help") < 3 * python_start


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_fits_the_terminal(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    printed = capsys.readouterr()
    assert exit_.value.code == 0 and printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].startswith(" ".join(["usage: thinksafe", *arguments[:-1]])) and max(map(len, lines)) <= 80
    if arguments == ["--help"]:
        assert [line.split()[0] for line in lines[lines.index("commands:") + 1 :]] == NAMES, "one line for each command"


def test_commands_share_no_state():
    """Every parser starts from the defaults of the table."""
    options = build_parser().parse_args(["run", "--set", "seed=1"])
    assert options.set == ["seed=1"] and build_parser().parse_args(["run"]).set == []
