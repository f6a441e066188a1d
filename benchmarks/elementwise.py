"""The memory-bound operations between matmuls: normalization, rotation, gate.

The floor counts each tensor as read or written once, in bf16. Backward is timed without forward. Several calls run
between two waits for the device; a call moves far more bytes than the L2 holds. The error is against fp64 on the first
64 tokens: the largest one of a call's outputs or gradients. It leaves out the gradient of a gain, which sums over all
tokens.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Measurement, Row, Sections, import_peer, measure, relative_error, timing_columns
from thinksafe.kernels import rms_norm, rope, swiglu

CLAIM = "Each operation is one pass over memory."
_TOKENS, _CHECKED_TOKENS = 131_072, 64
_REPEATS, _ROUNDS = 5, 10


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per hidden size, with every operation forward and backward.

    `notes` gets facts that a reader of the figures needs, and failures while a section is measured."""
    notes.append(f"T = {_TOKENS:,}, bf16, medians of {_ROUNDS} times {_REPEATS} calls")
    liger = import_peer("liger_kernel.transformers.functional", notes)

    def measure_hidden_size(hidden: int, heads: int) -> list[Row]:
        rows = []
        for operation, operation_case in cases(hidden, heads, liger).items():
            rows += measure_case(operation, hidden, *operation_case, notes)
        return rows

    sizes = ((2048, 16), (4096, 32), (1024, 16))
    return {f"H {hidden:,}": partial(measure_hidden_size, hidden, heads) for hidden, heads in sizes}


def cases(hidden: int, heads: int, liger, tokens: int = _TOKENS, device: str = "cuda") -> dict[str, tuple]:
    """Return operation -> (variants, reference in plain torch, tensors with a gradient, bytes moved by forward, bytes
    moved by backward).

    Variants are name -> function. A variant and the reference take the tensors with a gradient; the reference also
    accepts only their first tokens.

    Args:
        hidden: hidden size; the intermediate size is three times as large.
        heads: query heads of 128 elements; there are 8 KV heads.
        liger: module of Liger-Kernel, or None to leave it out.
        tokens: tokens of every tensor except the gains.
    """

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, residual, gain = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    gate, up = leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)
    q, k = leaf(tokens, heads, 128), leaf(tokens, 8, 128)
    q_gain, k_gain = leaf(128), leaf(128)
    angle = torch.randn(tokens, 64, device=device)
    cos, sin = angle.cos(), angle.sin()
    doubled_tables = [torch.cat((table, table), -1)[None] for table in (cos, sin)] if liger else []

    def norm_reference(x, gain):
        return rms_norm.reference(x, gain, 1e-6)

    def add_norm_reference(x, residual, gain):
        total = x + residual
        return norm_reference(total, gain), total

    def rope_reference(q, k, q_gain=None, k_gain=None):
        angles = cos[: len(q)], sin[: len(q)]
        return rope.reference(q, q_gain, 1e-6, *angles), rope.reference(k, k_gain, 1e-6, *angles)

    def liger_rope(q, k):
        # Liger-Kernel rotates in place, so it gets a copy in the layout that it expects.
        copies = (x.clone().transpose(0, 1)[None] for x in (q, k))
        rotated = liger.liger_rope(*copies, *doubled_tables)
        return tuple(tensor[0].transpose(0, 1) for tensor in rotated)

    # Operation -> kernel, reference, tensors with a gradient, and how many tensors forward and backward move.
    kernels = {
        "rms_norm": (lambda x, gain: rms_norm.rms_norm(x, gain, 1e-6), norm_reference, (x, gain), 2, 3),
        "add_rms_norm": (lambda *a: rms_norm.add_rms_norm(*a, 1e-6), add_norm_reference, (x, residual, gain), 4, 4),
        "rope": (lambda q, k: (rope.rope(q, cos, sin), rope.rope(k, cos, sin)), rope_reference, (q, k), 2, 2),
        "qk_norm_rope": (
            lambda *a: rope.qk_norm_rope(*a, 1e-6, cos, sin), rope_reference, (q, k, q_gain, k_gain), 2, 3,
        ),
        "swiglu": (swiglu.swiglu, swiglu.reference, (gate, up), 3, 5),
    }  # fmt: skip
    liger_kernels = {
        "rms_norm": ("Liger-Kernel", lambda x, gain: liger.liger_rms_norm(x, gain, 1e-6, in_place=False)),
        "add_rms_norm": ("Liger-Kernel", lambda *a: liger.liger_fused_add_rms_norm(*a, 1e-6, in_place=False)),
        "rope": ("Liger-Kernel, and a copy", liger_rope),
        "swiglu": ("Liger-Kernel", lambda *a: liger.liger_swiglu(*a)),
    }
    cases_by_operation = {}
    for name, (kernel, reference, leaves, *moved_tensors) in kernels.items():
        # Bytes of one full-size tensor; for a rotation, q and k together.
        tensor_bytes = q.nbytes + k.nbytes if "rope" in name else leaves[0].nbytes
        table_bytes = 2 * cos.nbytes if "rope" in name else 0
        variants = {"ThinkSafe": kernel, "torch": reference, "torch.compile": torch.compile(reference, dynamic=False)}
        if liger and name in liger_kernels:
            variants |= dict([liger_kernels[name]])
        moved_bytes = (count * tensor_bytes + table_bytes for count in moved_tensors)
        cases_by_operation[name] = (variants, reference, leaves, *moved_bytes)
    return cases_by_operation


