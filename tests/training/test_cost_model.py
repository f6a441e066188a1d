"""What training costs: FLOP as torch counts them, memory and traffic as a trace of the GPU's operations shows them."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import MODELS
from tests.emulation.gpu_on_meta import MemoryTrace, decoder_on_meta, on_gpu_path
from tests.support.checkpoints import make_checkpoint
from thinksafe.hardware import hardware_named
from thinksafe.kernels import dispatch
from thinksafe.model.activation_checkpointing import KEEPING
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, attach
from thinksafe.model.public_configs import PUBLIC
from thinksafe.model.weights import load_decoder
from thinksafe.training.cost_model import TrainingCosts, Work, causal_pairs
from thinksafe.training.losses import PackLoss
from thinksafe.training.memory_plan import average_pack, described, recorded_on, recorded_within, sharding_within
from thinksafe.training.packing import TrainingSequence, pack
from thinksafe.training.zero_config import ZeroConfig

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = [("q_proj", "v_proj"), ("k_proj",), ("o_proj",), ("up_proj",), ("down_proj",), ("v_proj", "down_proj"), EVERY]


LORA = LoraConfig()


def config_of(name: str, layers: int | None = None) -> ModelConfig:
    config = ModelConfig.from_hugging_face(MODELS[name], name)
    return dataclasses.replace(config, num_layers=layers or config.num_layers)


def products(decoder, tokens: int) -> dict[str, int]:
    """FLOP of a forward and backward pass, by operation, as torch counts them."""
    ids, positions = torch.randint(0, 380, (tokens,)), torch.arange(tokens)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        decoder.train()(ids, positions, PackedAttention.of([tokens], "cpu")).sum().backward()
    return {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("targets", [*TARGETS, None], ids=lambda targets: "+".join(targets) if targets else "full")
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_useful_flop_are_the_products_that_torch_computes(tmp_path, family, targets):
    """A frozen weight gets no gradient: one product more and the counts differ."""
    decoder = load_decoder(make_checkpoint(family, tmp_path), torch.float32, "cpu")
    lora = None if targets is None else LoraConfig(rank=4, target_modules=targets)
    if lora is None:
        decoder.requires_grad_(True)
    else:
        attach(decoder, lora, seed=0)
    tokens = 24
    found = products(decoder, tokens)
    counted = TrainingCosts(decoder.config, lora).useful_flop(Work(tokens, targets=0, pairs=0))
    assert counted == found["aten.mm"] + found.get("aten.addmm", 0)


def test_useful_flop_of_the_papers_models():
    """GFLOP a token at sequences of 780, counted by hand; 6N would say 3.58 for the smallest."""
    length, responses = 780, 1.0
    for name, expected in {"qwen3-0.6b": 2.68, "qwen3-1.7b": 7.19, "qwen3-4b": 16.85, "qwen3-8b": 31.05}.items():
        work = Work(length, responses * length, causal_pairs([length]))
        flop = TrainingCosts(config_of(name), LoraConfig()).useful_flop(work)
        assert flop / length / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("keeping", [("full", "full"), ("selective", "selective"), ("full", "none")])
def test_flop_that_are_repeated_are_counted(tmp_path, keeping):
    wide = {"hidden_size": 160, "intermediate_size": 256, "num_attention_heads": 6}
    decoder = load_decoder(make_checkpoint("qwen3", tmp_path, **wide), torch.float32, "cpu")
    lora, tokens = LoraConfig(rank=4, dropout=0.0), 24
    attach(decoder, lora, seed=0)
    plain = products(decoder, tokens)["aten.mm"]
    decoder.keeping = keeping
    again = products(decoder, tokens)["aten.mm"] - plain
    counted = TrainingCosts(decoder.config, lora).repeated_flop(keeping, Work(tokens, 0, 0))
    adapters = 2 * 2 * 4 * (160 + 192 + 160 + 64) * tokens  # of both layers, too small to be counted
    assert counted <= again <= counted + adapters


@pytest.mark.skipif(dispatch.triton is None, reason="the GPU path needs Triton")
@pytest.mark.parametrize(
    "modes", [("none",) * 4, ("selective",) * 4, ("full",) * 4, ("full", "selective", *["none"] * 2)]
)
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "llama-3-8b"])
@pytest.mark.parametrize("grouped_heads", [False, True])
def test_peak_and_traffic_of_the_layers_are_those_of_a_trace(name, modes, grouped_heads):
    """Forward and backward of four layers at the real shape: memory within 5%, traffic within 10%."""
    tokens, config = 8192, config_of(name, layers=4)
    decoder = decoder_on_meta(config, LoraConfig())
    costs = TrainingCosts(config, LoraConfig(), grouped_heads=grouped_heads)
    decoder.keeping = modes
    with on_gpu_path(grouped_heads), torch.device("meta"):
        ids = torch.empty(tokens, dtype=torch.int64)
        attention = PackedAttention(torch.empty(3, dtype=torch.int32), tokens)
        decoder.rotation(ids)
        with MemoryTrace() as trace:
            hidden = decoder(ids, ids, attention)
            hidden.backward(torch.empty_like(hidden))
    assert trace.peak == pytest.approx(costs.step_bytes(modes, tokens, targets=0), rel=0.05)
    assert trace.moved == pytest.approx(costs.moved_bytes(modes, tokens), rel=0.1)


def test_keeping_is_chosen_by_what_fits():
    costs = TrainingCosts(config_of("qwen3-8b"), LoraConfig())
    for gib in (4, 8, 12, 20, 40, 60, 100, 200):
        free = gib * 2**30
        chosen = costs.choose(free, 16_384)
        if chosen is None:
            assert costs.step_bytes(("full",) * 36, 16_384, 16_384) > free
            continue
        assert costs.step_bytes(chosen, 16_384, 16_384) <= free
        if set(chosen) != {"none"}:  # a layer that keeps more would not fit
            last = max(range(36), key=lambda layer: (KEEPING.index(chosen[layer]), layer))
            more = KEEPING[KEEPING.index(chosen[last]) - 1]
            assert costs.step_bytes((*chosen[:last], more, *chosen[last + 1 :]), 16_384, 16_384) > free
    assert set(costs.choose(10**13, 16_384)) == {"none"}
    assert costs.choose(0, 16_384) is None


def test_eight_billion_parameters_with_adapters_train_on_32k_tokens_in_80_gb():
    costs = TrainingCosts(config_of("qwen3-8b"), LoraConfig())
    free = hardware_named("H100").memory_bytes - costs.state_bytes()
    chosen = costs.choose(0.95 * free, 32_768)
    assert chosen is not None and described(chosen).startswith("full in ")
    assert costs.state_bytes() + costs.step_bytes(chosen, 32_768, 32_768) < 80e9


def test_passes_are_recorded_where_launches_may_bind_and_memory_is_left():
    """The paper's eight sequences, 6.2k tokens on average, of which the longest packs are computed directly."""
    hardware, none = hardware_named("H200"), ("none",) * 28

    def tokens(name: str, average: float, gib: float, lora: LoraConfig | None = LORA) -> int:
        costs = TrainingCosts(config_of(name), lora)
        keeping = ("none",) * costs.model.num_layers
        return recorded_within(gib * 2**30, hardware, costs, keeping, largest=16_384, average=average)

    limit = TrainingCosts(config_of("qwen3-0.6b"), LORA).launch_bound_tokens(hardware)
    assert tokens("qwen3-0.6b", 6200, 60) == limit and 8000 < limit < 16_384
    assert tokens("qwen3-0.6b", 6200, 20) == 0
    assert tokens("qwen3-0.6b", 16_384, 60) == 0 and tokens("qwen3-8b", 6200, 10**3) == 0
    assert tokens("qwen3-0.6b", 6200, 60, lora=None) > 6200
    costs = TrainingCosts(config_of("qwen3-0.6b"), LORA)
    assert recorded_within(10**12, hardware, costs, none, largest=3000, average=2000) == 3000
    for device, itemsize in (("cpu", 2), ("cuda", 4)):
        one = dataclasses.replace(costs, itemsize=itemsize)
        assert recorded_on(torch.device(device), one, none, largest=3000, average=2000) == 0
    held = costs.step_bytes(none, 16_384, 16_384) + costs.graph_bytes(none, limit)
    assert tokens("qwen3-0.6b", 6200, held / 2**30 + 0.01) == limit
    assert tokens("qwen3-0.6b", 6200, held / 2**30 - 0.01) == 0


