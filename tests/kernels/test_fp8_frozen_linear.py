"""Matmuls with frozen e4m3 weights: outputs and gradients of the operator and of a decoder that uses it.

The oracles are fp64, dequantized operands, the decoder without quantization, and peft. A plain run tests the reference,
TRITON_INTERPRET=1 tests the Triton kernels, and a GPU tests them compiled.
"""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.checkpoints import FAMILIES, make_checkpoint
from tests.support.combinations import combinations
from thinksafe.kernels import fp8_frozen_linear as fp8_frozen_linear_module
from thinksafe.kernels.dispatch import INTERPRETED
from thinksafe.kernels.fp8 import E4M3, dequantize, quantize
from thinksafe.kernels.fp8_frozen_linear import Fp8FrozenWeight, fp8_frozen_linear
from thinksafe.model import activation_checkpointing
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig
from thinksafe.model.lora import adapter_parameters, attach, save_adapter
from thinksafe.model.weights import load_decoder
from thinksafe.paths import expand_path
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.losses import PackLoss
from thinksafe.training.packing import pack
from thinksafe.training.sequence import TrainingSequence

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(4, 8.0, 0.0, ALL_PROJECTIONS)
SHAPES = [(1, 64, (48,)), (33, 96, (112, 32)), (70, 48, (32, 32, 64))]


def operands(T, K, sizes, device="cpu", dtype=torch.float32):
    x = torch.randn(T, K, device=device, dtype=dtype) * torch.logspace(-2, 2, T, device=device)[:, None].to(dtype)
    weights = [
        torch.randn(N, K, device=device, dtype=dtype) * torch.logspace(1, -2, N, device=device)[:, None].to(dtype)
        for N in sizes
    ]
    return x.requires_grad_(), weights, [Fp8FrozenWeight.from_fp8(quantize(weight)) for weight in weights]


