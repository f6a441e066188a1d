"""The page cache: keys and values of every layer on numbered pages, in the model's dtype or in e4m3.

e4m3 takes half the bytes of bf16, and decoding reads its whole context once for every token. A page of one layer holds
[num_kv_heads, page_size, D] elements of the keys and the same of the values. In e4m3 it also holds one exponent for
each head of each token (kernels/fp8.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thinksafe.kernels.fp8 import E4M3
from thinksafe.kernels.paged_cache import KvCache
from thinksafe.model.config import ModelConfig
from thinksafe.sampler.config import CacheDtype


@dataclass(frozen=True)
class CacheFormat:
    """Dtypes of the cached keys and values. For e4m3, the cache also stores one uint8 scale per head and token."""

    key_dtype: torch.dtype
    value_dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, cache_dtype: CacheDtype) -> "CacheFormat":
        """Return the format for a recipe's `kv_cache_dtype` and the model's dtype. If q, k and v have biases, as in the
        Qwen2 family, keys stay in `dtype` under `fp8` too: a bias that is a hundred times larger than the rest of a key
        leaves no bits for that rest."""
        if cache_dtype == "auto":
            return cls(dtype, dtype)
        return cls(dtype if config.qkv_bias else E4M3, E4M3)

    def bytes_per_token(self, config: ModelConfig) -> int:
        """Return the bytes of one token's keys, values and scales, over all layers of `config`."""
        heads = config.num_layers * config.num_kv_heads
        dtypes = (self.key_dtype, self.value_dtype)
        return sum(heads * (config.head_dim * dtype.itemsize + (dtype == E4M3)) for dtype in dtypes)


class PageCache:
    """Keys and values of all layers on pages 0 to num_pages - 1. A new cache is filled with zeros.

    Attributes:
        format: dtypes of the keys and values.
        page_size: tokens per page.
        device: device that holds the pages.
    """

    def __init__(
        self, config: ModelConfig, cache_format: CacheFormat, num_pages: int, page_size: int, device: torch.device
    ):
        self.format, self.page_size, self.device = cache_format, page_size, device
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size)

        def zeros(dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
            elements = torch.zeros(*shape, config.head_dim, dtype=dtype, device=device)
            scales_e8m0 = torch.zeros(shape, dtype=torch.uint8, device=device) if dtype == E4M3 else [None] * shape[0]
            return elements, scales_e8m0

        (self._keys, self._key_scales), (self._values, self._value_scales) = map(
            zeros, (cache_format.key_dtype, cache_format.value_dtype)
        )

    def layer(self, index: int) -> KvCache:
        """Return a layer's keys and values, as views of the cache."""
        return KvCache(self._keys[index], self._values[index], self._key_scales[index], self._value_scales[index])