def test_the_average_pack_is_the_one_of_an_epoch():
    lengths = [100, 200, 300, 400]
    assert average_pack(lengths, batch_size=2, batch_tokens=0, max_tokens=10**4) == 500
    assert average_pack(lengths, batch_size=2, batch_tokens=0, max_tokens=450) == 450
    assert average_pack(lengths, batch_size=2, batch_tokens=800, max_tokens=10**4) == 800


@pytest.mark.gpu
@pytest.mark.parametrize(
    "modes", [("none",) * 4, ("selective",) * 4, ("full",) * 4, ("full", "selective", *["none"] * 2)]
)
def test_a_step_on_a_gpu_takes_the_memory_that_is_counted_and_gives_the_same_gradients(modes):
    """Forward, loss and backward of four layers of Qwen3-0.6B: within 10%, the allocator's gaps left out."""
    config, lengths = config_of("qwen3-0.6b", layers=4), [4096, 3000, 1000, 96]
    with torch.device("cuda"):
        decoder = Decoder(config).to(torch.bfloat16)
    decoder.initialise(seed=0)
    attach(decoder, LoraConfig(), seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    sequences = [TrainingSequence(np.arange(length, dtype=np.int32), 64) for length in lengths]
    (batch,) = pack(sequences, 8192, "cuda")
    loss = PackLoss(decoder.train(), with_reference=False)

    def gradients(keeping) -> tuple[dict[str, torch.Tensor], int]:
        decoder.keeping = keeping
        decoder.zero_grad()
        torch.manual_seed(5)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(batch, False)[0].sum().backward()
        taken = torch.cuda.max_memory_allocated() - before
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}, taken

    gradients(modes)  # tables and workspaces that stay
    plain, _ = gradients(("none",) * 4)
    found, taken = gradients(modes)
    counted = TrainingCosts(config, LoraConfig()).step_bytes(modes, sum(lengths), len(batch.targets))
    assert taken == pytest.approx(counted, rel=0.1)
    assert found.keys() == plain.keys() and len(found) == 16
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max().item())


