"""Weights in and out: ImageNet's VGG-16 into the encoder, whole models to and from files.

Our own files are ``safetensors``: tensors plus the network's configuration as JSON, so that a
file rebuilds its model and nothing in it can execute. To be small, a file may hold its kernels in
8 bits, and leave its encoder to another file.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.files import atomic_write
from deconvnet.model import DeconvNet, ModelConfig

ARCHITECTURES = {"deconvnet": (DeconvNet, ModelConfig), "fcn8s": (FCN8s, FCNConfig)}
SCALE = ".scale"  # after the name of a kernel of 8 bits: the name of its factors
SHIPPED = Path(__file__).parent / "pretrained"


def save_model(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    encoder_of: str | Path | None = None,
) -> None:
    """Writes a model's weights, its configuration and any metadata to one file.

    Args:
        model: A :class:`~deconvnet.model.DeconvNet` or :class:`~deconvnet.fcn.FCN8s`.
        path: The ``.safetensors`` file to write.
        metadata: JSON-like facts to keep with the weights, such as ``class_names``; by default
            those that the model was loaded with, but for what they say of its training.
        dtype: Store the parameters in this type. ``torch.float16`` halves the file;
            ``torch.int8`` quarters it: kernels become whole numbers from -127 to 127 times one
            factor for each slice of their first axis, other parameters ``float16``. Batch norm's
            statistics stay as they are, for a variance may lie outside half precision's range.
        encoder_of: A file in the same folder whose encoder is this model's too, so that it is
            not stored again.

    Raises:
        TypeError: The model is neither, or a copy prepared for inference; the metadata is not
            JSON-like, or the dtype neither floating nor ``int8``.
        ValueError: The other file holds another encoder, or lies in another folder.
    """
    name = next((n for n, (kind, _) in ARCHITECTURES.items() if isinstance(model, kind)), None)
    if name is None:
        raise TypeError(f"model must be a DeconvNet or an FCN8s, got {type(model).__name__}")
    if getattr(model, "prepared", False):  # its layers are others, which no file can name
        raise TypeError("model must be the network that was trained, got its prepared copy")
    if dtype is not None and dtype != torch.int8 and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type or int8, got {dtype}")
    if metadata is None:
        loaded = getattr(model, "metadata", {})
        metadata = {key: value for key, value in loaded.items() if key != "training"}
    statistics = dict(model.named_buffers())
    tensors: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.cpu()  # where those of `encoder_of` are
        if dtype is None or key in statistics:
            tensors[key] = value
        elif dtype != torch.int8:
            tensors[key] = value.to(dtype)
        elif value.ndim < 2:
            tensors[key] = value.half()
        else:
            tensors[key], tensors[key + SCALE] = quantise(value)
    header = {
        "architecture": name,
        "config": json.dumps(asdict(model.config)),
        "metadata": json.dumps(dict(metadata)),
    }
    if encoder_of is not None:
        header["encoder_sha256"] = _encoder_digest(tensors)
        tensors = _without_encoder(tensors, Path(encoder_of), Path(path))
        header["encoder_of"] = Path(encoder_of).name
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, header)


def quantise(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a kernel to 8 bits.

    Args:
        kernel: ``[K, ...]``, floating.

    Returns:
        ``int8 [K, ...]`` in -127 to 127, and ``float32 [K]``: the factors that give the kernel
        back, up to half a step of each.
    """
    kernel = kernel.detach().float()
    factors = kernel.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    return (kernel / _column(factors, kernel)).round().to(torch.int8), factors


def dequantise(kernel: Tensor, factors: Tensor) -> Tensor:
    """Returns what :func:`quantise` rounded, ``float32 [K, ...]``."""
    return kernel.float() * _column(factors, kernel)


def _column(factors: Tensor, kernel: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (kernel.ndim - 1))


