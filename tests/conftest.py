"""What several test files share: a small data set in VOC's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deconvnet.shapes import write_shapes


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and six validation scenes; not to be changed by a test."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    return write_shapes(root, train=12, val=6, workers=1, progress=False)


@pytest.fixture
def one_thread():
    """Sums in one order, so that two processes can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
