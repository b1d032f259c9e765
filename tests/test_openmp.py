"""Compiled loops on PyTorch's threads: every row once, whoever does it."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

openmp = pytest.importorskip("deconvnet.openmp", reason="needs Numba")
numba = pytest.importorskip("numba")


def counting_loops():
    """Compiled anew, so that a test may change what they are compiled to."""

    @numba.njit
    def count(start, stop, visits, workers, step):
        for row in range(start, stop):
            visits[row] += step
            workers[row] = 1000 * start + stop  # tells the parts apart

    @numba.njit(nogil=True)
    def run(rows, threads, visits, workers, step):
        openmp.in_parallel(count, rows, threads, (visits, workers, step))

    return run


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 100])
def test_every_row_is_done_once(rows: int, threads: int, three_threads) -> None:
    if not openmp.HAS_OPENMP:
        threads = 1  # what `threads_for` says
    visits, workers = np.zeros(rows), np.zeros(rows, int)
    counting_loops()(rows, threads, visits, workers, 2.5)
    assert (visits == 2.5).all()
    assert len(set(workers)) == min(rows, threads, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="PyTorch has another OpenMP there")
def test_pytorchs_threads_are_found_where_it_has_openmp() -> None:
    assert torch.backends.openmp.is_available() == openmp.HAS_OPENMP


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_no_thread_of_pytorchs_is_ended(three_threads) -> None:
    """As OpenMP does where a loop asks for fewer than the operation before."""
    run = counting_loops()
    values, arrays = torch.zeros(2**20), (np.zeros(10), np.zeros(10, int))

    def known() -> set[str]:
        values.exp()
        return set(os.listdir("/proc/self/task"))

    before = known()
    for _ in range(3):
        run(10, 2, *arrays, 1.0)
        assert known() == before


def test_without_openmp_one_thread_does_it(monkeypatch: pytest.MonkeyPatch, three_threads) -> None:
    monkeypatch.setattr(openmp, "HAS_OPENMP", False)
    assert openmp.threads_for(2**30) == 1


def test_a_library_without_openmp_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str | None) -> object:
        if path is None:
            raise TypeError("on Windows")
        return object()

    monkeypatch.setattr(openmp.ctypes, "CDLL", missing)
    assert openmp._find_openmp() is None
    told = []
    monkeypatch.setattr(
        openmp.llvmlite.binding, "add_symbol", lambda name, address: told.append((name, address))
    )
    openmp._tell_compiled_code(None)
    assert [name for name, _ in told] == [f"deconvnet_{name}" for name in openmp._FUNCTIONS]
    assert all(address for _, address in told)


@pytest.mark.parametrize(("values", "threads"), [(0, 1), (1, 1), (2**15, 1), (2**15 + 1, 2)])
def test_few_values_wake_no_second_thread(values: int, threads: int, three_threads) -> None:
    assert openmp.threads_for(values) == (threads if openmp.HAS_OPENMP else 1)
    assert openmp.threads_for(2**30) == (3 if openmp.HAS_OPENMP else 1)