def _without_encoder(tensors: dict[str, Tensor], other: Path, path: Path) -> dict[str, Tensor]:
    if other.resolve() == path.resolve():
        raise ValueError(f"{other}: cannot take its encoder from itself; name another file")
    if other.resolve().parent != path.resolve().parent:
        raise ValueError(f"{other}: must lie in the folder of {path}, which refers to it")
    own = {key: value for key, value in tensors.items() if key.startswith("encoder.")}
    theirs = {k: v for k, v in _read(other)[1].items() if k.startswith("encoder.")}
    if own.keys() != theirs.keys() or not all(torch.equal(own[k], theirs[k]) for k in own):
        raise ValueError(f"{other}: its encoder is not this model's, or is stored in another type")
    return {key: value for key, value in tensors.items() if key not in own}


def _encoder_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if key.startswith("encoder.")):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_model(path: str | Path, device: torch.device | str = "cpu") -> DeconvNet | FCN8s:
    """Rebuilds a model from a file that :func:`save_model` wrote.

    Args:
        path: A ``.safetensors`` file.
        device: Where to put the model.

    Returns:
        The model in ``float32`` and evaluation mode; its ``metadata`` attribute is the
        dictionary that was saved with it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not one of ours, or is damaged.
    """
    header, tensors = _read(path)
    if header.get("architecture") not in ARCHITECTURES:
        raise ValueError(
            f"{path}: expected a file written by deconvnet.weights.save_model, "
            f"found architecture {header.get('architecture')!r}"
        )
    kind, config_kind = ARCHITECTURES[header["architecture"]]
    if "encoder_of" in header:
        other = Path(path).parent / Path(header["encoder_of"]).name
        if not other.is_file():
            raise FileNotFoundError(f"{path}: its encoder is in {other}, which is missing")
        shared = {k: v for k, v in _read(other)[1].items() if k.startswith("encoder.")}
        if header.get("encoder_sha256", _encoder_digest(shared)) != _encoder_digest(shared):
            raise ValueError(f"{path}: its encoder was in {other}, which now holds another one")
        tensors = shared | tensors
    tensors = {
        key: dequantise(value, tensors[key + SCALE]) if key + SCALE in tensors else value
        for key, value in tensors.items()
        if not key.endswith(SCALE)
    }
    try:
        fields = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(header["config"]).items()
        }
        model = kind(config_kind(**fields))
        model.load_state_dict(tensors)
        model.metadata = json.loads(header["metadata"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: the tensors or the configuration do not fit this {kind.__name__}: {error}"
        ) from error
    return model.to(device).eval()


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = file.keys()
            return file.metadata() or {}, {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def pretrained(name: str) -> Path:
    """Returns the path of weights that come with the package.

    Args:
        name: For example ``"shapes-deconvnet"``; the error for an unknown name lists all.
    """
    path = SHIPPED / f"{name}.safetensors"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights named {name!r} come with deconvnet; there are: {names}")
    return path


def load_vgg16(
    model: nn.Module, source: str | Path | Mapping[str, Tensor] | None = None
) -> list[str]:
    """Copies ImageNet's VGG-16 into a model's encoder, and into fc6 and fc7 where they fit.

    Args:
        model: A network whose encoder has VGG-16's widths.
        source: A state dictionary with torchvision's names (``features.0.weight``, ...), a
            ``.npz``, ``.pth`` or ``.safetensors`` file of one, ``"vgg16"`` or ``"vgg16_bn"`` to
            download torchvision's, or ``None`` for ``"vgg16"``. With and without batch norm,
            with and without the fully connected layers. Batch norm is folded into the
            convolutions of a model that has none.

    Returns:
        The names of the model's tensors that were filled; all others keep their values.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: The model is neither a DeconvNet nor an FCN8s.
        ValueError: The source is no VGG-16 or is damaged, or the encoder is of another shape.
    """
    if not isinstance(model, (DeconvNet, FCN8s)):
        raise TypeError(f"model must be a DeconvNet or an FCN8s, got {type(model).__name__}")
    weights = _vgg16_weights("vgg16" if source is None else source)
    own = model.state_dict()
    try:
        filled = dict(_encoder_weights(model, weights))
        for name, key in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
            weight = weights.get(f"{key}.weight")
            # Linear layers over a flattened map are convolutions over that map.
            if weight is not None and weight.numel() == own[f"{name}.0.weight"].numel():
                filled[f"{name}.0.weight"] = weight.view_as(own[f"{name}.0.weight"])
                filled[f"{name}.0.bias"] = weights[f"{key}.bias"]
    except KeyError as error:
        raise ValueError(f"the VGG-16 weights lack {error}") from error
    for name, tensor in filled.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"VGG-16 has {tuple(tensor.shape)} for {name}, this model "
                f"{tuple(own[name].shape)}: only an encoder of VGG-16's widths can take it"
            )
    model.load_state_dict(filled, strict=False)
    return sorted(filled)


def _vgg16_weights(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    if str(source) in ("vgg16", "vgg16_bn"):
        from torchvision.models import get_model

        return get_model(str(source), weights="DEFAULT").state_dict()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no VGG-16 weights at {path}")
    if path.suffix == ".safetensors":
        return _read(path)[1]
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]).float() for key in arrays.files}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (
        EOFError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path}: not a whole file of tensors: {error}") from error
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: expected a state dictionary, found {type(weights).__name__}")
    return weights


