"""The Triton kernels on a GPU in bf16, held against fp64: what the interpreter cannot show."""

import pytest
import torch

from tests.support.kernel_calls import CALLS
from thinksafe.kernels import linear_cross_entropy as lce
from thinksafe.kernels import linear_kl as lkl
from thinksafe.kernels import linear_logprob as llp
from thinksafe.kernels import rms_norm, rope, swiglu

pytestmark = pytest.mark.gpu

SHAPES = [(1, 128, 50257), (127, 256, 151_669), (129, 1024, 151_936), (300, 64, 127)]


def peaked(T, H, V, sharpness=40.0):
    """bf16 rows that point at their target with a confidence from none to certain, and bf16 weights."""
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(V, (T,), device="cuda")
    strength = torch.linspace(0, sharpness, T, device="cuda")[:, None]
    x = torch.randn(T, H, device="cuda") * 0.1 + strength * weight[target].float() / H
    return x.bfloat16(), weight, target


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_cross_entropy_is_closer_to_fp64_than_the_caps(fresh_seed, shape, trainable, exact):
    x, weight, target = peaked(*shape)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    rows = lce.reference(x64, weight64, target, torch.ones(shape[0], device="cuda", dtype=torch.float64))
    rows.mean().backward()
    x.requires_grad_(), weight.requires_grad_(trainable)
    logits = x.detach() @ weight.detach().T
    baseline = logits.float().softmax(-1).scatter_add(1, target[:, None], -torch.ones_like(logits[:, :1]).float())
    baseline = relative(baseline.bfloat16() / len(x) @ weight.detach(), x64.grad)
    loss, stats = lce.linear_cross_entropy_with_stats(x, weight, target, exact=exact)
    loss.backward()
    assert abs(loss.item() - rows.mean().item()) <= 1e-5 * rows.mean().item() + 1e-5
    assert relative(x.grad, x64.grad) < min(3e-3, 1.25 * baseline + 1e-3) + stats.dropped_mass.item()
    if trainable:
        assert relative(weight.grad, weight64.grad) < 5e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_equal_fp64(fresh_seed, shape):
    x, weight, target = peaked(*shape)
    ids = torch.cat((target[:, None], torch.randint(shape[2], (shape[0], 3), device="cuda")), 1)
    exact, entropy, top1 = llp.reference(x.double(), weight.double(), ids)
    actual = llp.linear_logprob(x, weight, target, by_products=True)
    torch.testing.assert_close(actual.logprob.double(), exact[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.top1, top1)
    torch.testing.assert_close(llp.linear_logprob_of(x, weight, ids).double(), exact, rtol=1e-5, atol=1e-4)
    margin = llp.linear_margin(x, weight, 3, 7).double()
    torch.testing.assert_close(margin, x.double() @ (weight[3] - weight[7].double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("distance", [1e-2, 0.1, 0.5, 8.0])
@pytest.mark.parametrize("reference_hidden", [None, 1024, 1536])
def test_divergence_is_closer_to_fp64_than_the_caps(fresh_seed, direction, distance, reference_hidden):
    """One head, a head of its own, and a head of its own over wider states, of which the rest changes little."""
    x_reference, weight, _ = peaked(129, 1024, 32_000, sharpness=20.0)
    x = (x_reference.float() + distance * torch.randn(129, 1024, device="cuda") / 32).bfloat16()
    head = None
    if reference_hidden:
        rest = (reference_hidden - 1024) * [0.01 * distance]
        x_reference = torch.cat((x_reference, x_reference.new_tensor([rest]).expand(129, -1)), -1)
        head = torch.randn(32_000, reference_hidden, device="cuda", dtype=torch.bfloat16)
        head[:, :1024] = (weight.float() * 1.001).bfloat16()
    x64 = x.double().requires_grad_()
    other = weight.double() if head is None else head.double()
    expected = lkl.reference(x64, x_reference.double(), weight.double(), other, direction).mean()
    expected.backward()
    value = lkl.linear_kl(x.requires_grad_(), x_reference, weight, head, direction=direction)
    value.backward()
    assert abs(value.item() - expected.item()) <= max(1e-5, (1e-3 if direction == "jsd" else 1e-5) * expected.item())
    assert relative(x.grad, x64.grad) < 4e-3


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_equal_models_differ_by_exactly_nothing(fresh_seed, direction):
    x, weight, _ = peaked(200, 256, 50_257)
    student = x.clone().requires_grad_()
    value = lkl.linear_kl(student, x, weight, direction=direction, reduction="none")
    value.sum().backward()
    assert not value.any() and not student.grad.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_whatever_is_broken_is_nan(fresh_seed, poison, where):
    """A row of states spoils itself, a row of the head everything: also where it makes a token merely impossible."""
    case = peaked(200, 128, 5000)
    case[where][150, 5] = poison
    x, weight, target = case
    target[target == 150] = 0
    broken = torch.tensor([150] if where == 0 else range(200), device="cuda")
    scores = llp.linear_logprob(x, weight, target, by_products=True)
    _, stats = lce.linear_cross_entropy_with_stats(x, weight, target)
    assert stats.bad_row == broken[0]
    for rows in (
        scores.logprob,
        scores.entropy,
        llp.linear_logprob_of(x, weight, target[:, None])[:, 0],
        lce.linear_cross_entropy(x, weight, target, reduction="none"),
        *(lkl.linear_kl(x, x.flip(1), weight, None, way, reduction="none") for way in ("forward", "reverse", "jsd")),
    ):
        assert torch.equal(rows.isnan().nonzero()[:, 0], broken)


def test_index_arithmetic_beyond_two_to_the_31(fresh_seed):
    """T * V of one chunk stays below it, the rows of E do not: 16,384 rows of 151,936 columns."""
    x, weight, target = peaked(16_384, 128, 151_936)
    default = lce.CHUNK
    try:
        lce.CHUNK = 16_384
        leaf = x.clone().requires_grad_()
        lce.linear_cross_entropy(leaf, weight, target, reduction="sum", exact=True).backward()
    finally:
        lce.CHUNK = default
    tail = slice(16_300, None)
    x64 = x[tail].double().requires_grad_()
    ones = torch.ones(84, device="cuda", dtype=torch.float64)
    lce.reference(x64, weight.double(), target[tail], ones).sum().backward()
    assert relative(leaf.grad[tail], x64.grad) < 3e-3


def test_a_chunk_too_large_for_the_memory_is_halved(fresh_seed):
    """E of 8,192 rows takes 2.5 GB; with 1 GB to spare the result is the same, dW included."""
    x, weight, target = peaked(8192, 128, 151_936)

    def gradients():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(lce.linear_cross_entropy(*leaves, target, ignore_index=None), leaves)

    expected = [gradient.double() for gradient in gradients()]
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 2**30
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = gradients()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative(actual, wanted) < 3e-3


@pytest.mark.parametrize("hidden", [128, 1024, 2048, 4096, 5120])
def test_norm_and_gate_equal_their_references(fresh_seed, hidden):
    make = lambda: torch.randn(513, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    x, other, weight = make(), make(), torch.randn(hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for kernel, reference, inputs in (
        (lambda *a: rms_norm.rms_norm(*a, 1e-6), lambda *a: rms_norm.reference(*a, 1e-6), (x, weight)),
        (swiglu.swiglu, swiglu.reference, (x, other)),
    ):
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        upstream = torch.randn(513, hidden, device="cuda", dtype=torch.bfloat16)
        wanted = reference(*exact)
        found = kernel(*inputs)
        assert relative(found, wanted) < 5e-3
        gradients = torch.autograd.grad(found, inputs, upstream)
        for actual, expected in zip(gradients, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
            assert relative(actual, expected) < 1e-2


def test_rotation_equals_its_reference(fresh_seed):
    q = torch.randn(301, 16, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angle = torch.randn(301, 64, device="cuda")
    upstream = torch.randn_like(q)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, weight)]
    found = rope.qk_norm_rope(q, q, weight, weight, 1e-6, angle.cos(), angle.sin())[0]
    wanted = rope.reference(*exact, 1e-6, angle.cos(), angle.sin())
    assert relative(found, wanted) < 5e-3
    gradients = torch.autograd.grad(found, (q, weight), upstream)
    for actual, expected in zip(gradients, torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        assert relative(actual, expected) < 1e-2


def step(name, x, weight, target):
    """A call and, where there is one, its gradient."""
    found = CALLS[name](x, weight, target)
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    if not (leaves and found.requires_grad):
        return (found.detach(),)
    gradients = torch.autograd.grad(found.float().sum(), leaves, allow_unused=True)
    return found.detach(), *(gradient for gradient in gradients if gradient is not None)


def masked(T, H, V):
    x, weight, target = peaked(T, H, V)
    return x.requires_grad_(), weight, torch.where(torch.arange(T, device="cuda") % 3 == 0, -100, target)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_replays_what_a_call_does(fresh_seed, name, trainable):
    """With other states and targets in the same memory than those it was captured with."""
    inputs = masked(192, 256, 4096)
    inputs[1].requires_grad_(trainable)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(name, *inputs)  # kernels are compiled before they are captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(name, *inputs)
    with torch.no_grad():
        for old, new in zip(inputs, masked(192, 256, 4096), strict=True):
            old.copy_(new.flip(0))
    graph.replay()
    for actual, expected in zip(replayed, step(name, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["cross-entropy", "forward KL", "entropy", "norm and rotation"])
def test_a_call_compiles_in_one_graph(fresh_seed, name):
    """By the default compiler; tests/test_kernels_reference.py traces every call."""
    inputs = masked(64, 256, 4096)
    torch._dynamo.reset()
    actual = torch.compile(CALLS[name], fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, CALLS[name](*inputs), rtol=2e-2, atol=1e-3)
