"""The Triton kernels' arithmetic, run by Triton's interpreter on a CPU in fp32 and held against fp64.

The interpreter is silently wrong in bf16, so precision in bf16 is measured on a GPU (test_kernels_gpu.py). Run with
TRITON_INTERPRET=1: the choice between kernel and reference is made when a module is imported.
"""

import pytest
import torch

from thinksafe.kernels.dispatch import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from tests.support.out_of_memory import OutOfMemoryAt
from thinksafe.kernels import checks, chunked_loss, rms_norm, rope, swiglu
from thinksafe.kernels import linear_cross_entropy as lce
from thinksafe.kernels import linear_kl as lkl
from thinksafe.kernels import linear_logprob as llp
from thinksafe.kernels.exp_gemm import PLAIN

# Odd sizes on purpose: a single row, one more than a tile, a vocabulary that is no multiple of anything.
SHAPES = [(1, 32, 33), (16, 64, 96), (17, 48, 127), (40, 32, 257)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def close(actual, expected, tolerance):
    """Relative error of the whole tensor in the 2-norm."""
    return (actual.double() - expected).norm() <= tolerance * expected.norm() + 1e-9


def peaked(T, H, V, sharpness):
    """Rows that point at their target with a confidence that grows from none to certain, as a trained model's do."""
    weight = torch.randn(V, H)
    target = torch.randint(V, (T,))
    strength = torch.linspace(0, sharpness, T)[:, None]
    x = torch.randn(T, H) * 0.1 + strength * weight[target] / H**0.5
    return x, weight, target


def fp64_loss(x, weight, target, row_weight, **settings):
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    return x, weight, lce.reference(x, weight, target, row_weight.double(), **settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_and_its_gradients_equal_fp64(fresh_seed, monkeypatch, shape, settings, trainable, reduction):
    monkeypatch.setattr(lce, "CHUNK", 32)
    x, weight, target = peaked(*shape, sharpness=20.0)
    token_weight, upstream = torch.rand(shape[0]) + 0.1, torch.randn(shape[0])
    x64, weight64, rows = fp64_loss(x, weight, target, token_weight, **settings)
    x.requires_grad_(), weight.requires_grad_(trainable)
    loss = lce.linear_cross_entropy(
        x, weight, target, token_weight=token_weight, reduction=reduction, exact=True, **settings
    )
    if reduction == "none":
        loss, expected = (loss * upstream).sum(), (rows * upstream).sum()
    else:
        expected = rows.sum() / (token_weight.double().sum() if reduction == "mean" else 1)
    loss.backward(), expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item()) + 1e-5
    assert close(x.grad, x64.grad, 2e-5)
    if trainable:
        assert close(weight.grad, weight64.grad, 2e-5)


def test_confident_rows_keep_a_precise_gradient(fresh_seed):
    x, weight, target = peaked(24, 64, 300, sharpness=60.0)
    x64, _, rows = fp64_loss(x, weight, target, torch.ones(24))
    x.requires_grad_()
    lce.linear_cross_entropy(x, weight, target, reduction="sum", exact=True).backward()
    rows.sum().backward()
    confident = rows < 0.01
    assert confident.any()
    assert close(x.grad[confident], x64.grad[confident], 1e-4)


def test_a_logit_far_above_the_target_is_no_overflow(fresh_seed):
    x, weight, target = torch.randn(20, 64) * 30, torch.randn(50, 64), torch.randint(50, (20,))
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(20))
    logits = x64 @ weight64.T
    assert (logits.amax(1) - logits.gather(1, target[:, None])[:, 0]).max() > 88
    x.requires_grad_()
    loss = lce.linear_cross_entropy(x, weight, target, reduction="none", exact=True)
    loss.sum().backward()
    rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-4)
    assert close(x.grad, x64.grad, 1e-4)


