"""The start-up check of batch-invariant mode: on this device, the bits of a row must not depend on the other rows.

The kernels are written for this (batch_invariant_linear.py, paged_decode.py). On another machine a compiler, a BLAS or
a communication library could break it without an error. The check uses the weights of the run. It computes the same
random rows in batches of many sizes: every matmul, a prompt chunk, a decode step, sampling and scoring. All layers have
the same shapes, so one layer represents all of them. The check costs as much as reading about a thousand tokens with
Qwen3-0.6B at 8,192 tokens a pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from thinksafe.errors import UserError
from thinksafe.kernels.paged_cache import write_kv
from thinksafe.kernels.paged_decode import SPLIT
from thinksafe.kernels.sampling import sample
from thinksafe.model.config import PROJECTION_GROUPS
from thinksafe.model.projection import project
from thinksafe.sampler.kv_cache import PageCache
from thinksafe.sampler.model_runner import DecodeAttention, ModelRunner, PrefillAttention, graph_batch_size
from thinksafe.sampler.scheduler import ScheduledBatch

_MAX_CONTEXT = 2 * SPLIT + 64
"""Length in tokens of the longest context that is checked: three splits of decode attention, the last one short."""

_MAX_CPU_ROWS = 65
"""Largest batch to check on a CPU, which computes 32 rows at a time in every batch and would need seconds for more."""

Computation = Callable[[slice], Tensor]
"""A function that takes a range of rows of its full batch, computes them alone, and returns [number of rows, ...]."""


@torch.inference_mode()
def check_batch_invariance(runner: ModelRunner, max_prefill_tokens: int, key: str) -> None:
    """Check that the bits of a row do not depend on the batch size, in every computation of a pass of up to
    `max_prefill_tokens` tokens. The runner's cache is not changed.

    Raises:
        UserError: the bits of a row depend on the batch size; names the recipe key, the device, the first such
            computation and the batch size.
    """
    for name, compute, num_rows in _computations(runner, max_prefill_tokens):
        expected = _row_bytes(compute(slice(0, num_rows)))
        for count in row_counts(num_rows, runner.scheduler.table.num_slots):
            for rows in (slice(0, count), slice(num_rows - count, num_rows)):
                if not torch.equal(_row_bytes(compute(rows)), expected[rows]):
                    device = runner.device
                    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
                    raise UserError(
                        f"{key}: on {device_name}, the output of {name} for a row has other bits in a batch of {count} "
                        f"than in a batch of {num_rows}, so responses would depend on the batch; set batch_invariant "
                        "to false or use another device"
                    )


def row_counts(max_rows: int, num_slots: int) -> list[int]:
    """Return the batch sizes below `max_rows` to check, in ascending order: the sizes of all CUDA graphs of a decode
    pass of up to `num_slots` rows, and the powers of two. Together they use every tile of the kernels."""
    graph_sizes = set(map(graph_batch_size, range(1, num_slots + 1)))
    powers_of_two = {1 << power for power in range(max_rows.bit_length())}
    return sorted(count for count in graph_sizes | powers_of_two if count < max_rows)


def _row_bytes(x: Tensor) -> Tensor:
    """Return the bytes of each row, [T, bytes per row] uint8, so that NaN with equal bits compare as equal."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)


def _computations(runner: ModelRunner, max_prefill_tokens: int) -> Iterator[tuple[str, Computation, int]]:
    """Yield (name for the error message, computation, number of rows of its full batch).

    The computations are the groups of projections, the language-model head, sampling, scoring, a decode layer and a
    prefill layer. Each is made only when the caller asks for it. On a CPU a batch has at most `_MAX_CPU_ROWS` rows.
    """
    decoder, num_slots = runner.decoder, runner.scheduler.table.num_slots
    if runner.device.type == "cpu":
        num_slots, max_prefill_tokens = min(num_slots, _MAX_CPU_ROWS), min(max_prefill_tokens, _MAX_CPU_ROWS)
    config, head = decoder.config, decoder.head
    random_rows, num_tokens = _RandomRows(runner), max(max_prefill_tokens, num_slots)
    for names, group in zip(PROJECTION_GROUPS, decoder.layers[0].projection_groups, strict=True):
        out_features, in_features = sum(config.projections[name][0] for name in names), config.projections[names[0]][1]
        x = random_rows(num_tokens, in_features)
        yield (
            f"{', '.join(names)} ({out_features} x {in_features})",
            lambda rows, group=group, x=x: torch.cat(project(group, x[rows], runner.linear), -1),
            num_tokens,
        )
    hidden = random_rows(num_slots, config.hidden_size)
    yield f"the head ({len(head)} x {config.hidden_size})", lambda rows: runner.logits(hidden[rows], head), num_slots
    yield "sampling", partial(_sample_rows, runner.logits(hidden, head)), num_slots
    token_ids = torch.arange(2, device=runner.device).expand(num_slots, -1)
    yield "scoring", lambda rows: runner.logprobs_of(hidden[rows], head, token_ids[rows]), num_slots
    yield "a decode layer", _decode_layer(runner, random_rows, num_slots), num_slots
    length = min(max_prefill_tokens, config.max_seq_len, _MAX_CONTEXT)
    yield "a prefill layer", _prefill_layer(runner, random_rows, length), length


