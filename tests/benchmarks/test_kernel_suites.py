"""The suites of kernels call, count and check correctly; tiny cases run on a CPU, although the suites need a GPU.

The oracles are the suites' own errors against fp64, and hand-made variants, sections and measurements."""

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
def no_compilation(monkeypatch):
    """Replace torch.compile: it takes longer than everything else and gives the results of torch."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def column_names(rows):
    assert rows and all(list(row) for row in rows)
    return set.union(*(set(row) for row in rows))


TIMING_COLUMNS = {"variant", "ms", "floor ms", "share of the floor", "peak GB"}


@pytest.mark.parametrize("data", ["peaked", "random"])
@pytest.mark.parametrize("trainable", [False, True])
def test_loss_suite_reports_errors_of_all_variants(data, trainable):
    notes = []
    rows = loss.measure_case(*head_case(70, 32, data, "cpu", 200), data, trainable, loss.peer_losses(notes), notes)
    assert column_names(rows) >= TIMING_COLUMNS | {"T", "H", "data", "head", "TFLOP/s", "error of dX"}
    assert (column_names(rows) >= {"rho", "dropped mass"}) != trainable
    assert {row["variant"] for row in rows} >= {"ThinkSafe", "torch", "torch.compile"}
    assert all(row["error of dX"] < 0.05 for row in rows)
    assert all("absent" in note for note in notes), "a note names every missing peer"


def test_scoring_suite_reports_errors_of_all_variants():
    notes = []
    x, weight, target = head_case(70, 32, "peaked", "cpu", 200)
    rows = scoring.measure_responses(x, weight, target, "peaked", scoring.peer_scores(notes), notes)
    rows += scoring.measure_verdicts(x[:8], weight, "peaked", notes)
    assert column_names(rows) >= TIMING_COLUMNS | {"what", "T", "H", "data", "largest error, nats"}
    assert {"ThinkSafe", "ThinkSafe, entropy and top-1"} < {row["variant"] for row in rows}
    for row in rows:
        assert row["largest error, nats"] < (1e-4 if row["variant"].startswith("ThinkSafe") else 0.2), row


@pytest.mark.parametrize("direction", divergence.DIRECTIONS)
def test_divergence_suite_reports_errors_of_all_variants(direction):
    notes = []
    x, weight, _ = head_case(70, 32, "random", "cpu", 200)
    rows = divergence.measure_case(
        x.float(), weight.float(), 1.0, "random", direction, divergence.peer_losses(notes), notes
    )
    assert column_names(rows) >= TIMING_COLUMNS | {"T", "H", "data", "direction", "nats", "value", "error of dX"}
    for row in rows:
        assert row["error of dX"] < 1e-3 and row["value"] == pytest.approx(rows[0]["value"], rel=1e-4), row


def test_elementwise_suite_reports_errors_of_all_variants():
    rows, notes = [], []
    for operation, case in elementwise.cases(64, 2, None, tokens=80, device="cpu").items():
        rows += elementwise.measure_case(operation, 64, *case, notes)
    assert column_names(rows) == TIMING_COLUMNS | {"operation", "H", "direction", "TB/s", "error"}
    assert len(rows) == 5 * 2 * 3 and not notes
    assert all(0 < row["error"] < 0.02 for row in rows)


def test_linear_suite_reports_errors_of_all_variants():
    x, weights = torch.randn(70, 64).bfloat16(), [torch.randn(48, 64).bfloat16() for _ in range(2)]
    notes: list[str] = []
    rows = linear.measure_products(x, weights, notes) + linear.measure_products_with_gradient(x, weights[0], notes)
    assert column_names(rows) >= TIMING_COLUMNS | {"what", "T", "K", "N", "error"}
    rows_by_variant = {(row["what"], row["variant"]): row for row in rows}
    assert {("product", "ThinkSafe, e4m3, quantising its input"), ("product and gradient", "torch")} < set(
        rows_by_variant
    )
    for (_, variant), row in rows_by_variant.items():
        assert row["error"] < (0.05 if "e4m3" in variant else 0.005), row
    # If torch supports e4m3 matmuls on this device, it gets the same elements as ThinkSafe.
    torch_row = rows_by_variant.get(("product", "torch, e4m3"), rows_by_variant["product", "ThinkSafe, e4m3"])
    assert torch_row["error"] == pytest.approx(rows_by_variant["product", "ThinkSafe, e4m3"]["error"], rel=1e-3)
    assert all(note.startswith("left out: torch, e4m3") for note in notes)


def test_sampler_suite_prefills_prompts_in_every_run(monkeypatch):
    """transformers also prefills them in every run."""
    engines = []

    class RecordedEngine(sampler.Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            engines.append(self)

    monkeypatch.setattr(sampler, "Engine", RecordedEngine)
    (row,) = sampler._measure_end_to_end("cpu-0.3m", [], count=4, mean=5, longest=9, rows=4)
    (engine,) = engines
    assert row["tokens/s"] > 0 and engine.scheduler.computed_tokens > 4 * 4 * 64 and not engine.scheduler.shared_tokens


@pytest.mark.slow
def test_failing_variants_are_noted_and_others_measured():
    calls, notes = [], []

    def fail_in_second_call():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("first line\nsecond line")

    variants = {
        "ThinkSafe": fail_in_second_call,
        "torch": lambda: 1 / 0,
        "other": lambda: None,
        "ThinkSafe, another": lambda: None,
    }
    assert list(harness.measure(variants, 3, notes)) == ["other", "ThinkSafe, another"]
    assert notes == [
        "left out: torch: ZeroDivisionError: division by zero",
        "failed: ThinkSafe: ValueError: first line",
    ]


def test_warm_up_call_replaces_the_first_call():
    calls = []
    harness.measure({"a": lambda: calls.append("a")}, 2, [], calls.append, {"a": lambda: calls.append("warm-up")})
    assert calls == ["warm-up", "a", "a", "a"]


@pytest.fixture
def results_folder(monkeypatch, tmp_path):
    """The folder of the results."""
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    return tmp_path / "results" / harness.device_name()


@pytest.mark.slow
def test_results_are_written_after_each_section_despite_failures(monkeypatch, results_folder, capsys):
    records = []

    def section():
        records.append(json.loads(file.read_text()) if file.exists() else None)
        return [{"T": len(records)}]

    suite = SimpleNamespace(
        CLAIM="A claim.",
        sections=lambda notes: {"1st": section, "2nd": lambda: 1 / 0, "3rd": section, "4th": section},
    )
    monkeypatch.setitem(sys.modules, "benchmarks.loss", suite)
    file = results_folder / "loss.json"
    assert not run.run_suite("loss")
    record_after_failure = records[1]
    assert records[0] is None and record_after_failure["rows"] == [{"T": 1}]
    failure = "failed: ThinkSafe, 2nd: ZeroDivisionError: division by zero"
    assert record_after_failure["notes"] == [failure, "not measured: 3rd", "not measured: 4th"]
    record = json.loads(file.read_text())
    assert record["rows"] == [{"T": 1}, {"T": 2}, {"T": 3}] and record["notes"] == [failure]
    out, err = capsys.readouterr()
    assert failure in out.splitlines() and "ZeroDivisionError" in err


def test_suite_process_ends_at_its_time_limit(monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", partial(run_name_as_program, run.subprocess.run))
    assert run.run_in_subprocess("import time; time.sleep(60)", 0.3)["outcome"] == "cut off"
    assert run.run_in_subprocess("raise SystemExit(1)", None)["outcome"] == "failures"
    assert run.run_in_subprocess("", None)["outcome"] == "complete"


def run_name_as_program(run, command, **options):
    """Run the suite's name as a Python program."""
    assert command[1:4] == ["-m", "benchmarks.run", "--suite"]
    return run([command[0], "-c", command[4]], stderr=subprocess.DEVNULL, **options)


