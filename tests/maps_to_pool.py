"""Small maps that are hard to pool, and all that pooling and unpooling make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.unpooling import max_pool2d_with_switches, unpool2d

LAYOUTS = ("channels_last", "contiguous", "transposed")
SHAPES = (
    (3, 8, 64, 48),
    (2, 33, 31, 17),
    (5, 64, 64),
    (1, 1, 70, 90),
    (2, 512, 2, 2),
    (1, 3, 3, 2),
    (1, 2, 4, 140),
)


def a_map(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Few different values, so that ties are many; NaN, infinities and both zeros among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).mul(2).round()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    places = torch.rand(shape, generator=generator) < 0.05
    x[places] = odd[torch.randint(4, (int(places.sum()),), generator=generator)]
    x = x.to(dtype)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if layout == "transposed" else x


def there_and_back(x: Tensor) -> list[Tensor]:
    """Pooled, switches, unpooled, and the gradients of both."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    pooled, switches = max_pool2d_with_switches(x)
    leaf = pooled.detach().requires_grad_()
    unpooled = unpool2d(leaf, switches, x.shape[-2:])
    weights = torch.arange(unpooled.numel()).view(unpooled.shape).to(x)
    (gathered,) = torch.autograd.grad(unpooled, leaf, weights)
    (scattered,) = torch.autograd.grad(pooled, x, gathered)
    return [t.detach() for t in (pooled, switches, unpooled, gathered, scattered)]


def assert_same(found: list[Tensor], expected: list[Tensor], layout: str) -> None:
    """The same values, dtypes and shapes, in the same memory format unless the map had none."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # -0 equals 0 here: tensors, which add zeros, lose its sign
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)
        if layout != "transposed":
            assert ours.is_contiguous() == theirs.is_contiguous()
