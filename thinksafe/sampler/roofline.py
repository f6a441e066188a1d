"""The roofline of a forward pass: the shortest time, from the bytes it must read, the FLOP it must compute, and the
rates that were measured on the hardware. The engine counts its passes with it, the estimate a pass of mean size.

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
        weight = decoder.layers[0].q_proj.weight.element_size()
        return cls(weight, decoder.head.element_size(), cache_format.bytes_per_token(decoder.config))


def roofline_seconds(batch: ScheduledBatch, config: ModelConfig, byte_counts: ByteCounts, hardware: Hardware) -> float:
    """Return the shortest time in seconds of a scheduled pass; only completing rows use the language-model head."""
    num_pairs = int((batch.ends * (batch.ends + 1) - batch.starts * (batch.starts + 1)).sum()) // 2
    num_logits, num_context_tokens = int(batch.needs_logits.sum()), int(batch.ends.sum())
    return pass_seconds(config, byte_counts, hardware, batch.num_tokens, num_logits, num_context_tokens, num_pairs)


def pass_seconds(
    config: ModelConfig,
    byte_counts: ByteCounts,
    hardware: Hardware,
    num_tokens: float,
    num_logits: float,
    num_context_tokens: float,
    num_pairs: float,
) -> float:
    """Return the shortest time in seconds of a pass through the decoder and its language-model head.

    seconds = max(weight bytes / bandwidth, GEMM FLOP / rate) + max(cache bytes / bandwidth, attention FLOP / rate)

    Args:
        config: configuration of the part of the model that one GPU holds.
        num_tokens: rows of the pass.
        num_logits: rows whose next token is predicted.
        num_context_tokens: cached tokens that the pass reads.
        num_pairs: (query, key) pairs within the causal mask.
    """
    layers, head = config.num_layers * config.layer_weights, config.head_weights
    weight_bytes = layers * byte_counts.per_weight + head * byte_counts.per_head_weight * (num_logits > 0)
    # Tensor cores do two multiplications in e4m3 in the time of one in bf16.
    gemm_flop = 2 * (layers * num_tokens * (0.5 if byte_counts.per_weight == 1 else 1) + head * num_logits)
    cache_bytes, attention_flop = num_context_tokens * byte_counts.per_cached_token, config.attention_flop(num_pairs)
    bandwidth, rate = hardware.bytes_per_second, hardware.flop_per_second
    return max(weight_bytes / bandwidth, gemm_flop / rate) + max(cache_bytes / bandwidth, attention_flop / rate)
