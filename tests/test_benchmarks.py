"""The suites of kernels, which measure on a GPU only: on a tiny case here, so that what they call, count and check is
right before a GPU sees it."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import divergence, elementwise, harness, loss, scoring
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
    rows += scoring.verdicts(x[:8], weight, "peaked", scoring.verdict_peers(), notes)
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


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    taken = harness.Measured(seconds=2.0, peak_bytes=3_000_000_000)
    by_memory = harness.figures(taken, harness.RATE / 2, harness.BANDWIDTH)
    assert by_memory == {"ms": 2000, "floor ms": 1000, "share of the floor": 0.5, "TB/s": 2.15, "peak GB": 3}
    assert harness.figures(taken, 2 * harness.RATE, harness.BANDWIDTH)["TFLOP/s"] == 790


def test_a_result_is_written_as_json_and_as_a_page(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    file = harness.write(harness.Result("loss", "A claim.", [{"T": 3, "ms": 0.25}], ["a note"]), "a command")
    record = json.loads(file.read_text())
    page = file.with_suffix(".md").read_text()
    assert file == tmp_path / "results" / harness.device_name() / "loss.json" and record["rows"] == [
        {"T": 3, "ms": 0.25}
    ]
    assert page == harness.markdown(record)
    for line in ("# loss", "A claim.", "| T | ms |", "| 3 | 0.25 |", "- a note"):
        assert line in page.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs whole suites where there is a GPU")
@pytest.mark.parametrize("suite", ["loss", "scoring", "divergence", "elementwise"])
def test_without_a_gpu_a_suite_of_kernels_says_so_in_one_line(suite):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--suite", suite], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"no GPU: {suite} measured nothing, for the kernels need one\n" and not done.stderr
