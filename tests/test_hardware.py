"""Processes that work together, however they were brought together."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deconvnet import hardware


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_group_that_another_has_made_is_joined(tmp_path: Path) -> None:
    """``torch.multiprocessing.spawn`` tells no process by its environment how many there are."""
    code = (
        "import sys\n"
        "import torch.distributed as dist\n"
        "from deconvnet.hardware import gathered, join_processes\n"
        "group = dict(init_method=f'file://{sys.argv[1]}', rank=int(sys.argv[2]), world_size=2)\n"
        "dist.init_process_group('gloo', **group)\n"
        "print(join_processes(), gathered(sys.argv[2]))\n"
        "dist.destroy_process_group()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store"), str(rank)],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == ["(0, 2) ['0', '1']", "(1, 2) ['0', '1']"]


class LibraryOfC:
    """Notes what it is told."""

    def __init__(self, **functions) -> None:
        self.told: list[tuple[int, int]] = []
        vars(self).update(functions)

    def mallopt(self, name: int, value: int) -> int:
        self.told.append((name, value))
        return 1


@pytest.fixture
def usual_memory(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Linux, and no setting of the user's."""
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    return monkeypatch


def test_glibc_is_told_to_keep_memory(usual_memory: pytest.MonkeyPatch) -> None:
    library = LibraryOfC(gnu_get_libc_version=None)
    usual_memory.setattr(hardware.ctypes, "CDLL", lambda name: library)
    assert hardware.keep_memory()
    assert library.told == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD


@pytest.mark.parametrize("why", ["another library", "another system", "GLIBC_TUNABLES", "MALLOC_X"])
def test_settings_of_others_are_left_alone(usual_memory: pytest.MonkeyPatch, why: str) -> None:
    library = LibraryOfC() if why == "another library" else LibraryOfC(gnu_get_libc_version=None)
    usual_memory.setattr(hardware.ctypes, "CDLL", lambda name: library)
    if why == "another system":
        usual_memory.setattr(sys, "platform", "darwin")
    elif why.isupper():
        usual_memory.setenv(why, "1")
    assert not hardware.keep_memory()
    assert library.told == []


def test_kept_memory_needs_no_new_pages() -> None:
    pytest.importorskip("resource")
    if "glibc" not in platform.libc_ver():
        pytest.skip("needs glibc")
    code = (
        "import resource, torch\n"
        "from deconvnet.hardware import keep_memory\n"
        "def new_pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5):\n"
        "        torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(new_pages(), keep_memory(), new_pages(), new_pages(), new_pages())\n"
    )
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert said[1] == "True"
    assert int(said[0]) > 90  # of 2 MiB at the most
    assert int(said[-1]) < int(said[0]) / 10
