"""VGG-16 into the encoder against torchvision's own forward pass, and models to and from files."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretended_gpu import pretended_gpu
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.models import densenet121, mobilenet_v2, vgg11, vgg16, vgg16_bn, vgg19
from torchvision.models.vgg import make_layers

from deconvnet import weights
from deconvnet.deployment import prepare_for_inference
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.model import DeconvNet, ModelConfig, deconvnet_tiny
from deconvnet.weights import (
    calibrate_batch_norm,
    dequantise,
    load_model,
    load_vgg16,
    pretrained,
    quantise,
    save_model,
)

WIDTHS = (8, 12, 16, 20, 24)
FC = 32


class NarrowVGG(nn.Module):
    """torchvision's VGG-16 with fewer channels: the same layers under the same names."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        depths = (2, 2, 3, 3, 3)
        plan = [v for w, d in zip(WIDTHS, depths) for v in (*[w] * d, "M")]
        self.features = make_layers(plan, batch_norm=batch_norm)
        self.classifier = nn.Sequential(
            nn.Linear(WIDTHS[-1] * 7 * 7, FC), nn.ReLU(), nn.Dropout(),
            nn.Linear(FC, FC), nn.ReLU(), nn.Dropout(), nn.Linear(FC, 10),
        )  # fmt: skip
        enliven(self)


def enliven(model: nn.Module) -> None:
    """Weights that keep the signal's size, and batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-0.1, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.3, 0.3, generator=generator)
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU, or one that is pretended."""
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        with pretended_gpu() as device:
            yield device


def narrow(**fields) -> DeconvNet:
    return DeconvNet(ModelConfig(**{"widths": WIDTHS, "fc_width": FC, "num_classes": 3, **fields}))


def crops(number: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)


