"""The recipes' numbers against the paper's tables, and what they build."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from deconvnet import recipes
from deconvnet.fcn import FCN8s
from deconvnet.instances import balanced_indices
from deconvnet.model import DeconvNet
from deconvnet.proposals import Proposals
from deconvnet.recipes import RECIPES, STAGES, Recipe, make_network, stage_crops, train_stage
from deconvnet.training import StageConfig
from deconvnet.voc import VOCDataset

every_recipe = pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)


@pytest.fixture(scope="module")
def dataset(shapes_root: Path) -> VOCDataset:
    return VOCDataset(shapes_root, "train", decode_cache=True)


@pytest.fixture(scope="module")
def proposals(dataset: VOCDataset) -> list[Proposals]:
    """The objects' own boxes and one that fits nothing."""
    nowhere = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    every = []
    for i in range(len(dataset)):
        boxes = torch.tensor([a.box for a in dataset.annotations(i)]).view(-1, 4)
        boxes = torch.cat([boxes, nowhere])
        every.append(Proposals(boxes, torch.linspace(1, 0, len(boxes))))
    return every


# The paper's and the release's settings


@pytest.mark.parametrize(("stage", "iterations", "step"), [(1, 20_000, 9_000), (2, 40_000, 10_000)])
def test_stages_are_those_of_the_paper(stage: int, iterations: int, step: int) -> None:
    release, paper = StageConfig.release(stage), StageConfig.paper(stage)
    assert release.iterations == iterations
    assert (release.schedule, release.step_size, release.drop) == ("step", step, 0.1)
    assert (release.batch_size, release.micro_batch) == (64, 8)
    assert (release.optimizer, release.momentum, release.weight_decay) == ("sgd", 0.9, 0.0005)
    assert (release.learning_rate, release.bias_rate, release.encoder_rate) == (0.01, 2.0, 1.0)
    assert (release.warmup, release.frozen_blocks, release.minutes) == (0, 0, None)
    assert paper.schedule == "plateau"
    assert replace(paper, schedule="step") == release
    assert getattr(recipes.voc2012(), f"stage{stage}") == paper


def test_voc2012_is_the_papers_size() -> None:
    recipe = recipes.voc2012()
    with torch.device("meta"):
        model = make_network(recipe, "1", 21)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(251.8e6, rel=1e-3)
    crops = recipe.instances
    assert (crops.context, crops.resize, crops.crop, crops.min_overlap) == (1.2, 250, 224, 0.5)
    assert crops.flip
    assert not crops.square
    assert (recipe.inference.num_proposals, recipe.inference.convention) == (50, "paper")
    assert recipe.edge_boxes.max_boxes == 2000
    assert recipe.balance == 1.0


def test_short_is_the_papers_size_by_the_solver_of_compact() -> None:
    short, compact, paper = recipes.short(), recipes.compact(), recipes.voc2012()
    assert (short.model, short.instances) == (paper.model, paper.instances)
    assert replace(short.stage1, batch_size=32, micro_batch=32) == compact.stage1
    assert short.stage2 == short.stage1
    own = {"model": compact.model, "instances": compact.instances}
    assert replace(short, **own, stage1=compact.stage1, stage2=compact.stage2) == compact
    with torch.device("meta"):
        start, model = (make_network(recipe, "fcn", 21) for recipe in (compact, short))
    assert start.config == model.config  # of the encoder that both of DeconvNet's stages keep


# What a recipe builds


@every_recipe
@pytest.mark.parametrize("stage", STAGES)
def test_crops_fit_their_network(
    make: Callable[[], Recipe], stage: str, dataset: VOCDataset, proposals: list[Proposals]
) -> None:
    recipe = make()
    with torch.device("meta"):
        model = make_network(recipe, stage, dataset.num_classes)
    assert isinstance(model, FCN8s if stage == "fcn" else DeconvNet)
    assert model.config.num_classes == 13
    for training in (True, False):
        crops = stage_crops(recipe, stage, dataset, proposals, training, seed=3)
        cut = crops.crops if stage == "classify" else crops
        assert cut.train == training
        assert cut.config.seed == 3
        image, labels = crops[0]
        size = model.config.input_size
        drawn = 1 if stage == "classify" else size
        assert (image.shape, labels.shape) == ((3, size, size), (drawn, drawn))
        assert image.dtype == labels.dtype == torch.uint8


