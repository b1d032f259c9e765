"""The rewritten network computes what the plain one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deconvnet.deployment import as_convolution, prepare_for_inference
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.model import DeconvNet, ModelConfig


def lively(model: nn.Module) -> nn.Module:
    """Gives batch norm statistics, and deconvolutions weights, that are not those of a start."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, nn.ConvTranspose2d):
            fan_in = module.weight[:, 0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return model.eval()


def images(size: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.tiny(5),
        ModelConfig(5, (4, 6, 8, 8, 10), fc_width=16, input_size=96),
        ModelConfig(5, (4, 6, 8, 8, 10), fc_width=16, input_size=32, batch_norm=False),
        ModelConfig(5, (4, 6, 8, 8, 10), fc_width=16, input_size=64, use_switches=False),
    ],
)
def test_deconvnet_is_equal_but_for_rounding(config: ModelConfig) -> None:
    model = lively(DeconvNet(config))
    crops = images(config.input_size)
    with torch.no_grad():
        expected = model(crops)
        scores = prepare_for_inference(model)(crops)
    assert expected.std() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_fcn_is_equal_but_for_rounding() -> None:
    model = lively(FCN8s(FCNConfig.tiny(5)))
    for score in (model.score32, model.score16, model.score8):
        nn.init.normal_(score.weight, std=0.1)
    with torch.no_grad():
        expected = model(images(70))
        scores = prepare_for_inference(model)(images(70))
    assert expected.std() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_no_batch_norm_and_no_deconvolution_is_left() -> None:
    fast = prepare_for_inference(lively(DeconvNet(ModelConfig.tiny(5))))
    kinds = {type(module) for module in fast.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.ConvTranspose2d}
    assert not any(p.requires_grad for p in fast.parameters())


def test_the_original_is_left_alone() -> None:
    model = lively(DeconvNet(ModelConfig.tiny(5))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_for_inference(model, torch.bfloat16)
    after = model.state_dict()
    assert model.training
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())


def test_bfloat16_gives_nearly_the_same_labels() -> None:
    from deconvnet.shapes import ShapesConfig, make_scene
    from deconvnet.weights import load_model, pretrained

    model = load_model(pretrained("shapes-deconvnet"))
    scenes = [make_scene(ShapesConfig(), seed).image for seed in range(4)]
    crops = torch.stack([scene[:, :64, :64] for scene in scenes])
    with torch.no_grad():
        expected = model(crops).argmax(1)
        scores = prepare_for_inference(model, torch.bfloat16)(crops)
    assert scores.dtype == torch.bfloat16
    assert (scores.argmax(1) == expected).float().mean() > 0.97


def test_a_dtype_that_is_not_floating_is_refused() -> None:
    with pytest.raises(TypeError, match="dtype must be floating"):
        prepare_for_inference(DeconvNet(ModelConfig.tiny(5)), torch.int8)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (5, 1)])
def test_as_convolution(kernel: int, padding: int) -> None:
    deconvolution = nn.ConvTranspose2d(3, 5, kernel, padding=padding)
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(as_convolution(deconvolution)(x), deconvolution(x))


@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 3}, {"dilation": 2}])
def test_as_convolution_refuses_what_it_cannot_turn(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="only a deconvolution of stride 1"):
        as_convolution(nn.ConvTranspose2d(3, 3, 3, **options))
