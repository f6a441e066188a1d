"""Writing to the page cache, in its own dtype and in e4m3: in plain torch, in the interpreter and on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.paged import relative
from thinksafe.kernels import kv_write
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantise
from thinksafe.kernels.fp8 import reference as quantise
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_cache import write_kv
from thinksafe.kernels.rope import qk_norm_rope, rope


def test_write_kv_writes_its_slots_and_nothing_else():
    cache = torch.zeros(2, 4, 2, 3, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    write_kv(*cache, k, v, torch.tensor([11, 0, 4]))
    for written, new in zip(cache, (k, v), strict=True):
        assert torch.equal(written[3, :, 2], new[0])
        assert torch.equal(written[0, :, 0], new[1])
        assert torch.equal(written[1, :, 1], new[2])
    assert (cache != 0).sum() == 2 * 3 * 2 * 5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (16, 8)])
def test_norm_rotation_and_write_in_one_equal_the_three(fresh_seed, norm, page_size, heads):
    T, D, num_pages = 9, 64, 33
    q, k, v = (torch.randn(T, count, D) for count in (heads[0], heads[1], heads[1]))
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(num_pages * page_size)[:T]
    expected, written = (torch.full((2, num_pages, heads[1], page_size, D), torch.nan) for _ in range(2))
    if norm:
        wanted, rotated = qk_norm_rope(q, k, q_weight, k_weight, 0.1, cos, sin)
    else:
        wanted, rotated = rope(q, cos, sin), rope(k, cos, sin)
    write_kv(*expected, rotated, v, slots)
    out = norm_rope_write_kv(q, k, v, q_weight, k_weight, 0.1, cos, sin, *written, slots)
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(written, expected, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_q_k_and_v_may_be_columns_of_one_product(fresh_seed):
    T, D, (num_heads, num_kv_heads) = 9, 64, (6, 2)
    columns = torch.randn(T, (num_heads + 2 * num_kv_heads) * D).split([num_heads * D, *2 * [num_kv_heads * D]], -1)
    parts = [part.unflatten(-1, (-1, D)) for part in columns]
    angle, slots = torch.randn(T, D // 2), torch.randperm(3 * 16)[:T]
    rest = (torch.randn(D), torch.randn(D), 1e-6, angle.cos(), angle.sin())
    written, expected = (torch.zeros(2, 3, num_kv_heads, 16, D) for _ in range(2))
    out = norm_rope_write_kv(*parts, *rest, *written, slots)
    wanted = norm_rope_write_kv(*(part.contiguous() for part in parts), *rest, *expected, slots)
    assert torch.equal(out, wanted) and out.is_contiguous() and torch.equal(written, expected)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fp8", [(True, True), (False, True)])
def test_a_cache_in_e4m3_gets_what_one_in_fp32_would_rounded_once(fresh_seed, norm, fp8):
    """To the bit in plain torch. The interpreter cuts numbers off where hardware rounds them, small ones to 0, and
    halves those that would round up to a power of two."""
    T, (num_heads, num_kv_heads), D, num_pages = 9, (6, 2), 64, 7
    q, k, v = (torch.randn(T, count, D) for count in (num_heads, num_kv_heads, num_kv_heads))
    k, v = k * torch.logspace(-3, 3, T)[:, None, None], v * torch.logspace(3, -3, T)[:, None, None]
    v[3, 1] = 0
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    rest = (q_weight, k_weight, 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(num_pages * 16)[:T]
    whole, written = (torch.zeros(2, num_pages, num_kv_heads, 16, D) for _ in range(2))
    wanted = norm_rope_write_kv(q, k, v, *rest, *whole, slots)
    stored, exponents = list(written), [None, None]
    for kind in (kind for kind in (0, 1) if fp8[kind]):
        stored[kind], exponents[kind] = quantise(written[kind])
    out = norm_rope_write_kv(q, k, v, *rest, *stored, slots, tuple(exponents))
    assert torch.equal(out, wanted)
    for kind in (0, 1):
        if not fp8[kind]:
            assert torch.equal(stored[kind], whole[kind])
            continue
        expected = quantise(whole[kind])
        touched = whole[kind].any(-1)
        assert torch.equal(exponents[kind][touched], expected[1][touched])
        found, best = dequantise(stored[kind], exponents[kind], torch.float32), dequantise(*expected, torch.float32)
        if not INTERPRETED:
            assert torch.equal(found, best)
        step = whole[kind].abs() / 8 + 2.0 ** (exponents[kind].float() - 127 - 6)[..., None]
        carried = (best.frexp().mantissa.abs() == 0.5) & (best.abs() > whole[kind].abs())
        assert (~touched[..., None] | carried | ((found - whole[kind]).abs() <= step)).all()


def test_what_is_broken_stays_broken_in_e4m3():
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = dequantise(*quantise(x), torch.float32)
    assert found[0].isnan().any() and found[1].isnan().any()
    assert torch.equal(found[2], x[2])


@given(st.integers(-140, 120), st.integers(0, 2**31))
def test_a_row_in_e4m3_is_within_a_sixteenth_of_each_number_whatever_its_size(power, seed):
    """Of the largest, where a number is 2^15 times smaller than that."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, exponents = quantise(x)
    found = dequantise(values, exponents, torch.float32)
    assert ((found - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2.0**-17 + 2.0**-134).all()
    assert torch.equal(dequantise(*quantise(found), torch.float32), found), "rounding again changes nothing"


def test_writing_shapes_that_do_not_fit_is_refused():
    q, k, cos = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 4)
    cache, slots = torch.zeros(2, 5, 2, 4, 8), torch.arange(3)
    for arguments in (
        (q, k[:2], k, cos, slots), (q, k, k[:, :1], cos, slots), (q, k, k, cos[:, :2], slots), (q, k, k, cos, slots[:1])
    ):  # fmt: skip
        *tensors, cos_, slots_ = arguments
        with pytest.raises(ValueError, match="expected"):
            norm_rope_write_kv(*tensors, None, None, 1e-6, cos_, cos_, *cache, slots_)


