"""What every layer of the decoder holds, from a single point to the whole crop.

Source: Noh, Hong, Han, ICCV 2015, figure 4; layer names of the authors' release,
``training/001_stage_1/stage_1_train.prototxt``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.model import DeconvNet

LEVELS = (5, 4, 3, 2, 1)
"""The decoder's blocks, numbered like the poolings that they undo."""


@torch.no_grad()
def decoder_activations(
    model: DeconvNet, crops: Tensor, use_switches: bool | None = None
) -> dict[str, Tensor]:
    """Runs the network and keeps every map of its decoder.

    Args:
        model: A DeconvNet in evaluation mode.
        crops: ``uint8 [N, 3, S, S]``, RGB, with ``S = model.config.input_size``.
        use_switches: False sets all switches to 0, so that each value goes to the upper left of
            its window; by default as the model was trained.

    Returns:
        Maps ``float32 [N, C, h, w]`` by layer, in order: ``fc7`` (1 x 1), ``fc6-deconv``, for
        each level from 5 to 1 ``unpool5`` and its ``deconv5_1``, ``deconv5_2``, ..., and
        ``score``, which is what the model returns.

    Raises:
        ValueError: The model is in training mode, or the crops have another size.

    Example:
        >>> from deconvnet.model import deconvnet_tiny
        >>> maps = decoder_activations(deconvnet_tiny().eval(), torch.zeros(1, 3, 64, 64))
        >>> {name: tuple(m.shape[2:]) for name, m in maps.items() if "unpool" in name}
        {'unpool5': (4, 4), 'unpool4': (8, 8), 'unpool3': (16, 16), 'unpool2': (32, 32), 'unpool1': (64, 64)}
    """  # noqa: E501
    if model.training:
        raise ValueError("the network is in training mode; call model.eval() first")
    size = model.config.input_size
    if crops.ndim != 4 or tuple(crops.shape[1:]) != (3, size, size):
        raise ValueError(f"crops must be [N, 3, {size}, {size}], got {list(crops.shape)}")
    if use_switches is None:
        use_switches = model.config.use_switches
    crops = crops.to(next(model.parameters()).device)
    pooled, switches = model.encoder(model.normalise(crops))
    if not use_switches:
        switches = [torch.zeros_like(where) for where in switches]
    maps = {"fc7": model.fc7(model.fc6(pooled[-1]))}
    x = maps["fc6-deconv"] = model.fc6_deconv(maps["fc7"])
    for level, block, where in zip(LEVELS, model.decoder.blocks, reversed(switches)):
        x = maps[f"unpool{level}"] = model.decoder.unpool(x, where)
        for number, deconvolution in enumerate(block, start=1):
            x = maps[f"deconv{level}_{number}"] = deconvolution(x)
    maps["score"] = model.score(x)
    return maps


def strongest_channels(activations: Tensor, count: int) -> list[int]:
    """The channels of one map that hold the most, the strongest one first.

    Args:
        activations: ``[C, h, w]``, after ReLU.
        count: How many channels, if there are so many.

    Returns:
        Their numbers.
    """
    totals = activations.sum((1, 2))
    return totals.topk(min(count, len(totals))).indices.tolist()
