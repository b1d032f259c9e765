"""The decoder's maps: the network's own, with its switches or without."""

from __future__ import annotations

import pytest
import torch

from deconvnet.activations import decoder_activations, strongest_channels
from deconvnet.model import DeconvNet, ModelConfig, deconvnet_tiny


@pytest.fixture(scope="module")
def model() -> DeconvNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return deconvnet_tiny().eval()


@pytest.fixture
def crops() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def test_the_last_map_is_what_the_network_returns(model, crops):
    assert torch.equal(decoder_activations(model, crops)["score"], model(crops))


def test_maps_grow_from_a_point_to_the_crop(model, crops):
    maps = decoder_activations(model, crops)
    assert [m.shape[2:].numel() for m in maps.values()] == sorted(
        m.shape[2:].numel() for m in maps.values()
    )
    assert maps["fc7"].shape == (2, 256, 1, 1)
    assert maps["fc6-deconv"].shape == (2, 128, 2, 2)
    assert list(maps)[2:8] == [
        "unpool5", "deconv5_1", "deconv5_2", "unpool4", "deconv4_1", "deconv4_2",
    ]  # fmt: skip
    assert len(maps) == 2 + 5 + 8 + 1


def test_the_papers_layers_have_the_releases_names():
    config = ModelConfig(widths=(2, 2, 2, 2, 2), fc_width=2, input_size=32)
    maps = decoder_activations(DeconvNet(config).eval(), torch.zeros(1, 3, 32, 32))
    deconvolutions = [name for name in maps if name.startswith("deconv")]
    assert deconvolutions == [
        "deconv5_1", "deconv5_2", "deconv5_3", "deconv4_1", "deconv4_2", "deconv4_3",
        "deconv3_1", "deconv3_2", "deconv3_3", "deconv2_1", "deconv2_2", "deconv1_1", "deconv1_2",
    ]  # fmt: skip


def test_without_switches_all_goes_to_the_upper_left(model, crops):
    maps = decoder_activations(model, crops, use_switches=False)
    for level in range(5, 0, -1):
        unpooled = maps[f"unpool{level}"].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        assert not unpooled[..., 1:].any()
    before = decoder_activations(model, crops, use_switches=True)
    assert torch.equal(maps["fc6-deconv"], before["fc6-deconv"])
    assert not torch.equal(maps["score"], before["score"])


@torch.no_grad()
def test_by_default_the_network_is_used_as_it_was_trained(crops):
    config = ModelConfig(**{**vars(ModelConfig.tiny()), "use_switches": False})
    model = DeconvNet(config).eval()
    assert torch.equal(decoder_activations(model, crops)["score"], model(crops))


def test_the_strongest_channels_come_first():
    maps = torch.tensor([1.0, 5, 0, 3])[:, None, None].expand(4, 2, 2)
    assert strongest_channels(maps, 2) == [1, 3]
    assert strongest_channels(maps, 9) == [1, 3, 0, 2]


def test_bad_input_is_named(crops):
    with pytest.raises(ValueError, match="training mode"):
        decoder_activations(deconvnet_tiny(), crops)
    with pytest.raises(ValueError, match=r"crops must be \[N, 3, 64, 64\], got \[3, 64, 64\]"):
        decoder_activations(deconvnet_tiny().eval(), crops[0])
