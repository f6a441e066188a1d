"""The Triton kernels match fp64 on a GPU in bf16, which Triton's interpreter cannot show."""

import pytest
import torch

from tests.support.kernel_calls import CALLS
from tests.support.paged import relative_error
from thinksafe.kernels import linear_cross_entropy as lce
from thinksafe.kernels import linear_kl as lkl
from thinksafe.kernels import linear_logprob as llp
from thinksafe.kernels import rms_norm, rope, swiglu
from thinksafe.kernels.chunked_loss import first_bad_row

pytestmark = pytest.mark.gpu

SHAPES = [(1, 128, 50257), (127, 256, 151_669), (129, 1024, 151_936), (300, 64, 127)]


def peaked_inputs(T, H, V, sharpness=40.0):
    """Return bf16 hidden states, bf16 weights and targets; the confidence in the target rises from none to certain."""
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (T,), device="cuda")
    strength = torch.linspace(0, sharpness, T, device="cuda")[:, None]
    x = torch.randn(T, H, device="cuda") * 0.1 + strength * weight[target].float() / H
    return x.bfloat16(), weight, target


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_cross_entropy_is_close_to_fp64(fresh_seed, shape, trainable, exact):
    x, weight, target = peaked_inputs(*shape)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    rows = lce.reference(x64, weight64, target, torch.ones(shape[0], device="cuda", dtype=torch.float64))
    rows.mean().backward()
    x.requires_grad_(), weight.requires_grad_(trainable)
    logits = x.detach() @ weight.detach().T
    baseline = logits.float().softmax(-1).scatter_add(1, target[:, None], -torch.ones_like(logits[:, :1]).float())
    baseline = relative_error(baseline.bfloat16() / len(x) @ weight.detach(), x64.grad)
    loss, stats = lce.linear_cross_entropy(x, weight, target, exact=exact, return_stats=True)
    loss.backward()
    assert abs(loss.item() - rows.mean().item()) <= 1e-5 * rows.mean().item() + 1e-5
    assert relative_error(x.grad, x64.grad) < min(3e-3, 1.25 * baseline + 1e-3) + stats.dropped_mass.item()
    if trainable:
        assert relative_error(weight.grad, weight64.grad) < 5e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_match_fp64(fresh_seed, shape):
    x, weight, target = peaked_inputs(*shape)
    ids = torch.cat((target[:, None], torch.randint(shape[2], (shape[0], 3), device="cuda")), 1)
    exact, entropy, top1 = llp.reference(x.double(), weight.double(), ids)
    actual = llp.linear_logprob(x, weight, target)
    torch.testing.assert_close(actual.logprob.double(), exact[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.top1, top1)
    torch.testing.assert_close(llp.linear_logprob_of(x, weight, ids).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("distance", [1e-2, 0.1, 0.5, 8.0])
@pytest.mark.parametrize("reference_hidden", [None, 1024, 1536])
def test_kl_is_close_to_fp64(fresh_seed, direction, distance, reference_hidden):
    """The reference shares the student's head, has another head, or has another head over wider hidden states.

    The additional columns of the wider states change the logits only a little."""
    x_reference, weight, _ = peaked_inputs(129, 1024, 32_000, sharpness=20.0)
    x = (x_reference.float() + distance * torch.randn(129, 1024, device="cuda") / 32).bfloat16()
    head = None
    if reference_hidden:
        extra_columns = (reference_hidden - 1024) * [0.01 * distance]
        x_reference = torch.cat((x_reference, x_reference.new_tensor([extra_columns]).expand(129, -1)), -1)
        head = torch.randn(32_000, reference_hidden, device="cuda", dtype=torch.bfloat16)
        head[:, :1024] = (weight.float() * 1.001).bfloat16()
    x64 = x.double().requires_grad_()
    reference_head = weight.double() if head is None else head.double()
    expected = lkl.reference(x64, x_reference.double(), weight.double(), reference_head, direction).mean()
    expected.backward()
    value = lkl.linear_kl(x.requires_grad_(), x_reference, weight, head, direction=direction)
    value.backward()
    assert abs(value.item() - expected.item()) <= max(1e-5, 1e-5 * expected.item())
    assert relative_error(x.grad, x64.grad) < 4e-3


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_equal_models_is_exactly_zero(fresh_seed, direction):
    x, weight, _ = peaked_inputs(200, 256, 50_257)
    student = x.clone().requires_grad_()
    value = lkl.linear_kl(student, x, weight, direction=direction, reduction="none")
    value.sum().backward()
    assert not value.any() and not student.grad.any()


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("input_index", [0, 1])
def test_non_finite_inputs_give_nan(fresh_seed, bad_value, input_index):
    """A bad row of hidden states makes its own results NaN, a bad row of the head makes all results NaN.

    That also holds where the bad logit is -inf, which a softmax would treat as an impossible token."""
    inputs = peaked_inputs(200, 128, 5000)
    inputs[input_index][150, 5] = bad_value
    x, weight, target = inputs
    target[target == 150] = 0
    bad_rows = torch.tensor([150] if input_index == 0 else range(200), device="cuda")
    scores = llp.linear_logprob(x, weight, target)
    losses = lce.linear_cross_entropy(x, weight, target, reduction="none")
    assert first_bad_row(losses) == bad_rows[0]
    for row_values in (
        scores.logprob,
        scores.entropy,
        llp.linear_logprob_of(x, weight, target[:, None])[:, 0],
        losses,
        *(
            lkl.linear_kl(x, x.flip(1), weight, None, direction, reduction="none")
            for direction in ("forward", "reverse")
        ),
    ):
        assert torch.equal(row_values.isnan().nonzero()[:, 0], bad_rows)


def test_indices_beyond_two_to_the_31_are_right(fresh_seed):
    """With chunks of 16,384 rows the buffer E has 16,384 * 151,936 elements, more than 2^31."""
    x, weight, target = peaked_inputs(16_384, 128, 151_936)
    default = lce.CHUNK_ROWS
    try:
        lce.CHUNK_ROWS = 16_384
        leaf = x.clone().requires_grad_()
        lce.linear_cross_entropy(leaf, weight, target, reduction="sum", exact=True).backward()
    finally:
        lce.CHUNK_ROWS = default
    tail = slice(16_300, None)
    x64 = x[tail].double().requires_grad_()
    ones = torch.ones(84, device="cuda", dtype=torch.float64)
    lce.reference(x64, weight.double(), target[tail], ones).sum().backward()
    assert relative_error(leaf.grad[tail], x64.grad) < 3e-3


def test_chunk_is_halved_if_memory_runs_out(fresh_seed):
    """The buffer E of 8,192 rows needs 2.5 GB. With only 1 GB free the gradients of x and of the head stay the same."""
    x, weight, target = peaked_inputs(8192, 128, 151_936)

    def gradients():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(lce.linear_cross_entropy(*leaves, target), leaves)

    expected_gradients = [gradient.double() for gradient in gradients()]
    torch.cuda.empty_cache()
    memory_limit = torch.cuda.memory_reserved() + 2**30
    torch.cuda.set_per_process_memory_fraction(memory_limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        actual_gradients = gradients()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for actual, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert relative_error(actual, expected_gradient) < 3e-3


@pytest.mark.parametrize("hidden", [128, 1024, 2048, 4096, 5120])
def test_rms_norm_and_swiglu_match_their_references(fresh_seed, hidden):
    x, up, weight = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in ((513, hidden), (513, hidden), (hidden,))
    )
    for kernel, reference, inputs in (
        (lambda *a: rms_norm.rms_norm(*a, 1e-6), lambda *a: rms_norm.reference(*a, 1e-6), (x, weight)),
        (swiglu.swiglu, swiglu.reference, (x, up)),
    ):
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        upstream = torch.randn(513, hidden, device="cuda", dtype=torch.bfloat16)
        expected_out = reference(*exact)
        out = kernel(*inputs)
        assert relative_error(out, expected_out) < 5e-3
        gradients = torch.autograd.grad(out, inputs, upstream)
        for actual, expected in zip(
            gradients, torch.autograd.grad(expected_out, exact, upstream.double()), strict=True
        ):
            assert relative_error(actual, expected) < 1e-2


def test_norm_and_rope_match_their_reference(fresh_seed):
    q = torch.randn(301, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angle = torch.randn(301, 64, device="cuda")
    upstream = torch.randn_like(q)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, weight)]
    out = rope.qk_norm_rope(q, q, weight, weight, 1e-6, angle.cos(), angle.sin())[0]
    expected_out = rope.reference(*exact, 1e-6, angle.cos(), angle.sin())
    assert relative_error(out, expected_out) < 5e-3
    gradients = torch.autograd.grad(out, (q, weight), upstream)
    for actual, expected in zip(gradients, torch.autograd.grad(expected_out, exact, upstream.double()), strict=True):
        assert relative_error(actual, expected) < 1e-2


def call_and_gradients(name, x, weight, target):
    """Return the result of a call and its gradients, if it has any."""
    out = CALLS[name](x, weight, target)
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    if not (leaves and out.requires_grad):
        return (out.detach(),)
    gradients = torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
    return out.detach(), *(gradient for gradient in gradients if gradient is not None)


def trainable_inputs(T, H, V):
    """Return `peaked_inputs` whose hidden states require a gradient."""
    x, weight, target = peaked_inputs(T, H, V)
    return x.requires_grad_(), weight, target


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_cuda_graph_replay_matches_an_eager_call(fresh_seed, name, trainable):
    """Between capture and replay the inputs change in place."""
    inputs = trainable_inputs(192, 256, 4096)
    inputs[1].requires_grad_(trainable)
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        call_and_gradients(name, *inputs)  # compiles the kernels, which a capture must not do
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call_and_gradients(name, *inputs)
    with torch.no_grad():
        for captured_input, new_input in zip(inputs, trainable_inputs(192, 256, 4096), strict=True):
            captured_input.copy_(new_input.flip(0))
    graph.replay()
    for actual, expected in zip(replayed, call_and_gradients(name, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["cross-entropy", "forward KL", "entropy", "norm and rotation"])
def test_call_compiles_into_one_graph(fresh_seed, name):
    """Inductor compiles four calls; test_reference.py traces all calls without Inductor."""
    inputs = trainable_inputs(64, 256, 4096)
    torch._dynamo.reset()
    actual = torch.compile(CALLS[name], fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, CALLS[name](*inputs), rtol=2e-2, atol=1e-3)
