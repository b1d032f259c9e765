"""FCN-8s: any size, its symmetry, its start, and its sum against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deconvnet.fcn import FCN8s, FCNConfig, bilinear_kernel
from deconvnet.model import ModelConfig


def lively(model: FCN8s) -> FCN8s:
    """Fresh score layers return zeros, which would agree with anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for score in (model.score32, model.score16, model.score8):
            score.weight.normal_(0, 0.3, generator=generator)
            score.bias.normal_(0, 0.1, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def tiny() -> FCN8s:
    torch.manual_seed(0)
    return lively(FCN8s(FCNConfig.tiny(num_classes=4))).eval()


def picture(height: int, width: int, seed: int = 0, number: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (number, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=15)
@given(height=st.integers(1, 100), width=st.integers(1, 100), number=st.integers(1, 2))
def test_any_size_is_the_padded_image_s_scores(tiny, height, width, number):
    images = picture(height, width, number=number)
    tall, wide = -(-height // 32) * 32, -(-width // 32) * 32
    padded = torch.tensor(tiny.config.pixel_mean).view(1, 3, 1, 1).repeat(number, 1, tall, wide)
    padded[..., :height, :width] = images
    with torch.no_grad():
        scores, whole = tiny(images), tiny(padded)
    assert scores.shape == (number, 4, height, width)
    assert whole.shape == (number, 4, tall, wide)
    torch.testing.assert_close(scores, whole[..., :height, :width], rtol=1e-4, atol=1e-4)


def test_the_three_scales_add_up_as_in_plain_pytorch(tiny):
    images = picture(96, 64)

    def layer(block, x, padding):
        convolution, norm, _ = block
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=padding)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    def score(convolution, x):
        return F.conv2d(x, convolution.weight, convolution.bias)

    with torch.no_grad():
        x = (images - torch.tensor(tiny.config.pixel_mean).view(3, 1, 1)) / torch.tensor(
            tiny.config.pixel_std
        ).view(3, 1, 1)
        maps = []
        for block in tiny.encoder.blocks:
            for convolution in block:
                x = layer(convolution, x, 1)
            x = F.max_pool2d(x, 2)
            maps.append(x)
        x = layer(tiny.fc7, layer(tiny.fc6, x, 1), 0)
        x = F.conv_transpose2d(score(tiny.score32, x), bilinear_kernel(4, 4), stride=2, padding=1)
        x = x + score(tiny.score16, maps[3])
        x = F.conv_transpose2d(x, bilinear_kernel(4, 4), stride=2, padding=1)
        x = x + score(tiny.score8, maps[2])
        expected = F.interpolate(x, size=(96, 64), mode="bilinear", align_corners=False)
        scores = tiny(images)
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_shift_by_one_stride_shifts_the_scores(tiny):
    # Half the receptive field of fc6 is 138 px and upsampling reaches two more strides.
    margin, scene = 7 * 32, picture(32, 20 * 32)
    inner = slice(margin, 19 * 32 - margin)
    with torch.no_grad():
        left, right = tiny(scene[..., :-32]), tiny(scene[..., 32:])
        half = tiny(scene[..., 16:-16])
    shifted = left[..., margin + 32 : 19 * 32 - margin + 32]
    torch.testing.assert_close(right[..., inner], shifted, rtol=1e-4, atol=1e-4)
    # The symmetry is that of the stride: half of it is another sampling of the same scene.
    moved = left[..., margin + 16 : 19 * 32 - margin + 16]
    assert (half[..., inner] - moved).abs().max() > 0.01


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bilinear_kernel_is_interpolation_away_from_the_border(factor):
    x = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    kernel = bilinear_kernel(3, 2 * factor)
    result = F.conv_transpose2d(x, kernel, stride=factor, padding=factor // 2)
    expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    assert result.shape == expected.shape
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    torch.testing.assert_close(result[inner], expected[inner])


def test_a_fresh_network_has_no_opinion_and_can_learn_one():
    torch.manual_seed(0)
    model = FCN8s(FCNConfig.tiny(num_classes=4))
    scores = model(picture(64, 64, number=2))
    assert (scores == 0).all()
    labels = torch.ones(2, 64, 64, dtype=torch.int64)
    F.cross_entropy(scores, labels).backward()
    for score in (model.score32, model.score16, model.score8):
        assert score.weight.grad.abs().max() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert F.cross_entropy(model(picture(64, 64, number=2)), labels) < torch.tensor(4.0).log()


def test_the_published_network_has_vgg_16_s_shapes():
    with torch.device("meta"):
        model = FCN8s()
        scores = model.eval()(torch.zeros(1, 3, 100, 150))
    assert scores.shape == (1, 21, 100, 150)
    assert model.config.widths == ModelConfig().widths
    assert model.fc6[0].weight.shape == (4096, 512, 7, 7)
    assert model.fc7[0].weight.shape == (4096, 4096, 1, 1)
    assert sum(isinstance(module, nn.Conv2d) for module in model.encoder.modules()) == 13
    assert [s.in_channels for s in (model.score32, model.score16, model.score8)] == [4096, 512, 256]


def test_without_batch_norm_a_single_stride_trains():
    config = FCNConfig(**{**vars(FCNConfig.tiny()), "batch_norm": False})
    model = FCN8s(config).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(picture(32, 32)).shape == (1, 13, 32, 32)


def test_partners_share_their_encoder():
    for name in ("tiny", "compact"):
        fcn, deconvnet = getattr(FCNConfig, name)(), getattr(ModelConfig, name)()
        assert fcn.widths == deconvnet.widths
        assert fcn.encoder_depths == deconvnet.encoder_depths
        assert fcn.num_classes == deconvnet.num_classes


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64)])
def test_images_of_another_shape(tiny, shape):
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        tiny(torch.zeros(shape))


def test_images_of_another_type(tiny):
    with pytest.raises(TypeError, match="uint8 or floating, got torch.int64"):
        tiny(picture(64, 64).long())
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        tiny(picture(64, 64).numpy())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fc_kernel": 4}, "odd, got 4"),
        ({"num_classes": 1}, "at least 2; got 1"),
        ({"widths": (8, 8, 8, 8)}, "five entries"),
        ({"encoder_depths": (1,) * 6}, "five entries"),
        ({"widths": (8, 8, 8, 8, 0)}, "at least 1"),
        ({"fc_width": 0}, "at least 1"),
    ],
)
def test_sizes_that_make_no_network(fields, message):
    with pytest.raises(ValueError, match=message):
        FCNConfig(**fields)
