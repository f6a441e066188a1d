"""The start-up check of batch-invariant mode: it names every computation whose bits depend on the batch.

The oracle is a kernel that the test alters on purpose. Runs with other numbers of processes must give the same bits.
"""

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

from tests.support import queue_ranks
from tests.support.checkpoints import make_checkpoint
from tests.support.forked import finish_forked_workers
from tests.support.queue_ranks import REQUESTS, answer_share
from thinksafe.distributed.workers import SINGLE_PROCESS
from thinksafe.errors import UserError
from thinksafe.kernels.batch_invariant_linear import batch_invariant_linear
from thinksafe.model.decoder import Decoder
from thinksafe.model.weights import load_decoder
from thinksafe.sampler import batch_invariance as invariance
from thinksafe.sampler import model_runner as runner
from thinksafe.sampler.batch_invariance import row_counts
from thinksafe.sampler.config import EngineConfig
from thinksafe.sampler.engine import Engine
from thinksafe.sampler.model_runner import graph_batch_size

ROOT = Path(__file__).parents[2]
CONFIG = EngineConfig(16, 64, 8, 1e-3, batch_invariant=True)
ROUNDING_FACTOR = 1 + 2**-20
"""A factor as small as a rounding error."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    return load_decoder(make_checkpoint("qwen3", tmp_path_factory.mktemp("student"), seed=11), torch.float32, "cpu")


def split_k_linear(x, weight, bias=None, dtype=None):
    """Compute a matmul with split K: another order of summation, so that a few in a hundred results have other bits."""
    half = x.shape[1] // 2
    out = batch_invariant_linear(x[:, :half].contiguous(), weight[:, :half].contiguous())
    out = out + batch_invariant_linear(x[:, half:].contiguous(), weight[:, half:].contiguous())
    return (out if bias is None else out + bias).to(dtype or x.dtype)


@pytest.mark.parametrize("split_at", [1, 2, 5, 17, 63])
def test_matmul_that_depends_on_number_of_rows_is_named(decoder, monkeypatch, split_at):
    def library_linear(x, *operands, **options):
        return (batch_invariant_linear if len(x) < split_at + 1 else split_k_linear)(x, *operands, **options)

    Engine(decoder, CONFIG)
    monkeypatch.setattr(runner, "batch_invariant_linear", library_linear)
    message = (
        r"on this CPU, the output of q_proj, k_proj, v_proj \(\d+ x 64\) for a row has other bits in a batch of 1 "
    )
    with pytest.raises(UserError, match=message):
        Engine(decoder, CONFIG)
    Engine(decoder, replace(CONFIG, batch_invariant=False))


@pytest.mark.parametrize("rows", [2, 16, 32, 64])
@pytest.mark.parametrize("shape", [(400, 64), (64, 96)])
def test_one_wrong_shape_at_one_batch_size_is_detected(decoder, monkeypatch, rows, shape):
    def library_linear(x, weight, *operands, **options):
        split = len(x) == rows and tuple(weight.shape) == shape
        return (split_k_linear if split else batch_invariant_linear)(x, weight, *operands, **options)

    monkeypatch.setattr(runner, "batch_invariant_linear", library_linear)
    name = r"the head \(400 x 64\)" if shape[0] == 400 else r"down_proj \(64 x 96\)"
    with pytest.raises(UserError, match=f"{name} for a row has other bits in a batch of {rows} than"):
        Engine(decoder, replace(CONFIG, max_num_seqs=65))


def test_every_matmul_of_a_pass_is_checked(decoder, monkeypatch):
    """Each by itself, not only as a part of a layer."""
    observed = set()

    def recording_linear(x, weight, *operands, **options):
        observed.add((tuple(weight.shape), options.get("dtype")))
        return batch_invariant_linear(x, weight, *operands, **options)

    monkeypatch.setattr(runner, "batch_invariant_linear", recording_linear)
    for layer in ("_decode_layer", "_prefill_layer"):
        monkeypatch.setattr(invariance, layer, lambda *_: lambda rows: torch.zeros(rows.stop - rows.start, 1))
    engine = Engine(decoder, CONFIG)
    checked = observed.copy()
    observed.clear()
    list(engine.generate(REQUESTS[:3]))
    assert len(observed) == 5 and observed == checked


def test_bits_that_depend_on_batch_position_are_detected(decoder, monkeypatch):
    def library_linear(x, *operands, **options):
        out = batch_invariant_linear(x, *operands, **options)
        out[40:] *= ROUNDING_FACTOR
        return out

    monkeypatch.setattr(runner, "batch_invariant_linear", library_linear)
    with pytest.raises(UserError, match="q_proj"):
        Engine(decoder, CONFIG)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (runner, "paged_decode", "a decode layer"),
        (runner, "norm_rope_write_kv", "a decode layer"),
        (runner, "paged_prefill", "a prefill layer"),
        (runner, "_logprobs_from_logits", "scoring"),
        (invariance, "sample", "sampling"),
    ],
)
def test_every_other_computation_of_a_pass_is_checked(decoder, monkeypatch, module, function, name):
    original = getattr(module, function)

    def altered(x, *operands):
        result = original(x, *operands)
        if len(x) <= 4:
            return result
        return (
            tuple(part * ROUNDING_FACTOR for part in result) if isinstance(result, tuple) else result * ROUNDING_FACTOR
        )

    monkeypatch.setattr(module, function, altered)
    with pytest.raises(UserError, match=f"{name} for a row has other bits in a batch of 1 than"):
        Engine(decoder, CONFIG)


def test_model_with_nan_passes_the_check(decoder, monkeypatch):
    def nan_linear(*operands, **options):
        return batch_invariant_linear(*operands, **options) * torch.nan

    monkeypatch.setattr(runner, "batch_invariant_linear", nan_linear)
    Engine(decoder, CONFIG)


def test_checked_batch_sizes_cover_every_graph_and_tile():
    counts = row_counts(8192, num_slots=320)
    assert {graph_batch_size(rows) for rows in range(1, 321)} | {512, 1024, 2048, 4096} == set(counts)
    assert row_counts(65, num_slots=320) == [1, 2, 4, 8, 16, 32, 64]
    # The cost with Qwen3-0.6B, of whose 28 layers one is checked.
    assert (8192 + 2 * sum(counts)) / 28 < 1200


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_last_reference_frees_engine_and_graphs(decoder, batch_invariant):
    """Memory is free before the next garbage collection: the next engine needs the pages, and NCCL waits for graphs."""
    gc.disable()
    try:
        engine = Engine(decoder, replace(CONFIG, batch_invariant=batch_invariant))
        runner_reference = weakref.ref(engine.runner)
        del engine
        assert runner_reference() is None
    finally:
        gc.enable()


def run_workers(count: int, out: Path, folder: Path, *group_sizes: int) -> list[dict]:
    """Return the results of each of `count` processes."""
    finish_forked_workers(count, queue_ranks.main, str(out), str(folder), "cpu", *map(str, group_sizes))
    return read_results(count, out)


def read_results(count: int, out: Path) -> list[dict]:
    return [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def merge_groups(results_by_rank: list[dict], group_size: int) -> dict:
    """Return all answers, after a check that exactly one group answered each request."""
    answers = [results[group_size] for results in results_by_rank]
    assert sum(map(len, answers)) == len(REQUESTS)
    return {id_: answer for part in answers for id_, answer in part.items()}


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory) -> Path:
    """Student that four processes can share; each part fills whole vectors of the processor."""
    sizes = {"num_key_value_heads": 4, "intermediate_size": 256}
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("wide student"), seed=11, **sizes)


def assert_close(answers: dict, expected: dict) -> None:
    """Check that tokens are equal and log-probabilities close, but not equal: other sums have other rounding errors."""
    assert answers != expected
    for id_, (tokens, reason, logprobs) in expected.items():
        assert answers[id_][:2] == (tokens, reason)
        np.testing.assert_allclose(answers[id_][2], logprobs, atol=1e-4)


def assert_two_workers_agree_with_one(results_by_rank: list[dict], from_one_process: dict) -> None:
    assert sum(bool(results[1]) for results in results_by_rank) > 1, "one worker answered all requests"
    assert merge_groups(results_by_rank, 1) == from_one_process


@pytest.mark.slow
def test_responses_do_not_depend_on_number_of_workers(wide_student, tmp_path):
    """One and two workers agree. Between values of tensor_parallel_size the rounding errors differ."""
    from_one_process = answer_share(wide_student, SINGLE_PROCESS, 1)
    two = run_workers(2, tmp_path, wide_student, 1, 2)
    assert_two_workers_agree_with_one(two, from_one_process)
    assert_close(merge_groups(two, 2), from_one_process)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_responses_do_not_depend_on_four_workers(wide_student, tmp_path):
    """One pair agrees with two pairs that share the model. Four workers agree with one, alone and as a group."""
    from_one_process = answer_share(wide_student, SINGLE_PROCESS, 1)
    from_one_pair = merge_groups(run_workers(2, tmp_path, wide_student, 2), 2)
    four = run_workers(4, tmp_path, wide_student, 1, 2, 4)
    assert_two_workers_agree_with_one(four, from_one_process)
    assert sum(bool(results[2]) for results in four) == 2
    assert merge_groups(four, 2) == from_one_pair
    from_four_processes = merge_groups(four, 4)
    assert_close(from_four_processes, from_one_process)
    assert from_one_pair != from_four_processes


@pytest.mark.slow
def test_partial_sums_that_depend_on_the_batch_are_named(wide_student, tmp_path):
    """Four processes add their partial sums with an all-reduce, whose order of summation depends on the size."""
    errors = [results["error"] for results in run_workers(4, tmp_path, wide_student)]
    assert all("a decode layer for a row has other bits" in error for error in errors)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_with_nccl_equal_passes_without_graphs(tmp_path):
    """The processes must also end, although NCCL waits for all graphs."""
    sizes = {"num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 512}
    folder = make_checkpoint("qwen3", tmp_path / "student", seed=11, **sizes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [*torchrun, str(ROOT / "tests/support/queue_ranks.py"), str(tmp_path), str(folder), "cuda", "2"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-4000:]
    leader, _ = read_results(2, tmp_path)
    assert len(leader[2]) == len(REQUESTS) and leader[2] == leader["direct"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "fp8"}])
def test_gpu_passes_the_check_and_split_matmul_is_named(tmp_path, monkeypatch, family, settings):
    folder = make_checkpoint(family, tmp_path, hidden_size=256, intermediate_size=512)
    on_gpu = load_decoder(folder, torch.bfloat16, "cuda")
    config = EngineConfig(512, 8192, 64, 0.1, batch_invariant=True, **settings)
    Engine(on_gpu, config)  # compiles
    torch.cuda.synchronize()
    started = time.monotonic()
    Engine(on_gpu, config)
    assert time.monotonic() - started < 20

    def library_linear(x, *operands, **options):
        return (split_k_linear if len(x) > 256 else batch_invariant_linear)(x, *operands, **options)

    monkeypatch.setattr(runner, "batch_invariant_linear", library_linear)
    with pytest.raises(UserError, match=f"on {torch.cuda.get_device_name()}"):
        Engine(on_gpu, config)
