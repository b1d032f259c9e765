"""Scores against a confusion matrix counted by hand; records that are whole or absent."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deconvnet import evaluation
from deconvnet.evaluation import (
    BOUNDARY_WIDTH,
    Score,
    boundary_distance,
    evaluate,
    read_log,
    record,
    stage_labels,
)
from deconvnet.inference import Prediction
from deconvnet.metrics import boundary_band
from deconvnet.voc import Sample, VOCDataset


@pytest.fixture(scope="module")
def dataset(shapes_root: Path) -> VOCDataset:
    return VOCDataset(shapes_root, "val")


def guess(i: int, sample: Sample) -> dict[str, Tensor]:
    """Two methods: nothing but background, and the truth shifted by two pixels."""
    truth = torch.where(sample.labels == 255, 0, sample.labels)
    return {"nothing": torch.zeros_like(truth), "shifted": truth.roll(2, dims=1)}


def counted(dataset: VOCDataset, method: str, near: bool = False, limit: int = 6) -> np.ndarray:
    matrix = np.zeros((13, 13), np.int64)
    for i in range(limit):
        sample = dataset[i]
        target, prediction = sample.labels.numpy(), guess(i, sample)[method].numpy()
        counts = target != 255
        if near:
            counts &= boundary_band(sample.labels, BOUNDARY_WIDTH).numpy()
        np.add.at(matrix, (target[counts], prediction[counts]), 1)
    return matrix


def test_evaluate_counts_over_the_whole_data_set(dataset: VOCDataset) -> None:
    scores = evaluate(guess, dataset, progress=False)
    assert list(scores) == ["nothing", "shifted"]
    for method, score in scores.items():
        assert np.array_equal(score.overall.matrix.numpy(), counted(dataset, method))
        assert np.array_equal(score.boundary.matrix.numpy(), counted(dataset, method, near=True))
    summary = scores["shifted"].summary(dataset.class_names)
    matrix = counted(dataset, "shifted")
    with np.errstate(invalid="ignore"):
        iou = 100 * np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert summary["miou"] == pytest.approx(np.nanmean(iou), abs=0.005)
    accuracy = 100 * np.trace(matrix) / matrix.sum()
    assert summary["pixel_accuracy"] == pytest.approx(accuracy, abs=0.005)
    near = counted(dataset, "shifted", near=True)
    accuracy = 100 * np.trace(near) / near.sum()
    assert summary["boundary_accuracy"] == pytest.approx(accuracy, abs=0.005)
    for name, expected in zip(dataset.class_names, iou, strict=True):
        found = summary["per_class_iou"][name]
        assert found is None if math.isnan(expected) else abs(found - expected) <= 0.005


def test_objects_and_pixels_are_judged_by_size_and_distance(dataset: VOCDataset) -> None:
    summary = evaluate(guess, dataset, progress=False)["shifted"].summary(dataset.class_names)
    sides, shares, distances, right = [], [], [], []
    for i in range(len(dataset)):
        sample = dataset[i]
        labels = guess(i, sample)["shifted"].numpy()
        for k, annotation in enumerate(sample.annotations):
            mask = (sample.objects == k + 1).numpy() & (sample.labels == annotation.label).numpy()
            if mask.any():
                sides.append(mask.sum() ** 0.5)
                shares.append((labels[mask] == annotation.label).mean())
        target = sample.labels.numpy()
        near = boundary_distance(sample.labels).numpy()
        distances.append(near[target != 255])
        right.append((labels == target)[target != 255])
    for rows, limits, values, found in (
        (summary["by_size"], evaluation.SIZES, np.array(sides), np.array(shares)),
        (summary["by_distance"], evaluation.DISTANCES, *map(np.concatenate, (distances, right))),
    ):
        assert [row["up_to"] for row in rows] == [*limits, None]
        low = 0
        for row, high in zip(rows, [*limits, math.inf]):
            inside = (values > low) & (values <= high)
            assert row["count"] == inside.sum()
            if inside.any():
                assert row["right"] == pytest.approx(100 * found[inside].mean(), abs=0.006)
            low = high
    assert sum(row["count"] for row in summary["by_size"]) > 10


def test_distance_from_the_nearest_boundary() -> None:
    labels = torch.zeros(5, 9, dtype=torch.uint8)
    labels[:, 4:] = 2
    assert boundary_distance(labels).tolist() == [[4, 3, 2, 1, 1, 2, 3, 4, 5]] * 5
    assert boundary_distance(torch.zeros(3, 3, dtype=torch.uint8)).isinf().all()


def test_distance_is_up_to_a_diagonal_step_short() -> None:
    """The docstring says by how much it differs from the distance by brute force."""
    random = np.random.default_rng(0)
    for _ in range(10):
        labels = np.kron(random.integers(0, 3, (4, 5)), np.ones((4, 4))).astype(np.uint8)
        places = np.stack(np.indices(labels.shape)).reshape(2, -1)
        apart = np.hypot(*(places[:, :, None] - places[:, None]))
        other = labels.reshape(-1)[:, None] != labels.reshape(-1)
        exact = np.where(other, apart, np.inf).min(1).reshape(labels.shape)
        short = exact - boundary_distance(torch.from_numpy(labels)).numpy()
        assert short.min() > -1e-5
        assert short.max() < 2**0.5 - 1 + 1e-5


def test_records_keep_rows_of_numbers_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    written = record(path, confusion=[[1, 20], [3, 4]], text="[1,\n 2]", parts=[{"a": [-0.5]}])
    assert json.loads(path.read_text()) == written
    assert "    [1, 20],\n    [3, 4]\n" in path.read_text().replace("[ ", "[").replace(" ]", "]")


def test_truth_scores_100(dataset: VOCDataset) -> None:
    def truth(i: int, sample: Sample) -> dict[str, Tensor]:
        return {"truth": torch.where(sample.labels == 255, 7, sample.labels)}

    summary = evaluate(truth, dataset, progress=False)["truth"].summary(dataset.class_names)
    for figure in ("miou", "pixel_accuracy", "boundary_accuracy", "boundary_miou"):
        assert summary[figure] == 100


def test_limit(dataset: VOCDataset) -> None:
    scores = evaluate(guess, dataset, limit=2, progress=False)
    assert np.array_equal(
        scores["shifted"].overall.matrix.numpy(), counted(dataset, "shifted", limit=2)
    )


def test_bad_predictions_and_data_sets(dataset: VOCDataset) -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit must be at least 1 image, got {limit}"):
            evaluate(guess, dataset, limit=limit, progress=False)
    with pytest.raises(ValueError, match="same shape"):
        evaluate(lambda i, s: {"m": s.labels[1:]}, dataset, progress=False)
    with pytest.raises(ValueError, match="label 13"):
        evaluate(lambda i, s: {"m": torch.full_like(s.labels, 13)}, dataset, progress=False)


class Empty:
    root, split = "nowhere", "test"

    def __len__(self) -> int:
        return 0


def test_empty_data_set() -> None:
    with pytest.raises(ValueError, match="nowhere: split 'test' has no images"):
        evaluate(guess, Empty())


def test_nothing_to_count_is_null_not_nan() -> None:
    score = Score(2)
    void = torch.full((4, 4), 255, dtype=torch.uint8)
    sample = Sample("void", torch.zeros(3, 4, 4, dtype=torch.uint8), void, None, ())
    score.update(torch.zeros(4, 4, dtype=torch.uint8), sample)
    summary = score.summary(["background", "thing"])
    assert summary["miou"] is None
    assert summary["per_class_iou"] == {"background": None, "thing": None}
    json.dumps(summary, allow_nan=False)


def test_stage_labels_leaves_absent_stages_out() -> None:
    maps = torch.eye(3).view(3, 3, 1).expand(3, 3, 2)
    image = torch.zeros(3, 3, 2, dtype=torch.uint8)
    prediction = Prediction(
        image, maps.argmax(0).byte(), maps, fcn_probabilities=maps, crf_probabilities=maps.flip(0)
    )
    found = stage_labels(prediction)
    assert list(found) == ["fcn", "crf"]
    assert found["fcn"].dtype == torch.uint8
    assert found["fcn"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert found["crf"].tolist() == [[2, 2], [1, 1], [0, 0]]


# Records


def test_record_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/deconvnet", "evaluate", "--data", "my data"])
    path = tmp_path / "new" / "run.json"
    written = record(path, miou=12.5, seed=0)
    assert json.loads(path.read_text()) == written
    assert (written["miou"], written["seed"]) == (12.5, 0)
    assert written["command"] == "deconvnet evaluate --data 'my data'"
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["versions"]["python"] == sys.version.split()[0]
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["machine"]["cpu"]
    assert written["machine"]["instructions"]  # such as AVX2
    assert written["finished"].endswith("+00:00")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/bin/deconvnet", "demo"], "deconvnet demo"),
        (["/opt/lib/deconvnet/__main__.py", "demo"], "deconvnet demo"),
        (["benchmarks/ladder.py", "--seeds", "0"], "python benchmarks/ladder.py --seeds 0"),
        (["HERE/benchmarks/ladder.py"], "python benchmarks/ladder.py"),
        (["/elsewhere/deconvnet/ladder.py"], "python elsewhere/deconvnet/ladder.py"),
        (["/opt/bin/deconvnet", "/a/b/data/shapes/x"], "deconvnet data/shapes/x"),
        (["/opt/bin/deconvnet", "HERE/data/shapes"], "deconvnet data/shapes"),
        (["/opt/bin/deconvnet", "--data=/home/alice/a=b/x/y"], "deconvnet --data=a=b/x/y"),
        (["/opt/bin/deconvnet", "--data=HERE/a", "--seed=0"], "deconvnet --data=a --seed=0"),
        (["/opt/bin/deconvnet", "/home/alice/a=b/x/y"], "deconvnet a=b/x/y"),
    ],
)
def test_command(argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [a.replace("HERE", str(Path.cwd())) for a in argv]
    monkeypatch.setattr(sys, "argv", argv)
    assert evaluation.command() == expected


def test_failed_record_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record(path, miou=1.0)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        record(path, miou=object())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    """Settings come from a weights file, whose log may hold any number."""
    nan, inf = float("nan"), float("inf")
    path = tmp_path / "run.json"
    written = record(path, curve=[{"loss": nan}, {"loss": 0.5}], limits=(1, -inf), best=np.inf)
    assert json.loads(path.read_text()) == written
    assert written["curve"] == [{"loss": None}, {"loss": 0.5}]
    assert (written["limits"], written["best"]) == ([1, None], None)


def test_commit_is_gits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = Path(evaluation.__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert evaluation.commit().removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert evaluation.commit() is None


def test_changed_code_is_dirty_and_changed_results_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {n: tmp_path / n for n in ("deconvnet/evaluation.py", "benchmarks/a.py", "results/a")}
    for path in files.values():
        path.parent.mkdir()
        path.write_text("first")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -q -m m"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(evaluation, "__file__", str(files["deconvnet/evaluation.py"]))
    for name, path in files.items():
        path.write_text("second")
        assert evaluation.commit().endswith("-dirty") == (name != "results/a"), name
        path.write_text("first")
    shutil.rmtree(tmp_path / "benchmarks")
    (tmp_path / "benchmarks").mkdir()
    assert evaluation.commit().endswith("-dirty")


def test_package_inside_anothers_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for command in ("init -q", "-c user.name=n -c user.email=e commit -q --allow-empty -m m"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages/deconvnet/evaluation.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(evaluation, "__file__", str(installed))
    assert evaluation.commit() is None


def test_read_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("iteration,loss,validation\r\n20,1.5,\r\n40,1.25,0.5\r\n")
    assert read_log(path) == [
        {"iteration": 20.0, "loss": 1.5, "validation": None},
        {"iteration": 40.0, "loss": 1.25, "validation": 0.5},
    ]


# Reading a recorded run


def test_a_recorded_run_is_read_from_the_repository() -> None:
    run = evaluation.read_record("shapes-seed0")
    assert run["seed"] == 0
    assert set(run["methods"]) >= {"fcn", "stage2", "crf"}
    with pytest.raises(FileNotFoundError, match="no-such-run"):
        evaluation.read_record("no-such-run")


def test_without_the_repository_it_is_fetched_from_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def urlopen(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(b'{"seed": 3}')

    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "deconvnet" / "evaluation.py"))
    monkeypatch.setattr(evaluation.urllib.request, "urlopen", urlopen)
    assert evaluation.read_record("shapes-seed3") == {"seed": 3}
    (address,) = asked
    assert address.startswith("https://raw.githubusercontent.com/")
    assert address.endswith("/main/results/shapes-seed3.json")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_share_images_and_proposals(shapes_root: Path, tmp_path: Path) -> None:
    """Each takes every second image, and both know the result of all."""
    script = tmp_path / "share.py"
    script.write_text(
        "import json, sys\n"
        "import torch\n"
        "from deconvnet.evaluation import evaluate\n"
        "from deconvnet.hardware import join_processes\n"
        "from deconvnet.proposals import compute_proposals\n"
        "from deconvnet.voc import VOCDataset\n"
        "rank, _ = join_processes()\n"
        "dataset = VOCDataset(sys.argv[1], 'val', limit=5)\n"
        "seen = []\n"
        "def predict(i, sample):\n"
        "    seen.append(i)\n"
        "    return {'all': (sample.labels.clamp(max=12) + (i == 3)).clamp(max=12)}\n"
        "scores = evaluate(predict, dataset, progress=False)\n"
        "boxes = compute_proposals(dataset, workers=1, progress=False)\n"
        "found = [seen, scores['all'].summary(dataset.class_names),\n"
        "         [len(p.boxes) for p in boxes], float(sum(p.boxes.sum() for p in boxes))]\n"
        "open(f'{sys.argv[2]}/{rank}.json', 'w').write(json.dumps(found))\n"
        "if torch.distributed.is_initialized():\n"
        "    torch.distributed.destroy_process_group()\n"
    )
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for name, launcher, ranks in (("two", two, 2), ("one", [], 1)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(shapes_root), str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found[name] = [
            json.loads((tmp_path / name / f"{r}.json").read_text()) for r in range(ranks)
        ]
    assert [seen for seen, *_ in found["two"]] == [[0, 2, 4], [1, 3]]
    for _, *rest in found["two"]:
        assert rest == found["one"][0][1:]
