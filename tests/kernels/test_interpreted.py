"""The arithmetic of the Triton kernels in fp32 equals fp64; Triton's interpreter runs them on a CPU.

The interpreter gives wrong results in bf16 without an error, so test_gpu.py measures precision in bf16. Run this file
with TRITON_INTERPRET=1, because a module chooses between kernel and reference when it is imported.
"""

import pytest
import torch

from thinksafe.kernels.dispatch import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.support.combinations import combinations
from tests.support.out_of_memory import OutOfMemoryAt
from thinksafe.kernels import (
    chunked_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    rms_norm,
    rope,
    swiglu,
)
from thinksafe.kernels.exp_gemm import LOSS_TILE

# Odd sizes: a single row, one row more than a tile, a vocabulary that is not a multiple of a tile.
SHAPES = [(1, 32, 33), (16, 64, 96), (17, 48, 127), (40, 32, 257)]
DIRECTIONS = ["forward", "reverse"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so an element that a kernel does not write is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def is_close(actual, expected, tolerance):
    """Return whether the relative error of the whole tensor in the 2-norm is within the tolerance."""
    return (actual.double() - expected).norm() <= tolerance * expected.norm() + 1e-9


def peaked_case(T, H, V, sharpness):
    """Return rows whose confidence in their target grows from none to certain, like those of a trained model."""
    weight = torch.randn(V, H)
    target = torch.randint(V, (T,))
    strength = torch.linspace(0, sharpness, T)[:, None]
    x = torch.randn(T, H) * 0.1 + strength * weight[target] / H**0.5
    return x, weight, target


def random_weights(T):
    """Return loss weights of both signs, like advantages, none close to 0."""
    return (torch.rand(T) + 0.1) * torch.where(torch.rand(T) < 0.5, -1.0, 1.0)


def fp64_loss(x, weight, target, row_weight):
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    return x, weight, linear_cross_entropy.reference(x, weight, target, row_weight.double())


@pytest.mark.parametrize(
    ("shape", "trainable", "reduction"),
    combinations(SHAPES, [False, True], ["mean", "sum", "none"], together=2),
)
def test_cross_entropy_and_gradients_equal_fp64(fresh_seed, monkeypatch, shape, trainable, reduction):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 32)
    x, weight, target = peaked_case(*shape, sharpness=20.0)
    token_weight, grad_output = random_weights(shape[0]), torch.randn(shape[0])
    x64, weight64, rows = fp64_loss(x, weight, target, token_weight)
    x.requires_grad_(), weight.requires_grad_(trainable)
    loss = linear_cross_entropy.linear_cross_entropy(
        x, weight, target, token_weight=token_weight, reduction=reduction, exact=True
    )
    if reduction == "none":
        loss, expected = (loss * grad_output).sum(), (rows * grad_output).sum()
    else:
        expected = rows.sum() / (token_weight.double().abs().sum() if reduction == "mean" else 1)
    loss.backward(), expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item()) + 1e-5
    assert is_close(x.grad, x64.grad, 2e-5)
    if trainable:
        assert is_close(weight.grad, weight64.grad, 2e-5)


def test_confident_rows_have_a_precise_gradient(fresh_seed):
    x, weight, target = peaked_case(24, 64, 300, sharpness=60.0)
    x64, _, rows = fp64_loss(x, weight, target, torch.ones(24))
    x.requires_grad_()
    linear_cross_entropy.linear_cross_entropy(x, weight, target, reduction="sum", exact=True).backward()
    rows.sum().backward()
    confident = rows < 0.01
    assert confident.any()
    assert is_close(x.grad[confident], x64.grad[confident], 1e-4)


def test_logit_far_above_the_target_does_not_overflow(fresh_seed):
    x, weight, target = torch.randn(20, 64) * 30, torch.randn(50, 64), torch.randint(50, (20,))
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(20))
    logits = x64 @ weight64.T
    assert (logits.amax(1) - logits.gather(1, target[:, None])[:, 0]).max() > 88
    x.requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, target, reduction="none", exact=True)
    loss.sum().backward()
    rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-4)
    assert is_close(x.grad, x64.grad, 1e-4)


