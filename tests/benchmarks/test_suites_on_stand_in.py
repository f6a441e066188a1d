"""The GPU sections of the benchmark suites run without errors on a CPU stand-in with tiny sizes.

The tests find wrong names, shapes and settings before a GPU is available.
"""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    divergence,
    elementwise,
    guards,
    harness,
    linear,
    loss,
    precision,
    sampler,
    sampling,
    scoring,
    train,
)
from benchmarks.harness import FAILURE_PREFIX
from benchmarks.models import random_decoder
from benchmarks.shapes import MODELS, head_case
from tests.emulation.gpu_stand_in import fake_h200
from tests.emulation.taped_graphs import use_taped_graphs

pytestmark = pytest.mark.slow  # every test runs a suite

TINY_MODEL = MODELS["cpu-0.3m"] | {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """A CPU that poses as a GPU; the model named qwen3-0.6b is tiny."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setitem(MODELS, "qwen3-0.6b", TINY_MODEL)
    with fake_h200():
        yield


@pytest.fixture
def notes():
    notes: list[str] = []
    yield notes
    assert not [note for note in notes if note.startswith(FAILURE_PREFIX)]


def test_suites_list_their_gpu_sections(notes):
    for suite in (divergence, elementwise, guards, linear, loss, precision, sampler, sampling, scoring, train):
        names = list(suite.sections(notes))
        assert names and not [name for name in names if name.startswith("cpu")]


def test_slow_call_is_timed_once(monkeypatch, notes):
    monkeypatch.setattr(harness, "_MAX_SECONDS_TO_REPEAT", 1e-9)
    calls = []
    harness.measure({"a": lambda: calls.append(None)}, 3, notes)
    assert len(calls) == 2


@pytest.mark.parametrize("suite", [loss, scoring, divergence])
def test_head_suites_measure_peaked_and_random_data(monkeypatch, notes, suite):
    monkeypatch.setattr(suite, "head_case", lambda T, H, data, device: head_case(1030, 32, data, device, 200))
    monkeypatch.setattr(suite, "ROUNDS", 1)
    section = next(iter(suite.sections(notes).values()))
    assert {row["data"] for row in section()} == {"peaked", "random"}


def test_elementwise_suite_measures_every_case(monkeypatch, notes):
    monkeypatch.setattr(elementwise, "cases", partial(elementwise.cases, tokens=66))
    monkeypatch.setattr(elementwise, "_ROUNDS", 1)
    assert len(elementwise.sections(notes)["H 1,024"]()) == 5 * 2 * 3


@pytest.mark.slow
def test_linear_suite_measures_every_variant(monkeypatch, notes):
    monkeypatch.setattr(linear, "_SHAPES", {"qwen3-8b": (32, 48), "qwen3-0.6b": (32, 48)})
    monkeypatch.setattr(linear, "_WEIGHT_BYTES", 2 * 32 * 96)
    variants = {row["variant"] for row in linear.sections(notes)["qwen3-8b"]()}
    assert variants >= {"ThinkSafe", "ThinkSafe, e4m3", "ThinkSafe, e4m3, quantising its input", "torch"}


def test_sampling_suite_measures_every_variant(monkeypatch, notes):
    monkeypatch.setitem(sampling._CASES, "Qwen3, top-k", (100, 4, 20))
    rows = sampling.sections(notes)["Qwen3, top-k"]()
    assert [row["variant"] for row in rows] == ["ThinkSafe", "with sorting", "transformers"] and not notes


def test_decode_pass_is_measured_with_its_attention(notes):
    (row,) = sampler._measure_decode_pass("qwen3-0.6b", 4, 100)
    assert row["tokens/s"] > 0 and row["attention ms"] > 0


@pytest.mark.slow
def test_end_to_end_suite_measures_all_modes(monkeypatch, notes):
    """Transformers' engine is replaced: its thread does not see the stand-in. Another test covers it."""
    monkeypatch.setattr(sampler, "_run_continuous_batching", lambda start, prompts, lengths: None)
    size = {"count": 6, "mean": 20, "longest": 40, "rows": 4}
    rows = sampler._measure_end_to_end("qwen3-0.6b", notes, **size, all_modes=True, with_transformers=True)
    assert [row["variant"] for row in rows] == [
        "ThinkSafe", "ThinkSafe, batch-invariant", "ThinkSafe, cache in e4m3", "ThinkSafe, weights and cache in e4m3",
        "transformers, continuous batching",
    ]  # fmt: skip
    (single_row,) = sampler._measure_end_to_end("qwen3-0.6b", notes, **size)
    assert "ThinkSafe is faster by" not in single_row


def test_gpu_idle_time_is_recorded():
    """The GPU is idle between passes, and while the host launches a decode pass."""

    class Runner:
        device = SimpleNamespace(type="cuda")

        def forward(self, batch):
            time.sleep(0.02)
            return batch

    runner = Runner()
    with sampler._record_gaps(runner) as gaps:
        for is_decode in (False, True, False, True):
            batch = SimpleNamespace(is_decode=is_decode)
            assert runner.forward(batch) is batch
    assert len(gaps) == 2 + 3 and min(gaps[:2]) > 0.019 and gaps[2:] == [0.005] * 3
    assert "forward" not in vars(runner)


def test_guard_suite_measures_every_variant(monkeypatch, notes):
    layer_matmuls = guards._layer_matmuls
    monkeypatch.setattr(
        guards, "_layer_matmuls", lambda decoder, device, dtype, *size: layer_matmuls(decoder, device, dtype, 8, 1)
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    monkeypatch.setitem(MODELS, "cpu-guard-14m", MODELS["cpu-guard-14m"] | sizes)
    rows = guards._measure_model("cpu-guard-14m", 2, 2, 2, notes)
    assert len(rows) == 4 and any("verdicts change" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_suite_measures_every_variant(monkeypatch, notes, method):
    use_taped_graphs(monkeypatch)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "choose_max_cuda_graph_tokens", lambda *arguments: 1024)
    monkeypatch.setattr(train, "import_peer", lambda module, notes: None)
    rows = train._measure_case("qwen3-0.6b", method, 1, notes)
    variants = {row["variant"] for row in rows}
    assert variants >= {"ThinkSafe", "ThinkSafe, launched kernel by kernel", "ThinkSafe, packs of 32k tokens a step"}
    assert ("ThinkSafe, frozen weights in e4m3" in variants) == (method == "lora")


def test_precision_suite_measures_every_variant(monkeypatch, notes):
    monkeypatch.setattr(precision, "_RESPONSES", 2)
    monkeypatch.setattr(precision, "_TOKENS", 4)
    assert len(precision.sections(notes)["qwen3-0.6b"]()) == 7


@pytest.mark.slow
def test_failed_mode_does_not_stop_the_others(monkeypatch):
    def fail(decoder):
        raise RuntimeError("no e4m3")

    for suite in (sampler, guards, train, precision):
        monkeypatch.setattr(suite, "fp8_copy", fail)
    use_taped_graphs(monkeypatch)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "import_peer", lambda module, notes: None)
    monkeypatch.setattr(precision, "_RESPONSES", 2)
    monkeypatch.setattr(precision, "_TOKENS", 4)
    for suite, measure_rows, num_rows in (
        (
            "sampler",
            partial(sampler._measure_end_to_end, "qwen3-0.6b", count=6, mean=9, longest=20, rows=4, all_modes=True),
            3,
        ),
        ("train", partial(train._measure_case, "qwen3-0.6b", "lora", 1), 3),
        (
            "precision",
            partial(
                precision._measure_model, "qwen3-0.6b", lambda: random_decoder("qwen3-0.6b", "cpu", torch.bfloat16)
            ),
            4,
        ),
    ):
        notes: list[str] = []
        rows = measure_rows(notes=notes)
        assert len(rows) == num_rows and not [row for row in rows if "weights" in row["variant"]], suite
        failures = [note for note in notes if note.startswith(FAILURE_PREFIX)]
        assert failures and all(note.endswith("RuntimeError: no e4m3") for note in failures), suite
