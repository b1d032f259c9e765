"""Classifiers at the decoder's inner sizes: what they see, what they add, what stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from deconvnet import recipes
from deconvnet.activations import decoder_activations
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.supervision import DeeplySupervised, coarse_labels
from deconvnet.training import _Run, freeze_blocks, make_optimizer
from deconvnet.voc import VOCDataset


@pytest.fixture
def network() -> DeconvNet:
    torch.manual_seed(0)
    return DeconvNet(ModelConfig(13, widths=(4, 6, 8, 10, 12), fc_width=16, input_size=64))


RANDOM = torch.Generator().manual_seed(0)
CROPS = torch.randint(0, 256, (3, 3, 64, 64), generator=RANDOM, dtype=torch.uint8)


def test_in_training_every_size_is_scored(network: DeconvNet) -> None:
    scores = DeeplySupervised(network).train()(CROPS)
    assert [tuple(s.shape) for s in scores] == [
        (3, 13, side, side) for side in (64, 1, 2, 4, 8, 16, 32)
    ]


def test_heads_see_what_the_layers_hold(network: DeconvNet) -> None:
    learner = DeeplySupervised(network)
    learner.eval()
    maps = decoder_activations(network, CROPS)
    learner.training = True  # the learner alone, so that batch norm does the same both times
    scores, *coarse = learner(CROPS)
    torch.testing.assert_close(scores, maps["score"])
    last = {"fc7": 1, "fc6-deconv": 2, "deconv5_3": 4, "deconv4_3": 8, "deconv3_3": 16}
    for head, found, name in zip(learner.heads, coarse, last):
        assert found.shape[-1] == last[name]
        torch.testing.assert_close(found, head(maps[name]))


def test_outside_training_it_is_the_network(network: DeconvNet) -> None:
    learner = DeeplySupervised(network).eval()
    with torch.no_grad():
        assert torch.equal(learner(CROPS), network(CROPS))
    assert not network.fc7._forward_hooks


def test_its_encoder_is_frozen_and_slowed_like_any(network: DeconvNet) -> None:
    stage = replace(recipes.compact().stage1, learning_rate=1.0, encoder_rate=0.25)
    learner = DeeplySupervised(network)
    freeze_blocks(learner, 2)
    assert not any(p.requires_grad for p in network.encoder.blocks[:2].parameters())
    rates = {
        parameter: group["rate"]
        for group in make_optimizer(learner, stage).param_groups
        for parameter in group["params"]
    }
    for parameter in network.encoder.blocks[2:].parameters():
        assert rates[parameter] == 0.25
    for part in (network.fc6, network.decoder, learner.heads):
        assert all(rates[parameter] == 1.0 for parameter in part.parameters())


def test_coarse_labels_are_those_of_the_centres() -> None:
    labels = torch.arange(36).view(1, 6, 6)
    assert coarse_labels(labels, 6).tolist() == labels.tolist()
    assert coarse_labels(labels, 3).tolist() == [[[7, 9, 11], [19, 21, 23], [31, 33, 35]]]
    assert coarse_labels(labels, 2).tolist() == [[[7, 10], [25, 28]]]
    assert coarse_labels(labels, 1).tolist() == [[[21]]]


def test_the_loss_adds_each_size_by_its_weight(network: DeconvNet, tmp_path: Path) -> None:
    stage = replace(recipes.tiny().stage1, deep_supervision=0.5)
    run = _Run(DeeplySupervised(network), [0], stage, tmp_path, None, None, "cpu")
    labels = torch.randint(0, 13, (2, 64, 64))
    labels[:, :20] = 255
    fine, coarse = torch.randn(2, 13, 64, 64), torch.randn(2, 13, 4, 4)
    expected = F.cross_entropy(fine, labels, ignore_index=255, reduction="sum")
    assert run.loss(fine, labels) == expected
    small = labels[:, 8::16, 8::16]
    # Each of 16 x 16 pixels' labels stands for 256 of them.
    added = 256 * F.cross_entropy(coarse, small, ignore_index=255, reduction="sum")
    torch.testing.assert_close(run.loss([fine, coarse], labels), expected + 0.5 * added)


def test_a_stage_trains_with_it_and_leaves_a_plain_network(
    shapes_root: Path, tmp_path: Path
) -> None:
    recipe = replace(
        recipes.tiny(), model=replace(ModelConfig.tiny(), widths=(4, 4, 8, 8, 8), fc_width=8)
    )
    dataset = VOCDataset(shapes_root, "val")
    model = recipes.make_network(recipe, "1", 13)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = replace(
        recipe.stage1, iterations=2, batch_size=4, micro_batch=4, deep_supervision=0.3
    )
    crops = recipes.stage_crops(recipe, "1", dataset)
    recipes.train_stage(
        recipe,
        "1",
        model,
        crops,
        tmp_path,
        crops,
        settings,
        device="cpu",
        progress=False,
    )
    assert model.state_dict().keys() == before.keys()
    assert not torch.equal(model.fc7[0].weight, before["fc7.0.weight"])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert any(name.startswith("heads.") for name in saved)  # to be resumed with