def measure_case(operation, hidden, variants, reference, leaves, forward_bytes, backward_bytes, notes) -> list[Row]:
    """Return time and error of one operation: one row per direction and variant that did not fail.

    `operation` and `hidden` are columns of the rows, `notes` gets failures, the other arguments are a value of `cases`.
    """

    def outputs(function, inputs) -> tuple[Tensor, ...]:
        result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    tokens = len(leaves[0])
    exact_leaves = [_checked_tokens(leaf, tokens).detach().double().requires_grad_() for leaf in leaves]
    exact_outputs = outputs(reference, exact_leaves)
    grad_outputs = [leaves[0].new_empty(tokens, *out.shape[1:]).normal_() for out in exact_outputs]
    exact_grad_outputs = [grad_output[: len(exact_outputs[0])].double() for grad_output in grad_outputs]
    exact_gradients = torch.autograd.grad(exact_outputs, exact_leaves, exact_grad_outputs)
    forward_outputs, results = {}, {}

    def forward(name: str) -> None:
        results[name] = outputs(variants[name], leaves)

    def backward(name: str) -> None:
        if name not in forward_outputs:
            forward_outputs[name] = outputs(variants[name], leaves)
        results[name] = torch.autograd.grad(forward_outputs[name], leaves, grad_outputs, retain_graph=True)

    rows = []
    for call, num_bytes, exact in (
        (forward, forward_bytes, exact_outputs), (backward, backward_bytes, exact_gradients)
    ):  # fmt: skip
        repeated_calls = {name: partial(_repeat, partial(call, name)) for name in variants}
        for name, measurement in measure(repeated_calls, _ROUNDS, notes).items():
            errors = [
                relative_error(_checked_tokens(actual, tokens), expected)
                for actual, expected in zip(results[name], exact, strict=True)
                if len(actual) == tokens
            ]
            per_call = Measurement(measurement.seconds / _REPEATS, measurement.peak_bytes)
            row = {"operation": operation, "H": hidden, "direction": call.__name__, "variant": name}
            rows.append(row | timing_columns(per_call, 0, num_bytes) | {"error": max(errors)})
        results.clear(), forward_outputs.clear()
    return rows


def _checked_tokens(tensor: Tensor, tokens: int) -> Tensor:
    """Return the first _CHECKED_TOKENS tokens of a tensor of `tokens` tokens; any other tensor, a gain, unchanged."""
    return tensor[:_CHECKED_TOKENS] if len(tensor) == tokens else tensor


def _repeat(call) -> None:
    for _ in range(_REPEATS):
        call()