@pytest.mark.parametrize("stage", ["fcn", "1"])
def test_tiny_networks_score_their_crops(stage: str, dataset: VOCDataset) -> None:
    recipe = recipes.tiny()
    crops = stage_crops(recipe, stage, dataset)
    images = torch.stack([crops[i][0] for i in range(2)])
    size = images.shape[-1]
    with torch.no_grad():
        scores = make_network(recipe, stage, 13).eval()(images)
    assert scores.shape == (2, 13, size, size)
    assert scores.isfinite().all()


def test_stage_2_learns_from_proposals_near_objects(
    dataset: VOCDataset, proposals: list[Proposals]
) -> None:
    crops = stage_crops(recipes.tiny(), "2", dataset, proposals)
    objects = [a for i in range(len(dataset)) for a in dataset.annotations(i) if not a.difficult]
    assert len(crops) >= len(objects)
    assert len(crops) < sum(len(p.boxes) for p in proposals)
    with pytest.raises(ValueError, match="stage 2 learns from proposals"):
        stage_crops(recipes.tiny(), "2", dataset)


def test_vgg_weights_reach_the_encoder(dataset: VOCDataset) -> None:
    recipe = recipes.compact()
    generator = torch.Generator().manual_seed(0)
    weights, channels, index = {}, 3, 0
    for block in zip(recipe.model.widths, recipe.model.encoder_depths):
        for _ in range(block[1]):
            shape = (block[0], channels, 3, 3)
            weights[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * 0.05
            weights[f"features.{index}.bias"] = torch.zeros(block[0])
            index, channels = index + 2, block[0]
        index += 1
    crops = recipes.calibration_crops(stage_crops(recipe, "1", dataset), count=2)
    assert crops.shape == (2, 3, 96, 96)
    model = make_network(recipe, "1", 13, weights, crops)
    convolution, norm, _ = model.encoder.blocks[0][0]
    assert torch.equal(convolution.weight, weights["features.0.weight"])
    # Calibrated: on these crops batch norm changes nothing, so the encoder is plain VGG's.
    with torch.no_grad():
        x = convolution(model.normalise(crops))
        torch.testing.assert_close(norm.eval()(x), x, atol=1e-2, rtol=1e-3)


def test_a_vgg_with_batch_norm_keeps_its_norms(dataset: VOCDataset) -> None:
    recipe = replace(recipes.tiny(), calibrate=True)
    generator = torch.Generator().manual_seed(0)
    weights, channels, index = {}, 3, 0
    for width, depth in zip(recipe.model.widths, recipe.model.encoder_depths):
        for _ in range(depth):
            convolution, norm = f"features.{index}.", f"features.{index + 1}."
            shape = (width, channels, 3, 3)
            weights[f"{convolution}weight"] = torch.randn(shape, generator=generator) * 0.1
            weights[f"{convolution}bias"] = torch.randn(width, generator=generator)
            for name in ("weight", "bias", "running_mean", "running_var"):
                weights[norm + name] = torch.rand(width, generator=generator) + 0.5
            index, channels = index + 3, width
        index += 1
    crops = recipes.calibration_crops(stage_crops(recipe, "1", dataset), count=2)
    model = make_network(recipe, "1", 13, weights, crops).eval()
    plain = make_network(replace(recipe, calibrate=False), "1", 13, weights).eval()
    assert torch.equal(model.encoder.blocks[0][0][1].running_var, weights["features.1.running_var"])
    with torch.no_grad():
        ours, theirs = (m.encoder(m.normalise(crops))[0][-1] for m in (model, plain))
    assert torch.equal(ours, theirs)


def test_calibration_reads_no_more_crops_than_it_keeps(dataset: VOCDataset) -> None:
    class Crops:
        def __len__(self) -> int:
            return 15

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(index)
            return torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(2, 2)

    read: list[int] = []
    assert recipes.calibration_crops(Crops(), count=8).shape == (8, 3, 2, 2)
    assert read == list(range(8))


@pytest.mark.parametrize("stage", ["1", "fcn"])
@pytest.mark.parametrize(
    "fields",
    [{"pixel_std": (1.0, 1.0, 1.0)}, {"pixel_mean": (1.0, 2.0, 3.0)}, {"batch_norm_eps": 1e-3}],
)
def test_a_start_that_sees_pixels_otherwise_is_refused(stage: str, fields: dict) -> None:
    recipe = recipes.tiny()
    start = DeconvNet(replace(recipe.model, **fields))
    ((name, value),) = fields.items()
    message = rf"recipe's settings, with {name}=.*, got {re.escape(str(value))}"
    with pytest.raises(ValueError, match=message):
        make_network(recipe, stage, 13, start=start)


def test_a_start_without_switches_is_refused() -> None:
    recipe = recipes.tiny()
    start = DeconvNet(replace(recipe.model, use_switches=False))
    with pytest.raises(ValueError, match="with use_switches=True, got False"):
        make_network(recipe, "1", 13, start=start)
    make_network(recipe, "fcn", 13, start=start)  # has no unpooling


@pytest.mark.parametrize(("stage", "begins"), [("1", ""), ("fcn", "encoder.")])
def test_start_is_copied_as_far_as_it_fits(stage: str, begins: str) -> None:
    recipe = recipes.tiny()
    start = make_network(recipe, "classify", 13)
    model = make_network(recipe, stage, 13, start=start).state_dict()
    for name, tensor in start.state_dict().items():
        if name.startswith(begins):
            assert torch.equal(model[name], tensor)
    other = replace(recipe, model=replace(recipe.model, widths=(8, *recipe.model.widths[1:])))
    with pytest.raises(ValueError, match=r"0.weight of shape \(32, 3, 3, 3\), got \(8, 3, 3, 3\)"):
        make_network(recipe, stage, 13, start=make_network(other, "1", 13))


def test_fcn_gives_its_fc_layers_where_they_are_of_one_size() -> None:
    for recipe, shared in ((recipes.compact(), ("encoder.", "fc6.", "fc7.")),
                           (recipes.tiny(), ("encoder.",))):  # fmt: skip
        fcn = make_network(recipe, "fcn", 21)
        model = make_network(recipe, "1", 21, start=fcn).state_dict()
        equal = {n for n, t in fcn.state_dict().items() if n in model and torch.equal(model[n], t)}
        weights = {n for n in equal if n.endswith("0.weight")}
        assert weights == {
            n for n in fcn.state_dict() if n.startswith(shared) and n.endswith("0.weight")
        }


@pytest.mark.parametrize("stage", ["1", "fcn"])
def test_new_classes_begin_anew_and_all_else_is_copied(stage: str) -> None:
    recipe = recipes.tiny()
    start = make_network(recipe, stage, 13)
    model = make_network(recipe, stage, 3, start=start, new_classes=True)
    assert model.config.num_classes == 3
    old, new = start.state_dict(), model.state_dict()
    assert old.keys() == new.keys()
    anew = {name for name, tensor in new.items() if tensor.shape != old[name].shape}
    assert {name.split(".")[0] for name in anew} == (
        {"score"} if stage == "1" else {"score8", "score16", "score32", "up16", "up32"}
    )
    assert all(torch.equal(new[name], old[name]) for name in new.keys() - anew)
    with pytest.raises(ValueError, match="the data's classes"):
        make_network(recipe, stage, 3, start=start)


def test_unknown_stage_is_refused(dataset: VOCDataset) -> None:
    for call in (
        lambda: make_network(recipes.tiny(), "3", 13),
        lambda: stage_crops(recipes.tiny(), "3", dataset),
        lambda: recipes.default_settings(recipes.tiny(), "3"),
    ):
        with pytest.raises(ValueError, match=r"stage must be one of \('classify', .*got '3'"):
            call()


# Training by recipe


def test_each_stage_has_its_settings() -> None:
    recipe = recipes.tiny()
    for stage, expected in (
        ("classify", recipe.classify),
        ("fcn", recipe.single),
        ("whole", recipe.single),
        ("1", recipe.stage1),
        ("2", recipe.stage2),
    ):
        assert recipes.default_settings(recipe, stage) == expected
    compact = recipes.compact()
    assert recipes.default_settings(compact, "fcn") == compact.fcn_stage
    assert recipes.default_settings(compact, "whole") == compact.stage1
    with pytest.raises(ValueError, match="starts from ImageNet weights; pass vgg16"):
        recipes.default_settings(recipes.voc2012(), "classify")


def test_the_compact_networks_share_their_encoder() -> None:
    compact = recipes.compact()
    for stage in ("whole", "1", "2"):
        settings = recipes.default_settings(compact, stage)
        assert settings.frozen_blocks == len(compact.model.widths)


def test_train_stage_passes_on_what_the_recipe_says(
    dataset: VOCDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, calls = recipes.tiny(), []
    monkeypatch.setattr(recipes, "train", lambda *a, **k: calls.append((a, k)))
    crops = stage_crops(recipe, "1", dataset)
    settings = replace(recipe.stage1, seed=4)
    arguments = ("network", crops, tmp_path, crops, settings)
    assert train_stage(recipe, "1", *arguments, device="cpu") == "network"
    train_stage(recipe, "2", "network", crops, tmp_path)
    (given, options), (defaults, without) = calls
    assert given == ("network", crops, settings, tmp_path)
    assert options["device"] == "cpu"
    assert options["validate"].keywords["dataset"] is crops
    expected = balanced_indices(crops.example_labels, 4, recipe.balance)
    assert torch.equal(options["indices"], expected)
    assert defaults[2] == recipe.stage2
    assert without["validate"] is None


def test_the_paper_balances_stage_2_alone(
    dataset: VOCDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(recipes, "train", lambda *a, **k: drawn.append(k["indices"]))
    monkeypatch.setattr(recipes, "CropClassifier", lambda model: model)
    for recipe, balanced in ((recipes.voc2012(), ("2",)), (recipes.tiny(), STAGES)):
        assert recipe.balance > 0
        crops = stage_crops(recipe, "1", dataset)
        for stage in STAGES:
            train_stage(recipe, stage, "network", crops, tmp_path, settings=recipe.stage1)
            once = drawn.pop().sort().values.tolist() == list(range(len(crops)))
            assert once == (stage not in balanced)


def test_only_the_papers_recipe_averages_batch_norm_anew() -> None:
    counts = {name: make().reestimate_crops for name, make in RECIPES.items()}
    assert counts == {"tiny": 0, "compact": 0, "short": 0, "voc2012": 501 * 28}


def test_finishing_a_stage(dataset: VOCDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(recipes, "reestimate_batch_norm", lambda *a, **k: calls.append((a, k)))
    recipe = replace(recipes.tiny(), reestimate_crops=100)
    crops = stage_crops(recipe, "1", dataset)
    settings = replace(recipe.stage1, seed=4, workers=2)
    for seen in (None, 70, 1000):
        recipes.finish_stage(recipe, "1", "network", crops, settings, seen, progress=False)
    assert [arguments for arguments, _ in calls] == [
        ("network", crops, count) for count in (100, 70, 100)
    ]
    options = calls[0][1]
    expected = balanced_indices(crops.example_labels, 4, recipe.balance)
    assert torch.equal(options.pop("indices"), expected)
    assert options == {"seed": 4, "workers": 2, "progress": False, "frozen_blocks": 0}
    recipes.finish_stage(recipes.tiny(), "1", "network", crops)
    assert len(calls) == 3


def test_paper_schedule_needs_validation_crops(dataset: VOCDataset, tmp_path: Path) -> None:
    recipe = replace(recipes.tiny(), stage1=StageConfig.paper(1))
    model = make_network(recipe, "1", 13)
    with pytest.raises(ValueError, match="needs the validate argument"):
        train_stage(recipe, "1", model, stage_crops(recipe, "1", dataset), tmp_path, device="cpu")


@every_recipe
def test_weights_say_how_they_are_used(make: Callable[[], Recipe], dataset: VOCDataset) -> None:
    name = next(n for n, m in RECIPES.items() if m is make)
    facts = json.loads(json.dumps(recipes.facts(name, "1", dataset, 5)))
    assert facts["class_names"] == list(dataset.class_names)
    assert (facts["recipe"], facts["stage"], facts["seed"]) == (name, "1", 5)
    recipe = make()
    for kind, config in (
        ("config", recipe.inference),
        ("edge_boxes", recipe.edge_boxes),
        ("crf", recipe.crf),
    ):
        assert type(config)(**facts["settings"][kind]) == config
        assert facts["settings"][kind] == asdict(config)
