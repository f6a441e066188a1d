"""kernels/README.md: its example runs, each operation is in the file it names, and each link leads to a file."""

import doctest
import importlib
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "kernels/README.md"


def test_example_runs():
    num_failed, num_attempted = doctest.testfile(str(PAGE), module_relative=False)
    assert num_attempted > 5 and num_failed == 0


def test_operations_and_links_of_the_page_exist():
    documented = set()
    for operations, files in re.findall(r"^\| (`.+?) \| (\[.+?) \| ", PAGE.read_text(), re.MULTILINE):
        modules = [importlib.import_module(f"thinksafe.kernels.{file}") for file in re.findall(r"\((\w+)\.py\)", files)]
        for operation in re.findall(r"`(\w+)`", operations):
            (function,) = {vars(module)[operation] for module in modules if operation in vars(module)}
            assert function.__doc__
            documented.add(operation)
    assert {"linear_cross_entropy", "linear_kl", "linear_logprob_of", "paged_decode", "sample"} <= documented
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
