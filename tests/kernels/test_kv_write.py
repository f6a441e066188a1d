"""Keys and values are written to the paged KV cache as three separate operations would write them, in 16 bits, fp32 and
e4m3: in plain torch, in Triton's interpreter and on a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.paged import relative_error
from thinksafe.kernels import kv_write
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantize
from thinksafe.kernels.fp8 import reference as quantize
from thinksafe.kernels.kv_write import norm_rope_write_kv
from thinksafe.kernels.paged_cache import KvCache, write_kv
from thinksafe.kernels.rope import qk_norm_rope, rope


def test_write_kv_changes_only_its_slots():
    cache = torch.zeros(2, 4, 2, 3, 5)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    write_kv(KvCache(*cache), k, v, torch.tensor([11, 0, 4]))
    for layer_cache, states in zip(cache, (k, v), strict=True):
        assert torch.equal(layer_cache[3, :, 2], states[0])
        assert torch.equal(layer_cache[0, :, 0], states[1])
        assert torch.equal(layer_cache[1, :, 1], states[2])
    assert (cache != 0).sum() == 2 * 3 * 2 * 5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (7, 1), (16, 8)])
def test_fused_write_matches_three_separate_operations(fresh_seed, norm, page_size, heads):
    T, D, num_pages = 9, 64, 33
    q, k, v = (torch.randn(T, count, D) for count in (heads[0], heads[1], heads[1]))
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(num_pages * page_size)[:T]
    expected_cache, kv_cache = (torch.full((2, num_pages, heads[1], page_size, D), torch.nan) for _ in range(2))
    if norm:
        expected_q, rotated_k = qk_norm_rope(q, k, q_weight, k_weight, 0.1, cos, sin)
    else:
        expected_q, rotated_k = rope(q, cos, sin), rope(k, cos, sin)
    write_kv(KvCache(*expected_cache), rotated_k, v, slots)
    out = norm_rope_write_kv(q, k, v, q_weight, k_weight, 0.1, cos, sin, KvCache(*kv_cache), slots)
    torch.testing.assert_close(out, expected_q, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(kv_cache, expected_cache, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_q_k_v_may_be_column_slices_of_one_matmul(fresh_seed):
    T, D, (num_heads, num_kv_heads) = 9, 64, (6, 2)
    columns = torch.randn(T, (num_heads + 2 * num_kv_heads) * D).split([num_heads * D, *2 * [num_kv_heads * D]], -1)
    qkv = [part.unflatten(-1, (-1, D)) for part in columns]
    angle, slots = torch.randn(T, D // 2), torch.randperm(3 * 16)[:T]
    norm_and_angles = (torch.randn(D), torch.randn(D), 1e-6, angle.cos(), angle.sin())
    kv_cache, expected_cache = (torch.zeros(2, 3, num_kv_heads, 16, D) for _ in range(2))
    out = norm_rope_write_kv(*qkv, *norm_and_angles, KvCache(*kv_cache), slots)
    contiguous = (part.contiguous() for part in qkv)
    expected_q = norm_rope_write_kv(*contiguous, *norm_and_angles, KvCache(*expected_cache), slots)
    assert torch.equal(out, expected_q) and out.is_contiguous() and torch.equal(kv_cache, expected_cache)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("fp8", [(True, True), (False, True)])
def test_e4m3_cache_holds_the_fp32_result_rounded_once(fresh_seed, norm, fp8):
    """Plain torch gives the exact bits.

    Triton's interpreter differs: it truncates where the hardware rounds, flushes small values to 0, and halves a value
    that would round up to a power of two."""
    T, (num_heads, num_kv_heads), D, num_pages = 9, (6, 2), 64, 7
    q, k, v = (torch.randn(T, count, D) for count in (num_heads, num_kv_heads, num_kv_heads))
    k, v = k * torch.logspace(-3, 3, T)[:, None, None], v * torch.logspace(3, -3, T)[:, None, None]
    v[3, 1] = 0
    q_weight, k_weight = (torch.randn(D), torch.randn(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2)
    norm_and_angles = (q_weight, k_weight, 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(num_pages * 16)[:T]
    fp32_cache, zero_cache = (torch.zeros(2, num_pages, num_kv_heads, 16, D) for _ in range(2))
    expected_q = norm_rope_write_kv(q, k, v, *norm_and_angles, KvCache(*fp32_cache), slots)
    kv_cache, scales_e8m0 = list(zero_cache), [None, None]
    for kind in (kind for kind in (0, 1) if fp8[kind]):
        kv_cache[kind], scales_e8m0[kind] = quantize(zero_cache[kind])
    out = norm_rope_write_kv(q, k, v, *norm_and_angles, KvCache(*kv_cache, *scales_e8m0), slots)
    assert torch.equal(out, expected_q)
    for kind in (0, 1):
        if not fp8[kind]:
            assert torch.equal(kv_cache[kind], fp32_cache[kind])
            continue
        expected = quantize(fp32_cache[kind])
        is_written = fp32_cache[kind].any(-1)
        assert torch.equal(scales_e8m0[kind][is_written], expected[1][is_written])
        actual, nearest = (
            dequantize(kv_cache[kind], scales_e8m0[kind], torch.float32),
            dequantize(*expected, torch.float32),
        )
        if not INTERPRETED:
            assert torch.equal(actual, nearest)
        step = fp32_cache[kind].abs() / 8 + 2.0 ** (scales_e8m0[kind].float() - 127 - 6)[..., None]
        rounded_up_to_power = (nearest.frexp().mantissa.abs() == 0.5) & (nearest.abs() > fp32_cache[kind].abs())
        assert (~is_written[..., None] | rounded_up_to_power | ((actual - fp32_cache[kind]).abs() <= step)).all()


def test_nan_and_infinity_become_nan_in_e4m3():
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    rounded = dequantize(*quantize(x), torch.float32)
    assert rounded[0].isnan().any() and rounded[1].isnan().any()
    assert torch.equal(rounded[2], x[2])


@given(st.integers(-140, 120), st.integers(0, 2**31))
def test_e4m3_error_is_at_most_a_sixteenth_of_each_value(power, seed):
    """Values about 2^15 times smaller than the largest of their row have an error relative to the largest."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, scales_e8m0 = quantize(x)
    rounded = dequantize(values, scales_e8m0, torch.float32)
    assert ((rounded - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2.0**-17 + 2.0**-134).all()
    assert torch.equal(dequantize(*quantize(rounded), torch.float32), rounded), "rounding twice equals rounding once"


def test_shapes_that_do_not_fit_raise_value_error():
    q, k, cos = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 4)
    cache, slots = torch.zeros(2, 5, 2, 4, 8), torch.arange(3)
    for arguments in (
        (q, k[:2], k, cos, slots), (q, k, k[:, :1], cos, slots), (q, k, k, cos[:, :2], slots), (q, k, k, cos, slots[:1])
    ):  # fmt: skip
        *tensors, bad_cos, bad_slots = arguments
        with pytest.raises(ValueError, match="expected"):
            norm_rope_write_kv(*tensors, None, None, 1e-6, bad_cos, bad_cos, KvCache(*cache), bad_slots)


