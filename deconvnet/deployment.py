"""The same network, faster: what can be rearranged once nothing is learned any more.

The network that the book teaches stays plain. Before it is used, :func:`prepare_for_inference`
rewrites a copy of it by seven rules, none of which changes what it computes but for rounding (which
may move a few switches):

1. *Batch norm is folded.* With fixed statistics it scales and shifts each channel, and so do the
   convolution's own weights and bias.
2. *A stride-1 deconvolution is a convolution* with the kernel turned by 180 degrees and the
   channels exchanged, for which processors have faster code.
3. *A convolution over all of its input is a matrix product*: ``fc6`` sees the whole 7 x 7 map at
   once, and its mirror image draws the whole of it. Training computes both so too, by
   :func:`matrix_products`.
4. *Maps stay in the cache.* Each block takes only as many crops at once as its maps fit there,
   and the library's own pooling and unpooling, with eight bytes a place, work on such a part.
5. *Neighbouring outputs share multiplications*: :mod:`deconvnet.winograd` needs a quarter of
   them where a map has many channels; not in bfloat16 where matrix units make them cheap.
6. *Loops pass over memory once*, compiled by Numba where that is installed: pooling, unpooling and
   Winograd's sums. Each processor core takes its own crops through a block.
7. *Sixteen bits are enough* where the hardware multiplies them, but for two choices. The encoder
   chooses switches, and a value that lands one pixel away is a large error; scores choose labels.

The last trades exactness for speed; the others are safe. Rules 4 to 6 are for CPUs only: a GPU's
libraries do the like on their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deconvnet.hardware import compiled_kernels
from deconvnet.model import Decoder, DeconvNet, Encoder
from deconvnet.unpooling import _window_corners, unpool2d
from deconvnet.winograd import CACHE_BYTES, WinogradConvolution, winograd

LARGE = 2**20
"""Values of a crop's first map from which on it pays that threads work on separate crops."""

TIE = 100
"""Units in the last place by which a value must be larger than another in its window to win.

Where an image is of one colour, all four are equal, and the first one wins. The sums of rule 5
round each by its place in the tile, and would choose among them at random. So this is for the
first two blocks: deeper ones see so much at once that hardly anything is of one colour.
"""

GROUP = 8
"""The largest number of crops that one thread takes through all blocks."""


