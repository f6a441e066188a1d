"""docs/run-directory.md: its tables list the files of a real run and the fields of the code's records.

Oracles: the record dataclasses, and a run of the recipe `organism` on a few prompts.
"""

import dataclasses
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest

from tests.support.organism_runs import run_arguments, run_pipeline
from thinksafe.cli.__main__ import main
from thinksafe.data.records import Example, Mark, Prompt, Response, Verdict
from thinksafe.guards.config import GuardConfig
from thinksafe.run.directory import FORMAT
from thinksafe.run.resume import memory_only_fields
from thinksafe.sampler.config import EngineConfig
from thinksafe.text.chat import FormatProblem
from thinksafe.training.config import TrainingConfig
from thinksafe.training.metrics import StepMetrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/run-directory.md").read_text(encoding="utf-8")
RECORDS = {
    "Prompt": Prompt,
    "Response": Response,
    "Verdict": Verdict,
    "Example": Example,
    "Mark": Mark,
    "Training metrics": StepMetrics,
}


def section(heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    (text,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return text


def tables(heading: str) -> list[list[tuple[list[str], list[str]]]]:
    """Return the tables of a section: for each row, the names in its first cell, and all its cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", section(heading), re.MULTILINE)
    rows = [[line.strip("| \n").split(" | ") for line in block.splitlines()[2:]] for block in blocks]
    return [[(re.findall(r"`([^`]+)`", cells[0]), cells) for cells in table] for table in rows]


def names(table: list[tuple[list[str], list[str]]]) -> list[str]:
    return [name for row_names, _ in table for name in row_names]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of all stages with a retry, a review page and a report."""
    folder = tmp_path_factory.mktemp("organism")
    ladder = ["--set", "generation.steering=null", "--set", "generation.ladder=[{steering: null}]"]
    arguments = run_arguments(folder / "inputs", 8, 3) + ladder
    run_pipeline(folder / "run", arguments)
    assert main(["review", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("heading", RECORDS)
def test_fields_are_those_of_the_dataclass(heading):
    (table,) = tables(heading)
    fields = dataclasses.fields(RECORDS[heading])
    assert names(table) == [field.name for field in fields]
    for (name,), cells in table if heading != "Training metrics" else ():
        field = next(field for field in fields if field.name == name)
        is_computed = cells[1] in ("computed", "file name")
        assert is_computed or (cells[1] == "required") == (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ), name


@pytest.mark.slow
def test_every_file_of_a_run_is_listed(run_folder):
    (table,) = tables("Files")
    patterns = [re.sub(r"\bN\b|PHASE|SET", "*", name) for name in names(table)]
    files = [str(file.relative_to(run_folder)) for file in run_folder.rglob("*") if file.is_file()]
    for file in files:
        assert any(fnmatch(file, pattern + ("*" if pattern.endswith("/") else "")) for pattern in patterns), file
    listed = {pattern for pattern in patterns if any(fnmatch(file, pattern) for file in files)}
    assert len(listed) > 15 and "rungs/*.responses.jsonl" in listed


@pytest.mark.slow
def test_keys_of_json_files_are_listed(run_folder):
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest_table, entry_table = tables("Manifest")
    assert set(names(manifest_table)) == manifest.keys() and f"format: {FORMAT}." in section("Manifest")
    assert set(names(entry_table)) == {key for entry in manifest["stages"].values() for key in entry} | {"peak_bytes"}
    (record, *_) = map(json.loads, (run_folder / "audit.jsonl").open())
    audit_table, attempt_table = tables("Audit record")
    assert names(audit_table) == list(record)
    assert names(attempt_table) == list(record["attempts"][0])
    (figures, *_) = json.loads((run_folder / "evaluation/before.json").read_text())
    assert names(tables("Evaluation figures")[0]) == list(figures)
    report = json.loads((run_folder / "report.json").read_text())
    needs_gpu_or_steering = {"estimate", "acceptance"}
    assert set(names(tables("Report")[0])) == report.keys() | needs_gpu_or_steering


def test_reasons_are_those_of_the_code():
    (table,) = tables("Reasons")
    code = "".join(file.read_text() for file in (ROOT / "thinksafe").rglob("*.py"))
    for reason in names(table):
        assert f'"{reason}"' in code, reason
    assert set(get_args(FormatProblem)) <= set(names(table))
    guard_reasons = {reason for log_probs in ((-9.0, -9.0), (float("nan"),) * 2, (-0.7, -0.7))
                     for reason in [GuardConfig(margin=0.1).decide(*log_probs)[1]]}  # fmt: skip
    assert guard_reasons == {"no_verdict", "guard_nan", "uncertain"} and guard_reasons <= set(names(table))


def test_settings_that_may_change_are_those_of_the_code():
    (table,) = tables("Resume")
    keys = {cells[0]: re.findall(r"`(\w+)`", cells[1]) for _, cells in table}
    assert keys["`sampler`, `guard.sampler`"] == memory_only_fields(EngineConfig())
    assert keys["`training`"] == list(TrainingConfig.MEMORY_ONLY_FIELDS)
