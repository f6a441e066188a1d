"""The operations between matrix products, bound by memory: normalisation, rotation, gate.

Bytes are counted as each tensor read or written once, in bf16. Backward is timed alone, by several calls between two
waits for the device; a call moves far more than the L2 holds. Errors are against fp64 on the first 64 tokens, the
largest of a call's outputs or of its gradients of what has tokens (that of a gain sums over all of them).
"""

from functools import partial

import torch

from benchmarks.harness import Measured, Row, Sections, figures, measure, peer, relative_error
from thinksafe.kernels import rms_norm, rope, swiglu

CLAIM = "One pass over memory each."
_TOKENS = 131_072
_REPEATS, _ROUNDS = 5, 10
_CHECKED_TOKENS = 64


def sections(notes: list[str]) -> Sections:
    """Every operation at three hidden sizes, forward and backward."""
    notes.append(f"T = {_TOKENS:,}, bf16, medians of {_ROUNDS} times {_REPEATS} calls")
    liger = peer("liger_kernel.transformers.functional", notes)

    def case(hidden: int, heads: int) -> list[Row]:
        found = []
        for operation, of_it in cases(hidden, heads, liger).items():
            found += at(operation, hidden, *of_it, notes)
        return found

    return {f"H {hidden:,}": partial(case, hidden, heads) for hidden, heads in ((2048, 16), (4096, 32), (1024, 16))}


def cases(hidden: int, heads: int, liger, tokens: int = _TOKENS, device: str = "cuda") -> dict[str, tuple]:
    """operation -> (variants, plain torch in fp64 of the first tokens, tensors with a gradient, bytes moved forward,
    bytes moved backward). A variant takes the tensors with a gradient."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, residual, gain = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    gate, up = leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)
    q, k = leaf(tokens, heads, 128), leaf(tokens, 8, 128)
    q_gain, k_gain = leaf(128), leaf(128)
    angle = torch.randn(tokens, 64, device=device)
    cos, sin = angle.cos(), angle.sin()

    def plain(x, gain):
        return rms_norm.reference(x, gain, 1e-6)

    def add_norm(x, residual, gain):
        total = x + residual
        return rms_norm.reference(total, gain, 1e-6), total

    def rotate(q, k):
        angles = cos[: len(q)], sin[: len(q)]
        return rope.reference(q, None, 0.0, *angles), rope.reference(k, None, 0.0, *angles)

    def norm_rotate(q, k, q_gain, k_gain):
        angles = cos[: len(q)], sin[: len(q)]
        return rope.reference(q, q_gain, 1e-6, *angles), rope.reference(k, k_gain, 1e-6, *angles)

    ours = {
        "rms_norm": (lambda x, gain: rms_norm.rms_norm(x, gain, 1e-6), plain, (x, gain), 2, 3),
        "add_rms_norm": (lambda *a: rms_norm.add_rms_norm(*a, 1e-6), add_norm, (x, residual, gain), 4, 4),
        "rope": (lambda q, k: (rope.rope(q, cos, sin), rope.rope(k, cos, sin)), rotate, (q, k), 2, 2),
        "qk_norm_rope": (
            lambda *a: rope.qk_norm_rope(*a, 1e-6, cos, sin), norm_rotate, (q, k, q_gain, k_gain), 2, 3,
        ),
        "swiglu": (swiglu.swiglu, swiglu.reference, (gate, up), 3, 5),
    }  # fmt: skip
    theirs = {}
    if liger:
        wide = [torch.cat((part, part), -1)[None] for part in (cos, sin)]

        def liger_rope(q, k):
            # It rotates in place, so it gets tensors that autograd does not own, of the layout it is made for.
            rotated = liger.liger_rope(q.clone().transpose(0, 1)[None], k.clone().transpose(0, 1)[None], *wide)
            return tuple(part[0].transpose(0, 1) for part in rotated)

        theirs = {
            "rms_norm": lambda x, gain: liger.liger_rms_norm(x, gain, 1e-6, in_place=False),
            "add_rms_norm": lambda *a: liger.liger_fused_add_rms_norm(*a, 1e-6, in_place=False),
            "rope": liger_rope,
            "swiglu": liger.liger_swiglu,
        }
    found = {}
    for name, (kernel, reference, leaves, forward, backward) in ours.items():
        # Tensors of the full size: all that are rotated, else one of those that are alike.
        moved = (q.numel() + k.numel() if "rope" in name else leaves[0].numel()) * 2
        tables = 2 * cos.nbytes if "rope" in name else 0
        variants = {"ThinkSafe": kernel, "torch": reference, "torch.compile": torch.compile(reference, dynamic=False)}
        if name in theirs:
            variants["Liger-Kernel, and a copy" if name == "rope" else "Liger-Kernel"] = theirs[name]
        found[name] = variants, reference, leaves, forward * moved + tables, backward * moved + tables
    return found


def at(operation, hidden, variants, reference, leaves, forward_bytes, backward_bytes, notes) -> list[Row]:
    """One row a variant and direction."""

    def outputs(function, inputs) -> tuple[torch.Tensor, ...]:
        found = function(*inputs)
        return found if isinstance(found, tuple) else (found,)

    tokens = len(leaves[0])
    exact_leaves = [_first(leaf, tokens).detach().double().requires_grad_() for leaf in leaves]
    exact = outputs(reference, exact_leaves)
    upstream = [torch.randn(tokens, *out.shape[1:], device=out.device, dtype=leaves[0].dtype) for out in exact]
    gradients = torch.autograd.grad(exact, exact_leaves, [part[: len(exact[0])].double() for part in upstream])
    wanted = {"forward": exact, "backward": gradients}
    graphs, found = {}, {}

    def forward(name):
        def work() -> None:
            found[name] = outputs(variants[name], leaves)

        return work

    def backward(name):
        def work() -> None:
            if name not in graphs:
                graphs[name] = outputs(variants[name], leaves)
            found[name] = torch.autograd.grad(graphs[name], leaves, upstream, retain_graph=True)

        return work

    rows = []
    for direction, make, num_bytes in (("forward", forward, forward_bytes), ("backward", backward, backward_bytes)):
        for name, taken in measure({name: _repeat(make(name)) for name in variants}, _ROUNDS, notes).items():
            pairs = zip(found[name], wanted[direction], strict=True)
            errors = [relative_error(_first(ours, tokens), exact) for ours, exact in pairs if len(ours) == tokens]
            once = Measured(taken.seconds / _REPEATS, taken.peak_bytes)
            row = {"operation": operation, "H": hidden, "direction": direction, "variant": name}
            rows.append(row | figures(once, 0, num_bytes) | {"error": max(errors)})
        found.clear(), graphs.clear()
    return rows


def _first(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """The checked tokens of it; all of a gain."""
    return tensor[:_CHECKED_TOKENS] if len(tensor) == tokens else tensor


def _repeat(work):
    def several() -> None:
        for _ in range(_REPEATS):
            work()

    return several