def prepare_for_inference(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype | None = None,
    rules: int = 6,
    same_switches: bool = False,
) -> nn.Module:
    """Returns a faster copy of a network, for inference only, on the network's device.

    Args:
        model: A :class:`~deconvnet.model.DeconvNet` or :class:`~deconvnet.fcn.FCN8s`.
        dtype: What the copy computes in: ``float32``, or ``bfloat16`` or ``float16`` where the
            hardware has it.
        encoder_dtype: What a DeconvNet's encoder and score layer compute in. By default ``dtype``
            on a GPU and at least ``float32`` on a CPU. That costs little where 16 bits are
            multiplied twice as fast as 32, and half of the speed where there are matrix units.
            With ``same_switches`` it is ``model``'s own.
        rules: 3, 4 or 5 leaves out the rules from the next to 6, to see what each is worth.
        same_switches: Whether a DeconvNet's encoder chooses the very switches that ``model`` does.
            Rules 1, 5 and 7 then leave it alone, so that its sums keep their order; on a CPU that
            takes about half as long again. It holds as far as the library's convolutions round
            alike in every layout and number of crops, as those for x86 processors do. A network
            without switches is prepared as ever.

    Returns:
        A network that is called as ``model`` is, in evaluation mode, channels-last, without
        gradients; not under autocast, since its layers have their precision already. In float32
        its scores are ``model``'s but for rounding, and but for what a rounding does that moves a
        switch. A DeconvNet's come back in ``encoder_dtype``, an FCN's in ``dtype``.

    Raises:
        TypeError: A dtype is not floating.
        ValueError: ``model`` has been prepared already, ``rules`` is not from 3 to 6, or
            ``encoder_dtype`` would change the switches that are to stay the same.
    """
    if rules not in range(3, 7):
        raise ValueError(f"rules must be 3, 4, 5 or 6, got {rules}")
    if getattr(model, "prepared", False):
        raise ValueError("the network is prepared already; prepare the one that was trained")
    learned = next(model.parameters())
    on_cpu = learned.device.type == "cpu"
    untouched = "encoder" if same_switches and isinstance(model, DeconvNet) else None
    if encoder_dtype is None:
        exact = on_cpu and isinstance(model, DeconvNet) and dtype.itemsize < 4
        encoder_dtype = learned.dtype if untouched else torch.float32 if exact else dtype
    for name, given in (("dtype", dtype), ("encoder_dtype", encoder_dtype)):
        if not given.is_floating_point:
            raise TypeError(f"{name} must be floating, got {given}")
    if untouched and encoder_dtype != learned.dtype:
        raise ValueError(
            "with same_switches the encoder stays what it is: encoder_dtype must be "
            f"{learned.dtype}, got {encoder_dtype}"
        )
    compiled = on_cpu and rules >= 6 and compiled_kernels() is not None
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast.prepared = True
    for name, part in fast.named_children():
        if name != untouched:
            fold_batch_norm(part)
    products = as_matrix_products(fast)
    _replace(
        fast,
        nn.ConvTranspose2d,
        lambda d: as_convolution(d) if d.stride == (1, 1) and d not in products else d,
    )
    for name, part in fast.named_children():
        chooses = name in ("encoder", "score") and isinstance(fast, DeconvNet)
        part_dtype = encoder_dtype if chooses else dtype
        if on_cpu and rules >= 5 and name != untouched:
            _replace(part, nn.Conv2d, lambda c, d=part_dtype: winograd(c, d, compiled))
        if name != "normalise":  # that computes in float32: 255 - 123.675 has more than 8 bits
            part.to(part_dtype, memory_format=torch.channels_last)
    if compiled:
        _fuse_relu(fast)
    normalise = fast.normalise if untouched else fast.normalise.float()
    fast.normalise = nn.Sequential(normalise, CastTo(encoder_dtype))
    if isinstance(fast, DeconvNet):
        fast.fc6.insert(0, CastTo(dtype))
        fast.score = nn.Sequential(CastTo(encoder_dtype), fast.score)
        if on_cpu and rules >= 4:
            widths, side = fast.config.widths, fast.config.input_size
            shared = compiled and widths[0] * side**2 >= LARGE
            threads = torch.get_num_threads() if shared else 1  # each has a share of the cache
            at_once = crops_at_once(widths, side, encoder_dtype, threads)
            fast.encoder = EncoderInParts(fast.encoder, at_once, compiled, shared)
            at_once = crops_at_once(widths, side, dtype, threads)
            if type(fast.score[1]) is nn.Conv2d and fast.score[1].kernel_size == (1, 1):
                fast.score[1].__class__ = ScoresByPlane
            fast.decoder = DecoderInParts(fast.decoder, fast.score, at_once, compiled, shared)
            fast.score = nn.Identity()  # the decoder's last block does it, part by part
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


class ConvolutionOfAll(nn.Conv2d):
    """A convolution whose kernel is as large as its input, computed as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, 1, 1]`` for ``x`` of ``[N, C, k, k]``."""
        # what lies channels-last in memory is flattened without a copy
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, self.bias)[:, :, None, None]


