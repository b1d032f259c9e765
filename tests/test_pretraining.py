"""The classifier that gives the other networks their encoder."""

from __future__ import annotations

from dataclasses import replace

import torch

from deconvnet import recipes
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.pretraining import ClassifiedCrops, CropClassifier
from deconvnet.voc import VOCDataset


def small_network() -> DeconvNet:
    torch.manual_seed(0)
    return DeconvNet(ModelConfig(13, widths=(4, 4, 8, 8, 8), fc_width=16, input_size=64))


class Crops:
    """Three crops whose pixels tell which they are."""

    dataset = "the data"
    example_labels = torch.tensor([7, 2, 12])

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key):
        index, draw = key if isinstance(key, tuple) else (key, 0)
        image = torch.full((3, 64, 64), 10 * index + draw, dtype=torch.uint8)
        return image, torch.zeros(64, 64, dtype=torch.uint8)


def test_a_crop_is_labelled_by_its_object():
    crops = ClassifiedCrops(Crops())
    assert len(crops) == 3
    assert crops.dataset == "the data"
    for index, label in enumerate([7, 2, 12]):
        for key in (index, (index, 5)):
            image, target = crops[key]
            assert torch.equal(image, Crops()[key][0])
            assert target.dtype == torch.uint8
            assert target.tolist() == [[label]]


def test_the_classifier_shares_the_networks_first_half_and_nothing_else():
    network = small_network().eval()
    classifier = CropClassifier(network).eval()
    names = dict(network.named_parameters())
    shared = {n for n, p in names.items() if any(p is q for q in classifier.parameters())}
    assert shared == {n for n in names if n.startswith(("encoder.", "fc6.", "fc7."))}

    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    bottleneck = []
    network.fc7.register_forward_hook(lambda *call: bottleneck.append(call[2].clone()))
    network(images)
    torch.testing.assert_close(classifier(images), classifier.classify(bottleneck[0]))
    assert classifier(images).shape == (2, 13, 1, 1)


def test_training_it_changes_the_encoder_and_leaves_the_decoder(tmp_path, shapes_root):
    recipe, shapes = recipes.tiny(), VOCDataset(shapes_root)
    torch.manual_seed(0)
    model = recipes.make_network(recipe, "classify", shapes.num_classes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    crops = recipes.stage_crops(recipe, "classify", shapes)
    settings = replace(
        recipe.classify, iterations=2, batch_size=4, micro_batch=4, precision="float32"
    )
    recipes.train_stage(
        recipe,
        "classify",
        model,
        crops,
        tmp_path,
        settings=settings,
        device="cpu",
        progress=False,
    )
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert any(name.startswith("encoder.") for name in changed)
    assert not any(name.startswith(("decoder.", "fc6_deconv.", "score.")) for name in changed)


def test_the_others_start_from_it():
    recipe = recipes.tiny()
    torch.manual_seed(0)
    start = recipes.make_network(recipe, "classify", 13)
    torch.manual_seed(1)
    stage1 = recipes.make_network(recipe, "1", 13, start=start)
    fcn = recipes.make_network(recipe, "fcn", 13, start=start)
    for name, value in start.state_dict().items():
        assert torch.equal(stage1.state_dict()[name], value)
        if name.startswith("encoder."):
            assert torch.equal(fcn.state_dict()[name], value)