# On a GPU


@pytest.mark.gpu
def test_a_cache_in_e4m3_is_written_on_a_gpu_as_on_a_cpu(fresh_seed):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(T, num_heads, D), make(T, num_kv_heads, D), make(T, num_kv_heads, D)
    v *= torch.logspace(-3, 3, T, device="cuda", dtype=torch.bfloat16)[:, None, None]
    angle = torch.randn(T, D // 2, device="cuda")
    rest = (make(D), make(D), 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    empty = torch.zeros(40, num_kv_heads, 64, D, device="cuda")  # and not minus zero, which has other bits
    (expected, wanted), (written, found) = (
        [list(part) for part in zip(*(quantise(empty) for _ in range(2)), strict=True)] for _ in range(2)
    )
    kv_write.reference(q, k, v, *rest, *expected, slots, tuple(wanted))
    norm_rope_write_kv(q, k, v, *rest, *written, slots, tuple(found))
    assert torch.equal(found[1], wanted[1]) and torch.equal(written[1].view(torch.uint8), expected[1].view(torch.uint8))
    keys, best = (dequantise(*pair, torch.float32) for pair in ((written[0], found[0]), (expected[0], wanted[0])))
    assert relative(keys, best.double()) < 0.03, "the reference rounds keys to bf16 first, and a sum differs"


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
def test_norm_rotation_and_write_on_a_gpu_equal_the_three(fresh_seed, norm):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(T, num_heads, D), make(T, num_kv_heads, D), make(T, num_kv_heads, D)
    q_weight, k_weight = (make(D), make(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    expected, written = (make(2, 40, num_kv_heads, 64, D) * 0 for _ in range(2))
    wanted = kv_write.reference(q, k, v, q_weight, k_weight, 1e-6, cos, sin, *expected, slots)
    out = norm_rope_write_kv(q, k, v, q_weight, k_weight, 1e-6, cos, sin, *written, slots)
    assert relative(out, wanted.double()) < 5e-3
    assert relative(written[0], expected[0].double()) < 5e-3
    assert torch.equal(written[1], expected[1])
