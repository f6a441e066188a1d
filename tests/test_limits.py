"""The limit that a run's rate is measured against: counted bytes and multiplications at measured rates."""

import numpy as np
import pytest
import torch

from benchmarks.shapes import MODELS
from thinksafe.errors import UserError
from thinksafe.hardware import GPU_NAMES, hardware_named, hardware_of
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.limits import pass_seconds
from thinksafe.sampler.scheduler import StepPlan

H200 = hardware_named("H200")
NOTHING = np.zeros(0, dtype=np.int64)


def plan_of(starts, ends, completes=None) -> StepPlan:
    starts, ends = np.array(starts), np.array(ends)
    completes = np.ones(len(starts), dtype=bool) if completes is None else np.array(completes)
    is_decode = bool((ends - starts == 1).all())
    return StepPlan(is_decode, np.arange(len(starts)), starts, ends, completes, NOTHING, NOTHING, NOTHING)


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hugging_face(MODELS[name], name)


@pytest.mark.parametrize(
    ("name", "context", "thousand_tokens_per_second"),
    [
        ("qwen3-0.6b", 500, 67),
        ("qwen3-0.6b", 1500, 24.1),
        ("qwen3-0.6b", 4000, 9.2),
        ("qwen3-1.7b", 1500, 22.5),
        ("qwen3-4b", 1500, 16.2),
        ("qwen3-8b", 500, 27.5),
        ("qwen3-8b", 1500, 14.2),
    ],
)
def test_decoding_at_many_rows_is_bound_by_the_cache(name, context, thousand_tokens_per_second):
    """Worked out by hand for an H200, bf16; flat above 184 rows, where the products are no longer bound by weights."""
    for rows in (200, 512):
        plan = plan_of([context - 1] * rows, [context] * rows)
        rate = rows / pass_seconds(plan, config_of(name), 2, H200)
        assert rate == pytest.approx(1000 * thousand_tokens_per_second, rel=0.02)


def test_a_single_row_is_bound_by_reading_the_weights():
    config = config_of("qwen3-0.6b")
    taken = pass_seconds(plan_of([9], [10]), config, 2, H200)
    weights = 440_401_920 + 151_936 * 1024  # the layers' matrices and the head, which is the embedding
    assert taken == pytest.approx(2 * weights / 4.3e12, rel=0.01)


def test_a_long_prompt_is_bound_by_its_products():
    """2 FLOP a weight and token, 4 a layer, head, dimension and pair of tokens; logits of the last token alone."""
    config, tokens = config_of("qwen3-0.6b"), 8192
    flop = 2 * 440_401_920 * tokens + 2 * 151_936 * 1024 + 4 * 28 * 16 * 128 * tokens * (tokens + 1) // 2
    assert pass_seconds(plan_of([0], [tokens]), config, 2, H200) == pytest.approx(flop / 790e12, rel=1e-6)
    halves = [plan_of([0], [4096], [False]), plan_of([4096], [tokens])]
    assert sum(pass_seconds(half, config, 2, H200) for half in halves) == pytest.approx(flop / 790e12, rel=1e-6)


def test_a_cpu_has_no_limit_that_anybody_measured():
    assert hardware_of(torch.device("cpu")) is None


def test_a_gpu_is_found_by_its_short_name_and_another_is_answered_with_the_known_ones():
    assert hardware_named("nvidia h200").flop_per_second == 790e12
    for name in GPU_NAMES:
        hardware = hardware_named(name)
        assert hardware.flop_per_second / hardware.peak_flop_per_second == pytest.approx(790 / 989)
        assert hardware.measured == (name == "H200")
    with pytest.raises(UserError, match="H200, H100, A100"):
        hardware_named("TPU")


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_as_the_decoder_has_them(name):
    with torch.device("meta"):
        decoder = Decoder(config_of(name))
    assert config_of(name).num_parameters == sum(parameter.numel() for parameter in decoder.parameters())