@pytest.mark.parametrize("logit_gap", [35.0, 45.0, 80.0, 86.0, 87.5, 88.5, 200.0])
def test_no_logit_gap_overflows_losses_or_gradients(fresh_seed, logit_gap):
    """exp(gap) fits fp32 up to 88.7 nats, but its products do not. One row has the gap above its target, others do not;
    loss, gradients and entropy are compared."""
    T, H, V = 20, 16, 70
    x, weight, target = torch.randn(T, H), torch.randn(V, H), torch.randint(2, V, (T,))
    weight[0], weight[1], target[7] = 0.0, 0.0, 1
    x[7], x[7, 3], weight[0, 3], weight[5:8, 3] = 0.0, 1.0, logit_gap, logit_gap - 0.5
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(T))
    rows.sum().backward()
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(*leaves, target, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-5)
    assert is_close(leaves[0].grad, x64.grad, 1e-5) and is_close(leaves[1].grad, weight64.grad, 1e-5)
    x_skipping = x.clone().requires_grad_()
    linear_cross_entropy.linear_cross_entropy(x_skipping, weight, target, reduction="sum", exact=False).backward()
    assert is_close(x_skipping.grad, x64.grad, 1e-3)
    scores = linear_logprob.linear_logprob(x, weight, target)
    logprob, entropy, _ = linear_logprob.reference(x.double(), weight.double(), target[:, None])
    torch.testing.assert_close(scores.logprob.double(), logprob[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-4, atol=1e-4)


def test_targets_at_tile_edges_equal_fp64(fresh_seed):
    V = 3 * LOSS_TILE.BLOCK_N + 5
    edges = [0, V - 1, *(edge for k in (1, 2, 3) for edge in (k * LOSS_TILE.BLOCK_N - 1, k * LOSS_TILE.BLOCK_N))]
    x, weight, target = torch.randn(len(edges), 32), torch.randn(V, 32), torch.tensor(edges)
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(len(edges)))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(*leaves, target, reduction="none")
    loss.sum().backward(), rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-5)
    assert is_close(leaves[0].grad, x64.grad, 1e-5) and is_close(leaves[1].grad, weight64.grad, 1e-5)


def test_gradient_rows_sum_to_zero_over_the_vocabulary(fresh_seed):
    logits, target = (torch.randn(19, 48) * 3).requires_grad_(), torch.randint(48, (19,))
    linear_cross_entropy.linear_cross_entropy(logits, torch.eye(48), target, reduction="sum", exact=True).backward()
    assert logits.grad.sum(1).abs().max() < 1e-6


def test_chunk_size_does_not_change_the_gradient_of_x(fresh_seed, monkeypatch):
    x, weight, target = peaked_case(48, 32, 100, sharpness=5.0)
    gradients = []
    for chunk in (16, 32, 64):
        monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", chunk)
        leaf = x.clone().requires_grad_()
        linear_cross_entropy.linear_cross_entropy(leaf, weight, target, reduction="sum", exact=True).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_the_same_call_gives_the_same_bits(fresh_seed):
    x, weight, target = peaked_case(33, 32, 100, sharpness=5.0)
    runs = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy.linear_cross_entropy(*leaves, target)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(first_run, second_run) for first_run, second_run in zip(*runs, strict=True))


def test_skipped_blocks_are_reported_and_harmless(fresh_seed):
    """Most logits are far below the rest, so their blocks are skipped; ten times the reported mass bounds the error."""
    T, H, V = 32, 32, 512
    weight = torch.randn(V, H) * 0.2
    x, target = torch.randn(T, H) * 0.2, torch.randint(32, (T,))
    direction = torch.nn.functional.normalize(torch.randn(H), dim=0)
    weight[:32] += 12 * direction
    x += 2 * direction
    x64, _, rows = fp64_loss(x, weight, target, torch.ones(T))
    rows.sum().backward()
    leaf = x.clone().requires_grad_()
    loss, stats = linear_cross_entropy.linear_cross_entropy(leaf, weight, target, reduction="sum", return_stats=True)
    loss.backward()
    assert stats.active_share < 0.2
    assert 0 < stats.dropped_mass < 16 * linear_cross_entropy.FILTER_EPS
    assert abs(loss.item() - rows.sum().item()) < 1e-4
    assert is_close(leaf.grad, x64.grad, 10 * stats.dropped_mass.item() + 1e-5)


