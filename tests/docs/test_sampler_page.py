"""docs/sampler.md: its example runs, its links lead somewhere, and its limits are those of the formula."""

import doctest
import re
from pathlib import Path

from tests.support.checkpoints import make_checkpoint
from thinksafe.hardware import hardware_named
from thinksafe.model.config import ModelConfig
from thinksafe.model.public_configs import PUBLIC

PAGE = Path(__file__).parents[2] / "docs/sampler.md"


def test_the_example_runs(tmp_path):
    names = {"checkpoint": make_checkpoint("qwen3", tmp_path)}
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, globs=names)
    assert tried > 10 and failed == 0


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link


def test_the_limits_are_those_of_the_formula():
    h200 = hardware_named("H200")
    rows = re.findall(r"^\| (Qwen3-\S+) \| (\d+) \| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 2
    for name, kib, tokens in rows:
        config = ModelConfig.from_hugging_face(PUBLIC[f"Qwen/{name}"], name)
        cached = 2 * config.kv_elements_per_token
        assert cached == int(kib) * 1024
        weights = config.num_layers * config.layer_weights + config.head_weights
        # So many rows that products, not the reading of weights, bound the GEMMs.
        seconds = 2 * weights / h200.flop_per_second + 1500 * cached / h200.bytes_per_second
        assert abs(1 / seconds / int(tokens.replace(",", "")) - 1) < 0.01
