"""Linear maps whose rows have the same bits in every batch, and those with both operands in e4m3.

Of the plain reference as the file stands, of the Triton kernel under TRITON_INTERPRET=1, and of it on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import Quantised, dequantise, quantise
from thinksafe.kernels.row_linear import TILES, fp8_linear, row_linear, tiles_of

SHAPES = [(1, 64, 48), (33, 96, 100), (70, 40, 33)]


def in_e4m3(x, weight, bias=None):
    return fp8_linear(quantise(x), weight, bias, x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_a_linear_map(fresh_seed, shape, with_bias):
    T, K, N = shape
    x, weight, bias = torch.randn(T, K), torch.randn(N, K), torch.randn(N) if with_bias else None
    torch.testing.assert_close(row_linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="numpy multiplies there, which promises no bits")
@pytest.mark.parametrize("count", [1, 2, 3, 7, 31, 32, 33, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_at_every_place_of_every_batch(fresh_seed, count, shape):
    _, K, N = shape
    x, weight = torch.randn(count, K), torch.randn(N, K)
    stored = quantise(weight)
    for linear in (lambda rows: row_linear(rows, weight), lambda rows: in_e4m3(rows, stored)):
        batch, order = linear(x), torch.randperm(count)
        assert torch.equal(linear(x[order]), batch[order])
        assert torch.equal(linear(x[-1:]), batch[-1:])


def test_weights_one_below_the_other_are_one_weight(fresh_seed):
    """On a GPU to the bit; a CPU's BLAS picks its kernels by the number of columns too."""
    x, weights, biases = torch.randn(33, 64), torch.randn(3, 32, 64), torch.randn(3, 32)
    for linear, convert in ((row_linear, lambda weight: weight), (in_e4m3, quantise)):
        apart = [linear(x, convert(weight), bias) for weight, bias in zip(weights, biases, strict=True)]
        torch.testing.assert_close(
            linear(x, convert(weights.flatten(0, 1)), biases.flatten()), torch.cat(apart, 1), rtol=1e-6, atol=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_in_e4m3_it_is_the_product_of_what_the_rounded_operands_stand_for(fresh_seed, shape, with_bias):
    T, K, N = shape
    x = torch.randn(T, K) * torch.logspace(-3, 3, T)[:, None]
    weight, bias = torch.randn(N, K) * torch.logspace(2, -2, N)[:, None], torch.randn(N) if with_bias else None
    stored = quantise(weight)
    operands = (dequantise(*quantised, torch.float64) for quantised in (quantise(x), stored))
    expected = F.linear(*operands, bias.double() if with_bias else None)
    out = in_e4m3(x, stored, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if not INTERPRETED:  # which cuts numbers off where hardware rounds them
        exact = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        size = x.norm(dim=-1)[:, None] * weight.norm(dim=-1) / K**0.5  # of a result, of unrelated rows
        assert ((out - exact).abs() / size).mean() < 0.06


def test_nothing_in_nothing_out():
    weight = torch.randn(8, 16)
    assert row_linear(torch.zeros(0, 16), weight).shape == (0, 8)
    assert in_e4m3(torch.zeros(0, 16), quantise(weight)).shape == (0, 8)


def test_what_is_broken_stays_in_its_row():
    x, weight = torch.ones(3, 32), torch.ones(8, 32)
    x[1, 5] = torch.nan
    for out in (row_linear(x, weight), *([] if INTERPRETED else [in_e4m3(x, quantise(weight))])):
        assert out[1].isnan().all() and torch.equal(out[[0, 2]], torch.full((2, 8), 32.0))


def test_operands_that_do_not_fit_are_refused():
    x, weight = torch.zeros(2, 16), torch.zeros(8, 16)
    for call, message in (
        (lambda: row_linear(x, weight[:, :8]), "expected .T, K. and .N, K."),
        (lambda: row_linear(x, weight.half()), "weight is torch.float16"),
        (lambda: row_linear(x, torch.zeros(16, 8).T), "contiguous"),
        (lambda: in_e4m3(x, Quantised(weight, torch.zeros(8))), "expected torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_tile_is_as_large_as_leaves_one_for_every_processor():
    large, middle, _, small = TILES[2]
    assert tiles_of(8192, 4096, 2, 132) == tiles_of(1, 151_936, 2, 132) == large
    assert tiles_of(256, 12_288, 2, 132) == tiles_of(8192, 4096, 1, 132) == middle
    assert tiles_of(256, 1024, 2, 132) == small


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(1024, 2048), (4096, 1024), (2048, 151_936)])
def test_every_tile_gives_a_row_the_same_bits_on_a_gpu(fresh_seed, monkeypatch, K, N):
    """A row alone, in 64, in 512 and in 5,000, so that every tile is used; and the result is a product's."""
    x, weight = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for rows in (5000, N))
    stored = quantise(weight)
    for linear in (lambda rows: row_linear(rows, weight), lambda rows: in_e4m3(rows, stored)):
        batch = linear(x)
        for rows in (1, 64, 512):
            assert torch.equal(linear(x[:rows]), batch[:rows])
        halves = [Quantised(*half) for half in zip(*(part.chunk(2) for part in stored), strict=True)]
    assert torch.equal(torch.cat([row_linear(x[:64], half) for half in weight.chunk(2)], 1), row_linear(x[:64], weight))
    assert torch.equal(torch.cat([in_e4m3(x[:64], half) for half in halves], 1), in_e4m3(x[:64], stored))
    exact = x[:64].double() @ weight.double().T
    assert ((row_linear(x[:64], weight) - exact).norm() / exact.norm()) < 3e-3
    assert ((in_e4m3(x[:64], stored) - exact).norm() / exact.norm()) < 0.05
    fp32 = row_linear(x[:64], weight, dtype=torch.float32)
    assert fp32.dtype == torch.float32 and ((fp32 - exact).norm() / exact.norm()) < 1e-4
