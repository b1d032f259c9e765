"""Training against hand-made updates, and every interrupted run against one that was not."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_files import held_by_another
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from deconvnet import hardware, training
from deconvnet.deployment import ConvolutionOfAll
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.hardware import choose_precision
from deconvnet.instances import StreamSampler
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.training import (
    Plateau,
    StageConfig,
    TrainingDiverged,
    crop_loss,
    deferred_interrupt,
    freeze_blocks,
    make_optimizer,
    pixel_loss,
    recomputed,
    reestimate_batch_norm,
    schedule_factor,
    train,
)

CLASSES, SIZE = 3, 32
SIZES = {"num_classes": CLASSES, "widths": (4, 4, 4, 6, 8), "encoder_depths": (1,) * 5}
STAGE = StageConfig(
    iterations=9,
    batch_size=4,
    micro_batch=2,
    learning_rate=0.05,
    precision="float32",
    validate_every=3,
    checkpoint_every=4,
    log_every=2,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Crops(Dataset):
    """Coloured squares whose draw decides everything, as with :class:`CropDataset`."""

    def __init__(self, on_draw: Callable[[int], None] = lambda draw: None) -> None:
        self.on_draw = on_draw

    def __len__(self) -> int:
        return 10

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        self.on_draw(draw)
        rng = np.random.default_rng((index, draw))
        labels = np.zeros((SIZE, SIZE), np.uint8)
        labels[8:24, 4:20] = index % CLASSES
        labels[: rng.integers(1, 16)] = 255  # each crop has another number of valid pixels
        image = rng.integers(0, 100, (3, SIZE, SIZE)) + 50 * (labels % 255)
        return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(labels)


def fcn(seed: int = 0, **options) -> FCN8s:
    """Has all that can part two runs: batch norm, dropout, and an encoder to freeze."""
    torch.manual_seed(seed)
    return FCN8s(FCNConfig(**SIZES, fc_width=8, fc_kernel=3, input_size=SIZE, **options))


def deconvnet(seed: int = 0, **options) -> DeconvNet:
    torch.manual_seed(seed)
    config = ModelConfig(**SIZES, decoder_depths=(1,) * 5, fc_width=8, input_size=SIZE, **options)
    return DeconvNet(config)


def run(
    run_dir: Path, stage: StageConfig = STAGE, dataset: Dataset | None = None, **options
) -> nn.Module:
    model = options.pop("model", None) or fcn()
    options.setdefault("device", "cpu")
    dataset = Crops() if dataset is None else dataset
    return train(model, dataset, stage, run_dir, progress=False, **options)


def log(run_dir: Path) -> list[dict[str, str]]:
    """The log without what depends on the clock."""
    with open(run_dir / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in rows]


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def assert_same(left: object, right: object) -> None:
    """Equality bit for bit of nested tensors."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"seconds", "row_bytes"}:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_same(a, b)
    else:
        assert left == right


def assert_same_run(left: Path, right: Path) -> None:
    assert_same(checkpoint(left), checkpoint(right))
    assert log(left) == log(right)


# Going on where a run was


class Killed(BaseException):
    """Ends a run as abruptly as an exception can: nobody catches it."""


def kill_at(position: int, event: Callable[[], None]) -> Callable[[int], None]:
    return lambda draw: event() if draw == position else None


def killed() -> None:
    raise Killed


