"""The benchmarks run, at their smallest; the figures are for `results/`, not for tests."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deconvnet import recipes
from deconvnet.evaluation import evaluate, stage_labels
from deconvnet.folders import open_dataset
from deconvnet.inference import Predictor
from deconvnet.weights import pretrained

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )


def answer(name: str, *options: str) -> dict:
    done = call(f"benchmarks/{name}.py", *options, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_network() -> None:
    found = answer("network", "--recipe", "tiny", "--crops", "4", "--batch", "2", "--rounds", "1")
    assert min(found["seconds"].values()) > 0
    assert min(found["ratio_best"], found["ratio_fp32"]) > 0
    assert found["label_agreement"]["float32"] > 0.999
    accuracy = found["accuracy"]["trained, tiny"]
    assert accuracy["float32"]["same_switches"]["relative_error"] < 1e-4
    exact = accuracy["float32, same switches"]
    assert exact["relative_error"] < 1e-4
    if platform.machine() in ("x86_64", "AMD64"):  # other libraries may round by layout
        assert exact["switches_moved"] == 0


def test_network_that_has_learned(shapes_root: Path) -> None:
    """Labels of a network's own images, and by the same count as if all were one batch."""
    weights = pretrained("shapes-deconvnet")
    settings = ("--recipe", "tiny", "--crops", "2", "--batch", "2", "--rounds", "1")
    found = answer("network", *settings, "--weights", str(weights), "--data", str(shapes_root))
    exact = found["accuracy"].pop("trained, tiny")["float32"]
    assert not found["accuracy"], "one network alone was asked"
    assert 0.999 < exact["label_agreement"] == found["label_agreement"]["float32"]
    done = call("benchmarks/network.py", "--weights", str(weights))
    assert done.returncode == 2 and "belong together" in done.stderr


def test_difference_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from network import Difference

    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(6, 3, 4, 5, generator=generator)
    scores = expected + 0.3 * torch.randn(6, 3, 4, 5, generator=generator)
    found = Difference()
    for part, wanted in zip(scores.split(4), expected.split(4)):
        found.add(part, wanted)
    same = (scores.argmax(1) == expected.argmax(1)).double().mean()
    error = (scores - expected).square().mean().sqrt() / expected.std(correction=0)
    assert 0.5 < same < 1
    assert found.figures() == {
        "label_agreement": pytest.approx(float(same)),
        "relative_error": pytest.approx(float(error)),
    }


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
    options = ("--recipe", "tiny", "--rounds", "1", "--batch", "4", "--micro-batch", "2")
    found = answer("training", *options)
    assert {way["kind"] for way in found["ways"]} == {"plain", "products", "kept", "recomputed"}
    assert all(way["crops_a_second"] > 0 for way in found["ways"])


