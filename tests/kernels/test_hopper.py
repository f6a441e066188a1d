"""Matmuls, losses, norms, rotations and gates as compiled for Hopper, in bf16 and e4m3, against fp64 and plain torch.

ptx_on_cpu.py runs the compiled code on a CPU and emulates TMA and the tensor cores. The file also runs under the oldest
supported Triton, which is then first on PYTHONPATH.
"""

import pytest

pytest.importorskip("triton")

import torch

from tests.emulation.ptx_on_cpu import NUM_SMS, on_hopper
from tests.support.kernel_calls import CALLS
from tests.support.paged import relative_error
from thinksafe.kernels.batch_invariant_linear import TILES, batch_invariant_linear, choose_tile, fp8_linear
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import dequantize, quantize
from thinksafe.kernels.fp8 import reference as quantize_reference

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

pytestmark = pytest.mark.slow  # each test compiles kernels

SHAPES = [(1, 64, 48), (33, 96, 100), (70, 200, 33), (100, 64, 200), (130, 256, 300)]
"""T, K, N: together they use every tile of batch_invariant_linear, with partial tiles on all sides."""


def test_shapes_use_every_tile():
    for itemsize in (1, 2):
        used_tiles = {choose_tile(T, N, itemsize, NUM_SMS) for T, _, N in SHAPES}
        assert used_tiles == set(TILES[itemsize])


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_matmul_equals_fp64(fresh_seed, shape):
    T, K, N = shape
    x, weight, bias = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    exact = x.double() @ weight.double().T
    with on_hopper():
        out, in_fp32 = batch_invariant_linear(x, weight, bias), batch_invariant_linear(x, weight, dtype=torch.float32)
    assert relative_error(out, exact + bias.double()) < 3e-3
    assert relative_error(in_fp32, exact) < 1e-6


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0])
def test_e4m3_matmul_equals_fp64(fresh_seed, shape):
    """The compiled code quantizes the operands to the same bits as plain torch."""
    T, K, N = shape
    x, weight = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16()
    x *= torch.logspace(-3, 3, T).bfloat16()[:, None]
    with on_hopper():
        operands = quantize(x), quantize(weight)
        out = fp8_linear(*operands, None, torch.float32)
    for actual, expected in zip(operands, map(quantize_reference, (x, weight)), strict=True):
        assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
        assert torch.equal(actual.scales_e8m0, expected.scales_e8m0)
    x, weight = (dequantize(*operand, torch.float64) for operand in operands)
    assert relative_error(out, x @ weight.T) < 1e-6


def test_quantization_with_column_scales_equals_plain_torch(fresh_seed):
    """The backward pass of a frozen layer quantizes its gradient in this way."""
    x, column_scales = torch.randn(9, 96).bfloat16(), torch.randint(100, 150, (96,), dtype=torch.uint8)
    with on_hopper():
        actual = quantize(x, column_scales)
    expected = quantize_reference(x, column_scales)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(actual.scales_e8m0, expected.scales_e8m0)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_operations_and_gradients_equal_plain_torch_in_fp32(fresh_seed, name, trainable):
    T, H, V = 21, 128, 300
    x, weight = torch.randn(T, H).bfloat16(), torch.randn(V, H).bfloat16()
    target = torch.randint(V, (T,))
    if "KL" in name:
        x = (x * 6).round().clamp(-20, 20) * 10 / 64  # so that 1.1 * x is the same number in bf16 and fp32
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
    reference_leaves = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in leaves]
    with on_hopper():
        out = CALLS[name](*leaves, target)
        gradients = _gradients(out, leaves)
    expected = CALLS[name](*reference_leaves, target)
    for actual, expected_tensor in zip(
        (out, *gradients), (expected, *_gradients(expected, reference_leaves)), strict=True
    ):
        assert relative_error(actual, expected_tensor.double()) < 6e-3


def _gradients(out, leaves) -> list:
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not out.requires_grad:
        return []
    gradients = torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]