@pytest.mark.parametrize(
    "stage",
    [
        STAGE,
        replace(STAGE, optimizer="adamw", learning_rate=1e-3, schedule="poly", warmup=3),
        replace(STAGE, schedule="plateau", patience=1, validate_every=2),
        replace(STAGE, precision="bfloat16", frozen_blocks=2),
    ],
    ids=["sgd", "adamw-poly", "plateau", "bfloat16-frozen"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stage: StageConfig) -> None:
    validate = partial(crop_loss, dataset=Crops(), crops=4)
    run(tmp_path / "whole", stage, validate=validate)
    # Position 22 belongs to the sixth update: two updates and a row of the log go to waste.
    with pytest.raises(Killed):
        run(tmp_path / "parts", stage, Crops(kill_at(22, killed)), validate=validate)
    assert checkpoint(tmp_path / "parts")["iteration"] == 4
    resumed = run(tmp_path / "parts", stage, model=fcn(seed=99), validate=validate)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert_same(checkpoint(tmp_path / "parts")["model"], resumed.state_dict())


@pytest.mark.parametrize("position", [0, 3, 15, 16, 35])
def test_killed_anywhere(tmp_path: Path, position: int) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "parts", dataset=Crops(kill_at(position, killed)))
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    save, calls = torch.save, []

    def fail_at_second(state, path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise Killed
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_at_second)
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.pt", "log.csv"]
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_log_ahead_of_the_checkpoint_is_cut_back_though_nothing_is_left_to_do(
    tmp_path: Path,
) -> None:
    stage = replace(STAGE, log_every=1)
    with pytest.raises(Killed):
        run(tmp_path / "parts", stage, Crops(kill_at(22, killed)))
    assert [row["iteration"] for row in log(tmp_path / "parts")] == ["1", "2", "3", "4", "5"]
    for name in ("parts", "whole"):
        run(tmp_path / name, replace(stage, iterations=4))
    assert checkpoint(tmp_path / "parts")["iteration"] == 4
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_a_checkpoint_that_does_not_fit_the_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    resource = pytest.importorskip("resource", reason="only on Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(tmp_path, replace(STAGE, iterations=4))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt: could not be written in full"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors"])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, name: str, resume: bool) -> None:
    """A process that is killed while it saves cannot tidy up: the next one does."""
    script = (
        "import os, signal, sys\n"
        "from deconvnet.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / name)])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{name}.")
    run(tmp_path, replace(STAGE, iterations=1), resume=resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv"]


def test_sigkill_at_a_random_moment(tmp_path: Path) -> None:
    stage = replace(STAGE, iterations=60, checkpoint_every=2, log_every=1)
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import time, torch\n"
        "from test_training import *\n"
        "torch.set_num_threads(1)\n"
        f"run({str(tmp_path / 'parts')!r}, {stage!r}, Crops(lambda draw: time.sleep(0.005)))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "parts/checkpoint.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(random.random() * 0.5)
    finally:
        process.kill()
        process.wait()
    assert checkpoint(tmp_path / "parts")["iteration"] >= 2
    run(tmp_path / "parts", stage)
    run(tmp_path / "whole", stage)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_finishes_the_update_and_saves_it(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    press = partial(os.kill, os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", dataset=Crops(kill_at(21, press)))
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint(tmp_path / "parts")["iteration"] == 6
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("heeds_ctrl_c")
@pytest.mark.parametrize("moment", ["validation", "save"])
def test_ctrl_c_at_the_very_end_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def validate(model: nn.Module) -> float:
        if moment == "validation":
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    def save(state: dict, path: Path) -> None:
        if moment == "save":
            os.kill(os.getpid(), signal.SIGINT)
        torch_save(state, path)

    torch_save = torch.save
    stage = replace(STAGE, validate_every=9, checkpoint_every=9)  # both at the end only
    run(tmp_path / "whole", stage, validate=lambda model: 1.0)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stage, validate=validate)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    press = partial(os.kill, os.getpid(), signal.SIGINT)
    dataset = Crops(lambda draw: press() if draw in (20, 21) else None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", dataset=dataset)
    assert checkpoint(tmp_path / "parts")["iteration"] == 4
    run(tmp_path / "whole")
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_interrupts_are_the_main_threads_affair() -> None:
    seen: list[bool] = []

    def other_thread() -> None:
        with deferred_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ignored_interrupts_stay_ignored() -> None:
    """A shell script's ``command &`` starts that way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupt() as interrupted:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupted()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_finished_run_is_left_alone_and_can_be_made_longer(tmp_path: Path) -> None:
    run(tmp_path / "whole", replace(STAGE, iterations=12))
    run(tmp_path / "parts")
    before = (tmp_path / "parts/checkpoint.pt").read_bytes()
    run(tmp_path / "parts", dataset=Crops(lambda draw: killed()))
    assert (tmp_path / "parts/checkpoint.pt").read_bytes() == before
    run(tmp_path / "parts", replace(STAGE, iterations=12, log_every=4, workers=2))
    assert_same(checkpoint(tmp_path / "whole")["model"], checkpoint(tmp_path / "parts")["model"])


def test_workers_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "none")
    run(tmp_path / "two", replace(STAGE, workers=2))
    assert log(tmp_path / "none") == log(tmp_path / "two")
    assert_same(checkpoint(tmp_path / "none")["model"], checkpoint(tmp_path / "two")["model"])


def unreadable(draw: int) -> None:
    if draw == 6:
        raise OSError("damaged")


def no_score(model: nn.Module) -> float:
    raise OSError("damaged")


@pytest.mark.parametrize(
    ("on_draw", "validate"), [(unreadable, None), (int, no_score)], ids=["worker", "validation"]
)
def test_workers_end_with_the_training_that_fails(tmp_path: Path, on_draw, validate) -> None:
    with pytest.raises(OSError, match="damaged") as kept:  # with its traceback, as in Jupyter
        run(tmp_path, replace(STAGE, workers=2), Crops(on_draw), validate=validate)
    assert kept.tb is not None
    assert multiprocessing.active_children() == []


def test_resume_false_forgets_the_old_run(tmp_path: Path) -> None:
    run(tmp_path / "old")
    with pytest.raises(Killed):
        run(tmp_path / "old", replace(STAGE, seed=1), Crops(kill_at(2, killed)), resume=False)
    assert not (tmp_path / "old/checkpoint.pt").exists()
    run(tmp_path / "old", replace(STAGE, seed=1))
    run(tmp_path / "new", replace(STAGE, seed=1))
    assert_same_run(tmp_path / "old", tmp_path / "new")


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path, about={"images": 7})
    run(tmp_path, replace(STAGE, iterations=10), about={"images": 7})
    with pytest.raises(ValueError, match="was written with images=7, this run has 8; use another"):
        run(tmp_path, about={"images": 8})
    with pytest.raises(ValueError, match="was written with images=7, this run has None; use"):
        run(tmp_path)
    for indices in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="was written with indices="):
            run(tmp_path, indices=indices, about={"images": 7})


def test_a_checkpoint_of_an_older_version_is_gone_on_from(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", replace(STAGE, iterations=4))
    state = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)
    del state["about"]["examples"], state["about"]["indices"]
    torch.save(state, tmp_path / "parts/checkpoint.pt")
    run(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_log_that_somebody_removed_begins_anew(tmp_path: Path) -> None:
    def remove() -> None:
        (tmp_path / "log.csv").unlink()

    stage = replace(STAGE, log_every=1)
    run(tmp_path, stage, Crops(kill_at(5 * stage.batch_size, remove)))
    assert [row["iteration"] for row in log(tmp_path)] == ["6", "7", "8", "9"]


def test_a_checkpoint_without_a_loss_scale_serves_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, replace(STAGE, iterations=4, precision="auto"))
    state = checkpoint(tmp_path)
    assert state["scaler"] == {}
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0)
    )
    run(tmp_path, replace(STAGE, precision="auto"))
    assert checkpoint(tmp_path)["scaler"]["scale"] == 2.0


def test_lost_log_is_begun_anew(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "log.csv").unlink()
    run(tmp_path, replace(STAGE, iterations=12))
    assert [row["iteration"] for row in log(tmp_path)] == ["10", "12"]


def test_seeds_differ(tmp_path: Path) -> None:
    run(tmp_path / "0")
    run(tmp_path / "1", replace(STAGE, seed=1))
    assert log(tmp_path / "0") != log(tmp_path / "1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"no checkpoint"),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"model": {}}, path),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["truncated", "garbage", "empty", "no-stage", "list"],
)
def test_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run(tmp_path)
    damage(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a whole checkpoint.*--restart"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_checkpoint_of_other_settings_or_network(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: was written with seed=0.*has 1"):
        run(tmp_path, replace(STAGE, seed=1))
    with pytest.raises(ValueError, match="learning_rate=0.05, this run has 0.1"):
        run(tmp_path, replace(STAGE, learning_rate=0.1))
    with pytest.raises(ValueError, match="holds another network"):
        run(tmp_path, model=deconvnet())


# The update, by hand


def first_batch(stage: StageConfig) -> tuple[Tensor, Tensor]:
    sampler = StreamSampler(10, seed=stage.seed, length=stage.batch_size)
    images, labels = next(iter(DataLoader(Crops(), stage.batch_size, sampler=sampler)))
    return images, labels.long()


def test_accumulated_gradients_equal_the_whole_batchs(tmp_path: Path) -> None:
    stage = replace(STAGE, iterations=3, batch_size=8, learning_rate=0.1)
    trained = {
        micro: run(
            tmp_path / str(micro),
            replace(stage, micro_batch=micro),
            model=deconvnet(batch_norm=False),
        )
        for micro in (1, 2, 8)
    }
    for micro in (1, 2):
        for one, other in zip(trained[micro].parameters(), trained[8].parameters()):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    moved = deconvnet(batch_norm=False).score.bias - trained[8].score.bias
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("build", [fcn, deconvnet])
def test_recomputing_changes_nothing(tmp_path: Path, build, one_thread: None) -> None:
    stage = replace(STAGE, iterations=3)
    plain, saving = (
        run(tmp_path / str(flag), replace(stage, recompute=flag), model=build())
        for flag in (False, True)
    )
    assert_same(plain.state_dict(), saving.state_dict())
    assert all("forward" not in vars(block) for block in saving.encoder.blocks)


def test_fc_layers_are_matrix_products_only_while_it_learns(tmp_path: Path) -> None:
    seen = []
    model = deconvnet()

    def validate(model: nn.Module) -> float:
        seen.append(type(model.fc6[0]))
        return 0.0

    run(tmp_path, STAGE, model=model, validate=validate)
    assert set(seen) == {ConvolutionOfAll}
    assert type(model.fc6[0]) is nn.Conv2d


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks on Windows")
@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "another process is at work in this folder"), (1, "refused to the first process")],
)
def test_two_trainings_do_not_share_a_folder(
    tmp_path: Path, rank: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused before it touches the first one's files, whatever its rank."""
    files = [tmp_path / name for name in ("checkpoint.pt", ".checkpoint.pt.half")]
    for file in files:
        file.touch()
    if rank == 1:  # what it hears from the first
        monkeypatch.setattr(training, "join_processes", lambda: (1, 2))
        monkeypatch.setattr(training._Run, "any_process", lambda run, answer: True)
    with held_by_another(tmp_path):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, STAGE, resume=False)
        assert all(file.exists() for file in files)


def test_recomputing_keeps_less(tmp_path: Path) -> None:
    images, kept = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), []
    model = deconvnet().train()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    totals = []
    for context in (nullcontext(), recomputed(model)):
        kept.clear()
        with context, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(images)
        totals.append(sum(kept))
    assert totals[1] < 0.7 * totals[0]


def test_first_update_by_hand(tmp_path: Path) -> None:
    stage = replace(
        STAGE, iterations=1, micro_batch=4, weight_decay=0.1, encoder_rate=0.5, log_every=1
    )
    by_hand = fcn(dropout=0.0)
    images, labels = first_batch(stage)
    loss = F.cross_entropy(by_hand.train()(images), labels, ignore_index=255)
    loss.backward()
    trained = run(tmp_path, stage, model=fcn(dropout=0.0))
    for (name, p), q in zip(by_hand.named_parameters(), trained.parameters()):
        rate = 0.05 * (0.5 if name.startswith("encoder.") else 1.0)
        if p.ndim > 1:
            expected = p - rate * (p.grad + 0.1 * p)
        else:  # biases and batch norm: twice the rate, no decay
            expected = p - 2 * rate * p.grad
        torch.testing.assert_close(q, expected, atol=1e-6, rtol=1e-5)
    assert float(log(tmp_path)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-5)


def test_optimizer_groups() -> None:
    model = fcn()
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        name = "sgd" if kind is torch.optim.SGD else "adamw"
        optimizer = make_optimizer(model, replace(STAGE, optimizer=name))
        assert type(optimizer) is kind
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
        assert len(grouped) == len(set(map(id, grouped)))
        for group in optimizer.param_groups:
            is_weight = group["params"][0].ndim > 1
            assert all((p.ndim > 1) == is_weight for p in group["params"])
            assert group["weight_decay"] == (0.0005 if is_weight else 0.0)
            assert group["rate"] == (1.0 if is_weight else 2.0)


def test_loss_ignores_void() -> None:
    scores = torch.randn(2, CLASSES, 4, 4)
    labels = torch.full((2, 4, 4), 255)
    labels[0, 0, 0], labels[1, 3, 3] = 2, 0
    log_probabilities = scores.log_softmax(1)
    by_hand = -log_probabilities[0, 2, 0, 0] - log_probabilities[1, 0, 3, 3]
    torch.testing.assert_close(pixel_loss(scores, labels), by_hand)


def test_batch_without_a_valid_pixel_changes_nothing(tmp_path: Path) -> None:
    class Void(Crops):
        def __getitem__(self, key):
            image, labels = super().__getitem__(key)
            return image, torch.full_like(labels, 255)

    stage = replace(STAGE, iterations=2, weight_decay=0.0)
    trained = run(tmp_path, stage, Void())
    for p, q in zip(fcn().parameters(), trained.parameters()):
        assert torch.equal(p, q)


def test_frozen_blocks_stay(tmp_path: Path) -> None:
    start = fcn().state_dict()
    end = run(tmp_path, replace(STAGE, frozen_blocks=2)).state_dict()
    for name, tensor in end.items():
        if name.endswith("num_batches_tracked"):
            continue
        frozen = name.startswith(("encoder.blocks.0.", "encoder.blocks.1."))
        assert torch.equal(tensor, start[name]) == frozen, name
    again = run(tmp_path / "again", model=fcn())
    model = fcn()
    run(tmp_path / "first", replace(STAGE, frozen_blocks=2, iterations=1), model=model)
    model.load_state_dict(start)  # the next training is not frozen
    run(tmp_path / "next", model=model)
    assert_same(model.state_dict(), again.state_dict())
    with pytest.raises(ValueError, match="frozen_blocks is 6, the encoder has 5"):
        freeze_blocks(fcn(), 6)


def test_draws_only_the_given_examples(tmp_path: Path) -> None:
    class Seen(Crops):
        def __getitem__(self, key):
            seen.append(key)
            return super().__getitem__(key)

    seen: list[tuple[int, int]] = []
    run(tmp_path, replace(STAGE, iterations=4), Seen(), indices=torch.tensor([7, 7, 2]))
    assert [draw for _, draw in seen] == list(range(len(seen)))
    assert sorted(index for index, _ in seen[:6]) == [2, 2, 7, 7, 7, 7]


# Rates


def test_schedules_by_hand() -> None:
    def factor(iteration: int, progress: float = 0.0, plateau: float = 1.0, **fields) -> float:
        return schedule_factor(replace(STAGE, **fields), iteration, progress, plateau)

    step = {"schedule": "step", "step_size": 9_000, "drop": 0.1}
    assert [factor(i, **step) for i in (0, 8_999)] == [1.0, 1.0]
    assert [factor(i, **step) for i in (9_000, 18_000)] == pytest.approx([0.1, 0.01])
    assert factor(10**6, schedule="constant") == 1.0
    assert factor(10**6, plateau=0.01, schedule="plateau") == 0.01
    poly = [factor(0, progress, schedule="poly") for progress in (0, 0.5, 1, 1.2)]
    assert poly == pytest.approx([1, 0.5**0.9, 0, 0])
    warm = [factor(i, schedule="constant", warmup=3) for i in range(6)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_rates_reach_the_optimizer_and_the_log(tmp_path: Path) -> None:
    run(tmp_path, replace(STAGE, step_size=4, log_every=1))
    rates = [float(row["rate"]) for row in log(tmp_path)]
    assert rates == pytest.approx([0.05] * 4 + [0.005] * 4 + [0.0005])
    for group in checkpoint(tmp_path)["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(0.0005 * group["rate"])


def test_plateau_by_hand() -> None:
    plateau, factors = Plateau(drop=0.1, patience=2), []
    for score in (3.0, 2.0, 2.0, 1.0, 1.5, 1.0, 1.0, 1.2, 0.5):
        plateau.update(score)
        factors.append(plateau.factor)
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_validation_steers_plateau_and_is_logged(tmp_path: Path) -> None:
    scores = iter([1.0, 1.0, 0.5])
    modes = []

    def validate(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return next(scores)

    stage = replace(STAGE, schedule="plateau", patience=1, log_every=100)
    trained = run(tmp_path, stage, validate=validate)
    assert modes == [(False, False)] * 3
    assert trained.training
    rows = [(r["iteration"], float(r["rate"]), float(r["validation"])) for r in log(tmp_path)]
    assert rows == [("3", 0.05, 1.0), ("6", 0.05, 1.0), ("9", 0.005, 0.5)]


def test_a_run_made_longer_drops_its_rate_no_sooner(tmp_path: Path) -> None:
    """Each part of it is validated at its end, which must not count."""
    stage = replace(STAGE, schedule="plateau", patience=2, validate_every=3)
    for name, ends in (("whole", [9]), ("parts", [4, 5, 7, 9])):
        for end in ends:
            run(tmp_path / name, replace(stage, iterations=end), validate=lambda model: 1.0)
    assert [checkpoint(tmp_path / name)["plateau"] for name in ("whole", "parts")] == [
        {"drop": 0.1, "patience": 2, "factor": 0.1, "best": 1.0, "stalled": 0}
    ] * 2


def test_minutes_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10_000))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(training, "time", clock)
    stage = replace(STAGE, iterations=1000, minutes=0.1, schedule="poly", log_every=1)
    run(tmp_path, stage)
    state = checkpoint(tmp_path)
    assert (state["iteration"], state["seconds"]) == (6, 6.0)
    rates = [float(row["rate"]) for row in log(tmp_path)]
    assert rates == pytest.approx([0.05 * (1 - i / 6) ** 0.9 for i in range(6)], rel=1e-4)
    run(tmp_path, stage, Crops(lambda draw: killed()))  # the time is used up


# What goes wrong


class Sabotaged(FCN8s):
    """Turns its scores, or its gradients, into NaN at one forward pass."""

    def __init__(self, bad_pass: int, gradients: bool) -> None:
        super().__init__(fcn().config)
        self.bad_pass, self.gradients, self.passes = bad_pass, gradients, 0

    def forward(self, images: Tensor) -> Tensor:
        scores = super().forward(images)
        self.passes += 1
        if self.passes == self.bad_pass:
            if not self.gradients:
                return scores * float("nan")
            scores.register_hook(lambda gradient: gradient * float("nan"))
        return scores


@pytest.mark.parametrize("gradients", [False, True])
def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path, gradients: bool) -> None:
    # The eighth update, at which the second checkpoint is due, is spoilt.
    with pytest.raises(TrainingDiverged, match=r"iteration 8; .*checkpoint: .*checkpoint\.pt"):
        run(tmp_path, replace(STAGE, log_every=8), model=Sabotaged(16, gradients))
    state = checkpoint(tmp_path)
    assert state["iteration"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_divergence_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="loss is nan at iteration 2;.*none was written"):
        run(tmp_path, model=Sabotaged(3, gradients=False))
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"schedule": "cosine"}, "schedule must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"batch_size": 6, "micro_batch": 4}, "multiple of micro_batch, got 6 and 4"),
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_settings_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(STAGE, **fields)


def test_arguments_that_cannot_work(tmp_path: Path) -> None:
    class Empty(Crops):
        def __len__(self) -> int:
            return 0

    with pytest.raises(ValueError, match="no examples"):
        run(tmp_path, dataset=Empty())
    with pytest.raises(ValueError, match="needs the validate argument"):
        run(tmp_path, replace(STAGE, schedule="plateau"))
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3"):
        StageConfig.release(3)
    assert list(tmp_path.iterdir()) == []


# Precision, batch norm, several processes


def test_precision_by_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda has=has: has)
        assert choose_precision("auto", cpu) == expected
        assert choose_precision("portable", cpu) == torch.float32
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_precision("auto", gpu) == expected
    assert choose_precision("float16", cpu) == torch.float16
    with pytest.raises(ValueError, match="precision must be one of"):
        choose_precision("half", cpu)


