"""Cost model: FLOPs as torch counts them, memory and traffic as in a trace of the GPU's operations."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import MODELS
from tests.emulation.gpu_on_meta import MemoryTrace, decoder_on_meta, on_gpu_path
from tests.support.checkpoints import make_checkpoint
from thinksafe.errors import UserError
from thinksafe.hardware import hardware_named
from thinksafe.kernels import dispatch
from thinksafe.model.activation_checkpointing import CHECKPOINT_MODES
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach
from thinksafe.model.public_configs import PUBLIC_CONFIGS
from thinksafe.model.weights import load_decoder
from thinksafe.training.config import ZeroConfig
from thinksafe.training.cost_model import TokenCounts, TrainingCosts, causal_pairs
from thinksafe.training.losses import PackLoss
from thinksafe.training.memory_plan import (
    DeviceMemory,
    choose_checkpointing,
    choose_max_cuda_graph_tokens,
    choose_zero_stage,
    describe_checkpointing,
    pack_sizes,
)
from thinksafe.training.packing import pack
from thinksafe.training.sequence import TrainingSequence

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = [
    ("q_proj", "v_proj"),
    ("k_proj",),
    ("o_proj",),
    ("up_proj",),
    ("down_proj",),
    ("v_proj", "down_proj"),
    ALL_PROJECTIONS,
]


LORA = LoraConfig()


def config_of(name: str, layers: int | None = None) -> ModelConfig:
    config = ModelConfig.from_hugging_face(MODELS[name], name)
    return dataclasses.replace(config, num_layers=layers or config.num_layers)


def matmul_flops(decoder, tokens: int) -> dict[str, int]:
    """Return the FLOPs of a forward and backward pass by operation, as torch counts them."""
    ids, positions = torch.randint(0, 380, (tokens,)), torch.arange(tokens)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        decoder.train()(ids, positions, PackedAttention.of([tokens], "cpu")).sum().backward()
    return {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("targets", [*TARGETS, None], ids=lambda targets: "+".join(targets) if targets else "full")
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_model_flops_equal_the_matmuls_that_torch_counts(tmp_path, family, targets):
    """A frozen weight gets no gradient; a single extra matmul would make the counts differ."""
    decoder = load_decoder(make_checkpoint(family, tmp_path), torch.float32, "cpu")
    lora = None if targets is None else LoraConfig(rank=4, target_modules=targets)
    if lora is None:
        decoder.requires_grad_(True)
    else:
        attach(decoder, lora, seed=0)
    tokens = 24
    flops = matmul_flops(decoder, tokens)
    counted = TrainingCosts(decoder.config, lora).model_flops(TokenCounts(tokens, targets=0, causal_pairs=0))
    assert counted == flops["aten.mm"] + flops.get("aten.addmm", 0)


def test_model_flops_of_paper_models_match_hand_count():
    """GFLOP per token for sequences of 780 tokens, counted by hand; 6N would give 3.58 for the smallest model."""
    length, responses = 780, 1.0
    for name, expected in {"qwen3-0.6b": 2.68, "qwen3-1.7b": 7.19, "qwen3-4b": 16.85, "qwen3-8b": 31.05}.items():
        counts = TokenCounts(length, responses * length, causal_pairs([length]))
        flop = TrainingCosts(config_of(name), LoraConfig()).model_flops(counts)
        assert flop / length / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("checkpointing", [("full", "full"), ("selective", "selective"), ("full", "none")])
def test_recompute_flops_match_torch_counts(tmp_path, checkpointing):
    wide = {"hidden_size": 160, "intermediate_size": 256, "num_attention_heads": 6}
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, **wide), torch.float32, "cpu")
    lora, tokens = LoraConfig(rank=4, dropout=0.0), 24
    attach(decoder, lora, seed=0)
    plain = matmul_flops(decoder, tokens)["aten.mm"]
    decoder.checkpointing = checkpointing
    recomputed = matmul_flops(decoder, tokens)["aten.mm"] - plain
    counted = TrainingCosts(decoder.config, lora).recompute_flops(checkpointing, TokenCounts(tokens, 0, 0))
    adapters = 2 * 2 * 4 * (160 + 192 + 160 + 64) * tokens  # adapters of both layers, which the cost model neglects
    assert counted <= recomputed <= counted + adapters


@pytest.mark.skipif(dispatch.triton is None, reason="the GPU path needs Triton")
@pytest.mark.parametrize(
    "modes", [("none",) * 4, ("selective",) * 4, ("full",) * 4, ("full", "selective", *["none"] * 2)]
)
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "llama-3-8b"])
@pytest.mark.parametrize("grouped_heads", [False, True])
def test_peak_memory_and_traffic_of_layers_match_a_trace(name, modes, grouped_heads):
    """Forward and backward pass of four layers at the real shape: memory within 5%, traffic within 10%."""
    tokens, config = 8192, config_of(name, layers=4)
    decoder = decoder_on_meta(config, LoraConfig())
    costs = TrainingCosts(config, LoraConfig(), grouped_heads=grouped_heads)
    decoder.checkpointing = modes
    with on_gpu_path(grouped_heads), torch.device("meta"):
        ids = torch.empty(tokens, dtype=torch.int64)
        attention = PackedAttention(torch.empty(3, dtype=torch.int32), tokens)
        decoder.rotation(ids)
        with MemoryTrace() as trace:
            hidden = decoder(ids, ids, attention)
            hidden.backward(torch.empty_like(hidden))
    assert trace.peak_bytes == pytest.approx(costs.pack_bytes(modes, tokens, targets=0), rel=0.05)
    assert trace.moved_bytes == pytest.approx(costs.elementwise_bytes(modes, tokens), rel=0.1)


def test_checkpointing_recomputes_no_more_than_memory_requires():
    costs = TrainingCosts(config_of("qwen3-8b"), LoraConfig())
    for gib in (4, 8, 12, 20, 40, 60, 100, 200):
        free = gib * 2**30
        chosen = costs.checkpointing_within(free, 16_384)
        if chosen is None:
            assert costs.pack_bytes(("full",) * 36, 16_384, 16_384) > free
            continue
        assert costs.pack_bytes(chosen, 16_384, 16_384) <= free
        if set(chosen) != {"none"}:  # with less recomputation in one layer the pack would not fit
            last = max(range(36), key=lambda layer: (CHECKPOINT_MODES.index(chosen[layer]), layer))
            less_recompute = CHECKPOINT_MODES[CHECKPOINT_MODES.index(chosen[last]) - 1]
            assert costs.pack_bytes((*chosen[:last], less_recompute, *chosen[last + 1 :]), 16_384, 16_384) > free
    assert set(costs.checkpointing_within(10**13, 16_384)) == {"none"}
    assert costs.checkpointing_within(0, 16_384) is None


def test_8b_lora_trains_on_32k_token_packs_in_80_gb():
    costs = TrainingCosts(config_of("qwen3-8b"), LoraConfig())
    free = hardware_named("H100").memory_bytes - costs.state_bytes()
    chosen = costs.checkpointing_within(0.95 * free, 32_768)
    assert chosen is not None and describe_checkpointing(chosen).startswith("full in ")
    assert costs.state_bytes() + costs.pack_bytes(chosen, 32_768, 32_768) < 80e9


def test_launch_bound_passes_become_graphs_if_memory_allows():
    """The paper's steps of eight sequences have 6.2k tokens on average; their longest packs run eagerly."""
    hardware, none = hardware_named("H200"), ("none",) * 28

    def memory(free_bytes: float, costs: TrainingCosts) -> DeviceMemory:
        """Return a GPU with `free_bytes` beside the optimizer state."""
        return DeviceMemory(math.inf, free_bytes + costs.optimizer_bytes(), hardware)

    def tokens(name: str, average: float, gib: float, lora: LoraConfig | None = LORA) -> int:
        costs = TrainingCosts(config_of(name), lora)
        checkpointing = ("none",) * costs.model.num_layers
        return choose_max_cuda_graph_tokens(
            memory(gib * 2**30, costs), costs, checkpointing, max_pack=16_384, mean_pack=average
        )

    limit = TrainingCosts(config_of("qwen3-0.6b"), LORA).launch_bound_tokens(hardware)
    assert tokens("qwen3-0.6b", 6200, 60) == limit and 8000 < limit < 16_384
    assert tokens("qwen3-0.6b", 6200, 20) == 0
    assert tokens("qwen3-0.6b", 16_384, 60) == 0 and tokens("qwen3-8b", 6200, 10**3) == 0
    assert tokens("qwen3-0.6b", 6200, 60, lora=None) > 6200
    costs = TrainingCosts(config_of("qwen3-0.6b"), LORA)
    assert choose_max_cuda_graph_tokens(memory(10**12, costs), costs, none, max_pack=3000, mean_pack=2000) == 3000
    in_fp32 = dataclasses.replace(costs, itemsize=4)
    for device, variant in ((DeviceMemory.of(torch.device("cpu")), costs), (memory(10**12, in_fp32), in_fp32)):
        assert choose_max_cuda_graph_tokens(device, variant, none, max_pack=3000, mean_pack=2000) == 0
    required = costs.pack_bytes(none, 16_384, 16_384) + costs.cuda_graph_bytes(none, limit)
    assert tokens("qwen3-0.6b", 6200, required / 2**30 + 0.01) == limit
    assert tokens("qwen3-0.6b", 6200, required / 2**30 - 0.01) == 0


