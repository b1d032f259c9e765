"""Every command, in process where it can be: what it writes, says and returns."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from deconvnet import cli, proposals, recipes, training, voc, weights
from deconvnet.cli import main
from deconvnet.evaluation import read_log
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.inference import Predictor
from deconvnet.instances import balanced_indices
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.proposals import edge_boxes
from deconvnet.shapes import CLASS_NAMES
from deconvnet.voc import VOCDataset, read_image, read_label_map, write_image
from deconvnet.weights import SHIPPED, load_model, save_model

COMMANDS = ("data", "train", "compress", "segment", "evaluate", "submit", "proposals", "demo")
SIZES = {"widths": (4, 4, 4, 6, 8), "encoder_depths": (1,) * 5, "fc_width": 8}
DECODER = {"decoder_depths": (1,) * 5}
SHIPPED_FILES = [SHIPPED / f"shapes-{name}.safetensors" for name in ("deconvnet", "fcn")]


@pytest.fixture(scope="module")
def networks(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained networks of the shapes' classes, as files."""
    folder = tmp_path_factory.mktemp("weights")
    dataset = VOCDataset(shapes_root, "val")
    torch.manual_seed(0)
    deconvnet = DeconvNet(ModelConfig(13, **SIZES, **DECODER, input_size=32))
    fcn = FCN8s(FCNConfig(13, **SIZES, fc_kernel=3, input_size=32))
    files = {}
    for name, stage, model in (("deconvnet", "2", deconvnet), ("fcn", "fcn", fcn)):
        for parameter in model.parameters():  # untrained scores are all alike
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        files[name] = str(folder / f"{name}.safetensors")
        save_model(model, files[name], recipes.facts("tiny", stage, dataset, 0))
    return files


@pytest.fixture
def photo(shapes_root: Path) -> str:
    return str(shapes_root / "JPEGImages/val_000000.jpg")


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe "tiny" on a network of a few thousand weights."""
    recipe = recipes.tiny()
    stage = replace(
        recipe.stage1, batch_size=4, micro_batch=4, iterations=6, log_every=1, checkpoint_every=2
    )
    small = replace(
        recipe,
        model=ModelConfig(**SIZES, **DECODER, input_size=32),
        fcn=FCNConfig(**SIZES, fc_kernel=3, input_size=32),
        instances=replace(recipe.instances, resize=36, crop=32),
        classify=stage,
        stage1=stage,
        stage2=stage,
        single=stage,
    )
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: small)


def options(networks: dict[str, str]) -> list[str]:
    return ["--deconvnet", networks["deconvnet"], "--fcn", networks["fcn"], "--device", "cpu"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must say what is wrong on one line; returns that line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("deconvnet: ")
    assert "Traceback" not in captured.err
    return message


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The same for what the parser itself turns down."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    examples = text.split("examples:\n")[1].strip().splitlines()
    assert examples
    for example in examples:
        program, *arguments = example.split()
        assert program == "deconvnet"
        assert cli.parser().parse_args(arguments).command == command
    assert "--seed" in text
    if command not in ("data", "compress", "proposals"):
        assert "--device" in text


def test_help_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {command} " in text for command in COMMANDS)
    assert "0 all went well, 2 wrong input, 3 training diverged, 130 interrupted" in text


def test_no_or_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: command" in refused(capsys)
    assert "invalid choice: 'paint'" in refused(capsys, "paint")


def test_runs_as_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deconvnet", "proposals", "missing.jpg"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "deconvnet: missing.jpg: there is no such image file\n"


# data


def test_data_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "shapes", str(tmp_path / "s"), "--train", "2", "--val", "1", "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 's'}\n"
    dataset = VOCDataset(tmp_path / "s", "train")
    assert len(dataset) == 2
    assert dataset.class_names == CLASS_NAMES
    assert main(command) == 0
    capsys.readouterr()
    assert "another seed" in fails(capsys, *command, "--seed", "1")
    assert "train must be at least 1" in fails(capsys, "data", "shapes", tmp_path, "--train", 0)


def test_data_voc2012(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("download_voc2012", "download_sbd"):
        monkeypatch.setattr(cli, name, lambda root, n=name: calls.append((n, root)) or root / "V")
    assert main(["data", "voc2012", str(tmp_path)]) == 0
    assert main(["data", "voc2012", str(tmp_path), "--sbd"]) == 0
    assert [name for name, _ in calls] == ["download_voc2012"] * 2 + ["download_sbd"]
    assert {root for _, root in calls} == {tmp_path}
    assert capsys.readouterr().out == f"{tmp_path / 'V'}\n" * 2


def test_sbd_without_scipy_is_refused_before_gigabytes_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(cli, "download_voc2012", lambda root: calls.append(root) or root)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else find(name, *a)
    )
    message = fails(capsys, "data", "voc2012", tmp_path, "--sbd")
    assert message.endswith("pip install scipy")
    assert calls == []
    assert main(["data", "voc2012", str(tmp_path)]) == 0


# train


def train(root: Path, out: Path, *more: object) -> list[str]:
    arguments = ["train", "--data", root, "--out", out, "--device", "cpu", "--quiet", *more]
    return [str(a) for a in arguments]


@pytest.mark.usefixtures("small_training")
def test_classifier_and_two_stages(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, stage1 = tmp_path / "classify", tmp_path / "stage1"
    assert main(train(shapes_root, start, "--stage", "classify", "--iterations", 3)) == 0
    assert capsys.readouterr().out == f"{start / 'weights.safetensors'}\n"
    command = train(shapes_root, stage1, "--init", start / "weights.safetensors", "--half")
    assert main([*command, "--stage", "1", "--iterations", "2"]) == 0
    model = load_model(stage1 / "weights.safetensors")
    assert model.metadata["class_names"] == list(CLASS_NAMES)
    assert (model.metadata["recipe"], model.metadata["stage"]) == ("tiny", "1")
    assert model.metadata["training"]["iterations"] == 2
    assert main([*command, "--stage", "1", "--iterations", "3"]) == 0
    state = torch.load(stage1 / "checkpoint.pt", weights_only=True)
    assert state["iteration"] == 3

    stage2, cache = tmp_path / "stage2", tmp_path / "cache"
    command = train(
        shapes_root, stage2, "--stage", 2, "--iterations", 2, "--proposals", cache,
        "--init", stage1 / "weights.safetensors", "--workers", 1, "--limit", 6,
    )  # fmt: skip
    assert main(command) == 0
    assert len(list(cache.glob("*.npz"))) == 12  # six images each of train and val
    model = load_model(stage2 / "weights.safetensors")
    assert (model.metadata["stage"], model.metadata["training"]["images"]) == ("2", 6)
    assert sorted(p.name for p in stage2.iterdir()) == [
        "checkpoint.pt",
        "log.csv",
        "weights.safetensors",
    ]


@pytest.mark.usefixtures("small_training")
@pytest.mark.parametrize(
    ("alone", "more", "device", "keeps"),
    [
        (True, [], "cpu", True),
        (True, ["--recompute"], "cpu", False),
        (True, [], "cuda", False),
        (False, [], "cpu", False),
    ],
)
def test_memory_is_kept_by_a_process_that_only_trains(
    alone: bool,
    more: list[str],
    device: str,
    keeps: bool,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Training(Exception):
        pass

    def train_stage(*_: object, **__: object) -> None:
        raise Training

    kept = []
    monkeypatch.setattr(cli, "keep_memory", lambda: kept.append(True))
    monkeypatch.setattr(cli, "default_device", lambda: torch.device(device))
    monkeypatch.setattr(recipes, "train_stage", train_stage)
    command = ["train", "--data", str(shapes_root), "--out", str(tmp_path), "--stage", "classify"]
    monkeypatch.setattr(sys, "argv", ["deconvnet", *command, *more])
    with pytest.raises(Training):
        main(None if alone else [*command, *more])
    assert any(kept) == keeps


@pytest.mark.usefixtures("small_training")
def test_stage_2_takes_the_boxes_that_proposals_found(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of images that are shrunk, and with an edge model."""
    recipe = recipes.RECIPES["tiny"]()
    small = replace(recipe, inference=replace(recipe.inference, max_side=100))
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: small)
    models = []

    def boxes(image, config, model):
        models.append(str(model))
        return edge_boxes(image, config)

    monkeypatch.setattr(proposals, "edge_boxes", boxes)
    monkeypatch.setattr(proposals, "_detector", lambda *arguments: None)
    cache, out, model = tmp_path / "cache", tmp_path / "run", tmp_path / "model.yml.gz"
    model.write_bytes(b"a forest")
    every = ("--cache", cache, "--edge-model", model, "--limit", 3, "--workers", 1, "--quiet")
    for split in ("train", "val"):
        command = ["proposals", "--data", shapes_root, "--split", split, *every]
        assert main([str(a) for a in command]) == 0
    assert models == [str(model)] * 6

    # The validation data are 128 images at most: six here, three of which are new.
    command = train(
        shapes_root, out, "--stage", 2, "--proposals", cache, "--edge-model", model,
        "--limit", 3, "--iterations", 1,
    )  # fmt: skip
    assert main(command) == 0
    assert len(models) == 9
    assert len(list(cache.glob("*.npz"))) == 9
    assert main(command) == 0
    capsys.readouterr()
    model.write_bytes(b"another")
    assert "was written with edge model=" in fails(capsys, *command)
    without = [a for a in command if a not in ("--edge-model", str(model))]
    assert "this run has None" in fails(capsys, *without)


