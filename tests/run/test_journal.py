"""Record files survive kills and do not depend on which worker wrote which record; texts are replaced atomically.

The tests leave files as a killed process does, and compare the finished file with the expected lines.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.worker_threads import run_in_threads
from thinksafe.data.atomic import write_atomically, write_records
from thinksafe.data.jsonl import to_json
from thinksafe.data.records import Response
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.run import journal as journal_module
from thinksafe.run.journal import Journal


def response(number: int, text: str = "t") -> Response:
    return Response(f"prompt {number}", "benign", text)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "responses.jsonl"


def write_journal(file, *records, finished=False):
    """Write records as a process does that is then killed, or finishes. Return the file that it leaves."""
    journal = Journal(file, Response)
    for record in records:
        journal.append(record)
    if finished:
        journal.finish(record.key for record in records)
    return file if finished else journal.partial


def test_file_has_its_final_name_only_when_it_is_finished(file):
    journal = Journal(file, Response)
    journal.append(response(1))
    assert not file.exists() and journal.partial.exists()
    journal.finish([response(1).key])
    assert os.listdir(file.parent) == [file.name]
    assert file.read_text() == to_json(response(1)) + "\n"


def test_appended_record_outlives_the_process(file):
    journal = Journal(file, Response)
    journal.append(response(1))
    assert journal.partial.read_text().endswith("}\n")


def test_unfinished_file_is_continued(file):
    write_journal(file, response(1), response(2))
    journal = Journal(file, Response)
    assert list(journal.records()) == [response(1), response(2)]
    journal.append(response(3))
    journal.finish(response(n).key for n in (1, 2, 3))
    assert file.read_text() == "".join(to_json(response(n)) + "\n" for n in (1, 2, 3))


@pytest.mark.parametrize("text", ["t", "é🪁 \u2028 \x85 \\n"])
def test_incomplete_line_is_written_again(tmp_path, text):
    whole = to_json(response(1, text)).encode() + b"\n"
    torn = to_json(response(2, text)).encode() + b"\n"
    for cut in range(len(torn)):
        file = tmp_path / f"{cut}.jsonl"
        file.with_name(file.name + ".partial").write_bytes(whole + torn[:cut])
        journal = Journal(file, Response)
        assert list(journal.records()) == [response(1, text)], cut
        journal.append(response(2, text))
        journal.finish(response(n).key for n in (1, 2))
        assert file.read_bytes() == whole + torn, cut


def test_incomplete_first_line_leaves_an_empty_file(file):
    file.with_name(file.name + ".partial").write_text('{"prompt": "p')
    assert list(Journal(file, Response).records()) == []


def test_finished_file_without_manifest_entry_is_kept(file):
    write_journal(file, response(1), finished=True)
    journal = Journal(file, Response)
    assert list(journal.records()) == [response(1)]
    journal.finish([response(1).key])
    assert file.read_text() == to_json(response(1)) + "\n"


def test_damaged_line_is_named(file):
    partial = write_journal(file, response(1))
    partial.write_text("garbage\n" + partial.read_text())
    with pytest.raises(UserError, match="record 1"):
        list(Journal(file, Response).records())


def test_text_is_replaced_atomically(tmp_path):
    file = tmp_path / "f.json"
    write_atomically(file, "old")
    write_atomically(file, "new é")
    assert file.read_text(encoding="utf-8") == "new é" and os.listdir(tmp_path) == ["f.json"]


def test_failed_write_leaves_nothing_behind(tmp_path):
    """Otherwise an invalid file of prompts would bind the run directory to its recipe."""

    def records():
        yield response(1)
        raise UserError("line 2 is not valid JSON")

    with pytest.raises(UserError):
        write_records(tmp_path / "prompts.jsonl", records())
    assert os.listdir(tmp_path) == []


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=25), st.integers(0, 40))
@settings(max_examples=40)
def test_file_does_not_depend_on_which_worker_wrote_what(num_workers, leftover, num_torn):
    """An earlier launch of up to four workers left records; one is incomplete, some exist twice."""
    records = [response(number) for number in range(10)]
    expected = "".join(to_json(record) + "\n" for record in records)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "responses.jsonl"
        for rank, number in leftover:
            with file.with_name(f"{file.name}.partial-{rank}").open("a") as part:
                part.write(to_json(records[number]) + "\n")
        if leftover:
            with file.with_name(f"{file.name}.partial-{leftover[0][0]}").open("a") as part:
                part.write(to_json(records[0])[:num_torn])

        def work(workers: Workers) -> set[str]:
            journal = Journal(file, Response, workers)
            done = {record.key for record in journal.records()}
            for record in workers.claim_items([record for record in records[::-1] if record.key not in done]):
                journal.append(record)
            journal.finish(record.key for record in records)
            return done

        assert run_in_threads(num_workers, work) == [{records[number].key for _, number in leftover}] * num_workers
        assert file.read_text() == expected and os.listdir(folder) == [file.name]


def test_file_that_lacks_a_record_is_never_final(file, monkeypatch):
    monkeypatch.setattr(journal_module, "_VISIBILITY_TIMEOUT", 0.0)

    def work(workers: Workers):
        journal = Journal(file, Response, workers)
        if workers.is_leader:
            journal.append(response(1))
            journal.finish([response(1).key, response(2).key])

    workers = Workers(0, 1, torch.distributed.HashStore())
    with pytest.raises(UserError, match="the records of some workers are not visible here"):
        work(workers)
    assert not file.exists() and list(Journal(file, Response).records()) == [response(1)]