class _RandomRows:
    """A function from a shape to a tensor of standard normal numbers in the decoder's dtype and on its device."""

    def __init__(self, runner: ModelRunner):
        self._embedding = runner.decoder.embedding
        self._generator = torch.Generator(runner.device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        device, dtype = self._embedding.device, self._embedding.dtype
        return torch.randn(shape, generator=self._generator, device=device, dtype=dtype)


def _sample_rows(logits: Tensor, rows: slice) -> Tensor:
    """Return token and log-probability of some rows of `logits` [T, V] fp32, [number of rows, 2] fp64; every second row
    uses top-k."""
    row = torch.arange(len(logits), device=logits.device)
    temperature, top_p = (torch.full(row.shape, value, device=logits.device) for value in (0.6, 0.95))
    settings = (temperature, 20 * (row % 2), top_p, row, row)
    sampled = sample(logits[rows], *(column[rows] for column in settings))
    return torch.stack([column.double() for column in sampled], dim=1)


def _decode_layer(runner: ModelRunner, random_rows: _RandomRows, num_rows: int) -> Computation:
    """Return the computation of one decoder layer for one new token per row, after contexts of many lengths. All rows
    share the pages of their contexts, except that each row has a separate last page, to which it writes."""
    decoder, page_size = runner.decoder, runner.cache.page_size
    max_context = min(decoder.config.max_seq_len, _MAX_CONTEXT)
    row, width = torch.arange(num_rows, device=runner.device), -(-max_context // page_size)
    positions = max_context - 1 - 37 * row % max_context
    page_table = torch.arange(width, device=runner.device).repeat(num_rows, 1)
    page_table[row, positions // page_size] = width + row
    cache = _single_layer_cache(runner, random_rows, width + num_rows)
    hidden = random_rows(num_rows, decoder.config.hidden_size)

    def compute(rows: slice) -> Tensor:
        attention = DecodeAttention(cache, page_table[rows], positions[rows])
        return decoder.layers[0](hidden[rows], *decoder.rotation(positions[rows]), attention, runner.linear)

    return compute


def _prefill_layer(runner: ModelRunner, random_rows: _RandomRows, length: int) -> Computation:
    """Return the computation of one decoder layer for a range of the tokens of a prompt of `length` tokens, with the
    tokens before the range already in the cache."""
    decoder, config, page_size = runner.decoder, runner.decoder.config, runner.cache.page_size
    width = -(-length // page_size)
    cache = _single_layer_cache(runner, random_rows, width)
    hidden, no_rows = random_rows(length, config.hidden_size), np.zeros(0, dtype=np.int64)
    group, itemsize = config.num_heads // config.num_kv_heads, hidden.element_size()

    def compute(rows: slice) -> Tensor:
        start, end, slot = np.array([rows.start]), np.array([rows.stop]), np.zeros(1, dtype=np.int64)
        batch = ScheduledBatch(False, slot, start, end, np.ones(1, dtype=bool), slot, no_rows, no_rows)
        attention = PrefillAttention(cache, batch, np.arange(width)[None], group, itemsize)
        return decoder.layers[0](hidden[rows], *decoder.rotation(attention.positions), attention, runner.linear)

    return compute


def _single_layer_cache(runner: ModelRunner, random_rows: _RandomRows, num_pages: int) -> PageCache:
    """Return a new cache of one layer, in the runner's format, with random keys and values on every page."""
    config, page_size = replace(runner.decoder.config, num_layers=1), runner.cache.page_size
    cache = PageCache(config, runner.cache.format, num_pages, page_size, runner.device)
    tokens = torch.arange(num_pages * page_size, device=runner.device)
    new_kv = (random_rows(len(tokens), config.num_kv_heads, config.head_dim) for _ in range(2))
    write_kv(cache.layer(0), *new_kv, tokens)
    return cache
