"""Decoder passes captured as CUDA graphs have the gradients of eager passes, for every pack.

On a CPU the graphs are tapes (taped_graphs.py); the operations that a GPU would run are traced on meta tensors.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import MODELS
from tests.emulation.gpu_on_meta import MemoryTrace, decoder_on_meta, on_gpu_path
from tests.emulation.taped_graphs import needs_host_sync, tensors_in, use_taped_graphs
from tests.support.checkpoints import make_checkpoint
from tests.support.combinations import combinations
from tests.support.training_runs import (
    LORA_WITH_DROPOUT,
    SEQUENCES,
    TRAINING_CONFIG,
    Killed,
    assert_same_run,
    gradients,
    make_trainer,
    metrics_without_times,
    sequence,
)
from thinksafe.errors import UserError
from thinksafe.kernels import dispatch
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import LoraConfig, ModelConfig
from thinksafe.model.lora import without_adapters
from thinksafe.model.weights import load_decoder
from thinksafe.training import cuda_graphs
from thinksafe.training.cuda_graphs import DecoderGraphs, padded_num_tokens
from thinksafe.training.loop import train
from thinksafe.training.packing import collate, pack
from thinksafe.training.trainer import NonFiniteStep

CPU = torch.device("cpu")
LORA_WITHOUT_DROPOUT = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
STEP_SEQUENCES = [
    [sequence(*sizes, seed) for sizes in step]
    for seed, step in enumerate([[(30, 12), (7, 1)], [(55, 54)], [(16, 8), (30, 29), (2, 1)], [(90, 3), (20, 9)]])
]
"""All steps except the last have the same padded size, with one to three sequences."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "tied": make_checkpoint("qwen3", tmp_path_factory.mktemp("tied")),
        "untied": make_checkpoint("llama", tmp_path_factory.mktemp("untied"), tie_word_embeddings=False),
    }


@pytest.fixture(autouse=True)
def taped_graphs(monkeypatch):
    use_taped_graphs(monkeypatch)


def load_trainer(
    folder,
    method="lora",
    config=LORA_WITHOUT_DROPOUT,
    max_graph_tokens=0,
    with_reference=False,
    checkpointing="none",
    dtype=torch.float32,
):
    decoder = load_decoder(folder, dtype, CPU)
    decoder.checkpointing = (checkpointing,) * 2
    return make_trainer(
        decoder, method, config, clip=1.0, with_reference=with_reference, max_cuda_graph_tokens=max_graph_tokens
    )


def assert_close(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, checkpointing, with_reference",
    combinations(["tied lora", "tied full", "untied full"], ["none", "selective", "full"], [False, True], together=2),
)
def test_steps_with_graphs_equal_eager_steps(folders, model, checkpointing, with_reference):
    """Losses and gradients are equal up to fp32 rounding while the weights change."""
    kind, method = model.split()
    steps = STEP_SEQUENCES * 2
    if with_reference:
        steps = [
            [dataclasses.replace(sequence, use_reference_kl=i % 2 == 0) for i, sequence in enumerate(s)] for s in steps
        ]
    options = {"with_reference": with_reference, "checkpointing": checkpointing}
    without_graphs, with_graphs = (
        load_trainer(folders[kind], method, **options),
        load_trainer(folders[kind], method, max_graph_tokens=128, **options),
    )
    for sequences in steps:
        for batch in (pack(sequences, 10**6, CPU), pack(sequences, 40, CPU)):
            (loss, expected), (same_loss, actual) = gradients(without_graphs, batch), gradients(with_graphs, batch)
            assert same_loss == pytest.approx(loss, rel=1e-5)
            assert_close(actual, expected)
            without_graphs.step(batch, 1e-3)
            # AdamW turns rounding errors into whole steps where a gradient is near 0, so copy the state.
            with_graphs.load_state_dict(without_graphs.state_dict())
    assert with_graphs.loss.run_decoder.replays > 30


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_layers_draw_the_masks_of_the_forward_pass(folders, checkpointing):
    """Every replay draws new masks, which depend on the seed alone."""
    storing, recomputing = (
        load_trainer(folders["tied"], config=LORA_WITH_DROPOUT, max_graph_tokens=128),
        load_trainer(folders["tied"], config=LORA_WITH_DROPOUT, max_graph_tokens=128, checkpointing=checkpointing),
    )
    batch, losses = pack(STEP_SEQUENCES[0], 10**6, CPU), []
    for seed in (1, 2, 3, 4, 3):
        torch.manual_seed(seed)
        loss, expected = gradients(storing, batch)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        same_loss, actual = gradients(recomputing, batch)
        assert same_loss == loss and torch.equal(torch.get_rng_state(), state)
        assert_close(actual, expected)
        losses.append(loss)
    assert recomputing.loss.run_decoder.replays == 2 * 4
    assert len(set(losses)) == 4 and losses[4] == losses[2]


