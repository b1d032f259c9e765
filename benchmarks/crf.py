"""How long the dense CRF takes, and pydensecrf, the C++ that is widely used, for the same labels.

    pip install "deconvnet[benchmark]"
    OMP_NUM_THREADS=2 python benchmarks/crf.py --json --out results/crf.json
    python benchmarks/crf.py --quality --out results/crf-quality.json
    OMP_NUM_THREADS=2 python benchmarks/crf.py --scaling --out results/crf-scaling.json

Both take turns, each in a process of its own, so that a machine which does other things slows both
of them down; the best of the rounds counts. A time is that of the whole call, from image and
probabilities to probabilities, lattice construction included. ``--quality`` measures instead how
near both come to exact sums on small crops, ``--scaling`` how time and memory grow; there each way
is on its own, the best of three calls, and ``kept`` is ours after
:func:`deconvnet.hardware.keep_memory`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.crf import (
    NORMALIZATIONS,
    CRFConfig,
    dense_crf,
    negligible_labels,
    pairwise_kernels,
    unary_from_probabilities,
)
from deconvnet.evaluation import provenance, record
from deconvnet.hardware import keep_memory

SETTINGS = {
    "(a) 3/3 + 20/3/5": CRFConfig(),
    "(b) 3/3 + 80/13/10": CRFConfig(
        bilateral_sigma=80.0, bilateral_sigma_rgb=13.0, bilateral_weight=10.0
    ),
}
IMAGES = ("astronaut", "coffee", "chelsea", "noise")
PRUNE_BELOW = 0.02
SPAWN = multiprocessing.get_context("spawn")
CROPS = [  # where several labels meet
    (slice(top, top + 64), slice(left, left + 64))
    for top, left in ((60, 60), (60, 300), (230, 180))
]


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quality", action="store_true", help="against exact sums, not the clock")
    part.add_argument("--scaling", action="store_true", help="by pixels, labels, lattice, images")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=IMAGES, help="on which")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), help="height and width")
    parser.add_argument("--labels", type=int, default=21, help="labels of the unaries")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    options = parser.parse_args()

    if options.quality:
        result = quality()
    elif options.scaling:
        result = {"scaling": scaling()}
    else:
        result = speed(options.images, options.size, options.labels, options.rounds)
    result |= {"threads": torch.get_num_threads(), "load_average": os.getloadavg(), **provenance()}
    if options.out:
        record(options.out, **result)
    if options.json:
        print(json.dumps(result))
        return
    for name, entries in result.items():
        if isinstance(entries, list) and isinstance(entries[0], dict):
            print(name)
            for entry in entries:
                print("  ".join(f"{key} {value}" for key, value in entry.items()))


def speed(images: Sequence[str], size: tuple[int, int], labels: int, rounds: int) -> dict:
    """Times of ours and theirs for each image and setting."""
    probabilities = network_like_probabilities(labels, *size)
    with ProcessPoolExecutor(1, mp_context=SPAWN) as theirs:
        settings = [
            {"setting": setting, "image": name}
            | compare(name, probabilities, config, rounds, theirs)
            for name in images
            for setting, config in SETTINGS.items()
        ]
    return {
        "size": list(size),
        "labels": labels,
        "iterations": CRFConfig().iterations,
        "mean_confidence": float(probabilities.amax(dim=0).mean()),
        "prune_below": PRUNE_BELOW,
        "settings": settings,
    }


def timed(refine: Callable[..., Tensor], *arguments: object) -> tuple[float, np.ndarray]:
    """Seconds that a refinement took, and its labels."""
    start = time.perf_counter()
    refined = refine(*arguments)
    return time.perf_counter() - start, refined.argmax(dim=0).numpy()


def timed_there(image: str, shape: Sequence[int], config: CRFConfig) -> tuple[float, np.ndarray]:
    """The same of pydensecrf, in a process that makes its input itself.

    Tensors from process to process are copied by a thread of the sender's, in parallel. Then
    there are more of OpenMP's threads than cores, and all of them sleep at once where they
    otherwise wait a moment for more to do: ours would take a third longer.
    """
    labels, *size = shape
    return timed(
        pydensecrf, photograph(image, *size), network_like_probabilities(labels, *size), config
    )


def compare(
    image_name: str, probabilities: Tensor, config: CRFConfig, rounds: int, theirs: Executor
) -> dict:
    """Times of ours, with all labels and with labels pruned, and of theirs, and how they agree."""
    image = photograph(image_name, *probabilities.shape[1:])
    pruned = replace(config, prune_below=PRUNE_BELOW)
    kernels = pairwise_kernels(image, config)
    left_out = negligible_labels(probabilities, kernels, PRUNE_BELOW)
    there = image_name, tuple(probabilities.shape), config
    ways: dict[str, Callable[[], tuple[float, np.ndarray]]] = {
        "pydensecrf": lambda: theirs.submit(timed_there, *there).result(),
        "ours": lambda: timed(dense_crf, image, probabilities, config),
        "ours_pruned": lambda: timed(dense_crf, image, probabilities, pruned),
    }
    if torch.cuda.is_available():
        on_gpu = image.cuda(), probabilities.cuda()
        ways["ours_gpu"] = lambda: timed(lambda: dense_crf(*on_gpu, config).cpu())
    seconds = dict.fromkeys(ways, math.inf)
    labels = {}
    for _ in range(rounds):
        for name, measure in ways.items():
            taken, labels[name] = measure()
            seconds[name] = min(seconds[name], taken)
    entry = {}
    for name in ways:
        entry[f"{name}_s"] = round(seconds[name], 4)
    for name in ways:
        if name != "pydensecrf":
            suffix = name.removeprefix("ours")
            entry[f"ratio{suffix}"] = round(seconds[name] / seconds["pydensecrf"], 3)
            same = (labels[name] == labels["pydensecrf"]).mean()
            entry[f"label_agreement{suffix}"] = round(float(same), 5)
    vertices = [k.filter.num_vertices for k in kernels if hasattr(k.filter, "num_vertices")]
    return entry | {"labels_pruned": int(left_out.sum()), "vertices": sum(vertices)}


def pydensecrf(image: Tensor, probabilities: Tensor, config: CRFConfig) -> Tensor:
    """The same field in pydensecrf, without the kernels whose weight is 0."""
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
    if config.gaussian_weight:
        field.addPairwiseGaussian(sxy=config.gaussian_sigma, compat=config.gaussian_weight, **kind)
    if config.bilateral_weight:
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


def quality() -> dict:
    """How near ours and theirs come to exact sums, and on whole photographs to each other.

    ``messages``: of one message of a single kernel, over all crops, the slope (least and greatest)
    and the relative error (mean) against exact sums. ``labels``: percentage of labels that are
    those of exact mean field, by crop; also of exact mean field with all weights raised by 1 %,
    which says how well determined the answer is. ``photographs``: percentage of labels that ours
    and pydensecrf's share, ours as the drop-in :mod:`deconvnet.densecrf` computes it.
    """
    size = 375, 500
    probabilities = network_like_probabilities(21, *size)
    images = {name: photograph(name, *size) for name in IMAGES if name != "noise"}
    crops = [
        (image[:, rows, columns].contiguous(), probabilities[:, rows, columns].contiguous())
        for image in images.values()
        for rows, columns in CROPS
    ]
    messages, labels, photographs = [], [], []
    for (setting, start), normalization in itertools.product(SETTINGS.items(), NORMALIZATIONS):
        config = replace(start, normalization=normalization)
        this = {"setting": setting, "normalization": normalization}
        for kernel in ("gaussian", "bilateral"):
            entry = this | {"kernel": kernel}
            for name, message in MESSAGES.items():
                found = [
                    against(message(*crop, config, kernel), exact_message(*crop, config, kernel))
                    for crop in crops
                ]
                slopes, errors = zip(*found)
                entry[f"{name}_slope"] = [round(min(slopes), 3), round(max(slopes), 3)]
                entry[f"{name}_error"] = round(sum(errors) / len(errors), 4)
            messages.append(entry)
        exact = [dense_crf(*crop, config, "exact").argmax(dim=0) for crop in crops]
        louder = replace(
            config,
            gaussian_weight=1.01 * config.gaussian_weight,
            bilateral_weight=1.01 * config.bilateral_weight,
        )
        answers = {
            "ours": lambda crop, config=config: dense_crf(*crop, config),
            "lattice": lambda crop, config=config: dense_crf(*crop, config, "lattice"),
            "pydensecrf": lambda crop, config=config: pydensecrf(*crop, config),
            "exact, 1 % louder": lambda crop, louder=louder: dense_crf(*crop, louder, "exact"),
        }
        agreement = {
            name: [same_labels(answer(crop), e) for crop, e in zip(crops, exact)]
            for name, answer in answers.items()
        }
        labels.append(this | agreement)
        method = "original" if normalization == "none" else "auto"  # as deconvnet.densecrf does
        for name, image in images.items():
            theirs = pydensecrf(image, probabilities, config).argmax(dim=0)
            ours = dense_crf(image, probabilities, config, method)
            photographs.append(this | {"image": name, "agreement": same_labels(ours, theirs)})
    return {
        "size": list(size),
        "crops": [[r.start, r.stop, c.start, c.stop] for r, c in CROPS],
        "messages": messages,
        "labels": labels,
        "photographs": photographs,
    }


def same_labels(beliefs: Tensor, labels: Tensor) -> float:
    """Percentage of pixels whose most probable label is the one given."""
    return round(100 * float((beliefs.argmax(dim=0) == labels).double().mean()), 2)


def against(message: Tensor, exact: Tensor) -> tuple[float, float]:
    """Slope and relative error of a message."""
    message, exact = message.double(), exact.double()
    slope = (message * exact).sum() / exact.square().sum()
    return float(slope), float((message - exact).norm() / exact.norm())


def one_kernel(config: CRFConfig, kernel: str, weight: float = 1.0) -> CRFConfig:
    """The same, with one kernel only."""
    other = {"gaussian": "bilateral", "bilateral": "gaussian"}[kernel]
    return replace(config, **{f"{kernel}_weight": weight, f"{other}_weight": 0.0})


def our_message(
    image: Tensor, probabilities: Tensor, config: CRFConfig, kernel: str, method: str = "lattice"
) -> Tensor:
    """What every pixel hears through one kernel: ``[H * W, C]``."""
    (built,) = pairwise_kernels(image, one_kernel(config, kernel), method)
    return built.message(probabilities.flatten(1).T.contiguous())


def exact_message(image: Tensor, probabilities: Tensor, config: CRFConfig, kernel: str) -> Tensor:
    """The same with exact sums."""
    return our_message(image, probabilities, config, kernel, "exact")


def their_message(image: Tensor, probabilities: Tensor, config: CRFConfig, kernel: str) -> Tensor:
    """The same from pydensecrf, read from one update.

    The logarithm of its beliefs is unary and message up to a number for each pixel. An extra
    label of almost no probability gets no message: what it has is that number. The weight is low
    enough for it not to vanish.
    """
    weight = 0.005 if config.normalization == "none" else 1.0
    nobody = torch.full_like(probabilities[:1], 1e-9)
    voices = torch.cat([probabilities * (1 - 1e-9), nobody])
    once = replace(one_kernel(config, kernel, weight), iterations=1, min_probability=1e-12)
    logarithm = pydensecrf(image, voices, once).double().log()
    heard = logarithm + unary_from_probabilities(voices, once.min_probability).double()
    return (heard - heard[-1])[:-1].flatten(1).T / weight


MESSAGES = {"ours": our_message, "pydensecrf": their_message}


def scaling() -> list[dict]:
    """Time and memory by pixels, labels, lattice points, images."""
    sizes = (64, 64), (188, 250), (375, 500), (720, 1280)
    cases = [("astronaut", size, 21, 1) for size in sizes]
    cases += [("astronaut", (375, 500), labels, 1) for labels in (2, 5, 60)]
    cases += [("noise", size, 21, 1) for size in sizes[2:]]
    cases += [("astronaut", (375, 500), 21, 8)]
    found = []
    for (image, size, labels, images), setting in itertools.product(cases, SETTINGS):
        case = {"image": image, "setting": setting, "size": list(size), "labels": labels}
        case["images"] = images
        ways = {"ours": "{}", "ours_kept": "{}_kept"}
        if (image, labels, images) == ("astronaut", 21, 1):
            ways["pydensecrf"] = "pydensecrf_{}"
        pixels = photograph(image, *size)
        lattice = pairwise_kernels(pixels, SETTINGS[setting], "lattice")[-1].filter
        found.append(case | {"vertices": lattice.num_vertices})
        for way, key in ways.items():
            with ProcessPoolExecutor(1, mp_context=SPAWN) as alone:
                measured = alone.submit(one_case, **case, way=way).result()
            found[-1] |= {key.format(name): value for name, value in measured.items()}
    return found


def one_case(
    image: str, setting: str, size: Sequence[int], labels: int, images: int, way: str = "ours"
) -> dict:
    """The time of a call for each of some images, and how it raises the process's peak memory."""
    from network import forget_peak, peak_mebibytes  # tests load this file without its folder

    cpu = torch.device("cpu")
    pixels = photograph(image, *size)
    probabilities = network_like_probabilities(labels, *size)
    refine = pydensecrf if way == "pydensecrf" else dense_crf
    forget_peak()  # that of making the probabilities may lie higher
    before = peak_mebibytes(cpu)
    seconds = math.inf
    if way == "ours_kept":
        keep_memory()
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(images):
            refine(pixels, probabilities, SETTINGS[setting])
        seconds = min(seconds, time.perf_counter() - start)
    return {"seconds": round(seconds, 3), "mebibytes": peak_mebibytes(cpu) - before}


if __name__ == "__main__":
    main()
