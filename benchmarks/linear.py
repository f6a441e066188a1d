"""A layer's matmuls: the batch-invariant ones of ThinkSafe against those of torch, in bf16 and in e4m3.

Shapes are those of the fused gate and up projections and of the down projection. `batch_invariant_linear` serves the
batch-invariant mode, and `fp8_linear` every model whose weights were quantized when they were loaded. In e4m3 torch
gets the same elements, with a scale per row and per column. Its fast accumulation uses 14 bits throughout; its plain
one and ThinkSafe's move the sum to fp32 at intervals.

As in a decode pass, a CUDA graph holds the calls, and each call reads a different weight, half a gigabyte of bf16 in
total. Inputs are quantized beforehand unless the variant's name says otherwise. Errors are against fp64 on 64 rows of
the bf16 operands, so they include the rounding error of e4m3.

For training, the suite measures a forward pass and the gradient of its input through `fp8_frozen_linear`, including
quantization.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    MATMUL_FLOP_PER_SECOND,
    Measurement,
    Row,
    Sections,
    as_cuda_graph,
    measure,
    relative_error,
    timing_columns,
)
from thinksafe.kernels.batch_invariant_linear import batch_invariant_linear, fp8_linear
from thinksafe.kernels.fp8 import e8m0_to_fp32, quantize
from thinksafe.kernels.fp8_frozen_linear import Fp8FrozenWeight, fp8_frozen_linear

CLAIM = "The same bits for a row in every batch, against matmuls without this guarantee."
_WEIGHT_BYTES, _ROUNDS, _REPEATS, _CHECKED_ROWS = 2**29, 5, 5, 64
_SHAPES = {"qwen3-0.6b": (1024, 3072), "qwen3-8b": (4096, 12_288)}
"""Model -> (hidden size, intermediate size)."""


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per model, with 8 rows (a decode pass) to 8,192 (prompts).

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    notes.append(f"medians of {_ROUNDS} graphs or, with a gradient, of {_ROUNDS} times {_REPEATS} calls")

    def measure_model(name: str) -> list[Row]:
        hidden, intermediate = _SHAPES[name]
        rows = []
        for K, N in ((hidden, 2 * intermediate), (intermediate, hidden)):
            weights = [_random(N, K) for _ in range(-(-_WEIGHT_BYTES // (2 * N * K)))]
            for T in (8, 64, 256, 1024, 8192):
                rows += measure_products(_random(T, K), weights, notes)
            rows += measure_products_with_gradient(_random(8192, K), weights[0], notes)
        return rows

    return {name: partial(measure_model, name) for name in ("qwen3-8b", "qwen3-0.6b")}


def _random(rows: int, K: int) -> Tensor:
    return torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)


@torch.no_grad()
def measure_products(x: Tensor, weights: list[Tensor], notes: list[str]) -> list[Row]:
    """Return time per matmul and error of x Wᵀ: one row per variant that did not fail.

    Args:
        x: [T, K].
        weights: weight matrices, [N, K] each; a timed call multiplies x with each of them once.
        notes: gets failures.
    """
    (T, K), N, dtype = x.shape, len(weights[0]), x.dtype
    x_fp8, weights_fp8 = quantize(x), [quantize(weight) for weight in weights]
    row_scales = e8m0_to_fp32(x_fp8.scales_e8m0)[:, None]
    column_scales = [e8m0_to_fp32(weight.scales_e8m0)[None] for weight in weights_fp8]

    def torch_in_e4m3(index: int, fast: bool) -> Tensor:
        operands = (x_fp8.values, weights_fp8[index].values.T, row_scales, column_scales[index])
        return torch._scaled_mm(*operands, out_dtype=dtype, use_fast_accum=fast)

    variants = {
        "ThinkSafe": lambda index: batch_invariant_linear(x, weights[index]),
        "torch": lambda index: F.linear(x, weights[index]),
        "ThinkSafe, e4m3": lambda index: fp8_linear(x_fp8, weights_fp8[index], None, dtype),
        "ThinkSafe, e4m3, quantising its input": lambda index: fp8_linear(quantize(x), weights_fp8[index], None, dtype),
        "torch, e4m3": partial(torch_in_e4m3, fast=False),
        "torch, e4m3, fast accumulation": partial(torch_in_e4m3, fast=True),
    }
    outputs: dict[str, Tensor] = {}

    def run_all_weights(name: str) -> Callable[[], None]:
        def call() -> None:
            for index in range(len(weights)):
                outputs[name] = variants[name](index)

        return call

    replays: dict[str, Callable[[], None]] = {}

    def capture(name: str) -> None:
        replays[name] = as_cuda_graph(run_all_weights(name))
        replays[name]()

    measurements = measure(
        {name: lambda name=name: replays[name]() for name in variants},
        _ROUNDS,
        notes,
        warm_up_calls={name: partial(capture, name) for name in variants},
    )
    exact = x[:_CHECKED_ROWS].double() @ weights[-1].double().T
    table = []
    for name, measurement in measurements.items():
        per_call = Measurement(measurement.seconds / len(weights), measurement.peak_bytes)
        row = {"what": "product", "T": T, "K": K, "N": N, "variant": name}
        row |= timing_columns(per_call, *_flop_bytes_rate(T, K, N, "e4m3" in name))
        table.append(row | {"error": relative_error(outputs[name][:_CHECKED_ROWS], exact)})
    return table


def _flop_bytes_rate(T: int, K: int, N: int, e4m3: bool) -> tuple[float, float, float]:
    """Return (FLOP, bytes, ceiling in FLOP/s) of one matmul [T, K] x [K, N] with a bf16 result.

    Args:
        e4m3: whether the operands are in e4m3, which has half the bytes of bf16 and twice its rate.
    """
    return 2 * T * N * K, (1 if e4m3 else 2) * (T + N) * K + 2 * T * N, (2 if e4m3 else 1) * MATMUL_FLOP_PER_SECOND


def measure_products_with_gradient(x: Tensor, weight: Tensor, notes: list[str]) -> list[Row]:
    """Return time and error of x Wᵀ and the gradient of x, with W frozen: one row per variant that did not fail.

    Args:
        x: [T, K].
        weight: [N, K].
        notes: gets failures.
    """
    (T, K), N = x.shape, len(weight)
    x.requires_grad_()
    frozen_weight = Fp8FrozenWeight.from_fp8(quantize(weight))
    grad_output = torch.randn(T, N, device=x.device).to(x.dtype)
    variants = {
        "ThinkSafe, e4m3": lambda: fp8_frozen_linear(x, [frozen_weight], [None])[0],
        "torch": lambda: F.linear(x, weight),
    }
    gradients: dict[str, Tensor] = {}

    def run_repeatedly(name: str) -> Callable[[], None]:
        def call() -> None:
            for _ in range(_REPEATS):
                (gradients[name],) = torch.autograd.grad(variants[name](), x, grad_output)

        return call

    measurements = measure({name: run_repeatedly(name) for name in variants}, _ROUNDS, notes)
    exact = grad_output[:_CHECKED_ROWS].double() @ weight.double()
    table = []
    for name, measurement in measurements.items():
        per_call = Measurement(measurement.seconds / _REPEATS, measurement.peak_bytes)
        flop, num_bytes, rate = _flop_bytes_rate(T, K, N, "e4m3" in name)
        row = {"what": "product and gradient", "T": T, "K": K, "N": N, "variant": name}
        row |= timing_columns(per_call, 2 * flop, 2 * num_bytes, rate)
        table.append(row | {"error": relative_error(gradients[name][:_CHECKED_ROWS], exact)})
    return table