def train_until(folder, out, method, dtype, until=None, checkpointing="none"):
    """Train with captured passes; return None if killed at step `until`, else the weights."""
    with_reference = method == "lora"
    sequences = [
        dataclasses.replace(sequence, use_reference_kl=with_reference and i % 2 == 0)
        for i, sequence in enumerate(SEQUENCES)
    ]
    trainer = load_trainer(folder, method, LORA_WITH_DROPOUT, 64, with_reference, checkpointing, dtype)

    def on_step(metrics):
        if metrics.step == until:
            raise Killed

    try:
        train(trainer, sequences, TRAINING_CONFIG, 11, out, on_step)
    except Killed:
        return None
    assert out.name != "whole" or trainer.loss.run_decoder.replays > 10
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "method, dtype, checkpointing", [("lora", torch.float32, "full"), ("full", torch.bfloat16, "none")], ids=str
)
def test_killed_run_resumes_bit_for_bit(folders, tmp_path, fresh_seed, method, dtype, checkpointing, num_kills):
    """The captured graphs are lost in the kill, and every size runs eagerly once more. The steps are drawn."""
    options = {"method": method, "dtype": dtype, "checkpointing": checkpointing}
    expected = train_until(folders["tied"], tmp_path / "whole", **options)
    num_steps = len(metrics_without_times(tmp_path / "whole"))
    for step in random.Random(fresh_seed).sample(range(1, num_steps), num_kills):
        out = tmp_path / f"killed at {step}"
        assert train_until(folders["tied"], out, until=step, **options) is None
        assert_same_run(out, train_until(folders["tied"], out, **options), tmp_path / "whole", expected)


def test_large_packs_and_surplus_sizes_run_eagerly(folders, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    without_graphs, with_graphs = load_trainer(folders["tied"]), load_trainer(folders["tied"], max_graph_tokens=256)
    sizes = []
    forward = with_graphs.decoder.forward
    with_graphs.decoder.forward = lambda ids, *inputs: sizes.append(len(ids)) or forward(ids, *inputs)
    for total in (100, 200, 300) * 4:
        batch = pack([sequence(total - 30, 9, 0), sequence(30, 20, 1)], 10**6, CPU)
        assert_close(gradients(with_graphs, batch)[1], gradients(without_graphs, batch)[1])
    assert sizes == [128, 256, 300, 128, *[256, 300] * 3]
    assert with_graphs.loss.run_decoder.replays == 2 * 3


def test_nonfinite_step_leaves_no_trace_and_padding_adds_no_nan(folders):
    without_graphs, with_graphs = load_trainer(folders["untied"]), load_trainer(folders["untied"], max_graph_tokens=128)
    used_tokens = np.concatenate([sequence.input_ids for sequence in STEP_SEQUENCES[0]])
    unused_token = int(np.setdiff1d(np.arange(380), used_tokens)[0])
    batch, poisoned_token = pack(STEP_SEQUENCES[0], 10**6, CPU), int(used_tokens[3])
    embedding = with_graphs.decoder.embedding
    for token in [unused_token, *range(unused_token)]:
        if token not in used_tokens:
            embedding.data[token] = torch.nan
    _, expected = gradients(without_graphs, batch)
    for _ in range(3):
        assert_close(gradients(with_graphs, batch)[1], expected)
        row = embedding.data[poisoned_token].clone()
        embedding.data[poisoned_token] = torch.nan
        with pytest.raises(NonFiniteStep):
            with_graphs.step(batch, 1e-3)
        embedding.data[poisoned_token] = row
    assert with_graphs.loss.run_decoder.replays == 2 * 5


def test_backward_after_another_pass_raises(folders):
    with_graphs = load_trainer(folders["tied"], max_graph_tokens=128)
    batches = [collate(step, CPU) for step in (STEP_SEQUENCES[0], STEP_SEQUENCES[3])]
    with_graphs.decoder.train()
    for batch in batches:
        with_graphs.loss(batch, False)[0].sum().backward()
    first_loss, _ = [with_graphs.loss(batch, False)[0].sum() for batch in batches]
    with pytest.raises(RuntimeError, match="memory of this pass is reused"):
        first_loss.backward()
    loss = with_graphs.loss(batches[0], False)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="memory of this pass is reused"):
        loss.backward()


