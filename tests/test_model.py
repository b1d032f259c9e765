"""The network layer for layer, and its forward pass against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deconvnet.model import (
    DeconvNet,
    ModelConfig,
    PixelNormalisation,
    deconvnet_tiny,
    deconvnet_vgg16,
)

# The table of stage_1_train.prototxt: what each layer returns for a 224 x 224 crop.
LAYERS = [
    *[("Conv2d", 64, 224)] * 2,
    ("pool", 64, 112),
    *[("Conv2d", 128, 112)] * 2,
    ("pool", 128, 56),
    *[("Conv2d", 256, 56)] * 3,
    ("pool", 256, 28),
    *[("Conv2d", 512, 28)] * 3,
    ("pool", 512, 14),
    *[("Conv2d", 512, 14)] * 3,
    ("pool", 512, 7),
    ("Conv2d", 4096, 1),  # fc6
    ("Conv2d", 4096, 1),  # fc7
    ("ConvTranspose2d", 512, 7),  # fc6-deconv
    ("unpool", 512, 14),
    *[("ConvTranspose2d", 512, 14)] * 3,
    ("unpool", 512, 28),
    *[("ConvTranspose2d", 512, 28)] * 2,
    ("ConvTranspose2d", 256, 28),
    ("unpool", 256, 56),
    *[("ConvTranspose2d", 256, 56)] * 2,
    ("ConvTranspose2d", 128, 56),
    ("unpool", 128, 112),
    ("ConvTranspose2d", 128, 112),
    ("ConvTranspose2d", 64, 112),
    ("unpool", 64, 224),
    *[("ConvTranspose2d", 64, 224)] * 2,
    ("Conv2d", 21, 224),  # score
]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def paper() -> DeconvNet:
    """The full network without its gigabyte of memory."""
    with torch.device("meta"):
        return deconvnet_vgg16().eval()


@pytest.fixture
def tiny() -> DeconvNet:
    return lively(deconvnet_tiny(num_classes=5)).eval()


def lively(model: nn.Module) -> nn.Module:
    """Fresh networks return almost nothing; give every tensor values that a mistake would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                taps = module.weight[0, 0].numel()
                fan = taps * module.in_channels
                module.weight.normal_(0, (2 / fan) ** 0.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def crops(number: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)


def plain_forward(model: DeconvNet, images: torch.Tensor) -> torch.Tensor:
    """The forward pass again, from the weights alone, with PyTorch's own pooling."""

    def layer(block, x, padding=1):
        convolution, *norm, _ = block
        up = isinstance(convolution, nn.ConvTranspose2d)
        function = F.conv_transpose2d if up else F.conv2d
        x = function(x, convolution.weight, convolution.bias, padding=padding)
        if norm:
            (n,) = norm
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)
        return x.clamp(min=0)

    pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (images.float() / 255 - mean) / std
    indices = []
    for block in model.encoder.blocks:
        for convolution in block:
            x = layer(convolution, x)
        x, where = pool(x)
        indices.append(where)
    for block in (model.fc6, model.fc7, model.fc6_deconv):
        x = layer(block, x, padding=0)
    for block in model.decoder.blocks:
        where = indices.pop()
        if model.config.use_switches:
            x = unpool(x, where)
        else:
            corner = torch.zeros(2, 2)
            corner[0, 0] = 1
            x = torch.kron(x, corner)
        for deconvolution in block:
            x = layer(deconvolution, x)
    return F.conv2d(x, model.score.weight, model.score.bias)


