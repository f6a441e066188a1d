"""Matmuls whose rows have the same bits in every batch, in one dtype and in e4m3.

The oracles are torch, dequantized operands, fp64, and equal bits. A plain run tests the reference, TRITON_INTERPRET=1
tests the Triton kernel, and a GPU tests it compiled.
"""

import pytest
import torch
import torch.nn.functional as F

from thinksafe.kernels.batch_invariant_linear import TILES, batch_invariant_linear, choose_tile, fp8_linear
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import Fp8Tensor, dequantize, quantize

SHAPES = [(1, 64, 48), (33, 96, 100), (70, 40, 33)]


def fp8_linear_of(x, weight, bias=None):
    return fp8_linear(quantize(x), weight, bias, x.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_result_equals_torch_linear(fresh_seed, shape, with_bias):
    T, K, N = shape
    x, weight, bias = torch.randn(T, K), torch.randn(N, K), torch.randn(N) if with_bias else None
    torch.testing.assert_close(batch_invariant_linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies with numpy, whose bits vary")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 31, 32, 33, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_has_the_same_bits_in_every_batch(fresh_seed, num_rows, shape):
    _, K, N = shape
    x, weight = torch.randn(num_rows, K), torch.randn(N, K)
    weight_fp8 = quantize(weight)
    for linear in (lambda rows: batch_invariant_linear(rows, weight), lambda rows: fp8_linear_of(rows, weight_fp8)):
        out, order = linear(x), torch.randperm(num_rows)
        assert torch.equal(linear(x[order]), out[order])
        assert torch.equal(linear(x[-1:]), out[-1:])


def test_concatenated_weights_equal_separate_weights(fresh_seed):
    """Bits are equal only on a GPU, because a CPU's BLAS also picks its kernel by the number of columns."""
    x, weights, biases = torch.randn(33, 64), torch.randn(3, 32, 64), torch.randn(3, 32)
    for linear, prepare in ((batch_invariant_linear, lambda weight: weight), (fp8_linear_of, quantize)):
        separate_outputs = [linear(x, prepare(weight), bias) for weight, bias in zip(weights, biases, strict=True)]
        torch.testing.assert_close(
            linear(x, prepare(weights.flatten(0, 1)), biases.flatten()),
            torch.cat(separate_outputs, 1),
            rtol=1e-6,
            atol=1e-5,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_e4m3_result_equals_matmul_of_dequantized_operands(fresh_seed, shape, with_bias):
    T, K, N = shape
    x = torch.randn(T, K) * torch.logspace(-3, 3, T)[:, None]
    weight, bias = torch.randn(N, K) * torch.logspace(2, -2, N)[:, None], torch.randn(N) if with_bias else None
    weight_fp8 = quantize(weight)
    operands = (dequantize(*tensor, torch.float64) for tensor in (quantize(x), weight_fp8))
    expected = F.linear(*operands, bias.double() if with_bias else None)
    out = fp8_linear_of(x, weight_fp8, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if not INTERPRETED:  # the interpreter truncates where hardware rounds
        exact = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        typical_size = x.norm(dim=-1)[:, None] * weight.norm(dim=-1) / K**0.5  # typical for unrelated rows
        assert ((out - exact).abs() / typical_size).mean() < 0.06


def test_no_rows_give_no_rows():
    weight = torch.randn(8, 16)
    assert batch_invariant_linear(torch.zeros(0, 16), weight).shape == (0, 8)
    assert fp8_linear_of(torch.zeros(0, 16), quantize(weight)).shape == (0, 8)


def test_nan_stays_in_its_row():
    x, weight = torch.ones(3, 32), torch.ones(8, 32)
    x[1, 5] = torch.nan
    for out in (batch_invariant_linear(x, weight), *([] if INTERPRETED else [fp8_linear_of(x, quantize(weight))])):
        assert out[1].isnan().all() and torch.equal(out[[0, 2]], torch.full((2, 8), 32.0))


def test_invalid_operands_raise_errors():
    x, weight = torch.zeros(2, 16), torch.zeros(8, 16)
    for call, message in (
        (lambda: batch_invariant_linear(x, weight[:, :8]), "must be .T, K. and weight .N, K."),
        (lambda: batch_invariant_linear(x, weight.half()), "found torch.float16"),
        (lambda: batch_invariant_linear(x, torch.zeros(16, 8).T), "contiguous"),
        (lambda: fp8_linear_of(x, Fp8Tensor(weight, torch.zeros(8))), "weight must be torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_largest_tile_that_fills_all_sms_is_chosen():
    largest_tile, middle_tile, _, smallest_tile = TILES[2]
    assert choose_tile(8192, 4096, 2, 132) == choose_tile(1, 151_936, 2, 132) == largest_tile
    assert choose_tile(256, 12_288, 2, 132) == middle_tile and choose_tile(8192, 4096, 1, 132) == TILES[1][0]
    assert choose_tile(256, 1024, 2, 132) == smallest_tile


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(1024, 2048), (4096, 1024), (2048, 151_936)])
def test_every_tile_gives_the_same_row_bits_on_gpu(fresh_seed, monkeypatch, K, N):
    """Batches of 1, 64, 512 and 5,000 rows use every tile. Results are also close to fp64."""
    x, weight = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for rows in (5000, N))
    weight_fp8 = quantize(weight)
    for linear in (lambda rows: batch_invariant_linear(rows, weight), lambda rows: fp8_linear_of(rows, weight_fp8)):
        out = linear(x)
        for rows in (1, 64, 512):
            assert torch.equal(linear(x[:rows]), out[:rows])
        halves = [Fp8Tensor(*half) for half in zip(*(part.chunk(2) for part in weight_fp8), strict=True)]
    assert torch.equal(
        torch.cat([batch_invariant_linear(x[:64], half) for half in weight.chunk(2)], 1),
        batch_invariant_linear(x[:64], weight),
    )
    assert torch.equal(
        torch.cat([fp8_linear_of(x[:64], half) for half in halves], 1), fp8_linear_of(x[:64], weight_fp8)
    )
    exact = x[:64].double() @ weight.double().T
    assert ((batch_invariant_linear(x[:64], weight) - exact).norm() / exact.norm()) < 3e-3
    assert ((fp8_linear_of(x[:64], weight_fp8) - exact).norm() / exact.norm()) < 0.05
    fp32 = batch_invariant_linear(x[:64], weight, dtype=torch.float32)
    assert fp32.dtype == torch.float32 and ((fp32 - exact).norm() / exact.norm()) < 1e-4
