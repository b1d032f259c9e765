"""Loops that pass over memory once, compiled by Numba where it is installed.

Written with tensors, pooling with switches reads and writes its map a dozen times: once for every
comparison and every choice. A compiled loop looks at each window once. The loops here compute
exactly what :mod:`deconvnet.unpooling` does with tensors, and the sums before and after the matrix
products of :class:`deconvnet.winograd.WinogradConvolution`. Both do without where Numba is missing:
they ask :func:`deconvnet.hardware.compiled_kernels` for this module, which nothing else imports.

Maps lie channels-last in memory, ``[N, H, W, C]``, or plane by plane, ``[N C, H, W]``. A processor
works on neighbouring values together, sixteen at once: in the first case those of a pixel's
channels, in the second those of a row. So there are two loops for each task.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from deconvnet.openmp import in_parallel, threads_for
from deconvnet.unpooling import _bits, _empty, _layout

SHORT = 8
"""Values for each byte of one: a shorter row has ended before a loop over vectors begins."""

TOGETHER = 256
"""Maxima of short rows that are found in one loop over vectors, or a row more."""

# Without Python's lock, so that threads share the work; the machine code is kept on disk.
_loop = numba.njit(nogil=True, cache=True, error_model="numpy")
_sums = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


# --- 2 x 2 pooling and unpooling --------------------------------------------------------------


def max_pool(x: Tensor, tie: float = 0.0) -> tuple[Tensor, Tensor]:
    """The maxima of 2 x 2 windows and their switches.

    Args:
        x: ``[..., H, W]`` of 3 or 4 dimensions, any floating-point dtype, on the CPU.
        tie: Up to what share of an earlier value a later one that is larger counts as its equal;
            more than 0 only for maps without negative values.

    Returns:
        As :func:`deconvnet.unpooling.max_pool2d_with_switches`, without a gradient.
    """
    if x.dtype == torch.bfloat16:
        readable, wide = x.view(torch.uint16), torch.float32  # which _number understands
    else:  # Numba does not know 16 bits
        readable = x if x.element_size() >= 4 else x.float()
        wide = readable.dtype
    pooled = _empty(x, (x.shape[-2] // 2, x.shape[-1] // 2), wide)
    switches = torch.empty_like(pooled, dtype=torch.uint8)
    beyond = pooled.numpy().dtype.type(1 + tie)
    _share_rows(_pool, readable, pooled, switches, settings=(beyond,))
    return pooled.to(x.dtype), switches


def unpool(x: Tensor, switches: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Every value at its switch in a 2 x 2 window, zeros around it.

    Args:
        x: ``[..., h, w]`` of 3 or 4 dimensions, any real dtype, on the CPU.
        switches: ``uint8``, the shape of ``x``, from 0 to 3; others drop their value.
        size: ``(H, W)`` of the result: ``2 h`` (the default) or ``2 h + 1``, and likewise ``W``.
    """
    even = 2 * x.shape[-2], 2 * x.shape[-1]
    unpooled = _empty(x, size or even)
    if unpooled.shape[-2:] != even:
        unpooled.zero_()  # the loop leaves an odd last row or column alone
    _share_rows(_unpool, _bits(unpooled), _bits(x), switches)
    return unpooled


def gather(x: Tensor, switches: Tensor) -> Tensor:
    """The value at the switch of each 2 x 2 window: what :func:`unpool` put there.

    Args:
        x: ``[..., H, W]`` of 3 or 4 dimensions, any real dtype, on the CPU.
        switches: ``uint8 [..., H // 2, W // 2]``, from 0 to 3; others give zero.
    """
    gathered = _empty(x, switches.shape[-2:])
    _share_rows(_gather, _bits(x), _bits(gathered), switches)
    return gathered


@_loop
def _largest(a, b, c, d, beyond):
    """The largest of four and its place; the first of equals, the last NaN.

    A later one must be larger than ``beyond`` times an earlier one: 1, or a little more.
    """
    best, place = a, 0
    if b > best * beyond or b != b:
        best, place = b, 1
    if c > best * beyond or c != c:
        best, place = c, 2
    if d > best * beyond or d != d:
        best, place = d, 3
    return best, place


