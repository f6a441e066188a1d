"""A layer's products: ours, whose rows know nothing of each other, against torch's, in bf16 and in e4m3.

Shapes are those of gate and up in one and of down. `row_linear` multiplies in the batch-invariant mode and, in e4m3,
wherever weights were quantised when they were loaded. torch's product of numbers in e4m3 gets the same ones, with a
scale a row and a column; its fast accumulation adds up with 14 bits throughout, where its plain one and ours go on in
fp32 every so often. As in a decode pass, a CUDA graph holds the calls, each reads weights of its own, half a gigabyte
in all in bf16, and inputs are quantised before, unless the row says otherwise. Errors are against fp64, on 64 rows of
what was given in bf16: what e4m3 rounds counts.

In training it is a forward pass and the gradient of its input through `frozen_linear`, quantising included.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import RATE, Measured, Row, Sections, figures, measure, recorded, relative_error
from thinksafe.kernels.fp8 import quantise, scales
from thinksafe.kernels.frozen_linear import FrozenWeight, frozen_linear
from thinksafe.kernels.row_linear import fp8_linear, row_linear

CLAIM = "The same bits in every batch, beside products that promise nothing."
_BYTES, _ROUNDS, _REPEATS, _CHECKED_ROWS = 2**29, 5, 5, 64
_SHAPES = {"qwen3-0.6b": (1024, 3072), "qwen3-8b": (4096, 12_288)}
"""Hidden and intermediate size."""


def sections(notes: list[str]) -> Sections:
    """From a decode pass over 8 rows to prompts of 8,192 tokens."""
    notes.append(f"medians of {_ROUNDS} graphs or, with a gradient, of {_ROUNDS} times {_REPEATS} calls")

    def case(name: str) -> list[Row]:
        hidden, intermediate = _SHAPES[name]
        found = []
        for K, N in ((hidden, 2 * intermediate), (intermediate, hidden)):
            weights = [_random(N, K) for _ in range(-(-_BYTES // (2 * N * K)))]
            for T in (8, 64, 256, 1024, 8192):
                found += products(_random(T, K), weights, notes)
            found += with_gradient(_random(8192, K), weights[0], notes)
        return found

    return {name: partial(case, name) for name in ("qwen3-8b", "qwen3-0.6b")}


def _random(rows: int, K: int) -> Tensor:
    return torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)


@torch.no_grad()
def products(x: Tensor, weights: list[Tensor], notes: list[str]) -> list[Row]:
    """x Wᵀ for each W, a row a variant."""
    (T, K), N, dtype = x.shape, len(weights[0]), x.dtype
    rows, stored = quantise(x), [quantise(weight) for weight in weights]
    row_scales, column_scales = scales(rows.exponents)[:, None], [scales(each.exponents)[None] for each in stored]

    def torch_in_e4m3(place: int, fast: bool) -> Tensor:
        operands = (rows.values, stored[place].values.T, row_scales, column_scales[place])
        return torch._scaled_mm(*operands, out_dtype=dtype, use_fast_accum=fast)

    variants = {
        "ThinkSafe": lambda place: row_linear(x, weights[place]),
        "torch": lambda place: F.linear(x, weights[place]),
        "ThinkSafe, e4m3": lambda place: fp8_linear(rows, stored[place], None, dtype),
        "ThinkSafe, e4m3, quantising its input": lambda place: fp8_linear(quantise(x), stored[place], None, dtype),
        "torch, e4m3": partial(torch_in_e4m3, fast=False),
        "torch, e4m3, fast accumulation": partial(torch_in_e4m3, fast=True),
    }
    found: dict[str, Tensor] = {}

    def all_of(name: str) -> Callable[[], None]:
        def work() -> None:
            for place in range(len(weights)):
                found[name] = variants[name](place)

        return work

    graphs: dict[str, Callable[[], None]] = {}

    def record(name: str) -> None:
        graphs[name] = recorded(all_of(name))
        graphs[name]()

    measured = measure(
        {name: lambda name=name: graphs[name]() for name in variants},
        _ROUNDS,
        notes,
        first={name: partial(record, name) for name in variants},
    )
    exact = x[:_CHECKED_ROWS].double() @ weights[-1].double().T
    table = []
    for name, taken in measured.items():
        once = Measured(taken.seconds / len(weights), taken.peak_bytes)
        row = {"what": "product", "T": T, "K": K, "N": N, "variant": name}
        row |= figures(once, *_work(T, K, N, "e4m3" in name))
        table.append(row | {"error": relative_error(found[name][:_CHECKED_ROWS], exact)})
    return table


def _work(T: int, K: int, N: int, e4m3: bool) -> tuple[float, float, float]:
    """FLOP, bytes, and FLOP/s where they are the limit: e4m3 is half of bf16's bytes and multiplied in half the time;
    the result is bf16."""
    return 2 * T * N * K, (1 if e4m3 else 2) * (T + N) * K + 2 * T * N, (2 if e4m3 else 1) * RATE


def with_gradient(x: Tensor, weight: Tensor, notes: list[str]) -> list[Row]:
    """x Wᵀ and the gradient of x, W frozen; a row a variant."""
    (T, K), N = x.shape, len(weight)
    x.requires_grad_()
    frozen, upstream = FrozenWeight.of(quantise(weight)), torch.randn(T, N, device=x.device).to(x.dtype)
    variants = {
        "ThinkSafe, e4m3": lambda: frozen_linear(x, [frozen], [None])[0],
        "torch": lambda: F.linear(x, weight),
    }
    found: dict[str, Tensor] = {}

    def several(name: str) -> Callable[[], None]:
        def work() -> None:
            for _ in range(_REPEATS):
                (found[name],) = torch.autograd.grad(variants[name](), x, upstream)

        return work

    measured = measure({name: several(name) for name in variants}, _ROUNDS, notes)
    exact = upstream[:_CHECKED_ROWS].double() @ weight.double()
    table = []
    for name, taken in measured.items():
        once = Measured(taken.seconds / _REPEATS, taken.peak_bytes)
        flop, num_bytes, rate = _work(T, K, N, "e4m3" in name)
        row = {"what": "product and gradient", "T": T, "K": K, "N": N, "variant": name}
        row |= figures(once, 2 * flop, 2 * num_bytes, rate)
        table.append(row | {"error": relative_error(found[name][:_CHECKED_ROWS], exact)})
    return table