@pytest.mark.parametrize("gap", [35.0, 45.0, 80.0, 86.0, 87.5, 88.5, 200.0])
def test_no_gap_between_the_target_and_others_overflows_anything(fresh_seed, gap):
    """exp(gap) fits fp32 up to 88.7 nats, but its products do not: loss, gradients, z-loss and entropy of one row whose
    target is so far down, beside rows of which it is not."""
    T, H, V = 20, 16, 70
    x, weight, target = torch.randn(T, H), torch.randn(V, H), torch.randint(2, V, (T,))
    weight[0], weight[1], target[7] = 0.0, 0.0, 1
    x[7], x[7, 3], weight[0, 3], weight[5:8, 3] = 0.0, 1.0, gap, gap - 0.5
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(T), z_loss=1e-3, label_smoothing=0.1)
    rows.sum().backward()
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = lce.linear_cross_entropy(*leaves, target, reduction="none", z_loss=1e-3, label_smoothing=0.1)
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-5)
    assert close(leaves[0].grad, x64.grad, 1e-5) and close(leaves[1].grad, weight64.grad, 1e-5)
    skipping = x.clone().requires_grad_()
    lce.linear_cross_entropy(
        skipping, weight, target, reduction="sum", z_loss=1e-3, label_smoothing=0.1, exact=False
    ).backward()
    assert close(skipping.grad, x64.grad, 1e-3)
    scores = llp.linear_logprob(x, weight, target, by_products=True)
    logprob, entropy, _ = llp.reference(x.double(), weight.double(), target[:, None])
    torch.testing.assert_close(scores.logprob.double(), logprob[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=1e-4, atol=1e-4)


def test_targets_in_the_first_and_last_columns_of_tiles(fresh_seed):
    V = 3 * PLAIN.block_v + 5
    edges = [0, V - 1, *(edge for k in (1, 2, 3) for edge in (k * PLAIN.block_v - 1, k * PLAIN.block_v))]
    x, weight, target = torch.randn(len(edges), 32), torch.randn(V, 32), torch.tensor(edges)
    x64, weight64, rows = fp64_loss(x, weight, target, torch.ones(len(edges)))
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = lce.linear_cross_entropy(*leaves, target, reduction="none")
    loss.sum().backward(), rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows, rtol=1e-5, atol=1e-5)
    assert close(leaves[0].grad, x64.grad, 1e-5) and close(leaves[1].grad, weight64.grad, 1e-5)


def test_gradient_rows_sum_to_zero_over_the_vocabulary(fresh_seed):
    logits, target = (torch.randn(19, 48) * 3).requires_grad_(), torch.randint(48, (19,))
    lce.linear_cross_entropy(logits, torch.eye(48), target, reduction="sum", exact=True).backward()
    assert logits.grad.sum(1).abs().max() < 1e-6


def test_masked_rows_cost_nothing_and_change_nothing(fresh_seed):
    x, weight, target = peaked(40, 32, 100, sharpness=5.0)
    mask = torch.rand(40) < 0.4
    ignored = torch.where(mask, -100, target)
    whole, kept = x.clone().requires_grad_(), x[~mask].clone().requires_grad_()
    masked = lce.linear_cross_entropy(whole, weight, ignored, exact=True, reduction="none")
    compact = lce.linear_cross_entropy(kept, weight, target[~mask], exact=True, reduction="none")
    masked.sum().backward(), compact.sum().backward()
    assert torch.equal(masked[~mask], compact) and not masked[mask].any()
    assert torch.equal(whole.grad[~mask], kept.grad) and not whole.grad[mask].any()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_where_rows_cannot_be_counted_masked_ones_weigh_nothing(fresh_seed, monkeypatch, trainable, exact):
    """As while a CUDA graph is captured; what stands in masked rows, be it NaN, stays out of everything."""
    x, weight, target = peaked(40, 32, 100, sharpness=5.0)
    mask, token_weight = torch.rand(40) < 0.4, torch.rand(40) + 0.1
    target[mask], x[mask] = -100, torch.nan

    def run():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        loss, stats = lce.linear_cross_entropy_with_stats(
            *leaves, target, token_weight=token_weight, exact=exact, label_smoothing=0.1, z_loss=1e-3
        )
        return [loss, stats.normaliser, *torch.autograd.grad(loss, leaves[: 1 + trainable])], stats.bad_row

    expected, _ = run()
    monkeypatch.setattr(lce, "_may_wait", lambda x: False)
    found, bad_row = run()
    assert bad_row == -1
    for actual, wanted in zip(found, expected, strict=True):
        assert close(actual, wanted.double(), 1e-5 if exact else 2 * lce.EPS)


