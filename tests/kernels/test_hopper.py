"""Products, losses, norms, rotations and gates in bf16 and e4m3, as they are compiled for a Hopper GPU, on a CPU.

ptx_on_cpu.py runs them, with the copy engine and the tensor cores. The same file runs under the oldest supported
Triton, put first on PYTHONPATH.
"""

import pytest

pytest.importorskip("triton")

import torch

from tests.emulation.ptx_on_cpu import PROCESSORS, on_hopper
from tests.support.kernel_calls import CALLS
from tests.support.paged import relative
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantise, quantise
from thinksafe.kernels.fp8 import reference as quantise_reference
from thinksafe.kernels.row_linear import TILES, fp8_linear, row_linear, tiles_of

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

SHAPES = [(1, 64, 48), (33, 96, 100), (70, 200, 33), (100, 64, 200), (130, 256, 300)]
"""T, K, N: every tile of row_linear has its turn, with ragged ends on all sides."""


def test_the_shapes_below_use_every_tile():
    for itemsize in (1, 2):
        used = {tiles_of(T, N, itemsize, PROCESSORS) for T, _, N in SHAPES}
        assert used == set(TILES[itemsize])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_in_bf16_equals_fp64(fresh_seed, shape):
    T, K, N = shape
    x, weight, bias = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    exact = x.double() @ weight.double().T
    with on_hopper():
        out, in_fp32 = row_linear(x, weight, bias), row_linear(x, weight, dtype=torch.float32)
    assert relative(out, exact + bias.double()) < 3e-3
    assert relative(in_fp32, exact) < 1e-6


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0])
def test_a_product_in_e4m3_equals_fp64(fresh_seed, shape):
    """Operands as the GPU rounds them, which is as plain torch does."""
    T, K, N = shape
    x, weight = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16()
    x *= torch.logspace(-3, 3, T).bfloat16()[:, None]
    with on_hopper():
        operands = quantise(x), quantise(weight)
        out = fp8_linear(*operands, None, torch.float32)
    for found, wanted in zip(operands, map(quantise_reference, (x, weight)), strict=True):
        assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
        assert torch.equal(found.exponents, wanted.exponents)
    x, weight = (dequantise(*operand, torch.float64) for operand in operands)
    assert relative(out, x @ weight.T) < 1e-6


def test_columns_scaled_before_they_are_rounded_are_those_of_plain_torch(fresh_seed):
    """As the gradients of a frozen layer are."""
    x, columns = torch.randn(9, 96).bfloat16(), torch.randint(100, 150, (96,), dtype=torch.uint8)
    with on_hopper():
        found = quantise(x, columns)
    wanted = quantise_reference(x, columns)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(found.exponents, wanted.exponents)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_operation_and_its_gradient_are_those_of_plain_torch_in_fp32(fresh_seed, name, trainable):
    T, H, V = 21, 128, 300
    x, weight = torch.randn(T, H).bfloat16(), torch.randn(V, H).bfloat16()
    target = torch.randint(V, (T,)).masked_fill(torch.arange(T) % 3 == 0, -100)
    if "KL" in name or name == "JSD":
        x = (x * 6).round().clamp(-20, 20) * 10 / 64  # 1.1 times that is no other number in bf16 than in fp32
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    theirs = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in mine]
    with on_hopper():
        out = CALLS[name](*mine, target)
        found = _gradients(out, mine)
    expected = CALLS[name](*theirs, target)
    for actual, wanted in zip((out, *found), (expected, *_gradients(expected, theirs)), strict=True):
        assert relative(actual, wanted.double()) < 6e-3


def _gradients(out, leaves) -> list:
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not out.requires_grad:
        return []
    found = torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]
