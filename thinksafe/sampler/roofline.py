"""How fast sampling could be: what each pass must read and multiply, at the rates the hardware was measured to reach.

    seconds = max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate)

Decoding is bound by the cache: 112 KiB a token of context for Qwen3-0.6B, read for every token that is written.
"""

from dataclasses import dataclass

from thinksafe.hardware import Hardware
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.scheduler import StepPlan


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        weight: one of a layer's projections' weights; at 1, they and their inputs are in e4m3.
        head_weight: one of the head's.
        cached_token: what a token adds to the cache.
    """

    weight: int
    head_weight: int
    cached_token: int

    @classmethod
    def of(cls, decoder: Decoder, cache_format: CacheFormat) -> "Sizes":
        """Of a model as it is loaded."""
        weight = decoder.layers[0].q_proj.element_size()
        return cls(weight, decoder.head.element_size(), cache_format.bytes_per_token(decoder.config))


def pass_seconds(plan: StepPlan, config: ModelConfig, sizes: Sizes, hardware: Hardware) -> float:
    """Least time for a pass of the decoder and its head."""
    layers, head = config.num_layers * config.layer_weights, config.head_weights
    num_drawn, context = int(plan.completes.sum()), int(plan.ends.sum())
    pairs = int((plan.ends * (plan.ends + 1) - plan.starts * (plan.starts + 1)).sum()) // 2
    weight_bytes = layers * sizes.weight + head * sizes.head_weight * (num_drawn > 0)
    # Tensor cores multiply two numbers of e4m3 in the time of one of bf16.
    gemm_flop = 2 * (layers * plan.num_tokens * (0.5 if sizes.weight == 1 else 1) + head * num_drawn)
    cache_bytes = context * sizes.cached_token
    attention_flop = config.attention_flop(pairs)
    bandwidth, rate = hardware.bytes_per_second, hardware.flop_per_second
    return max(weight_bytes / bandwidth, gemm_flop / rate) + max(cache_bytes / bandwidth, attention_flop / rate)
