"""The suites of kernels, which measure on a GPU only: on a tiny case here, so that what they call, count and check is
right before a GPU sees it."""

import importlib
import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import divergence, elementwise, harness, linear, loss, run, sampler, scoring
from benchmarks.shapes import head_case


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torch.compile takes longer than all the rest, and its result is torch's."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def columns(rows):
    assert rows and all(list(row) for row in rows)
    return set.union(*(set(row) for row in rows))


TIMES = {"variant", "ms", "floor ms", "share of the floor", "peak GB"}


@pytest.mark.parametrize("data", ["peaked", "random"])
@pytest.mark.parametrize("trainable", [False, True])
def test_the_suite_of_losses(data, trainable):
    notes = []
    rows = loss.at(*head_case(70, 32, data, "cpu", 200), data, trainable, loss.peers(notes), notes)
    assert columns(rows) >= TIMES | {"T", "H", "data", "head", "TFLOP/s", "error of dX"}
    assert (columns(rows) >= {"rho", "dropped mass"}) != trainable
    assert {row["variant"] for row in rows} >= {"ThinkSafe", "torch", "torch.compile"}
    assert all(row["error of dX"] < 0.05 for row in rows)
    assert all("absent" in note for note in notes), "every peer that is missing is named"


def test_the_suite_of_scores():
    notes = []
    x, weight, target = head_case(70, 32, "peaked", "cpu", 200)
    rows = scoring.responses(x, weight, target, "peaked", scoring.response_peers(notes), notes)
    rows += scoring.verdicts(x[:8], weight, "peaked", notes)
    assert columns(rows) >= TIMES | {"what", "T", "H", "data", "largest error, nats"}
    assert {"ThinkSafe, margin alone", "ThinkSafe, entropy and top-1"} < {row["variant"] for row in rows}
    for row in rows:
        assert row["largest error, nats"] < (1e-4 if row["variant"].startswith("ThinkSafe") else 0.2), row


@pytest.mark.parametrize("direction", divergence.DIRECTIONS)
def test_the_suite_of_divergences(direction):
    notes = []
    x, weight, _ = head_case(70, 32, "random", "cpu", 200)
    rows = divergence.at(x.float(), weight.float(), 1.0, "random", direction, divergence.peers(notes), notes)
    assert columns(rows) >= TIMES | {"T", "H", "data", "direction", "nats", "value", "error of dX"}
    for row in rows:
        assert row["error of dX"] < 1e-3 and row["value"] == pytest.approx(rows[0]["value"], rel=1e-4), row


def test_the_suite_of_elementwise_operations():
    rows, notes = [], []
    for operation, case in elementwise.cases(64, 2, None, tokens=80, device="cpu").items():
        rows += elementwise.at(operation, 64, *case, notes)
    assert columns(rows) == TIMES | {"operation", "H", "direction", "TB/s", "error"}
    assert len(rows) == 5 * 2 * 3 and not notes
    assert all(0 < row["error"] < 0.02 for row in rows)


def test_the_suite_of_products():
    x, weights = torch.randn(70, 64).bfloat16(), [torch.randn(48, 64).bfloat16() for _ in range(2)]
    notes: list[str] = []
    rows = linear.products(x, weights, notes) + linear.with_gradient(x, weights[0], notes)
    assert columns(rows) >= TIMES | {"what", "T", "K", "N", "error"}
    found = {(row["what"], row["variant"]): row for row in rows}
    assert {("product", "ThinkSafe, e4m3, quantising its input"), ("product and gradient", "torch")} < set(found)
    for (_, variant), row in found.items():
        assert row["error"] < (0.05 if "e4m3" in variant else 0.005), row
    # Where torch multiplies e4m3 on this device, it gets the numbers that we get.
    theirs = found.get(("product", "torch, e4m3"), found["product", "ThinkSafe, e4m3"])
    assert theirs["error"] == pytest.approx(found["product", "ThinkSafe, e4m3"]["error"], rel=1e-3)
    assert all(note.startswith("left out: torch, e4m3") for note in notes)