def encode(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().encoder(model.normalise(images))[0][-1]


def features(vgg: nn.Module, images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        return vgg.eval().features((images / 255 - mean) / std)


@pytest.fixture
def plain() -> dict[str, torch.Tensor]:
    """Plain VGG-16's convolutions alone, as some files carry them."""
    state = NarrowVGG(batch_norm=False).state_dict()
    return {key: value for key, value in state.items() if key.startswith("features.")}


# ---------------------------------------------------------------------------- VGG-16


def test_fc6_and_fc7_are_torchvision_s_classifier_at_full_width():
    with torch.device("meta"):
        vgg = vgg16(weights=None).eval()
        model = DeconvNet(ModelConfig(batch_norm=False)).eval()
    vgg.to_empty(device="cpu")
    enliven(vgg)
    config = model.config
    for part in (model.encoder, model.fc6, model.fc7):  # the decoder stays without memory
        part.to_empty(device="cpu")
    model.normalise.mean = torch.tensor(config.pixel_mean).view(1, 3, 1, 1)
    model.normalise.std = torch.tensor(config.pixel_std).view(1, 3, 1, 1)

    filled = load_vgg16(model, vgg.state_dict())

    assert len(filled) == 2 * (13 + 2)
    images = crops(1, 224)
    ours, theirs = encode(model, images), features(vgg, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        fc6 = model.fc6(ours)
        fc7 = model.fc7(fc6)
        hidden = vgg.classifier[:2](theirs.flatten(1))
        torch.testing.assert_close(fc6.flatten(1), hidden, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            fc7.flatten(1), vgg.classifier[2:5](hidden), rtol=1e-3, atol=1e-3
        )
    assert fc7.std() > 0.01


@pytest.mark.parametrize("build", [vgg16, vgg16_bn])
@pytest.mark.parametrize("kind", [DeconvNet, FCN8s])
def test_torchvision_s_names_fill_the_paper_s_encoder(build, kind):
    with torch.device("meta"):
        model, source = kind(), build(weights=None).state_dict()
        filled = load_vgg16(model, source)
    parts = [f"encoder.blocks.{b}.{i}" for b, d in enumerate((2, 2, 3, 3, 3)) for i in range(d)]
    layers = (*parts, "fc6", "fc7")
    expected = {f"{layer}.0.{kind}" for layer in layers for kind in ("weight", "bias")}
    if build is vgg16_bn:
        kinds = ("weight", "bias", "running_mean", "running_var")
        expected |= {f"{part}.1.{kind}" for part in parts for kind in kinds}
    assert set(filled) == expected
    assert filled == sorted(filled)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_the_encoder_computes_what_the_source_computes(ours, theirs):
    vgg = NarrowVGG(batch_norm=theirs)
    model = narrow(batch_norm=ours, input_size=64)
    filled = load_vgg16(model, vgg.state_dict())
    images = crops(2, 64)
    if ours and not theirs:  # the paper's way: plain weights under fresh norms
        assert len(filled) == 2 * (13 + 1)  # fc7 as well; fc6 sees 2 x 2 here, VGG's 7 x 7
        calibrate_batch_norm(model, images)
    expected = features(vgg, images)
    assert expected.std() > 0.01
    torch.testing.assert_close(encode(model, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_narrow_classifier_is_fc6_and_fc7(batch_norm):
    vgg, model = NarrowVGG(batch_norm), narrow(batch_norm=False)
    assert {"fc6.0.weight", "fc7.0.bias"} <= set(load_vgg16(model, vgg.state_dict()))
    images = crops(1, 224)
    with torch.no_grad():
        result = model.fc7(model.fc6(encode(model, images)))
        expected = vgg.eval().classifier[:5](features(vgg, images).flatten(1))
    torch.testing.assert_close(result.flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_fully_connected_layers_that_do_not_fit_are_left_alone():
    model = narrow(input_size=64)  # its fc6 sees 2 x 2, VGG's 7 x 7
    before = {key: value.clone() for key, value in model.state_dict().items()}
    filled = load_vgg16(model, NarrowVGG(batch_norm=True).state_dict())
    assert not any(name.startswith("fc6") for name in filled)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in filled), key


def write_npz(path, state):
    np.savez(path, **{key: value.numpy() for key, value in state.items()})


def write_half_npz(path, state):
    np.savez_compressed(path, **{key: value.half().numpy() for key, value in state.items()})


@pytest.mark.parametrize(
    ("name", "write", "tolerance"),
    [
        ("vgg.npz", write_npz, 0),
        ("half.npz", write_half_npz, 1e-3),
        ("vgg.pth", lambda path, state: torch.save(state, path), 0),
        ("vgg.safetensors", lambda path, state: save_file(state, path), 0),
    ],
)
def test_files_fill_the_encoder(tmp_path, plain, name, write, tolerance):
    write(tmp_path / name, plain)
    model = FCN8s(FCNConfig(widths=WIDTHS, fc_width=FC, num_classes=3))
    filled = load_vgg16(model, tmp_path / name)
    assert len(filled) == 26 and all(key.startswith("encoder.") for key in filled)
    own = model.state_dict()
    for key, value in zip(
        [f"encoder.blocks.{b}.{i}.0.weight" for b, i in [(0, 0), (1, 1), (4, 2)]],
        [plain[f"features.{i}.weight"] for i in (0, 7, 28)],
    ):
        torch.testing.assert_close(own[key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("source", "name"), [(None, "vgg16"), ("vgg16", "vgg16"), ("vgg16_bn", "vgg16_bn")]
)
def test_names_are_fetched_through_torchvision(monkeypatch, source, name):
    asked = []

    def get_model(architecture, weights):
        asked.append((architecture, weights))
        return NarrowVGG(batch_norm=architecture.endswith("bn"))

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    filled = load_vgg16(narrow(), source)
    assert asked == [(name, "DEFAULT")]
    assert ("encoder.blocks.0.0.1.running_var" in filled) == (name == "vgg16_bn")


@pytest.mark.parametrize("build", [vgg11, vgg19, densenet121, mobilenet_v2])
def test_another_network_is_no_vgg_16(build):
    with torch.device("meta"):
        source = build(weights=None).state_dict()
    with pytest.raises(ValueError, match="expected VGG-16's 13 convolutions"):
        load_vgg16(narrow(), source)


def test_an_encoder_of_other_widths(plain):
    with pytest.raises(ValueError, match="only an encoder of VGG-16's widths"):
        load_vgg16(narrow(widths=(8, 8, 8, 8, 8)), plain)
    depths = (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="expected VGG-16's 5 convolutions.*found 13"):
        load_vgg16(narrow(encoder_depths=depths), plain)


def test_sources_with_holes(plain):
    full = NarrowVGG(batch_norm=True).state_dict()
    for missing, message in [
        ("features.0.bias", "lack 'features.0.bias'"),
        ("features.0.weight", "found 12"),
        ("features.1.weight", "batch norms or VGG-16's 13, found 12"),
        ("features.1.running_var", "lack 'features.1.running_var'"),
        ("classifier.0.bias", "lack 'classifier.0.bias'"),
    ]:
        source = {key: value for key, value in full.items() if key != missing}
        with pytest.raises(ValueError, match=message):
            load_vgg16(narrow(), source)
    model = narrow()
    before = model.encoder.blocks[0][0][0].weight.clone()
    plain["features.28.weight"] = plain["features.28.weight"][:-1]
    with pytest.raises(ValueError, match="encoder.blocks.4.2.0.weight"):
        load_vgg16(model, plain)
    torch.testing.assert_close(model.encoder.blocks[0][0][0].weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["npz", "pth", "safetensors"])
def test_a_missing_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"no VGG-16 weights at .*vgg.{suffix}"):
        load_vgg16(narrow(), tmp_path / f"vgg.{suffix}")


@pytest.mark.parametrize("suffix", ["npz", "pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a file of weights", b"PK\x03\x04" + b"\0" * 40])
def test_a_foreign_file(tmp_path, suffix, content):
    path = tmp_path / f"vgg.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"vgg.{suffix}"):
        load_vgg16(narrow(), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vgg.npz", write_npz),
        ("vgg.pth", lambda path, state: torch.save(state, path)),
        ("vgg.safetensors", lambda path, state: save_file(state, path)),
    ],
)
def test_a_truncated_file(tmp_path, plain, name, write):
    path = tmp_path / name
    write(path, plain)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=name):
        load_vgg16(narrow(), path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Hostile()}, "torch.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    np.savez("array.npz", **{"features.0.weight": np.array([Hostile()], dtype=object)})
    for name in ("torch.pth", "pickle.pth", "array.npz"):
        with pytest.raises(ValueError, match=name):
            load_vgg16(narrow(), name)
    assert not os.path.exists("trace")


def test_a_file_that_holds_no_dictionary(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="tensor.pth: expected a state dictionary, found Tensor"):
        load_vgg16(narrow(), tmp_path / "tensor.pth")


def test_only_our_networks_are_filled(plain):
    with pytest.raises(TypeError, match="DeconvNet or an FCN8s, got Linear"):
        load_vgg16(nn.Linear(2, 2), plain)


# ------------------------------------------------------------------------- calibration


def test_calibration_makes_the_norms_the_identity(plain):
    model, bare = narrow(input_size=64), narrow(input_size=64, batch_norm=False)
    load_vgg16(model, plain)
    load_vgg16(bare, plain)
    images = crops(4, 64)
    assert (encode(model, images) - encode(bare, images)).abs().max() > 0.01
    calibrate_batch_norm(model, images)
    for seed in (0, 1):  # at inference the norm is affine: the identity on every image
        others = crops(2, 64, seed)
        torch.testing.assert_close(
            encode(model, others), encode(bare, others), rtol=1e-3, atol=1e-3
        )


def test_calibration_takes_each_channel_s_own_statistics(plain):
    model, images = narrow(input_size=64), crops(4, 64)
    load_vgg16(model, plain)
    calibrate_batch_norm(model, images)
    untouched = model.fc6[1].running_var.clone()
    inputs = {}
    for block in model.encoder.blocks:
        for convolution, norm, _ in block:
            norm.momentum = 1.0  # the running statistics become the batch's
            inputs[norm] = norm.running_mean.clone(), norm.running_var.clone()
            assert convolution.weight.requires_grad
    bare = encode(model, images)
    with torch.no_grad():
        trained = model.train().encoder(model.normalise(images))[0][-1]
    for norm, (mean, variance) in inputs.items():
        torch.testing.assert_close(mean, norm.running_mean, rtol=0.05, atol=0.05)
        torch.testing.assert_close(variance, norm.running_var, rtol=0.05, atol=0.05)
    # Training mode divides by the biased deviation of the 16 values that conv5 sees, hence 10 %.
    torch.testing.assert_close(trained, bare, rtol=0.1, atol=0.1)
    assert torch.equal(model.fc6[1].running_var, untouched)


def test_calibration_on_a_gpu(plain, gpu):
    model, images = narrow(input_size=64), crops(4, 64)
    load_vgg16(model, plain)
    there = copy.deepcopy(model).to(gpu)
    for network in (model, there):
        calibrate_batch_norm(network, images)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(there.state_dict()[key].cpu(), value, rtol=1e-3, atol=1e-3)


def test_a_prepared_copy_is_not_saved(tmp_path):
    """Nothing could read it again."""
    for model in (narrow(), FCN8s(FCNConfig.tiny())):
        with pytest.raises(TypeError, match="network that was trained, got its prepared copy"):
            save_model(prepare_for_inference(model.eval()), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_calibration_needs_batch_norm():
    with pytest.raises(ValueError, match="no batch norm to calibrate"):
        calibrate_batch_norm(narrow(batch_norm=False), crops(2, 224))


# --------------------------------------------------------------------- models and files


def deconvnet() -> DeconvNet:
    config = ModelConfig(
        num_classes=3, widths=(4, 4, 4, 4, 4), fc_width=8, input_size=32, use_switches=False,
        pixel_std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    model = DeconvNet(config)
    enliven(model)
    return model


def fcn() -> FCN8s:
    model = FCN8s(FCNConfig(num_classes=3, widths=(4, 4, 4, 4, 4), fc_width=8, fc_kernel=3))
    enliven(model)
    return model


@pytest.fixture(params=[deconvnet, fcn])
def model(request) -> nn.Module:
    return request.param()


def test_a_model_comes_back_as_it_was(tmp_path, model):
    facts = {"class_names": ["background", "chat", "küche"], "mean_iou": 0.5, "nested": {"a": [1]}}
    path = tmp_path / "new" / "model.safetensors"
    model.train().to(memory_format=torch.channels_last)
    save_model(model, path, facts)
    again = load_model(str(path))
    assert type(again) is type(model)
    assert again.config == model.config
    assert again.metadata == facts
    again.metadata["training"] = {"minutes": 5}  # which may no longer be all
    save_model(again, tmp_path / "copy.safetensors")
    assert load_model(tmp_path / "copy.safetensors").metadata == facts
    assert not again.training
    assert os.listdir(path.parent) == ["model.safetensors"]
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with torch.no_grad():
        images = crops(2, 32)
        torch.testing.assert_close(again(images), model.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, model, dtype):
    path, full = tmp_path / "half.safetensors", tmp_path / "full.safetensors"
    norm = model.fc6[1]
    norm.running_var.fill_(1e6)  # beyond float16: as infinity it would silence the channel
    save_model(model, path, dtype=dtype)
    save_model(model, full)
    assert path.stat().st_size < 0.8 * full.stat().st_size
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("fc6.0.weight").dtype == dtype
    again = load_model(path)
    assert again.metadata == {}
    parameters = dict(model.named_parameters())
    for key, value in model.state_dict().items():
        loaded = again.state_dict()[key]
        assert loaded.dtype == value.dtype
        expected = value.to(dtype).to(value.dtype) if key in parameters else value
        assert torch.equal(loaded, expected), key
    assert next(model.parameters()).dtype == torch.float32  # the model itself is not touched


def test_files_of_8_bits(tmp_path, model):
    path, full = tmp_path / "small.safetensors", tmp_path / "full.safetensors"
    save_model(model, path, {"who": "me"}, torch.int8)
    save_model(model, full)
    assert path.stat().st_size < 0.8 * full.stat().st_size  # much of so small a file is names
    again = load_model(path)
    assert again.metadata == {"who": "me"}
    parameters = dict(model.named_parameters())
    for key, value in model.state_dict().items():
        loaded = again.state_dict()[key]
        assert loaded.dtype == value.dtype
        if key not in parameters:
            assert torch.equal(loaded, value), key  # statistics stay
        elif value.ndim < 2:
            assert torch.equal(loaded, value.half().float()), key
        else:  # at most half a step, and the largest of each slice is exact
            largest = value.flatten(1).abs().amax(1)
            step = largest.view(-1, *[1] * (value.ndim - 1)) / 127
            assert ((loaded - value).abs() <= 0.501 * step).all(), key
            torch.testing.assert_close(loaded.flatten(1).abs().amax(1), largest)


def test_a_kernel_of_zeros_survives_8_bits():
    whole, factors = quantise(torch.zeros(2, 3, 1, 1))
    assert whole.dtype == torch.int8
    assert torch.equal(dequantise(whole, factors), torch.zeros(2, 3, 1, 1))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int8])
def test_an_encoder_kept_in_another_file(tmp_path, model, dtype):
    fcn = FCN8s(replace(FCNConfig.tiny(), widths=model.config.widths,
                        encoder_depths=model.config.encoder_depths))  # fmt: skip
    fcn.encoder.load_state_dict(model.encoder.state_dict())
    whole, fcn_path, path = (tmp_path / f"{n}.safetensors" for n in ("whole", "fcn", "net"))
    save_model(model, whole, dtype=dtype)
    save_model(fcn, fcn_path, dtype=dtype)
    save_model(model, path, dtype=dtype, encoder_of=fcn_path)
    assert path.stat().st_size < whole.stat().st_size
    expected, found = load_model(whole).state_dict(), load_model(path).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    elsewhere = tmp_path / "elsewhere" / "net.safetensors"
    with pytest.raises(ValueError, match="must lie in the folder"):
        save_model(model, elsewhere, dtype=dtype, encoder_of=fcn_path)
    with torch.no_grad():
        model.encoder.blocks[0][0][0].weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="fcn.safetensors: its encoder is not this model's"):
        save_model(model, tmp_path / "x.safetensors", dtype=dtype, encoder_of=fcn_path)
    with pytest.raises(ValueError, match="whole.safetensors: cannot take its encoder from itself"):
        save_model(model, whole, dtype=dtype, encoder_of=whole)
    save_model(model, fcn_path, dtype=dtype)  # another encoder under the same name
    with pytest.raises(ValueError, match="its encoder was in .*fcn.safetensors, which now holds"):
        load_model(path)
    fcn_path.unlink()
    with pytest.raises(FileNotFoundError, match="its encoder is in .*fcn.safetensors, which is"):
        load_model(path)


def test_a_network_on_a_gpu_is_saved_without_its_encoder(tmp_path, model, gpu):
    whole, path = (tmp_path / f"{name}.safetensors" for name in ("whole", "net"))
    save_model(model, whole)
    save_model(copy.deepcopy(model).to(gpu), path, encoder_of=whole)
    assert path.stat().st_size < whole.stat().st_size
    expected, found = load_model(whole).state_dict(), load_model(path).state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_saving_what_is_no_model(tmp_path, model):
    with pytest.raises(TypeError, match="DeconvNet or an FCN8s, got Linear"):
        save_model(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match="JSON"):
        save_model(model, tmp_path / "x.safetensors", {"thing": object()})
    with pytest.raises(TypeError, match="floating type or int8, got torch.int16"):
        save_model(model, tmp_path / "x.safetensors", dtype=torch.int16)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch, model):
    path = tmp_path / "model.safetensors"
    save_model(model, path, {"version": 1})

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(model, path, {"version": 2})
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert load_model(path).metadata == {"version": 1}


def test_a_missing_model(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_model(path)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere(tmp_path, fraction):
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        save_model(deconvnet(), whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match="cut.safetensors: not a whole safetensors file"):
        load_model(cut)


def test_files_of_others(tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_text("{}")
    with pytest.raises(ValueError, match="other.safetensors: not a whole safetensors file"):
        load_model(path)
    for header in (None, {"format": "pt"}, {"architecture": "segnet"}):
        save_file({"weight": torch.zeros(2)}, path, header)
        with pytest.raises(ValueError, match="other.safetensors: expected a file written by"):
            load_model(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"config": None},
        {"metadata": None},
        {"config": "{"},
        {"config": json.dumps({"num_classes": 1})},
        {"config": json.dumps({"colour": "red"})},
        {"config": json.dumps({"num_classes": 3, "widths": [5] * 5, "fc_width": 8})},
        {"architecture": "fcn8s"},
    ],
)
def test_headers_that_do_not_fit_their_tensors(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_model(deconvnet(), path)
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    header = {key: value for key, value in (header | damage).items() if value is not None}
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match="model.safetensors: the tensors or the configuration"):
        load_model(path)


def test_a_tensor_too_few(tmp_path):
    path = tmp_path / "model.safetensors"
    model = deconvnet()
    save_model(model, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {k: v for k, v in model.state_dict().items() if k != "score.bias"}
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match="score.bias"):
        load_model(path)


def test_pretrained_weights_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match="no weights named 'shapes'.*there are: none"):
        pretrained("shapes")
    save_model(deconvnet_tiny(), tmp_path / "shapes-deconvnet.safetensors")
    assert pretrained("shapes-deconvnet") == tmp_path / "shapes-deconvnet.safetensors"
    with pytest.raises(ValueError, match="no weights named 'shapes'.*there are: shapes-deconvnet"):
        pretrained("shapes")


def test_every_shipped_file_loads():
    names = {f"{data}-{kind}" for data in ("shapes", "voc") for kind in ("deconvnet", "fcn")}
    assert {path.stem for path in weights.SHIPPED.glob("*.safetensors")} == names
    for name in names:
        model = load_model(pretrained(name))
        assert len(model.metadata["class_names"]) == model.config.num_classes
