"""Files that a kill cannot tear: a shard is the same whoever wrote which part of it, and a text is old or new."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinksafe.data.atomic import write_atomically, write_shard
from thinksafe.data.jsonl import to_json
from thinksafe.data.records import Response
from thinksafe.distributed.workers import Workers
from thinksafe.errors import UserError
from thinksafe.run import journal as files
from thinksafe.run.journal import Journal


def response(number: int, text: str = "t") -> Response:
    return Response(f"prompt {number}", "benign", text)


@pytest.fixture
def shard(tmp_path):
    return tmp_path / "responses.jsonl"


def written(shard, *records, finished=False):
    """A shard as a process leaves it that wrote these records and was killed, or finished."""
    journal = Journal(shard, Response)
    for record in records:
        journal.append(record)
    if finished:
        journal.finish(record.key for record in records)
    return shard if finished else journal.partial


def test_a_shard_has_its_final_name_only_when_it_is_finished(shard):
    journal = Journal(shard, Response)
    journal.append(response(1))
    assert not shard.exists() and journal.partial.exists()
    journal.finish([response(1).key])
    assert os.listdir(shard.parent) == [shard.name]
    assert shard.read_text() == to_json(response(1)) + "\n"


def test_a_record_is_out_of_the_process_as_soon_as_it_is_appended(shard):
    journal = Journal(shard, Response)
    journal.append(response(1))
    assert journal.partial.read_text().endswith("}\n")


def test_an_unfinished_shard_goes_on_where_it_stopped(shard):
    written(shard, response(1), response(2))
    journal = Journal(shard, Response)
    assert list(journal.records()) == [response(1), response(2)]
    journal.append(response(3))
    journal.finish(response(n).key for n in (1, 2, 3))
    assert shard.read_text() == "".join(to_json(response(n)) + "\n" for n in (1, 2, 3))


@pytest.mark.parametrize("text", ["t", "é🪁 \u2028 \x85 \\n"])
def test_a_line_torn_anywhere_is_written_anew(tmp_path, text):
    whole = to_json(response(1, text)).encode() + b"\n"
    torn = to_json(response(2, text)).encode() + b"\n"
    for cut in range(len(torn)):
        shard = tmp_path / f"{cut}.jsonl"
        shard.with_name(shard.name + ".partial").write_bytes(whole + torn[:cut])
        journal = Journal(shard, Response)
        assert list(journal.records()) == [response(1, text)], cut
        journal.append(response(2, text))
        journal.finish(response(n).key for n in (1, 2))
        assert shard.read_bytes() == whole + torn, cut


def test_a_first_line_that_is_torn_leaves_an_empty_shard(shard):
    shard.with_name(shard.name + ".partial").write_text('{"prompt": "p')
    assert list(Journal(shard, Response).records()) == []


def test_a_finished_shard_that_the_manifest_does_not_know_is_kept(shard):
    written(shard, response(1), finished=True)
    journal = Journal(shard, Response)
    assert list(journal.records()) == [response(1)]
    journal.finish([response(1).key])
    assert shard.read_text() == to_json(response(1)) + "\n"


def test_a_damaged_line_inside_a_shard_is_named(shard):
    partial = written(shard, response(1))
    partial.write_text("garbage\n" + partial.read_text())
    with pytest.raises(UserError, match="record 1"):
        list(Journal(shard, Response).records())


def test_a_text_is_replaced_whole(tmp_path):
    file = tmp_path / "f.json"
    write_atomically(file, "old")
    write_atomically(file, "new é")
    assert file.read_text(encoding="utf-8") == "new é" and os.listdir(tmp_path) == ["f.json"]


def test_what_cannot_be_written_whole_leaves_nothing_behind(tmp_path):
    """Or an unreadable file of prompts would bind its run directory to the recipe that named it."""

    def records():
        yield response(1)
        raise UserError("line 2 is not valid JSON")

    with pytest.raises(UserError):
        write_shard(tmp_path / "prompts.jsonl", records())
    assert os.listdir(tmp_path) == []


def together(count: int, work) -> list:
    """What work(workers) gives, or raises, in `count` threads that share a run, by rank."""
    store = torch.distributed.HashStore()

    def outcome(rank: int):
        try:
            return work(Workers(rank, count, store))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(outcome, range(count)))


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=25), st.integers(0, 40))
@settings(max_examples=40)
def test_a_shard_is_the_same_whoever_wrote_it_in_which_order(count, left, torn):
    """An earlier launch of up to four workers left some records, one of them torn, some twice."""
    records = [response(number) for number in range(10)]
    wanted = "".join(to_json(record) + "\n" for record in records)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "responses.jsonl"
        for rank, number in left:
            with shard.with_name(f"{shard.name}.partial-{rank}").open("a") as part:
                part.write(to_json(records[number]) + "\n")
        if left:
            with shard.with_name(f"{shard.name}.partial-{left[0][0]}").open("a") as part:
                part.write(to_json(records[0])[:torn])

        def work(workers: Workers) -> set[str]:
            journal = Journal(shard, Response, workers)
            done = {record.key for record in journal.records()}
            for record in workers.share([record for record in records[::-1] if record.key not in done]):
                journal.append(record)
            journal.finish(record.key for record in records)
            return done

        assert together(count, work) == [{records[number].key for _, number in left}] * count
        assert shard.read_text() == wanted and os.listdir(folder) == [shard.name]


def test_a_shard_that_lacks_a_record_is_never_final(shard, monkeypatch):
    monkeypatch.setattr(files, "_SEEN_WITHIN", 0.0)

    def work(workers: Workers):
        journal = Journal(shard, Response, workers)
        if workers.leads:
            journal.append(response(1))
            journal.finish([response(1).key, response(2).key])

    workers = Workers(0, 1, torch.distributed.HashStore())
    with pytest.raises(UserError, match="not every worker's records are to be seen here"):
        work(workers)
    assert not shard.exists() and list(Journal(shard, Response).records()) == [response(1)]
