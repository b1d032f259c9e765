"""Dense conditional random field: mean-field inference with Gaussian edge potentials.

Every pixel is connected to every other. The energy of a labelling ``x`` is

``E(x) = sum_i psi_i(x_i) + sum_{i<j} [x_i != x_j] sum_m w_m k_m(f_i, f_j)``

with the Potts compatibility ``[x_i != x_j]`` and kernels ``exp(-0.5 * ||f_i - f_j||^2)``: the
*Gaussian* kernel on positions removes specks, the *bilateral* kernel on positions and colours
draws label boundaries to image edges. Mean field replaces the distribution over labellings by
independent pixels ``Q_i``, and updates all of them at once until they agree.

Source: Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials*, NIPS 2011. Parameters mean what they mean in ``pydensecrf``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.permutohedral import PermutohedralLattice

NORMALIZATIONS = ("none", "before", "after", "symmetric")
METHODS = ("auto", "exact", "lattice")
Filter = Callable[[Tensor], Tensor]  # values [N, C] to sums over all points [N, C]
MAX_EXACT_PIXELS = 50 * 50  # up to here exact inference takes well under a second on a CPU


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"image must be uint8 in [0, 255], got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must be RGB [3, H, W], got shape {tuple(image.shape)}")


def _check_maps(name: str, maps: Tensor) -> None:
    if maps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {maps.dtype}")
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"{name} must be [C, H, W], got shape {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


@dataclass(frozen=True)
class CRFConfig:
    """Settings of the dense CRF.

    The widths and weights are those of the authors' release
    (``inference/generate_EDeconvNet_CRF_results.m``); the normalisation is ``pydensecrf``'s.

    Raises:
        ValueError: if a setting is out of its range.
    """

    gaussian_sigma: float = 3.0  # pixels
    gaussian_weight: float = 3.0  # energy of two neighbours that disagree; 0 turns it off
    bilateral_sigma: float = 20.0  # pixels
    bilateral_sigma_rgb: float = 3.0  # grey levels, of 255
    bilateral_weight: float = 5.0  # energy of two lookalikes that disagree; 0 turns it off
    iterations: int = 10  # mean-field updates
    normalization: str = "symmetric"  # one of NORMALIZATIONS, see PairwiseKernel
    min_probability: float = 1e-5  # floor under the logarithm, pydensecrf's default
    self_message: bool = True  # whether a pixel hears itself, see PairwiseKernel

    def __post_init__(self) -> None:
        for name in ("gaussian_sigma", "bilateral_sigma", "bilateral_sigma_rgb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("gaussian_weight", "bilateral_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.iterations < 0:
            raise ValueError(f"iterations must be 0 or more, got {self.iterations}")
        if not 0 < self.min_probability < 1:
            raise ValueError(f"min_probability must be in (0, 1), got {self.min_probability}")
        _check_choice("normalization", self.normalization, NORMALIZATIONS)

    @classmethod
    def release(cls) -> CRFConfig:
        """The authors' setting: kernels without normalisation, unaries without a floor.

        Each message then grows with the number of similar pixels, and the kernels act far more
        strongly than under ``"symmetric"``. The release's weights, 3 and 5, belong to its
        lattice, whose sums come out at 0.85 (Gaussian) and 0.54 (bilateral) of the exact ones;
        here sums are not reduced, so the weights are.
        """
        return cls(
            gaussian_weight=3.0 * 0.85,
            bilateral_weight=5.0 * 0.54,
            normalization="none",
            min_probability=torch.finfo(torch.float32).tiny,
        )


def unary_from_probabilities(probabilities: Tensor, min_probability: float = 1e-5) -> Tensor:
    """Unary energies, the negative logarithm of the network's probabilities.

    Args:
        probabilities: float32 or float64 ``[C, H, W]``, summing to 1 over ``C``.
        min_probability: floor under the logarithm, so that no label is ruled out by underflow.

    Returns:
        Energies of the same shape and dtype.

    Raises:
        TypeError: if the probabilities are not float32 or float64.
        ValueError: if the shape is wrong, a value is not finite or not in [0, 1], or a pixel's
            probabilities do not sum to 1 within 0.001.
    """
    _check_maps("probabilities", probabilities)
    low, high = probabilities.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"probabilities must be in [0, 1], got [{low:.4g}, {high:.4g}]")
    off = (probabilities.sum(dim=0) - 1).abs().max()
    if off > 1e-3:
        raise ValueError(
            "probabilities must sum to 1 over their first dimension, "
            f"got a pixel that is off by {off:.4g}; apply softmax(dim=0) to scores first"
        )
    return -probabilities.clamp(min=min_probability).log()


def bilateral_features(image: Tensor, sigma: float, sigma_rgb: float) -> Tensor:
    """Where a pixel is and what it looks like, in units of the kernel's standard deviations.

    Args:
        image: uint8 ``[3, H, W]`` RGB.
        sigma: standard deviation of positions, in pixels.
        sigma_rgb: standard deviation of colours, in grey levels.

    Returns:
        float32 ``[H * W, 5]``: x, y, red, green, blue.
    """
    _check_image(image)
    colours = image.flatten(1).T / sigma_rgb
    return torch.cat([position_features(*image.shape[1:], sigma).to(colours), colours], dim=1)


def position_features(height: int, width: int, sigma: float) -> Tensor:
    """Pixel positions in units of ``sigma`` pixels: float32 ``[H * W, 2]``, x then y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1) / sigma