def test_confident_rows_are_skipped_and_reported(fresh_seed):
    """A quarter of the rows hold almost all of the gradient; the blocks of all other rows are skipped."""
    weight, target = 0.3 * torch.randn(200, 32), torch.arange(64) % 32
    weight[:32] = 3 * torch.eye(32)
    is_sure = torch.arange(64) >= 16
    # The target's logit is 45 in confident rows, and all others are at most 20.
    x = torch.where(is_sure[:, None], 5 * weight[target], torch.randn(64, 32) * 0.3)
    # Confident rows are skipped although their weights are larger, others computed although theirs are negative.
    weights = torch.where(is_sure, 3.0, -0.5)
    x64, _, rows = fp64_loss(x, weight, target, weights)
    rows.sum().backward()
    leaf = x.clone().requires_grad_()
    loss, stats = linear_cross_entropy.linear_cross_entropy(
        leaf, weight, target, token_weight=weights, reduction="sum", exact=False, return_stats=True
    )
    loss.backward()
    assert stats.active_share < 0.3
    probability = (x.double() @ weight.double().T).softmax(-1)
    mass = weights.abs() * probability.scatter(1, target[:, None], 0.0).sum(1)
    assert mass[is_sure].max() > 0
    torch.testing.assert_close(stats.dropped_mass.double(), mass[is_sure].sum() / mass.sum(), rtol=1e-3, atol=1e-9)
    assert is_close(leaf.grad, x64.grad, 2 * linear_cross_entropy.FILTER_EPS)
    exact = x.clone().requires_grad_()
    linear_cross_entropy.linear_cross_entropy(
        exact, weight, target, token_weight=weights, reduction="sum", exact=True
    ).backward()
    assert is_close(exact.grad[is_sure], x64.grad[is_sure], 1e-4), "exact=True computes the small gradients"


def test_trainable_head_is_exact_by_default(fresh_seed):
    x, weight, target = peaked_case(16, 32, 200, sharpness=30.0)
    _, stats = linear_cross_entropy.linear_cross_entropy(
        x.requires_grad_(), weight.requires_grad_(), target, return_stats=True
    )
    assert stats.dropped_mass == 0 and stats.active_share == 1


@pytest.mark.parametrize("T", [0, 5])
def test_no_rows_or_no_weight_give_zero_loss_and_gradients(T):
    x, weight = torch.randn(T, 32, requires_grad=True), torch.randn(33, 32, requires_grad=True)
    target, token_weight = torch.arange(T), torch.zeros(T)
    loss, stats = linear_cross_entropy.linear_cross_entropy(
        x, weight, target, token_weight=token_weight, return_stats=True
    )
    gradients = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and stats.dropped_mass == 0 and stats.active_share == 1
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_non_finite_row_is_reported_and_affects_no_other(fresh_seed, bad_value):
    x, weight, target = peaked_case(40, 32, 100, sharpness=5.0)
    clean_loss = linear_cross_entropy.linear_cross_entropy(x, weight, target, reduction="none")
    x[17, 4] = bad_value
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, target, reduction="none")
    assert chunked_loss.first_bad_row(loss) == 17
    assert not torch.isfinite(loss[17])
    other_rows = torch.arange(40) != 17
    assert torch.equal(loss[other_rows], clean_loss[other_rows])
    assert torch.isnan(linear_cross_entropy.linear_cross_entropy(x, weight, target))


@pytest.mark.parametrize(("shape", "scale"), combinations(SHAPES, [0.1, 1.0, 30.0]))
def test_logprob_entropy_and_top1_equal_fp64(fresh_seed, shape, scale):
    T, H, V = shape
    x, weight, target = torch.randn(T, H) * scale, torch.randn(V, H), torch.randint(V, (T,))
    logprob, entropy, top1 = linear_logprob.reference(x.double(), weight.double(), target[:, None])
    scores = linear_logprob.linear_logprob(x, weight, target)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, scale**2)}
    torch.testing.assert_close(scores.logprob.double(), logprob[:, 0], **tolerance)
    torch.testing.assert_close(scores.entropy.double(), entropy, **tolerance)
    assert torch.equal(scores.top1, top1)
    torch.testing.assert_close(
        linear_logprob.linear_logprob_of(x, weight, target[:, None]).double(), logprob, **tolerance
    )
    ids = torch.randint(V, (T, 3))
    chosen_logprobs = linear_logprob.linear_logprob_of(x, weight, ids)
    torch.testing.assert_close(
        chosen_logprobs.double(), (x @ weight.T).double().log_softmax(1).gather(1, ids), **tolerance
    )


