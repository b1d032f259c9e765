"""Two networks that err differently: DeconvNet sees shape, FCN sees context.

The paper averages their class-conditional probabilities; the authors' release multiplies
their scores. Both are here, and the book compares them.

Source: Noh, Hong, Han, ICCV 2015, section 4.4 (the mean); release,
``inference/generate_EDeconvNet_CRF_results.m`` (the product).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_probabilities(*probabilities: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The mean of several networks' probabilities, pixel by pixel.

    Args:
        *probabilities: One or more maps ``[C, H, W]``, each summing to 1 over the classes.
        weights: One weight a map, at least 0, of any scale; equal weights by default.

    Returns:
        ``float32 [C, H, W]``, summing to 1 over the classes.

    Raises:
        ValueError: No maps, maps of different shapes, maps that are not probabilities, or
            weights that cannot be normalised.

    Example:
        >>> ours, theirs = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])
        >>> mean_of_probabilities(ours.view(2, 1, 1), theirs.view(2, 1, 1)).flatten()
        tensor([0.6000, 0.4000])
    """
    if not probabilities:
        raise ValueError("mean_of_probabilities needs at least one map")
    _check_same_shape(probabilities)
    for i, p in enumerate(probabilities):
        sums = p.float().sum(0)
        if p.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise ValueError(
                f"map {i} is not a probability map: values must be at least 0 and sum to 1 over "
                "the classes; apply softmax(dim=0) to scores first"
            )
    share = torch.ones(len(probabilities)) if weights is None else torch.tensor(weights).float()
    if len(share) != len(probabilities):
        raise ValueError(f"got {len(share)} weights for {len(probabilities)} maps")
    if not (share.isfinite().all() and share.min() >= 0 and share.sum() > 0):
        raise ValueError(f"weights must be finite, at least 0 and not all 0, got {weights}")
    share = (share / share.sum()).tolist()
    return sum(w * p.float() for w, p in zip(share, probabilities))


def product_of_scores(deconvnet_scores: Tensor, fcn_scores: Tensor) -> Tensor:
    """The release's ensemble: the product of both networks' scores, each clipped at 0.

    A class must please both networks; where one of them scores it 0 or less, the other one's
    opinion is lost. Where that happens to every class the result is undecided (uniform).

    Args:
        deconvnet_scores: Scores before softmax, ``[C, H, W]``.
        fcn_scores: Scores of the same shape.

    Returns:
        Softmax of the product: probabilities ``float32 [C, H, W]``.

    Raises:
        ValueError: The shapes differ.
    """
    _check_same_shape((deconvnet_scores, fcn_scores))
    product = deconvnet_scores.float().clamp(min=0) * fcn_scores.float().clamp(min=0)
    return product.softmax(0)


def _check_same_shape(maps: Sequence[Tensor]) -> None:
    shapes = [tuple(m.shape) for m in maps]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"the maps must all be [C, H, W] of one shape, got {shapes}")
