"""Decoder passes recorded as CUDA graphs: the gradients of passes that are not, whatever is in a pack.

On a CPU the graphs are tapes (taped_graphs.py), and what a GPU would run is traced on meta tensors.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.shapes import MODELS
from tests.emulation.gpu_on_meta import MemoryTrace, decoder_on_meta, on_gpu_path
from tests.emulation.taped_graphs import tape_passes, tensors_in, waits
from tests.support.checkpoints import make_checkpoint
from tests.support.training_runs import (
    DROPOUT,
    RUN,
    SEQUENCES,
    Killed,
    assert_same_run,
    engine,
    gradients,
    sequence,
    untimed,
)
from thinksafe.errors import UserError
from thinksafe.kernels import dispatch
from thinksafe.model.attention import PackedAttention
from thinksafe.model.config import ModelConfig
from thinksafe.model.lora import LoraConfig, without_adapters
from thinksafe.model.weights import load_decoder
from thinksafe.training import cuda_graphs as graphs
from thinksafe.training.cuda_graphs import DecoderGraphs, bucket
from thinksafe.training.local_engine import NonFiniteStep
from thinksafe.training.loop import train
from thinksafe.training.packing import collate, pack

CPU = torch.device("cpu")
NO_DROPOUT = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
STEPS = [
    [sequence(*sizes, seed) for sizes in step]
    for seed, step in enumerate([[(30, 12), (7, 1)], [(55, 54)], [(16, 8), (30, 29), (2, 1)], [(90, 3), (20, 9)]])
]
"""All but the last fill one size, with one to three sequences."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "tied": make_checkpoint("qwen3", tmp_path_factory.mktemp("tied")),
        "untied": make_checkpoint("llama", tmp_path_factory.mktemp("untied"), tie_word_embeddings=False),
    }


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    tape_passes(monkeypatch)


def of(folder, method="lora", config=NO_DROPOUT, recorded=0, with_reference=False, keeping="none", dtype=torch.float32):
    decoder = load_decoder(folder, dtype, CPU)
    decoder.keeping = (keeping,) * 2
    return engine(decoder, method, config, clip=1.0, with_reference=with_reference, recorded_tokens=recorded)


def assert_close(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)


@pytest.mark.parametrize("with_reference", [False, True], ids=["cross-entropy", "KL"])
@pytest.mark.parametrize("keeping", ["none", "selective", "full"])
@pytest.mark.parametrize("kind, method", [("tied", "lora"), ("tied", "full"), ("untied", "full")])
def test_steps_are_those_without_graphs(folders, kind, method, keeping, with_reference):
    """Losses and gradients to fp32 rounding, while the weights move."""
    steps = STEPS * 2
    if with_reference:
        steps = [[dataclasses.replace(one, keeps_to_reference=i % 2 == 0) for i, one in enumerate(s)] for s in steps]
    options = {"with_reference": with_reference, "keeping": keeping}
    plain, recorded = of(folders[kind], method, **options), of(folders[kind], method, recorded=128, **options)
    for sequences in steps:
        for batch in (pack(sequences, 10**6, CPU), pack(sequences, 40, CPU)):
            (loss, expected), (same, found) = gradients(plain, batch), gradients(recorded, batch)
            assert same == pytest.approx(loss, rel=1e-5)
            assert_close(found, expected)
            plain.step(batch, 1e-3)
            recorded.load_tensors(plain.tensors())  # AdamW turns rounding into steps where a gradient is next to 0
    assert recorded.loss.run.replays > 30


@pytest.mark.parametrize("keeping", ["selective", "full"])
def test_layers_that_are_computed_again_draw_the_masks_of_the_forward_pass(folders, keeping):
    """And every replay draws others, which depend on the seed alone."""
    plain, again = (
        of(folders["tied"], config=DROPOUT, recorded=128),
        of(folders["tied"], config=DROPOUT, recorded=128, keeping=keeping),
    )
    batch, losses = pack(STEPS[0], 10**6, CPU), []
    for seed in (1, 2, 3, 4, 3):
        torch.manual_seed(seed)
        loss, expected = gradients(plain, batch)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        same, found = gradients(again, batch)
        assert same == loss and torch.equal(torch.get_rng_state(), state)
        assert_close(found, expected)
        losses.append(loss)
    assert again.loss.run.replays == 2 * 4
    assert len(set(losses)) == 4 and losses[4] == losses[2]


def run(folder, out, method, dtype, until=None, keeping="none"):
    """Train with recorded passes until a step and be killed there; the weights."""
    with_reference = method == "lora"
    half = [
        dataclasses.replace(one, keeps_to_reference=with_reference and i % 2 == 0) for i, one in enumerate(SEQUENCES)
    ]
    made = of(folder, method, DROPOUT, 64, with_reference, keeping, dtype)

    def on_step(metrics):
        if metrics.step == until:
            raise Killed

    try:
        train(made, half, RUN, 11, out, on_step)
    except Killed:
        return None
    assert out.name != "whole" or made.loss.run.replays > 10
    return {name: parameter.detach().clone() for name, parameter in made.parameters.items()}


@pytest.mark.parametrize(
    "method, dtype, keeping", [("lora", torch.float32, "full"), ("full", torch.bfloat16, "none")], ids=str
)
def test_a_run_killed_at_any_step_ends_bit_for_bit_as_one_that_was_not(folders, tmp_path, method, dtype, keeping):
    """Though what it had recorded is gone, and the sizes it meets again are computed directly at first."""
    options = {"method": method, "dtype": dtype, "keeping": keeping}
    expected = run(folders["tied"], tmp_path / "whole", **options)
    for step in range(1, len(untimed(tmp_path / "whole"))):
        out = tmp_path / f"killed at {step}"
        assert run(folders["tied"], out, until=step, **options) is None
        assert_same_run(out, run(folders["tied"], out, **options), tmp_path / "whole", expected)


