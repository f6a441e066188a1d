"""docs/python.md: every example runs on a tiny checkpoint, as a doctest."""

import doctest
from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint

PAGE = Path(__file__).parents[2] / "docs/python.md"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_examples_run(tmp_path, family):
    names = {"checkpoint": make_checkpoint(family, tmp_path / family), "folder": tmp_path}
    num_failed, num_attempted = doctest.testfile(str(PAGE), module_relative=False, globs=names)
    assert num_attempted > 50 and num_failed == 0
