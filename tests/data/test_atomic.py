"""A file or folder that is written atomically has its old contents or all of the new ones."""

import os
from pathlib import Path

import pytest

from thinksafe.data.atomic import atomic_path, atomic_writer, export_folder, write_atomically
from thinksafe.errors import UserError


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def fail_while_writing(path: Path) -> None:
    with atomic_path(path) as partial:
        partial.mkdir() if path.is_dir() else partial.write_text("new")
        raise KeyboardInterrupt


def test_file_has_old_contents_until_all_new_ones_are_written(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with atomic_writer(tmp_path / "file") as stream:
        stream.write("new")
        assert (tmp_path / "file").read_text() == "old"
    assert contents(tmp_path) == {"file": "new"}


def test_interrupted_write_leaves_the_old_contents_alone(tmp_path):
    write_atomically(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "folder/file", "old")
    for name in ("file", "folder"):
        with pytest.raises(KeyboardInterrupt):
            fail_while_writing(tmp_path / name)
    assert contents(tmp_path) == {"file": "old", "folder/file": "old"} and len(list(tmp_path.iterdir())) == 2


def test_folder_appears_complete_without_leftovers_of_an_earlier_attempt(tmp_path):
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial/stale").write_text("stale")
    with atomic_path(tmp_path / "folder") as partial:
        (partial / "data").mkdir(parents=True)
        (partial / "data/file").write_text("new")
        assert not (tmp_path / "folder").exists()
    assert contents(tmp_path) == {"folder/data/file": "new"}


def test_all_contents_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    synchronized, fsync, replace = set(), os.fsync, os.replace

    def record_fsync(descriptor):
        synchronized.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def check_replace(source, target):
        assert {Path(source), *Path(source).rglob("*")} <= synchronized
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    write_atomically(tmp_path / "file", "new")
    with atomic_path(tmp_path / "folder") as partial:
        (partial / "data").mkdir(parents=True)
        (partial / "data/file").write_text("new")
    assert contents(tmp_path) == {"file": "new", "folder/data/file": "new"}


def test_export_folder_replaces_nothing_that_the_user_has(tmp_path):
    with export_folder(tmp_path / "new") as staging:
        (staging / "file").write_text("new")
    with pytest.raises(UserError, match="not empty"), export_folder(tmp_path / "new"):
        pass
    with pytest.raises(UserError, match="is a file"), export_folder(tmp_path / "new/file"):
        pass
    assert contents(tmp_path) == {"new/file": "new"}