def test_every_layer_of_the_paper_s_table(paper):
    seen = []

    def note(kind):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            assert output.shape[-2] == output.shape[-1]
            seen.append((kind, output.shape[1], output.shape[-1]))

        return hook

    handles = [
        module.register_forward_hook(note(type(module).__name__))
        for module in paper.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    handles.append(paper.encoder.pool.register_forward_hook(note("pool")))
    handles.append(paper.decoder.unpool.register_forward_hook(note("unpool")))
    scores = paper(torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"))
    for handle in handles:
        handle.remove()
    assert scores.shape == (1, 21, 224, 224)
    assert seen == LAYERS


def test_kernels_strides_and_what_follows_each_convolution(paper):
    convolutions = {
        name: module
        for name, module in paper.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert len(convolutions) == 13 + 3 + 13 + 1
    for name, module in convolutions.items():
        side, padding = {"fc6": (7, 0), "fc6_deconv": (7, 0), "fc7": (1, 0), "score": (1, 0)}.get(
            name.split(".")[0], (3, 1)
        )
        assert module.kernel_size == (side, side), name
        assert module.padding == (padding, padding), name
        assert module.stride == module.dilation == (1, 1), name
        assert module.bias is not None, name
        if name != "score":
            block = paper.get_submodule(name.rpartition(".")[0])
            assert [type(part) for part in block] == [type(module), nn.BatchNorm2d, nn.ReLU], name
    assert sum(isinstance(module, nn.BatchNorm2d) for module in paper.modules()) == 29


def test_parameters_by_part(paper):
    assert count(paper) == 251_805_653
    millions = {
        "encoder": 14.7, "fc6": 102.8, "fc7": 16.8, "fc6_deconv": 102.8, "decoder": 14.8,
    }  # fmt: skip
    for name, expected in millions.items():
        assert round(count(paper.get_submodule(name)) / 1e6, 1) == expected, name
    assert count(paper.score) == 64 * 21 + 21


def test_operations_a_crop(paper):
    with FlopCounterMode(display=False) as counter:
        paper(torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(65.5, abs=0.1)


def test_tiny_and_compact_are_the_same_class():
    with torch.device("meta"):
        tiny, compact = deconvnet_tiny(), DeconvNet(ModelConfig.compact())
        paper = deconvnet_vgg16(num_classes=3)
    assert type(tiny) is type(compact) is type(paper) is DeconvNet
    assert tiny.config.num_classes == tiny.score.out_channels == 13
    assert paper.score.out_channels == 3
    assert {name for name, _ in tiny.named_modules()} < {name for name, _ in paper.named_modules()}
    shapes = {name: p.shape for name, p in paper.encoder.named_parameters()}
    assert shapes == {name: p.shape for name, p in compact.encoder.named_parameters()}


@pytest.mark.parametrize("use_switches", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_forward_equals_plain_pytorch(use_switches, batch_norm):
    config = ModelConfig(
        num_classes=4, widths=(8, 12, 16, 24, 32), fc_width=40, input_size=96,
        use_switches=use_switches, batch_norm=batch_norm,
    )  # fmt: skip
    model = lively(DeconvNet(config)).eval()
    images = crops(2, 96)
    with torch.no_grad():
        scores = model(images)
        expected = plain_forward(model, images)
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_switches_matter_and_cost_no_parameters(tiny):
    config = ModelConfig(**{**vars(tiny.config), "use_switches": False})
    without = DeconvNet(config).eval()
    without.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        difference = (tiny(crops(1)) - without(crops(1))).abs().max()
    assert difference > 0.01
    assert count(without) == count(tiny)


def test_without_batch_norm_nothing_else_changes():
    with torch.device("meta"):
        model = DeconvNet(ModelConfig(batch_norm=False))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    channels = sum(c for kind, c, _ in LAYERS if "Conv" in kind) - 21
    assert count(model) == 251_805_653 - 2 * channels


@settings(max_examples=10, deadline=None)
@given(
    widths=st.tuples(*[st.integers(1, 9)] * 5),
    encoder_depths=st.tuples(*[st.integers(1, 3)] * 5),
    decoder_depths=st.tuples(*[st.integers(1, 3)] * 5),
    fc_width=st.integers(1, 9),
    strides=st.integers(1, 4),
    num_classes=st.integers(2, 7),
    number=st.integers(1, 3),
)
def test_any_sizes_give_a_score_for_every_pixel(strides, number, **sizes):
    config = ModelConfig(input_size=32 * strides, **sizes)
    with torch.device("meta"):
        model = DeconvNet(config).eval()
        scores = model(torch.zeros(number, 3, config.input_size, config.input_size))
    assert scores.shape == (number, config.num_classes, config.input_size, config.input_size)


def test_a_crop_s_scores_do_not_depend_on_its_batch(tiny):
    images = crops(3)
    with torch.no_grad():
        together = tiny(images)
        alone = torch.cat([tiny(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bytes_and_floats_are_the_same_image(tiny, dtype):
    images = crops(1)  # 0 to 255 are exact in every type
    with torch.no_grad():
        torch.testing.assert_close(tiny(images.to(dtype)), tiny(images), rtol=0, atol=0)


def test_pixel_normalisation_is_torchvision_s():
    from torchvision.transforms.functional import normalize

    config = ModelConfig()
    images = crops(2, 8)
    expected = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    result = PixelNormalisation(config.pixel_mean, config.pixel_std)(images)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not DeconvNet(ModelConfig.tiny()).normalise.state_dict()


def test_gradients_reach_every_parameter(tiny):
    tiny.train()
    labels = torch.randint(0, 5, (3, 64, 64), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(tiny(crops(3)), labels).backward()
    for name, parameter in tiny.named_parameters():
        if not (name.endswith(".0.bias") and "score" not in name):  # batch norm takes bias away
            assert parameter.grad.abs().max() > 0, name


def test_training_statistics_move_and_evaluation_statistics_do_not(tiny):
    before = tiny.fc6[1].running_mean.clone()
    tiny(crops(2))
    torch.testing.assert_close(tiny.fc6[1].running_mean, before, rtol=0, atol=0)
    tiny.train()(crops(2))
    assert not torch.equal(tiny.fc6[1].running_mean, before)


def test_initialisation_is_the_release_s():
    torch.manual_seed(0)
    model = deconvnet_tiny()
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)
            assert module.weight.mean().abs() < 0.001
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == torch.tensor(0.001)).all()
    # He's rule: the variance of what a convolution returns is twice its input's, halved by ReLU.
    weight = model.fc6[0].weight
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.05)


def test_a_crop_of_another_size_is_told_what_to_do(tiny):
    for shape in [(1, 3, 64, 96), (1, 3, 32, 32), (3, 64, 64), (1, 1, 64, 64), (1, 4, 64, 64)]:
        with pytest.raises(ValueError, match=r"\[N, 3, 64, 64\].*Predictor"):
            tiny(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.complex64])
def test_images_of_another_type(tiny, dtype):
    with pytest.raises(TypeError, match=f"uint8 or floating, got {dtype}"):
        tiny(torch.zeros(1, 3, 64, 64).to(dtype))


def test_images_that_are_no_tensor(tiny):
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        tiny(crops(1).numpy())


def test_normalisation_wants_rgb():
    normalise = PixelNormalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        normalise(torch.zeros(1, 1, 8, 8))


def test_a_training_batch_of_one(tiny):
    tiny.train()
    with pytest.raises(ValueError, match="at least 2 crops; got 1"):
        tiny(crops(1))
    without = DeconvNet(ModelConfig(**{**vars(tiny.config), "batch_norm": False})).train()
    assert without(crops(1)).shape == (1, 5, 64, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 100}, "multiple of 32, got 100; the nearest is 96"),
        ({"input_size": 0}, "the nearest is 32"),
        ({"input_size": -64}, "the nearest is 32"),
        ({"widths": (8, 8, 8, 8)}, "five entries"),
        ({"encoder_depths": (1,) * 6}, "five entries"),
        ({"decoder_depths": (1,) * 4}, "five entries"),
        ({"widths": (8, 8, 0, 8, 8)}, "at least 1"),
        ({"decoder_depths": (1, 0, 1, 1, 1)}, "at least 1"),
        ({"fc_width": 0}, "at least 1"),
        ({"num_classes": 1}, "background, so at least 2; got 1"),
    ],
)
def test_sizes_that_make_no_network(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
