"""Activation checkpointing: every mode gives the same gradients and saves the bytes that `saved_bytes` counts.

The oracles are the gradients without checkpointing, and a memory trace of the GPU's operations on meta tensors.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import MODELS
from tests.emulation.gpu_on_meta import MemoryTrace, decoder_on_meta, on_gpu_path
from tests.support.checkpoints import make_checkpoint
from thinksafe.kernels import dispatch
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES, run_layer, saved_bytes
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.lora import attach
from thinksafe.model.weights import load_decoder

TOKENS = 2048
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_CONFIGS = {
    "paper": LoraConfig(),
    "no dropout": LoraConfig(dropout=0.0),
    "adapters everywhere": LoraConfig(target_modules=ALL_PROJECTIONS),
    "adapters everywhere, no dropout": LoraConfig(dropout=0.0, target_modules=ALL_PROJECTIONS),
    "every weight": None,
}


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_do_not_depend_on_checkpointing(tmp_path, family, method):
    """They are equal bit for bit on a CPU, dropout included."""
    decoder = load_decoder(make_checkpoint(family, tmp_path), torch.float32, "cpu")
    if method == "lora":
        attach(decoder, LoraConfig(rank=4, dropout=0.3, target_modules=ALL_PROJECTIONS), seed=0)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1)
    else:
        decoder.requires_grad_(True)
    lengths = [20, 3, 9]
    ids = torch.randint(0, 380, (sum(lengths),))
    positions = torch.cat([torch.arange(length) for length in lengths])

    def gradients(*checkpointing) -> dict[str, torch.Tensor]:
        decoder.checkpointing = checkpointing
        decoder.zero_grad()
        torch.manual_seed(5)
        decoder.train()(ids, positions, PackedAttention.of(lengths, "cpu")).square().mean().backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}

    uncheckpointed = gradients("none", "none")
    assert uncheckpointed and all(gradient.abs().max() > 0 for gradient in uncheckpointed.values())
    for checkpointing in (("selective",) * 2, ("full",) * 2, ("full", "selective"), ("selective", "none")):
        checkpointed = gradients(*checkpointing)
        assert checkpointed.keys() == uncheckpointed.keys()
        assert all(torch.equal(checkpointed[name], uncheckpointed[name]) for name in uncheckpointed), checkpointing


@pytest.mark.parametrize("namespace", ["torch_attn", "flash_attn"])
@pytest.mark.parametrize("checkpointing, calls_per_layer", [("none", 1), ("selective", 1), ("full", 2)])
def test_only_full_checkpointing_recomputes_attention(tmp_path, namespace, checkpointing, calls_per_layer):
    """The test replaces attention by an operator in the namespace of torch's or flash-attn's attention."""
    calls = []

    def forward(v: torch.Tensor) -> torch.Tensor:
        calls.append(len(v))
        return v.repeat_interleave(2, dim=1)

    attention = torch.library.custom_op(f"{namespace}::stand_in_{checkpointing}", forward, mutates_args=())
    attention.register_autograd(lambda ctx, grad: grad.unflatten(1, (-1, 2)).sum(2))
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path), torch.float32, "cpu")
    assert decoder.config.num_heads == 2 * decoder.config.num_kv_heads
    attach(decoder, LoraConfig(rank=4), seed=0)
    decoder.checkpointing = (checkpointing,) * 2
    decoder.train()(torch.arange(9), torch.arange(9), lambda layer, q, k, v, rotation: attention(v)).sum().backward()
    assert len(calls) == calls_per_layer * 2


@pytest.mark.skipif(dispatch.triton is None, reason="the GPU path needs Triton")
@pytest.mark.parametrize("config_name", LORA_CONFIGS)
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "llama-3-8b"])
@pytest.mark.parametrize("grouped_heads", [False, True])
def test_saved_bytes_equal_the_traced_bytes(name, config_name, grouped_heads):
    """The trace runs the operations of a GPU at the real shape; the two agree within 5%."""
    config = dataclasses.replace(ModelConfig.from_hugging_face(MODELS[name], name), num_layers=1)
    lora = LORA_CONFIGS[config_name]
    layer, bytes_per_token = decoder_on_meta(config, lora).layers[0], {}
    adapters = sum(2 * parameter.numel() for name, parameter in layer.named_parameters() if "lora" in name)
    with torch.device("meta"):
        cos, cu_seqlens = torch.empty(TOKENS, config.head_dim // 2), torch.empty(3, dtype=torch.int32)
    for checkpointing in CHECKPOINT_MODES:
        with on_gpu_path(grouped_heads), torch.device("meta"), MemoryTrace() as trace:
            hidden = torch.empty(TOKENS, config.hidden_size, dtype=torch.bfloat16).requires_grad_(True)
            out = run_layer(layer, checkpointing, hidden, cos, cos, PackedAttention(cu_seqlens, TOKENS), F.linear)
            # The output is the next layer's input; adapters in bf16 are saved once per step, not once per token.
            adapter_bytes = adapters if checkpointing == "none" else 0
            bytes_per_token[checkpointing] = (trace.live_bytes() - out.nbytes - adapter_bytes) / TOKENS
    names, rank, dropout = (lora.target_modules, lora.rank, lora.dropout) if lora else (None, 0, 0.0)
    expected = saved_bytes(config, names, rank, dropout, itemsize=2, grouped_heads=grouped_heads)
    assert bytes_per_token == pytest.approx(expected, rel=0.05)
