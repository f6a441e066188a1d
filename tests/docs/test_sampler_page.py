"""docs/sampler.md: its example runs (doctest), its links exist, and its limits follow from the roofline formula."""

import doctest
import re
from pathlib import Path

from tests.support.checkpoints import make_checkpoint
from thinksafe.hardware import hardware_named
from thinksafe.model.config import ModelConfig
from thinksafe.model.public_configs import PUBLIC_CONFIGS

PAGE = Path(__file__).parents[2] / "docs/sampler.md"


def test_example_runs(tmp_path):
    names = {"checkpoint": make_checkpoint("qwen3", tmp_path)}
    num_failures, num_examples = doctest.testfile(str(PAGE), module_relative=False, globs=names)
    assert num_examples > 10 and num_failures == 0


def test_every_link_exists():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link


def test_limits_follow_from_the_formula():
    h200 = hardware_named("H200")
    rows = re.findall(r"^\| (Qwen3-\S+) \| (\d+) \| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 2
    for name, kib, tokens in rows:
        config = ModelConfig.from_hugging_face(PUBLIC_CONFIGS[f"Qwen/{name}"], name)
        bytes_per_token = 2 * config.kv_elements_per_token
        assert bytes_per_token == int(kib) * 1024
        weights = config.num_layers * config.layer_weights + config.head_weights
        # The batch is so large that FLOP, not the bytes of the weights, bound the GEMMs.
        seconds = 2 * weights / h200.flop_per_second + 1500 * bytes_per_token / h200.bytes_per_second
        assert abs(1 / seconds / int(tokens.replace(",", "")) - 1) < 0.01