def test_no_run_of_the_sampler_finds_its_prompts_read(monkeypatch):
    """Transformers reads them in every run."""
    engines = []

    class Watched(sampler.Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            engines.append(self)

    monkeypatch.setattr(sampler, "Engine", Watched)
    (row,) = sampler._end_to_end("cpu-0.3m", [], count=4, mean=5, longest=9, rows=4)
    (engine,) = engines
    assert row["tokens/s"] > 0 and engine.scheduler.computed_tokens > 4 * 4 * 64 and not engine.scheduler.shared_tokens


def test_what_fails_is_told_and_left_out_and_the_others_are_measured():
    calls, notes = [], []

    def second_time():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("now\nand here is why")

    works = {"ThinkSafe": second_time, "torch": lambda: 1 / 0, "other": lambda: None, "ThinkSafe, too": lambda: None}
    assert list(harness.measure(works, 3, notes)) == ["other", "ThinkSafe, too"]
    assert notes == ["left out: torch: ZeroDivisionError: division by zero", "failed: ThinkSafe: ValueError: now"]


def test_a_first_call_may_be_another_one():
    calls = []
    harness.measure({"a": lambda: calls.append("a")}, 2, [], calls.append, {"a": lambda: calls.append("first")})
    assert calls == ["first", "a", "a", "a"]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where results go."""
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    return tmp_path / "results" / harness.device_name()


def test_a_suite_is_written_after_every_section_and_goes_on_where_one_fails(monkeypatch, folder, capsys):
    seen = []

    def section():
        seen.append(json.loads(file.read_text()) if file.exists() else None)
        return [{"T": len(seen)}]

    suite = SimpleNamespace(
        CLAIM="A claim.",
        sections=lambda notes: {"one": section, "two": lambda: 1 / 0, "three": section, "four": section},
    )
    monkeypatch.setitem(sys.modules, "benchmarks.loss", suite)
    file = folder / "loss.json"
    assert not run.run("loss")
    after_two = seen[1]
    assert seen[0] is None and after_two["rows"] == [{"T": 1}]
    failure = "failed: ThinkSafe, two: ZeroDivisionError: division by zero"
    assert after_two["notes"] == [failure, "not measured: three", "not measured: four"]
    record = json.loads(file.read_text())
    assert record["rows"] == [{"T": 1}, {"T": 2}, {"T": 3}] and record["notes"] == [failure]
    out, err = capsys.readouterr()
    assert failure in out.splitlines() and "ZeroDivisionError" in err


def test_suites_have_processes_of_their_own_which_end_in_time(monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", partial(stand_in, run.subprocess.run))
    assert run.in_a_process("import time; time.sleep(60)", 0.3)["outcome"] == "cut off"
    assert run.in_a_process("raise SystemExit(1)", None)["outcome"] == "failures"
    assert run.in_a_process("", None)["outcome"] == "whole"


def stand_in(real, command, **options):
    """Runs the suite's name as a program."""
    assert command[1:4] == ["-m", "benchmarks.run", "--suite"]
    return real([command[0], "-c", command[4]], stderr=subprocess.DEVNULL, **options)


def test_every_suite_names_its_sections_without_a_gpu():
    for name in run.SUITES:
        suite = importlib.import_module(f"benchmarks.{name}")
        assert suite.CLAIM.endswith(".") and all(callable(section) for section in suite.sections([]).values())


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    taken = harness.Measured(seconds=2.0, peak_bytes=3_000_000_000)
    by_memory = harness.figures(taken, harness.RATE / 2, harness.BANDWIDTH)
    assert by_memory == {"ms": 2000, "floor ms": 1000, "share of the floor": 0.5, "TB/s": 2.15, "peak GB": 3}
    assert harness.figures(taken, 2 * harness.RATE, harness.BANDWIDTH)["TFLOP/s"] == 790


def test_a_result_is_written_as_json_and_as_a_page(folder):
    file = harness.write(harness.Result("loss", "A claim.", [{"T": 3, "ms": 0.25}], ["a note"]), "a command")
    record = json.loads(file.read_text())
    page = file.with_suffix(".md").read_text()
    assert file == folder / "loss.json" and record["rows"] == [{"T": 3, "ms": 0.25}]
    assert page == harness.markdown(record)
    for line in ("# loss", "A claim.", "| T | ms |", "| 3 | 0.25 |", "- a note"):
        assert line in page.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs whole suites where there is a GPU")
def test_without_a_gpu_the_suites_of_kernels_say_so_in_one_line():
    command = [sys.executable, "-m", "benchmarks.run", "--suite", *run.KERNELS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"no GPU: {', '.join(run.KERNELS)} measured nothing, for the kernels need one\n"
    assert not done.stderr
