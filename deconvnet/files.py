"""Files that are whole or absent: write to a temporary name, then move into place."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path that replaces ``path`` if the block ends well.

    A reader sees the old file or the new one, never half of it. A block that raises leaves nothing
    behind; a process that is killed within it leaves the temporary file, whose name begins with a
    dot and the file's own. Nothing is forced onto the disk: what a power cut does is up to the
    file system. Missing folders are made.

    Args:
        path: The file to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's files are for their owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Finds out before the work that its result could not be written.

    Args:
        path: The file to write. Missing folders are left to :func:`atomic_write`.

    Raises:
        OSError: It is a folder, or within a file, or in a folder where this process may not write.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, this is a folder")
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: {folder} is a folder without permission to write")


_held: dict[Path, int] = {}  # folders that this process has for itself, and their handles

if hasattr(os, "register_at_fork"):  # a process that is forked does not keep its parent's locks

    def _let_go() -> None:
        while _held:
            os.close(_held.popitem()[1])

    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole_use(folder: str | Path) -> Iterator[None]:
    """Keeps a second process from the work in a folder, which is made if it is missing.

    The lock goes with the process, however that ends. The process itself may ask for it again
    meanwhile. Windows does without; on a network's file system only processes of the same machine
    may see it.

    Args:
        folder: Where the work is. If it was made and is still empty in the end, it goes again.

    Raises:
        ValueError: Another process is at work there.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if fcntl is None or place in _held:
        yield
        return
    _held[place] = handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is at work in this folder") from error
        except OSError:
            pass  # this file system knows no locks
        yield
    finally:
        if _held.pop(place, None) is not None:  # None in a process that was forked meanwhile
            os.close(handle)
        if made:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    What that is worth when a process is killed, ``atomic_write`` says.

    Args:
        path: Where to. Missing folders are made.
        data: The file's content.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def file_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file's content, 64 hexadecimal digits.

    Args:
        path: The file.
    """
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
