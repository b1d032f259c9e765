"""Pooling and unpooling on a GPU in one pass over memory, by Triton, which comes with PyTorch.

Written with tensors, they are a dozen kernels one after the other, each of which reads and writes
a whole map. The three kernels here do what the loops of :mod:`deconvnet.kernels` do on a CPU, and
what :mod:`deconvnet.unpooling` does with tensors, but for the sign of a zero. Nothing imports this
module but :func:`deconvnet.hardware.gpu_kernels`, which tries them out before it lends them.

A program takes a tile of the pooled map: a few of its rows, and in each a stretch of neighbouring
values. In memory a map is channels-last, ``[N, h, w, C]``, or plane by plane, ``[N C, h, w, 1]``;
either way it is ``[outer, h, w, inner]``, and a row has ``w * inner`` values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deconvnet.unpooling import _bits, _empty, _find, _layout, _put, _take

TILE = 1024
"""Values of the pooled map that one program takes; a power of two."""


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of 2 x 2 windows and their switches.

    Args:
        x: ``[..., H, W]`` of 3 or 4 dimensions, on a GPU.

    Returns:
        As :func:`deconvnet.unpooling.max_pool2d_with_switches`, without a gradient.
    """
    x = _dense(x)
    pooled = _empty(x, (x.shape[-2] // 2, x.shape[-1] // 2))
    switches = torch.empty_like(pooled, dtype=torch.uint8)
    _launch(_pool_kernel, x, pooled, switches)
    return pooled, switches


def unpool(x: Tensor, switches: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Every value at its switch in a 2 x 2 window, zeros around it.

    Args:
        x: ``[..., h, w]`` of 3 or 4 dimensions, on a GPU.
        switches: ``uint8``, the shape of ``x``, from 0 to 3; others drop their value.
        size: ``(H, W)`` of the result: ``2 h`` (the default) or ``2 h + 1``, and likewise ``W``.
    """
    even = 2 * x.shape[-2], 2 * x.shape[-1]
    x = _dense(x)
    unpooled = _empty(x, size or even)
    if unpooled.shape[-2:] != even:
        unpooled.zero_()  # the kernel leaves an odd last row or column alone
    _launch(_unpool_kernel, _bits(unpooled), _bits(x), switches)
    return unpooled


def gather(x: Tensor, switches: Tensor) -> Tensor:
    """The value at the switch of each 2 x 2 window: what :func:`unpool` put there.

    Args:
        x: ``[..., H, W]`` of 3 or 4 dimensions, on a GPU.
        switches: ``uint8 [..., H // 2, W // 2]``, from 0 to 3; others give zero.
    """
    x = _dense(x)
    gathered = _empty(x, switches.shape[-2:])
    _launch(_gather_kernel, _bits(x), _bits(gathered), switches)
    return gathered


def try_out(device: torch.device) -> None:
    """Compares the three kernels with what tensors compute, in both layouts.

    Args:
        device: A GPU.

    Raises:
        RuntimeError: They differ.
        Exception: Whatever Triton raises where it cannot compile or run them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 9, 34), (1, 16, 4, 32)  # 16 divides rows of the second: other machine code
    layouts = torch.contiguous_format, torch.channels_last
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for shape, layout, dtype in itertools.product(shapes, layouts, dtypes):
        x = torch.randn(shape, generator=generator, device="cpu")
        x = x.mul(2).round()  # many are equal
        x[:, :, ::4, ::3] = math.nan
        large = x.to(device, dtype).contiguous(memory_format=layout)
        pooled, switches = _find(large, 2)
        found = *max_pool(large), unpool(pooled, switches, shape[2:]), gather(large, switches)
        unpooled = _put(pooled, switches, shape[2:], 2)
        expected = pooled, switches, unpooled, _take(large, switches, 2)
        for ours, theirs in zip(found, expected):
            if not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError("the Triton kernels give other values than tensors")


@triton.jit
def _tile(rows, length, height, width, h, inner, tall: tl.constexpr, wide: tl.constexpr):
    """A program's places: in the small map, of the windows' corners in the large one, and mask."""
    row = (tl.program_id(0) * tall + tl.arange(0, tall))[:, None]
    at = (tl.program_id(1) * wide + tl.arange(0, wide))[None, :]
    start = (row // h).to(tl.int64) * height + 2 * (row % h)  # the row of the large map
    # value k of pixel j stands at j * inner + k in the small row, at 2 * j * inner + k in the large
    corner = start * width * inner + at + at // inner * inner
    return row.to(tl.int64) * length + at, corner, (row < rows) & (at < length)


@triton.jit
def _widened(value):
    """16 bits as the float32 of the same value, which compares as it should."""
    return value.to(tl.float32) if value.dtype.primitive_bitwidth < 32 else value


# Sizes that only change with the level of the network are no reason to compile anew. That a row's
# length is a multiple of 16 is one: then up to 16 bytes are read or written at a time.
_compiled = triton.jit(do_not_specialize=("rows", "height", "width", "h"))


@_compiled
def _pool_kernel(
    x, pooled, switches, rows, length, height, width, h, inner,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    at, corner, inside = _tile(rows, length, height, width, h, inner, tall, wide)
    best = _widened(tl.load(x + corner, inside))
    place = tl.full([tall, wide], 0, tl.uint8)
    for other in tl.static_range(1, 4):  # the first of equals, the last NaN
        step = (other // 2 * width + other % 2) * inner
        value = _widened(tl.load(x + corner + step, inside))
        larger = (value > best) | (value != value)
        best = tl.where(larger, value, best)
        place = tl.where(larger, other, place).to(tl.uint8)
    tl.store(pooled + at, best.to(pooled.dtype.element_ty), inside)
    tl.store(switches + at, place, inside)


@_compiled
def _unpool_kernel(
    unpooled, x, switches, rows, length, height, width, h, inner,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    at, corner, inside = _tile(rows, length, height, width, h, inner, tall, wide)
    value = tl.load(x + at, inside)
    switch = tl.load(switches + at, inside)
    for place in tl.static_range(4):
        step = (place // 2 * width + place % 2) * inner
        tl.store(unpooled + corner + step, tl.where(switch == place, value, 0), inside)


@_compiled
def _gather_kernel(
    x, gathered, switches, rows, length, height, width, h, inner,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    at, corner, inside = _tile(rows, length, height, width, h, inner, tall, wide)
    switch = tl.load(switches + at, inside).to(tl.int32)
    step = (switch // 2 * width + switch % 2) * inner
    value = tl.load(x + corner + step, inside & (switch < 4), other=0)
    tl.store(gathered + at, value, inside)


def _launch(kernel: triton.JITFunction, large: Tensor, small: Tensor, switches: Tensor) -> None:
    """Runs a kernel over all values of the small map, on the GPU where the maps are."""
    if not small.numel():
        return
    layout = _layout(large)  # of a map of 1 x 1 pixels it could not be told
    small, switches = (t.contiguous(memory_format=layout) for t in (small, switches))
    inner = small.shape[-3] if layout == torch.channels_last else 1
    h, w = small.shape[-2:]
    length = w * inner
    rows = small.numel() // length
    wide = min(TILE, triton.next_power_of_2(length))
    tall = TILE // wide
    with torch.cuda.device_of(small):
        kernel[triton.cdiv(rows, tall), triton.cdiv(length, wide)](
            large, small, switches, rows, length, *large.shape[-2:], h, inner, tall, wide
        )


def _dense(x: Tensor) -> Tensor:
    """The same values without gaps in memory."""
    return x.detach().contiguous(memory_format=_layout(x))
