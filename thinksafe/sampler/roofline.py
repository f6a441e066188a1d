"""The roofline of sampling: the shortest time of a pass, from the bytes it must read, the FLOP it must compute, and the
rates that were measured on the hardware.

    seconds = max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate)

Decoding is bound by the cache: Qwen3-0.6B stores 112 KiB per token of context and reads all of it for every new token.
"""

from dataclasses import dataclass

from thinksafe.hardware import Hardware
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.kv_cache import CacheFormat
from thinksafe.sampler.scheduler import ScheduledBatch


@dataclass(frozen=True)
class ByteCounts:
    """Bytes of one weight and of one cached token.

    Attributes:
        per_weight: bytes of a weight of the layers' projections; 1 means that they and their inputs are in e4m3.
        per_head_weight: bytes of a weight of the language-model head.
        per_cached_token: bytes that a token adds to the cache, over all layers.
    """

    per_weight: int
    per_head_weight: int
    per_cached_token: int

    @classmethod
    def of(cls, decoder: Decoder, cache_format: CacheFormat) -> "ByteCounts":
        """Return the byte counts of a decoder with loaded weights and of a cache in `cache_format`."""
        weight = decoder.layers[0].q_proj.element_size()
        return cls(weight, decoder.head.element_size(), cache_format.bytes_per_token(decoder.config))


def roofline_seconds(batch: ScheduledBatch, config: ModelConfig, byte_counts: ByteCounts, hardware: Hardware) -> float:
    """Return the shortest time in seconds of a pass through the decoder and its language-model head.

    seconds = max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate)

    Args:
        batch: the tokens of the pass; only completing rows use the language-model head.
        config: configuration of the part of the model that one GPU holds.
    """
    layers, head = config.num_layers * config.layer_weights, config.head_weights
    num_sampled, num_context_tokens = int(batch.needs_logits.sum()), int(batch.ends.sum())
    num_pairs = int((batch.ends * (batch.ends + 1) - batch.starts * (batch.starts + 1)).sum()) // 2
    weight_bytes = layers * byte_counts.per_weight + head * byte_counts.per_head_weight * (num_sampled > 0)
    # Tensor cores do two multiplications in e4m3 in the time of one in bf16.
    gemm_flop = 2 * (layers * batch.num_tokens * (0.5 if byte_counts.per_weight == 1 else 1) + head * num_sampled)
    cache_bytes = num_context_tokens * byte_counts.per_cached_token
    attention_flop = config.attention_flop(num_pairs)
    bandwidth, rate = hardware.bytes_per_second, hardware.flop_per_second
    return max(weight_bytes / bandwidth, gemm_flop / rate) + max(cache_bytes / bandwidth, attention_flop / rate)
