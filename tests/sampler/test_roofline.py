"""The limit that a run's rate is measured against: counted bytes and multiplications at measured rates."""

import numpy as np
import pytest
import torch

from benchmarks.shapes import MODELS
from thinksafe.errors import UserError
from thinksafe.hardware import GPU_NAMES, hardware_named, hardware_of
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.roofline import Sizes, pass_seconds
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


def bf16_seconds(plan: StepPlan, name: str, cache="auto") -> float:
    config = config_of(name)
    cached_token = CacheFormat.of(config, torch.bfloat16, cache).bytes_per_token(config)
    return pass_seconds(plan, config, Sizes(2, 2, cached_token), H200)


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
        rate = rows / bf16_seconds(plan, name)
        assert rate == pytest.approx(1000 * thousand_tokens_per_second, rel=0.02)


@pytest.mark.parametrize(
    ("name", "context", "thousand_tokens_per_second"),
    [("qwen3-0.6b", 1500, 46.5), ("qwen3-0.6b", 4000, 18.2), ("qwen3-4b", 1500, 27.9), ("qwen3-8b", 1500, 22.3)],
)
def test_a_cache_in_e4m3_nearly_doubles_it(name, context, thousand_tokens_per_second):
    """The exponents, one byte for 128 numbers, cost up to 0.8% of the rate with one byte a number."""
    rate = 200 / bf16_seconds(plan_of([context - 1] * 200, [context] * 200), name, "fp8")
    assert rate == pytest.approx(1000 * thousand_tokens_per_second, rel=0.02)


def test_weights_in_e4m3_halve_what_the_layers_cost():
    config = config_of("qwen3-8b")
    for plan, least in ((plan_of([9], [10]), "reading weights"), (plan_of([0], [8192]), "products")):
        with_bf16, with_e4m3 = (pass_seconds(plan, config, Sizes(size, 2, 0), H200) for size in (2, 1))
        assert 0.5 < with_e4m3 / with_bf16 < 0.6, least


def test_a_single_row_is_bound_by_reading_the_weights():
    taken = bf16_seconds(plan_of([9], [10]), "qwen3-0.6b")
    weights = 440_401_920 + 151_936 * 1024  # the layers' matrices and the head, which is the embedding
    assert taken == pytest.approx(2 * weights / 4.3e12, rel=0.01)


def test_a_long_prompt_is_bound_by_its_products():
    """2 FLOP a weight and token, 4 a layer, head, dimension and pair of tokens; logits of the last token alone."""
    tokens = 8192
    flop = 2 * 440_401_920 * tokens + 2 * 151_936 * 1024 + 4 * 28 * 16 * 128 * tokens * (tokens + 1) // 2
    assert bf16_seconds(plan_of([0], [tokens]), "qwen3-0.6b") == pytest.approx(flop / 790e12, rel=1e-6)
    halves = [plan_of([0], [4096], [False]), plan_of([4096], [tokens])]
    assert sum(bf16_seconds(half, "qwen3-0.6b") for half in halves) == pytest.approx(flop / 790e12, rel=1e-6)


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