def test_a_pack_that_is_too_large_and_a_size_that_is_one_too_many_are_computed_directly(folders, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    plain, recorded = of(folders["tied"]), of(folders["tied"], recorded=256)
    sizes = []
    forward = recorded.decoder.forward
    recorded.decoder.forward = lambda ids, *others: sizes.append(len(ids)) or forward(ids, *others)
    for total in (100, 200, 300) * 4:
        batch = pack([sequence(total - 30, 9, 0), sequence(30, 20, 1)], 10**6, CPU)
        assert_close(gradients(recorded, batch)[1], gradients(plain, batch)[1])
    assert sizes == [128, 256, 300, 128, *[256, 300] * 3]
    assert recorded.loss.run.replays == 2 * 3


def test_a_broken_step_leaves_nothing_behind_and_what_fills_up_breaks_none(folders):
    plain, recorded = of(folders["untied"]), of(folders["untied"], recorded=128)
    used = np.concatenate([one.input_ids for one in STEPS[0]])
    foreign = int(np.setdiff1d(np.arange(380), used)[0])
    batch, broken = pack(STEPS[0], 10**6, CPU), int(used[3])
    embedding = recorded.decoder.embedding
    for token in [foreign, *range(foreign)]:
        if token not in used:
            embedding.data[token] = torch.nan
    _, expected = gradients(plain, batch)
    for _ in range(3):
        assert_close(gradients(recorded, batch)[1], expected)
        row = embedding.data[broken].clone()
        embedding.data[broken] = torch.nan
        with pytest.raises(NonFiniteStep):
            recorded.step(batch, 1e-3)
        embedding.data[broken] = row
    assert recorded.loss.run.replays == 2 * 5


def test_a_backward_pass_after_another_forward_pass_is_refused(folders):
    recorded = of(folders["tied"], recorded=128)
    batches = [collate(step, CPU) for step in (STEPS[0], STEPS[3])]
    recorded.decoder.train()
    for batch in batches:
        recorded.loss(batch, False)[0].sum().backward()
    first, _ = [recorded.loss(batch, False)[0].sum() for batch in batches]
    with pytest.raises(RuntimeError, match="memory is gone"):
        first.backward()
    loss = recorded.loss(batches[0], False)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="memory is gone"):
        loss.backward()


def test_what_cannot_be_recorded_says_how_to_do_without(folders, monkeypatch):
    """As on a CPU, where torch has no graphs."""
    monkeypatch.setattr("thinksafe.training.local_engine.DecoderGraphs", DecoderGraphs)
    recorded, batch = of(folders["tied"], recorded=128), pack(STEPS[0], 10**6, CPU)
    recorded.step(batch, 1e-3)
    with pytest.raises(UserError, match=r"training.cuda_graphs: .*set it to none"):
        recorded.step(batch, 1e-3)


@torch.no_grad()
def test_with_and_without_adapters_are_two_passes(folders):
    recorded = of(folders["tied"], recorded=128)
    decoder, batch = recorded.decoder, collate(STEPS[0], CPU)
    inputs = (batch.input_ids, batch.positions, batch.attention)
    for _ in range(3):
        adapted = recorded.loss.run(decoder, *inputs)[: len(batch.input_ids)].clone()
        torch.testing.assert_close(adapted, decoder(*inputs))
        with without_adapters(decoder):
            base = recorded.loss.run(decoder, *inputs)[: len(batch.input_ids)]
            torch.testing.assert_close(base, decoder(*inputs))
        assert not torch.allclose(base, adapted)


class OnTheDevice(MemoryTrace):
    """Refuses what a graph cannot record: a look at values, and tensors of the host's."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not waits(op, args), op
        out = super().__torch_dispatch__(op, types, args, kwargs)
        assert {one.device.type for one in tensors_in((args, kwargs, out))} <= {"meta"}, op
        return out


@pytest.mark.skipif(dispatch.triton is None, reason="the GPU path needs Triton")
@pytest.mark.parametrize("keeping", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [LoraConfig(), None], ids=["lora", "full"])
def test_what_is_recorded_on_a_gpu_never_waits_and_reads_nothing_of_the_host(monkeypatch, lora, keeping):
    """Traced on the operations of a GPU; a pass is nothing but launches, of which a graph makes one."""
    monkeypatch.undo()
    config = dataclasses.replace(ModelConfig.from_hugging_face(MODELS["qwen3-0.6b"], "qwen3-0.6b"), num_layers=2)
    decoder = decoder_on_meta(config, lora)
    decoder.keeping = (keeping,) * 2
    with on_gpu_path(), torch.device("meta"):
        ids = torch.empty(5120, dtype=torch.int64)
        attention = PackedAttention(torch.empty(17, dtype=torch.int32), 5120)
        decoder.rotation(ids)
        with OnTheDevice() as trace:
            hidden = decoder(ids, ids, attention)
            trained = [one for one in decoder.parameters() if one.requires_grad]
            torch._foreach_add_(
                [torch.zeros_like(one) for one in trained],
                torch.autograd.grad(hidden, trained, torch.empty_like(hidden)),
            )
    assert trace.launches > 2 * 50


@given(st.integers(1, 10**6))
def test_a_pack_is_filled_up_by_an_eighth_at_most(tokens):
    filled = bucket(tokens)
    assert tokens <= filled <= max(tokens + 127, 1.125 * tokens) and bucket(filled) == filled
    assert len({bucket(other) for other in range(1025, 16_385)}) == 32
