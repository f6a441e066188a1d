"""kernels/README.md: its example runs, and every operation it names is where it says."""

import doctest
import importlib
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "kernels/README.md"


def test_the_example_runs():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 5 and failed == 0


def test_every_operation_is_where_the_page_says_and_every_link_leads_somewhere():
    named = set()
    for operations, files in re.findall(r"^\| (`.+?) \| (\[.+?) \| ", PAGE.read_text(), re.MULTILINE):
        modules = [importlib.import_module(f"thinksafe.kernels.{file}") for file in re.findall(r"\((\w+)\.py\)", files)]
        for operation in re.findall(r"`(\w+)`", operations):
            (function,) = {vars(module)[operation] for module in modules if operation in vars(module)}
            assert function.__doc__
            named.add(operation)
    assert {"linear_cross_entropy", "linear_kl", "linear_logprob_of", "paged_decode", "sample"} <= named
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
