"""The page cache: keys and values of every layer on numbered pages, in the model's dtype or in e4m3.

e4m3 is half of bf16's bytes, and decoding reads every byte of its context once a token. A layer's page holds
[num_kv_heads, page_size, D] numbers of each kind, and beside them an exponent for every head of a token where they are
in e4m3 (kernels/fp8.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thinksafe.kernels.fp8 import E4M3
from thinksafe.kernels.paged_cache import Exponents
from thinksafe.model.config import ModelConfig

CacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class CacheFormat:
    """What keys and values are kept in."""

    keys: torch.dtype
    values: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, wanted: CacheDtype) -> "CacheFormat":
        """`auto` is the model's own `dtype`. With biases on q, k and v, as in the Qwen2 family, keys stay in it under
        `fp8` too: a bias a hundred times larger than the rest of a key leaves that rest no bits."""
        if wanted == "auto":
            return cls(dtype, dtype)
        return cls(dtype if config.qkv_bias else E4M3, E4M3)

    def bytes_per_token(self, config: ModelConfig) -> int:
        """What a token adds to the cache, over all layers."""
        heads = config.num_layers * config.num_kv_heads
        return sum(heads * (config.head_dim * kind.itemsize + (kind == E4M3)) for kind in (self.keys, self.values))


class PageCache:
    """Pages 0 to num_pages - 1, all zero.

    Attributes:
        format: what keys and values are kept in.
        page_size: tokens a page.
        bytes_per_token: over all layers.
    """

    def __init__(
        self, config: ModelConfig, cache_format: CacheFormat, num_pages: int, page_size: int, device: torch.device
    ):
        self.format, self.page_size, self.device = cache_format, page_size, device
        self.bytes_per_token = cache_format.bytes_per_token(config)
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size)

        def zeros(kind: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
            numbers = torch.zeros(*shape, config.head_dim, dtype=kind, device=device)
            exponents = torch.zeros(shape, dtype=torch.uint8, device=device) if kind == E4M3 else [None] * shape[0]
            return numbers, exponents

        (self._keys, self._key_exponents), (self._values, self._value_exponents) = map(
            zeros, (cache_format.keys, cache_format.values)
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor, Exponents]:
        """Keys and values, [num_pages, num_kv_heads, page_size, D] each, and their exponents."""
        exponents = (self._key_exponents[index], self._value_exponents[index])
        return self._keys[index], self._values[index], exponents