def test_chunks_do_not_change_the_gradient_of_x(fresh_seed, monkeypatch):
    x, weight, target = peaked(48, 32, 100, sharpness=5.0)
    gradients = []
    for chunk in (16, 32, 64):
        monkeypatch.setattr(lce, "CHUNK", chunk)
        leaf = x.clone().requires_grad_()
        lce.linear_cross_entropy(leaf, weight, target, reduction="sum", exact=True).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_the_same_call_gives_the_same_bits(fresh_seed):
    x, weight, target = peaked(33, 32, 100, sharpness=5.0)
    runs = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = lce.linear_cross_entropy(*leaves, target)
        runs.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_skipped_blocks_are_reported_and_harmless(fresh_seed):
    """Most of the vocabulary far below the rest: blocks are skipped, and what they held is what the report says."""
    T, H, V = 32, 32, 512
    weight = torch.randn(V, H) * 0.2
    x, target = torch.randn(T, H) * 0.2, torch.randint(32, (T,))
    direction = torch.nn.functional.normalize(torch.randn(H), dim=0)
    weight[:32] += 12 * direction
    x += 2 * direction
    x64, _, rows = fp64_loss(x, weight, target, torch.ones(T))
    rows.sum().backward()
    leaf = x.clone().requires_grad_()
    loss, stats = lce.linear_cross_entropy_with_stats(leaf, weight, target, reduction="sum")
    loss.backward()
    assert stats.active_share < 0.2
    assert 0 < stats.dropped_mass < 16 * lce.EPS
    assert abs(loss.item() - rows.sum().item()) < 1e-4
    assert close(leaf.grad, x64.grad, 10 * stats.dropped_mass.item() + 1e-5)


def test_rows_the_model_is_sure_of_are_skipped_and_reported(fresh_seed):
    """A quarter of the rows hold all the gradient there is: the others' blocks are not computed, whatever they hold."""
    weight, target = 0.3 * torch.randn(200, 32), torch.arange(64) % 32
    weight[:32] = 3 * torch.eye(32)
    sure = torch.arange(64) >= 16
    x = torch.where(sure[:, None], 5 * weight[target], torch.randn(64, 32) * 0.3)  # logits of 45 and at most 20 beside
    weights = torch.where(sure, 3.0, 0.5)  # a weight of their own does not make them matter
    x64, _, rows = fp64_loss(x, weight, target, weights)
    rows.sum().backward()
    leaf = x.clone().requires_grad_()
    loss, stats = lce.linear_cross_entropy_with_stats(
        leaf, weight, target, token_weight=weights, reduction="sum", exact=False
    )
    loss.backward()
    assert stats.active_share < 0.3
    probability = (x.double() @ weight.double().T).softmax(-1)
    mass = weights * probability.scatter(1, target[:, None], 0.0).sum(1)
    assert mass[sure].max() > 0
    torch.testing.assert_close(stats.dropped_mass.double(), mass[sure].sum() / mass.sum(), rtol=1e-3, atol=1e-9)
    assert close(leaf.grad, x64.grad, 2 * lce.EPS)
    exact = x.clone().requires_grad_()
    lce.linear_cross_entropy(exact, weight, target, token_weight=weights, reduction="sum", exact=True).backward()
    assert close(exact.grad[sure], x64.grad[sure], 1e-4), "asked for, the small gradients are there"


def test_a_head_that_trains_is_exact_by_default(fresh_seed):
    x, weight, target = peaked(16, 32, 200, sharpness=30.0)
    _, stats = lce.linear_cross_entropy_with_stats(x.requires_grad_(), weight.requires_grad_(), target)
    assert stats.dropped_mass == 0 and stats.active_share == 1