class DeconvolutionToAll(nn.ConvTranspose2d):
    """A deconvolution of a single vector, computed as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, k, k]``, channels-last, for ``x`` of ``[N, C, 1, 1]``."""
        weight = self.weight.permute(0, 2, 3, 1)
        maps = (x.flatten(1) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        return (maps + self.bias.to(maps.dtype)).permute(0, 3, 1, 2)


def as_matrix_products(model: nn.Module) -> dict[nn.Module, type]:
    """Rule 3, in place: a DeconvNet's fc layers compute as the matrix products that they are.

    A library brings the large kernel of a convolution into an order of its own, and its gradient
    back, which takes longer than the product where crops are few.

    Args:
        model: A :class:`~deconvnet.model.DeconvNet`, or a network around one. Its layers change
            their class, but neither weights nor names; any other network stays as it is.

    Returns:
        The layers, and the class that each had before.
    """
    before: dict[nn.Module, type] = {}
    for network in model.modules():
        if isinstance(network, DeconvNet):
            for part, kind in (
                (network.fc6, ConvolutionOfAll),
                (network.fc7, ConvolutionOfAll),
                (network.fc6_deconv, DeconvolutionToAll),
            ):
                layer = part[0]
                if type(layer) is kind.__base__:  # not one with a forward pass of its own
                    before[layer] = type(layer)
                    layer.__class__ = kind
    return before


@contextmanager
def matrix_products(model: nn.Module) -> Iterator[None]:
    """Rule 3 for as long as a network learns; afterwards its layers are what they were.

    Args:
        model: As for :func:`as_matrix_products`.
    """
    before = as_matrix_products(model)
    try:
        yield
    finally:
        for layer, kind in before.items():
            layer.__class__ = kind


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Rule 1, in place: removes every batch norm that follows a convolution in a ``Sequential``.

    Args:
        module: In evaluation mode.

    Returns:
        The same module, which computes what it did, but for rounding.
    """
    for child in module.children():
        fold_batch_norm(child)
    if isinstance(module, nn.Sequential):
        for i in reversed(range(1, len(module))):  # from the end, since folding removes layers
            layer, norm = module[i - 1], module[i]
            if isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(layer, nn.ConvTranspose2d)
                module[i - 1] = fuse_conv_bn_eval(layer, norm, transposed)
                del module[i]
    return module


def _replace(module: nn.Module, kind: type, other: Callable[[nn.Module], nn.Module]) -> None:
    """Puts ``other(layer)`` in the place of every layer of a kind below ``module``."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, other(child))
        else:
            _replace(child, kind, other)


def _fuse_relu(module: nn.Module) -> None:
    """Lets compiled convolutions do the ReLU that follows them, while they write their output."""
    for child in module.modules():
        if isinstance(child, nn.Sequential) and len(child) == 2:
            layer, activation = child
            if getattr(layer, "compiled", False) and isinstance(activation, nn.ReLU):
                layer.least = 0.0
                del child[1]


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


# --- rule 4: maps that stay in the cache ------------------------------------------------------


def crops_at_once(
    widths: Sequence[int], input_size: int, dtype: torch.dtype, threads: int = 1
) -> list[int]:
    """How many crops each block takes so that one of its maps has at most ``CACHE_BYTES``.

    Args:
        widths: Channels of the blocks, from the image down, each at half the size of the last.
        input_size: Side of a crop in pixels.
        dtype: Of the maps.
        threads: That share the cache, each with maps of its own.
    """
    maps = (
        width * (input_size >> level) ** 2 * dtype.itemsize for level, width in enumerate(widths)
    )
    return [max(1, CACHE_BYTES // threads // size) for size in maps]


class EncoderInParts(nn.Module):
    """An encoder whose blocks take a few crops at a time.

    Args:
        encoder: What it computes.
        at_once: Crops for each block, from the image down.
        compiled: Whether to use :mod:`deconvnet.kernels`.
        shared: Whether each thread takes its own crops.
    """

    def __init__(
        self,
        encoder: Encoder,
        at_once: Sequence[int],
        compiled: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.blocks, self.at_once = encoder.blocks, at_once
        self.compiled, self.shared = compiled, shared

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the deepest pooled map alone in its list, and the switches of all five."""
        deepest, *switches = map(_joined, zip(*_in_groups(self._encode, (x,), self.shared)))
        return [deepest], switches

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        switches = []
        for i, (block, count) in enumerate(zip(self.blocks, self.at_once)):
            pool = self._pool_after(block, i, x.dtype)
            x, where = map(_joined, zip(*[pool(block(part)) for part in x.split(count)]))
            switches.append(where)
        return x, *switches

    def _pool_after(self, block: nn.Module, i: int, dtype: torch.dtype) -> Callable:
        if not self.compiled:
            return library_pool
        by_tiles = any(isinstance(layer, WinogradConvolution) for layer in block.modules())
        tied = by_tiles and i < 2 and dtype.itemsize >= 4
        tie = TIE * torch.finfo(dtype).eps if tied else 0.0
        return partial(compiled_kernels().max_pool, tie=tie)


class ScoresByPlane(nn.Conv2d):
    """A 1 x 1 convolution whose output lies plane by plane: in that order scores are pasted."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, H, W]``, contiguous, for ``x`` of ``[N, C, H, W]``, channels-last."""
        scores = x.new_empty(len(x), self.out_channels, *x.shape[2:])
        for pixels, planes in zip(x.flatten(2), scores.flatten(2)):
            torch.addmm(self.bias[:, None], self.weight.flatten(1), pixels, out=planes)
        return scores


class DecoderInParts(nn.Module):
    """A decoder whose blocks take a few crops at a time; the scores follow its last block.

    Args:
        decoder: What it computes.
        score: The layer after it.
        at_once: Crops for each block, from the image down.
        compiled: Whether to use :mod:`deconvnet.kernels`.
        shared: Whether each thread takes its own crops.
    """

    def __init__(
        self,
        decoder: Decoder,
        score: nn.Module,
        at_once: Sequence[int],
        compiled: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        *others, last = decoder.blocks
        self.blocks = nn.ModuleList([*others, nn.Sequential(last, score)])
        self.at_once, self.compiled, self.shared = at_once, compiled, shared

    def forward(self, x: Tensor, switches: list[Tensor]) -> Tensor:
        """Returns the scores of what :meth:`deconvnet.model.Decoder.forward` gives."""
        groups = _in_groups(self._decode, (x, *switches), self.shared)
        return _joined([part for group in groups for part in group])

    def _decode(self, x: Tensor, *switches: Tensor) -> list[Tensor]:
        unpool = compiled_kernels().unpool if self.compiled else library_unpool
        parts = [x]
        for block, where, count in zip(self.blocks, reversed(switches), reversed(self.at_once)):
            pairs = zip(_joined(parts).split(count), where.split(count))
            parts = [block(unpool(part, places)) for part, places in pairs]
        return parts


def _in_groups(work: Callable, maps: tuple[Tensor, ...], shared: bool) -> list:
    """What ``work`` makes of all crops or, shared among threads, of groups of them.

    Args:
        work: Called with the same crops of all maps.
        maps: ``[N, ...]`` each.
        shared: Whether each thread takes a group through all blocks, without waiting for others.
    """
    if not shared:
        return [work(*maps)]
    threads, number = torch.get_num_threads(), len(maps[0])
    groups = threads * -(-number // (threads * GROUP))  # of one size, so that all end together
    parts = zip(*(x.tensor_split(min(groups, number)) for x in maps))
    return compiled_kernels().share(work, parts)


def library_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`~deconvnet.unpooling.max_pool2d_with_switches` of 2 x 2 windows by PyTorch's code.

    That finds places of eight bytes; here they are narrowed to switches before anyone keeps them.

    Args:
        x: ``[N, C, H, W]``, of an even width below 32,767 pixels.
    """
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    # 0, 1, W or W + 1; the rest of an int64 is of no interest, so two of its bytes are enough
    offset = indices.to(torch.int16) - _window_corners(pooled, x.shape[-1], 2).to(torch.int16)
    return pooled, (offset & 1).to(torch.uint8) + 2 * (offset > 1).view(torch.uint8)


def library_unpool(x: Tensor, switches: Tensor) -> Tensor:
    """:func:`~deconvnet.unpooling.unpool2d` of 2 x 2 windows by PyTorch's code.

    Args:
        x: ``[N, C, h, w]``, fewer than 16,383 pixels wide.
        switches: ``uint8 [N, C, h, w]``, from 0 to 3.
    """
    if torch.are_deterministic_algorithms_enabled():
        return unpool2d(x, switches, check_range=False)  # PyTorch says that its own is not
    width = 2 * x.shape[-1]
    offset = (switches >> 1).to(torch.int16) * width + (switches & 1)
    return F.max_unpool2d(x, offset.long().add_(_window_corners(x, width, 2)), 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
