"""The model's side of a step: the page cache and one forward pass over the planned rows.

Each layer first writes the new tokens' keys and values into the cache, then attends: rows with a single token in
batches of similar length, longer rows (prompts) one by one.
"""

import numpy as np
import torch
from torch import Tensor

from thinksafe.kernels.paged_attention import paged_decode, paged_prefill, write_kv
from thinksafe.model.decoder import Decoder
from thinksafe.sampler.scheduler import Scheduler, StepPlan

_DECODE_BATCH_TOKENS = 2**17
"""Context tokens, padding included, that one batch of decoding rows copies out of the cache: 0.5 GB a layer at 8
key-value heads of 128 in bf16. Without a bound one row of 16k tokens would pad 255 others to its length."""


class PagedAttention:
    """Attention of one step's rows, as the decoder calls it. Everything that depends on the plan is made once."""

    def __init__(self, cache: Tensor, plan: StepPlan, scheduler: Scheduler):
        device, page_size = cache.device, cache.shape[3]
        self.cache = cache
        self.num_decodes = plan.num_decodes
        counts = plan.ends - plan.starts
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + plan.starts[row]
        pages = scheduler.page_table[plan.slots[row], positions // page_size]
        self.cache_slots = torch.from_numpy(pages * page_size + positions % page_size).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self.input_ids = torch.from_numpy(scheduler.tokens[plan.slots[row], positions]).to(device, torch.int64)
        self.last_rows = torch.from_numpy((np.cumsum(counts) - 1)[plan.completes]).to(device)

        self.decodes: list[tuple[Tensor, Tensor, Tensor]] = []
        lengths = plan.ends[: self.num_decodes]
        for rows in _similar_lengths(lengths):
            width = -(-int(lengths[rows].max()) // page_size)
            pages = scheduler.page_table[plan.slots[rows], :width]
            self.decodes.append(tuple(torch.from_numpy(part).to(device) for part in (rows, pages, lengths[rows])))
        self.prefills: list[tuple[int, int, Tensor, int]] = []
        start = self.num_decodes
        for slot, end, count in zip(plan.slots.tolist(), plan.ends.tolist(), counts.tolist(), strict=True):
            if count > 1:
                pages = torch.from_numpy(scheduler.page_table[slot, : -(-end // page_size)]).to(device)
                self.prefills.append((start, start + count, pages, end))
                start += count

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        write_kv(keys, values, k, v, self.cache_slots)
        out = torch.empty_like(q)
        for rows, pages, seq_lens in self.decodes:
            out[rows] = paged_decode(q[rows], keys, values, pages, seq_lens)
        for start, end, pages, seq_len in self.prefills:
            out[start:end] = paged_prefill(q[start:end], keys, values, pages, seq_len)
        return out


def _similar_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Indices in batches, shortest first, each at most _DECODE_BATCH_TOKENS when padded to its longest."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > _DECODE_BATCH_TOKENS:
            batches.append(order[start:end])
            start = end
    return batches


class Runner:
    """A decoder with a page cache.

    Attributes:
        cache: [num_layers, 2, num_pages, page_size, num_kv_heads, D], keys and values.
    """

    def __init__(self, decoder: Decoder, num_pages: int, page_size: int):
        config = decoder.config
        self.decoder = decoder
        shape = (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.cache = torch.zeros(shape, dtype=decoder.embedding.dtype, device=decoder.embedding.device)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, scheduler: Scheduler) -> Tensor:
        """Hidden state of the last token of every completing row, [plan.completes.sum(), H]."""
        attention = PagedAttention(self.cache, plan, scheduler)
        return self.decoder(attention.input_ids, attention.positions, attention)[attention.last_rows]