def test_pack_sizes_are_largest_and_mean_over_an_epoch():
    lengths = [100, 200, 300, 400]
    assert pack_sizes(lengths, batch_size=2, tokens_per_step=0, max_tokens=10**4) == (700, 500)
    assert pack_sizes(lengths, batch_size=2, tokens_per_step=0, max_tokens=450) == (450, 450)
    assert pack_sizes(lengths, batch_size=2, tokens_per_step=800, max_tokens=10**4) == (800, 800)
    assert pack_sizes(lengths, batch_size=2, tokens_per_step=0, max_tokens=300) == (400, 300)


def test_checkpointing_on_a_cpu_saves_everything_unless_set():
    costs = TrainingCosts(config_of("qwen3-0.6b"), LORA)
    cpu = DeviceMemory.of(torch.device("cpu"))
    assert set(choose_checkpointing(cpu, "auto", costs, 10**9)) == {"none"}
    assert choose_checkpointing(cpu, "full", costs, 10**9) == ("full",) * 28
    with pytest.raises(UserError, match=r"a pack of 16,384 tokens takes .* and the GPU has 0.0 GiB free"):
        choose_checkpointing(DeviceMemory(10**9, 10**7, hardware_named("H200")), "auto", costs, 16_384)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "modes", [("none",) * 4, ("selective",) * 4, ("full",) * 4, ("full", "selective", *["none"] * 2)]
)
def test_gpu_step_uses_counted_memory_and_keeps_gradients(modes):
    """Forward, loss and backward of four layers of Qwen3-0.6B: within 10%, without allocator fragmentation."""
    config, lengths = config_of("qwen3-0.6b", layers=4), [4096, 3000, 1000, 96]
    with torch.device("cuda"):
        decoder = Decoder(config).to(torch.bfloat16)
    decoder.initialize(seed=0)
    attach(decoder, LoraConfig(), seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    sequences = [TrainingSequence(np.arange(length, dtype=np.int32), 64) for length in lengths]
    (batch,) = pack(sequences, 8192, "cuda")
    loss = PackLoss(decoder.train(), with_reference=False)

    def gradients(checkpointing) -> tuple[dict[str, torch.Tensor], int]:
        decoder.checkpointing = checkpointing
        decoder.zero_grad()
        torch.manual_seed(5)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(batch, False)[0].sum().backward()
        peak_bytes = torch.cuda.max_memory_allocated() - before
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}, peak_bytes

    gradients(modes)  # allocates tables and workspaces that stay
    plain, _ = gradients(("none",) * 4)
    actual, peak_bytes = gradients(modes)
    counted = TrainingCosts(config, LoraConfig()).pack_bytes(modes, sum(lengths), len(batch.targets))
    assert peak_bytes == pytest.approx(counted, rel=0.1)
    assert actual.keys() == plain.keys() and len(actual) == 16
    for name, gradient in plain.items():
        torch.testing.assert_close(actual[name], gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max().item())


