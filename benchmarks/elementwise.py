"""The memory-bound operations between matmuls: normalization, rotation, gate.

The floor counts each tensor as read or written once, in bf16. Backward is timed without forward. Several calls run
between two waits for the device; a call moves far more bytes than the L2 holds. The error is against fp64 on the first
64 tokens: the largest one of a call's outputs or gradients. It leaves out the gradient of a gain, which sums over all
tokens.
"""

from functools import partial

import torch

from benchmarks.harness import Measurement, Row, Sections, import_peer, measure, relative_error, timing_columns
from thinksafe.kernels import rms_norm, rope, swiglu

CLAIM = "Each operation is one pass over memory."
_TOKENS = 131_072
_REPEATS, _ROUNDS = 5, 10
_CHECKED_TOKENS = 64


def sections(notes: list[str]) -> Sections:
    """Return the suite's sections, one per hidden size, with every operation forward and backward.

    Args:
        notes: gets facts that a reader of the figures needs, and failures while a section is measured.
    """
    notes.append(f"T = {_TOKENS:,}, bf16, medians of {_ROUNDS} times {_REPEATS} calls")
    liger = import_peer("liger_kernel.transformers.functional", notes)

    def measure_hidden_size(hidden: int, heads: int) -> list[Row]:
        rows = []
        for operation, operation_case in cases(hidden, heads, liger).items():
            rows += measure_case(operation, hidden, *operation_case, notes)
        return rows

    return {
        f"H {hidden:,}": partial(measure_hidden_size, hidden, heads)
        for hidden, heads in ((2048, 16), (4096, 32), (1024, 16))
    }


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

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    x, residual, gain = leaf(tokens, hidden), leaf(tokens, hidden), leaf(hidden)
    gate, up = leaf(tokens, 3 * hidden), leaf(tokens, 3 * hidden)
    q, k = leaf(tokens, heads, 128), leaf(tokens, 8, 128)
    q_gain, k_gain = leaf(128), leaf(128)
    angle = torch.randn(tokens, 64, device=device)
    cos, sin = angle.cos(), angle.sin()

    def norm_reference(x, gain):
        return rms_norm.reference(x, gain, 1e-6)

    def add_norm_reference(x, residual, gain):
        total = x + residual
        return rms_norm.reference(total, gain, 1e-6), total

    def rope_reference(q, k):
        angles = cos[: len(q)], sin[: len(q)]
        return rope.reference(q, None, 0.0, *angles), rope.reference(k, None, 0.0, *angles)

    def norm_rope_reference(q, k, q_gain, k_gain):
        angles = cos[: len(q)], sin[: len(q)]
        return rope.reference(q, q_gain, 1e-6, *angles), rope.reference(k, k_gain, 1e-6, *angles)

    thinksafe_kernels = {
        "rms_norm": (lambda x, gain: rms_norm.rms_norm(x, gain, 1e-6), norm_reference, (x, gain), 2, 3),
        "add_rms_norm": (lambda *a: rms_norm.add_rms_norm(*a, 1e-6), add_norm_reference, (x, residual, gain), 4, 4),
        "rope": (lambda q, k: (rope.rope(q, cos, sin), rope.rope(k, cos, sin)), rope_reference, (q, k), 2, 2),
        "qk_norm_rope": (
            lambda *a: rope.qk_norm_rope(*a, 1e-6, cos, sin), norm_rope_reference, (q, k, q_gain, k_gain), 2, 3,
        ),
        "swiglu": (swiglu.swiglu, swiglu.reference, (gate, up), 3, 5),
    }  # fmt: skip
    liger_kernels = {}
    if liger:
        doubled_tables = [torch.cat((tensor, tensor), -1)[None] for tensor in (cos, sin)]

        def liger_rope(q, k):
            # Liger-Kernel rotates in place, so it gets a copy in the layout that it expects.
            rotated = liger.liger_rope(
                q.clone().transpose(0, 1)[None], k.clone().transpose(0, 1)[None], *doubled_tables
            )
            return tuple(tensor[0].transpose(0, 1) for tensor in rotated)

        liger_kernels = {
            "rms_norm": lambda x, gain: liger.liger_rms_norm(x, gain, 1e-6, in_place=False),
            "add_rms_norm": lambda *a: liger.liger_fused_add_rms_norm(*a, 1e-6, in_place=False),
            "rope": liger_rope,
            "swiglu": liger.liger_swiglu,
        }
    cases_by_operation = {}
    for name, (kernel, reference, leaves, forward_tensors, backward_tensors) in thinksafe_kernels.items():
        # Bytes of one full-size tensor; for a rotation, q and k together.
        tensor_bytes = (q.numel() + k.numel() if "rope" in name else leaves[0].numel()) * 2
        table_bytes = 2 * cos.nbytes if "rope" in name else 0
        variants = {"ThinkSafe": kernel, "torch": reference, "torch.compile": torch.compile(reference, dynamic=False)}
        if name in liger_kernels:
            variants["Liger-Kernel, and a copy" if name == "rope" else "Liger-Kernel"] = liger_kernels[name]
        cases_by_operation[name] = (
            variants,
            reference,
            leaves,
            forward_tensors * tensor_bytes + table_bytes,
            backward_tensors * tensor_bytes + table_bytes,
        )
    return cases_by_operation