@pytest.mark.parametrize(("shape", "with_bias"), combinations(SHAPES, [False, True]))
def test_both_directions_use_the_same_quantized_weights(fresh_seed, shape, with_bias):
    x, weights, frozen = operands(*shape)
    biases = [torch.randn(len(weight)) if with_bias else None for weight in weights]
    outs = fp8_frozen_linear(x, frozen, biases)
    grads = [torch.randn_like(out) * torch.logspace(-3, 1, len(out))[:, None] for out in outs]
    torch.autograd.backward(outs, grads)
    rounded_weights = [
        dequantize(frozen_weight.values, frozen_weight.scales_e8m0, torch.float64) for frozen_weight in frozen
    ]
    rounded_x = dequantize(*quantize(x.detach()), torch.float64)
    for out, weight, bias in zip(outs, rounded_weights, biases, strict=True):
        expected = rounded_x @ weight.T + (0 if bias is None else bias.double())
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    expected, exact = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for grad, frozen_weight, weight in zip(grads, frozen, weights, strict=True):
        # The quantized gradient includes the weight's scales.
        rounded_grad = dequantize(*quantize(grad, frozen_weight.scales_e8m0), torch.float64)
        expected += rounded_grad @ frozen_weight.values_transposed.double().T
        exact += grad.double() @ weight.double()
        assert torch.equal(frozen_weight.values_transposed.float(), frozen_weight.values.float().T)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    if not INTERPRETED:  # the interpreter truncates where hardware rounds
        error = (x.grad - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max() < 0.12 and error.mean() < 0.06


def test_column_scales_cause_no_rounding_error():
    """Scales are powers of two, so elements that need no rounding are exact after scaling, too."""
    x, column_scales = torch.tensor([[1.0, -3.5, 448.0, 0.0]]), torch.tensor([130, 127, 120, 140], dtype=torch.uint8)
    actual = dequantize(*quantize(x, column_scales), torch.float32)
    assert actual.tolist() == [[8.0, -3.5, 3.5, 0.0]]


def test_nan_stays_in_its_row():
    x, _, frozen = operands(3, 32, (16,))
    (out,) = fp8_frozen_linear(x, frozen, [None])
    grad = torch.ones_like(out)
    grad[1, 5] = torch.nan
    out.backward(grad)
    assert x.grad[[0, 2]].isfinite().all() and (INTERPRETED or x.grad[1].isnan().all())


@pytest.mark.skipif(INTERPRETED, reason="tests the registration, not the kernels")
def test_torch_compile_traces_one_operator():
    x, _, frozen = operands(6, 32, (16, 48))
    bias = torch.randn(16)

    def loss(rows):
        return sum(out.square().sum() for out in fp8_frozen_linear(rows, frozen, [bias, None]))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(*(torch.autograd.grad(function(x), x)[0] for function in (compiled, loss)))


def test_invalid_operands_raise_errors_that_name_them():
    x, _, frozen = operands(6, 32, (16,))
    for call, message in (
        (lambda: fp8_frozen_linear(x[:, :8], frozen, [None]), r"weights\[0\] must be .*\[16, 8\]"),
        (lambda: fp8_frozen_linear(x[0], frozen, [None]), "x must be .T, K."),
        (lambda: fp8_frozen_linear(x, frozen, [torch.zeros(8)]), r"biases\[0\] must be .*\[16\].*\[8\]"),
        (lambda: fp8_frozen_linear(x, [frozen[0]._replace(values=torch.zeros(16, 32))], [None]), "float8_e4m3fn"),
        (lambda: fp8_frozen_linear(x.long(), frozen, [None]), "x must be floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# In a decoder


without_interpreter = pytest.mark.skipif(INTERPRETED, reason="a whole decoder takes minutes in the interpreter")


def decoder_with_adapter(folder, weights, lora=LORA, dtype=torch.float32, device="cpu"):
    decoder = load_decoder(folder, dtype, device, weight_dtype=weights)
    attach(decoder, lora, seed=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_parameters(decoder).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    decoder.prepare_fp8_backward()
    return decoder.train()


def loss_and_gradient(decoder, sequences):
    (batch,) = pack(sequences, 10**6, decoder.embedding.device)
    losses, _ = PackLoss(decoder, False)(batch, False)
    loss = losses.sum() / batch.total_weight
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in adapter_parameters(decoder).values()])


def random_sequences(vocab_size, num_sequences=8, length=60):
    rng = np.random.default_rng(5)
    return [TrainingSequence(rng.integers(0, vocab_size, length).astype(np.int32), 20) for _ in range(num_sequences)]


@without_interpreter
@pytest.mark.parametrize("name", ["organism", *FAMILIES])
def test_adapter_loss_and_gradient_stay_near_full_precision(name, tmp_path):
    """Measured on random tokens: losses within 0.5%; gradients within 15% for the model organism's trained student, and
    23 to 48% for random students, whose weights vary more."""
    organism = expand_path("package:organism/bundle/model")
    folder = organism if name == "organism" else make_checkpoint(name, tmp_path, seed=11)
    fp32_decoder, fp8_decoder = (decoder_with_adapter(folder, weights) for weights in ("auto", "fp8"))
    sequences = random_sequences(fp32_decoder.config.vocab_size)
    (expected_loss, expected_gradient), (loss, gradient) = (
        loss_and_gradient(decoder, sequences) for decoder in (fp32_decoder, fp8_decoder)
    )
    error = ((gradient - expected_gradient).norm() / expected_gradient.norm()).item()
    cosine = torch.nn.functional.cosine_similarity(gradient, expected_gradient, dim=0).item()
    assert 0 < abs(loss - expected_loss) < 0.015 * expected_loss
    assert 0.01 < error < (0.2 if name == "organism" else 0.6) and cosine > (0.98 if name == "organism" else 0.8)


@without_interpreter
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_decoder_holds_base_projections_only_as_fp8_weights(tmp_path, family):
    decoder = decoder_with_adapter(make_checkpoint(family, tmp_path), "fp8")
    assert not any(name.endswith("_proj.weight") for name, _ in decoder.named_parameters())
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    for layer in decoder.layers:
        for name, (out_features, in_features, _) in decoder.config.projections.items():
            frozen_weight = layer.get_submodule(name).fp8_weight
            assert frozen_weight.values.shape == (
                out_features,
                in_features,
            ) and frozen_weight.values_transposed.shape == (
                in_features,
                out_features,
            )
            assert frozen_weight.values.dtype == frozen_weight.values_transposed.dtype == E4M3


@without_interpreter
def test_checkpointing_changes_no_gradient_and_recomputes_few_matmuls(tmp_path, monkeypatch):
    decoder = decoder_with_adapter(make_checkpoint("qwen3", tmp_path), "fp8", LoraConfig(4, 8.0, 0.3, ALL_PROJECTIONS))
    matmuls, fp8_linear, results = [], fp8_frozen_linear_module.fp8_linear, {}
    monkeypatch.setattr(
        fp8_frozen_linear_module, "fp8_linear", lambda *operands: matmuls.append(0) or fp8_linear(*operands)
    )
    monkeypatch.setattr(activation_checkpointing, "_MIN_SAVED_INNER_DIM", 8)  # every matmul of a small model is cheap
    for checkpointing in CHECKPOINT_MODES:
        decoder.checkpointing, matmuls[:] = (checkpointing,) * 2, []
        decoder.zero_grad()
        torch.manual_seed(5)
        out = decoder(torch.arange(32), torch.arange(32), PackedAttention.of([20, 12], "cpu"))
        out.square().mean().backward()
        results[checkpointing] = (
            [parameter.grad.clone() for parameter in adapter_parameters(decoder).values()],
            len(matmuls),
        )
    for checkpointing in CHECKPOINT_MODES[1:]:
        pairs = zip(results["none"][0], results[checkpointing][0], strict=True)
        assert all(torch.equal(*pair) for pair in pairs), checkpointing
    num_matmuls = {checkpointing: count for checkpointing, (_, count) in results.items()}
    # The last matmul has the gate's inner dimension, and no later operation reads its result.
    assert num_matmuls["selective"] <= num_matmuls["none"] + 2
    assert num_matmuls["full"] == num_matmuls["none"] + 2 * len(ALL_PROJECTIONS)


@without_interpreter
def test_trained_adapter_lowers_full_precision_loss_in_peft(tmp_path):
    folder = make_checkpoint("qwen3", tmp_path / "base")
    decoder, sequences = decoder_with_adapter(folder, "fp8"), random_sequences(380, 3, 30)
    engine, packs = LocalTrainer(decoder, 1.0, 0.0), pack(sequences, 64, "cpu")
    for _ in range(30):
        engine.step(packs, 1e-2)
    save_adapter(decoder, LORA, tmp_path / "adapter", str(folder))

    def mean_loss(model):
        losses = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.input_ids).long()
            logits = model(ids[None]).logits[0, sequence.num_prompt_tokens - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[sequence.num_prompt_tokens :]).item())
        return sum(losses) / len(losses)

    with torch.no_grad():
        loss_before = mean_loss(AutoModelForCausalLM.from_pretrained(folder))
        loss_after = mean_loss(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        )
    trained_loss = engine.step(packs, 1e-9).loss
    assert loss_after < loss_before - 1 and loss_after == pytest.approx(trained_loss, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "sizes"), [(1024, (2048, 1024, 1024)), (4096, (12_288, 12_288)), (12_288, (4096,))])
def test_gpu_output_and_gradient_match_fp64(fresh_seed, K, sizes):
    x, weights, frozen = operands(5000, K, sizes, "cuda", torch.bfloat16)
    outs = fp8_frozen_linear(x, frozen, [None] * len(sizes))
    grads = [torch.randn_like(out) for out in outs]
    torch.autograd.backward(outs, grads)
    exact = sum(grad.double() @ weight.double() for grad, weight in zip(grads, weights, strict=True))
    for out, weight in zip(outs, weights, strict=True):
        expected = x.detach().double() @ weight.double().T
        assert (out - expected).norm() / expected.norm() < 0.05
    assert (x.grad - exact).norm() / exact.norm() < 0.05
