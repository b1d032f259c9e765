"""Settings of the dense CRF that suit a network: searched for on a grid, or learned by gradient.

The authors of the dense CRF and of DeepLab pick weights and widths by the mean IoU on a validation
set; :func:`search_crf` does that. Through :class:`CRFLayer` gradients reach the kernels' weights
and the network below, so that both can be trained together.

Sources: Krähenbühl and Koltun, NIPS 2011, section 4; Chen et al., *Semantic Image Segmentation with
Deep Convolutional Nets and Fully Connected CRFs*, ICLR 2015, section 4; Zheng et al., *Conditional
Random Fields as Recurrent Neural Networks*, ICCV 2015, of which this is the part with two weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from deconvnet.crf import (
    CRFConfig,
    dense_crf,
    mean_field,
    pairwise_kernels,
    unary_from_probabilities,
)
from deconvnet.metrics import ConfusionMatrix

# The authors' setting of kernels in the middle, each step about a factor of two.
GRID = {
    "bilateral_sigma": (20.0, 40.0, 80.0),
    "bilateral_sigma_rgb": (3.0, 6.0, 12.0),
    "bilateral_weight": (2.5, 5.0, 10.0),
    "gaussian_weight": (0.0, 3.0),
}


@dataclass(frozen=True)
class CRFSearch:
    """What a search found.

    Attributes:
        best: the setting with the highest mean IoU, the earlier of two equal ones.
        mean_iou: its mean IoU, in [0, 1].
        without_crf: mean IoU of the probabilities themselves. Where it is higher, leave the CRF
            out.
        tried: every setting with its mean IoU, in the order of the grid.
    """

    best: CRFConfig
    mean_iou: float
    without_crf: float
    tried: tuple[tuple[CRFConfig, float], ...]


def search_crf(
    examples: Iterable[tuple[Tensor, Tensor, Tensor]],
    grid: Mapping[str, Sequence[float | str]] = GRID,
    config: CRFConfig = CRFConfig(),
    method: str = "auto",
    progress: bool = True,
) -> CRFSearch:
    """Try every combination of settings and keep the one with the highest mean IoU.

    Choose on images that the network was not trained on, and report on others again: a search
    always has a winner, also where there is nothing to win.

    Choose on enough images to show every class several times. A class that none of them shows has
    an IoU of 0 as soon as one pixel is called so, which favours settings that smooth it away.

    Args:
        examples: image uint8 ``[3, H, W]``, probabilities float ``[C, H, W]`` and true labels uint8
            ``[H, W]``, 255 where they do not count; the same ``C`` for all.
        grid: for each field of :class:`~deconvnet.crf.CRFConfig` to vary, the values to try.
        config: the other fields.
        method: see :func:`~deconvnet.crf.pairwise_kernels`.
        progress: whether to show a progress bar.

    Returns:
        The best setting and all mean IoUs.

    Raises:
        TypeError: if an image or probabilities have the wrong dtype.
        ValueError: if there are no examples, a field of the grid is unknown, has no value or a
            value out of its range, or an example is malformed.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("examples must hold at least one image, got none")
    known = {field.name for field in fields(CRFConfig)}
    for name, values in grid.items():
        if name not in known:
            raise ValueError(f"grid has {name!r}, which is not a field of CRFConfig")
        if not len(values):
            raise ValueError(f"grid has no value for {name!r}")
    settings = [
        replace(config, **dict(zip(grid, values))) for values in itertools.product(*grid.values())
    ]
    num_labels = len(examples[0][1])
    plain = ConfusionMatrix(num_labels)
    refined = [ConfusionMatrix(num_labels) for _ in settings]
    total = len(examples) * len(settings)
    with tqdm(total=total, desc="CRF settings", disable=not progress) as bar, torch.no_grad():
        for image, probabilities, labels in examples:
            labels = labels.cpu()
            plain.update(probabilities.argmax(dim=0).to("cpu", torch.uint8), labels)
            for setting, confusion in zip(settings, refined):
                beliefs = dense_crf(image, probabilities, setting, method)
                confusion.update(beliefs.argmax(dim=0).to("cpu", torch.uint8), labels)
                bar.update()
    scores = [float(confusion.mean_iou()) for confusion in refined]
    winner = max(range(len(settings)), key=scores.__getitem__)
    return CRFSearch(
        settings[winner], scores[winner], float(plain.mean_iou()), tuple(zip(settings, scores))
    )


class CRFLayer(nn.Module):
    """The dense CRF as the last layer of a network, with kernel weights that are learned.

    Weights stay positive, since their logarithms are the parameters.

    Args:
        config: where the weights start, and everything else.
        method: see :func:`~deconvnet.crf.pairwise_kernels`.

    Raises:
        ValueError: if a weight is not positive.

    Example:
        >>> image = torch.zeros(3, 1, 3, dtype=torch.uint8)
        >>> probabilities = torch.tensor([[[0.9, 0.4, 0.9]], [[0.1, 0.6, 0.1]]])
        >>> layer = CRFLayer(CRFConfig(gaussian_weight=0.1, bilateral_weight=0.1))
        >>> optimiser = torch.optim.Adam(layer.parameters(), lr=0.3)
        >>> for _ in range(20):
        ...     loss = -layer(image, probabilities)[0].log().mean()  # all three are label 0
        ...     optimiser.zero_grad()
        ...     loss.backward()
        ...     optimiser.step()
        >>> layer(image, probabilities).argmax(dim=0)
        tensor([[0, 0, 0]])
        >>> bool((layer.weights > 0.1).all())
        True
    """

    def __init__(self, config: CRFConfig = CRFConfig(), method: str = "auto") -> None:
        super().__init__()
        weights = torch.tensor([config.gaussian_weight, config.bilateral_weight])
        if not (weights > 0).all():
            raise ValueError(f"weights must be positive to be learned, got {weights.tolist()}")
        self.start, self.method = config, method
        self.log_weights = nn.Parameter(weights.log())

    @property
    def weights(self) -> Tensor:
        """The Gaussian and the bilateral kernel's weight, float ``[2]``."""
        return self.log_weights.exp()

    @property
    def config(self) -> CRFConfig:
        """The setting with the weights of now, for :func:`~deconvnet.crf.dense_crf`."""
        gaussian, bilateral = self.weights.tolist()
        return replace(self.start, gaussian_weight=gaussian, bilateral_weight=bilateral)

    def forward(self, image: Tensor, probabilities: Tensor) -> Tensor:
        """Refine probabilities.

        Args:
            image: uint8 ``[3, H, W]``.
            probabilities: float ``[C, H, W]``, summing to 1 over ``C``.

        Returns:
            Probabilities ``[C, H, W]``, differentiable in those given and in the weights.
        """
        device, dtype = probabilities.device, probabilities.dtype
        with torch.autocast(device.type, enabled=False):  # as in dense_crf
            unary = unary_from_probabilities(probabilities, self.start.min_probability)
            kernels = pairwise_kernels(
                image.to(device), self.start, self.method, dtype, self.weights
            )
            return mean_field(unary, kernels, self.start.iterations)