@pytest.mark.parametrize(
    ("shape", "direction", "distance", "own_head", "reduction"),
    combinations(
        [SHAPES[0], SHAPES[2], SHAPES[3]], DIRECTIONS, [3e-3, 0.1], [False, True], ["mean", "none"], together=2
    ),
)
def test_divergence_and_gradients_equal_fp64(fresh_seed, monkeypatch, shape, direction, distance, own_head, reduction):
    monkeypatch.setattr(linear_kl, "CHUNK_ROWS", 16)
    T, H, V = shape
    x_reference, weight = torch.randn(T, H) * 0.5, torch.randn(V, H)
    x = x_reference + distance * torch.randn(T, H)
    weight_reference = weight + 0.1 * distance * torch.randn(V, H) if own_head else None
    token_weight, grad_output = random_weights(T), torch.randn(T)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    reference_head = weight64.detach() if weight_reference is None else weight_reference.double()
    rows = linear_kl.reference(x64, x_reference.double(), weight64, reference_head, direction) * token_weight.double()
    x.requires_grad_(), weight.requires_grad_()
    value = linear_kl.linear_kl(
        x, x_reference, weight, weight_reference, direction=direction, token_weight=token_weight, reduction=reduction
    )
    if reduction == "none":
        value, expected = (value * grad_output).sum(), (rows * grad_output).sum()
    else:
        expected = rows.sum() / token_weight.double().abs().sum()
    value.backward(), expected.backward()
    assert abs(value.item() - expected.item()) <= 1e-5 + 1e-4 * rows.abs().max().item()
    assert is_close(x.grad, x64.grad, 4e-3)
    assert is_close(weight.grad, weight64.grad, 4e-3)


@pytest.mark.parametrize(
    ("direction", "case"),
    combinations(DIRECTIONS, [(6.0, 3e-4, 1e-6), (1.0, 1e-2, 1e-3), (6.0, 0.1, 0.1), (6.0, 0.2, 0.3), (1.0, 0.2, 1.0)]),
)
def test_divergence_is_precise_from_a_millionth_to_a_nat(fresh_seed, direction, case):
    """The vocabulary has 2,048 tokens, rows are unsure or confident, and D reaches several units in the last cases."""
    sharpness, distance, kl = case
    x_reference, weight, _ = peaked_case(16, 64, 2048, sharpness)
    x = x_reference + distance * torch.randn_like(x_reference)
    x64 = x.double().requires_grad_()
    expected = linear_kl.reference(x64, x_reference.double(), weight.double(), direction=direction).mean()
    value = linear_kl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction)
    value.backward(), expected.backward()
    assert kl / 30 < expected < 10 * kl
    assert abs(value.item() - expected.item()) <= 1e-5
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    assert is_close(x.grad, x64.grad, 2e-3)


