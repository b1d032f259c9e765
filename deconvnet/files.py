"""Files that are whole or absent: write to a temporary name, then move into place."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def sole_use(folder: str | Path) -> Iterator[None]:
    """Keeps a second process from the work in a folder, which is made if it is missing.

    The lock goes with the process, however that ends. Windows, and file systems without locks,
    do without.

    Args:
        folder: Where the work is.

    Raises:
        ValueError: Another process is at work there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is at work in this folder") from error
        except OSError:
            pass  # this file system knows no locks
        yield
    finally:
        os.close(handle)


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
