"""The dense CRF over an image in pydensecrf's words: for most users a change of imports.

::

    import deconvnet.densecrf as dcrf  # was: import pydensecrf.densecrf as dcrf
    from deconvnet.densecrf import unary_from_softmax  # was: from pydensecrf.utils import …

    field = dcrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(unary_from_softmax(probabilities))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    label_map = np.argmax(field.inference(5), axis=0).reshape(height, width)

Normalised kernels, the default, are computed as everywhere in this package: exactly up to
``MAX_EXACT_PIXELS``, and nearer to exact sums than pydensecrf's beyond. Without normalisation,
pydensecrf's sums come out at about 0.88 (Gaussian) and half (bilateral) of exact ones. There a
``compat`` that was tuned with it needs the same sums, so ``NO_NORMALIZATION`` computes those, in
the same precision and order.

Widths may be given as in pydensecrf's own examples, ``sxy=(80, 80)``, if they are equal. What is
absent: unequal ones, compatibilities other than Potts, ``DenseCRF`` on anything but an image, and
inference step by step (:func:`deconvnet.crf.mean_field` calls back after every update).

Source of the names: https://github.com/lucasb-eyer/pydensecrf. In new code,
:func:`deconvnet.crf.dense_crf` says the same in one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from deconvnet.crf import CRFConfig, PairwiseKernel, mean_field, pairwise_kernels

NO_NORMALIZATION = "none"
NORMALIZE_BEFORE = "before"
NORMALIZE_AFTER = "after"
NORMALIZE_SYMMETRIC = "symmetric"
# What the C++ could learn of a kernel; inference is the same for all three.
CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = "const", "diag", "full"


def unary_from_softmax(
    sm: np.ndarray, scale: float | None = None, clip: float | None = 1e-5
) -> np.ndarray:
    """Unary energies of a network's probabilities.

    Args:
        sm: float ``[C, H, W]`` or ``[C, N]``, probabilities.
        scale: weight of the probabilities, in (0, 1], in a mixture with equal ones.
        clip: floor under the probabilities.

    Returns:
        float32 ``[C, H * W]``, the negative logarithm.
    """
    sm = np.asarray(sm)
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"scale must be in (0, 1], got {scale}")
        sm = scale * sm + (1 - scale) / len(sm)
    if clip is not None:
        sm = np.clip(sm, clip, 1)
    return -np.log(sm).reshape(len(sm), -1).astype(np.float32)


def unary_from_labels(
    labels: np.ndarray, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> np.ndarray:
    """Unary energies of a label map that is right with a given probability.

    Args:
        labels: integer ``[H, W]`` or ``[N]``.
        n_labels: number ``C`` of labels.
        gt_prob: probability of the given label, in (0, 1); the others share the rest.
        zero_unsure: whether 0 means "no idea", and labels count from 1 to ``C``.

    Returns:
        float32 ``[C, H * W]``.
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob must be in (0, 1), got {gt_prob}")
    labels = np.asarray(labels).ravel()
    chosen = np.arange(n_labels)[:, None] == labels - (1 if zero_unsure else 0)
    energy = np.where(chosen, -np.log(gt_prob), -np.log((1 - gt_prob) / (n_labels - 1)))
    if zero_unsure:
        energy[:, labels == 0] = np.log(n_labels)
    return energy.astype(np.float32)


class DenseCRF2D:
    """A dense CRF over an image, put together piece by piece.

    Args:
        width: pixels.
        height: pixels.
        labels: number ``C`` of labels.
        device: where to compute, such as ``"cuda"``.
    """

    def __init__(
        self, width: int, height: int, labels: int, device: torch.device | str = "cpu"
    ) -> None:
        self.shape = labels, height, width
        self.device = torch.device(device)
        self._unary: torch.Tensor | None = None
        self._kernels: list[PairwiseKernel] = []

    def setUnaryEnergy(self, unary: np.ndarray) -> None:
        """Say what each pixel thinks on its own.

        Args:
            unary: float ``[C, H * W]``, energies: negative logarithms of probabilities.
        """
        labels, height, width = self.shape
        if np.shape(unary) != (labels, height * width):
            raise ValueError(
                f"unary must be [{labels}, {height * width}], got {list(np.shape(unary))}"
            )
        energies = torch.as_tensor(np.asarray(unary, dtype=np.float32))
        self._unary = energies.view(self.shape).to(self.device)

    def addPairwiseGaussian(
        self,
        sxy: float,
        compat: float,
        kernel: str = DIAG_KERNEL,
        normalization: str = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Let pixels hear their neighbours.

        Args:
            sxy: standard deviation in pixels.
            compat: weight of the kernel, in a Potts model.
            kernel: without effect on inference.
            normalization: see :class:`~deconvnet.crf.PairwiseKernel`.
        """
        anything = torch.zeros(3, *self.shape[1:], dtype=torch.uint8)
        weights = {"gaussian_weight": _potts(compat), "bilateral_weight": 0}
        self._add(anything, gaussian_sigma=_number("sxy", sxy), normalization=normalization,
                  **weights)  # fmt: skip

    def addPairwiseBilateral(
        self,
        sxy: float,
        srgb: float,
        rgbim: np.ndarray,
        compat: float,
        kernel: str = DIAG_KERNEL,
        normalization: str = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Let pixels hear those that are fairly near and look alike.

        Args:
            sxy: standard deviation of positions, in pixels.
            srgb: standard deviation of colours, in grey levels.
            rgbim: uint8 ``[H, W, 3]``.
            compat: weight of the kernel, in a Potts model.
            kernel: without effect on inference.
            normalization: see :class:`~deconvnet.crf.PairwiseKernel`.
        """
        if np.shape(rgbim) != (*self.shape[1:], 3):
            expected = [*self.shape[1:], 3]
            raise ValueError(f"rgbim must be {expected}, got {list(np.shape(rgbim))}")
        image = torch.from_numpy(np.array(rgbim)).permute(2, 0, 1)
        weights = {"gaussian_weight": 0, "bilateral_weight": _potts(compat)}
        self._add(image, bilateral_sigma=_number("sxy", sxy), normalization=normalization,
                  bilateral_sigma_rgb=_number("srgb", srgb), **weights)  # fmt: skip

    def inference(self, iterations: int) -> np.ndarray:
        """Run mean field.

        Args:
            iterations: number of updates.

        Returns:
            float32 ``[C, H * W]``, probabilities.
        """
        if self._unary is None:
            raise RuntimeError("call setUnaryEnergy before inference")
        return mean_field(self._unary, self._kernels, iterations).flatten(1).cpu().numpy()

    def _add(self, image: torch.Tensor, **settings: float | str) -> None:
        method = "original" if settings["normalization"] == NO_NORMALIZATION else "auto"
        self._kernels += pairwise_kernels(image.to(self.device), CRFConfig(**settings), method)


def _potts(compat: float) -> float:
    # In pydensecrf a sequence is no Potts model but a diagonal of the other sign, and a matrix may
    # be anything: refused even where all entries are equal.
    if np.ndim(compat):
        raise TypeError(
            f"compat must be one number here, the weight of a Potts model, got {compat!r}"
        )
    return float(compat)


def _number(name: str, value: float | Sequence[float]) -> float:
    if np.ndim(value) == 1 and len(set(value)) == 1:
        return float(value[0])
    if np.ndim(value):
        raise TypeError(f"{name} must be one number here, or equal ones, got {value!r}")
    return float(value)
