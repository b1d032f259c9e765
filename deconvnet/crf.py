"""Dense conditional random field: mean-field inference with Gaussian edge potentials.

Every pixel is connected to every other. The energy of a labelling ``x`` is

``E(x) = sum_i psi_i(x_i) + sum_{i<j} [x_i != x_j] sum_m w_m k_m(f_i, f_j)``

with the Potts compatibility ``[x_i != x_j]`` and kernels ``exp(-0.5 * ||f_i - f_j||^2)``: the
*Gaussian* kernel on positions removes specks, the *bilateral* kernel on positions and colours
draws label boundaries to image edges. Mean field replaces the distribution over labellings by
independent pixels ``Q_i``, and updates all of them at once until they agree.

Source: Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials*, NIPS 2011. Parameters mean what they mean in ``pydensecrf``; its own names are in
:mod:`deconvnet.densecrf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.gaussian import (
    LABELS_AT_ONCE,
    MAX_EXACT_PIXELS,
    NEGLIGIBLE,
    ExactFilter,
    ExactGrid,
    Filter,
    GridGaussian,
)
from deconvnet.permutohedral import PermutohedralLattice, compiled_for, lattice_filter

NORMALIZATIONS = ("none", "before", "after", "symmetric")
METHODS = ("auto", "exact", "lattice", "original")
SHORT_ROW = 16  # PyTorch on a CPU is slow at row by row operations on fewer, if not just 8, labels


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"image must be uint8 in [0, 255], got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must be RGB [3, H, W], got shape {tuple(image.shape)}")


def _check_maps(name: str, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Refuses what is not maps ``[C, H, W]``; returns the least and the greatest value."""
    if maps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {maps.dtype}")
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"{name} must be [C, H, W], got shape {tuple(maps.shape)}")
    low, high = maps.aminmax()
    if not (low.isfinite() and high.isfinite()):  # NaN is every extreme
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return low, high


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
    prune_below: float = 0.0  # probability; labels under it everywhere stay out of the mean field

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
        if not 0 <= self.prune_below < 1:
            raise ValueError(f"prune_below must be in [0, 1), got {self.prune_below}")
        _check_choice("normalization", self.normalization, NORMALIZATIONS)

    @classmethod
    def release(cls) -> CRFConfig:
        """The authors' setting: kernels without normalisation, unaries without a floor.

        Each message then grows with the number of similar pixels, and the kernels act far more
        strongly than under ``"symmetric"``. The release's weights, 3 and 5, belong to its
        lattice, whose sums come out at about 0.88 (Gaussian) and, by the picture, 0.5 to 0.6
        (bilateral) of the exact ones, measured with that lattice (``method="original"`` of
        :func:`pairwise_kernels`) on pictures up to 200 x 200. Here the weights are reduced in
        place of the sums, so that the setting means the same by every method, the exact one too.
        """
        return cls(
            gaussian_weight=3.0 * 0.88,
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
    _check_probabilities(probabilities)
    return -probabilities.clamp(min=min_probability).log()


def _check_probabilities(probabilities: Tensor) -> None:
    low, high = _check_maps("probabilities", probabilities)
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"probabilities must be in [0, 1], got [{low:.4g}, {high:.4g}]")
    off = (probabilities.sum(dim=0) - 1).abs().max()
    if off > 1e-3:
        raise ValueError(
            "probabilities must sum to 1 over their first dimension, "
            f"got a pixel that is off by {off:.4g}; apply softmax(dim=0) to scores first"
        )


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
    colours = image.flatten(1) / sigma_rgb
    positions = position_features(*image.shape[1:], sigma).to(colours)
    return torch.cat([positions.T, colours]).T  # feature by feature in memory, as they are read


def position_features(height: int, width: int, sigma: float) -> Tensor:
    """Pixel positions in units of ``sigma`` pixels: float32 ``[H * W, 2]``, x then y."""
    lines = [torch.arange(length) / sigma for length in (height, width)]
    y, x = torch.meshgrid(*lines, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()]).T


