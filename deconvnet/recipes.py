"""Recipes: which sizes and settings go together, from a scene in seconds to the paper's own.

A recipe names everything that a run needs besides data: the two networks, how crops are cut,
how each stage is trained, and how an image is segmented afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from deconvnet.crf import CRFConfig
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.inference import InferenceConfig
from deconvnet.instances import (
    CropDataset,
    InstanceConfig,
    Stage1Dataset,
    Stage2Dataset,
    WholeImageDataset,
    WindowDataset,
    balanced_indices,
)
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.pretraining import ClassifiedCrops, CropClassifier
from deconvnet.proposals import EdgeBoxesConfig, Proposals
from deconvnet.supervision import DeeplySupervised
from deconvnet.training import StageConfig, crop_loss, reestimate_batch_norm, train
from deconvnet.voc import VOCDataset
from deconvnet.weights import calibrate_batch_norm, load_vgg16

STAGES = ("classify", "fcn", "whole", "1", "2")
"""What can be trained: a classifier to start from where there are no ImageNet weights, FCN-8s,
DeconvNet on whole images, and the paper's two stages."""

CLASS_LAYERS = ("score", "up")  # first letters of the layers with one channel a class


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together."""

    model: ModelConfig
    fcn: FCNConfig
    instances: InstanceConfig
    stage1: StageConfig
    stage2: StageConfig
    single: StageConfig | None = None  # FCN-8s, DeconvNet on whole images; by default as stage 1
    fcn_stage: StageConfig | None = None  # FCN-8s where it is trained otherwise
    classify: StageConfig | None = None  # where ImageNet gives no weights for fc6 and fc7
    inference: InferenceConfig = InferenceConfig()
    edge_boxes: EdgeBoxesConfig = EdgeBoxesConfig()
    crf: CRFConfig = CRFConfig()
    balance: float = 1.0  # 1: every class equally often; 0: as they come
    balanced_stages: tuple[str, ...] = STAGES  # where; the paper balances stage 2 alone
    calibrate: bool = False  # start batch norm so that the encoder computes what plain VGG does
    reestimate_crops: int = 0  # that a trained network's batch norm is averaged over; 0: as it is


def tiny() -> Recipe:
    """Minutes on a CPU, for the embedded shapes data: 64 px crops."""
    small = replace(StageConfig.small(iterations=500), learning_rate=2e-3)
    return Recipe(
        model=ModelConfig.tiny(),
        fcn=FCNConfig.tiny(),
        instances=InstanceConfig.tiny(),
        classify=replace(small, iterations=1_500),
        stage1=small,
        stage2=replace(small, iterations=1_000),  # twice stage 1, as in the paper
        single=replace(small, iterations=1_500),  # both stages together, to compare fairly
        inference=InferenceConfig(batch_size=50, max_side=500),  # the shapes' have at most 208
        edge_boxes=EdgeBoxesConfig.tiny(),
        balance=0.5,
    )


def compact() -> Recipe:
    """VOC on a small machine: VGG-16's encoder, a narrow rest, 96 px crops, AdamW.

    The FCN comes first. DeconvNet starts from its encoder, fc6 and fc7, as the paper's starts
    from a VGG-16 that can classify, and keeps that encoder as it is: two networks that are stored
    in little more than the space of one. It learns under deep supervision.
    """
    common = StageConfig(
        iterations=20_000,
        optimizer="adamw",
        bias_rate=1.0,
        weight_decay=0.01,
        schedule="poly",
        warmup=50,
        validate_every=500,
        checkpoint_every=100,
    )
    decoder = replace(
        common,
        batch_size=32,
        micro_batch=32,
        learning_rate=1e-3,
        frozen_blocks=5,
        deep_supervision=0.3,
    )
    fcn = replace(
        common,
        batch_size=16,
        micro_batch=16,
        learning_rate=5e-4,
        encoder_rate=0.2,
        frozen_blocks=3,
    )
    return Recipe(
        model=ModelConfig.compact(),
        fcn=FCNConfig.compact(),
        instances=InstanceConfig(resize=107, crop=96),  # the paper's 250 to 224
        stage1=decoder,
        stage2=decoder,
        fcn_stage=fcn,
        inference=InferenceConfig(include_whole_image=True, precision="auto", max_side=500),
        crf=CRFConfig(bilateral_sigma=40.0),  # searched on training images by benchmarks/voc.py
        balance=0.5,
        calibrate=True,
    )


def voc2012() -> Recipe:
    """The paper's sizes and settings, for a GPU."""
    return Recipe(
        model=ModelConfig(),
        fcn=FCNConfig(),
        instances=InstanceConfig.paper(),
        stage1=StageConfig.paper(1),
        stage2=StageConfig.paper(2),
        balanced_stages=("2",),
        reestimate_crops=501 * 28,  # the release, after training
        inference=InferenceConfig(max_side=500),  # VOC's photographs are no larger; others are
    )