def test_ladder_of_photographs(shapes_root: Path, tmp_path: Path) -> None:
    """On embedded scenes, whose format is the same."""
    fcn, net = (str(pretrained(f"shapes-{name}")) for name in ("fcn", "deconvnet"))

    def run(*options: str) -> dict:
        done = call(
            "benchmarks/voc.py", "--data", str(shapes_root), "--recipe", "tiny", "--limit", "2",
            "--fcn", fcn, "--stage2", net, "--out", str(tmp_path / "run.json"), *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((tmp_path / "run.json").read_text())

    without = run("--search", "0")
    assert without["crf_search"] == {}
    found = run("--search", "2", "--stage1", net)
    assert found["images"] == found["crf_search"]["train_images"] == 2
    methods = found["methods"]
    assert methods.keys() - without["methods"].keys() == {"stage1"}
    assert without["methods"]["proposals-100"] == methods["proposals-100"]
    assert methods["stage1"]["confusion"] == methods["deconvnet"]["confusion"]  # one network
    assert methods["deconvnet"]["confusion"] != methods["whole"]["confusion"]

    # The snapshots are what the package's own way gives.
    dataset = open_dataset(shapes_root, "val", limit=2)
    config = replace(recipes.tiny().inference, include_whole_image=True, num_proposals=10)
    predictor = Predictor.from_pretrained("shapes", config=config, device="cpu", crf=None)
    scores = evaluate(lambda i, s: stage_labels(predictor(s.image)), dataset, progress=False)
    for name, ours in (("deconvnet", "proposals-10"), ("fcn", "fcn")):
        summary = scores[name].summary(dataset.class_names)
        assert summary["miou"] == pytest.approx(methods[ours]["miou"], abs=0.1)


def test_ladder_records_how_the_networks_were_trained(tmp_path: Path) -> None:
    def run(iterations: int) -> dict:
        done = call(
            "benchmarks/ladder.py", "--seeds", "3", "--iterations", str(iterations),
            "--train", "6", "--val", "1", "--data", str(tmp_path / "data"),
            "--runs", str(tmp_path / "runs"), "--results", str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((tmp_path / "shapes-seed3.json").read_text())["stages"]

    stages = run(2)
    assert {stage: (s["iterations"], s["seed"]) for stage, s in stages.items()} == {
        "classify": (2, 0), "1": (2, 3), "2": (2, 3), "fcn": (2, 3), "whole": (2, 3),
    }  # fmt: skip
    assert run(9) == stages  # they are there, and are not trained again


def test_ablations(shapes_root: Path, tmp_path: Path) -> None:
    def start(*options: str) -> subprocess.CompletedProcess:
        return call(
            "benchmarks/ablations.py", "--data", str(shapes_root), "--recipe", "tiny",
            "--fcn", "shapes-fcn", "--updates", "3", "--limit", "2", "--runs", str(tmp_path),
            "--cache", str(tmp_path / "proposals"), "--out", str(tmp_path / "run.json"), *options,
        )  # fmt: skip

    def run(*options: str) -> dict:
        done = start(*options)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((tmp_path / "run.json").read_text())["variants"]

    (tmp_path / "base").mkdir()
    (tmp_path / "base/scores.json").write_text('{"updates": 4}')  # of a longer run
    assert list(run("--variants", "no-batch-norm")) == ["no-batch-norm"]
    longer = start("--variants", "no-batch-norm", "--updates", "4")
    assert "was written with validate_every=3" in longer.stderr
    assert "from-imagenet needs --vgg16" in start().stderr
    others = ["base", "whole-images", "two-stages", "no-switches", "no-batch-norm-he"]
    others += ["no-deep-supervision", "sgd"]
    variants = run("--variants", *others)  # the one that is there is not trained again
    assert list(variants) == [*others[:4], "no-batch-norm", *others[4:]]
    assert len(variants["two-stages"]["curves"]) == 2
    for variant in variants.values():
        assert math.isfinite(variant["curves"][-1][-1]["loss"])
        assert variant["images"] == 2
        assert 0 <= variant["whole"]["miou"] <= 100
    losses = {name: v["curves"][0][0]["loss"] for name, v in variants.items()}
    assert losses["base"] != losses["no-switches"]
    assert losses["no-batch-norm"] != losses["no-batch-norm-he"]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be forgotten here"
)
def test_memory_of_a_crf_does_not_count_what_came_before() -> None:
    done = call(
        "-c",
        "import sys\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import torch\n"
        "from crf import SETTINGS, one_case\n"
        "from network import forget_peak, peak_mebibytes\n"
        "cpu = torch.device('cpu')\n"
        "many = torch.ones(2**26)\n"
        "del many\n"
        "before = peak_mebibytes(cpu)\n"
        "forget_peak()\n"
        "print(before - peak_mebibytes(cpu))\n"
        "many = torch.ones(2**26)\n"
        "del many\n"
        "print(one_case('noise', list(SETTINGS)[0], (96, 96), 21, 1)['mebibytes'])\n",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    forgotten, of_the_crf = map(int, done.stdout.split())
    assert forgotten > 200  # of 256
    assert of_the_crf > 0  # though less than the peak of before


def test_full_size_run_is_stopped_and_resumed(shapes_root: Path, tmp_path: Path) -> None:
    done = call(
        "benchmarks/full_size.py", "--data", str(shapes_root), "--recipe", "tiny", "--updates", "6",
        "--batch", "4", "--run", str(tmp_path), "--out", str(tmp_path / "run.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["stopped_and_resumed_at"] == 3
    assert len(found["losses"]) == 6
    assert f"stopped at update {found['stopped_and_resumed_at']}" in done.stdout


def test_recall_of_proposals(shapes_root: Path) -> None:
    found = answer("proposals", "--data", str(shapes_root), "--limit", "3")
    shares = [row["share"] for row in found["edges"]["gradient"]["recall"] if row["iou"] == 0.5]
    assert shares == sorted(shares)
    assert shares[-1] > 0.5


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
