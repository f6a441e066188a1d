"""Captured passes on a GPU, in bf16: they equal eager passes for every pack, and never wait for the device."""

import dataclasses
import gc

import numpy as np
import pytest
import torch

from benchmarks.shapes import MODELS
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import attach
from thinksafe.training.config import TrainingConfig
from thinksafe.training.cuda_graphs import MAX_GRAPHS
from thinksafe.training.local_trainer import LocalTrainer
from thinksafe.training.loop import train
from thinksafe.training.metrics import read_metrics
from thinksafe.training.packing import pack
from thinksafe.training.sequence import TrainingSequence

pytestmark = pytest.mark.gpu

NUM_LAYERS = 4
LORA_WITHOUT_DROPOUT = LoraConfig(dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))


def load_trainer(
    max_graph_tokens: int, lora: LoraConfig | None = LORA_WITHOUT_DROPOUT, checkpointing="none", with_reference=False
) -> LocalTrainer:
    """Return a trainer of NUM_LAYERS layers of the real shape."""
    config = ModelConfig.from_hugging_face(MODELS["qwen3-0.6b"], "qwen3-0.6b")
    decoder = Decoder(dataclasses.replace(config, num_layers=NUM_LAYERS, vocab_size=8192))
    decoder.initialize(seed=0)
    decoder.to("cuda", torch.bfloat16)
    decoder.checkpointing = (checkpointing,) * NUM_LAYERS
    if lora is None:
        decoder.requires_grad_(True)
    else:
        attach(decoder, lora, seed=0)
        with torch.no_grad():
            generator = torch.Generator("cuda").manual_seed(1)
            for name, parameter in decoder.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.02, generator=generator)
    return LocalTrainer(decoder, 1.0, 0.0, with_reference, max_graph_tokens)


def step_sequences(seed: int, with_reference=False, tokens: int = 1500) -> list[TrainingSequence]:
    """Return three sequences that sum to `tokens` tokens, split differently for every seed."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(20, tokens - 20, 20), 2, replace=False))
    return [
        TrainingSequence(rng.integers(0, 8192, length, dtype=np.int32), 8, use_reference_kl=with_reference and i == 1)
        for i, length in enumerate(np.diff([0, *cuts, tokens]))
    ]


def gradients(trainer: LocalTrainer, sequences, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    trainer.decoder.train()
    (batch,) = pack(sequences, 10**6, trainer.device)
    loss = trainer.loss(batch, batch.num_reference_rows > 0)[0].sum() / batch.total_weight
    loss.backward()
    gradients_by_name = {name: parameter.grad.float().clone() for name, parameter in trainer.parameters.items()}
    trainer.decoder.zero_grad()
    return loss.item(), gradients_by_name


def assert_close(actual, expected):
    for name, gradient in expected.items():
        difference = (actual[name] - gradient).norm() / gradient.norm()
        assert difference < 2e-2, (name, difference)


@pytest.mark.parametrize("with_reference", [False, True], ids=["cross-entropy", "KL"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [LORA_WITHOUT_DROPOUT, None], ids=["lora", "full"])
def test_replayed_pass_has_the_gradients_of_an_eager_pass(lora, checkpointing, with_reference):
    without_graphs = load_trainer(0, lora, checkpointing, with_reference)
    with_graphs = load_trainer(2048, lora, checkpointing, with_reference)
    for seed, tokens in enumerate([1500, 1480, 900, 1500, 920, 900, 3000]):
        sequences = step_sequences(seed, with_reference, tokens)
        (loss, expected), (same_loss, actual) = gradients(without_graphs, sequences), gradients(with_graphs, sequences)
        assert same_loss == pytest.approx(loss, rel=1e-3)
        assert_close(actual, expected)
    assert len(with_graphs.loss.run_decoder._captured) >= 2


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_layers_draw_the_masks_of_the_forward_pass(checkpointing):
    """Half of the inputs are dropped, so another mask would give another gradient."""
    lora = LoraConfig(dropout=0.5, target_modules=("q_proj", "v_proj", "down_proj"))
    without_graphs, with_graphs = load_trainer(0, lora), load_trainer(2048, lora, checkpointing)
    losses = []
    for seed in (1, 2, 3, 4, 3):
        # 1,536 tokens need no padding; masks depend on the shape, so both trainers must use the same one.
        (loss, expected), (same_loss, actual) = (
            gradients(trainer, step_sequences(0, tokens=1536), seed) for trainer in (without_graphs, with_graphs)
        )
        assert same_loss == pytest.approx(loss, rel=1e-3)
        assert_close(actual, expected)
        losses.append(same_loss)
    assert len(set(losses)) == 4 and losses[4] == losses[2]
    assert [gradients(with_graphs, step_sequences(0, tokens=1536), 3)[0] for _ in range(2)] == [losses[2]] * 2


def test_replayed_pass_never_synchronizes():
    with_graphs = load_trainer(2048, LoraConfig())
    for _ in range(2):
        gradients(with_graphs, step_sequences(0))
    (batch,) = pack(step_sequences(1), 10**6, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_graphs.loss(batch, False)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_of_many_sizes_share_memory():
    """Twenty sizes hold hardly more memory than the largest size, which is captured first."""
    with_graphs = load_trainer(4096)
    for _ in range(2):
        gradients(with_graphs, step_sequences(0, tokens=4096))
    gc.collect()
    torch.cuda.empty_cache()
    reserved_for_largest = torch.cuda.memory_reserved()
    for tokens in range(1024, 4096, 160):
        for seed in range(2):
            gradients(with_graphs, step_sequences(seed, tokens=tokens))
    gc.collect()
    torch.cuda.empty_cache()
    assert 12 < len(with_graphs.loss.run_decoder._captured) <= MAX_GRAPHS
    assert torch.cuda.memory_reserved() < 1.25 * reserved_for_largest


@pytest.mark.parametrize("killed_at", [3, 7])
def test_capture_works_beside_prefetch_and_after_resume(tmp_path, killed_at):
    """The losses agree as closely as those of two identical runs on a GPU."""
    sequences = [sequence for seed in range(12) for sequence in step_sequences(seed, seed % 2 == 0, 1500)]
    config = TrainingConfig(epochs=2, batch_size=3, checkpoint_every=2, learning_rate=1e-4, max_tokens_per_pack=1100)

    class Killed(BaseException):
        pass

    def losses_of_run(name: str, max_graph_tokens: int, until: int | None = None) -> list[float]:
        def on_step(metrics):
            if metrics.step == until:
                raise Killed

        trainer = load_trainer(max_graph_tokens, LoraConfig(), with_reference=True)
        try:
            train(trainer, sequences, config, 7, tmp_path / name, on_step)
        except Killed:
            return []
        return [metrics.loss for metrics in read_metrics(tmp_path / name / "metrics.jsonl")]

    whole = losses_of_run("whole", 2048)
    assert len(whole) == 24
    assert losses_of_run("killed", 2048, killed_at) == []
    assert losses_of_run("killed", 2048) == pytest.approx(whole, rel=2e-3)
