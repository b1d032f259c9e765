"""Max pooling that remembers where each maximum was, and the unpooling that puts it back there.

Pooling keeps the largest value of each ``k x k`` window and forgets where it stood. The paper's
encoder keeps that place too, as a *switch* (Noh et al., 2015, section 3.2, after Zeiler and Fergus,
2014); the decoder's unpooling returns each value to its place and leaves zeros around it::

    input            maxima      switches     values       unpooled

     1  2 |  0  0                                            0  0 |  0  0
     3  4 |  9  0     4  9         3  2        20 30         0 20 | 30  0
    ------+------                                            ------+------
     5  0 |  0  7     5  7         0  1        40 50        40  0 |  0 50
     0  0 |  0  0                                            0  0 |  0  0

(the places of a 2 x 2 window are 0 1 in its upper row, 2 3 in its lower one).

The two are each other's derivative: the gradient of pooling is the gradient unpooled, and the
gradient of unpooling is the gradient gathered at the switches. All that either has to remember is
one byte per pooled value, an eighth of PyTorch's ``int64`` indices.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import Function

from deconvnet.hardware import compiled_kernels, gpu_kernels

MAX_KERNEL_SIZE = 16  # a switch is one byte, so a window holds at most 256 places

COMPILED_FROM = 2**12
"""Maps with fewer values are left to tensors: a compiled loop has to be fetched from the disk."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def max_pool2d_with_switches(x: Tensor, kernel_size: int = 2) -> tuple[Tensor, Tensor]:
    """Max pooling over windows that do not overlap, with the place of each maximum.

    Values, gradients, ties (the first of equals wins) and NaN (the last one wins) are those of
    :func:`torch.nn.functional.max_pool2d` with ``stride=kernel_size``. Rows and columns beyond the
    last full window are left out.

    Args:
        x: ``[N, C, H, W]`` or ``[C, H, W]``, any floating-point dtype and memory format.
        kernel_size: side ``k`` of a window in pixels, 1 to 16.

    Returns:
        The maxima and their switches, both ``[..., H // k, W // k]``. A switch is the maximum's
        row-major place in its window, ``uint8`` from 0 to ``k * k - 1``.

    Raises:
        ValueError: if ``x`` has another number of dimensions or is smaller than one window, or
            ``kernel_size`` is out of range.
        TypeError: if ``kernel_size`` is not an int.
    """
    _check_map("x", x, kernel_size)
    if min(x.shape[-2:]) < kernel_size:
        raise ValueError(
            f"x must be at least one {kernel_size} x {kernel_size} window large, "
            f"got shape {tuple(x.shape)}"
        )
    return _MaxPool.apply(x, kernel_size)


def unpool2d(
    x: Tensor,
    switches: Tensor,
    output_size: tuple[int, int] | None = None,
    kernel_size: int = 2,
    check_range: bool = True,
) -> Tensor:
    """Unpooling: each value goes to the place its switch names, zeros fill the rest.

    Equal to :func:`torch.nn.functional.max_unpool2d` on the indices that
    :func:`switches_to_indices` gives.

    Args:
        x: ``[N, C, h, w]`` or ``[C, h, w]``, any real dtype and memory format.
        switches: ``uint8``, the shape of ``x``, from :func:`max_pool2d_with_switches`.
        output_size: ``(H, W)`` of the result, where ``h * k <= H < (h + 1) * k`` and likewise
            ``W``: pass the size of what was pooled. By default ``(h * k, w * k)``.
        kernel_size: side ``k`` of a window in pixels, 1 to 16.
        check_range: whether to look through the switches for one that lies outside its window. On
            a GPU the look waits for the device, so a network that made its switches itself skips
            it; a value whose switch is out of range is then dropped. Skipped when compiling.

    Returns:
        ``[..., H, W]``, of the dtype and memory format of ``x``.

    Raises:
        ValueError: if a shape, a device, a switch, ``output_size`` or ``kernel_size`` does not
            fit.
        TypeError: if ``switches`` are not ``uint8`` or ``kernel_size`` is not an int.
    """
    _check_map("x", x, kernel_size)
    if switches.shape != x.shape:
        raise ValueError(
            f"switches must have the shape of x, {tuple(x.shape)}, got {tuple(switches.shape)}"
        )
    if switches.device != x.device:
        raise ValueError(f"switches must be on {x.device}, as x is, got {switches.device}")
    _check_switches(switches, kernel_size, check_range)
    pooled_size = x.shape[-2:]
    if output_size is None:
        output_size = tuple(kernel_size * side for side in pooled_size)
    _check_size("output_size", output_size, pooled_size, kernel_size)
    return _Unpool.apply(x, switches, tuple(output_size), kernel_size)


