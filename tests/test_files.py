"""Files that are whole or absent."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from deconvnet import files
from deconvnet.files import atomic_write, sole_use


def test_the_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "folder" / "data.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert temporary.parent == path.parent  # another disk could not move it in one step
        assert temporary.suffix == ".bin"  # some writers choose the format by it
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["data.bin"]


def test_the_old_file_stays_until_the_new_one_is_done(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("old")
    with atomic_write(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_failure_leaves_nothing_behind(tmp_path, error, old):
    path = tmp_path / "data.txt"
    if old:
        path.write_text(old)

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == (["data.txt"] if old else [])
    if old:
        assert path.read_text() == old


def test_a_writer_that_removes_its_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "data.txt") as temporary:
        temporary.unlink()
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_stays(tmp_path):
    (tmp_path / "data" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="data"), atomic_write(tmp_path / "data") as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["data"]
    assert os.listdir(tmp_path / "data") == ["inside"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_others_may_read_it(tmp_path):
    with atomic_write(tmp_path / "data.txt") as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "data.txt").stat().st_mode) == 0o644


def test_two_writers_do_not_mix(tmp_path):
    path, barrier = tmp_path / "data.txt", threading.Barrier(4)

    def write(text):
        with atomic_write(path) as temporary:
            barrier.wait(timeout=10)
            temporary.write_text(text * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_text()
    assert content in {letter * 1000 for letter in "abcd"}
    assert os.listdir(tmp_path) == ["data.txt"]


@pytest.mark.skipif(files.fcntl is None, reason="no such locks on Windows")
def test_sole_use(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "run"
    with sole_use(folder):
        elsewhere = pytest.raises(ValueError, match="run: another process is at work in this")
        with elsewhere, sole_use(folder):
            pass
        with sole_use(tmp_path):  # another folder
            pass
    with sole_use(folder):
        assert os.listdir(folder) == []

    def without_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(files.fcntl, "flock", without_locks)
    with sole_use(folder), sole_use(folder):
        pass
    monkeypatch.setattr(files, "fcntl", None)
    with sole_use(folder), sole_use(folder):
        pass
