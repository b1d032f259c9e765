"""The rewritten network computes what the plain one does."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from deconvnet import deployment, hardware, winograd
from deconvnet.deployment import (
    ConvolutionOfAll,
    DeconvolutionToAll,
    as_convolution,
    crops_at_once,
    library_pool,
    library_unpool,
    matrix_products,
    prepare_for_inference,
)
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.supervision import DeeplySupervised
from deconvnet.unpooling import max_pool2d_with_switches, unpool2d


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
    # In float64 (but for the pixels, in float32), where hardly ever rounding moves a switch.
    model = lively(DeconvNet(config)).double()
    crops = images(config.input_size)
    with torch.no_grad():
        expected = model(crops)
        scores = prepare_for_inference(model, torch.float64)(crops)
    assert expected.std() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6 * float(expected.std()))


def test_deconvnet_gives_the_same_labels_in_float32() -> None:
    model = lively(DeconvNet(ModelConfig.tiny(5)))
    crops = images(64)
    with torch.no_grad():
        expected = model(crops)
        scores = prepare_for_inference(model)(crops)
    close = torch.isclose(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    # A switch between two nearly equal values may move, and with it what is drawn around it.
    assert close.float().mean() > 0.7
    assert (scores.argmax(1) == expected.argmax(1)).float().mean() > 0.99


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other libraries may round by layout"
)
@pytest.mark.parametrize("rules", [3, 4, 6])
def test_the_same_switches_on_request(rules: int) -> None:
    """Then scores differ by rounding alone; without, some value lands one pixel away."""
    model = lively(DeconvNet(ModelConfig(5, (64, 64, 16, 16, 16), fc_width=32)))
    crops = images(224, 2)

    def moved(dtype: torch.dtype, same_switches: bool) -> int:
        fast = prepare_for_inference(model, dtype, rules=rules, same_switches=same_switches)
        _, found = fast.encoder(fast.normalise(crops))
        return sum(int((a != b).sum()) for a, b in zip(switches, found))

    with torch.no_grad():
        expected = model(crops)
        _, switches = model.encoder(model.normalise(crops))
        scores = prepare_for_inference(model, rules=rules, same_switches=True)(crops)
        assert moved(torch.float32, True) == moved(torch.bfloat16, True) == 0
        if rules == 6:
            assert moved(torch.float32, False) > 0
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_the_same_switches_of_a_network_in_another_precision() -> None:
    model = lively(DeconvNet(ModelConfig.tiny(5))).double()
    crops = images(64, 25)
    fast = prepare_for_inference(model, same_switches=True)
    with torch.no_grad():
        _, switches = model.encoder(model.normalise(crops))
        pooled, found = fast.encoder(fast.normalise(crops))
        assert torch.equal(fast.normalise(crops), model.normalise(crops))
    assert pooled[-1].dtype == torch.float64
    assert all(map(torch.equal, switches, found))


def test_the_same_switches_need_the_same_precision() -> None:
    model = DeconvNet(ModelConfig.tiny(5))
    with pytest.raises(ValueError, match="encoder_dtype must be torch.float32, got torch.bf"):
        prepare_for_inference(model, encoder_dtype=torch.bfloat16, same_switches=True)
    fcn = prepare_for_inference(FCN8s(FCNConfig.tiny(5)), torch.bfloat16, same_switches=True)
    assert next(fcn.parameters()).dtype == torch.bfloat16  # it has no switches to keep


def test_where_all_is_of_one_colour_the_first_place_wins() -> None:
    """As in the plain network, although Winograd's sums round equal values by their place."""
    if hardware.compiled_kernels() is None:
        pytest.skip("needs Numba")
    model = lively(DeconvNet(ModelConfig(5, (64, 64, 8, 8, 8), (2, 2, 1, 1, 1), fc_width=16)))
    crops = torch.full((1, 3, 224, 224), 117, dtype=torch.uint8)
    with torch.no_grad():
        _, expected = model.encoder(model.normalise(crops))
        fast = prepare_for_inference(model)
        _, switches = fast.encoder(fast.normalise(crops))
    assert any(isinstance(m, winograd.WinogradConvolution) for m in fast.encoder.modules())
    inside = (..., slice(4, -4), slice(4, -4))  # the border sees zeros
    assert not expected[0][inside].any()
    assert not switches[0][inside].any()


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
    assert scores.dtype == torch.float32  # what chooses labels keeps its bits
    assert (scores.argmax(1) == expected).float().mean() > 0.995


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