def test_nothing_to_learn_gives_zero_and_zero_gradients():
    weight = torch.randn(33, 32, requires_grad=True)
    for x, target in (
        (torch.zeros(0, 32), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(5, 32), torch.full((5,), -100)),
    ):
        x.requires_grad_()
        loss, stats = lce.linear_cross_entropy_with_stats(x, weight, target)
        gradients = torch.autograd.grad(loss, (x, weight))
        assert loss == 0 and stats.normaliser == 0 and stats.bad_row == -1
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_is_named_and_spoils_no_other(fresh_seed, poison):
    x, weight, target = peaked(40, 32, 100, sharpness=5.0)
    target[3] = -100
    clean = lce.linear_cross_entropy(x, weight, target, reduction="none")
    x[17, 4] = poison
    loss, stats = lce.linear_cross_entropy_with_stats(x, weight, target, reduction="none")
    assert stats.bad_row == 17
    assert not torch.isfinite(loss[17])
    others = torch.arange(40) != 17
    assert torch.equal(loss[others], clean[others])
    assert torch.isnan(lce.linear_cross_entropy(x, weight, target))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_logprob_entropy_and_top1_equal_fp64(fresh_seed, shape, scale):
    T, H, V = shape
    x, weight, target = torch.randn(T, H) * scale, torch.randn(V, H), torch.randint(V, (T,))
    logprob, entropy, top1 = llp.reference(x.double(), weight.double(), target[:, None])
    plain, full = (llp.linear_logprob(x, weight, target, by_products=flag) for flag in (False, True))
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, scale**2)}
    torch.testing.assert_close(plain.logprob.double(), logprob[:, 0], **tolerance)
    torch.testing.assert_close(full.logprob.double(), logprob[:, 0], **tolerance)
    torch.testing.assert_close(full.entropy.double(), entropy, **tolerance)
    assert torch.equal(full.top1, top1)
    ids = torch.randint(V, (T, 3))
    several = llp.linear_logprob_of(x, weight, ids)
    torch.testing.assert_close(several.double(), (x @ weight.T).double().log_softmax(1).gather(1, ids), **tolerance)
    margin = llp.linear_margin(x, weight, 3, 7)
    torch.testing.assert_close(margin, x @ (weight[3] - weight[7]), rtol=1e-4, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("distance", [3e-3, 0.1])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergence_and_its_gradients_equal_fp64(
    fresh_seed, monkeypatch, shape, direction, distance, own_head, reduction
):
    monkeypatch.setattr(lkl, "CHUNK", 16)
    T, H, V = shape
    x_reference, weight = torch.randn(T, H) * 0.5, torch.randn(V, H)
    x = x_reference + distance * torch.randn(T, H)
    weight_reference = weight + 0.1 * distance * torch.randn(V, H) if own_head else None
    token_weight, upstream = torch.rand(T) + 0.1, torch.randn(T)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    other = weight64.detach() if weight_reference is None else weight_reference.double()
    rows = lkl.reference(x64, x_reference.double(), weight64, other, direction) * token_weight.double()
    x.requires_grad_(), weight.requires_grad_()
    value = lkl.linear_kl(
        x, x_reference, weight, weight_reference, direction=direction, token_weight=token_weight, reduction=reduction
    )
    if reduction == "none":
        value, expected = (value * upstream).sum(), (rows * upstream).sum()
    else:
        expected = rows.sum() / token_weight.double().sum()
    value.backward(), expected.backward()
    # A JSD is summed from rounded shares; a KL of this size is not.
    precision = 1e-3 if direction == "jsd" else 1e-4
    assert abs(value.item() - expected.item()) <= 1e-5 + precision * rows.abs().max().item()
    assert close(x.grad, x64.grad, 4e-3)
    assert close(weight.grad, weight64.grad, 4e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(
    "sharpness, distance, kl", [(6.0, 3e-4, 1e-6), (1.0, 1e-2, 1e-3), (6.0, 0.1, 0.1), (6.0, 0.2, 0.3), (1.0, 0.2, 1.0)]
)
def test_divergence_is_precise_from_a_millionth_to_a_nat(fresh_seed, direction, sharpness, distance, kl):
    """Over two thousand tokens, for unsure and for confident rows; D is some units large in the last cases."""
    x_reference, weight, _ = peaked(16, 64, 2048, sharpness)
    x = x_reference + distance * torch.randn_like(x_reference)
    x64 = x.double().requires_grad_()
    expected = lkl.reference(x64, x_reference.double(), weight.double(), direction=direction).mean()
    value = lkl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction)
    value.backward(), expected.backward()
    assert kl / 30 < expected < 10 * kl
    assert abs(value.item() - expected.item()) <= 1e-5
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    assert close(x.grad, x64.grad, 2e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("scale, distance", [(3.0, 3.0), (1.0, 1.0), (0.3, 10.0)])
def test_models_far_apart_are_as_precise(fresh_seed, direction, scale, distance):
    """Logits of 25 nats and differences of hundreds, where a difference in fp16 is off by a tenth."""
    x_reference, weight = scale * torch.randn(16, 64), torch.randn(1024, 64)
    x = x_reference + distance * torch.randn(16, 64)
    x64 = x.double().requires_grad_()
    expected = lkl.reference(x64, x_reference.double(), weight.double(), direction=direction)
    value = lkl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction, reduction="none")
    expected.sum().backward(), value.sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5)
    # Nearly all mass on one token leaves a gradient that fp32 logits cannot give: compared with what one token can.
    assert (x.grad.double() - x64.grad).norm() <= 4e-3 * x64.grad.norm() + 1e-4 * weight.norm(dim=1).max()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_divergence_of_confident_rows_is_as_precise(fresh_seed, direction):
    """Both models give one token all but a thousandth, and its D is of some size: rounded away from Δ by 5e-4, its
    gradient would be wrong by as much as all others' together."""
    weight, target = torch.randn(1024, 64), torch.randint(1024, (16,))
    x_reference = 0.1 * torch.randn(16, 64) + 0.25 * weight[target]
    x = x_reference + 0.02 * torch.randn(16, 64) + 0.04 * weight[target]
    x64 = x.double().requires_grad_()
    lkl.reference(x64, x_reference.double(), weight.double(), direction=direction).sum().backward()
    lkl.linear_kl(x.requires_grad_(), x_reference, weight, direction=direction, reduction="sum").backward()
    assert close(x.grad, x64.grad, 4e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_equal_models_differ_by_exactly_nothing(fresh_seed, direction):
    x, weight = torch.randn(35, 48) * 3, torch.randn(127, 48)
    student = x.clone().requires_grad_()
    value = lkl.linear_kl(student, x, weight, direction=direction, reduction="none")
    value.sum().backward()
    assert not value.any() and not student.grad.any()


@pytest.mark.parametrize("shape", [(0, 64), (5, 130), (3, 7, 128), (70, 1024)])
def test_norm_gate_and_rotation_equal_their_references(fresh_seed, shape):
    x, other = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape[-1], requires_grad=True)
    compare(lambda: (rms_norm.rms_norm(x, weight, 1e-6),), lambda: (rms_norm.reference(x, weight, 1e-6),), (x, weight))
    compare(
        lambda: rms_norm.add_rms_norm(x, other, weight, 1e-6),
        lambda: (rms_norm.reference(x + other, weight, 1e-6), x + other),
        (x, other, weight),
    )
    compare(lambda: (swiglu.swiglu(x, other),), lambda: (swiglu.reference(x, other),), (x, other))


