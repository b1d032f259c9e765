"""How long the dense CRF takes, and pydensecrf, the C++ that everyone uses, for the same labels.

    pip install "deconvnet[benchmark]"
    OMP_NUM_THREADS=2 python benchmarks/crf.py --json

Both take turns in one process, so that a machine which does other things slows both of them down;
the best of the rounds counts. A time is that of the whole call, from image and probabilities to
probabilities, lattice construction included. ``--scaling`` measures how our time and memory grow.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.crf import (
    CRFConfig,
    dense_crf,
    negligible_labels,
    pairwise_kernels,
    unary_from_probabilities,
)
from deconvnet.evaluation import provenance
from deconvnet.files import atomic_write

SETTINGS = {
    "(a) 3/3 + 20/3/5": CRFConfig(),
    "(b) 3/3 + 80/13/10": CRFConfig(
        bilateral_sigma=80.0, bilateral_sigma_rgb=13.0, bilateral_weight=10.0
    ),
}
IMAGES = ("astronaut", "coffee", "chelsea", "noise")
PRUNE_BELOW = 0.02


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=IMAGES, help="on which")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), help="height and width")
    parser.add_argument("--labels", type=int, default=21, help="labels of the unaries")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--scaling", action="store_true", help="also other sizes, label counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    options = parser.parse_args()

    height, width = options.size
    unary = network_like_probabilities(options.labels, height, width)
    entries = []
    for name in options.images:
        image = photograph(name, height, width)
        for setting, config in SETTINGS.items():
            entry = {"setting": setting, "image": name}
            entry |= compare(image, unary, config, options.rounds)
            entries.append(entry)
            if not options.json:
                print("  ".join(f"{key} {value}" for key, value in entry.items()))
    result = {
        "size": [height, width],
        "labels": options.labels,
        "iterations": CRFConfig().iterations,
        "mean_confidence": float(unary.amax(dim=0).mean()),
        "prune_below": PRUNE_BELOW,
        "settings": entries,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        **provenance(),
    }
    if options.scaling:
        result["scaling"] = scaling()
    if options.out:
        with atomic_write(options.out) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
    elif options.scaling:
        print("\n".join(map(str, result["scaling"])))


def compare(image: Tensor, probabilities: Tensor, config: CRFConfig, rounds: int) -> dict:
    """Times of ours, with all labels and with labels pruned, and of theirs, and how they agree."""
    pruned = replace(config, prune_below=PRUNE_BELOW)
    kernels = pairwise_kernels(image, config)
    left_out = negligible_labels(probabilities, kernels, PRUNE_BELOW)
    ways: dict[str, Callable[[], Tensor]] = {
        "pydensecrf": lambda: pydensecrf(image, probabilities, config),
        "ours": lambda: dense_crf(image, probabilities, config),
        "ours_pruned": lambda: dense_crf(image, probabilities, pruned),
    }
    if torch.cuda.is_available():
        there = image.cuda(), probabilities.cuda()
        ways["ours_gpu"] = lambda: dense_crf(*there, config).cpu()
    seconds = dict.fromkeys(ways, math.inf)
    labels = {}
    for _ in range(rounds):
        for name, refine in ways.items():
            start = time.perf_counter()
            refined = refine()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
            labels[name] = refined.argmax(dim=0)
    entry = {}
    for name in ways:
        entry[f"{name}_s"] = round(seconds[name], 4)
    for name in ways:
        if name != "pydensecrf":
            suffix = name.removeprefix("ours")
            entry[f"ratio{suffix}"] = round(seconds[name] / seconds["pydensecrf"], 3)
            same = (labels[name] == labels["pydensecrf"]).double().mean()
            entry[f"label_agreement{suffix}"] = round(float(same), 5)
    vertices = [k.filter.num_vertices for k in kernels if hasattr(k.filter, "num_vertices")]
    return entry | {"labels_pruned": int(left_out.sum()), "vertices": sum(vertices)}


def pydensecrf(image: Tensor, probabilities: Tensor, config: CRFConfig) -> Tensor:
    """The same field in pydensecrf."""
    from pydensecrf import densecrf

    labels, height, width = probabilities.shape
    field = densecrf.DenseCRF2D(width, height, labels)
    unary = unary_from_probabilities(probabilities, config.min_probability)
    field.setUnaryEnergy(unary.flatten(1).numpy())
    kind = {
        "kernel": densecrf.DIAG_KERNEL,
        "normalization": {
            "none": densecrf.NO_NORMALIZATION,
            "before": densecrf.NORMALIZE_BEFORE,
            "after": densecrf.NORMALIZE_AFTER,
            "symmetric": densecrf.NORMALIZE_SYMMETRIC,
        }[config.normalization],
    }
    field.addPairwiseGaussian(sxy=config.gaussian_sigma, compat=config.gaussian_weight, **kind)
    field.addPairwiseBilateral(
        sxy=config.bilateral_sigma,
        srgb=config.bilateral_sigma_rgb,
        rgbim=image.permute(1, 2, 0).contiguous().numpy(),
        compat=config.bilateral_weight,
        **kind,
    )
    return torch.from_numpy(np.array(field.inference(config.iterations))).view_as(probabilities)


def photograph(name: str, height: int, width: int) -> Tensor:
    """One of scikit-image's photographs at this size, or noise: uint8 ``[3, H, W]``."""
    if name == "noise":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    from skimage import data

    pixels = torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)
    resized = F.interpolate(pixels[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0].round().byte()


def network_like_probabilities(labels: int, height: int, width: int, present: int = 5) -> Tensor:
    """What a network might say that is sure of its regions and unsure of their borders.

    A label map of a few smooth regions, blurred by two boxes of 21 pixels, times 20, plus smooth
    noise of half a unit: scores. Their softmax is, on average, 97 % sure.

    Args:
        labels: number of labels.
        height: pixels.
        width: pixels.
        present: how many of the labels win somewhere.

    Returns:
        float32 ``[labels, H, W]``.
    """
    generator = torch.Generator().manual_seed(0)
    present = min(present, labels)

    def smooth_noise(count: int, cell: int) -> Tensor:
        grid = torch.randn(1, count, height // cell + 2, width // cell + 2, generator=generator)
        return F.interpolate(grid, (height, width), mode="bicubic")[0]

    regions = smooth_noise(present, 60).argmax(dim=0)
    scores = F.one_hot(regions, labels).permute(2, 0, 1).float()[None]
    for _ in range(2):
        scores = F.avg_pool2d(scores, 21, 1, 10, count_include_pad=False)
    return (20 * scores[0] + 0.5 * smooth_noise(labels, 8)).softmax(dim=0)


def scaling() -> list[dict]:
    """Time and memory by pixels, labels and lattice points, each case in a process of its own."""
    cases = [
        (image, size, labels, setting)
        for image in ("astronaut", "noise")
        for size, labels in (
            ((188, 250), 21), ((375, 500), 2), ((375, 500), 5), ((375, 500), 21), ((375, 500), 60),
            ((720, 1280), 21),
        )
        for setting in SETTINGS
    ]  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    found = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found.append(pool.submit(one_case, *case).result())
    return found


def one_case(image: str, size: tuple[int, int], labels: int, setting: str) -> dict:
    """One call's time, and by how much it raises the process's peak memory."""
    pixels = photograph(image, *size)
    probabilities = network_like_probabilities(labels, *size)
    config = SETTINGS[setting]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        dense_crf(pixels, probabilities, config)
        seconds = min(seconds, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    bilateral = pairwise_kernels(pixels, config, "lattice")[-1].filter
    return {
        "image": image,
        "setting": setting,
        "size": list(size),
        "labels": labels,
        "vertices": bilateral.num_vertices,
        "seconds": round(seconds, 3),
        "mebibytes": round(peak / 1024),
    }


if __name__ == "__main__":
    main()
