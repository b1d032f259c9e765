"""The benchmarks run, at their smallest; the figures are for `results/`, not for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def answer(name: str, *options: str) -> dict:
    done = call(f"benchmarks/{name}.py", *options, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_network() -> None:
    found = answer("network", "--recipe", "tiny", "--crops", "4", "--batch", "2", "--rounds", "1")
    assert found["ratio_best"] >= found["ratio_fp32"] > 0
    assert found["label_agreement"]["float32"] > 0.999
    exact = found["accuracy"]["trained, tiny"]["float32"]
    assert exact["same_switches"]["relative_error"] < 1e-4


def test_unpooling() -> None:
    found = answer("unpooling", "--crops", "1", "--rounds", "1")
    assert {row["place_bytes_ratio"] for row in found["summary"]} == {8.0}


def test_pipeline() -> None:
    options = ("--networks", "tiny", "--proposals", "3", "--batch", "2", "--rounds", "1")
    found = answer("pipeline", *options, "--no-scaling")
    for network in found["networks"].values():
        assert min(network["seconds"].values()) > 0
    memory = json.loads(call("benchmarks/pipeline.py", "--peak", "tiny", *options[2:]).stdout)
    assert memory["peak_mebibytes"] > 0


def test_training() -> None:
    found = answer("training", "--recipe", "tiny", "--batch", "4", "--micro-batch", "2")
    assert {way["recompute"] for way in found["ways"]} == {False, True}
    assert all(way["crops_a_second"] > 0 for way in found["ways"])


def test_gpu_checks_are_listed_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = call("benchmarks/gpu_all.py")
    assert done.returncode == 3
    assert "no CUDA GPU was found" in done.stderr
    for name in ("network", "unpooling", "pipeline", "training", "crf"):
        assert f"benchmarks/{name}.py" in done.stdout
        assert (BENCHMARKS / f"{name}.py").exists()
    assert "pytest" in done.stdout


def test_gpu_checks_can_be_listed_anywhere() -> None:
    done = call("benchmarks/gpu_all.py", "--list")
    assert done.returncode == 0
    assert "NCCL" in done.stdout
