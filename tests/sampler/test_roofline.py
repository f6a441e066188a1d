"""The roofline that a run's rate is compared with: bytes and FLOP, counted by hand, at measured rates."""

import numpy as np
import pytest
import torch

from benchmarks.shapes import MODELS
from thinksafe.errors import UserError
from thinksafe.hardware import GPU_NAMES, hardware_named, hardware_of
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.roofline import ByteCounts, roofline_seconds
from thinksafe.sampler.scheduler import ScheduledBatch

H200 = hardware_named("H200")
NO_SLOTS = np.zeros(0, dtype=np.int64)


def batch_of(starts, ends, needs_logits=None) -> ScheduledBatch:
    starts, ends = np.array(starts), np.array(ends)
    needs_logits = np.ones(len(starts), dtype=bool) if needs_logits is None else np.array(needs_logits)
    is_decode = bool((ends - starts == 1).all())
    return ScheduledBatch(is_decode, np.arange(len(starts)), starts, ends, needs_logits, NO_SLOTS, NO_SLOTS, NO_SLOTS)


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hugging_face(MODELS[name], name)


def bf16_seconds(batch: ScheduledBatch, name: str, cache="auto") -> float:
    config = config_of(name)
    cached_token = CacheFormat.of(config, torch.bfloat16, cache).bytes_per_token(config)
    return roofline_seconds(batch, config, ByteCounts(2, 2, cached_token), H200)


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
def test_large_decode_batches_are_bound_by_the_cache(name, context, thousand_tokens_per_second):
    """Computed by hand for an H200 in bf16. Above 184 rows the rate is constant, because reading the weights no longer
    bounds the matmuls."""
    for rows in (200, 512):
        batch = batch_of([context - 1] * rows, [context] * rows)
        rate = rows / bf16_seconds(batch, name)
        assert rate == pytest.approx(1000 * thousand_tokens_per_second, rel=0.02)


@pytest.mark.parametrize(
    ("name", "context", "thousand_tokens_per_second"),
    [("qwen3-0.6b", 1500, 46.5), ("qwen3-0.6b", 4000, 18.2), ("qwen3-4b", 1500, 27.9), ("qwen3-8b", 1500, 22.3)],
)
def test_e4m3_cache_nearly_doubles_the_rate(name, context, thousand_tokens_per_second):
    """The exponents, one byte per 128 elements of one byte, cost up to 0.8% of the rate."""
    rate = 200 / bf16_seconds(batch_of([context - 1] * 200, [context] * 200), name, "fp8")
    assert rate == pytest.approx(1000 * thousand_tokens_per_second, rel=0.02)


def test_e4m3_weights_nearly_halve_the_time_of_the_layers():
    config = config_of("qwen3-8b")
    for batch, bound in ((batch_of([9], [10]), "reading weights"), (batch_of([0], [8192]), "matmuls")):
        with_bf16, with_e4m3 = (roofline_seconds(batch, config, ByteCounts(size, 2, 0), H200) for size in (2, 1))
        assert 0.5 < with_e4m3 / with_bf16 < 0.6, bound


def test_single_row_is_bound_by_reading_the_weights():
    seconds = bf16_seconds(batch_of([9], [10]), "qwen3-0.6b")
    weights = 440_401_920 + 151_936 * 1024  # the layers' matrices and the head, which is the embedding
    assert seconds == pytest.approx(2 * weights / 4.3e12, rel=0.01)


def test_long_prompt_is_bound_by_its_matmuls():
    """2 FLOP per weight and token, 4 per layer, head, dimension and pair of tokens; logits of the last token only."""
    tokens = 8192
    flop = 2 * 440_401_920 * tokens + 2 * 151_936 * 1024 + 4 * 28 * 16 * 128 * tokens * (tokens + 1) // 2
    assert bf16_seconds(batch_of([0], [tokens]), "qwen3-0.6b") == pytest.approx(flop / 790e12, rel=1e-6)
    halves = [batch_of([0], [4096], [False]), batch_of([4096], [tokens])]
    assert sum(bf16_seconds(half, "qwen3-0.6b") for half in halves) == pytest.approx(flop / 790e12, rel=1e-6)


def test_cpu_has_no_measured_rates():
    assert hardware_of(torch.device("cpu")) is None


def test_gpu_names_are_matched_and_unknown_ones_list_the_known():
    assert hardware_named("nvidia h200").flop_per_second == 790e12
    for name in GPU_NAMES:
        hardware = hardware_named(name)
        assert hardware.flop_per_second / hardware.peak_flop_per_second == pytest.approx(790 / 989)
        assert hardware.measured == (name == "H200")
    with pytest.raises(UserError, match="H200, H100, A100"):
        hardware_named("TPU")


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters_equals_the_decoders(name):
    with torch.device("meta"):
        decoder = Decoder(config_of(name))
    assert config_of(name).num_parameters == sum(parameter.numel() for parameter in decoder.parameters())
