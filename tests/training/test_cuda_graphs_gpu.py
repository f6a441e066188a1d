"""Recorded passes on a GPU, in bf16: the step that is not recorded, whatever is in a pack, without a wait."""

import dataclasses
import gc

import numpy as np
import pytest
import torch

from benchmarks.shapes import MODELS
from thinksafe.model.config import ModelConfig
from thinksafe.model.decoder import Decoder
from thinksafe.model.lora import LoraConfig, attach
from thinksafe.training.cuda_graphs import MOST_GRAPHS
from thinksafe.training.local_engine import SingleEngine
from thinksafe.training.loop import TrainingConfig, read_metrics, train
from thinksafe.training.packing import TrainingSequence, pack

pytestmark = pytest.mark.gpu

LAYERS = 4
NO_DROPOUT = LoraConfig(dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))


def made(recorded: int, lora: LoraConfig | None = NO_DROPOUT, keeping="none", with_reference=False) -> SingleEngine:
    """An engine on a few layers of the real shape."""
    config = ModelConfig.from_hugging_face(MODELS["qwen3-0.6b"], "qwen3-0.6b")
    decoder = Decoder(dataclasses.replace(config, num_layers=LAYERS, vocab_size=8192))
    decoder.initialise(seed=0)
    decoder.to("cuda", torch.bfloat16)
    decoder.keeping = (keeping,) * LAYERS
    if lora is None:
        decoder.requires_grad_(True)
    else:
        attach(decoder, lora, seed=0)
        with torch.no_grad():
            generator = torch.Generator("cuda").manual_seed(1)
            for name, parameter in decoder.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.02, generator=generator)
    return SingleEngine(decoder, 1.0, 0.0, with_reference, recorded)


def step(seed: int, with_reference=False, tokens: int = 1500) -> list[TrainingSequence]:
    """Three sequences of so many tokens in all, split anew for every seed."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(20, tokens - 20, 20), 2, replace=False))
    return [
        TrainingSequence(rng.integers(0, 8192, length, dtype=np.int32), 8, keeps_to_reference=with_reference and i == 1)
        for i, length in enumerate(np.diff([0, *cuts, tokens]))
    ]


def gradients(engine: SingleEngine, sequences, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    engine.decoder.train()
    (batch,) = pack(sequences, 10**6, engine.device)
    loss = engine.loss(batch, batch.num_reference_rows > 0)[0].sum() / batch.total_weight
    loss.backward()
    found = {name: parameter.grad.float().clone() for name, parameter in engine.parameters.items()}
    engine.decoder.zero_grad()
    return loss.item(), found


def assert_close(found, expected):
    for name, wanted in expected.items():
        difference = (found[name] - wanted).norm() / wanted.norm()
        assert difference < 2e-2, (name, difference)


@pytest.mark.parametrize("with_reference", [False, True], ids=["cross-entropy", "KL"])
@pytest.mark.parametrize("keeping", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [NO_DROPOUT, None], ids=["lora", "full"])
def test_a_replayed_pass_has_the_gradient_of_one_that_is_not_recorded(lora, keeping, with_reference):
    plain = made(0, lora, keeping, with_reference)
    recorded = made(2048, lora, keeping, with_reference)
    for seed, tokens in enumerate([1500, 1480, 900, 1500, 920, 900, 3000]):
        sequences = step(seed, with_reference, tokens)
        (loss, expected), (same, found) = gradients(plain, sequences), gradients(recorded, sequences)
        assert same == pytest.approx(loss, rel=1e-3)
        assert_close(found, expected)
    assert len(recorded.loss.run._recorded) >= 2


@pytest.mark.parametrize("keeping", ["selective", "full"])
def test_layers_that_are_computed_again_draw_the_masks_of_the_forward_pass(keeping):
    """With half of the inputs dropped another mask would be another gradient."""
    lora = LoraConfig(dropout=0.5, target_modules=("q_proj", "v_proj", "down_proj"))
    plain, recorded = made(0, lora), made(2048, lora, keeping)
    losses = []
    for seed in (1, 2, 3, 4, 3):
        # As the graph's shapes are: masks are drawn by place.
        (loss, expected), (same, found) = (gradients(one, step(0, tokens=1536), seed) for one in (plain, recorded))
        assert same == pytest.approx(loss, rel=1e-3)
        assert_close(found, expected)
        losses.append(same)
    assert len(set(losses)) == 4 and losses[4] == losses[2]
    assert [gradients(recorded, step(0, tokens=1536), 3)[0] for _ in range(2)] == [losses[2]] * 2


def test_a_replayed_pass_waits_for_nothing():
    recorded = made(2048, LoraConfig())
    for _ in range(2):
        gradients(recorded, step(0))
    (batch,) = pack(step(1), 10**6, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorded.loss(batch, False)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_of_many_sizes_share_their_memory():
    """What is held for twenty sizes is hardly more than for the largest, which comes first."""
    recorded = made(4096)
    for _ in range(2):
        gradients(recorded, step(0, tokens=4096))
    gc.collect()
    torch.cuda.empty_cache()
    one = torch.cuda.memory_reserved()
    for tokens in range(1024, 4096, 160):
        for seed in range(2):
            gradients(recorded, step(seed, tokens=tokens))
    gc.collect()
    torch.cuda.empty_cache()
    assert 12 < len(recorded.loss.run._recorded) <= MOST_GRAPHS
    assert torch.cuda.memory_reserved() < 1.25 * one


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_run_records_while_the_next_packs_are_made_and_goes_on_after_a_kill(tmp_path, killed_at):
    """The losses are as near as two runs on a GPU are."""
    sequences = [one for seed in range(12) for one in step(seed, seed % 2 == 0, 1500)]
    config = TrainingConfig(epochs=2, batch_size=3, checkpoint_every=2, learning_rate=1e-4, max_tokens_per_pack=1100)

    class Killed(BaseException):
        pass

    def run(name: str, recorded: int, until: int | None = None) -> list[float]:
        def on_step(metrics):
            if metrics.step == until:
                raise Killed

        engine = made(recorded, LoraConfig(), with_reference=True)
        try:
            train(engine, sequences, config, 7, tmp_path / name, on_step)
        except Killed:
            return []
        return [metrics.loss for metrics in read_metrics(tmp_path / name / "metrics.jsonl")]

    whole = run("whole", 2048)
    assert len(whole) == 24
    assert run("killed", 2048, killed_at) == []
    assert run("killed", 2048) == pytest.approx(whole, rel=2e-3)
