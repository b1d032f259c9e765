"""The same network, faster: what can be rearranged once nothing is learned any more.

The network that the book teaches stays plain. Before it is used, :func:`prepare_for_inference`
rewrites a copy of it by four rules, none of which changes what it computes:

1. *Batch norm is folded.* With fixed statistics it scales and shifts each channel, and so do the
   convolution's own weights and bias.
2. *A stride-1 deconvolution is a convolution* with the kernel turned by 180 degrees and the
   channels exchanged, for which processors have faster code.
3. *A convolution over all of its input is a matrix product*: ``fc6`` sees the whole 7 x 7 map at
   once, and its mirror image draws the whole of it.
4. *Sixteen bits are enough* for weights and activations where the hardware multiplies them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deconvnet.model import DeconvNet


def prepare_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a faster copy of a network, for inference only.

    Args:
        model: A :class:`~deconvnet.model.DeconvNet` or :class:`~deconvnet.fcn.FCN8s`.
        dtype: What the copy computes in: ``float32``, or ``bfloat16`` or ``float16`` where the
            hardware has it. Its scores come back in this type.

    Returns:
        A network that is called as ``model`` is, in evaluation mode, channels-last, without
        gradients. In float32 its scores are ``model``'s but for rounding.

    Raises:
        TypeError: ``dtype`` is not floating.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_batch_norm(fast)
    if isinstance(fast, DeconvNet):
        fast.fc6[0] = ConvolutionOfAll(fast.fc6[0])
        fast.fc6_deconv[0] = DeconvolutionToAll(fast.fc6_deconv[0])
    _turn_deconvolutions(fast)
    normalise = fast.normalise  # computes in float32: 255 - 123.675 has more than 8 bits
    fast = fast.to(dtype, memory_format=torch.channels_last)
    fast.normalise = nn.Sequential(normalise.float(), CastTo(dtype))
    return fast


class CastTo(nn.Module):
    """Changes the dtype of what passes through.

    Args:
        dtype: Of the output.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` in the other dtype."""
        return x.to(self.dtype)


class ConvolutionOfAll(nn.Module):
    """A convolution whose kernel is as large as its input, as a matrix product.

    Args:
        convolution: ``[C, k, k]`` to ``[D, 1, 1]``, without padding.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        # channels last in memory, on both sides of the product: then flattening copies nothing
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, 1, 1]`` for ``x`` of ``[N, C, k, k]``."""
        flat = x.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(flat, self.weight, self.bias)[:, :, None, None]


class DeconvolutionToAll(nn.Module):
    """A deconvolution of a single vector, as a matrix product.

    Args:
        deconvolution: ``[C, 1, 1]`` to ``[D, k, k]``, without padding.
    """

    def __init__(self, deconvolution: nn.ConvTranspose2d) -> None:
        super().__init__()
        weight = deconvolution.weight.permute(2, 3, 1, 0)  # [k, k, D, C]
        self.size = weight.shape[:3]
        self.weight = nn.Parameter(weight.flatten(0, 2).contiguous(), requires_grad=False)
        self.bias = deconvolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, k, k]``, channels-last, for ``x`` of ``[N, C, 1, 1]``."""
        map_ = nn.functional.linear(x.flatten(1), self.weight).unflatten(1, self.size)
        return (map_ + self.bias).permute(0, 3, 1, 2)


def _fold_batch_norm(module: nn.Module) -> None:
    """Rule 1, in place, in every ``Sequential`` below ``module``."""
    for child in module.children():
        _fold_batch_norm(child)
    if not isinstance(module, nn.Sequential):
        return
    for i, (layer, norm) in enumerate(zip(module, list(module)[1:])):
        if isinstance(norm, nn.BatchNorm2d):
            transposed = isinstance(layer, nn.ConvTranspose2d)
            module[i] = fuse_conv_bn_eval(layer, norm, transposed)
            del module[i + 1]
            return _fold_batch_norm(module)


def _turn_deconvolutions(module: nn.Module) -> None:
    """Rule 2, in place, for every deconvolution below ``module`` that has stride 1."""
    for name, child in module.named_children():
        if isinstance(child, nn.ConvTranspose2d) and child.stride == (1, 1):
            setattr(module, name, as_convolution(child))
        else:
            _turn_deconvolutions(child)


def as_convolution(deconvolution: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution that computes what a stride-1 deconvolution does.

    A deconvolution paints its kernel around every input pixel. Seen from an output pixel, that
    gathers the surrounding input through the kernel turned by 180 degrees.

    Args:
        deconvolution: With stride 1, in one group, undilated.

    Returns:
        A convolution with the kernel turned, the channels exchanged, and a padding of
        ``kernel - 1 - padding``.

    Raises:
        ValueError: The deconvolution has another stride, groups or dilation.
    """
    d = deconvolution
    if (d.stride, d.groups, d.dilation) != ((1, 1), 1, (1, 1)):
        raise ValueError(
            f"only a deconvolution of stride 1, one group and no dilation is a convolution, got {d}"
        )
    padding = tuple(k - 1 - p for k, p in zip(d.kernel_size, d.padding))
    convolution = nn.Conv2d(
        d.in_channels,
        d.out_channels,
        d.kernel_size,
        padding=padding,
        bias=d.bias is not None,
        device="meta",  # its own random weights are never made
    )
    turned = d.weight.detach().transpose(0, 1).flip(2, 3)
    convolution.weight = nn.Parameter(turned.contiguous(), requires_grad=False)
    convolution.bias = d.bias
    return convolution