@_loop
def _widened(bits):
    """A bfloat16 by its 16 bits: the first half of the float32 of the same value."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _number(x):
    """What a loop has read, as a number: Numba does not know bfloat16, only its bits."""
    return _widened(x) if isinstance(x, np.uint16) else x


@numba.extending.overload(_number)
def _compiled_number(x):
    return (lambda x: _widened(x)) if x == numba.types.uint16 else (lambda x: x)


@_loop
def _pool_pixels(start, stop, x, pooled, switches, beyond):
    height, width, channels = pooled.shape[1:]
    for row in range(start, stop):
        n, i = row // height, row % height
        for j in range(width):
            for k in range(channels):
                pooled[n, i, j, k], switches[n, i, j, k] = _largest(
                    _number(x[n, 2 * i, 2 * j, k]),
                    _number(x[n, 2 * i, 2 * j + 1, k]),
                    _number(x[n, 2 * i + 1, 2 * j, k]),
                    _number(x[n, 2 * i + 1, 2 * j + 1, k]),
                    beyond,
                )


@_loop
def _pool_planes(start, stop, x, pooled, switches, beyond):
    height, width = pooled.shape[1:]
    if width < SHORT * 4:
        _pool_short_rows(start, stop, x, pooled, switches, beyond)
        return
    for row in range(start, stop):
        n, i = row // height, row % height
        for j in range(width):
            pooled[n, i, j], switches[n, i, j] = _largest(
                _number(x[n, 2 * i, 2 * j]),
                _number(x[n, 2 * i, 2 * j + 1]),
                _number(x[n, 2 * i + 1, 2 * j]),
                _number(x[n, 2 * i + 1, 2 * j + 1]),
                beyond,
            )


@_loop
def _pool_short_rows(start, stop, x, pooled, switches, beyond):
    """Many rows at a time: the maxima of one lie in memory right after those of the last one."""
    height, width = pooled.shape[1:]
    together = TOGETHER // width + 1
    a, b, c, d = np.empty((4, together * width), x.dtype)  # the windows' corners, side by side
    flat_pooled, flat_switches = pooled.reshape(-1), switches.reshape(-1)
    for first in range(start, stop, together):
        rows = min(together, stop - first)
        for r in range(rows):
            n, i = (first + r) // height, (first + r) % height
            upper, lower, place = x[n, 2 * i], x[n, 2 * i + 1], r * width
            for j in range(width):
                a[place + j], b[place + j] = upper[2 * j], upper[2 * j + 1]
                c[place + j], d[place + j] = lower[2 * j], lower[2 * j + 1]
        place = first * width
        for k in range(rows * width):
            flat_pooled[place + k], flat_switches[place + k] = _largest(
                _number(a[k]), _number(b[k]), _number(c[k]), _number(d[k]), beyond
            )


@_loop
def _unpool_pixels(start, stop, unpooled, x, switches):
    height, width, channels = x.shape[1:]
    for row in range(start, stop):
        n, i = row // height, row % height
        for j in range(width):
            for place in range(4):
                for k in range(channels):
                    here = switches[n, i, j, k] == place
                    value = x[n, i, j, k] if here else 0
                    unpooled[n, 2 * i + place // 2, 2 * j + place % 2, k] = value


@_loop
def _unpool_planes(start, stop, unpooled, x, switches):
    height, width = x.shape[1:]
    for row in range(start, stop):
        n, i = row // height, row % height
        for below in range(2):
            for j in range(width):
                value, switch = x[n, i, j], switches[n, i, j]
                unpooled[n, 2 * i + below, 2 * j] = value if switch == 2 * below else 0
                unpooled[n, 2 * i + below, 2 * j + 1] = value if switch == 2 * below + 1 else 0


@_loop
def _chosen(switch, a, b, c, d):
    """One of four whole numbers by its place; zero for another place."""
    return a * (switch == 0) + b * (switch == 1) + c * (switch == 2) + d * (switch == 3)


@_loop
def _gather_pixels(start, stop, x, gathered, switches):
    height, width, channels = gathered.shape[1:]
    for row in range(start, stop):
        n, i = row // height, row % height
        for j in range(width):
            for k in range(channels):
                gathered[n, i, j, k] = _chosen(
                    switches[n, i, j, k],
                    x[n, 2 * i, 2 * j, k],
                    x[n, 2 * i, 2 * j + 1, k],
                    x[n, 2 * i + 1, 2 * j, k],
                    x[n, 2 * i + 1, 2 * j + 1, k],
                )


@_loop
def _gather_planes(start, stop, x, gathered, switches):
    height, width = gathered.shape[1:]
    for row in range(start, stop):
        n, i = row // height, row % height
        if width <= SHORT * x.itemsize:
            for j in range(width):
                switch = switches[n, i, j]
                here = switch < 4
                gathered[n, i, j] = x[n, 2 * i + switch // 2, 2 * j + switch % 2] if here else 0
            continue
        for j in range(width):
            gathered[n, i, j] = _chosen(
                switches[n, i, j],
                x[n, 2 * i, 2 * j],
                x[n, 2 * i, 2 * j + 1],
                x[n, 2 * i + 1, 2 * j],
                x[n, 2 * i + 1, 2 * j + 1],
            )


@_loop
def _pool(rows, threads, x, pooled, switches, beyond):
    if x.ndim == 4:
        in_parallel(_pool_pixels, rows, threads, (x, pooled, switches, beyond))
    else:
        in_parallel(_pool_planes, rows, threads, (x, pooled, switches, beyond))


@_loop
def _unpool(rows, threads, unpooled, x, switches):
    if x.ndim == 4:
        in_parallel(_unpool_pixels, rows, threads, (unpooled, x, switches))
    else:
        in_parallel(_unpool_planes, rows, threads, (unpooled, x, switches))


@_loop
def _gather(rows, threads, x, gathered, switches):
    if x.ndim == 4:
        in_parallel(_gather_pixels, rows, threads, (x, gathered, switches))
    else:
        in_parallel(_gather_planes, rows, threads, (x, gathered, switches))


def _share_rows(loop: Callable, large: Tensor, *small: Tensor, settings: tuple = ()) -> None:
    """Runs the loop over all rows of windows, in the layout of ``large``."""
    layout = _layout(large)
    pixels = layout == torch.channels_last

    def array(x: Tensor) -> np.ndarray:
        x = x.detach().contiguous(memory_format=layout)
        planes = math.prod(x.shape[:-2]), *x.shape[-2:]
        return (x.permute(0, 2, 3, 1) if pixels else x.view(planes)).numpy()

    arrays = [array(x) for x in (large, *small)]
    rows = arrays[-1].shape[0] * arrays[-1].shape[1]
    loop(rows, threads_for(large.numel()), *arrays, *settings)


# --- Winograd's sums --------------------------------------------------------------------------


@_sums
def transform_input(x, matrix, first, tiles):
    """Sums and differences of the 6 x 6 values under each tile of 4 x 4 outputs.

    Args:
        x: ``[N, H, W, C]``, the map that is convolved.
        matrix: ``[6, 6]``, applied to the rows and then to the columns of every tile.
        first: The output row with which the first row of tiles begins.
        tiles: ``[6, 6, N, rows, columns, C]``, is filled.
    """
    height, width, channels = x.shape[1:]
    number, rows, columns = tiles.shape[2:5]
    mixed = np.zeros((4 * columns + 2, channels), x.dtype)  # a row, with zeros around it
    for n in range(number):
        for i in range(rows):
            top = first + 4 * i - 1
            for p in range(6):
                if top >= 0 and top + 6 <= height:
                    a, b, c, d, e, f = matrix[p]
                    for w in range(width):
                        for k in range(channels):
                            mixed[1 + w, k] = (
                                a * x[n, top, w, k]
                                + b * x[n, top + 1, w, k]
                                + c * x[n, top + 2, w, k]
                                + d * x[n, top + 3, w, k]
                                + e * x[n, top + 4, w, k]
                                + f * x[n, top + 5, w, k]
                            )
                else:  # beyond the map there are zeros
                    mixed[:] = 0
                    for row in range(max(top, 0), min(top + 6, height)):
                        for w in range(width):
                            for k in range(channels):
                                mixed[1 + w, k] += matrix[p, row - top] * x[n, row, w, k]
                for q in range(6):
                    a, b, c, d, e, f = matrix[q]
                    for j in range(columns):
                        for k in range(channels):
                            tiles[p, q, n, i, j, k] = (
                                a * mixed[4 * j, k]
                                + b * mixed[4 * j + 1, k]
                                + c * mixed[4 * j + 2, k]
                                + d * mixed[4 * j + 3, k]
                                + e * mixed[4 * j + 4, k]
                                + f * mixed[4 * j + 5, k]
                            )


@_sums
def transform_output(products, matrix, bias, least, first, y):
    """Combines the products of each tile to 4 x 4 outputs.

    Args:
        products: ``[6, 6, N, rows, columns, D]``.
        matrix: ``[4, 6]``, applied to the rows and then to the columns of every tile.
        bias: ``[D]``, is added to each output.
        least: Outputs below are raised to it: 0 for a ReLU, minus infinity for none.
        first: The output row with which the first row of tiles begins.
        y: ``[N, H, W, D]``, is filled from there on; what a tile has beyond it is left out.
    """
    height, width, channels = y.shape[1:]
    number, rows, columns = products.shape[2:5]
    mixed = np.empty((6, channels), y.dtype)
    for n in range(number):
        for i in range(rows):
            for j in range(columns):
                for p in range(min(4, height - first - 4 * i)):
                    a, b, c, d, e, f = matrix[p]
                    for q in range(6):
                        for k in range(channels):
                            mixed[q, k] = (
                                a * products[0, q, n, i, j, k]
                                + b * products[1, q, n, i, j, k]
                                + c * products[2, q, n, i, j, k]
                                + d * products[3, q, n, i, j, k]
                                + e * products[4, q, n, i, j, k]
                                + f * products[5, q, n, i, j, k]
                            )
                    for q in range(min(4, width - 4 * j)):
                        a, b, c, d, e, f = matrix[q]
                        for k in range(channels):
                            value = (
                                bias[k]
                                + a * mixed[0, k]
                                + b * mixed[1, k]
                                + c * mixed[2, k]
                                + d * mixed[3, k]
                                + e * mixed[4, k]
                                + f * mixed[5, k]
                            )
                            value = least if value < least else value  # NaN stays
                            y[n, first + 4 * i + p, 4 * j + q, k] = value


# --- threads ----------------------------------------------------------------------------------

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for what is needed only for a moment: each thread keeps it for the next time.

    Large pieces that are given back and asked for again are cleared by the operating system each
    time, which takes longer than to use them.

    Args:
        name: Of the piece; the next call with this name reuses it.
        shape: Of the tensor.
        dtype: Of the tensor, whose content is arbitrary.
    """
    size = math.prod(shape)
    kept = getattr(_kept, name, None)
    if kept is None or kept.dtype != dtype or len(kept) < size:
        with torch.inference_mode(False):  # of use in that mode and out of it
            kept = torch.empty(size, dtype=dtype)
        setattr(_kept, name, kept)
    return kept[:size].view(shape)


def share(work: Callable, pieces: Iterable[tuple]) -> list:
    """Does independent pieces of work side by side, on as many threads as PyTorch uses.

    A thread that takes its piece through many steps finds it in its own cache at each of them, and
    waits for the others only once.

    Args:
        work: Called as ``work(*piece)``. What it asks of PyTorch runs on that one thread, without
            gradients.
        pieces: Arguments, one tuple for each call.

    Returns:
        What each call returned, in the order of ``pieces``.
    """
    pieces = list(pieces)
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        return [work(*piece) for piece in pieces]
    quiet = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    return list(_workers(torch.get_num_threads()).map(quiet()(work), *zip(*pieces)))


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads, each of which PyTorch takes for the only one."""
    pool = ThreadPoolExecutor(threads, "deconvnet")
    all_started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # PyTorch settles it for this thread at the first question
        all_started.wait()

    for _ in range(threads):
        pool.submit(start)
    all_started.wait()
    torch.set_num_threads(threads)  # what a worker set would hold for all later threads too
    return pool


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_workers.cache_clear)
