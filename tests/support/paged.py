"""Random contexts in a page cache, and what attention makes of them in fp64."""

import numpy as np
import torch

from thinksafe.kernels.fp8 import dequantise
from thinksafe.kernels.fp8 import reference as quantise
from thinksafe.kernels.paged_decode import paged_decode
from thinksafe.kernels.paged_prefill import paged_prefill, prefill_tiles


class Paged:
    """Random contexts on shuffled pages of a pool that is NaN wherever no token lies.

    Sequences share the first `shared` pages of the longest one, as far as their own full pages go. Page-table entries
    behind a last page name any page. Where keys or values are in e4m3, `cache` is what the stored numbers stand for.
    """

    def __init__(
        self, lengths, page_size, heads, D, *, shared=0, seed=0, device="cpu", dtype=torch.float32, fp8=(False, False)
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size, self.D = lengths, page_size, D
        self.num_heads, self.num_kv_heads = heads
        self.generator, self.device, self.dtype = generator, device, dtype
        width = -(-max(lengths) // page_size) + 1
        num_pages = sum(-(-length // page_size) for length in lengths) + 2
        free = torch.randperm(num_pages, generator=generator).tolist()
        self.page_table = torch.randint(num_pages, (len(lengths), width), generator=generator)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        for row in sorted(range(len(lengths)), key=lambda row: row != longest):
            common = 0 if row == longest else min(shared, lengths[row] // page_size)
            own = -(-lengths[row] // page_size) - common
            self.page_table[row, :common] = self.page_table[longest, :common]
            self.page_table[row, common : common + own] = torch.tensor([free.pop() for _ in range(own)])
        cache = torch.full((2, num_pages, self.num_kv_heads, page_size, D), torch.nan)
        for row, length in enumerate(lengths):
            position = torch.arange(length)
            pages, offsets = self.page_table[row, position // page_size], position % page_size
            cache[:, pages, :, offsets] = torch.randn(length, 2, self.num_kv_heads, D, generator=generator)
        # Heads of very different size, so that an exponent of another token or head would show.
        cache *= 2.0 ** torch.randint(-6, 1, cache.shape[:-1], generator=generator)[..., None] if any(fp8) else 1
        self.cache = cache.to(device, dtype)
        self.stored, self.exponents = list(self.cache), [None, None]
        for kind in (kind for kind in (0, 1) if fp8[kind]):
            self.stored[kind], self.exponents[kind] = quantise(self.cache[kind])
            self.cache[kind] = dequantise(self.stored[kind], self.exponents[kind], dtype)
        self.page_table = self.page_table.to(device)
        self.seq_lens = torch.tensor(lengths, device=device)

    def queries(self, count):
        """[count, num_heads, D], large enough that the softmax is peaked."""
        return (torch.randn(count, self.num_heads, self.D, generator=self.generator) * 2).to(self.device, self.dtype)

    def context(self, row):
        """K and V of a sequence in fp64, [num_heads, length, D] each."""
        position = torch.arange(self.lengths[row], device=self.device)
        pages, offsets = self.page_table[row, position // self.page_size], position % self.page_size
        contexts = self.cache[:, pages, :, offsets].double().permute(1, 2, 0, 3)
        return contexts.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def expected(self, q, row):
        """[T, num_heads, D] fp64: queries of one sequence, the last at its end."""
        if not self.lengths[row]:
            return q.double() * 0
        k, v = self.context(row)
        scores = torch.einsum("thd,hsd->hts", q.double(), k) / self.D**0.5
        first = self.lengths[row] - len(q)
        future = torch.arange(self.lengths[row]) > first + torch.arange(len(q))[:, None]
        scores = scores.masked_fill(future.to(self.device), -torch.inf)
        return torch.einsum("hts,hsd->thd", scores.softmax(-1), v)

    def decode(self, q, **settings):
        return paged_decode(
            q, *self.stored, self.page_table, self.seq_lens, exponents=tuple(self.exponents), **settings
        )

    def prefill(self, q, counts):
        """Of each sequence the last counts[row] tokens."""
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32).to(self.device)
        group = self.num_heads // self.num_kv_heads
        tiles = prefill_tiles(np.array(counts), np.array(self.lengths), group, self.dtype.itemsize)
        tiles = torch.from_numpy(tiles).to(self.device)
        return paged_prefill(q, *self.stored, self.page_table, cu_seqlens, self.seq_lens, tiles, tuple(self.exponents))


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()