def _encoder_weights(
    model: nn.Module, weights: Mapping[str, Tensor]
) -> Iterable[tuple[str, Tensor]]:
    """Pairs the encoder's tensors with VGG's by walking both in order.

    torchvision numbers convolutions, batch norms, ReLUs and pools in one sequence, so the
    position of a convolution depends on whether batch norms stand between.
    """
    names = (re.fullmatch(r"features\.(\d+)\.weight", key) for key in weights)
    features = sorted(int(name[1]) for name in names if name)
    convolutions = [i for i in features if weights[f"features.{i}.weight"].ndim == 4]
    norms = [i for i in features if weights[f"features.{i}.weight"].ndim == 1]
    layers = [
        f"encoder.blocks.{b}.{i}"
        for b, block in enumerate(model.encoder.blocks)
        for i in range(len(block))
    ]
    if len(convolutions) != len(layers):
        raise ValueError(
            f"expected VGG-16's {len(layers)} convolutions named features.N.weight, "
            f"found {len(convolutions)}"
        )
    if len(norms) not in (0, len(layers)):
        raise ValueError(f"expected no batch norms or VGG-16's {len(layers)}, found {len(norms)}")
    for layer, i, j in zip_longest(layers, convolutions, norms):
        weight, bias = (weights[f"features.{i}.{kind}"] for kind in ("weight", "bias"))
        if norms:
            kinds = ("weight", "bias", "running_mean", "running_var")
            norm = {kind: weights[f"features.{j}.{kind}"] for kind in kinds}
            if model.config.batch_norm:
                yield from ((f"{layer}.1.{kind}", tensor) for kind, tensor in norm.items())
            else:
                weight, bias = fuse_conv_bn_weights(
                    weight, bias, norm["running_mean"], norm["running_var"], 1e-5,
                    norm["weight"], norm["bias"],
                )  # fmt: skip
        yield f"{layer}.0.weight", weight
        yield f"{layer}.0.bias", bias


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Sets the encoder's batch norms so that they leave these images' activations unchanged.

    Plain VGG-16 weights were trained without batch norm. Scale and shift that equal each
    channel's own deviation and mean make the normalised encoder compute what plain VGG
    computes; a departure from the paper, which starts every scale at 1.

    Args:
        model: A network with batch norm, after :func:`load_vgg16`.
        images: A few typical crops, ``uint8 [N, 3, S, S]``.

    Raises:
        ValueError: The model has no batch norm.
    """
    if not model.config.batch_norm:
        raise ValueError(
            "the model has no batch norm to calibrate: its config says batch_norm=False"
        )
    x = model.normalise(images.to(next(model.parameters()).device))
    for block in model.encoder.blocks:
        for convolution, norm, relu in block:
            x = convolution(x)
            variance, mean = torch.var_mean(x, dim=(0, 2, 3))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)
            x = relu(x)  # what the norm would return: it is the identity on these images
        x, _ = model.encoder.pool(x)