def switches_to_indices(
    switches: Tensor, input_size: tuple[int, int], kernel_size: int = 2
) -> Tensor:
    """The indices that PyTorch's pooling returns, from switches.

    Args:
        switches: ``uint8 [N, C, h, w]`` or ``[C, h, w]``.
        input_size: ``(H, W)`` of the map that was pooled.
        kernel_size: side ``k`` of a window in pixels, 1 to 16.

    Returns:
        ``int64``, the shape of ``switches``: ``row * W + column`` of each maximum, as from
        ``max_pool2d(..., return_indices=True)``.

    Raises:
        ValueError: if a shape, a switch, ``input_size`` or ``kernel_size`` does not fit.
        TypeError: if ``switches`` are not ``uint8`` or ``kernel_size`` is not an int.
    """
    _check_map("switches", switches, kernel_size)
    _check_switches(switches, kernel_size, check_range=True)
    _check_size("input_size", input_size, switches.shape[-2:], kernel_size)
    width = input_size[1]
    row, column = switches // kernel_size, switches % kernel_size
    return _window_corners(switches, width, kernel_size) + row.long() * width + column


def indices_to_switches(
    indices: Tensor, input_size: tuple[int, int], kernel_size: int = 2
) -> Tensor:
    """Switches from the indices that PyTorch's pooling returns.

    Args:
        indices: ``int64 [N, C, h, w]`` or ``[C, h, w]``, from
            ``max_pool2d(..., return_indices=True)`` with ``stride=kernel_size`` and no padding.
        input_size: ``(H, W)`` of the map that was pooled.
        kernel_size: side ``k`` of a window in pixels, 1 to 16.

    Returns:
        ``uint8``, the shape of ``indices``.

    Raises:
        ValueError: if a shape, ``input_size`` or ``kernel_size`` does not fit, or an index lies
            outside its window, as those of overlapping or padded windows do.
        TypeError: if ``indices`` are not ``int64`` or ``kernel_size`` is not an int.
    """
    _check_map("indices", indices, kernel_size)
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    _check_size("input_size", input_size, indices.shape[-2:], kernel_size)
    width = input_size[1]
    offset = indices - _window_corners(indices, width, kernel_size)
    row, column = offset // width, offset % width
    if not ((row >= 0) & (row < kernel_size) & (column < kernel_size)).all():
        raise ValueError(
            f"indices must lie within their {kernel_size} x {kernel_size} windows of an input of "
            f"size {tuple(input_size)}; were they pooled with another kernel, stride or padding?"
        )
    return (row * kernel_size + column).to(torch.uint8)


