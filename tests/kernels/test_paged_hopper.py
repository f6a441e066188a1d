"""The paged attention kernels, compiled for Hopper, match fp64 in bf16 and e4m3.

tests/emulation/ptx_on_cpu.py runs the compiled kernels without a GPU. It also checks addresses, alignment, barriers and
races, which Triton's interpreter cannot check. To test the oldest supported Triton, run this file with that version
first on PYTHONPATH.
"""

import re

import pytest

pytest.importorskip("triton")

import torch

from tests.emulation import ptx_on_cpu
from tests.emulation.ptx_on_cpu import on_hopper
from tests.support.combinations import combinations
from tests.support.paged import (
    PagedContexts,
    outputs_after_zero_e4m3_values,
    outputs_of_scaled_e4m3_values,
    relative_error,
)
from thinksafe.kernels import kv_write
from thinksafe.kernels import paged_decode as decoding
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantize
from thinksafe.kernels.fp8 import reference as quantize
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_cache import KvCache
from thinksafe.kernels.paged_decode import list_splits

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

pytestmark = pytest.mark.slow  # each test compiles kernels

DTYPES = [(False, False), (True, True), (False, True)]
"""Whether keys and values are in e4m3."""
SHAPES = [((4, 2), 128, 64), ((7, 1), 64, 16), ((3, 3), 8, 1), ((5, 1), 96, 64)]
"""Heads and KV heads, D, page size."""


def random_lengths(min_length: int, max_length: int) -> list[int]:
    """Return context lengths around whole tiles and pages, the smallest length, and three random lengths."""
    middle_lengths = torch.randint(min_length, max_length + 1, (3,)).tolist()
    return [min_length, 63, 64, 65, *middle_lengths]


@pytest.mark.parametrize(("shape", "fp8"), combinations(SHAPES, DTYPES))
def test_compiled_decode_matches_fp64(fresh_seed, monkeypatch, shape, fp8):
    heads, D, page_size = shape
    monkeypatch.setattr(decoding, "SPLIT", 64)
    lengths = random_lengths(0, 200)
    problem = PagedContexts(
        lengths, page_size, heads, D, num_shared_pages=1, seed=fresh_seed, dtype=torch.bfloat16, fp8=fp8
    )
    q = problem.queries(len(lengths))
    with on_hopper():
        out = problem.decode(q)
    assert relative_error(out, torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])) < 5e-3


@pytest.mark.parametrize(("shape", "fp8"), combinations(SHAPES, DTYPES))
def test_compiled_prefill_matches_fp64(fresh_seed, shape, fp8):
    heads, D, page_size = shape
    lengths = random_lengths(1, 200)
    query_lens = [int(torch.randint(1, min(length, 60) + 1, ())) for length in lengths]
    problem = PagedContexts(
        lengths, page_size, heads, D, num_shared_pages=1, seed=fresh_seed, dtype=torch.bfloat16, fp8=fp8
    )
    q = problem.queries(sum(query_lens))
    with on_hopper():
        out = problem.prefill(q, query_lens)
    expected = [problem.expected(part, row) for row, part in enumerate(q.split(query_lens))]
    assert relative_error(out, torch.cat(expected)) < 5e-3


