"""The plain PyTorch form of every operation is right; the oracle is a loop in fp64, autograd, or transformers."""

import inspect
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.support.kernel_calls import CALLS
from tests.support.out_of_memory import OutOfMemoryAt
from thinksafe.kernels import chunked_loss
from thinksafe.kernels import linear_cross_entropy as linear_cross_entropy_module
from thinksafe.kernels import linear_kl as linear_kl_module
from thinksafe.kernels import linear_logprob as linear_logprob_module
from thinksafe.kernels import packed_attention as packed_attention_module
from thinksafe.kernels.linear_cross_entropy import linear_cross_entropy
from thinksafe.kernels.packed_attention import packed_attention
from thinksafe.kernels.packed_attention import reference as packed_attention_reference
from thinksafe.kernels.rms_norm import rms_norm
from thinksafe.kernels.rope import inverse_frequencies, rope
from thinksafe.kernels.swiglu import swiglu


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Linear cross-entropy


def cross_entropy_case(num_tokens: int, dtype=torch.float32):
    x, weight = randn(num_tokens, 24, seed=1, dtype=dtype), randn(50, 24, seed=2, dtype=dtype)
    return x, weight, torch.randint(0, 50, (num_tokens,), generator=torch.Generator().manual_seed(3))


def exact_cross_entropy(x, weight, target):
    """Return value and gradients in fp64 by autograd, from full logits."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(x @ weight.T, target, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 24, 30])
@pytest.mark.parametrize("trains", ["x", "weight", "both"])
def test_cross_entropy_and_gradients_equal_fp64(monkeypatch, num_tokens, trains):
    """Chunks have 8 tokens; the last one is full or partial. The head is frozen or trainable."""
    monkeypatch.setattr(linear_cross_entropy_module, "REFERENCE_CHUNK_ROWS", 8)
    x, weight, target = cross_entropy_case(num_tokens)
    value, grad_x, grad_weight = exact_cross_entropy(x, weight, target)
    x.requires_grad_(trains != "weight")
    weight.requires_grad_(trains != "x")
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)
    (loss * 0.37).backward()
    for tensor, grad in ((x, grad_x), (weight, grad_weight)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), 0.37 * grad, rtol=1e-4, atol=1e-5)
        else:
            assert tensor.grad is None


def test_upstream_gradient_of_each_row_reaches_the_head():
    """With reduction `none` each row has a different upstream gradient, and dW is a sum over rows."""
    x, weight, target = cross_entropy_case(9)
    grad_output = torch.linspace(0.5, 3, 9)
    grads = []
    for settings in ({"token_weight": grad_output, "reduction": "sum"}, {"reduction": "none"}):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, target, **settings)
        grads.append(torch.autograd.grad((loss * grad_output).sum() if loss.dim() else loss, leaves))
    for weighted, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(weighted, expected)


def test_cross_entropy_of_no_tokens_is_zero():
    x, weight, target = cross_entropy_case(0)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, 24)
    assert (weight.grad == 0).all()


def test_cross_entropy_without_leaves_requires_no_gradient():
    x, weight, target = cross_entropy_case(5)
    assert not linear_cross_entropy(x, weight, target, reduction="sum").requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, target, reduction="sum").requires_grad


def test_bf16_cross_entropy_is_accurate_and_keeps_dtypes():
    x, weight, target = cross_entropy_case(40, torch.bfloat16)
    value, grad_x, grad_weight = exact_cross_entropy(x, weight, target)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert abs(loss.item() / value.item() - 1) < 0.01
    for actual, exact in ((x.grad, grad_x), (weight.grad, grad_weight)):
        assert (actual.double() - exact).norm() < 0.02 * exact.norm()


def test_cross_entropy_is_exact_for_huge_logits():
    x, weight, target = cross_entropy_case(6)
    value, grad_x, _ = exact_cross_entropy(100 * x, weight, target)
    x = (100 * x).requires_grad_()
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-3, atol=1e-3)


# Linear KL and what the losses share


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("hidden", [24, 40])
def test_divergence_and_gradients_equal_fp64(monkeypatch, direction, hidden):
    """Chunks have 8 rows. The reference has the same or a larger hidden size, and a separate head."""
    monkeypatch.setattr(linear_kl_module, "REFERENCE_CHUNK_ROWS", 8)
    x, weight = randn(20, 24, seed=1).requires_grad_(), randn(50, 24, seed=2).requires_grad_()
    x_reference, weight_reference = randn(20, hidden, seed=3), randn(50, hidden, seed=4)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p_student = (x64 @ weight64.T).log_softmax(-1)
    log_p_reference = (x_reference.double() @ weight_reference.double().T).log_softmax(-1)
    log_p, log_q = log_p_reference, log_p_student
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()  # the definition
    value = linear_kl_module.linear_kl(x, x_reference, weight, weight_reference, direction=direction)
    value.backward(), expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross-entropy", "divergence"])
def test_out_of_memory_in_a_chunk_does_not_change_results(monkeypatch, loss):
    """The chunk is halved, and results equal those of a run with enough memory: dW counts no row twice."""
    module = linear_cross_entropy_module if loss == "cross-entropy" else linear_kl_module
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(module, "REFERENCE_CHUNK_ROWS", 8)
    x, weight, target = cross_entropy_case(20)

    def run(failing_call):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        failure = OutOfMemoryAt(failing_call)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_chunk_on_reference", failure.wrap(module._chunk_on_reference))
            if loss == "divergence":
                value = linear_kl_module.linear_kl(leaves[0], x.flip(0), leaves[1])
            else:
                value = linear_cross_entropy(*leaves, target)
        value.backward()
        return failure.has_raised, [value.detach(), *(leaf.grad for leaf in leaves)]

    _, expected = run(10_000)
    failing_call = 0
    while (outcome := run(failing_call))[0]:
        for actual, expected_tensor in zip(outcome[1], expected, strict=True):
            torch.testing.assert_close(actual, expected_tensor, rtol=1e-5, atol=1e-6)
        failing_call += 1
    assert failing_call > 20


def test_lasting_out_of_memory_raises_an_error():
    def run(rows):
        sizes.append(rows.stop - rows.start)
        raise torch.OutOfMemoryError("injected")

    sizes = []
    with pytest.raises(torch.OutOfMemoryError):
        chunked_loss.map_chunks(2000, 1024, run)
    assert sizes == [1024, 512, 256, 128]


def test_first_bad_row_is_returned():
    rows = torch.tensor([0.0, 1.0, math.inf, 2.0, math.nan])
    assert chunked_loss.first_bad_row(rows) == 2
    assert chunked_loss.first_bad_row(rows[3:]) == 1
    assert chunked_loss.first_bad_row(rows[:2]) == -1
    assert chunked_loss.first_bad_row(rows[:0]) == -1


# Packed attention


def exact_attention(q, k, v) -> torch.Tensor:
    """Return causal attention of one sequence, head by head and query by query, in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(len(q)):
        heads = []
        for h in range(q.shape[1]):
            keys, values = k[: t + 1, h // group], v[: t + 1, h // group]
            heads.append((keys @ q[t, h] / math.sqrt(q.shape[-1])).softmax(-1) @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def exact_packed_attention(q, k, v, lengths) -> torch.Tensor:
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([exact_attention(*part) for part in parts])


def attention_case(lengths, num_heads, num_kv_heads, head_dim, dtype=torch.float32):
    total = sum(lengths)
    q = randn(total, num_heads, head_dim, seed=4, dtype=dtype)
    k, v = (randn(total, num_kv_heads, head_dim, seed=seed, dtype=dtype) for seed in (5, 6))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[1], [9], [1, 1, 1], [5, 1, 12], [3, 16, 2, 7]])
