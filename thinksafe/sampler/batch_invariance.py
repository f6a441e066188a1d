"""Before a batch-invariant run: on this device, a row's bits are shown not to depend on the rows beside it.

The kernels are made so (row_linear.py, paged_decode.py). What a compiler, a BLAS or a communication library makes of
them may be something else on another machine, and would be noticed by nobody. So every product, a prompt in pieces, a
decode step and a draw are computed for the same random rows in every number of rows that a pass comes in, with the
weights that are about to be used. Layers have the same shapes: one stands for all, which makes the whole cost that of
reading about a thousand tokens with Qwen3-0.6B at 8,192 tokens a pass.
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
from thinksafe.model.decoder import PRODUCTS
from thinksafe.sampler.kv_cache import PageCache
from thinksafe.sampler.model_runner import DecodeAttention, PrefillAttention, Runner, bucket
from thinksafe.sampler.scheduler import StepPlan

_CONTEXT = 2 * SPLIT + 64
"""Tokens of the longest context looked at: three splits of attention, the last one short."""

_ON_A_CPU = 65
"""Rows at most where they are computed 32 at a time whatever their number is, and cost seconds."""

Computation = Callable[[slice], Tensor]
"""The results of some of a number of rows, a row of theirs each."""


@torch.inference_mode()
def prove_row_invariance(runner: Runner, max_step_tokens: int) -> None:
    """Look at everything that a pass computes.

    Raises:
        UserError: naming the first computation whose rows depend on their number, and the number.
    """
    for name, compute, rows in _computations(runner, max_step_tokens):
        counts = _numbers_of_rows(rows, num_slots=len(runner.scheduler.epoch))
        if (count := _other_bits(compute, rows, counts)) is not None:
            device = runner.device
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
            raise UserError(
                f"sampler.batch_invariant: on {where} {name} gives a row other bits in a batch of {count} than in one "
                f"of {rows}, so responses would depend on the batch; leave the mode out, or use another device"
            )


def _numbers_of_rows(most: int, num_slots: int) -> list[int]:
    """Below `most`: of every CUDA graph that a decode step may be, and powers of two, among which every tile of the
    kernels has its turn."""
    graphs = set(map(bucket, range(1, num_slots + 1)))
    return sorted(count for count in graphs | {1 << power for power in range(most.bit_length())} if count < most)


def _other_bits(compute: Computation, rows: int, counts: list[int]) -> int | None:
    """The first of these numbers of rows, at either end of all, in which a row has other bits than among all."""
    whole = _bits(compute(slice(0, rows)))
    for count in counts:
        for some in (slice(0, count), slice(rows - count, rows)):
            if not torch.equal(_bits(compute(some)), whole[some]):
                return count
    return None


def _bits(x: Tensor) -> Tensor:
    """[T, bytes of a row]: equal where even two NaN are."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)


def _computations(runner: Runner, max_step_tokens: int) -> Iterator[tuple[str, Computation, int]]:
    """(name, computation, its rows), each made when it is asked for."""
    decoder, num_slots = runner.decoder, len(runner.scheduler.epoch)
    if runner.device.type == "cpu":
        num_slots, max_step_tokens = min(num_slots, _ON_A_CPU), min(max_step_tokens, _ON_A_CPU)
    layer, config = decoder.layers[0], decoder.config
    random, tokens = _Random(runner), max(max_step_tokens, num_slots)
    for names in PRODUCTS:
        out_features, in_features = sum(config.projections[name][0] for name in names), config.projections[names[0]][1]
        x = random(tokens, in_features)
        yield (
            f"{', '.join(names)} ({out_features} x {in_features})",
            lambda some, names=names, x=x: torch.cat(layer.project_all(names, x[some], runner.linear), -1),
            tokens,
        )
    hidden = random(num_slots, config.hidden_size)
    head = decoder.head
    yield f"the head ({len(head)} x {config.hidden_size})", lambda some: runner.logits(hidden[some], head), num_slots
    yield "a draw", partial(_drawn, runner.logits(hidden, head)), num_slots
    yield "a score", partial(_scores, runner, hidden), num_slots
    yield "a layer that decodes", _decoding(runner, random, num_slots), num_slots
    length = min(max_step_tokens, config.max_seq_len, _CONTEXT)
    yield "a layer that reads a prompt", _reading(runner, random, length), length