@pytest.mark.parametrize(
    ("direction", "scale_and_distance"), combinations(DIRECTIONS, [(3.0, 3.0), (1.0, 1.0), (0.3, 10.0)])
)
def test_divergence_is_precise_for_distant_models(fresh_seed, direction, scale_and_distance):
    """Logits reach 25 nats and differences hundreds, where fp16 is wrong by a tenth."""
    scale, distance = scale_and_distance
    x_reference, weight = scale * torch.randn(16, 64), torch.randn(1024, 64)
    x = x_reference + distance * torch.randn(16, 64)
    x64 = x.double().requires_grad_()
    expected = linear_kl.reference(x64, x_reference.double(), weight.double(), direction=direction)
    value = linear_kl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction, reduction="none")
    expected.sum().backward(), value.sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5)
    # With nearly all mass on one token, fp32 logits cannot give the gradient: the tolerance includes a head row.
    assert (x.grad.double() - x64.grad).norm() <= 4e-3 * x64.grad.norm() + 1e-4 * weight.norm(dim=1).max()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_is_precise_for_confident_rows(fresh_seed, direction):
    """Both models give one token all mass except a thousandth, and its D is large. Rounding D by 5e-4 would cause an
    error in the token's gradient as large as the gradients of all other tokens together."""
    weight, target = torch.randn(1024, 64), torch.randint(1024, (16,))
    x_reference = 0.1 * torch.randn(16, 64) + 0.25 * weight[target]
    x = x_reference + 0.02 * torch.randn(16, 64) + 0.04 * weight[target]
    x64 = x.double().requires_grad_()
    linear_kl.reference(x64, x_reference.double(), weight.double(), direction=direction).sum().backward()
    linear_kl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction, reduction="sum").backward()
    assert is_close(x.grad, x64.grad, 4e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_of_equal_models_is_exactly_zero(fresh_seed, direction):
    x, weight = torch.randn(35, 48) * 3, torch.randn(127, 48)
    x_student = x.clone().requires_grad_()
    value = linear_kl.linear_kl(x_student, x, weight, direction=direction, reduction="none")
    value.sum().backward()
    assert not value.any() and not x_student.grad.any()


@pytest.mark.parametrize("shape", [(0, 64), (5, 130), (3, 7, 128), (70, 1024)])
def test_norm_and_gate_equal_their_references(fresh_seed, shape):
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape[-1], requires_grad=True)
    assert_equal_with_gradients(
        lambda: (rms_norm.rms_norm(x, weight, 1e-6),), lambda: (rms_norm.reference(x, weight, 1e-6),), (x, weight)
    )
    assert_equal_with_gradients(
        lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-6),
        lambda: (rms_norm.reference(x + residual, weight, 1e-6), x + residual),
        (x, residual, weight),
    )
    assert_equal_with_gradients(
        lambda: (swiglu.swiglu(x, residual),), lambda: (swiglu.reference(x, residual),), (x, residual)
    )


@pytest.mark.parametrize("width", [5, 1025])
def test_gate_accepts_columns_of_one_matmul(fresh_seed, width):
    gate_and_up = torch.randn(3, 2, 2 * width + 3, requires_grad=True)

    def apply_to_columns(function):
        _, gate, up = gate_and_up.split((3, width, width), -1)
        return (function(gate, up),)

    assert_equal_with_gradients(
        lambda: apply_to_columns(swiglu.swiglu), lambda: apply_to_columns(swiglu.reference), (gate_and_up,)
    )
    assert apply_to_columns(swiglu.swiglu)[0].is_contiguous()


def test_rotation_with_and_without_norm_equals_its_reference(fresh_seed):
    q, k = torch.randn(37, 6, 64, requires_grad=True), torch.randn(37, 2, 64, requires_grad=True)
    q_weight, k_weight = (torch.randn(64, requires_grad=True) for _ in range(2))
    angle = torch.randn(37, 32)
    cos, sin = angle.cos(), angle.sin()
    assert_equal_with_gradients(
        lambda: (rope.rope(q, cos, sin),), lambda: (rope.reference(q, None, 0.0, cos, sin),), (q,)
    )
    assert_equal_with_gradients(
        lambda: rope.qk_norm_rope(q, k, q_weight, k_weight, 1e-6, cos, sin),
        lambda: (rope.reference(q, q_weight, 1e-6, cos, sin), rope.reference(k, k_weight, 1e-6, cos, sin)),
        (q, k, q_weight, k_weight),
    )


def assert_equal_with_gradients(kernel, reference, inputs):
    """Check that outputs are equal, and gradients for the same random upstream gradients."""
    outputs, expected = kernel(), reference()
    grad_output = [torch.randn_like(output) for output in expected]
    gradients = torch.autograd.grad(outputs, inputs, grad_output)
    expected_gradients = torch.autograd.grad(expected, inputs, grad_output)
    for actual, expected_tensor in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(actual, expected_tensor, rtol=2e-5, atol=2e-5)