class PairwiseKernel:
    """One weighted, normalised kernel of the energy.

    With ``n_i = 1 / sum_j k_ij``, a message does not grow with the number of pixels that look
    alike. Normalisation ``"none"`` uses ``k_ij``, ``"before"`` ``k_ij n_j`` (what is sent),
    ``"after"`` ``n_i k_ij`` (what is heard), ``"symmetric"`` ``sqrt(n_i) k_ij sqrt(n_j)``.

    Args:
        filter: maps values ``[N, C]`` to ``sum_j k_ij values_j``, with ``k_ii = 1``.
        weight: energy per unit of kernel between two pixels that disagree; a scalar tensor if it
            is to be learned.
        ones: float ``[N, 1]`` of ones, in the dtype and on the device of the values.
        normalization: one of ``NORMALIZATIONS``.
        self_message: whether the sum includes ``j = i``, as in the 2011 code and ``pydensecrf``;
            in the paper it does not.
    """

    def __init__(
        self,
        filter: Filter,
        weight: float | Tensor,
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
        learned = isinstance(weight, Tensor)
        self._can_fold = hasattr(filter, "scaled") and self_message and not learned
        self._folded: Filter | None = None  # the filter with both scales in its own weights

    def message(self, values: Tensor) -> Tensor:
        """What every pixel hears from the others: weighted votes for each label.

        Args:
            values: float ``[N, C]``, the pixels' current label probabilities.

        Returns:
            ``[N, C]``.
        """
        if self._can_fold and not values.requires_grad:
            return self._folded_filter()(values)  # the same, with both scales in its own weights
        sent = values * self.scale_in
        heard = self.filter(sent)
        if not self.self_message:
            heard = heard - sent
        return heard * (self.scale_out * self.weight)

    def _folded_filter(self) -> Filter:
        if self._folded is None:
            self._folded = self.filter.scaled(self.scale_in, self.scale_out * self.weight)
        return self._folded


def pairwise_kernels(
    image: Tensor,
    config: CRFConfig = CRFConfig(),
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
    weights: Tensor | None = None,
) -> list[PairwiseKernel]:
    """Prepare an image's kernels for all iterations; those with weight 0 are left out.

    Args:
        image: uint8 ``[3, H, W]`` RGB.
        config: kernel widths, weights and normalisation.
        method: ``"exact"`` sums over all pairs; ``"lattice"`` filters the bilateral kernel on the
            permutohedral lattice and the Gaussian one on the grid; ``"auto"`` is exact up to
            ``MAX_EXACT_PIXELS``. ``"original"`` filters both on the lattice with the scale and
            the rounding of the 2011 code, whose sums come out at about 0.88 and half of the exact
            ones: for weights that were tuned there without normalisation.
        dtype: floating-point type of the values to filter.
        weights: float ``[2]``, the Gaussian and the bilateral kernel's weight, to be learned; those
            of ``config`` by default.

    Returns:
        The Gaussian, then the bilateral kernel.

    Raises:
        TypeError: if the image is not uint8.
        ValueError: if its shape is wrong or the method unknown.
    """
    _check_image(image)
    _check_choice("method", method, METHODS)
    size = image.shape[1:]
    ones = torch.ones(size.numel(), 1, dtype=dtype, device=image.device)
    kernels = []
    given = (config.gaussian_weight, config.bilateral_weight)
    gaussian_weight, bilateral_weight = given if weights is None else weights.to(dtype).unbind()

    def add(filter: Filter, weight: float | Tensor) -> None:
        kernel = PairwiseKernel(filter, weight, ones, config.normalization, config.self_message)
        kernels.append(kernel)

    if method == "auto" and size.numel() <= MAX_EXACT_PIXELS:
        method = "exact"
    if weights is not None or config.gaussian_weight:
        sigma = config.gaussian_sigma
        if method == "exact" and max(size) <= MAX_EXACT_PIXELS:
            add(ExactGrid(*size, sigma, ones.dtype, ones.device), gaussian_weight)
        elif method in ("exact", "original"):
            positions = position_features(*size, sigma).to(ones)
            add(_filter(method, positions), gaussian_weight)
        else:
            add(GridGaussian(*size, sigma), gaussian_weight)
    if weights is not None or config.bilateral_weight:
        features = bilateral_features(image, config.bilateral_sigma, config.bilateral_sigma_rgb)
        add(_filter(method, features.to(ones)), bilateral_weight)
    return kernels


def _filter(method: str, features: Tensor) -> Filter:
    if method == "exact":
        return ExactFilter(features)
    if method == "original":
        return PermutohedralLattice(features, original=True)
    return lattice_filter(features)


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
    logits = _pixels_first(-unary)  # a filter reads a pixel at a time
    with torch.autocast(unary.device.type, enabled=False):  # iterations add up their rounding
        beliefs = _softmax(logits)
        for iteration in range(iterations + 1):
            if iteration > 0 and kernels:
                _drop_negligible(beliefs, labels)  # too small to matter, but messages get slow
                votes = kernels[0].message(beliefs)
                for kernel in kernels[1:]:
                    votes = kernel.message(beliefs).add_(votes)
                beliefs = _add_and_softmax(votes, logits)
            if on_iteration is not None:
                on_iteration(iteration, beliefs[:, :labels].T.reshape(labels, height, width))
    # PyTorch's cross entropy has no gradient for transposed maps.
    return beliefs[:, :labels].T.contiguous().view(labels, height, width)


def _pixels_first(logits: Tensor) -> Tensor:
    """``[C, H, W]`` as ``[H * W, C]``, with labels that nobody believes in if that saves time."""
    by_pixel = logits.flatten(1).T
    if logits.device.type == "cpu":
        by_pixel = F.pad(by_pixel, (0, -len(logits) % LABELS_AT_ONCE), value=-math.inf)
    return by_pixel.contiguous()


def _add_and_softmax(votes: Tensor, logits: Tensor) -> Tensor:
    """The softmax of what each pixel hears and of what it thinks itself; uses up the votes."""
    compiled = compiled_for(votes, logits)
    if compiled:
        return compiled.add_and_softmax(votes.contiguous(), logits)
    return _softmax(votes.add_(logits))


def _softmax(logits: Tensor) -> Tensor:
    labels = logits.shape[1]
    short = labels < SHORT_ROW and labels != LABELS_AT_ONCE and logits.device.type == "cpu"
    if short and not logits.requires_grad:
        beliefs = logits.clamp(min=-80).exp_()  # stays clear of the end of float32's range
        total = beliefs @ beliefs.new_ones(labels, 1)
        low, high = total.aminmax()
        if low > 1e-4 and high < math.inf:  # what was clamped is negligible
            return beliefs.div_(total)
    return logits.softmax(dim=1)


def _drop_negligible(beliefs: Tensor, labels: int) -> None:
    """Sets to 0 what would make messages slow; a sample of the pixels tells if there is any."""
    if beliefs.dtype != torch.float32 or beliefs.requires_grad or beliefs.device.type != "cpu":
        return
    if beliefs[::64, :labels].amin() < NEGLIGIBLE:
        F.threshold_(beliefs, NEGLIGIBLE, 0.0)


def negligible_labels(
    probabilities: Tensor, kernels: Sequence[PairwiseKernel], threshold: float
) -> Tensor:
    """Labels that the mean field can do without, because no pixel will ever believe in them.

    No message exceeds ``K * max(Q)``, where ``K`` is the largest row sum of the kernels, and at
    every pixel the votes for all labels only raise the softmax's denominator. So a label whose
    probability is nowhere above ``P`` satisfies ``Q <= P * exp(K * max(Q))`` after every update,
    and stays below ``e * P`` if ``P <= 1 / (e * K)``. Up to ``1 / (e * C)`` it is moreover below
    ``1 / C``, and cannot win.

    Args:
        probabilities: float ``[C, H, W]``, summing to 1 over ``C``.
        kernels: from :func:`pairwise_kernels`.
        threshold: probability ``P`` of the user's choice; the smallest of the three counts.

    Returns:
        bool ``[C]``, true for labels that can be left out. All false if a kernel's weight is
        negative, for which the bound does not hold.
    """
    ones = torch.ones_like(probabilities[:1]).view(-1, 1)
    row_sum = sum((k.message(ones) for k in kernels), start=0 * ones).max().item()
    bounds = [threshold, 1 / (math.e * len(probabilities))]
    if any(float(k.weight) < 0 for k in kernels):
        bounds.append(0.0)
    elif row_sum > 0:
        bounds.append(1 / (math.e * row_sum))
    return probabilities.flatten(1).amax(dim=1) < min(bounds)


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

    Where a map of all labels takes more than 32 MiB, a program on a CPU may gain by
    :func:`deconvnet.hardware.keep_memory`.

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
    _check_probabilities(probabilities)
    _check_image(image)
    if image.shape[1:] != probabilities.shape[1:]:
        raise ValueError(
            f"image and probabilities must have the same height and width, got "
            f"{tuple(image.shape[1:])} and {tuple(probabilities.shape[1:])}"
        )
    device, dtype = probabilities.device, probabilities.dtype
    precise = torch.autocast(device.type, enabled=False)  # ten iterations add up their rounding
    with precise:
        kernels = pairwise_kernels(image.to(device), config, method, dtype)
        if not config.prune_below:
            unary = unary_from_probabilities(probabilities, config.min_probability)
            return mean_field(unary, kernels, config.iterations, on_iteration)
        pruned = negligible_labels(probabilities, kernels, config.prune_below)
        kept = (~pruned).nonzero().flatten()
        # A difference, since to gather the many labels that are left out takes longer.
        left_out = probabilities.sum(dim=0) - probabilities[kept].sum(dim=0)

        def among_all(beliefs: Tensor) -> Tensor:
            return probabilities.index_copy(0, kept, beliefs * (1 - left_out))

        watch = on_iteration and (lambda i, beliefs: on_iteration(i, among_all(beliefs)))
        unary = -probabilities[kept].clamp(min=config.min_probability).log()
        return among_all(mean_field(unary, kernels, config.iterations, watch))