class _Random:
    """Rows of the decoder's dtype, on its device."""

    def __init__(self, runner: Runner):
        self._like = runner.decoder.embedding
        self._generator = torch.Generator(runner.device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        device, dtype = self._like.device, self._like.dtype
        return torch.randn(shape, generator=self._generator, device=device, dtype=dtype)


def _drawn(logits: Tensor, some: slice) -> Tensor:
    """Token and log-probability, of rows with and without top-k."""
    row = torch.arange(len(logits), device=logits.device)
    temperature, top_p = (torch.full(row.shape, value, device=logits.device) for value in (0.6, 0.95))
    settings = (temperature, 20 * (row % 2), top_p, row, row)
    drawn = sample(logits[some], *(column[some] for column in settings))
    return torch.stack([column.double() for column in drawn], dim=1)


def _scores(runner: Runner, hidden: Tensor, some: slice) -> Tensor:
    token_ids = torch.arange(2, device=runner.device).expand(len(hidden[some]), -1)
    return runner.logprobs_of(hidden[some], runner.decoder.head, token_ids)


def _decoding(runner: Runner, random: _Random, rows: int) -> Computation:
    """A token a row behind contexts of many lengths. All lie on the same pages but for their last, which is their own
    and is written to."""
    decoder, page_size = runner.decoder, runner.cache.page_size
    longest = min(decoder.config.max_seq_len, _CONTEXT)
    row, width = torch.arange(rows, device=runner.device), -(-longest // page_size)
    positions = longest - 1 - 37 * row % longest
    page_table = torch.arange(width, device=runner.device).repeat(rows, 1)
    page_table[row, positions // page_size] = width + row
    cache = _cache_of_a_layer(runner, random, width + rows)
    hidden = random(rows, decoder.config.hidden_size)

    def compute(some: slice) -> Tensor:
        attention = DecodeAttention(cache, page_table[some], positions[some])
        return decoder.layers[0](hidden[some], *decoder.rotation(positions[some]), attention, runner.linear)

    return compute


def _reading(runner: Runner, random: _Random, length: int) -> Computation:
    """A prompt, of which some rows are read when the others are in the cache already."""
    decoder, config, page_size = runner.decoder, runner.decoder.config, runner.cache.page_size
    width = -(-length // page_size)
    cache = _cache_of_a_layer(runner, random, width)
    hidden, nothing = random(length, config.hidden_size), np.zeros(0, dtype=np.int64)
    group, itemsize = config.num_heads // config.num_kv_heads, hidden.element_size()

    def compute(some: slice) -> Tensor:
        start, end, slot = np.array([some.start]), np.array([some.stop]), np.zeros(1, dtype=np.int64)
        plan = StepPlan(False, slot, start, end, np.ones(1, dtype=bool), slot, nothing, nothing)
        attention = PrefillAttention(cache, plan, np.arange(width)[None], group, itemsize)
        return decoder.layers[0](hidden[some], *decoder.rotation(attention.positions), attention, runner.linear)

    return compute


def _cache_of_a_layer(runner: Runner, random: _Random, num_pages: int) -> PageCache:
    """Random keys and values on every page."""
    config, page_size = replace(runner.decoder.config, num_layers=1), runner.cache.page_size
    cache = PageCache(config, runner.cache.format, num_pages, page_size, runner.device)
    keys, values, exponents = cache.layer(0)
    tokens = torch.arange(num_pages * page_size, device=runner.device)
    new = (random(len(tokens), config.num_kv_heads, config.head_dim) for _ in range(2))
    write_kv(keys, values, *new, tokens, exponents)
    return cache
