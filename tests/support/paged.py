"""Random contexts in a paged KV cache, their attention in fp64, and cases that several test files share."""

from collections.abc import Iterator

import numpy as np
import torch

from thinksafe.kernels.fp8 import dequantize
from thinksafe.kernels.fp8 import reference as quantize
from thinksafe.kernels.paged_cache import KvCache
from thinksafe.kernels.paged_decode import paged_decode
from thinksafe.kernels.paged_prefill import paged_prefill, prefill_tiles


class PagedContexts:
    """Random contexts on shuffled pages of a pool that is NaN at every position that holds no token.

    The sequences share up to `num_shared_pages` first pages of the longest sequence; a shorter sequence shares at most
    its full pages. Page-table entries after a sequence's last page are arbitrary valid pages. Kernels read `kv_cache`.
    If keys or values are in e4m3, `dequantized_cache` holds the values that their bits represent; otherwise both are
    equal.

    Args:
        lengths: number of tokens of each sequence; 0 is allowed if another is positive.
        heads: (number of query heads, number of KV heads).
        D: head dimension.
        fp8: whether keys, and whether values, are in e4m3 with a scale for each token and head.

    Attributes:
        kv_cache: [keys, values], each [num_pages, num_kv_heads, page_size, D].
        scales_e8m0: [scales of keys, scales of values]; None for a tensor that is not in e4m3.
        dequantized_cache: [2, num_pages, num_kv_heads, page_size, D].
        page_table: [num_sequences, table_width] int64; one more column than the longest sequence has pages.
        seq_lens: [num_sequences] int64, the lengths.
    """

    def __init__(
        self,
        lengths,
        page_size,
        heads,
        D,
        *,
        num_shared_pages=0,
        seed=0,
        device="cpu",
        dtype=torch.float32,
        fp8=(False, False),
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.page_size, self.D = lengths, page_size, D
        self.num_heads, self.num_kv_heads = heads
        self.generator, self.device, self.dtype = generator, device, dtype
        table_width = -(-max(lengths) // page_size) + 1
        num_pages = sum(-(-length // page_size) for length in lengths) + 2
        free = torch.randperm(num_pages, generator=generator).tolist()
        self.page_table = torch.randint(num_pages, (len(lengths), table_width), generator=generator)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        for row in sorted(range(len(lengths)), key=lambda row: row != longest):
            num_shared = 0 if row == longest else min(num_shared_pages, lengths[row] // page_size)
            num_own = -(-lengths[row] // page_size) - num_shared
            self.page_table[row, :num_shared] = self.page_table[longest, :num_shared]
            self.page_table[row, num_shared : num_shared + num_own] = torch.tensor([free.pop() for _ in range(num_own)])
        dequantized_cache = torch.full((2, num_pages, self.num_kv_heads, page_size, D), torch.nan)
        for row, length in enumerate(lengths):
            position = torch.arange(length)
            pages, offsets = self.page_table[row, position // page_size], position % page_size
            dequantized_cache[:, pages, :, offsets] = torch.randn(length, 2, self.num_kv_heads, D, generator=generator)
        # The magnitudes of heads differ widely, so the scale of another token or head would give a visible error.
        dequantized_cache *= (
            2.0 ** torch.randint(-6, 1, dequantized_cache.shape[:-1], generator=generator)[..., None] if any(fp8) else 1
        )
        self.dequantized_cache = dequantized_cache.to(device, dtype)
        self.kv_cache, self.scales_e8m0 = list(self.dequantized_cache), [None, None]
        for kind in (kind for kind in (0, 1) if fp8[kind]):
            self.kv_cache[kind], self.scales_e8m0[kind] = quantize(self.dequantized_cache[kind])
            self.dequantized_cache[kind] = dequantize(self.kv_cache[kind], self.scales_e8m0[kind], dtype)
        self.page_table = self.page_table.to(device)
        self.seq_lens = torch.tensor(lengths, device=device)

    def queries(self, num_tokens):
        """Return random queries [num_tokens, num_heads, D], large enough that the softmax is peaked."""
        return (torch.randn(num_tokens, self.num_heads, self.D, generator=self.generator) * 2).to(
            self.device, self.dtype
        )

    def keys_and_values(self, row):
        """Return K and V of a sequence in fp64, [num_heads, length, D] each."""
        position = torch.arange(self.lengths[row], device=self.device)
        pages, offsets = self.page_table[row, position // self.page_size], position % self.page_size
        states = self.dequantized_cache[:, pages, :, offsets].double().permute(1, 2, 0, 3)
        return states.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def expected(self, q, row):
        """Return the attention of a sequence's last T tokens in fp64, [T, num_heads, D]; zeros for an empty sequence.

        Args:
            q: queries of these tokens, [T, num_heads, D].
            row: index of the sequence.
        """
        if not self.lengths[row]:
            return q.double() * 0
        k, v = self.keys_and_values(row)
        scores = torch.einsum("thd,hsd->hts", q.double(), k) / self.D**0.5
        first_position = self.lengths[row] - len(q)
        is_future = torch.arange(self.lengths[row]) > first_position + torch.arange(len(q))[:, None]
        scores = scores.masked_fill(is_future.to(self.device), -torch.inf)
        return torch.einsum("hts,hsd->thd", scores.softmax(-1), v)

    def decode(self, q, **settings):
        """Return the result of `paged_decode` for q [num_sequences, num_heads, D], the query of each last token."""
        return paged_decode(q, KvCache(*self.kv_cache, *self.scales_e8m0), self.page_table, self.seq_lens, **settings)

    def prefill(self, q, query_lens):
        """Return the result of `paged_prefill`, [sum of query_lens, num_heads, D].

        Args:
            q: queries of the last query_lens[row] tokens of each sequence, one sequence after the other.
        """
        cu_seqlens = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32).to(self.device)
        group_size = self.num_heads // self.num_kv_heads
        tiles = prefill_tiles(np.array(query_lens), np.array(self.lengths), group_size, self.dtype.itemsize)
        tiles = torch.from_numpy(tiles).to(self.device)
        cache = KvCache(*self.kv_cache, *self.scales_e8m0)
        return paged_prefill(q, cache, self.page_table, cu_seqlens, self.seq_lens, tiles)


Outputs = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a kernel's output and the same attention in fp64."""


def outputs_of_scaled_e4m3_values(
    seed: int, exponent_range: tuple[int, int], device: str, dtype: torch.dtype
) -> Outputs:
    """Yield decode and prefill outputs of four contexts whose e4m3 values have random scales, 2^exponent.

    Some values are zeros with the scale 2^-126 (byte 1): for each KV head of context 0 the token with the highest
    score, and all tokens of context 3.

    Args:
        exponent_range: (lowest exponent, one more than the highest).
    """
    problem = PagedContexts([200, 1, 70, 130], 64, (4, 2), 64, seed=seed, device=device, dtype=dtype, fp8=(True, True))
    q = problem.queries(4)
    values, scales_e8m0 = problem.kv_cache[1].view(torch.uint8), problem.scales_e8m0[1]
    scales_e8m0.copy_(torch.randint(*exponent_range, scales_e8m0.shape).add(127))
    top_tokens = problem.keys_and_values(0)[0].matmul(q[0].double()[..., None])[..., 0].argmax(-1)[::2]
    for head, token in enumerate(top_tokens.tolist()):
        slot = problem.page_table[0, token // 64], head, token % 64
        values[slot], scales_e8m0[slot] = 0, 1
    values[problem.page_table[3, :3]], scales_e8m0[problem.page_table[3, :3]] = 0, 1
    problem.dequantized_cache[1] = dequantize(problem.kv_cache[1], scales_e8m0, dtype)
    query_lens = [8, 1, 6, 4]
    prompts = problem.queries(sum(query_lens)).split(query_lens)
    prefilled = problem.prefill(torch.cat(prompts), query_lens).split(query_lens)
    decoded = problem.decode(q)
    for row in range(4):
        yield decoded[row, None], problem.expected(q[row, None], row)
        yield prefilled[row], problem.expected(prompts[row], row)


def outputs_after_zero_e4m3_values(seed: int, device: str, dtype: torch.dtype) -> Outputs:
    """Yield the prefill and decode output of a context whose first two pages hold zero values in e4m3.

    The queries are small, so all tokens have similar softmax weights and the zeros count.
    """
    problem = PagedContexts([200], 64, (4, 2), 64, seed=seed, device=device, dtype=dtype, fp8=(True, True))
    zero_pages = problem.page_table[0, :2]
    problem.kv_cache[1].view(torch.uint8)[zero_pages], problem.scales_e8m0[1][zero_pages] = 0, 1
    problem.dequantized_cache[1][zero_pages] = 0
    q = problem.queries(3) / 32
    expected = problem.expected(q, 0)
    yield problem.prefill(q, [3]), expected
    yield problem.decode(q[2:]), expected[2:]


def relative_error(actual, expected):
    """Return the norm of (actual - expected) divided by the norm of `expected`."""
    return ((actual.double() - expected).norm() / expected.norm()).item()
