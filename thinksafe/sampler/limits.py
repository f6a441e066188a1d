"""How fast sampling could be: what each pass must read and multiply, at the rates the hardware was measured to reach.

    seconds = max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate)

Decoding is bound by the cache: 112 KiB a token of context for Qwen3-0.6B, read for every token that is written.
"""

from thinksafe.hardware import Hardware
from thinksafe.model.config import ModelConfig
from thinksafe.sampler.scheduler import StepPlan


def pass_seconds(plan: StepPlan, config: ModelConfig, itemsize: int, hardware: Hardware) -> float:
    """Least time for a pass of the decoder and its head.

    Args:
        itemsize: bytes a weight and a cached number take.
    """
    layers, head = config.num_layers * config.layer_weights, config.head_weights
    num_drawn, context = int(plan.completes.sum()), int(plan.ends.sum())
    pairs = int((plan.ends * (plan.ends + 1) - plan.starts * (plan.starts + 1)).sum()) // 2
    weight_bytes = (layers + head * (num_drawn > 0)) * itemsize
    gemm_flop = 2 * (layers * plan.num_tokens + head * num_drawn)
    cache_bytes = context * config.kv_elements_per_token * itemsize
    attention_flop = config.attention_flop(pairs)
    bandwidth, rate = hardware.bytes_per_second, hardware.flop_per_second
    return max(weight_bytes / bandwidth, gemm_flop / rate) + max(cache_bytes / bandwidth, attention_flop / rate)