@pytest.mark.parametrize("width", [5, 1025])
def test_gate_and_up_may_be_columns_of_one_product(fresh_seed, width):
    both = torch.randn(3, 2, 2 * width + 3, requires_grad=True)

    def apart(function):
        _, gate, up = both.split((3, width, width), -1)
        return (function(gate, up),)

    compare(lambda: apart(swiglu.swiglu), lambda: apart(swiglu.reference), (both,))
    assert apart(swiglu.swiglu)[0].is_contiguous()


def test_rotation_with_and_without_the_norm_equals_its_reference(fresh_seed):
    q, k = torch.randn(37, 6, 64, requires_grad=True), torch.randn(37, 2, 64, requires_grad=True)
    q_weight, k_weight = (torch.randn(64, requires_grad=True) for _ in range(2))
    angle = torch.randn(37, 32)
    cos, sin = angle.cos(), angle.sin()
    compare(lambda: (rope.rope(q, cos, sin),), lambda: (rope.reference(q, None, 0.0, cos, sin),), (q,))
    compare(
        lambda: rope.qk_norm_rope(q, k, q_weight, k_weight, 1e-6, cos, sin),
        lambda: (rope.reference(q, q_weight, 1e-6, cos, sin), rope.reference(k, k_weight, 1e-6, cos, sin)),
        (q, k, q_weight, k_weight),
    )


def compare(kernel, reference, inputs):
    """Equal outputs, and equal gradients for the same random upstream ones."""
    outputs, expected = kernel(), reference()
    upstream = [torch.randn_like(output) for output in expected]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for actual, wanted in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


