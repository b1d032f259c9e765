"""Compiled loops on PyTorch's threads: every row once, whoever does it."""

from __future__ import annotations

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
def test_every_row_is_done_once(rows: int, threads: int) -> None:
    visits, workers = np.zeros(rows), np.zeros(rows, int)
    counting_loops()(rows, threads, visits, workers, 2.5)
    assert (visits == 2.5).all()
    assert len(set(workers)) == min(rows, threads if openmp.HAS_OPENMP else 1)


def test_pytorchs_threads_are_found_where_it_has_openmp() -> None:
    assert openmp.HAS_OPENMP or not torch.backends.openmp.is_available()


def test_without_openmp_one_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "HAS_OPENMP", False)
    visits, workers = np.zeros(10), np.zeros(10, int)
    counting_loops()(10, 2, visits, workers, 1.0)
    assert (visits == 1).all()
    assert set(workers) == {10}  # from 0 to 10


def test_a_library_without_openmp_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert openmp._find_openmp() is openmp.HAS_OPENMP
    monkeypatch.setattr(openmp.ctypes, "CDLL", lambda path: object())
    assert openmp._find_openmp() is False


@pytest.mark.parametrize(("values", "threads"), [(0, 1), (1, 1), (2**15, 1), (2**15 + 1, 2)])
def test_few_values_wake_no_second_thread(values: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert openmp.threads_for(values) == threads
        assert openmp.threads_for(2**30) == 2
    finally:
        torch.set_num_threads(before)