def test_boxes_are_found_for_the_recipe_that_learns() -> None:
    parse = cli.parser().parse_args
    asked = parse(["proposals", "photo.jpg"]), parse(["train", "--data", "a", "--out", "b"])
    assert asked[0].recipe == asked[1].recipe


@pytest.mark.usefixtures("small_training", "one_thread")
def test_batch_norm_is_averaged_anew_after_the_stage(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(recipes.RECIPES["tiny"](), reestimate_crops=56)
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: recipe)
    command = [a for a in train(shapes_root, tmp_path / "run") if a != "--quiet"]
    assert main(command) == 0
    assert "batch norm" in capsys.readouterr().err
    path = tmp_path / "run" / "weights.safetensors"
    found = load_model(path)

    # By hand: the last running averages, and then those over crops.
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert state.keys() == found.state_dict().keys()
    for name, tensor in found.state_dict().items():
        kept = name.split(".")[-1] not in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(state[name], tensor) == kept, name
    found.load_state_dict(state)
    crops = recipes.stage_crops(recipe, "1", VOCDataset(shapes_root, "train"))
    indices = balanced_indices(crops.example_labels, 0, recipe.balance)
    # six updates of four crops: no more than that, hence one batch of 28
    training.reestimate_batch_norm(found, crops, crops=28, indices=indices)
    averaged = load_model(path).state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(averaged[name], tensor)

    # Given again the command comes to the same; made longer it goes on as if never averaged.
    assert main(command) == 0
    for name, tensor in load_model(path).state_dict().items():
        assert torch.equal(averaged[name], tensor)
    assert main([*command, "--iterations", "8"]) == 0
    plain = replace(recipe, reestimate_crops=0)
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: plain)
    for iterations in (6, 8):  # the rate falls with the share that is done
        assert main(train(shapes_root, tmp_path / "plain", "--iterations", iterations)) == 0
    longer, whole = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("run", "plain")
    )
    for name, tensor in whole.items():
        assert torch.equal(longer[name], tensor)
    # Without it the weights are the checkpoint's.
    found = load_model(tmp_path / "plain" / "weights.safetensors").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.usefixtures("small_training")