class MaxPool2dWithSwitches(nn.Module):
    """:func:`max_pool2d_with_switches` as a module.

    Args:
        kernel_size: side of a window in pixels, 1 to 16.
    """

    def __init__(self, kernel_size: int = 2) -> None:
        super().__init__()
        _check_kernel_size(kernel_size)
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pool ``x``, ``[N, C, H, W]`` or ``[C, H, W]``, to its maxima and their switches."""
        return max_pool2d_with_switches(x, self.kernel_size)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"kernel_size={self.kernel_size}"


class Unpool2d(nn.Module):
    """:func:`unpool2d` as a module.

    Args:
        kernel_size: side of a window in pixels, 1 to 16.
        check_range: whether to look for switches that lie outside their window.
    """

    def __init__(self, kernel_size: int = 2, check_range: bool = True) -> None:
        super().__init__()
        _check_kernel_size(kernel_size)
        self.kernel_size = kernel_size
        self.check_range = check_range

    def forward(
        self, x: Tensor, switches: Tensor, output_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Unpool ``x``, ``[N, C, h, w]`` or ``[C, h, w]``, by ``switches`` to ``output_size``."""
        return unpool2d(x, switches, output_size, self.kernel_size, self.check_range)

    def extra_repr(self) -> str:
        """What ``print`` shows between the brackets."""
        return f"kernel_size={self.kernel_size}, check_range={self.check_range}"


class _Gather(Function):
    """``[..., H, W] -> [..., h, w]``: the value at each switch. Its derivative unpools."""

    @staticmethod
    def forward(ctx, x: Tensor, switches: Tensor, kernel_size: int) -> Tensor:
        kernels = _kernels_for(x, kernel_size)
        gathered = kernels.gather(x, switches) if kernels else _take(x, switches, kernel_size)
        ctx.save_for_backward(switches)
        ctx.size, ctx.kernel_size = x.shape[-2:], kernel_size
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (switches,) = ctx.saved_tensors
        return _Unpool.apply(gradient, switches, ctx.size, ctx.kernel_size), None, None


class _Unpool(Function):
    """``[..., h, w] -> [..., H, W]``: each value to its switch. Its derivative gathers."""

    @staticmethod
    def forward(
        ctx, x: Tensor, switches: Tensor, size: tuple[int, int], kernel_size: int
    ) -> Tensor:
        kernels = _kernels_for(x, kernel_size)
        unpooled = (
            kernels.unpool(x, switches, size) if kernels else _put(x, switches, size, kernel_size)
        )
        ctx.save_for_backward(switches)
        ctx.kernel_size = kernel_size
        return unpooled

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (switches,) = ctx.saved_tensors
        return _Gather.apply(gradient, switches, ctx.kernel_size), None, None, None


class _MaxPool(Function):
    """``[..., H, W] -> [..., h, w]``: the maxima and their switches. Its derivative unpools."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
        kernels = _kernels_for(x, kernel_size)
        pooled, switches = kernels.max_pool(x) if kernels else _find(x, kernel_size)
        ctx.save_for_backward(switches)
        ctx.mark_non_differentiable(switches)
        ctx.set_materialize_grads(False)  # no zeros as the switches' gradient
        ctx.size, ctx.kernel_size = x.shape[-2:], kernel_size
        return pooled, switches

    @staticmethod
    def backward(ctx, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # nothing depends on the maxima
            return None, None
        (switches,) = ctx.saved_tensors
        return _Unpool.apply(gradient, switches, ctx.size, ctx.kernel_size), None


def _find(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """The largest value of every window, and its place."""
    *others, last = _places(x, kernel_size)
    pooled = last.clone()
    switches = torch.full_like(pooled, len(others), dtype=torch.uint8)
    # Backwards, so that the first of equal values has the last word; NaN never gives way.
    for place, value in reversed(list(enumerate(others))):
        stays = (value < pooled) | pooled.isnan()
        pooled = torch.maximum(pooled, value)
        switches = _keep(switches, stays).clamp(min=place)
    return pooled, switches


def _put(x: Tensor, switches: Tensor, size: tuple[int, int], kernel_size: int) -> Tensor:
    """Zeros of that size, and in every window the value at its place."""
    unpooled = _empty(x, size).zero_()
    for place, values in enumerate(_places(unpooled, kernel_size)):
        values.copy_(_keep(x, switches == place))
    return unpooled


def _take(x: Tensor, switches: Tensor, kernel_size: int) -> Tensor:
    """What stands at the place of every window."""
    first, *others = _places(x, kernel_size)
    taken = _keep(first, switches == 0)
    for place, value in enumerate(others, start=1):
        taken += _keep(value, switches == place)
    return taken


def _kernels_for(x: Tensor, kernel_size: int) -> ModuleType | None:
    """Compiled code that finds, puts and takes in maps like this one, if there is any."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return None
    if kernel_size != 2 or x.element_size() not in _BITS:
        return None
    if x.is_cuda:
        return gpu_kernels(x.device)
    on_cpu = x.device.type == "cpu"
    return compiled_kernels() if on_cpu and x.numel() >= COMPILED_FROM else None