def short() -> Recipe:
    """The paper's network and crops with the solver of :func:`compact`: an hour, without a GPU.

    It starts from the encoder of ``voc-fcn``, which stays as it is; fc6, fc7 and the decoder start
    from nothing. Its FCN-8s is that of :func:`compact`.
    """
    small = compact()
    solver = replace(small.stage1, batch_size=16, micro_batch=16)
    return replace(
        small,
        model=ModelConfig(),
        instances=InstanceConfig.paper(),
        stage1=solver,
        stage2=solver,
    )


RECIPES = {"tiny": tiny, "compact": compact, "short": short, "voc2012": voc2012}


def make_network(
    recipe: Recipe,
    stage: str,
    num_classes: int,
    vgg16: str | Path | None = None,
    calibration: Tensor | None = None,
    start: nn.Module | None = None,
    new_classes: bool = False,
) -> nn.Module:
    """Builds the network that a stage trains, with ImageNet weights if they are given.

    Args:
        recipe: Sizes.
        stage: One of :data:`STAGES`.
        num_classes: Classes of the data, the background included.
        vgg16: See :func:`deconvnet.weights.load_vgg16`; ``None`` starts from nothing.
        calibration: Typical crops ``uint8 [N, 3, S, S]`` for recipes that calibrate batch norm.
        start: A network of the same recipe to start from. One of the same kind is copied whole;
            from a DeconvNet to an FCN-8s or back go the encoder, and fc6 and fc7 if of one size.
            It must normalise pixels, and all else that no weight shows, as the recipe does.
        new_classes: ``start`` knows other classes: the layers that score them begin anew, and
            all others are copied.

    Raises:
        ValueError: There is no such stage, or ``start`` is of other sizes or settings.
    """
    _check_stage(stage)
    if stage == "fcn":
        model: nn.Module = FCN8s(replace(recipe.fcn, num_classes=num_classes))
    else:
        model = DeconvNet(replace(recipe.model, num_classes=num_classes))
    if vgg16 is not None:
        filled = load_vgg16(model, vgg16)
        # A VGG with batch norm brings its own norms, without which its convolutions are worthless.
        has_norms = any(name.endswith("running_var") for name in filled)
        if recipe.calibrate and calibration is not None and not has_norms:
            calibrate_batch_norm(model, calibration)
    if start is not None:
        _check_settings(start, model)
        weights, own = start.state_dict(), model.state_dict()
        if type(start) is not type(model):
            weights = own | _common_trunk(weights, own)
        if new_classes:
            weights |= {n: tensor for n, tensor in own.items() if n.startswith(CLASS_LAYERS)}
        _copy_weights(weights, model)
    return model


def _check_settings(start: nn.Module, model: nn.Module) -> None:
    """Compares the settings that change the scores, but not the shape of any weight."""
    for name in ("pixel_mean", "pixel_std", "batch_norm_eps", "use_switches"):
        expected, found = (getattr(m.config, name, None) for m in (model, start))
        if None not in (expected, found) and expected != found:  # an FCN has no switches
            raise ValueError(
                f"expected a network of the recipe's settings, with {name}={expected}, got {found}"
            )