@pytest.mark.parametrize(
    ("shape", "norm", "fp8"), combinations([((8, 4), 128), ((7, 1), 64), ((6, 3), 128)], [True, False], DTYPES)
)
def test_compiled_write_matches_plain_torch(fresh_seed, shape, norm, fp8):
    """As in a layer, q, k and v are column slices of one matmul."""
    ((num_heads, num_kv_heads), D), T, num_pages = shape, 11, 5
    columns = torch.randn(T, (num_heads + 2 * num_kv_heads) * D).bfloat16()
    columns *= torch.logspace(-3, 3, T).bfloat16()[:, None]
    parts = columns.split([num_heads * D, *2 * [num_kv_heads * D]], -1)
    q, k, v = (part.unflatten(-1, (-1, D)) for part in parts)
    norm_weights = torch.randn(2, D).bfloat16() if norm else (None, None)
    angle, slots = torch.randn(T, D // 2), torch.randperm(num_pages * 16)[:T]
    arguments = (q, k, v, *norm_weights, 1e-6, angle.cos(), angle.sin())

    def empty_cache() -> tuple[list, list]:
        stored, scales_e8m0 = [torch.zeros(num_pages, num_kv_heads, 16, D).bfloat16() for _ in range(2)], [None, None]
        for kind in (kind for kind in (0, 1) if fp8[kind]):
            stored[kind], scales_e8m0[kind] = quantize(stored[kind])
        return stored, scales_e8m0

    (expected, expected_scales), (written, scales) = empty_cache(), empty_cache()
    expected_q = kv_write.reference(*arguments, KvCache(*expected, *expected_scales), slots)
    with on_hopper():
        out = norm_rope_write_kv(*arguments, KvCache(*written, *scales), slots)
    assert relative_error(out, expected_q.double()) < 5e-3
    caches = zip(written, scales, strict=True), zip(expected, expected_scales, strict=True)
    (keys, values), (expected_keys, expected_values) = (
        [x.float() if cache_scales is None else dequantize(x, cache_scales, torch.float32) for x, cache_scales in cache]
        for cache in caches
    )
    assert torch.equal(values, expected_values)
    # The reference also rounds keys to bf16, so e4m3 keys may differ by one step.
    abs_max = expected_keys.abs().amax(-1, keepdim=True)
    assert ((keys - expected_keys).abs() <= (expected_keys.abs() / 8 if fp8[0] else 0) + abs_max / 64).all()


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_compiled_split_list_holds_every_split_once(fresh_seed, rows):
    lengths = torch.randint(0, 20_000, (rows,)) * (torch.rand(rows) < 0.9)
    with on_hopper():
        num_items, *items = list_splits(lengths, 20_480).tolist()
    split_len = (lengths + 32 * 512 - 1) // (32 * 512) * 512  # 32 splits at most
    num_splits = -(-lengths // split_len.clamp(min=512))
    assert items[:num_items] == [
        32 * row + split for row, row_splits in enumerate(num_splits.tolist()) for split in range(row_splits)
    ]


@pytest.mark.parametrize("exponent_range", [(-90, -60), (-40, 40), (60, 90)])
def test_compiled_attention_is_accurate_for_any_e4m3_scale(fresh_seed, monkeypatch, exponent_range):
    monkeypatch.setattr(decoding, "SPLIT", 64)
    with on_hopper():
        for out, expected in outputs_of_scaled_e4m3_values(fresh_seed, exponent_range, "cpu", torch.bfloat16):
            assert ((out.double() - expected).abs() <= 5e-3 * expected.abs().amax(-1, keepdim=True)).all()


def test_compiled_attention_gives_zero_e4m3_values_their_weight(fresh_seed):
    with on_hopper():
        for out, expected in outputs_after_zero_e4m3_values(fresh_seed, "cpu", torch.bfloat16):
            assert relative_error(out, expected) < 5e-3


# Fault -> (pattern and replacement that put it into the PTX, error of the emulator or None for a wrong result).
FAULTS = {
    "no barrier": (r"\n\tbar\.sync \t0;", "", "a race between two warps"),
    "no wait for copies": (r"\n\tcp\.async\.wait_group [^;]*;", "", "never waited for"),
    "address outside the cache": (
        r"(mad\.lo\.s64 \t%rd\d+), (%rd\d+), (%rd\d+), (%rd\d+);",
        r"\1, -9, \3, \4;",
        "outside every tensor",
    ),
    "misaligned by two bytes": (
        r"ld\.global\.v4\.b32 (.*) \+ 0 \]",
        r"ld.global.v4.b32 \1 + 2 ]",
        "not a multiple of 16",
    ),
    "adjacent e4m3 elements swapped": (r"prmt\.b32 (.*), 0x[37]\d20", r"prmt.b32 \1, 0x3210", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulator_detects_faults_in_compiled_code(monkeypatch, fault):
    pattern, replacement, message = FAULTS[fault]
    compile_ptx = ptx_on_cpu.compile_ptx

    def compile_with_fault(*arguments):
        ptx, shared_bytes = compile_ptx(*arguments)
        return re.sub(pattern, replacement, ptx), shared_bytes

    monkeypatch.setattr(ptx_on_cpu, "compile_ptx", compile_with_fault)
    problem = PagedContexts([140, 90], 64, (4, 2), 128, dtype=torch.bfloat16, fp8=(True, True))
    q = problem.queries(140)
    expected = [problem.expected(q[:70], 0), problem.expected(q[70:], 1)]
    with on_hopper():
        if message is None:
            decoded = problem.decode(q[[69, 139]])
            assert not relative_error(decoded, torch.cat([part[-1:] for part in expected])) < 5e-2
            return
        with pytest.raises(AssertionError, match=message):
            problem.prefill(q, [70, 70])