def test_bfloat16_keeps_float32_weights(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    model = fcn()
    model.fc7[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run(tmp_path, replace(STAGE, iterations=2, precision="bfloat16"), model=model)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_reestimated_statistics_are_plain_averages() -> None:
    model = fcn(dropout=0.5)
    model.encoder.blocks[0].eval()
    momenta = {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def note(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        seen.setdefault(norm, []).append((x.mean(1), x.var(1)))

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    model.eval()
    reestimate_batch_norm(model, Crops(), crops=12, batch=4, seed=5)
    for handle in handles:
        handle.remove()
    for norm in norms:
        assert len(seen[norm]) == 3
        means, variances = (torch.stack(values) for values in zip(*seen[norm]))
        torch.testing.assert_close(norm.running_mean, means.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, variances.mean(0), atol=1e-5, rtol=1e-4)
    assert not model.training
    assert {norm.momentum for norm in norms} == momenta
    # Dropout was off: the same crops give the same statistics again.
    before = [norm.running_mean.clone() for norm in norms]
    reestimate_batch_norm(model, Crops(), crops=12, batch=4, seed=5)
    assert_same(before, [norm.running_mean for norm in norms])


def test_statistics_of_chosen_crops(capsys: pytest.CaptureFixture[str]) -> None:
    class Seen(Crops):
        def __getitem__(self, key):
            seen.append(key[0])
            return super().__getitem__(key)

    seen: list[int] = []
    chosen = torch.tensor([7, 7, 2])
    reestimate_batch_norm(fcn(), Seen(), crops=12, batch=4, indices=chosen, progress=True)
    assert len(seen) == 12
    assert set(seen) == {2, 7}
    assert "3/3" in capsys.readouterr().err


def test_a_crop_that_cannot_be_read_leaves_the_norms_momentum() -> None:
    class Damaged(Crops):
        def __getitem__(self, key):
            raise OSError("damaged")

    model = fcn()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    assert momenta and None not in momenta
    with pytest.raises(OSError, match="damaged"):
        reestimate_batch_norm(model.train(), Damaged(), crops=4, batch=2)
    assert [norm.momentum for norm in norms] == momenta
    assert all(module.training for module in model.modules())


def test_statistics_that_cannot_be_had_anew_stay_as_they_were() -> None:
    class Damaged(Crops):
        def __getitem__(self, key):
            if next(count) == 5:
                raise OSError("damaged")
            return super().__getitem__(key)

    count = itertools.count()
    model = fcn()
    reestimate_batch_norm(model, Crops(), crops=4, batch=2, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match="damaged"):
        reestimate_batch_norm(model, Damaged(), crops=8, batch=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_frozen_blocks_keep_their_statistics() -> None:
    model = fcn()
    before = {name: value.clone() for name, value in model.named_buffers()}
    reestimate_batch_norm(model, Crops(), crops=4, batch=2, frozen_blocks=2)
    means = {n: v for n, v in model.named_buffers() if n.endswith("running_mean")}
    frozen = {n for n in means if n.startswith(("encoder.blocks.0.", "encoder.blocks.1."))}
    assert frozen and {n for n in means if torch.equal(means[n], before[n])} == frozen


def test_crop_loss_is_the_mean_over_all_valid_pixels() -> None:
    model, dataset = deconvnet().eval(), Crops()  # a new FCN scores all classes alike
    # The first five would be the crops of the first images only.
    for crops, chosen in ((5, (0, 2, 4, 6, 8)), (3, (0, 3, 6)), (10, range(10)), (99, range(10))):
        images, labels = (torch.stack(part) for part in zip(*(dataset[i] for i in chosen)))
        with torch.no_grad():
            expected = F.cross_entropy(model(images), labels.long(), ignore_index=255).item()
        assert crop_loss(model, dataset, crops, batch=2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("crops", [4, 0])
def test_crop_loss_of_void_alone_is_no_perfect_score(crops: int) -> None:
    class Void(Crops):
        def __getitem__(self, key):
            image, labels = super().__getitem__(key)
            return image, torch.full_like(labels, 255)

    with pytest.raises(ValueError, match=rf"not void \(255\), found none in {crops} of its 10"):
        crop_loss(fcn().eval(), Void(), crops)


def test_synchronised_norms_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several GPUs replace batch norm in place; the caller gets the model's own back."""

    def loop(self: training._Run, progress: bool) -> None:
        self.world_size, self.device = 2, torch.device("cuda")
        network = self.distributed_model().train()
        replaced = [m for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(replaced) == len(norms)
        with torch.no_grad():
            for norm in replaced:
                norm.weight += 1
                norm.running_mean += 2
        raise Killed

    monkeypatch.setattr(training._Run, "loop", loop)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network: network)
    model = fcn().eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: (m.weight.clone(), m.running_mean.clone()) for n, m in norms.items()}
    with pytest.raises(Killed):
        run(tmp_path, model=model)
    after = dict(model.named_modules())
    for name, norm in norms.items():
        assert after[name] is norm
        assert norm.training
        assert torch.equal(norm.weight, before[name][0] + 1)
        assert torch.equal(norm.running_mean, before[name][1] + 2)


@pytest.mark.parametrize(
    ("group", "travels_by"),
    [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")],
)
def test_messages_travel_by_what_the_group_has(
    group: str, travels_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who starts processes by hand may have chosen NCCL alone, which sends no CPU tensors."""
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: group)
    assert hardware.message_device(torch.device("cuda", 1)).type == travels_by


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number on this machine: two machines of four GPUs each have eight ranks."""
    assert hardware.default_device() == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("RANK", "6")
    for local, expected in (("3", 3), ("5", 1)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert hardware.default_device() == torch.device("cuda", expected)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)  # by torch.cuda.set_device
    assert hardware.default_device() == torch.device("cuda", 2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ctrl_c_in_one_process_stops_all(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "rank = training.join_processes()[0]\n"
        "pressed = []\n"
        "def press(draw):\n"
        "    if draw > 8 and rank == 1 and not pressed:\n"
        "        pressed.append(draw)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "crops = Crops(press)\n"
        "try:\n"
        f"    run({str(tmp_path / 'run')!r}, dataset=crops, model=deconvnet(batch_norm=False))\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped") == 2
    assert 0 < checkpoint(tmp_path / "run")["iteration"] < STAGE.iterations


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same global batch gives the same losses, accumulation and resuming included."""
    stage = replace(STAGE, iterations=4, batch_size=8, micro_batch=2, log_every=1, minutes=60)
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from test_training import *\n"
        "torch.set_num_threads(1)\n"
        f"for iterations in (2, 4):\n"
        f"    stage = replace({stage!r}, iterations=iterations)\n"
        f"    run({str(tmp_path / 'two')!r}, stage, model=deconvnet(batch_norm=False))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", stage, model=deconvnet(batch_norm=False))
    rows = [log(tmp_path / name) for name in ("one", "two")]
    assert [r["iteration"] for r in rows[1]] == ["1", "2", "3", "4"]
    losses = [[float(r["loss"]) for r in part] for part in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)
