"""An invalid argument of an operation raises one error line that names it, and non-finite values give NaN.

The promise holds for plain torch on a CPU and, with TRITON_INTERPRET=1, for the path of a GPU.
"""

import pytest
import torch

from thinksafe.kernels.chunked_loss import first_bad_row
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy
from thinksafe.kernels.linear_kl import linear_kl
from thinksafe.kernels.linear_logprob import linear_logprob, linear_logprob_of
from thinksafe.kernels.rms_norm import add_rms_norm, rms_norm
from thinksafe.kernels.rope import qk_norm_rope, rope
from thinksafe.kernels.swiglu import swiglu

T, H, V = 6, 16, 40
NAN, INF = float("nan"), float("inf")
OTHER_DEVICE = torch.device("meta")


def valid_arguments(operation):
    """Return arguments that the operation accepts."""
    x, head, ids = torch.randn(T, H), torch.randn(V, H), torch.randint(V, (T,))
    heads, angles, gain = torch.randn(T, 2, H), torch.randn(T, H // 2), torch.randn(H)
    return {
        linear_cross_entropy: {"x": x, "weight": head, "target": ids},
        linear_logprob: {"x": x, "weight": head, "token_ids": ids},
        linear_logprob_of: {"x": x, "weight": head, "token_ids": ids[:, None]},
        linear_kl: {"x_student": x, "x_reference": x + 1, "weight": head},
        rms_norm: {"x": x, "weight": gain, "eps": 1e-6},
        add_rms_norm: {"x": x, "residual": x + 1, "weight": gain, "eps": 1e-6},
        rope: {"x": heads, "cos": angles, "sin": angles},
        qk_norm_rope: {"q": heads, "k": heads, "q_weight": gain, "k_weight": gain, "eps": 1e-6, "cos": angles}
        | {"sin": angles},
        swiglu: {"gate": x, "up": x + 1},
    }[operation]


def head_with_adapter():
    """Return a linear layer with an adapter, as PEFT builds it."""
    head = torch.nn.Linear(H, V)
    head.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(H, 2)})
    return head


def strided_tensor(*shape):
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