def test_packed_attention_and_gradients_equal_fp64_loop(lengths, num_heads, num_kv_heads):
    q, k, v, cu_seqlens = attention_case(lengths, num_heads, num_kv_heads, 8)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    grad_output = randn(*q.shape, seed=7)
    out = packed_attention(*inputs, cu_seqlens, max(lengths))
    exact = exact_packed_attention(*exact_inputs, lengths)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, inputs, grad_output)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad_output.double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("backend", ["torch 2.11", "torch 2.12", "flash-attn"])
def test_flash_attention_gets_grouped_or_repeated_heads(monkeypatch, backend, num_heads, num_kv_heads):
    """The library's function is replaced by attention that checks its arguments: heads, causal, lengths."""
    grouped_heads = backend != "torch 2.11"
    lengths = [5, 1, 12]
    *inputs, cu_seqlens = attention_case(lengths, num_heads, num_kv_heads, 8)

    def varlen_of_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert cu_q.tolist() == cu_k.tolist() == [0, 5, 6, 18] and max_q == max_k == 12
        assert window_size == (-1, 0)
        assert k.shape[1] == v.shape[1] == (num_kv_heads if grouped_heads else num_heads)
        return packed_attention_reference(q, k, v, cu_q)

    def varlen_of_torch_2_12(*arguments, enable_gqa=False, **settings):
        assert enable_gqa
        return varlen_of_torch_2_11(*arguments, **settings)

    def varlen_of_flash_attn(*arguments, causal=False):
        assert causal
        return varlen_of_torch_2_11(*arguments, window_size=(-1, 0))

    varlen = varlen_of_torch_2_12 if grouped_heads else varlen_of_torch_2_11
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen if "torch" in backend else None)
    package = SimpleNamespace(flash_attn_varlen_func=varlen_of_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", package if backend == "flash-attn" else None)
    monkeypatch.setattr(packed_attention_module, "HAS_FLASH_ATTN", backend == "flash-attn")
    monkeypatch.setattr(packed_attention_module, "TORCH_READS_GROUPED_HEADS", backend == "torch 2.12")
    actual = packed_attention_module.flash_attention(*inputs, cu_seqlens, 12)
    torch.testing.assert_close(actual, packed_attention(*inputs, cu_seqlens, 12))
    assert packed_attention_module.supports_grouped_heads(torch.bfloat16) == grouped_heads
    assert not packed_attention_module.supports_grouped_heads(torch.float32)


def test_grouped_heads_are_used_if_torch_supports_them():
    parameters = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert ("enable_gqa" in parameters) == packed_attention_module.TORCH_READS_GROUPED_HEADS


@pytest.mark.parametrize("name", CALLS)
def test_operations_compile_in_one_graph(name):
    """Forward and backward. Code that reads values (the range of ids) must be in registered operators."""
    x, weight = torch.randn(9, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    target = torch.randint(50, (9,))
    expected = CALLS[name](x, weight, target)
    torch._dynamo.reset()
    actual = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(x, weight, target)
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    if expected.requires_grad:
        expected_gradients = torch.autograd.grad(expected.sum(), (x, weight), allow_unused=True)
        gradients = torch.autograd.grad(actual.sum(), (x, weight), allow_unused=True)
        for actual_gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert (actual_gradient is None) == (expected_gradient is None)
            torch.testing.assert_close(actual_gradient, expected_gradient)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_does_not_change_results(name):
    """Under autocast torch would compute matmuls in bf16, which changes logits by 0.2 nats."""
    x, weight = torch.randn(9, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    target = torch.randint(50, (9,))

    def results():
        out = CALLS[name](x, weight, target)
        grads = torch.autograd.grad(out.sum(), (x, weight), allow_unused=True) if out.requires_grad else ()
        return [out.detach(), *(grad for grad in grads if grad is not None)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = results()
    for actual, expected_tensor in zip(under_autocast, expected, strict=True):
        assert actual.dtype == expected_tensor.dtype and torch.equal(actual, expected_tensor)


@pytest.mark.parametrize("score", ["log-probability", "entropy", "log-probabilities of given ids"])
def test_scoring_continues_with_fewer_rows_after_out_of_memory(monkeypatch, score):
    x, weight, target = torch.randn(20, 32), torch.randn(50, 32), torch.randint(50, (20,))
    expected = CALLS[score](x, weight, target)
    monkeypatch.setattr(chunked_loss, "MIN_CHUNK_ROWS", 4)
    log_softmax = torch.Tensor.log_softmax

    def log_softmax_of_few_rows(logits, dim):
        if len(logits) > 5:
            raise torch.OutOfMemoryError("injected")
        return log_softmax(logits, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", log_softmax_of_few_rows)
    monkeypatch.setattr(linear_logprob_module, "_REFERENCE_CHUNK_ROWS", 16)
    torch.testing.assert_close(CALLS[score](x, weight, target), expected)
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda logits, dim: log_softmax_of_few_rows(logits.repeat(6, 1), dim)
    )
    with pytest.raises(torch.OutOfMemoryError):
        CALLS[score](x, weight, target)


def test_statistics_require_no_gradient():
    x = torch.randn(9, 32, requires_grad=True)
    _, stats = linear_cross_entropy(x, torch.randn(50, 32), torch.arange(9), return_stats=True)
    assert not any(figure.requires_grad for figure in stats)


def test_packed_sequences_do_not_attend_to_neighbors():
    lengths = [6, 9, 4]
    q, k, v, cu_seqlens = attention_case(lengths, 4, 2, 8)
    out = packed_attention(q, k, v, cu_seqlens, 9)
    k[6:15], v[6:15] = torch.nan, torch.nan
    out_with_nan = packed_attention(q, k, v, cu_seqlens, 9)
    assert torch.equal(out_with_nan[:6], out[:6]) and torch.equal(out_with_nan[15:], out[15:])


# Rotary embedding, norm, activation


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "large base": {"rope_type": "default", "rope_theta": 5_000_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_embedding_equals_transformers(name, head_dim):
    """Positions go up to 100,000, where angles are precise only in fp32."""
    parameters = ROPES[name]
    config = AutoConfig.for_model(
        "llama", hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters
    )
    llama_rope = LlamaRotaryEmbedding(config)
    scaling = parameters if name == "llama3" else None
    inv_freq = inverse_frequencies(head_dim, parameters["rope_theta"], scaling)
    torch.testing.assert_close(inv_freq, llama_rope.inv_freq, rtol=1e-6, atol=0)

    positions = torch.tensor([0, 1, 2, 500, 8191, 40_000, 99_999])
    q, k = randn(7, 4, head_dim, seed=8), randn(7, 2, head_dim, seed=9)
    cos, sin = llama_rope(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    angles = positions[:, None].float() * llama_rope.inv_freq
    for x, rotated in zip((q, k), expected, strict=True):
        out = rope(x, angles.cos(), angles.sin())
        torch.testing.assert_close(out, rotated[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_only_on_distance():
    q, k = randn(1, 1, 32, seed=10).expand(6, -1, -1), randn(1, 1, 32, seed=11).expand(6, -1, -1)
    angles = torch.tensor([0.0, 3, 50, 51, 101, 104])[:, None] * inverse_frequencies(32, 10_000.0)
    q, k = rope(q, angles.cos(), angles.sin())[:, 0], rope(k, angles.cos(), angles.sin())[:, 0]
    scores = q @ k.T
    torch.testing.assert_close(scores[1, 0], scores[5, 4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[4, 2], scores[3, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 32), (0, 64)])
def test_rms_norm_equals_transformers_bit_for_bit(shape, dtype):
    llama_norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    llama_norm.weight.data.copy_(randn(shape[-1], seed=12) + 1)
    x = randn(*shape, seed=13, dtype=dtype) * 3
    out = rms_norm(x, llama_norm.weight, 1e-5)
    assert out.dtype == dtype
    assert torch.equal(out, llama_norm(x))


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_swiglu_is_silu_of_the_gate_times_up():
    gate, up = randn(4, 10, seed=14), randn(4, 10, seed=15)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (8, 2)])
def test_packed_attention_on_gpu_equals_fp64_reference(num_heads, num_kv_heads, head_dim):
    """The error is below 2% in bf16, which uses FlashAttention, and below 1e-4 in fp32, which uses the reference."""
    lengths = [1, 130, 64, 7, 300]
    q, k, v, cu_seqlens = attention_case(lengths, num_heads, num_kv_heads, head_dim)
    grad_output = randn(*q.shape, seed=7)

    def run(attention, dtype, device):
        inputs = [x.bfloat16().to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, cu_seqlens.to(device), max(lengths))
        grads = torch.autograd.grad(out, inputs, grad_output.bfloat16().to(device, dtype))
        return [x.detach().double().cpu() for x in (out, *grads)]

    exact = run(lambda *inputs: packed_attention_reference(*inputs[:-1]), torch.float64, "cpu")
    for actual, expected in zip(run(packed_attention, torch.bfloat16, "cuda"), exact, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).norm() < 0.02 * expected.norm()
    for actual, expected in zip(run(packed_attention, torch.float32, "cuda"), exact, strict=True):
        assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.gpu
def test_bf16_cross_entropy_on_gpu_is_accurate():
    x, weight, target = cross_entropy_case(3000, torch.bfloat16)
    value, grad_x, grad_weight = exact_cross_entropy(x, weight, target)
    on_gpu = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    loss = linear_cross_entropy(*on_gpu, target.cuda(), reduction="sum")
    loss.backward()
    assert abs(loss.item() / value.item() - 1) < 0.01
    for tensor, exact in zip(on_gpu, (grad_x, grad_weight), strict=True):
        assert (tensor.grad.double().cpu() - exact).norm() < 0.02 * exact.norm()