def measure_case(operation, hidden, variants, reference, leaves, forward_bytes, backward_bytes, notes) -> list[Row]:
    """Return time and error of one operation: one row per direction and variant that did not fail.

    Args:
        operation, hidden: columns of the rows only.
        variants, reference, leaves, forward_bytes, backward_bytes: one value of `cases`.
        notes: gets failures.
    """

    def outputs(function, inputs) -> tuple[torch.Tensor, ...]:
        result = function(*inputs)
        return result if isinstance(result, tuple) else (result,)

    tokens = len(leaves[0])
    exact_leaves = [_checked_tokens(leaf, tokens).detach().double().requires_grad_() for leaf in leaves]
    expected_outputs = outputs(reference, exact_leaves)
    grad_outputs = [
        torch.randn(tokens, *out.shape[1:], device=out.device, dtype=leaves[0].dtype) for out in expected_outputs
    ]
    gradients = torch.autograd.grad(
        expected_outputs,
        exact_leaves,
        [grad_output[: len(expected_outputs[0])].double() for grad_output in grad_outputs],
    )
    expected = {"forward": expected_outputs, "backward": gradients}
    forward_outputs, outputs_by_variant = {}, {}

    def forward(name):
        def call() -> None:
            outputs_by_variant[name] = outputs(variants[name], leaves)

        return call

    def backward(name):
        def call() -> None:
            if name not in forward_outputs:
                forward_outputs[name] = outputs(variants[name], leaves)
            outputs_by_variant[name] = torch.autograd.grad(
                forward_outputs[name], leaves, grad_outputs, retain_graph=True
            )

        return call

    rows = []
    for direction, make_call, num_bytes in (
        ("forward", forward, forward_bytes),
        ("backward", backward, backward_bytes),
    ):
        for name, measurement in measure(
            {name: _repeated(make_call(name)) for name in variants}, _ROUNDS, notes
        ).items():
            pairs = zip(outputs_by_variant[name], expected[direction], strict=True)
            errors = [
                relative_error(_checked_tokens(actual, tokens), expected_output)
                for actual, expected_output in pairs
                if len(actual) == tokens
            ]
            per_call = Measurement(measurement.seconds / _REPEATS, measurement.peak_bytes)
            row = {"operation": operation, "H": hidden, "direction": direction, "variant": name}
            rows.append(row | timing_columns(per_call, 0, num_bytes) | {"error": max(errors)})
        outputs_by_variant.clear(), forward_outputs.clear()
    return rows


def _checked_tokens(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the first _CHECKED_TOKENS tokens of a tensor of `tokens` tokens; any other tensor, a gain, unchanged."""
    return tensor[:_CHECKED_TOKENS] if len(tensor) == tokens else tensor


def _repeated(call):
    def run_repeatedly() -> None:
        for _ in range(_REPEATS):
            call()

    return run_repeatedly
