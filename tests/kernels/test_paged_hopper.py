"""The kernels of the page cache in bf16 and e4m3, as they are compiled for a Hopper GPU, run without one.

ptx_on_cpu.py also looks for what the interpreter cannot show: addresses, alignment, barriers and races. The same file
runs under the oldest supported Triton, put first on PYTHONPATH.
"""

import re

import pytest

pytest.importorskip("triton")

import torch

import tests.kernels.test_paged_attention as attention
from tests.emulation import ptx_on_cpu
from tests.emulation.ptx_on_cpu import on_hopper
from tests.support.paged import Paged, relative
from thinksafe.kernels import kv_write
from thinksafe.kernels import paged_decode as decoding
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantise
from thinksafe.kernels.fp8 import reference as quantise
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_decode import decode_work

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

in_every_dtype = pytest.mark.parametrize("fp8", [(False, False), (True, True), (False, True)])
SHAPES = [((4, 2), 128, 64), ((7, 1), 64, 16), ((3, 3), 8, 1), ((5, 1), 96, 64)]


def some_lengths(shortest: int, longest: int) -> list[int]:
    """Of contexts around whole tiles and pages, and others."""
    others = torch.randint(shortest, longest + 1, (3,)).tolist()
    return [shortest, 63, 64, 65, *others]


@in_every_dtype
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
def test_decoding_equals_fp64(fresh_seed, monkeypatch, heads, D, page_size, fp8):
    monkeypatch.setattr(decoding, "SPLIT", 64)
    lengths = some_lengths(0, 200)
    problem = Paged(lengths, page_size, heads, D, shared=1, seed=fresh_seed, dtype=torch.bfloat16, fp8=fp8)
    q = problem.queries(len(lengths))
    with on_hopper():
        out = problem.decode(q)
    assert relative(out, torch.cat([problem.expected(q[row, None], row) for row in range(len(lengths))])) < 5e-3


@in_every_dtype
@pytest.mark.parametrize(("heads", "D", "page_size"), SHAPES)
def test_reading_prompts_equals_fp64(fresh_seed, heads, D, page_size, fp8):
    lengths = some_lengths(1, 200)
    counts = [int(torch.randint(1, min(length, 60) + 1, ())) for length in lengths]
    problem = Paged(lengths, page_size, heads, D, shared=1, seed=fresh_seed, dtype=torch.bfloat16, fp8=fp8)
    q = problem.queries(sum(counts))
    with on_hopper():
        out = problem.prefill(q, counts)
    expected = [problem.expected(part, row) for row, part in enumerate(q.split(counts))]
    assert relative(out, torch.cat(expected)) < 5e-3