class ExactFilter:
    """Sums over all pairs of points, in quadratic time: the reference.

    Args:
        features: float ``[N, d]``, each feature divided by its standard deviation.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        # A large kernel matrix would not fit into memory, so its rows are computed anew each time.
        self._kept_rows = list(self._rows()) if len(features) <= MAX_EXACT_PIXELS else None

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``sum_j exp(-0.5 * ||f_i - f_j||^2) * values_j`` for values ``[N, C]``."""
        return torch.cat([rows @ values for rows in self._kept_rows or self._rows()])

    def _rows(self) -> Iterator[Tensor]:
        for block in self.features.split(max(1, 2**20 // len(self.features))):
            # Distances by way of a matrix product would lose digits to cancellation.
            precise = "donot_use_mm_for_euclid_dist"
            distance = torch.cdist(block, self.features, compute_mode=precise)
            yield distance.square_().mul_(-0.5).exp_()


class GridGaussian:
    """The Gaussian kernel on a pixel grid, as a convolution along columns, then along rows.

    On a grid the kernel is a product of two one-dimensional ones, so it needs no lattice. It is
    cut off at 5 standard deviations, where float32 no longer sees it.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        sigma: standard deviation in pixels.
    """

    def __init__(self, height: int, width: int, sigma: float) -> None:
        self.size = height, width
        self.sigma = sigma

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``[H * W, C]`` to the same shape."""
        height, width = self.size
        channels = values.shape[1]
        # Seen as [1, C, H, W] in channels-last order, the values need not be moved.
        grid = values.reshape(1, height, width, channels).permute(0, 3, 1, 2)
        along_y, along_x = (self._taps(length).to(values) for length in self.size)
        columns = along_y.repeat(channels).view(channels, 1, -1, 1)
        rows = along_x.repeat(channels).view(channels, 1, 1, -1)
        grid = F.conv2d(grid, columns, padding=(len(along_y) // 2, 0), groups=channels)
        grid = F.conv2d(grid, rows, padding=(0, len(along_x) // 2), groups=channels)
        return grid.permute(0, 2, 3, 1).reshape(height * width, channels)

    def _taps(self, length: int) -> Tensor:
        radius = min(math.ceil(5 * self.sigma), length - 1)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        return (-0.5 * (offsets / self.sigma) ** 2).exp()


class PairwiseKernel:
    """One weighted, normalised kernel of the energy.

    With ``n_i = 1 / sum_j k_ij``, a message does not grow with the number of pixels that look
    alike. Normalisation ``"none"`` uses ``k_ij``, ``"before"`` ``k_ij n_j`` (what is sent),
    ``"after"`` ``n_i k_ij`` (what is heard), ``"symmetric"`` ``sqrt(n_i) k_ij sqrt(n_j)``.

    Args:
        filter: maps values ``[N, C]`` to ``sum_j k_ij values_j``, with ``k_ii = 1``.
        weight: energy per unit of kernel between two pixels that disagree.
        ones: float ``[N, 1]`` of ones, in the dtype and on the device of the values.
        normalization: one of ``NORMALIZATIONS``.
        self_message: whether the sum includes ``j = i``, as in the 2011 code and ``pydensecrf``;
            in the paper it does not.
    """

    def __init__(
        self,
        filter: Filter,
        weight: float,
        ones: Tensor,
        normalization: str = "symmetric",
        self_message: bool = True,
    ) -> None:
        _check_choice("normalization", normalization, NORMALIZATIONS)
        self.filter = filter
        self.weight = weight
        self.self_message = self_message
        norm = ones if normalization == "none" else 1 / filter(ones)
        if normalization == "symmetric":
            norm = norm.sqrt()
        self.scale_in = ones if normalization == "after" else norm
        self.scale_out = ones if normalization == "before" else norm

    def message(self, values: Tensor) -> Tensor:
        """What every pixel hears from the others: weighted votes for each label.

        Args:
            values: float ``[N, C]``, the pixels' current label probabilities.

        Returns:
            ``[N, C]``.
        """
        sent = values * self.scale_in
        heard = self.filter(sent)
        if not self.self_message:
            heard = heard - sent
        return heard * (self.scale_out * self.weight)


def pairwise_kernels(
    image: Tensor,
    config: CRFConfig = CRFConfig(),
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[PairwiseKernel]:
    """Prepare an image's kernels for all iterations; those with weight 0 are left out.

    Args:
        image: uint8 ``[3, H, W]`` RGB.
        config: kernel widths, weights and normalisation.
        method: ``"exact"`` sums over all pairs; ``"lattice"`` filters the bilateral kernel on the
            permutohedral lattice and the Gaussian one by convolution; ``"auto"`` is exact up to
            ``MAX_EXACT_PIXELS``.
        dtype: floating-point type of the values to filter.

    Returns:
        The Gaussian, then the bilateral kernel.

    Raises:
        TypeError: if the image is not uint8.
        ValueError: if its shape is wrong or the method unknown.
    """
    _check_image(image)
    _check_choice("method", method, METHODS)
    size = image.shape[1:]
    exact = method == "exact" or (method == "auto" and size.numel() <= MAX_EXACT_PIXELS)
    ones = torch.ones(size.numel(), 1, dtype=dtype, device=image.device)
    kernels = []

    def add(filter: Filter, weight: float) -> None:
        kernel = PairwiseKernel(filter, weight, ones, config.normalization, config.self_message)
        kernels.append(kernel)

    if config.gaussian_weight:
        sigma = config.gaussian_sigma
        positions = position_features(*size, sigma).to(ones)
        add(ExactFilter(positions) if exact else GridGaussian(*size, sigma), config.gaussian_weight)
    if config.bilateral_weight:
        features = bilateral_features(image, config.bilateral_sigma, config.bilateral_sigma_rgb)
        filter = (ExactFilter if exact else PermutohedralLattice)(features.to(ones))
        add(filter, config.bilateral_weight)
    return kernels


def mean_field(
    unary: Tensor,
    kernels: Sequence[PairwiseKernel],
    iterations: int = 10,
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Approximate the CRF's marginals by independent pixels, all updated at once.

    Each update is ``Q_i(l) ~ exp(-psi_i(l) + sum of the kernels' messages for l)``. Votes for a
    label and Potts penalties on all others differ by a constant, which the softmax removes.

    Args:
        unary: float ``[C, H, W]``, energies.
        kernels: from :func:`pairwise_kernels`.
        iterations: number of updates.
        on_iteration: called with 0 and the softmax of the unaries, then after every update with
            its number, from 1, and the probabilities ``[C, H, W]``.

    Returns:
        Probabilities ``[C, H, W]``.

    Raises:
        TypeError: if the unaries are not float32 or float64.
        ValueError: if their shape is wrong or a value is not finite.
    """
    _check_maps("unary", unary)
    labels, height, width = unary.shape
    logits = -unary.flatten(1).T.contiguous()  # pixels first: a filter reads a pixel at a time
    beliefs = logits.softmax(dim=1)
    for iteration in range(iterations + 1):
        if iteration > 0:
            beliefs = sum((k.message(beliefs) for k in kernels), start=logits).softmax(dim=1)
        if on_iteration is not None:
            on_iteration(iteration, beliefs.T.reshape(labels, height, width))
    return beliefs.T.reshape(labels, height, width)


def gibbs_energy(labels: Tensor, unary: Tensor, kernels: Sequence[PairwiseKernel]) -> Tensor:
    """Energy of a labelling, the quantity that the CRF wants low.

    Args:
        labels: integer ``[H, W]``, every value below ``C``.
        unary: float ``[C, H, W]``, energies.
        kernels: from :func:`pairwise_kernels`.

    Returns:
        The energy, a scalar tensor.

    Raises:
        ValueError: if the shapes differ or a label is out of range.
    """
    _check_maps("unary", unary)
    if labels.shape != unary.shape[1:]:
        raise ValueError(f"labels {tuple(labels.shape)} and unary {tuple(unary.shape)} differ")
    if labels.min() < 0 or labels.max() >= len(unary):
        raise ValueError(f"labels must be below {len(unary)}, got {labels.max()}")
    chosen = F.one_hot(labels.long().flatten(), len(unary)).to(unary)
    energy = (chosen * unary.flatten(1).T).sum()
    for kernel in kernels:
        everyone = kernel.message(torch.ones_like(chosen[:, :1])).sum()
        agreeing = (chosen * kernel.message(chosen)).sum()
        energy = energy + (everyone - agreeing) / 2  # each pair was met twice
    return energy


def dense_crf(
    image: Tensor,
    probabilities: Tensor,
    config: CRFConfig = CRFConfig(),
    method: str = "auto",
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Refine a network's probabilities with the dense CRF.

    Args:
        image: uint8 ``[3, H, W]`` RGB.
        probabilities: float32 or float64 ``[C, H, W]``, summing to 1 over ``C``.
        config: kernel widths, weights, normalisation, iterations.
        method: see :func:`pairwise_kernels`.
        on_iteration: see :func:`mean_field`.

    Returns:
        Probabilities ``[C, H, W]``, on the device and in the dtype of those given.

    Raises:
        TypeError: if image or probabilities have the wrong dtype.
        ValueError: if shapes do not fit, values are out of range or not finite, or the method is
            unknown.

    Example:
        >>> image = torch.zeros(3, 1, 2, dtype=torch.uint8)
        >>> probabilities = torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])
        >>> dense_crf(image, probabilities).argmax(dim=0)
        tensor([[0, 0]])
    """
    unary = unary_from_probabilities(probabilities, config.min_probability)
    _check_image(image)
    if image.shape[1:] != probabilities.shape[1:]:
        raise ValueError(
            f"image and probabilities must have the same height and width, got "
            f"{tuple(image.shape[1:])} and {tuple(probabilities.shape[1:])}"
        )
    with torch.autocast(unary.device.type, enabled=False):  # ten iterations add up their rounding
        kernels = pairwise_kernels(image.to(unary.device), config, method, unary.dtype)
        return mean_field(unary, kernels, config.iterations, on_iteration)