HEAD_FAULTS = [
    ({"weight": torch.nn.Linear(H, V)}, TypeError, "weight must be the head's .* found Linear: pass .weight"),
    ({"weight": head_with_adapter()}, TypeError, "weight is a head with an adapter.*: merge the adapter"),
    ({"weight": None}, TypeError, "weight must be a tensor, found NoneType"),
    ({"weight": torch.randn(V, H + 1)}, ValueError, r"H and V at least 1; found \[6, 16\] and \[40, 17\]"),
    ({"weight": torch.randn(0, H)}, ValueError, r"H and V at least 1; found \[6, 16\] and \[0, 16\]"),
    ({"weight": torch.randn(V)}, ValueError, r"weight \[V, H\]"),
    ({"weight": torch.randn(V, H).bfloat16()}, ValueError, "both float32; found torch.float32 and torch.bfloat16"),
    ({"weight": strided_tensor(V, H)}, ValueError, "weight must be contiguous"),
    ({"weight": torch.randn(V, H, device=OTHER_DEVICE)}, ValueError, "x.* is on cpu, weight on meta"),
]
HEAD_OPERATIONS = (linear_cross_entropy, linear_logprob, linear_logprob_of, linear_kl)
EMPTY_HEAD = torch.randn(V, 0)
FAULTS = [
    *((operation, *fault) for operation in HEAD_OPERATIONS for fault in HEAD_FAULTS),
    (linear_cross_entropy, {"x": torch.randn(T, 0), "weight": EMPTY_HEAD}, ValueError, "at least 1"),
    (linear_cross_entropy, {"x": torch.randn(T, H).half(), "weight": torch.randn(V, H).half()}, ValueError, "bfloat16"),
    (linear_cross_entropy, {"x": [1.0]}, TypeError, "x must be a tensor, found list"),
    (linear_cross_entropy, {"target": torch.randint(V, (T - 1,))}, ValueError, r"target must .*\[6\].*\[5\]"),
    (linear_cross_entropy, {"target": torch.randint(V, (T, 1))}, ValueError, "target must be"),
    (linear_cross_entropy, {"target": torch.ones(T, dtype=torch.int32)}, ValueError, "target must be torch.int64"),
    (linear_cross_entropy, {"target": torch.full((T,), V)}, ValueError, r"target holds a token id outside \[0, 40\)"),
    (linear_cross_entropy, {"target": torch.full((T,), -1)}, ValueError, r"target holds a token id outside \[0, 40\)"),
    (linear_cross_entropy, {"target": torch.ones(T, dtype=torch.int64, device=OTHER_DEVICE)}, ValueError, "on meta"),
    *(
        (operation, {"reduction": value}, ValueError, f"reduction must be mean, sum or none, found {value!r}")
        for operation in (linear_cross_entropy, linear_kl)
        for value in ("average", None, 3)
    ),
    *(
        (operation, {"eps": value}, error, "eps must")
        for operation in (rms_norm, add_rms_norm, qk_norm_rope)
        for value, error in (
            *((value, TypeError) for value in ("a", None, True, torch.ones(()))),
            *((value, ValueError) for value in (-1e-6, NAN, INF)),
        )
    ),
    *(
        (operation, {"token_weight": value}, error, message)
        for operation in (linear_cross_entropy, linear_kl)
        for value, error, message in (
            (torch.ones(T - 1), ValueError, r"token_weight must be .*\[6\].*found .*\[5\]"),
            (torch.ones(T, device=OTHER_DEVICE), ValueError, "token_weight must be .*found .*on meta"),
            (torch.ones(T, dtype=torch.int64), ValueError, "token_weight must be floating point, found torch.int64"),
            (2.0, TypeError, "token_weight must be a tensor, found float"),
            (torch.ones(T, requires_grad=True), ValueError, "token_weight is a constant and gets no gradient"),
        )
    ),
    (linear_logprob, {"token_ids": torch.randint(V, (T, 2))}, ValueError, "token_ids must be"),
    (linear_logprob, {"token_ids": torch.full((T,), V)}, ValueError, "token_ids holds a token id outside"),
    (linear_logprob_of, {"token_ids": torch.randint(V, (T,))}, ValueError, r"token_ids must be .*\[6, 1\]"),
    (linear_logprob_of, {"token_ids": torch.randint(V, (T, 0))}, ValueError, "token_ids must hold at least one"),
    (linear_logprob_of, {"token_ids": torch.randint(V, (T, 2, 2))}, ValueError, "token_ids must be"),
    (linear_logprob_of, {"token_ids": torch.full((T, 2), -1)}, ValueError, "token_ids holds a token id outside"),
    (linear_kl, {"direction": "backward"}, ValueError, "direction must be forward or reverse, found 'backward'"),
    (linear_kl, {"x_reference": torch.randn(T - 1, H)}, ValueError, r"x_reference must be .*\[6, 16\]"),
    (linear_kl, {"x_reference": torch.randn(T, H).bfloat16()}, ValueError, "x_reference and weight must both be"),
    (linear_kl, {"x_reference": torch.randn(T, H + 4)}, ValueError, r"x_reference must be \[T, H\] and"),
    (linear_kl, {"weight_reference": torch.randn(V + 1, H)}, ValueError, r"weight_reference must be .*\[40, 16\]"),
    (linear_kl, {"weight_reference": head_with_adapter()}, TypeError, "weight_reference is a head with an adapter"),
    (
        linear_kl,
        {"x_reference": torch.randn(T, H).bfloat16(), "weight_reference": torch.randn(V, H).bfloat16()},
        ValueError,
        "weight_reference must be torch.float32",
    ),
    *(
        (operation, fault, ValueError, message)
        for operation in (rms_norm, add_rms_norm)
        for fault, message in (
            ({"weight": torch.randn(H + 1)}, r"weight must be .*\[16\] .*found .*\[17\]"),
            ({"weight": torch.randn(H).bfloat16()}, "weight must be torch.float32"),
            ({"weight": torch.randn(H, device=OTHER_DEVICE)}, "weight must be .*found .*on meta"),
            ({"weight": strided_tensor(H)}, "weight must be contiguous"),
            ({"x": torch.randn(T, 0), "weight": torch.randn(0)}, "H at least 1"),
            ({"x": torch.ones(T, H, dtype=torch.int64)}, "x must be floating point"),
        )
    ),
    (rms_norm, {"x": [1.0]}, TypeError, "x must be a tensor, found list"),
    (rope, {"x": None}, TypeError, "x must be a tensor, found NoneType"),
    (swiglu, {"gate": None}, TypeError, "gate must be a tensor, found NoneType"),
    (qk_norm_rope, {"q_weight": None}, TypeError, "q_weight must be a tensor, found NoneType"),
    (qk_norm_rope, {"k_weight": None}, TypeError, "k_weight must be a tensor, found NoneType"),
    (add_rms_norm, {"residual": torch.randn(T, H).bfloat16()}, ValueError, "residual must be torch.float32"),
    (add_rms_norm, {"residual": torch.randn(H)}, ValueError, r"residual must be .*\[6, 16\]"),
    (add_rms_norm, {"residual": torch.randn(T, H, device=OTHER_DEVICE)}, ValueError, "residual must be .*on meta"),
    (rope, {"x": torch.randn(T, H)}, ValueError, "x must be .T, heads, D."),
    (rope, {"x": torch.randn(T, 2, 7)}, ValueError, "D even"),
    *(
        (operation, {table: angles}, ValueError, f"{table} must be torch.float32")
        for operation in (rope, qk_norm_rope)
        for table in ("cos", "sin")
        for angles in (
            torch.randn(T, H),
            torch.randn(T + 1, H // 2),
            torch.randn(T, H // 2).bfloat16(),
            torch.randn(T, H // 2, device=OTHER_DEVICE),
        )
    ),
    *(
        (qk_norm_rope, {f"{which}_weight": gain}, ValueError, f"{which}_weight must be")
        for which in "qk"
        for gain in (
            torch.randn(H + 1),
            torch.randn(H).bfloat16(),
            strided_tensor(H),
            torch.randn(H, device=OTHER_DEVICE),
        )
    ),
    (qk_norm_rope, {"k": torch.randn(T + 1, 2, H)}, ValueError, r"cos must be torch.float32 \[7, 8\]"),
    (swiglu, {"up": torch.randn(T, H + 1)}, ValueError, "up must be"),
    (swiglu, {"up": torch.randn(T, H).bfloat16()}, ValueError, "up must be torch.float32"),
    (swiglu, {"up": torch.randn(T, H, device=OTHER_DEVICE)}, ValueError, "up must be .*on meta"),
    (swiglu, {"gate": torch.ones(T, H, dtype=torch.int64)}, ValueError, "gate must be floating point"),
]  # fmt: skip


@pytest.mark.parametrize("operation, fault, error, message", FAULTS)
def test_invalid_argument_raises_one_line_that_names_it(operation, fault, error, message):
    with pytest.raises(error, match=message) as raised:
        operation(**valid_arguments(operation) | fault)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("operation", dict.fromkeys(fault[0] for fault in FAULTS))
def test_valid_arguments_raise_no_error(operation):
    operation(**valid_arguments(operation))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("operation", [linear_cross_entropy, linear_logprob, linear_logprob_of, linear_kl])
def test_error_names_a_tensor_that_tma_cannot_read(operation):
    arguments = valid_arguments(operation)
    for name in set(arguments) & {"x", "weight", "x_student", "x_reference"}:
        tensor = arguments[name]
        misaligned = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
        with pytest.raises(ValueError, match=f"{name} must start at a multiple of 16 bytes"):
            operation(**arguments | {name: misaligned})
    narrow = {
        name: tensor[:, :3].contiguous() for name, tensor in arguments.items() if name not in ("target", "token_ids")
    }
    with pytest.raises(ValueError, match=r"a row of x.* must be a multiple of 16 bytes; found H = 3"):
        operation(**arguments | narrow)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_rope_kernel_needs_a_power_of_two_head_dim():
    with pytest.raises(ValueError, match="x has heads of 48 elements; a GPU needs a power of two"):
        rope(torch.randn(T, 2, 48), torch.randn(T, 24), torch.randn(T, 24))


# Second derivatives


SECOND_DERIVATIVE_ERRORS = {
    linear_cross_entropy: "linear_cross_entropy can be differentiated once",
    linear_kl: "linear_kl can be differentiated once",
    rms_norm: "rms_norm_backward",
    add_rms_norm: "rms_norm_backward",
    qk_norm_rope: "norm_rope_backward",
    swiglu: "swiglu_backward",
}


@pytest.mark.parametrize("operation", [*SECOND_DERIVATIVE_ERRORS, rope])
def test_second_derivative_exists_or_raises(operation):
    """Plain torch has one, and so has a rotation. Any other operator that computes its own gradient raises an error."""
    arguments = valid_arguments(operation)
    leaf = next(iter(arguments.values())).requires_grad_()

    def second_derivative(out) -> torch.Tensor:
        out = out[0] if isinstance(out, tuple) else out
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    if operation in (linear_cross_entropy, linear_kl) or (INTERPRETED and operation is not rope):
        with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE_ERRORS[operation]) as raised:
            second_derivative(operation(**arguments))
        assert "\n" not in str(raised.value)
    else:
        assert second_derivative(operation(**arguments)).abs().max() > 0


# NaN and infinity


@pytest.mark.parametrize("bad_value", [NAN, INF, -INF])
@pytest.mark.parametrize("argument", ["x", "weight"])
def test_cross_entropy_of_non_finite_input_is_nan_with_bad_row(bad_value, argument):
    """Rows with a logit of -inf count too, although a softmax would treat it as an impossible token."""
    arguments = valid_arguments(linear_cross_entropy)
    arguments["x"][:3, 5] = -arguments["x"][:3, 5].abs()
    arguments["x"][3:, 5] = arguments["x"][3:, 5].abs()
    arguments[argument][4, 5] = bad_value
    arguments["target"][:] = 0  # not token 4, whose row of the head may be bad
    losses = linear_cross_entropy(**arguments, reduction="none")
    bad_rows = [4] if argument == "x" else list(range(T))
    assert losses.isnan().nonzero()[:, 0].tolist() == bad_rows and first_bad_row(losses) == bad_rows[0]
    assert linear_cross_entropy(**arguments).isnan()


@pytest.mark.parametrize("bad_value", [NAN, INF, -INF])
@pytest.mark.parametrize("argument", ["x", "weight"])
def test_logprobs_of_non_finite_input_are_nan(bad_value, argument):
    arguments = valid_arguments(linear_logprob)
    arguments[argument][4, 5] = bad_value
    arguments["token_ids"][:] = 0
    bad_rows = [4] if argument == "x" else list(range(T))
    scores = linear_logprob(**arguments)
    for rows in (scores.logprob, scores.entropy):
        assert rows.isnan().nonzero()[:, 0].tolist() == bad_rows
    logprobs = linear_logprob_of(arguments["x"], arguments["weight"], arguments["token_ids"][:, None].expand(-1, 3))
    assert logprobs.isnan().all(1).nonzero()[:, 0].tolist() == bad_rows


@pytest.mark.parametrize("bad_value", [NAN, INF, -INF])
@pytest.mark.parametrize("argument", ["x_student", "x_reference", "weight", "weight_reference"])
@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_non_finite_input_is_nan(bad_value, argument, separate_heads, direction):
    arguments = valid_arguments(linear_kl) | {"direction": direction, "reduction": "none"}
    if separate_heads or argument == "weight_reference":
        arguments["weight_reference"] = torch.randn(V, H)
    arguments[argument][4, 5] = bad_value
    bad_rows = [4] if argument.startswith("x") else list(range(T))
    x = arguments["x_student"].requires_grad_()
    divergences = linear_kl(**arguments)
    assert divergences.isnan().nonzero()[:, 0].tolist() == bad_rows
    divergences.sum().backward()
    assert x.grad.isfinite().all(1).logical_not().nonzero()[:, 0].tolist() == bad_rows