@in_every_dtype
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "D"), [((8, 4), 128), ((7, 1), 64), ((6, 3), 128)])
def test_what_is_written_is_what_plain_torch_writes(fresh_seed, heads, D, norm, fp8):
    """q, k and v as columns of one product, as a layer has them."""
    T, (num_heads, num_kv_heads), num_pages = 11, heads, 5
    columns = torch.randn(T, (num_heads + 2 * num_kv_heads) * D).bfloat16()
    columns *= torch.logspace(-3, 3, T).bfloat16()[:, None]
    parts = columns.split([num_heads * D, *2 * [num_kv_heads * D]], -1)
    q, k, v = (part.unflatten(-1, (-1, D)) for part in parts)
    gains = torch.randn(2, D).bfloat16() if norm else (None, None)
    angle, slots = torch.randn(T, D // 2), torch.randperm(num_pages * 16)[:T]
    arguments = (q, k, v, *gains, 1e-6, angle.cos(), angle.sin())

    def nothing() -> tuple[list, list]:
        stored, exponents = [torch.zeros(num_pages, num_kv_heads, 16, D).bfloat16() for _ in range(2)], [None, None]
        for kind in (kind for kind in (0, 1) if fp8[kind]):
            stored[kind], exponents[kind] = quantise(stored[kind])
        return stored, exponents

    (expected, wanted), (written, found) = nothing(), nothing()
    q_expected = kv_write.reference(*arguments, *expected, slots, tuple(wanted))
    with on_hopper():
        out = norm_rope_write_kv(*arguments, *written, slots, tuple(found))
    assert relative(out, q_expected.double()) < 5e-3
    pairs = zip(written, found, strict=True), zip(expected, wanted, strict=True)
    (keys, values), (keys_expected, values_expected) = (
        [x.float() if powers is None else dequantise(x, powers, torch.float32) for x, powers in cache]
        for cache in pairs
    )
    assert torch.equal(values, values_expected)
    # The reference rounds keys to bf16 on the way; in e4m3 they may then be one step apart.
    largest = keys_expected.abs().amax(-1, keepdim=True)
    assert ((keys - keys_expected).abs() <= (keys_expected.abs() / 8 if fp8[0] else 0) + largest / 64).all()


@pytest.mark.parametrize("rows", [1, 3, 512])
def test_the_list_of_work_has_every_split_of_every_row_once(fresh_seed, rows):
    lengths = torch.randint(0, 20_000, (rows,)) * (torch.rand(rows) < 0.9)
    with on_hopper():
        num_items, *items = decode_work(lengths, 20_480).tolist()
    step = (lengths + 32 * 512 - 1) // (32 * 512) * 512  # 32 splits at most
    counts = -(-lengths // step.clamp(min=512))
    assert items[:num_items] == [
        32 * row + split for row, count in enumerate(counts.tolist()) for split in range(count)
    ]


@pytest.mark.parametrize("powers", [(-90, -60), (-40, 40), (60, 90)])
def test_values_in_e4m3_may_be_of_any_size(fresh_seed, monkeypatch, powers):
    with on_hopper():
        attention.test_values_in_e4m3_may_be_of_any_size(fresh_seed, monkeypatch, powers, "cpu", torch.bfloat16, 5e-3)


def test_zeros_of_e4m3_take_their_share_of_the_weights(fresh_seed):
    with on_hopper():
        attention.test_zeros_of_e4m3_take_their_share_of_the_weights(fresh_seed, "cpu", torch.bfloat16, 5e-3)


BROKEN = {
    "no barrier": (r"\n\tbar\.sync \t0;", "", "a race between warps"),
    "nothing waited for": (r"\n\tcp\.async\.wait_group [^;]*;", "", "never waited for"),
    "a page too far": (
        r"(mad\.lo\.s64 \t%rd\d+), (%rd\d+), (%rd\d+), (%rd\d+);",
        r"\1, -9, \3, \4;",
        "outside every tensor",
    ),
    "off by two bytes": (r"ld\.global\.v4\.b32 (.*) \+ 0 \]", r"ld.global.v4.b32 \1 + 2 ]", "no multiple of 16"),
    "neighbours in e4m3 swapped": (r"prmt\.b32 (.*), 0x[37]\d20", r"prmt.b32 \1, 0x3210", None),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_would_be_seen(monkeypatch, fault):
    """What is compiled, with a fault in it."""
    find, replace, told = BROKEN[fault]
    compiled = ptx_on_cpu._compiled

    def broken(*arguments):
        ptx, shared_bytes = compiled(*arguments)
        return re.sub(find, replace, ptx), shared_bytes

    monkeypatch.setattr(ptx_on_cpu, "_compiled", broken)
    problem = Paged([140, 90], 64, (4, 2), 128, dtype=torch.bfloat16, fp8=(True, True))
    q = problem.queries(140)
    expected = [problem.expected(q[:70], 0), problem.expected(q[70:], 1)]
    with on_hopper():
        if told is None:
            decoded = problem.decode(q[[69, 139]])
            assert not relative(decoded, torch.cat([part[-1:] for part in expected])) < 5e-2
            return
        with pytest.raises(AssertionError, match=told):
            problem.prefill(q, [70, 70])