# On a GPU


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
def test_e4m3_write_on_gpu_matches_plain_torch(fresh_seed):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    q, k, v = random_bf16(T, num_heads, D), random_bf16(T, num_kv_heads, D), random_bf16(T, num_kv_heads, D)
    v *= torch.logspace(-3, 3, T, device="cuda", dtype=torch.bfloat16)[:, None, None]
    angle = torch.randn(T, D // 2, device="cuda")
    norm_and_angles = (random_bf16(D), random_bf16(D), 1e-6, angle.cos(), angle.sin())
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    empty = torch.zeros(40, num_kv_heads, 64, D, device="cuda")  # +0: the bits of -0 differ
    (expected_cache, expected_scales), (kv_cache, scales) = (
        [list(part) for part in zip(*(quantize(empty) for _ in range(2)), strict=True)] for _ in range(2)
    )
    kv_write.reference(q, k, v, *norm_and_angles, KvCache(*expected_cache, *expected_scales), slots)
    norm_rope_write_kv(q, k, v, *norm_and_angles, KvCache(*kv_cache, *scales), slots)
    assert torch.equal(scales[1], expected_scales[1]) and torch.equal(
        kv_cache[1].view(torch.uint8), expected_cache[1].view(torch.uint8)
    )
    keys, expected_keys = (
        dequantize(*pair, torch.float32) for pair in ((kv_cache[0], scales[0]), (expected_cache[0], expected_scales[0]))
    )
    assert relative_error(keys, expected_keys.double()) < 0.03, (
        "more than the reference's rounding of keys to bf16 and another order of addition explain"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
def test_fused_write_on_gpu_matches_plain_torch(fresh_seed, norm):
    T, (num_heads, num_kv_heads), D = 300, (28, 4), 128
    q, k, v = random_bf16(T, num_heads, D), random_bf16(T, num_kv_heads, D), random_bf16(T, num_kv_heads, D)
    q_weight, k_weight = (random_bf16(D), random_bf16(D)) if norm else (None, None)
    angle = torch.randn(T, D // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(40 * 64, device="cuda")[:T]
    expected_cache, kv_cache = (random_bf16(2, 40, num_kv_heads, 64, D) * 0 for _ in range(2))
    arguments = (q, k, v, q_weight, k_weight, 1e-6, cos, sin)
    expected_q = kv_write.reference(*arguments, KvCache(*expected_cache), slots)
    out = norm_rope_write_kv(*arguments, KvCache(*kv_cache), slots)
    assert relative_error(out, expected_q.double()) < 5e-3
    assert relative_error(kv_cache[0], expected_cache[0].double()) < 5e-3
    assert torch.equal(kv_cache[1], expected_cache[1])