def test_only_imagenets_weights_are_calibrated(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, calls = replace(recipes.RECIPES["tiny"](), calibrate=True), []
    monkeypatch.setitem(recipes.RECIPES, "tiny", lambda: recipe)
    monkeypatch.setattr(recipes, "calibration_crops", lambda crops: calls.append(crops))
    assert main(train(shapes_root, tmp_path, "--iterations", 1)) == 0
    assert calls == []


@pytest.mark.usefixtures("small_training")
def test_weights_of_other_classes_are_a_start(shapes_root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = recipes.make_network(recipes.RECIPES["tiny"](), "1", 5)
    save_model(model, tmp_path / "five.safetensors")
    init = ("--init", tmp_path / "five.safetensors", "--new-classes", "--iterations", 1)
    assert main(train(shapes_root, tmp_path / "run", *init)) == 0
    found = load_model(tmp_path / "run" / "weights.safetensors")
    assert found.config.num_classes == len(found.metadata["class_names"]) == 13
    learnt = found.encoder.blocks[0][0][0].weight - model.encoder.blocks[0][0][0].weight
    assert learnt.abs().max() < 0.01  # one small step away from where it began


@pytest.mark.usefixtures("small_training", "one_thread", "heeds_ctrl_c")
def test_interrupted_training_goes_on(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def press_ctrl_c(*arguments) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    loss = training.pixel_loss
    with monkeypatch.context() as patch:
        patch.setattr(training, "pixel_loss", press_ctrl_c)
        assert main(train(shapes_root, tmp_path / "parts")) == 130
    said = "interrupted after 3 iterations; the same command goes on from here, or ends as it is"
    assert f"{said} with --iterations 3" in capsys.readouterr().err
    assert not (tmp_path / "parts/weights.safetensors").exists()
    ended = Path(shutil.copytree(tmp_path / "parts", tmp_path / "ended"))
    assert main(train(shapes_root, ended, "--iterations", "2")) == 0  # it had three
    last = torch.load(ended / "checkpoint.pt", weights_only=True)
    facts = load_model(ended / "weights.safetensors").metadata["training"]
    assert last["iteration"] == facts["iterations"] == 3
    assert [row["iteration"] for row in facts["curve"]] == [1, 2, 3]
    (ended / "log.csv").unlink()
    assert main(train(shapes_root, ended, "--iterations", "2")) == 0
    facts = load_model(ended / "weights.safetensors").metadata["training"]
    assert facts["iterations"] == 3 and facts["curve"] == []
    for name, tensor in load_model(ended / "weights.safetensors").state_dict().items():
        assert torch.equal(last["model"][name], tensor), name
    assert main(train(shapes_root, tmp_path / "parts")) == 0
    assert main(train(shapes_root, tmp_path / "whole", "--no-cache")) == 0
    parts, whole = (load_model(tmp_path / n / "weights.safetensors") for n in ("parts", "whole"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


@pytest.mark.usefixtures("small_training")
def test_diverged_training(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(train(shapes_root, tmp_path, "--stage", "whole", "--iterations", 2)) == 0
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    loss = training.pixel_loss
    monkeypatch.setattr(training, "pixel_loss", lambda s, y: loss(s, y) * float("inf"))
    assert main(train(shapes_root, tmp_path, "--stage", "whole", "--iterations", 4)) == 3
    message = capsys.readouterr().err
    assert message.startswith("deconvnet: the loss is inf at iteration 3;")
    assert str(tmp_path / "checkpoint.pt") in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == kept


@pytest.mark.usefixtures("small_training")
def test_restart_and_other_seed(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train(shapes_root, tmp_path, "--stage", "fcn", "--iterations", 1)
    assert main(command) == 0
    capsys.readouterr()
    message = fails(capsys, *command, "--seed", 1)
    assert "checkpoint.pt: was written with seed=0, this run has 1" in message
    message = fails(capsys, *command, "--limit", 1)
    assert "checkpoint.pt: was written with images=" in message
    assert main([*command, "--seed", "1", "--restart"]) == 0
    assert load_model(tmp_path / "weights.safetensors").metadata["seed"] == 1


@pytest.mark.usefixtures("small_training")
def test_train_bad_input(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = train(shapes_root, out)
    assert "nowhere: expected a data set" in fails(capsys, *train("nowhere", out))
    assert "dev" in fails(capsys, *command, "--split", "dev")
    assert "iterations must be at least 1" in fails(capsys, *command, "--iterations", 0)
    assert "minutes must be positive" in fails(capsys, *command, "--minutes", -1)
    assert "learning_rate must be" in fails(capsys, *command, "--learning-rate", -1)
    assert "a multiple of micro_batch" in fails(capsys, *command, "--micro-batch", 5)
    assert "limit must be at least 1" in fails(capsys, *command, "--limit", 0)
    assert "seed" in fails(capsys, *command, "--seed", -1)
    assert "no weights at gone.safetensors" in fails(capsys, *command, "--init", "gone.safetensors")
    two_classes = tmp_path / "two.safetensors"
    save_model(DeconvNet(ModelConfig(2, **SIZES, **DECODER, input_size=32)), two_classes)
    message = fails(capsys, *command, "--init", two_classes)
    assert "two.safetensors: expected a network of the recipe's sizes and the data's" in message
    assert "score.weight of shape (13, 4, 1, 1), got (2, 4, 1, 1); --new-classes" in message
    other_size = tmp_path / "64.safetensors"
    save_model(DeconvNet(ModelConfig(13, **SIZES, **DECODER, input_size=64)), other_size)
    assert "fc6.0.weight of shape (8, 8, 1, 1), got (8, 8, 2, 2)" in fails(
        capsys, *command, "--init", other_size
    )
    wide = tmp_path / "wide.safetensors"
    save_model(FCN8s(FCNConfig(13, **{**SIZES, "widths": (5,) * 5})), wide)
    message = fails(capsys, *command, "--init", wide)
    assert "wide.safetensors: expected" in message
    assert "blocks.0.0.0.weight of shape (4, 3, 3, 3), got (5, 3, 3, 3)" in message
    gone = train("nowhere", out, "--vgg16", "gone.npz")  # said before images are read
    assert "no VGG-16 weights at gone.npz; vgg16 and vgg16_bn are" in fails(capsys, *gone)
    assert "not allowed with" in refused(capsys, *command, "--init", "a", "--vgg16", "b")
    assert "invalid choice: '3'" in refused(capsys, *command, "--stage", 3)
    assert not out.exists()


@pytest.mark.usefixtures("small_training")
def test_a_validation_split_without_objects_stops_nobody(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shapes_root, data)
    for path in (data / "Annotations").glob("val_*.xml"):
        path.unlink()
    assert main(train(data, out, "--iterations", 1)) == 0
    said = capsys.readouterr().err
    assert "training goes without validation" in said and "split 'val'" in said
    assert read_log(out / "log.csv")[-1]["validation"] is None
    message = fails(capsys, *train(data, tmp_path / "other", "--split", "val"))
    assert "expected annotated objects in split 'val'" in message


@pytest.mark.usefixtures("small_training")
def test_masks_without_classes_stop_those_who_learn_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    (data / "classes.txt").write_text("background\nsquare\n")
    (data / "val.txt").write_text("empty\n")
    for name, square in (("empty", 0), ("one", 1), ("two", 1)):
        labels = np.zeros((40, 40), np.uint8)
        labels[8:28, 8:28] = square
        Image.fromarray(labels).save(data / "masks" / f"{name}.png")
        Image.fromarray(labels * 200).save(data / "images" / f"{name}.png")
    for stage, validates in (("1", False), ("whole", True)):
        command = train(data, tmp_path / stage, "--stage", stage, "--iterations", 1)
        assert main([argument for argument in command if argument != "--quiet"]) == 0
        said = capsys.readouterr().err
        assert "2 images to learn from, 1 to validate with" in said
        assert ("goes without validation" in said) != validates
    message = fails(capsys, *train(data, tmp_path / "other", "--split", "val"))
    assert "masks: expected pixels of some class in split 'val'" in message


def test_a_frozen_encoder_must_have_learned(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("fcn", "1", "2"):
        command = train(shapes_root, tmp_path / "run", "--recipe", "compact", "--stage", stage)
        assert "encoder as they are, and so must start from learned ones: pass --init" in fails(
            capsys, *command
        )
    message = fails(capsys, *train(shapes_root, tmp_path / "run", "--new-classes"))
    assert "--new-classes needs --init" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("small_training")
def test_weights_of_other_classes_are_not_taken_over(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many classes, but others: no shape would show it."""
    config = ModelConfig(13, **SIZES, **DECODER, input_size=32)
    named = [f"class {i}" for i in range(13)]
    start = tmp_path / "start.safetensors"
    save_model(DeconvNet(config), start, {"class_names": named, "recipe": "compact"})
    command = train(shapes_root, tmp_path / "run", "--iterations", "1", "--init", start)
    message = fails(capsys, *command)
    assert "knows the classes class 0, class 1," in message
    assert "the data has background, disc," in message
    assert message.endswith("; --new-classes learns other classes than it knows")
    assert main([str(a) for a in (*command, "--new-classes")]) == 0
    # An FCN-8s takes its encoder alone.
    fcn = [*train(shapes_root, tmp_path / "fcn", "--iterations", "1"), "--stage", "fcn"]
    assert main([str(a) for a in (*fcn, "--init", start)]) == 0
    wide = replace(config, fc_width=9)
    save_model(DeconvNet(wide), start, {"recipe": "compact"})
    capsys.readouterr()
    message = fails(capsys, *command)
    assert message.endswith("; it was trained with --recipe compact, this is tiny")


def test_starting_from_nothing_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*options: str) -> str:
        given = cli.parser().parse_args(train(Path("data"), Path("run"), *options))
        cli._settings_to_train(given, recipes.RECIPES[given.recipe]())
        return capsys.readouterr().err

    assert "'voc2012' starts from nothing" in said("--recipe", "voc2012")
    assert said("--recipe", "voc2012", "--vgg16", "vgg16") == said("--recipe", "tiny") == ""
    monkeypatch.setattr(cli, "join_processes", lambda: (1, 2))
    assert said("--recipe", "voc2012") == ""  # once is enough


@pytest.mark.usefixtures("small_training")
def test_what_may_be_refused_is_read_before_what_takes_long(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "compute_proposals", None)  # must not be called
    command = train(shapes_root, tmp_path / "run", "--stage", 2)
    two_classes = tmp_path / "two.safetensors"
    save_model(DeconvNet(ModelConfig(2, **SIZES, **DECODER, input_size=32)), two_classes)
    assert "--new-classes learns" in fails(capsys, *command, "--init", two_classes)
    monkeypatch.setattr(cli, "open_dataset", None)
    assert "iterations must be at least 1" in fails(capsys, *command, "--iterations", 0)
    assert "no weights at gone.safetensors" in fails(capsys, *command, "--init", "gone.safetensors")


@pytest.mark.parametrize(
    ("recipe", "processes", "expected"),
    [
        ("tiny", 1, 32),
        ("tiny", 2, 16),
        ("compact", 4, 8),
        ("voc2012", 2, 8),
        ("voc2012", 16, 4),
    ],
)
def test_processes_share_a_batch(
    recipe: str, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "join_processes", lambda: (0, processes))
    start = ["--recipe", recipe, "--init", "voc-deconvnet"]
    given = cli.parser().parse_args(train(Path("data"), Path("run"), *start))
    settings = cli._settings_to_train(given, recipes.RECIPES[recipe]())
    assert settings.micro_batch == expected
    monkeypatch.setattr(cli, "join_processes", lambda: (0, 7))
    with pytest.raises(ValueError, match="7 processes cannot share a batch of (32|64) crops"):
        cli._settings_to_train(given, recipes.RECIPES[recipe]())


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        (["data", "shapes", "x"], True),
        (["train", "--data", "x", "--out", "y"], True),
        (["train", "--data", "x", "--out", "y", "--restart"], True),
        (["submit", "--data", "x", "--out", "y"], True),
        (["proposals", "--data", "x", "--cache", "y"], True),
        (["proposals", "x.jpg"], False),
        (["evaluate", "--data", "x"], False),
        (["segment", "x.jpg", "-o", "y.png"], False),
        (["demo", "-o", "y.png"], False),
    ],
)
def test_only_what_goes_on_says_so(
    command: list[str],
    goes_on: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"run_{command[0]}", interrupt)
    assert main(command) == 130
    restart = " without --restart" if "--restart" in command else ""
    hint = f"; the same command{restart} goes on from here" if goes_on else ""
    assert capsys.readouterr().err == f"deconvnet: interrupted{hint}\n"


def test_device_is_checked_before_anything_else(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "demo", "-o", "demo.png", "--device", "abacus")
    assert "argument --device: 'abacus' cannot be used" in message
    if not torch.cuda.is_available():
        assert "cannot be used" in refused(capsys, "demo", "-o", "demo.png", "--device", "cuda")


def test_the_gpu_is_this_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torchrun`` gives all processes one command; ``cuda`` is then another GPU for each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # an empty tensor on "cuda" would lie on the current GPU, and that is the first
    at = lambda name: SimpleNamespace(type=name.type, index=name.index or 0)  # noqa: E731
    monkeypatch.setattr(
        torch, "empty", lambda n, device: SimpleNamespace(device=at(torch.device(device)))
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    command = ["demo", "-o", "demo.png", "--device"]
    for name, expected in (("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)):
        assert cli.parser().parse_args([*command, name]).device.index == expected


# compress


def test_compress(
    networks: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcn, net = tmp_path / "fcn.safetensors", tmp_path / "net.safetensors"
    assert main(["compress", networks["fcn"], "-o", str(fcn)]) == 0
    assert capsys.readouterr().out == f"{fcn} {fcn.stat().st_size / 1e6:.1f} MB\n"
    before, after = load_model(networks["fcn"]), load_model(fcn)
    assert after.metadata == before.metadata
    difference = after.fc6[0].weight - before.fc6[0].weight
    assert 0 < difference.abs().max() < 0.01 * before.fc6[0].weight.abs().max()

    assert main(["compress", networks["deconvnet"], "-o", str(net), "--dtype", "float16"]) == 0
    capsys.readouterr()
    half = load_model(net).fc7[0].weight
    assert torch.equal(half, load_model(networks["deconvnet"]).fc7[0].weight.half().float())
    message = fails(capsys, "compress", networks["deconvnet"], "-o", net, "--encoder-of", fcn)
    assert "fcn.safetensors: its encoder is not this model's" in message
    for out in (net, tmp_path / "net.bin"):
        message = fails(capsys, "compress", net, "-o", out)
        assert f"{out}: expected another file than {net}, a .safetensors" in message


# segment


def test_segment(
    photo: str, tmp_path: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "labels.png"
    assert main(["segment", photo, "-o", str(out), "--num-proposals", "3", *options(networks)]) == 0
    image = read_image(photo)
    labels = read_label_map(out, num_classes=13)
    assert labels.shape == image.shape[1:]
    with Image.open(out) as png:
        assert png.mode == "P"
    picture = read_image(tmp_path / "new" / "labels-overlay.png")
    assert picture.shape == image.shape
    assert torch.equal(picture[:, labels == 0], image[:, labels == 0])
    assert not torch.equal(picture, image)
    files, used, shares = capsys.readouterr().out.strip().splitlines()
    assert used == "with DeconvNet, FCN-8s, 3 proposals, dense CRF"
    assert files == f"{out} {tmp_path / 'new' / 'labels-overlay.png'}"
    present = [CLASS_NAMES[c] for c in labels.unique().tolist()]
    assert [share.split()[0] for share in shares.split(", ")] == present
    total = sum(float(share.split()[1].rstrip("%")) for share in shares.split(", "))
    assert total == pytest.approx(100, abs=1)


def test_segment_options_reach_the_predictor(networks: dict[str, str]) -> None:
    def predictor(*more: str) -> cli.Predictor:
        arguments = ["segment", "photo.jpg", "-o", "out.png", *options(networks), *more]
        return cli._predictor(cli.parser().parse_args(arguments))

    tiny, compact = recipes.tiny(), recipes.compact()
    plain = predictor()
    assert (plain.config, plain.edge_boxes, plain.crf) == (
        tiny.inference,
        tiny.edge_boxes,
        tiny.crf,
    )
    other = predictor("--recipe", "compact")
    assert (other.config, other.edge_boxes) == (compact.inference, compact.edge_boxes)
    assert predictor("--whole").edge_boxes is None
    assert predictor("--no-crf").crf is None
    assert predictor("--num-proposals", "7").config.num_proposals == 7
    release = predictor("--convention", "release")
    assert (release.config.convention, release.config.min_side) == ("release", 16)
    assert release.config.batch_size == tiny.inference.batch_size
    assert release.crf.normalization == "none"
    large = predictor("--recipe", "compact", "--convention", "release")
    assert large.config.max_side == compact.inference.max_side > 0
    assert predictor("--fcn", "none").fcn is None
    assert predictor("--deconvnet", "none").deconvnet is None
    assert str(predictor("--edge-model", "model.yml.gz").edge_model) == "model.yml.gz"


def test_which_networks_are_meant() -> None:
    def kinds(*more: str) -> tuple[str | None, str | None]:
        predictor = cli._predictor(cli.parser().parse_args(["segment", "x", "-o", "y.png", *more]))
        names = (predictor.deconvnet, predictor.fcn)
        return tuple(n and n.metadata.get("recipe", "a file") for n in names)

    assert kinds() == ("compact", "compact")
    assert kinds("--fcn", "none") == ("compact", None)
    assert kinds("--deconvnet", "none") == (None, "compact")
    assert kinds("--deconvnet", "shapes-deconvnet") == ("tiny", None)
    assert kinds("--fcn", "shapes-fcn") == (None, "tiny")
    assert kinds("--deconvnet", "shapes-deconvnet", "--fcn", "shapes-fcn") == ("tiny", "tiny")


@pytest.mark.parametrize(
    "more", [["--whole", "--fcn", "none", "--no-crf"], ["--deconvnet", "none", "--no-crf"]]
)
def test_segment_with_one_network(
    more: list[str], photo: str, tmp_path: Path, networks: dict[str, str]
) -> None:
    command = ["segment", photo, "-o", str(tmp_path / "a.png"), *options(networks), *more]
    assert main([*command, "--overlay", str(tmp_path / "b.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_segment_with_a_network_of_no_file(
    photo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fcn = FCN8s(FCNConfig(13, **SIZES, fc_kernel=3, input_size=32)).eval()
    monkeypatch.setattr(cli, "_predictor", lambda options: Predictor(None, fcn, crf=None))
    assert main(["segment", photo, "-o", str(tmp_path / "a.png")]) == 0
    assert "with FCN-8s\n" in capsys.readouterr().out


def test_segment_bad_input(
    photo: str, tmp_path: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken, text = tmp_path / "broken.jpg", tmp_path / "text.jpg"
    broken.write_bytes(Path(photo).read_bytes()[:1000])
    text.write_text("no image")
    before = sorted(tmp_path.iterdir())

    def command(image: object, *more: object) -> list[object]:
        return ["segment", image, "-o", tmp_path / "out.png", *options(networks), *more]

    assert "gone.jpg: there is no such image file" in fails(capsys, *command("gone.jpg"))
    for bad in (broken, text):
        assert f"{bad}: expected an image file" in fails(capsys, *command(bad))
    assert "no weights at gone.safetensors" in fails(
        capsys, *command(photo, "--fcn", "gone.safetensors")
    )
    assert "no weights named 'gone'" in fails(capsys, *command(photo, "--fcn", "gone"))
    assert "not a whole safetensors file" in fails(capsys, *command(photo, "--fcn", text))
    assert "got neither" in fails(capsys, *command(photo, "--fcn", "none", "--deconvnet", "none"))
    assert "num_proposals must be at least 0" in fails(
        capsys, *command(photo, "--num-proposals", -1)
    )
    assert "gone.yml.gz" in fails(capsys, *command(photo, "--edge-model", "gone.yml.gz"))
    assert "'out.jpg' must end in .png" in refused(capsys, "segment", photo, "-o", "out.jpg")
    assert "must end in .png" in refused(capsys, *command(photo, "--overlay", "o.gif"))
    within = Path(photo, "labels.png")  # known before the networks are loaded
    assert f"{within}: {photo} is no folder" in refused(capsys, "segment", photo, "-o", within)
    assert sorted(tmp_path.iterdir()) == before


def test_segment_overwrites_nothing_that_it_needs(
    photo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_predictor", None)  # must not be called
    write_image("a-overlay.png", read_image(photo))
    before = Path("a-overlay.png").read_bytes()
    expected = "expected different files for"
    message = fails(capsys, "segment", photo, "-o", "b.png", "--overlay", tmp_path / "b.png")
    assert f"{expected} the label map and the overlay" in message
    message = fails(capsys, "segment", "a-overlay.png", "-o", tmp_path / "a-overlay.png")
    assert f"{expected} the image and the label map" in message
    message = fails(capsys, "segment", "a-overlay.png", "-o", "a.png")
    assert f"{expected} the image and the overlay" in message
    assert [p.name for p in tmp_path.iterdir()] == ["a-overlay.png"]
    assert Path("a-overlay.png").read_bytes() == before


def test_a_folder_does_not_hide_shipped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("voc-fcn").mkdir()
    assert cli._weights("voc-fcn") == SHIPPED / "voc-fcn.safetensors"
    Path("mine").write_bytes(b"")
    assert cli._weights("mine") == Path("mine")


def test_networks_of_different_classes(
    photo: str, tmp_path: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_model(FCN8s(FCNConfig(2, **SIZES, fc_kernel=3, input_size=32)), other)
    message = fails(
        capsys, "segment", photo, "-o", tmp_path / "out.png", *options(networks), "--fcn", other
    )
    assert "must know the same classes, got 13 and 2" in message


# evaluate


def test_evaluate(
    shapes_root: Path, tmp_path: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "run.json"
    command = [
        "evaluate", "--data", str(shapes_root), "--limit", "2", "--num-proposals", "2", "--quiet",
        "--cache", str(tmp_path / "cache"), "--out", str(out), *options(networks),
    ]  # fmt: skip
    assert main(command) == 0
    used, *printed = capsys.readouterr().out.splitlines()
    assert used == "with DeconvNet, FCN-8s, 2 proposals, dense CRF"
    assert [line.split()[0] for line in printed] == ["fcn", "deconvnet", "ensemble", "crf"]
    run = json.loads(out.read_text())
    assert (run["dataset"], run["split"], run["images"], run["seed"]) == ("shapes", "val", 2, 0)
    assert list(run["methods"]) == ["fcn", "deconvnet", "ensemble", "crf"]
    for line, summary in zip(printed, run["methods"].values()):
        assert f"{summary['miou']:.2f}" in line
    assert run["inference"]["num_proposals"] == 2
    assert run["weights"]["deconvnet"]["stage"] == "2"
    assert {"command", "commit", "machine", "versions", "finished"} <= run.keys()
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2
    assert run["edge_model"] is None


def test_evaluate_whole_images_without_proposals(
    shapes_root: Path,
    networks: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "compute_proposals", None)  # must not be called
    command = ["evaluate", "--data", str(shapes_root), "--limit", "1", "--quiet", "--no-crf"]
    assert main([*command, "--whole", "--fcn", "none", *options(networks)[:2]]) == 0
    assert main([*command, "--deconvnet", "none", *options(networks)[2:]]) == 0
    deconvnet, _, fcn, _ = lines = capsys.readouterr().out.splitlines()
    assert (deconvnet, fcn) == ("with DeconvNet, one crop", "with FCN-8s")
    assert [line.split()[0] for line in lines[1::2]] == ["deconvnet", "fcn"]


def test_evaluate_bad_input(
    shapes_root: Path, tmp_path: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    command = ["evaluate", "--data", shapes_root, "--out", out, *options(networks), "--quiet"]
    assert "test.txt" in fails(capsys, *command, "--split", "test")
    assert "limit must be at least 1" in fails(capsys, *command, "--limit", 0)
    other = tmp_path / "other"
    shutil.copytree(shapes_root, other)
    names = list(CLASS_NAMES)
    command[2] = other
    for classes in (names[:-1], [*names, "extra"], [*names[:-1], "renamed"]):
        (other / "classes.txt").write_text("\n".join(classes) + "\n")
        message = fails(capsys, *command)
        assert f"other: has the {len(classes)} classes background" in message
        assert "the weights know 13: background" in message
    (other / "classes.txt").write_text("\n".join(names) + "\n")
    (other / "SegmentationClass/val_000000.png").write_bytes(b"")
    assert "val_000000.png: expected an image file" in fails(capsys, *command, "--limit", 1)
    assert not out.exists()


# submit


def test_submit(
    shapes_root: Path,
    networks: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        "submit", "--data", str(shapes_root), "--split", "val", "--limit", "2", "--quiet",
        "--num-proposals", "2", "--out", str(tmp_path), *options(networks),
    ]  # fmt: skip
    assert main(command) == 0
    archive = tmp_path / "results.tar.gz"
    assert capsys.readouterr().out == f"{archive}\n"
    names = VOCDataset(shapes_root, "val", limit=2).names
    inside = [f"results/VOC2012/Segmentation/comp6_val_cls/{name}.png" for name in names]
    with tarfile.open(archive) as packed:
        assert sorted(m.name for m in packed.getmembers() if m.isfile()) == sorted(inside)
    for name, path in zip(names, inside):
        image = read_image(shapes_root / "JPEGImages" / f"{name}.jpg")
        assert read_label_map(tmp_path / path, 13).shape == image.shape[1:]

    # Given again, it does what is missing and nothing else, and packs nothing else that is there.
    kept, lost = (tmp_path / path for path in inside)
    before = lost.read_bytes()
    lost.unlink()
    kept.write_bytes(b"kept")
    for stray in (f".{lost.name}.x1.png", "another.png"):  # a killed writer's, a longer split's
        (lost.parent / stray).write_bytes(b"stray")
    assert main(command) == 0
    assert kept.read_bytes() == b"kept"
    with tarfile.open(archive) as packed:
        assert packed.getnames() == inside
    assert lost.read_bytes() == before
    capsys.readouterr()
    others = "settings.json: the label maps there were made with other weights or"
    assert others in fails(capsys, *command, "--no-crf")
    model = tmp_path / "model.yml.gz"
    model.write_bytes(b"a forest")
    assert others in fails(capsys, *command, "--edge-model", model)


def test_submit_a_test_set_without_masks(
    shapes_root: Path,
    networks: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets"):
        shutil.copytree(shapes_root / folder, data / folder)
    shutil.copy(shapes_root / "classes.txt", data)
    every = ["--data", data, "--split", "val", "--limit", 1, "--quiet"]
    command = ["submit", *every, "--num-proposals", 1, "--out", tmp_path / "out"]
    assert main([str(a) for a in (*command, *options(networks))]) == 0
    assert main([str(a) for a in ("proposals", *every, "--cache", tmp_path / "cache")]) == 0
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    capsys.readouterr()
    evaluation = ["evaluate", *every, "--num-proposals", 1, *options(networks)]
    assert "SegmentationClass/val_000000.png" in fails(capsys, *evaluation)


# proposals


def test_proposals_of_an_image(
    photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["proposals", photo]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = edge_boxes(read_image(photo), recipes.tiny().edge_boxes)
    assert torch.equal(torch.tensor(printed["boxes"]), expected.boxes)
    assert torch.equal(torch.tensor(printed["scores"]), expected.scores)
    out = tmp_path / "boxes.json"
    assert main(["proposals", photo, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert json.loads(out.read_text()) == printed


def test_proposals_of_a_data_set(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["proposals", "--data", shapes_root, "--cache", tmp_path, "--limit", 2]
    command = [str(a) for a in (*command, "--workers", 1, "--quiet")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.endswith(f" boxes of 2 images in {tmp_path}\n")
    assert int(text.split()[0]) > 100
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert main(command) == 0
    assert capsys.readouterr().out == text


@pytest.mark.usefixtures("small_training")
def test_workers_of_proposals_are_theirs_alone(
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(*_, workers: int | None, **__) -> None:
        raise ValueError(f"threads: {workers}")

    monkeypatch.setattr(cli, "compute_proposals", compute)
    command = ["proposals", "--data", shapes_root, "--cache", tmp_path, "--workers", 2]
    assert "threads: 2" in fails(capsys, *command)
    command = train(shapes_root, tmp_path / "run", "--stage", 2, "--workers", 2)
    assert "threads: None" in fails(capsys, *command)


def test_opencv_without_contrib_is_an_error_of_one_line(
    photo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(proposals.cv2, "ximgproc")
    assert "it is in opencv-contrib-python" in fails(capsys, "proposals", photo)


def test_proposals_bad_input(
    photo: str, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "either an image or --data" in fails(capsys, "proposals")
    assert "either an image or --data" in fails(capsys, "proposals", photo, "--data", shapes_root)
    assert "--data needs --cache" in fails(capsys, "proposals", "--data", shapes_root)
    command = ["proposals", "--data", shapes_root, "--cache", tmp_path / "cache", "--quiet"]
    for workers in (0, -1):
        assert "workers must be at least 1" in fails(capsys, *command, "--workers", workers)
    assert "gone.yml.gz" in fails(capsys, "proposals", photo, "--edge-model", "gone.yml.gz")
    assert "this is a folder" in refused(capsys, "proposals", photo, "-o", tmp_path)


# demo, and the weights that ship


def shipped(monkeypatch: pytest.MonkeyPatch, networks: dict[str, str], folder: Path) -> None:
    for name, path in networks.items():
        shutil.copy(path, folder / f"shapes-{name}.safetensors")
    monkeypatch.setattr(weights, "SHIPPED", folder)


def test_demo(
    tmp_path: Path,
    networks: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped(monkeypatch, networks, tmp_path)
    out = tmp_path / "pipeline.png"
    assert main(["demo", "-o", str(out), "--scene", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    _, height, width = read_image(out).shape
    assert width > 2 * height > 200
    assert "must end in .png" in refused(capsys, "demo", "-o", "demo.pdf")
    (tmp_path / "folder.png").mkdir()
    assert "this is a folder" in refused(capsys, "demo", "-o", tmp_path / "folder.png")


def test_shipped_weights_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    message = fails(capsys, "demo", "-o", tmp_path / "demo.png")
    assert "no weights named 'shapes-deconvnet'" in message
    assert list(tmp_path.iterdir()) == []


def test_segment_with_the_shipped_weights(
    shapes_root: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Straight after installing the labels are mostly right."""
    shapes = ["--deconvnet", "shapes-deconvnet", "--fcn", "shapes-fcn"]
    assert main(["segment", photo, "-o", str(tmp_path / "labels.png"), *shapes]) == 0
    assert "background" in capsys.readouterr().out
    dataset = VOCDataset(shapes_root, "val", limit=1)
    labels, truth = read_label_map(tmp_path / "labels.png", 13), dataset.labels(0)
    counts = truth != 255
    accuracy = (labels == truth)[counts].float().mean().item()
    nothing = (truth == 0)[counts].float().mean().item()
    assert accuracy > max(0.8, nothing)


def test_what_takes_long_to_load_is_not_loaded_for_a_photograph() -> None:
    slow = ("torchvision", "torch._dynamo", "sympy", "matplotlib.pyplot", "skimage", "triton")
    code = f"import sys, deconvnet.cli; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shipped_weights_are_small_and_know_their_use() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_FILES) < 8e6
    for path in SHIPPED_FILES:
        metadata = load_model(path).metadata
        assert metadata["class_names"] == list(CLASS_NAMES)
        assert metadata["settings"].keys() == {"config", "edge_boxes", "crf"}


@pytest.mark.parametrize(
    ("photograph", "name", "share", "options"),
    [("chelsea", "cat", 0.6, []), ("astronaut", "person", 0.25, ["--whole"])],
)
def test_photographs_straight_after_installing(
    photograph: str,
    name: str,
    share: float,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pixels = getattr(skimage.data, photograph)()
    write_image(tmp_path / "photo.png", torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    command = ["segment", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png")]
    assert main([*command, "--device", "cpu", *options]) == 0
    _, used, shares = capsys.readouterr().out.splitlines()
    assert used.count("(trained on voc2012-subset)") == 2
    found = {words[0]: float(words[1][:-1]) for words in map(str.split, shares.split(", "))}
    del found["background"]
    assert max(found, key=found.get) == name
    assert found[name] > 100 * share


def test_weights_for_photographs_are_small_and_share_an_encoder() -> None:
    deconvnet, fcn = (SHIPPED / f"voc-{name}.safetensors" for name in ("deconvnet", "fcn"))
    assert deconvnet.stat().st_size + fcn.stat().st_size < 32e6
    networks = [load_model(path) for path in (deconvnet, fcn)]
    for network in networks:
        assert network.metadata["class_names"] == list(voc.CLASS_NAMES)
        assert network.metadata["settings"]["config"]["max_side"] == 500
    ours, theirs = (network.encoder.state_dict() for network in networks)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