def test_weights_are_sharded_where_they_do_not_fit_or_where_that_takes_less_time():
    hardware = hardware_named("H100")
    memory = 0.95 * hardware.memory_bytes

    def stage(name: str, method: str, ranks: int, **zero) -> int:
        costs = TrainingCosts(
            ModelConfig.from_hugging_face(PUBLIC[name], name), LoraConfig() if method == "lora" else None
        )
        return sharding_within(memory, hardware, ZeroConfig(**zero), costs, 16_384, ranks).stage

    assert stage("Qwen/Qwen3-0.6B", "lora", 2) == stage("Qwen/Qwen3-8B", "lora", 8) == 1
    assert stage("Qwen/Qwen3-32B", "lora", 8) == stage("Qwen/Qwen3-8B", "full", 2) == 3
    assert stage("Qwen/Qwen3-0.6B", "lora", 2, stage=2) == 2
    # With packs of 32k tokens 8B fits either way: sharded, it computes less again, unless gathering is slow.
    costs = TrainingCosts(ModelConfig.from_hugging_face(PUBLIC["Qwen/Qwen3-8B"], "8B"), LoraConfig())
    assert costs.choose(memory - costs.state_bytes(ZeroConfig(stage=1), 8), 32_768) is not None
    for link, fastest in ((450e9, 3), (3e9, 1)):
        linked = dataclasses.replace(hardware, link_bytes_per_second=link)
        assert sharding_within(memory, linked, ZeroConfig(), costs, 32_768, 8).stage == fastest
    assert stage("Qwen/Qwen3-0.6B", "lora", 1, offload_parameters=True) == 3
