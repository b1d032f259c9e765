"""Processes that work together, however they were brought together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from deconvnet import hardware
from deconvnet.hardware import keep_memory

CPU = torch.device("cpu")


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


def new_pages(rounds: int = 1) -> int:
    """How many pages the system must clear for five large tensors, one after another."""
    resource = pytest.importorskip("resource")
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


needs_glibc = pytest.mark.skipif(hardware._glibc() is None, reason="needs glibc, as it comes")


@needs_glibc
def test_memory_is_kept_until_the_last_context_ends() -> None:
    usual = new_pages()
    assert usual > 90  # of 2 MiB at the most
    with keep_memory(CPU):
        new_pages(rounds=5)  # until there are pieces enough of this size
        with keep_memory(CPU):
            assert new_pages() < usual / 10
        assert new_pages() < usual / 10
        started, go_on = threading.Event(), threading.Event()

        def beside() -> None:
            with keep_memory(CPU):
                started.set()
                go_on.wait(60)

        other = threading.Thread(target=beside)
        other.start()
        assert started.wait(60)
    assert hardware._keepers == 1
    go_on.set()
    other.join()
    assert hardware._keepers == 0


@needs_glibc
def test_what_was_kept_goes_back_to_the_system_if_it_is_much() -> None:
    spare, before = hardware.SPARE_BYTES, hardware._held_bytes()
    with keep_memory(CPU):
        torch.empty(2 * spare, dtype=torch.uint8).fill_(1)
        assert hardware._held_bytes() > before + spare
    assert hardware._held_bytes() < before + spare


def test_an_error_ends_the_context() -> None:
    with pytest.raises(KeyError), keep_memory(CPU):
        raise KeyError
    assert hardware._keepers == 0


def test_memory_of_gpus_and_settings_of_the_users_are_left_alone(monkeypatch) -> None:
    with keep_memory(torch.device("cuda")):
        assert hardware._keepers == 0
    hardware._glibc.cache_clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    with keep_memory(CPU):
        assert hardware._keepers == 0
    hardware._glibc.cache_clear()
