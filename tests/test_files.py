"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from deconvnet import files
from deconvnet.files import atomic_write, check_writable, sole_use


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


HOLD = """
import sys
from deconvnet.files import sole_use
with sole_use(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(folder):
    """A process of its own that works in the folder; killed in the end, as by kill -9."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.kill()


@pytest.mark.skipif(files.fcntl is None, reason="no such locks on Windows")
def test_sole_use(tmp_path):
    folder = tmp_path / "new" / "run"
    with held_by_another(folder):
        elsewhere = pytest.raises(ValueError, match="run: another process is at work in this fo")
        with elsewhere, sole_use(folder):
            pytest.fail("two at work")
        with sole_use(tmp_path):  # another folder
            pass
    with sole_use(folder), sole_use(folder):  # the lock went with its process
        (folder / "kept").touch()
    with sole_use(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["new"]
    assert os.listdir(folder) == ["kept"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """Such as a worker that outlives its training for some seconds."""
    with sole_use(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        until = time.monotonic() + 20  # the child may need a moment to begin
        while True:
            try:
                with sole_use(tmp_path):
                    break
            except ValueError:
                assert time.monotonic() < until, "the child keeps the lock"
                time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks(tmp_path, monkeypatch):
    if files.fcntl is not None:

        def no_locks(*_):
            raise OSError("no locks available")

        monkeypatch.setattr(files.fcntl, "flock", no_locks)
        with sole_use(tmp_path):
            pass
    monkeypatch.setattr(files, "fcntl", None)
    with sole_use(tmp_path):
        pass


def test_a_place_for_a_result_is_looked_at_before_the_work(tmp_path, monkeypatch):
    for path in (tmp_path / "out.png", tmp_path / "new" / "folder" / "out.png"):
        check_writable(path)
    assert os.listdir(tmp_path) == []  # nothing is made
    monkeypatch.chdir(tmp_path)
    check_writable("out.png")
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")  # it will be replaced
    with pytest.raises(NotADirectoryError, match="file is no folder"):
        check_writable(tmp_path / "file" / "new" / "out.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="without permission to write"):
        check_writable(tmp_path / "out.png")