def _places(x: Tensor, kernel_size: int) -> list[Tensor]:
    """One view ``[..., h, w]`` of ``x`` for each place: what stands there in every window."""
    height, width = (side // kernel_size * kernel_size for side in x.shape[-2:])
    return [
        x[..., row:height:kernel_size, column:width:kernel_size]
        for row in range(kernel_size)
        for column in range(kernel_size)
    ]


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` is true, zeros elsewhere."""
    if torch.compiler.is_compiling():
        return torch.where(mask, x, 0)
    # Uncompiled on a CPU, a product is twice as fast as torch.where. Its factor is the bits of
    # the number, not the number: 0 * NaN would be NaN.
    return (_bits(x) * mask).view(x.dtype)


def _layout(x: Tensor) -> torch.memory_format:
    """Channels-last if the map lies so in memory, else plane by plane."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty(x: Tensor, size: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map of another height and width than ``x``, in its memory format."""
    shape, dtype = (*x.shape[:-2], *size), dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_layout(x))


def _bits(x: Tensor) -> Tensor:
    """The same memory as whole numbers: moving a value needs no arithmetic, NaN stays NaN."""
    return x.view(_BITS[x.element_size()])


def _window_corners(pooled: Tensor, width: int, kernel_size: int) -> Tensor:
    """``int64 [h, w]``: flat index of each window's first value in a map ``width`` wide."""
    rows, columns = (
        torch.arange(side, device=pooled.device) * kernel_size for side in pooled.shape[-2:]
    )
    return rows[:, None] * width + columns


def _check_kernel_size(kernel_size: int) -> None:
    if not isinstance(kernel_size, int):
        raise TypeError(f"kernel_size must be an int, got {kernel_size!r}")
    if not 1 <= kernel_size <= MAX_KERNEL_SIZE:
        raise ValueError(f"kernel_size must be from 1 to {MAX_KERNEL_SIZE}, got {kernel_size}")


def _check_map(name: str, x: Tensor, kernel_size: int) -> None:
    _check_kernel_size(kernel_size)
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{name} must be [N, C, height, width] or [C, height, width], "
            f"got shape {tuple(x.shape)}"
        )


def _check_switches(switches: Tensor, kernel_size: int, check_range: bool) -> None:
    if switches.dtype != torch.uint8:
        raise TypeError(
            f"switches must be uint8, got {switches.dtype}; "
            "indices_to_switches converts the indices of PyTorch's pooling"
        )
    if check_range and not torch.compiler.is_compiling() and switches.numel():
        largest = int(switches.max())
        if largest >= kernel_size**2:
            raise ValueError(
                f"switches must be below {kernel_size**2} for kernel_size {kernel_size}, "
                f"got {largest}"
            )


def _check_size(
    name: str, size: tuple[int, int], pooled_size: tuple[int, int], kernel_size: int
) -> None:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width), got {size}")
    if any(full // kernel_size != side for full, side in zip(size, pooled_size)):
        smallest = tuple(side * kernel_size for side in pooled_size)
        largest = tuple(side + kernel_size - 1 for side in smallest)
        raise ValueError(
            f"{name} must be from {smallest} to {largest} for windows of {kernel_size} x "
            f"{kernel_size} and a pooled size of {tuple(pooled_size)}, got {tuple(size)}"
        )
