"""Files of a workdir are there whole or not at all, whoever writes them, and outlast a power cut."""

import fcntl
import os
import threading
from pathlib import Path

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from jax_backtrack.hub.export import save
from jax_backtrack.utils.resume_cache import ResumeCache
from jax_backtrack.utils.workdir import atomic_write
from tests import tiny
from tests.processes import HANG


@pytest.fixture
def synced(monkeypatch, tmp_path):
    """Of each `fsync` the name of what reached the disk, and the names and sizes that the folder had then."""
    found, real = [], os.fsync

    def fsync(number: int) -> None:
        real(number)
        there = {path.name: path.stat().st_size if path.is_file() else None for path in tmp_path.iterdir()}
        found.append((Path(os.readlink(f"/proc/self/fd/{number}")).name, there))

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_file_has_its_name_when_its_content_is_on_disk(synced, tmp_path):
    atomic_write(tmp_path / "file", "old")
    synced.clear()
    atomic_write(tmp_path / "file", "newer")
    (written, before), (folder, after) = synced
    assert before == {"file": len("old"), written: len("newer")} and written.startswith("file.writing-")
    assert (folder, after) == (tmp_path.name, {"file": len("newer")})


def test_a_result_is_on_disk_before_the_next_one_is_computed(synced, tmp_path):
    kept = ResumeCache(tmp_path / "kept")
    for number in range(3):
        kept.add(str(number), number)
        assert synced[-1] == ("kept", {"kept": (tmp_path / "kept").stat().st_size})
    kept.close()


def test_an_export_has_its_name_when_its_files_are_on_disk(synced, tmp_path, short_tokenizer):
    save(tiny.model(vocab_size=tiny.SHORT), short_tokenizer, tmp_path / "export")
    *before, (folder, after) = synced
    assert {path.name for path in (tmp_path / "export").rglob("*")} < {name for name, _ in before}
    assert not any("export" in there for _, there in before)
    assert folder == tmp_path.name and "export" in after


def test_runs_that_share_a_folder_do_not_meet(tmp_path):
    """Each of them writes the same file, again and again."""
    contents, failures = [f"{number}" * 20_000 for number in range(4)], []

    def write(content: str) -> None:
        try:
            for _ in range(50):
                atomic_write(tmp_path / "shared", content)
                assert (tmp_path / "shared").read_text() in contents
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not failures and [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_what_a_killed_run_left_goes_and_what_another_writes_stays(tmp_path):
    (tmp_path / "file.writing-1-abc").write_text("left")
    (tmp_path / "file.writing-2-abc").write_text("half a")
    with (tmp_path / "file.writing-2-abc").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        atomic_write(tmp_path / "file", "content")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.writing-2-abc"]
    atomic_write(tmp_path / "file", "content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic_write(tmp_path / "folder", "content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_may_lie_in_a_bucket(monkeypatch):
    """Which here is memory: of a bucket all that differs is who holds the objects."""

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]
        protocol = "gs"

    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setenv("EPATH_USE_TF", "false")
    for content in ("old", "new"):
        atomic_write(epath.Path("gs://bucket/run") / "file.json", content)
        assert epath.Path("gs://bucket/run/file.json").read_text() == content
    assert len(Bucket.store) == 1