def test_operators_pass_torch_opcheck():
    x, weight, target = torch.randn(9, 32), torch.randn(40, 32), torch.randint(40, (9,))
    row_weight = torch.ones(9)
    # The fourth test of opcheck differentiates every output. Here outputs include gradients, which raises an error.
    tests_without_second_gradient = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x.requires_grad_(), weight, row_weight, target, True, True, False)
    torch.library.opcheck(
        linear_cross_entropy._linear_cross_entropy, arguments, test_utils=tests_without_second_gradient
    )
    arguments = (x, weight, row_weight, x.detach() + 0.1, None, False, True, False)
    torch.library.opcheck(linear_kl._linear_kl, arguments, test_utils=tests_without_second_gradient)
    for with_entropy_and_top1 in (False, True):
        arguments = (x.detach(), weight, target[:, None], with_entropy_and_top1)
        torch.library.opcheck(linear_logprob._linear_logprob, arguments)
    norm_weight = torch.ones(32, requires_grad=True)
    for residual in (None, x.detach() + 1):
        torch.library.opcheck(rms_norm._rms_norm, (x, residual, norm_weight, 1e-6))
    torch.library.opcheck(
        rms_norm._rms_norm_backward, (x.detach(), None, x.detach(), norm_weight.detach(), row_weight, True)
    )
    heads, angle = torch.randn(9, 2, 32, requires_grad=True), torch.randn(9, 16)
    for weight, inverse in ((None, False), (None, True), (norm_weight, False)):
        torch.library.opcheck(rope._norm_rope, (heads, weight, 1e-6, angle.cos(), angle.sin(), inverse))
    rstd = torch.ones(18)
    torch.library.opcheck(
        rope._norm_rope_backward,
        (heads.detach(), heads.detach(), norm_weight.detach(), angle.cos(), angle.sin(), rstd, True),
    )
    torch.library.opcheck(swiglu._swiglu, (x, torch.randn(9, 32, requires_grad=True)))
    torch.library.opcheck(swiglu._swiglu, torch.randn(9, 64).chunk(2, -1))
    torch.library.opcheck(swiglu._swiglu_backward, (x.detach(), x.detach() + 1, x.detach() + 2))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("hidden", [16, 80])
def test_divergence_accepts_a_reference_of_another_hidden_size(fresh_seed, direction, hidden):
    x, weight = torch.randn(20, 48) * 0.1, torch.randn(300, 48, requires_grad=True)
    x.requires_grad_()
    x_reference, weight_reference = torch.randn(20, hidden), torch.randn(300, hidden) / hidden**0.5
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = linear_kl.reference(x64, x_reference.double(), weight64, weight_reference.double(), direction).mean()
    value = linear_kl.linear_kl(x, x_reference, weight, weight_reference, direction=direction)
    value.backward(), expected.backward()
    assert abs(value.item() - expected.item()) <= 1e-3 * expected.item()
    assert is_close(x.grad, x64.grad, 4e-3)
    assert is_close(weight.grad, weight64.grad, 4e-3)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("loss", ["cross-entropy", "divergence"])
def test_out_of_memory_in_a_chunk_does_not_change_results(fresh_seed, monkeypatch, loss, step):
    """The chunk is halved, and results equal those of a run with enough memory: dW counts no row twice.

    Every `step`-th torch call fails in one run, from a random call on."""
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ROWS", 8), monkeypatch.setattr(linear_kl, "CHUNK_ROWS", 8)
    x, weight, target = peaked_case(8, 16, 30, sharpness=5.0)
    x_reference = x + 0.1 * torch.randn_like(x)

    def run(failing_call):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        failure = OutOfMemoryAt(failing_call)
        with monkeypatch.context() as patch:
            patch.setattr(linear_cross_entropy, "_chunk_on_triton", failure.wrap(linear_cross_entropy._chunk_on_triton))
            patch.setattr(linear_kl, "_chunk_on_triton", failure.wrap(linear_kl._chunk_on_triton))
            if loss == "divergence":
                value = linear_kl.linear_kl(leaves[0], x_reference, leaves[1], direction="reverse")
            else:
                value = linear_cross_entropy.linear_cross_entropy(*leaves, target)
        value.backward()
        return failure.has_raised, [value.detach(), *(leaf.grad for leaf in leaves)]

    _, expected = run(10_000)
    failing_call = fresh_seed % step
    while (outcome := run(failing_call))[0]:
        for actual, expected_tensor in zip(outcome[1], expected, strict=True):
            torch.testing.assert_close(actual, expected_tensor, rtol=1e-5, atol=1e-6)
        failing_call += step
    assert failing_call > 20