def _common_trunk(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What DeconvNet and FCN-8s have in common: the encoder, and fc6 and fc7 of equal sizes."""
    trunk = {n: tensor for n, tensor in weights.items() if n.startswith("encoder.")}
    fc = {n: tensor for n, tensor in weights.items() if n.startswith(("fc6.", "fc7."))}
    same_size = all(n in own and own[n].shape == tensor.shape for n, tensor in fc.items())
    return trunk | fc if same_size else trunk


def _copy_weights(source: Mapping[str, Tensor], target: nn.Module) -> None:
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (source, target.state_dict())
    )
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"expected a network of the recipe's sizes and the data's classes, with {name} of "
                f"shape {expected.get(name)}, got {found.get(name)}"
            )
    target.load_state_dict(source)


def stage_crops(
    recipe: Recipe,
    stage: str,
    dataset: VOCDataset,
    proposals: Sequence[Proposals] | None = None,
    training: bool = True,
    seed: int = 0,
) -> CropDataset | ClassifiedCrops:
    """Returns the crops that a stage learns from, or validates on.

    Args:
        recipe: How crops are cut.
        stage: One of :data:`STAGES`.
        dataset: Images, label maps and boxes.
        proposals: For stage 2, one entry an image.
        training: Random crops and mirroring; else the centre crop.
        seed: Of the augmentation.

    Raises:
        ValueError: There is no such stage, or stage 2 has no proposals.
        NoExamples: No object, or no proposal that meets one, is there for stages that need it.
    """
    _check_stage(stage)
    config = replace(recipe.instances, seed=seed)
    if stage == "fcn":
        size = recipe.fcn.input_size
        return WindowDataset(dataset, replace(config, crop=size, resize=size), training)
    if stage == "whole":
        return WholeImageDataset(dataset, config, training)
    if stage in ("1", "classify"):
        crops = Stage1Dataset(dataset, config, training)
        return ClassifiedCrops(crops) if stage == "classify" else crops
    if proposals is None:
        raise ValueError("stage 2 learns from proposals: pass one Proposals for every image")
    return Stage2Dataset(dataset, proposals, config, training)


def train_stage(
    recipe: Recipe,
    stage: str,
    model: nn.Module,
    crops: CropDataset | ClassifiedCrops,
    run_dir: str | Path,
    validation: CropDataset | ClassifiedCrops | None = None,
    settings: StageConfig | None = None,
    **options,
) -> nn.Module:
    """Trains one stage on its crops, classes balanced where the recipe says so.

    Where the recipe re-estimates batch norm, as the release does after training, the network is
    complete only after :func:`finish_stage`.

    Args:
        recipe: Where the stage's settings come from.
        stage: One of :data:`STAGES`.
        model: The network, from :func:`make_network` or from an earlier stage.
        crops: What to learn from (:func:`stage_crops`).
        run_dir: Where checkpoint and log go.
        validation: Crops whose loss is logged, and steers ``schedule="plateau"``.
        settings: In place of the recipe's own.
        **options: Further arguments of :func:`deconvnet.training.train`.
    """
    settings = settings or default_settings(recipe, stage)
    learner: nn.Module = CropClassifier(model) if stage == "classify" else model
    if settings.deep_supervision and isinstance(model, DeconvNet) and stage != "classify":
        learner = DeeplySupervised(model)
    train(
        learner,
        crops,
        settings,
        run_dir,
        indices=_indices(recipe, stage, crops, settings),
        validate=None if validation is None else partial(crop_loss, dataset=validation),
        **options,
    )
    return model


def finish_stage(
    recipe: Recipe,
    stage: str,
    model: nn.Module,
    crops: CropDataset | ClassifiedCrops,
    settings: StageConfig | None = None,
    seen: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Re-estimates batch norm after :func:`train_stage`, if the recipe says so.

    Args:
        recipe: How many crops to average over.
        stage: One of :data:`STAGES`.
        model: The network that was trained, changed in place.
        crops: What it learned from.
        settings: In place of the recipe's own.
        seen: How many crops it has learned from; a trial is not averaged over more than that.
        progress: Show a progress bar.
    """
    settings = settings or default_settings(recipe, stage)
    count = recipe.reestimate_crops if seen is None else min(recipe.reestimate_crops, seen)
    if count:
        reestimate_batch_norm(
            model,
            crops,
            count,
            seed=settings.seed,
            indices=_indices(recipe, stage, crops, settings),
            workers=settings.workers,
            progress=progress,
            frozen_blocks=settings.frozen_blocks,
        )
    return model


def _indices(
    recipe: Recipe, stage: str, crops: CropDataset | ClassifiedCrops, settings: StageConfig
) -> Tensor:
    power = recipe.balance if stage in recipe.balanced_stages else 0.0
    return balanced_indices(crops.example_labels, settings.seed, power)


def default_settings(recipe: Recipe, stage: str) -> StageConfig:
    """Returns the solver settings that a recipe has for a stage."""
    _check_stage(stage)
    if stage == "classify":
        if recipe.classify is None:
            raise ValueError("this recipe starts from ImageNet weights; pass vgg16 instead")
        return recipe.classify
    if stage == "fcn" and recipe.fcn_stage is not None:
        return recipe.fcn_stage
    if stage in ("fcn", "whole"):
        return recipe.single or recipe.stage1
    return recipe.stage2 if stage == "2" else recipe.stage1


def facts(recipe_name: str, stage: str, dataset: VOCDataset, seed: int) -> dict[str, object]:
    """What a weights file says of itself: classes, origin, and the settings to use it with."""
    recipe = RECIPES[recipe_name]()
    return {
        "class_names": list(dataset.class_names),
        "class_colours": dataset.colours.tolist(),
        "recipe": recipe_name,
        "stage": stage,
        "seed": seed,
        "settings": {
            "config": asdict(recipe.inference),
            "edge_boxes": asdict(recipe.edge_boxes),
            "crf": asdict(recipe.crf),
        },
    }


def calibration_crops(crops: CropDataset, count: int = 64) -> Tensor:
    """Returns crops spread over the data set, ``uint8 [count, 3, S, S]``."""
    every = max(len(crops) // count, 1)
    return torch.stack([crops[i][0] for i in range(0, len(crops), every)[:count]])


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
