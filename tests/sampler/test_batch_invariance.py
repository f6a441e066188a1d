"""What is looked at before a batch-invariant run, and that nothing which depends on the batch gets past it."""

import gc
import os
import pickle
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.queue_ranks import REQUESTS, answered
from thinksafe.distributed.workers import ALONE
from thinksafe.errors import UserError
from thinksafe.kernels.row_linear import row_linear
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import load_decoder
from thinksafe.sampler import batch_invariance as invariance
from thinksafe.sampler import model_runner as runner
from thinksafe.sampler.batch_invariance import _numbers_of_rows
from thinksafe.sampler.engine import Engine, EngineConfig
from thinksafe.sampler.model_runner import bucket

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(16, 64, 8, 1e-3, batch_invariant=True)
OTHER = 1 + 2**-20
"""A factor that changes last digits."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    return load_decoder(make_checkpoint("qwen3", tmp_path_factory.mktemp("student"), seed=11), torch.float32, "cpu")


def in_two_halves(x, weight, bias=None, dtype=None):
    """A product with split K: another order of summation, so that a few in a hundred results have other bits."""
    half = x.shape[1] // 2
    out = row_linear(x[:, :half].contiguous(), weight[:, :half].contiguous())
    out = out + row_linear(x[:, half:].contiguous(), weight[:, half:].contiguous())
    return (out if bias is None else out + bias).to(dtype or x.dtype)


@pytest.mark.parametrize("split_at", [1, 2, 5, 17, 63])
def test_a_product_whose_order_of_summation_follows_the_number_of_rows_is_named(decoder, monkeypatch, split_at):
    def library_product(x, *operands, **options):
        return (row_linear if len(x) < split_at + 1 else in_two_halves)(x, *operands, **options)

    Engine(decoder, CONFIG)
    monkeypatch.setattr(runner, "row_linear", library_product)
    message = r"on this CPU q_proj, k_proj, v_proj \(\d+ x 64\) gives a row other bits in a batch of 1 than"
    with pytest.raises(UserError, match=message):
        Engine(decoder, CONFIG)
    Engine(decoder, replace(CONFIG, batch_invariant=False))


@pytest.mark.parametrize("rows", [2, 16, 32, 64])
@pytest.mark.parametrize("shape", [(400, 64), (64, 96)])
def test_one_shape_in_one_number_of_rows_is_enough(decoder, monkeypatch, rows, shape):
    def library_product(x, weight, *rest, **options):
        split = len(x) == rows and tuple(weight.shape) == shape
        return (in_two_halves if split else row_linear)(x, weight, *rest, **options)

    monkeypatch.setattr(runner, "row_linear", library_product)
    name = r"the head \(400 x 64\)" if shape[0] == 400 else r"down_proj \(64 x 96\)"
    with pytest.raises(UserError, match=f"{name} gives a row other bits in a batch of {rows} than"):
        Engine(decoder, replace(CONFIG, max_running=65))


def test_every_product_of_a_pass_has_been_looked_at(decoder, monkeypatch):
    """By its own name, not only as a part of a layer."""
    seen = set()

    def watched(x, weight, *rest, **options):
        seen.add((tuple(weight.shape), options.get("dtype")))
        return row_linear(x, weight, *rest, **options)

    monkeypatch.setattr(runner, "row_linear", watched)
    for layer in ("_decoding", "_reading"):
        monkeypatch.setattr(invariance, layer, lambda *_: lambda some: torch.zeros(some.stop - some.start, 1))
    engine = Engine(decoder, CONFIG)
    looked_at = seen.copy()
    seen.clear()
    list(engine.generate(REQUESTS[:3]))
    assert len(seen) == 5 and seen == looked_at


def test_bits_that_follow_the_place_in_the_batch_are_found(decoder, monkeypatch):
    def library_product(x, *operands, **options):
        out = row_linear(x, *operands, **options)
        out[40:] *= OTHER
        return out

    monkeypatch.setattr(runner, "row_linear", library_product)
    with pytest.raises(UserError, match="q_proj"):
        Engine(decoder, CONFIG)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (runner, "paged_decode", "a layer that decodes"),
        (runner, "norm_rope_write_kv", "a layer that decodes"),
        (runner, "paged_prefill", "a layer that reads a prompt"),
        (runner, "_logprobs_of_all", "a score"),
        (invariance, "sample", "a draw"),
    ],
)
def test_whatever_else_a_pass_computes_is_looked_at(decoder, monkeypatch, module, function, name):
    right = getattr(module, function)

    def wrong(x, *rest):
        found = right(x, *rest)
        if len(x) <= 4:
            return found
        return tuple(part * OTHER for part in found) if isinstance(found, tuple) else found * OTHER

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(UserError, match=f"{name} gives a row other bits in a batch of 1 than"):
        Engine(decoder, CONFIG)


def test_a_model_that_is_broken_is_not_taken_for_one_that_depends_on_the_batch(decoder, monkeypatch):
    monkeypatch.setattr(runner, "row_linear", lambda x, *rest, **options: row_linear(x, *rest, **options) * torch.nan)
    Engine(decoder, CONFIG)


def test_every_graph_and_every_tile_has_its_turn():
    counts = _numbers_of_rows(8192, num_slots=320)
    assert {bucket(rows) for rows in range(1, 321)} | {512, 1024, 2048, 4096} == set(counts)
    assert _numbers_of_rows(65, num_slots=320) == [1, 2, 4, 8, 16, 32, 64]
    # With Qwen3-0.6B, where one layer of 28 is looked at.
    assert (8192 + 2 * sum(counts)) / 28 < 1200


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_an_engine_and_its_graphs_are_gone_with_the_last_reference(decoder, batch_invariant):
    """Not at the next garbage collection: its pages are needed at once, and NCCL waits for graphs that use it."""
    gc.disable()
    try:
        engine = Engine(decoder, replace(CONFIG, batch_invariant=batch_invariant))
        watched = weakref.ref(engine.runner)
        del engine
        assert watched() is None
    finally:
        gc.enable()


def by_workers(count: int, out: Path, folder: Path, *together: int, device: str = "cpu") -> list[dict]:
    """What each of so many processes found."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [*torchrun, str(ROOT / "tests/support/queue_ranks.py"), str(out), str(folder), device]
    command += map(str, together)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def joined(parts: list[dict], together: int) -> dict:
    """Every request answered by exactly one group."""
    answers = [part[together] for part in parts]
    assert sum(map(len, answers)) == len(REQUESTS)
    return {id_: answer for part in answers for id_, answer in part.items()}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bits(tmp_path):
    """One, two, four; and one pair or two pairs that hold the model together, whose last digits are their own."""
    sizes = {"num_key_value_heads": 4, "intermediate_size": 256}  # parts of whole vectors of the processor
    folder = make_checkpoint("qwen3", tmp_path / "student", seed=11, **sizes)
    by_one = answered(folder, ALONE, 1)
    two, four = (by_workers(count, tmp_path, folder, *together) for count, together in ((2, (1, 2)), (4, (1, 2, 4))))
    for parts in (two, four):
        assert sum(bool(part[1]) for part in parts) > 1, "or one worker did all of it"
        assert joined(parts, 1) == by_one
    by_a_pair = joined(two, 2)
    assert sum(bool(part[2]) for part in four) == 2
    assert joined(four, 2) == by_a_pair
    by_four = joined(four, 4)
    for parted in (by_a_pair, by_four):
        assert parted != by_one
        for id_, (tokens, reason, logprobs) in by_one.items():
            assert parted[id_][:2] == (tokens, reason)
            np.testing.assert_allclose(parted[id_][2], logprobs, atol=1e-4)
    assert by_a_pair != by_four
    assert all("a layer that decodes gives a row other bits" in part["refused"] for part in four)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_with_nccl_in_them_say_what_passes_without_graphs_say(tmp_path):
    """And the processes end, though NCCL waits for graphs that are left."""
    sizes = {"num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 512}
    folder = make_checkpoint("qwen3", tmp_path / "student", seed=11, **sizes)
    first, _ = by_workers(2, tmp_path, folder, 2, device="cuda")
    assert len(first[2]) == len(REQUESTS) and first[2] == first["direct"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "fp8"}])
def test_what_runs_on_a_gpu_holds_and_a_split_product_is_named(tmp_path, monkeypatch, family, settings):
    folder = make_checkpoint(family, tmp_path, hidden_size=256, intermediate_size=512)
    on_gpu = load_decoder(folder, torch.bfloat16, "cuda")
    config = EngineConfig(512, 8192, 64, 0.1, batch_invariant=True, **settings)
    Engine(on_gpu, config)  # compiles
    torch.cuda.synchronize()
    started = time.monotonic()
    Engine(on_gpu, config)
    assert time.monotonic() - started < 20

    def library_product(x, *operands, **options):
        return (in_two_halves if len(x) > 256 else row_linear)(x, *operands, **options)

    monkeypatch.setattr(runner, "row_linear", library_product)
    with pytest.raises(UserError, match=f"on {torch.cuda.get_device_name()}"):
        Engine(on_gpu, config)
