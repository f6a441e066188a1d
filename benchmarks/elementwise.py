"""The operations between matrix products, bound by memory: normalisation, rotation, gate.

Bytes are counted as each tensor read or written once, in bf16; 4.3 TB/s is what a large copy reaches on an H200. A call
moves far more than the L2 holds, so nothing is left over from the call before. Backward is timed alone.
"""

import torch

from benchmarks.harness import Result, measure, peer, progress
from thinksafe.kernels import rms_norm, rope, swiglu

_BANDWIDTH = 4.3e12
_TOKENS = 131_072
_REPEATS = 5
"""Calls in a row between two waits for the device, so that waiting is no part of a time."""


def run() -> Result:
    """Every operation at three hidden sizes, forward and backward."""
    if not torch.cuda.is_available():
        return Result("elementwise", "Needs a GPU: on a CPU both sides run plain torch, so nothing was measured.", [])
    rows, notes = [], [f"T = {_TOKENS:,}, bf16, medians of 10 times {_REPEATS} calls"]
    liger = peer("liger_kernel.transformers.functional", notes)
    for hidden, heads in ((1024, 16), (2048, 16), (4096, 32)):
        progress(f"elementwise: H {hidden}")
        for operation, (variants, leaves, forward_tensors, backward_tensors) in _cases(hidden, heads, liger).items():
            rows += _time(operation, hidden, variants, leaves, forward_tensors, backward_tensors, notes)
    return Result("elementwise", "One pass over memory each.", rows, notes)


def _cases(hidden: int, heads: int, liger, tokens: int = _TOKENS, device: str = "cuda") -> dict[str, tuple]:
    """operation -> (variants, tensors with a gradient, bytes moved forward, bytes moved backward)."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, residual, gain = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    gate, up = leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)
    q, k = leaf(tokens, heads, 128), leaf(tokens, 8, 128)
    q_gain, k_gain = leaf(128), leaf(128)
    angle = torch.randn(tokens, 64, device=device)
    cos, sin = angle.cos(), angle.sin()

    def add_norm(x, residual, gain):
        total = x + residual
        return rms_norm.reference(total, gain, 1e-6), total

    def rotate(q, k):
        return rope.reference(q, None, 0.0, cos, sin), rope.reference(k, None, 0.0, cos, sin)

    def norm_rotate(q, k, q_gain, k_gain):
        return rope.reference(q, q_gain, 1e-6, cos, sin), rope.reference(k, k_gain, 1e-6, cos, sin)

    def plain(x, gain):
        return rms_norm.reference(x, gain, 1e-6)

    ours = {
        "rms_norm": (lambda: rms_norm.rms_norm(x, gain, 1e-6), plain, (x, gain), 2, 3),
        "add_rms_norm": (lambda: rms_norm.add_rms_norm(x, residual, gain, 1e-6), add_norm, (x, residual, gain), 4, 4),
        "rope": (lambda: (rope.rope(q, cos, sin), rope.rope(k, cos, sin)), rotate, (q, k), 2, 2),
        "qk_norm_rope": (
            lambda: rope.qk_norm_rope(q, k, q_gain, k_gain, 1e-6, cos, sin), norm_rotate, (q, k, q_gain, k_gain), 2, 3,
        ),
        "swiglu": (lambda: swiglu.swiglu(gate, up), swiglu.reference, (gate, up), 3, 5),
    }  # fmt: skip
    theirs = {}
    if liger:
        wide = [torch.cat((part, part), -1)[None] for part in (cos, sin)]
        theirs = {
            "rms_norm": lambda: liger.liger_rms_norm(x, gain, 1e-6, in_place=False),
            "add_rms_norm": lambda: liger.liger_fused_add_rms_norm(x, residual, gain, 1e-6, in_place=False),
            # It rotates in place, so it gets tensors that autograd does not own, of the layout it is made for.
            "rope": lambda: liger.liger_rope(
                q.clone().transpose(0, 1)[None], k.clone().transpose(0, 1)[None], *wide
            ),
            "swiglu": lambda: liger.liger_swiglu(gate, up),
        }  # fmt: skip
    cases = {}
    for name, (kernel, reference, leaves, forward, backward) in ours.items():
        # Tensors of the full size: all that are rotated, else one of those that are alike.
        moved = (q.numel() + k.numel() if "rope" in name else leaves[0].numel()) * 2
        tables = 2 * cos.nbytes if "rope" in name else 0
        compiled = torch.compile(reference)
        variants = {"ThinkSafe": kernel, "torch": lambda r=reference, a=leaves: r(*a)}
        variants["torch.compile"] = lambda r=compiled, a=leaves: r(*a)
        if name in theirs:
            variants["Liger-Kernel, and a copy" if name == "rope" else "Liger-Kernel"] = theirs[name]
        cases[name] = (variants, leaves, forward * moved + tables, backward * moved + tables)
    return cases


def _repeat(work):
    def several() -> None:
        for _ in range(_REPEATS):
            work()

    return several


def _time(operation, hidden, variants, leaves, forward_bytes, backward_bytes, notes) -> list[dict]:
    rows = []
    graphs = {}

    def backward(name):
        def work() -> None:
            if name not in graphs:
                outputs = variants[name]()
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                graphs[name] = outputs, [torch.randn_like(output) for output in outputs]
            outputs, upstream = graphs[name]
            torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

        return work

    for direction, works, moved in (
        ("forward", variants, forward_bytes),
        ("backward", {name: backward(name) for name in variants}, backward_bytes),
    ):
        repeated = {name: _repeat(work) for name, work in works.items()}
        for name, found in measure(repeated, 10, notes).items():
            seconds = found.seconds / _REPEATS
            row = {"operation": operation, "H": hidden, "direction": direction, "variant": name}
            row |= {"us": 1e6 * seconds, "floor us": 1e6 * moved / _BANDWIDTH, "TB/s": moved / seconds / 1e12}
            rows.append(row | {"share of 4.3 TB/s": moved / seconds / _BANDWIDTH})
    return rows