def test_weights_are_sharded_if_needed_or_faster():
    hardware = hardware_named("H100")
    memory = 0.95 * hardware.memory_bytes
    gpu = DeviceMemory(memory, memory, hardware)

    def stage(name: str, method: str, ranks: int, **zero) -> int:
        costs = TrainingCosts(
            ModelConfig.from_hugging_face(PUBLIC_CONFIGS[name], name), LoraConfig() if method == "lora" else None
        )
        return choose_zero_stage(gpu, ZeroConfig(**zero), costs, 16_384, ranks).stage

    assert stage("Qwen/Qwen3-0.6B", "lora", 2) == stage("Qwen/Qwen3-8B", "lora", 8) == 1
    assert stage("Qwen/Qwen3-32B", "lora", 8) == stage("Qwen/Qwen3-8B", "full", 2) == 3
    assert stage("Qwen/Qwen3-0.6B", "lora", 2, stage=2) == 2
    # With packs of 32k tokens 8B fits either way. Sharding saves recomputation and is faster, unless the link is slow.
    costs = TrainingCosts(ModelConfig.from_hugging_face(PUBLIC_CONFIGS["Qwen/Qwen3-8B"], "8B"), LoraConfig())
    assert costs.checkpointing_within(memory - costs.state_bytes(ZeroConfig(stage=1), 8), 32_768) is not None
    for link, fastest in ((450e9, 3), (3e9, 1)):
        with_link = gpu._replace(hardware=dataclasses.replace(hardware, link_bytes_per_second=link))
        assert choose_zero_stage(with_link, ZeroConfig(), costs, 32_768, 8).stage == fastest
    assert stage("Qwen/Qwen3-0.6B", "lora", 1, offload_parameters=True) == 3