def test_failed_capture_names_the_setting_to_change(folders, monkeypatch):
    """On a CPU, where torch has no CUDA graphs, every capture fails."""
    monkeypatch.setattr("thinksafe.training.local_trainer.DecoderGraphs", DecoderGraphs)
    with_graphs, batch = load_trainer(folders["tied"], max_graph_tokens=128), pack(STEP_SEQUENCES[0], 10**6, CPU)
    with_graphs.step(batch, 1e-3)
    with pytest.raises(UserError, match=r"training.cuda_graphs: .*set it to none"):
        with_graphs.step(batch, 1e-3)


@torch.no_grad()
def test_passes_with_and_without_adapters_are_captured_separately(folders):
    with_graphs = load_trainer(folders["tied"], max_graph_tokens=128)
    decoder, batch = with_graphs.decoder, collate(STEP_SEQUENCES[0], CPU)
    inputs = (batch.input_ids, batch.positions, batch.attention)
    for _ in range(3):
        adapted = with_graphs.loss.run_decoder(decoder, *inputs)[: len(batch.input_ids)].clone()
        torch.testing.assert_close(adapted, decoder(*inputs))
        with without_adapters(decoder):
            base = with_graphs.loss.run_decoder(decoder, *inputs)[: len(batch.input_ids)]
            torch.testing.assert_close(base, decoder(*inputs))
        assert not torch.allclose(base, adapted)


class DeviceOnlyTrace(MemoryTrace):
    """Trace that fails on operations a graph cannot capture: reading values, and tensors on the host."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not needs_host_sync(op, args), op
        out = super().__torch_dispatch__(op, types, args, kwargs)
        assert {tensor.device.type for tensor in tensors_in((args, kwargs, out))} <= {"meta"}, op
        return out


@pytest.mark.skipif(dispatch.triton is None, reason="the GPU path needs Triton")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [LoraConfig(), None], ids=["lora", "full"])
def test_captured_operations_never_synchronize_or_read_host_tensors(monkeypatch, lora, checkpointing):
    """The GPU's operations are traced: a pass consists of launches only, which a graph turns into one."""
    monkeypatch.undo()
    config = dataclasses.replace(ModelConfig.from_hugging_face(MODELS["qwen3-0.6b"], "qwen3-0.6b"), num_layers=2)
    decoder = decoder_on_meta(config, lora)
    decoder.checkpointing = (checkpointing,) * 2
    with on_gpu_path(), torch.device("meta"):
        ids = torch.empty(5120, dtype=torch.int64)
        attention = PackedAttention(torch.empty(17, dtype=torch.int32), 5120)
        decoder.rotation(ids)
        with DeviceOnlyTrace() as trace:
            hidden = decoder(ids, ids, attention)
            trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
            torch._foreach_add_(
                [torch.zeros_like(parameter) for parameter in trained],
                torch.autograd.grad(hidden, trained, torch.empty_like(hidden)),
            )
    assert trace.num_launches > 2 * 50


@given(st.integers(1, 10**6))
def test_padding_is_at_most_an_eighth(tokens):
    padded = padded_num_tokens(tokens)
    assert tokens <= padded <= max(tokens + 127, 1.125 * tokens) and padded_num_tokens(padded) == padded
    assert len({padded_num_tokens(size) for size in range(1025, 16_385)}) == 32
