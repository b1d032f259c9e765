"""Deep supervision: in training, every size of the decoder has a loss, not only the last.

DeconvNet's gradient has a long way: from the pixels down fifteen layers to the single vector that
knows the class. Small classifiers on the way give each layer a loss of its own, close by. They
are thrown away after training; the network and its inference stay as they are.

A departure from the paper, which reaches the depth with batch norm and a week of training.
Source of the idea: Lee, Xie, Gallagher, Zhang, Tu, *Deeply-Supervised Nets*, AISTATS 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deconvnet.model import DeconvNet


class DeeplySupervised(nn.Module):
    """A DeconvNet with a classifier at each of its intermediate sizes.

    Args:
        network: Trained in place; its own parameters are shared.
    """

    def __init__(self, network: DeconvNet) -> None:
        super().__init__()
        self.config, self.network = network.config, network
        # What the decoder's blocks hand on: from one value a crop up to half the crop's side.
        self.sources = [network.fc7, network.fc6_deconv, *network.decoder.blocks[:-1]]
        # The last layer of a stage ends in (deconvolution, [batch norm,] ReLU).
        widths = [network.config.fc_width, network.config.widths[-1]]
        widths += [block[-1][0].out_channels for block in network.decoder.blocks[:-1]]
        self.heads = nn.ModuleList(nn.Conv2d(w, network.config.num_classes, 1) for w in widths)

    @property
    def encoder(self) -> nn.Module:
        """The network's, whose blocks may be frozen and learn at a rate of their own."""
        return self.network.encoder

    @property
    def decoder(self) -> nn.Module:
        """The network's."""
        return self.network.decoder

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Returns the network's scores; in training a list, with the heads' scores after them.

        Args:
            images: Crops ``uint8 [N, 3, S, S]``.

        Returns:
            ``[N, num_classes, S, S]``; the heads' maps are of sides 1, S/32, S/16, ... S/2.
        """
        if not self.training:
            return self.network(images)
        found: list[Tensor] = []
        hooks = [
            source.register_forward_hook(lambda module, inputs, output: found.append(output))
            for source in self.sources
        ]
        try:
            scores = self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [scores, *(head(features) for head, features in zip(self.heads, found))]


def coarse_labels(labels: Tensor, side: int) -> Tensor:
    """The target of a smaller map: the labels at its cells' centres.

    Args:
        labels: ``[N, S, S]``.
        side: Of the smaller map, at most S.

    Returns:
        ``[N, side, side]``.
    """
    centres = (2 * torch.arange(side, device=labels.device) + 1) * labels.shape[-1] // (2 * side)
    return labels[:, centres][:, :, centres]
