"""What the suites do on a GPU alone, on a CPU that stands for one and on next to nothing: that nothing of it is broken
before there is a GPU."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import divergence, elementwise, guards, harness, linear, loss, precision, sampler, scoring, train
from benchmarks.harness import FAILED
from benchmarks.models import random_decoder
from benchmarks.shapes import MODELS, head_case
from tests.emulation.gpu_stand_in import stand_in
from tests.emulation.taped_graphs import tape_passes

TINY = MODELS["cpu-0.3m"] | {"num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """It computes in bf16; models of real names are tiny."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setitem(MODELS, "qwen3-0.6b", TINY)
    with stand_in():
        yield


@pytest.fixture
def notes():
    found: list[str] = []
    yield found
    assert not [note for note in found if note.startswith(FAILED)]


def test_sections_are_those_of_a_gpu(notes):
    for suite in (divergence, elementwise, guards, linear, loss, precision, sampler, scoring, train):
        names = list(suite.sections(notes))
        assert names and not [name for name in names if name.startswith("cpu")]


def test_a_call_that_takes_long_is_timed_once(monkeypatch, notes):
    monkeypatch.setattr(harness, "_LONG", 1e-9)
    calls = []
    harness.measure({"a": lambda: calls.append(None)}, 3, notes)
    assert len(calls) == 2


@pytest.mark.parametrize("suite", [loss, scoring, divergence])
def test_a_section_of_the_suites_of_the_head(monkeypatch, notes, suite):
    small = lambda T, H, data, device: head_case(1030, 32, data, device, 200)  # noqa: E731
    monkeypatch.setattr(suite, "head_case", small)
    monkeypatch.setattr(suite, "ROUNDS", 1)
    section = next(iter(suite.sections(notes).values()))
    assert {row["data"] for row in section()} == {"peaked", "random"}


def test_a_section_of_elementwise_operations(monkeypatch, notes):
    monkeypatch.setattr(elementwise, "cases", partial(elementwise.cases, tokens=66))
    monkeypatch.setattr(elementwise, "_ROUNDS", 1)
    assert len(elementwise.sections(notes)["H 1,024"]()) == 5 * 2 * 3


def test_a_section_of_products(monkeypatch, notes):
    monkeypatch.setattr(linear, "_SHAPES", {"qwen3-8b": (32, 48), "qwen3-0.6b": (32, 48)})
    monkeypatch.setattr(linear, "_BYTES", 2 * 32 * 96)
    variants = {row["variant"] for row in linear.sections(notes)["qwen3-8b"]()}
    assert variants >= {"ThinkSafe", "ThinkSafe, e4m3", "ThinkSafe, e4m3, quantising its input", "torch"}


def test_a_decode_pass_is_taken_apart(notes):
    (row,) = sampler._decode_pass("qwen3-0.6b", 4, 100)
    assert row["tokens/s"] > 0 and row["attention ms"] > 0


def test_a_whole_run_in_all_modes(monkeypatch, notes):
    """Their engine, whose thread stands on no stand-in, is another test's."""
    monkeypatch.setattr(sampler, "_their_continuous", lambda start, prompts, lengths: None)
    size = {"count": 6, "mean": 20, "longest": 40, "rows": 4}
    rows = sampler._end_to_end("qwen3-0.6b", notes, **size, modes=True, theirs=True)
    assert [row["variant"] for row in rows] == [
        "ThinkSafe", "ThinkSafe, batch-invariant", "ThinkSafe, cache in e4m3", "ThinkSafe, weights and cache in e4m3",
        "transformers, continuous batching",
    ]  # fmt: skip
    (alone,) = sampler._end_to_end("qwen3-0.6b", notes, **size)
    assert "ThinkSafe is faster by" not in alone


def test_the_time_that_a_gpu_waits_is_gathered():
    """Between passes, and while those of decoding are launched."""

    class Runner:
        device = SimpleNamespace(type="cuda")

        def draw(self, plan):
            time.sleep(0.02)
            return plan

    runner = Runner()
    with sampler._watched(runner) as gaps:
        for is_decode in (False, True, False, True):
            plan = SimpleNamespace(is_decode=is_decode)
            assert runner.draw(plan) is plan
    assert len(gaps) == 2 + 3 and min(gaps[:2]) > 0.019 and gaps[2:] == [0.005] * 3
    assert "draw" not in vars(runner)


def test_the_suite_of_guards(monkeypatch, notes):
    products = guards._layer_products
    monkeypatch.setattr(
        guards, "_layer_products", lambda decoder, device, dtype, *size: products(decoder, device, dtype, 8, 1)
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    monkeypatch.setitem(MODELS, "cpu-guard-14m", MODELS["cpu-guard-14m"] | sizes)
    rows = guards._of_model("cpu-guard-14m", 2, 2, 2, notes)
    assert len(rows) == 4 and any("verdicts change" in note for note in notes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_suite_of_training(monkeypatch, notes, method):
    tape_passes(monkeypatch)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "recorded_on", lambda *of_the_case: 1024)
    monkeypatch.setattr(train, "peer", lambda module, notes: None)
    rows = train._case("qwen3-0.6b", method, 1, notes)
    variants = {row["variant"] for row in rows}
    assert variants >= {"ThinkSafe", "ThinkSafe, launched kernel by kernel", "ThinkSafe, packs of 32k tokens a step"}
    assert ("ThinkSafe, frozen weights in e4m3" in variants) == (method == "lora")


def test_the_suite_of_precision(monkeypatch, notes):
    monkeypatch.setattr(precision, "_RESPONSES", 2)
    monkeypatch.setattr(precision, "_TOKENS", 4)
    assert len(precision.sections(notes)["qwen3-0.6b"]()) == 7


def test_a_mode_that_fails_costs_the_others_nothing(monkeypatch):
    def broken(decoder):
        raise RuntimeError("no e4m3")

    for suite in (sampler, guards, train, precision):
        monkeypatch.setattr(suite, "in_e4m3", broken)
    tape_passes(monkeypatch)
    monkeypatch.setattr(train, "response_lengths", lambda count, mean, longest, seed: [9] * 8)
    monkeypatch.setattr(train, "peer", lambda module, notes: None)
    monkeypatch.setattr(precision, "_RESPONSES", 2)
    monkeypatch.setattr(precision, "_TOKENS", 4)
    for suite, measure, names in (
        ("sampler", partial(sampler._end_to_end, "qwen3-0.6b", count=6, mean=9, longest=20, rows=4, modes=True), 3),
        ("train", partial(train._case, "qwen3-0.6b", "lora", 1), 3),
        (
            "precision",
            partial(precision._of_model, "qwen3-0.6b", lambda: random_decoder("qwen3-0.6b", "cpu", torch.bfloat16)),
            4,
        ),
    ):
        notes: list[str] = []
        rows = measure(notes=notes)
        assert len(rows) == names and not [row for row in rows if "weights" in row["variant"]], suite
        failures = [note for note in notes if note.startswith(FAILED)]
        assert failures and all(note.endswith("RuntimeError: no e4m3") for note in failures), suite