def test_suites_list_sections_without_a_gpu():
    for name in run.SUITES:
        suite = importlib.import_module(f"benchmarks.{name}")
        assert suite.CLAIM.endswith(".") and all(callable(section) for section in suite.sections([]).values())


def test_floor_is_the_slower_of_compute_and_memory():
    measurement = harness.Measurement(seconds=2.0, peak_bytes=3_000_000_000)
    by_memory = harness.timing_columns(measurement, harness.MATMUL_FLOP_PER_SECOND / 2, harness.BYTES_PER_SECOND)
    assert by_memory == {"ms": 2000, "floor ms": 1000, "share of the floor": 0.5, "TB/s": 2.15, "peak GB": 3}
    assert (
        harness.timing_columns(measurement, 2 * harness.MATMUL_FLOP_PER_SECOND, harness.BYTES_PER_SECOND)["TFLOP/s"]
        == 790
    )


def test_result_is_written_as_json_and_page(results_folder):
    file = harness.write_result(
        harness.SuiteResult("loss", "A claim.", [{"T": 3, "ms": 0.25}], ["a note"]), "a command"
    )
    record = json.loads(file.read_text())
    page = file.with_suffix(".md").read_text()
    assert file == results_folder / "loss.json" and record["rows"] == [{"T": 3, "ms": 0.25}]
    assert page == harness.markdown_page(record)
    for line in ("# loss", "A claim.", "| T | ms |", "| 3 | 0.25 |", "- a note"):
        assert line in page.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would run whole suites on a GPU")
def test_kernel_suites_are_skipped_without_a_gpu():
    command = [sys.executable, "-m", "benchmarks.run", "--suite", *run.KERNEL_SUITES]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert completed.stdout == f"no GPU: skipping {', '.join(run.KERNEL_SUITES)}, which need one\n"
    assert not completed.stderr
