"""Classification first: what stands in for ImageNet where no ImageNet weights exist.

The paper's encoder comes from VGG-16, trained to name what a picture shows. A decoder on top of
an encoder that knows nothing learns figure against ground first, and stays there for long: the
class has to squeeze through a single vector that as yet means nothing. So the networks of the
embedded data set start like the paper's, from an encoder (with fc6 and fc7) that was trained to
name the object in the centre of a crop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from deconvnet.instances import CropDataset
from deconvnet.model import DeconvNet


class CropClassifier(nn.Module):
    """The half of a DeconvNet up to fc7, and a class score for the whole crop.

    Args:
        network: Its encoder, fc6 and fc7 are shared, so training this trains them.
    """

    def __init__(self, network: DeconvNet) -> None:
        super().__init__()
        self.config = network.config
        self.normalise, self.encoder = network.normalise, network.encoder
        self.fc6, self.fc7 = network.fc6, network.fc7
        self.classify = nn.Conv2d(network.config.fc_width, network.config.num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores ``[N, num_classes, 1, 1]`` for crops ``uint8 [N, 3, S, S]``."""
        pooled, _ = self.encoder(self.normalise(images))
        return self.classify(self.fc7(self.fc6(pooled[-1])))


class ClassifiedCrops(Dataset):
    """Crops whose label map is a single pixel: the class of the object that was cut out.

    That makes a classifier one more network for :func:`deconvnet.training.train`.

    Args:
        crops: For example :class:`deconvnet.instances.Stage1Dataset`.
    """

    def __init__(self, crops: CropDataset) -> None:
        self.crops, self.dataset = crops, crops.dataset
        self.example_labels = crops.example_labels

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns ``(image uint8 [3, S, S], label uint8 [1, 1])``."""
        image, _ = self.crops[key]
        label = self.example_labels[key[0] if isinstance(key, tuple) else key]
        return image, torch.full((1, 1), int(label), dtype=torch.uint8)
