"""Processes that work together, however they were brought together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


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