def test_operators_are_registered_as_torch_wants_them():
    x, weight, target = torch.randn(9, 32), torch.randn(40, 32), torch.randint(40, (9,))
    ones = torch.ones(9)
    # The fourth of its tests takes the gradient of every output, here of gradients too, which is refused.
    once = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x.requires_grad_(), weight, target, ones, -100, 0.1, 0.0, True, True, False)
    torch.library.opcheck(lce._linear_cross_entropy, arguments, test_utils=once)
    arguments = (x, x.detach() + 0.1, weight, None, ones, "forward", True, False)
    torch.library.opcheck(lkl._linear_kl, arguments, test_utils=once)
    for by_products in (False, True):
        torch.library.opcheck(llp._linear_logprob, (x.detach(), weight, target, by_products))
    torch.library.opcheck(llp._linear_logprob_of, (x.detach(), weight, target[:, None]))
    torch.library.opcheck(checks._row_weights, (ones,))
    gain = torch.ones(32, requires_grad=True)
    for residual in (None, x.detach() + 1):
        torch.library.opcheck(rms_norm._rms_norm, (x, residual, gain, 1e-6))
    torch.library.opcheck(rms_norm._rms_norm_backward, (x.detach(), None, x.detach(), gain.detach(), ones, True))
    heads, angle = torch.randn(9, 2, 32, requires_grad=True), torch.randn(9, 16)
    for weight in (None, gain):
        torch.library.opcheck(rope._norm_rope, (heads, weight, 1e-6, angle.cos(), angle.sin()))
    rstd = torch.ones(18)
    torch.library.opcheck(
        rope._norm_rope_backward, (heads.detach(), heads.detach(), gain.detach(), angle.cos(), angle.sin(), rstd, True)
    )
    torch.library.opcheck(swiglu._swiglu, (x, torch.randn(9, 32, requires_grad=True)))
    torch.library.opcheck(swiglu._swiglu, torch.randn(9, 64).chunk(2, -1))
    torch.library.opcheck(swiglu._swiglu_backward, (x.detach(), x.detach() + 1, x.detach() + 2))


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("hidden", [16, 80])
def test_a_reference_of_another_hidden_size_is_taken_with_its_own_head(fresh_seed, direction, hidden):
    x, weight = torch.randn(20, 48) * 0.1, torch.randn(300, 48, requires_grad=True)
    x.requires_grad_()
    x_reference, weight_reference = torch.randn(20, hidden), torch.randn(300, hidden) / hidden**0.5
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = lkl.reference(x64, x_reference.double(), weight64, weight_reference.double(), direction).mean()
    value = lkl.linear_kl(x, x_reference, weight, weight_reference, direction=direction)
    value.backward(), expected.backward()
    assert abs(value.item() - expected.item()) <= 1e-3 * expected.item()
    assert close(x.grad, x64.grad, 4e-3)
    assert close(weight.grad, weight64.grad, 4e-3)


@pytest.mark.parametrize("loss", ["cross-entropy", "divergence"])
def test_memory_may_run_out_anywhere_in_a_chunk(fresh_seed, monkeypatch, loss):
    """The chunk is halved and the result is that of an untroubled run: no row of dW is counted twice."""
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK", 4)
    monkeypatch.setattr(lce, "CHUNK", 8), monkeypatch.setattr(lkl, "CHUNK", 8)
    (x, weight, target), settings = peaked(8, 16, 30, sharpness=5.0), {"label_smoothing": 0.1, "z_loss": 1e-3}
    other = x + 0.1 * torch.randn_like(x)

    def run(call):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        failure = OutOfMemoryAt(call)
        with monkeypatch.context() as patch:
            patch.setattr(lce, "_chunk_on_triton", failure.during(lce._chunk_on_triton))
            patch.setattr(lkl, "_chunk_on_triton", failure.during(lkl._chunk_on_triton))
            if loss == "divergence":
                value = lkl.linear_kl(leaves[0], other, leaves[1], direction="reverse")
            else:
                value = lce.linear_cross_entropy(*leaves, target, **settings)
        value.backward()
        return failure.fired, [value.detach(), *(leaf.grad for leaf in leaves)]

    _, expected = run(10_000)
    call = 0
    while (outcome := run(call))[0]:
        for found, wanted in zip(outcome[1], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        call += 1
    assert call > 20