@pytest.mark.parametrize("channels_last", [True, False])
def test_matrix_products_learn_as_the_convolutions_do(channels_last: bool) -> None:
    """Scores and gradients; afterwards the layers are what they were."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = lively(DeconvNet(ModelConfig.tiny(5))).double().train().to(memory_format=layout)
    crops = images(64, count=3)

    def learn() -> list[torch.Tensor]:
        model.zero_grad()
        scores = model(crops)
        scores.square().mean().backward()
        parts = (model.fc6, model.fc7, model.fc6_deconv)
        return [scores, *(p.grad for part in parts for p in part[0].parameters())]

    before, names = learn(), list(model.state_dict())
    with matrix_products(DeeplySupervised(model)):  # finds the network in what surrounds it
        kinds = [type(part[0]) for part in (model.fc6, model.fc7, model.fc6_deconv)]
        assert kinds == [ConvolutionOfAll, ConvolutionOfAll, DeconvolutionToAll]
        assert list(model.state_dict()) == names
        for actual, expected in zip(learn(), before, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        # a copy made meanwhile has its own weights
        fast = prepare_for_inference(model, torch.float64)
    kinds = [type(part[0]) for part in (model.fc6, model.fc7, model.fc6_deconv)]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d]
    with torch.no_grad():
        expected = model.eval()(crops)
        model.fc6[0].weight.zero_()
        torch.testing.assert_close(fast(crops), expected, rtol=1e-6, atol=1e-6)


def test_matrix_products_keep_to_autocasts_precision() -> None:
    model = DeconvNet(ModelConfig.tiny(5)).eval()
    with torch.autocast("cpu", torch.bfloat16), matrix_products(model):
        assert model.fc6_deconv[0](torch.randn(2, 256, 1, 1)).dtype == torch.bfloat16


def test_any_other_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 2))
    with matrix_products(network):
        assert type(network[0]) is nn.Conv2d


def test_layers_with_a_forward_pass_of_their_own_stay_as_they_are() -> None:
    model = DeconvNet(ModelConfig.tiny(5))
    nn.utils.parametrizations.weight_norm(model.fc6[0])
    kind, twin = type(model.fc6[0]), DeconvNet(ModelConfig.tiny(5))
    twin.fc7 = model.fc7  # in two networks, and changed back once
    both = nn.ModuleList([model, twin])
    with matrix_products(both), matrix_products(both):
        assert type(model.fc6[0]) is kind
        assert type(model.fc7[0]) is ConvolutionOfAll
        model.eval()(images(64))
    assert type(model.fc7[0]) is nn.Conv2d
    assert type(model.fc6_deconv[0]) is nn.ConvTranspose2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rules_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for Winograd, too large for a cache that is as small as this."""
    monkeypatch.setattr(winograd, "cpu_has_matrix_units", lambda: False)  # which do without
    for module in (deployment, winograd):
        monkeypatch.setattr(module, "CACHE_BYTES", 2**20)
    config = ModelConfig(5, (64, 128, 256, 256, 256), fc_width=64, input_size=64)
    model = lively(DeconvNet(config))
    fast = prepare_for_inference(model, dtype)
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(winograd.WinogradConvolution) > 4
    crops = images(64, count=5)
    with torch.no_grad():
        expected, scores = model(crops), fast(crops).float()
        one_by_one = torch.cat([fast(crop[None]).float() for crop in crops])
    error = (scores - expected).square().mean().sqrt() / expected.std()
    # a switch that rounding moves weighs more than the rounding
    assert error < (1e-2 if dtype == torch.float32 else 0.3)
    assert (one_by_one - scores).square().mean().sqrt() < error + 1e-5


def test_scores_lie_plane_by_plane_on_a_cpu() -> None:
    """As they are pasted, so that nothing has to bring them into that order."""
    model = lively(DeconvNet(ModelConfig.tiny(5)))
    crops = images(64, count=3)
    scores = prepare_for_inference(model)(crops)
    assert scores.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(scores, model(crops), rtol=1e-3, atol=1e-4)


def test_another_score_layer_stays_as_it_is() -> None:
    model = lively(DeconvNet(ModelConfig.tiny(5)))
    model.score = nn.Conv2d(model.score.in_channels, 5, 3, padding=1)
    crops = images(64)
    with torch.no_grad():
        scores = prepare_for_inference(model)(crops)
        torch.testing.assert_close(scores, model(crops), rtol=1e-3, atol=1e-3)


def test_maps_fit_the_cache() -> None:
    widths = ModelConfig().widths
    assert crops_at_once(widths, 224, torch.float32) == [1, 2, 5, 10, 41]
    assert crops_at_once(widths, 224, torch.bfloat16) == [2, 5, 10, 20, 83]
    assert crops_at_once((10**6,), 224, torch.float32) == [1]


def test_a_prepared_network_is_not_prepared_again() -> None:
    fast = prepare_for_inference(DeconvNet(ModelConfig.tiny(5)))
    with pytest.raises(ValueError, match="prepared already"):
        prepare_for_inference(fast)


@pytest.mark.parametrize("rules", [2, 7])
def test_there_are_no_other_rules(rules: int) -> None:
    with pytest.raises(ValueError, match=f"rules must be 3, 4, 5 or 6, got {rules}"):
        prepare_for_inference(DeconvNet(ModelConfig.tiny(5)), rules=rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 2), (8, 12), (7, 10), (4, 256), (6, 512)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_librarys_pooling_gives_the_same_switches(
    dtype: torch.dtype, size: tuple[int, int], deterministic: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 5, *size), generator=generator).to(dtype)  # many are equal
    x[0, 0, 0, 0] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last)
    pooled, switches = library_pool(x)
    for actual, expected in zip((pooled, switches), max_pool2d_with_switches(x)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        unpooled = library_unpool(pooled, switches)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(unpooled, unpool2d(pooled, switches), rtol=0, atol=0, equal_nan=True)
