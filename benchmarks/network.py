"""How long the network takes: a plain port, the book's network, and the network made ready for use.

    python benchmarks/network.py --json
    python benchmarks/network.py --weights runs/full-stage2/weights.safetensors \
        --data data/VOCdevkit/VOC2012

All have the same weights and see the same crops, each as many at once as suits it best. They take
turns in one process, so that a machine which does other things slows all of them down; the best of
the rounds counts. How many labels stay as they were is asked of networks that have learned: of the
tiny one, and of the full one where its weights and photographs for it are given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter as now

import torch
from torch import Tensor, nn

from deconvnet import recipes
from deconvnet.deployment import (
    ConvolutionOfAll,
    DeconvolutionToAll,
    ScoresByPlane,
    prepare_for_inference,
)
from deconvnet.evaluation import provenance, record
from deconvnet.folders import open_dataset
from deconvnet.hardware import autocast, choose_precision, compiled_kernels, default_device
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.shapes import make_scene
from deconvnet.weights import load_model, pretrained
from deconvnet.winograd import WinogradConvolution


class PlainPort(nn.Module):
    """The network as most ports write it, around PyTorch's own pooling and unpooling."""

    def __init__(self, model: DeconvNet) -> None:
        super().__init__()
        self.model = model
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, crops: Tensor) -> Tensor:
        """Scores of all pixels, as :meth:`deconvnet.model.DeconvNet.forward` gives them."""
        model, places = self.model, []
        x = (crops.float() - model.normalise.mean) / model.normalise.std
        for block in model.encoder.blocks:
            x, where = self.pool(block(x))
            places.append(where)
        x = model.fc6_deconv(model.fc7(model.fc6(x)))
        for block, where in zip(model.decoder.blocks, reversed(places)):
            x = block(self.unpool(x, where))
        return model.score(x)


def main() -> None:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=50, help="crops an image (the paper's 50)")
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 50], help="crops at once")
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts")
    parser.add_argument("--recipe", choices=("full", "tiny"), default="full", help="which network")
    parser.add_argument("--weights", type=Path, help="that it has learned; else random ones")
    parser.add_argument("--data", type=Path, help="validation images for --weights to label")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    options = parser.parse_args()
    if (options.weights is None) != (options.data is None):
        parser.error("--weights and --data belong together")

    torch.backends.cudnn.allow_tf32 = False  # a GPU's float32, too, is to have 24 bits
    device = default_device()
    best_dtype = choose_precision("auto", device)
    config = ModelConfig() if options.recipe == "full" else ModelConfig.tiny()
    crops = natural_crops(options.crops, config.input_size).to(device)
    if options.weights is None:
        model, judged = untrained_but_lively(DeconvNet(config)), crops[:10]
    else:
        model, judged = load_model(options.weights), photographed_crops(options.data, config)
    model = model.to(device).eval()

    # the book's network shares its weights with the plain port, but has them channels-last
    book = copy.deepcopy(model).to(memory_format=torch.channels_last)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "plain port": PlainPort(model),
        "channels-last, switches": book,
        "folded, turned": prepare_for_inference(model, rules=3),
    }
    if device.type == "cpu":
        steps["in parts"] = prepare_for_inference(model, rules=4)
        steps["fewer multiplications"] = prepare_for_inference(model, rules=5)
        if compiled_kernels() is not None:
            steps["compiled loops"] = prepare_for_inference(model)
    uniform = [list(steps)[-1]]  # those that compute in one number format throughout
    exact = fastest = uniform[0]
    steps["same switches"] = prepare_for_inference(model, same_switches=True)
    if best_dtype != torch.float32:
        fastest = "all, 16 bits"
        steps["16 bits, autocast only"] = with_autocast(book, device, best_dtype)
        steps[fastest] = prepare_for_inference(model, best_dtype)
        name, encoder_dtype = other_encoder(device, best_dtype)
        steps[f"all, {name}"] = prepare_for_inference(model, best_dtype, encoder_dtype)
        uniform.append(f"all, {name}" if device.type == "cpu" else fastest)

    with torch.inference_mode():  # warms up
        for step, batch in itertools.product(steps.values(), options.batch):
            step(crops[:batch])
    seconds: dict[str, float] = {}
    batches: dict[str, int] = {}
    for _ in range(options.rounds):
        for (name, network), batch in itertools.product(steps.items(), options.batch):
            taken = timed(network, crops, batch)
            if taken < seconds.get(name, math.inf):
                seconds[name], batches[name] = taken, batch

    layers = {name: parts_of(steps[name], crops[:10]) for name in uniform}
    trained = load_model(pretrained("shapes-deconvnet"), device).eval()
    accuracy = {
        "trained, tiny": accuracy_of(trained, natural_crops(2000, 64).to(device), best_dtype),
        f"{'trained' if options.weights else 'random'}, {options.recipe}": accuracy_of(
            model, judged.to(device), best_dtype
        ),
    }
    baseline = seconds["plain port"]
    learned = accuracy[f"trained, {options.recipe if options.weights else 'tiny'}"]
    result = {
        "network": options.recipe,
        "crops": options.crops,
        "batch": batches,
        "dtype": str(best_dtype).removeprefix("torch."),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio_fp32": round(baseline / seconds[exact], 2),
        "ratio_same_switches": round(baseline / seconds["same switches"], 2),
        "ratio_best": round(baseline / seconds[fastest], 2),
        "best": fastest,
        "label_agreement": {way: found["label_agreement"] for way, found in learned.items()},
        "accuracy": accuracy,
        "seconds_a_crop_by_part": layers,
        "gflop_a_crop": round(operations(config), 2),
        "peak_gflops": {
            str(dtype).removeprefix("torch."): round(peak(device, dtype), 1)
            for dtype in dict.fromkeys((torch.float32, best_dtype))
        },
        "copy_gigabytes_a_second": round(bandwidth(device), 1),
        **provenance(),
    }
    if options.out:
        record(options.out, **result)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in seconds.items():
        print(f"{name:28} {value:7.2f} s   {baseline / value:5.2f} times the plain port's speed")
    for weights, found in accuracy.items():
        for way, figures in found.items():
            print(f"{weights}, {way}: {figures}")


def other_encoder(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """The choice for the encoder that is not the default in 16 bits: its name and its dtype."""
    if device.type == "cpu":
        return "encoder in 16 bits too", dtype
    return "encoder in float32", torch.float32


@torch.inference_mode()
def accuracy_of(model: DeconvNet, crops: Tensor, best_dtype: torch.dtype) -> dict[str, dict]:
    """How far the prepared network's scores and labels are from the plain one's.

    Rounding moves a switch where two values of a window are nearly equal, and then a value lands
    one pixel away. ``same_switches`` says what is left when both use the plain network's.
    """
    short = str(best_dtype).removeprefix("torch.")
    ways = {
        "float32": prepare_for_inference(model),
        "float32, same switches": prepare_for_inference(model, same_switches=True),
    }
    if best_dtype != torch.float32:
        ways[short] = prepare_for_inference(model, best_dtype)
        name, encoder_dtype = other_encoder(crops.device, best_dtype)
        ways[f"{short}, {name}"] = prepare_for_inference(model, best_dtype, encoder_dtype)
    tallies = {way: (Difference(), Difference()) for way in ways}
    apart, values = Counter(), 0
    for part in crops.split(25):
        expected = model(part)
        _, switches = model.encoder(model.normalise(part))
        values += sum(s.numel() for s in switches)
        for way, fast in ways.items():
            pooled, places = fast.encoder(fast.normalise(part))
            drawn = fast.fc6_deconv(fast.fc7(fast.fc6(pooled[-1])))
            for tally, used in zip(tallies[way], (places, switches)):
                tally.add(fast.score(fast.decoder(drawn, used)).float(), expected)
            apart[way] += sum(int((a != b).sum()) for a, b in zip(switches, places))
    return {
        way: {
            **moved.figures(),
            "same_switches": same.figures(),
            "switches_moved": apart[way] / values,
        }
        for way, (moved, same) in tallies.items()
    }


class Difference:
    """How far scores are from the expected ones, batch after batch."""

    def __init__(self) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64)

    def add(self, scores: Tensor, expected: Tensor) -> None:
        """Counts in scores ``[N, C, H, W]`` of the same crops."""
        same = scores.argmax(1) == expected.argmax(1)
        found = [
            values.sum(dtype=torch.float64)
            for values in (same, (scores - expected).square(), expected, expected.square())
        ]
        counts = (same.numel(), expected.numel())
        self.sums += torch.tensor([*map(float, found), *counts], dtype=torch.float64)

    def figures(self) -> dict[str, float]:
        """Share of pixels with the same label, and the error by the scores' own spread."""
        same, squares, total, total_squares, pixels, values = self.sums.tolist()
        spread = math.sqrt(total_squares / values - (total / values) ** 2)
        return {
            "label_agreement": same / pixels,
            "relative_error": math.sqrt(squares / values) / spread,
        }


def parts_of(network: nn.Module, crops: Tensor) -> dict[str, float]:
    """Seconds a crop that each kind of layer takes, the best of three passes.

    Taken on one thread, whose calls can be told apart, and divided by the number of threads.
    """
    if crops.is_cuda:
        return {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = {
        nn.Conv2d: "direct convolutions",
        ScoresByPlane: "direct convolutions",
        WinogradConvolution: "Winograd's convolutions",
        ConvolutionOfAll: "fc layers",
        DeconvolutionToAll: "fc layers",
        nn.ReLU: "ReLU",
    }
    clock: dict[str, float] = {}
    hooks = []
    for layer in network.modules():
        kind = kinds.get(type(layer))
        if kind is not None:
            hooks.append(layer.register_forward_pre_hook(lambda *_: started.append(now())))
            hooks.append(
                layer.register_forward_hook(
                    lambda *_, kind=kind: spent.__setitem__(
                        kind, spent.get(kind, 0) + now() - started.pop()
                    )
                )
            )
    best = float("inf")
    for _ in range(3):
        started: list[float] = []
        spent: dict[str, float] = {}
        taken = timed(network, crops, len(crops))
        if taken < best:
            rest = taken - sum(spent.values())
            best, clock = taken, {**spent, "pooling, unpooling, rest": rest}
    for hook in hooks:
        hook.remove()
    torch.set_num_threads(threads)
    return {kind: round(value / len(crops) / threads, 5) for kind, value in clock.items()}


def operations(config: ModelConfig) -> float:
    """Multiplications and additions of one crop, directly counted, in units of 10^9."""
    total = 0
    with torch.device("meta"):
        model = DeconvNet(config).eval()

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        seen = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        total += 2 * layer.weight.numel() * seen[0, 0].numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(count)
    size = config.input_size
    model(torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta"))
    return total / 1e9


def peak(device: torch.device, dtype: torch.dtype, size: int = 256, crops: int = 16) -> float:
    """The hardware's peak as far as a program can reach it, in 10^9 operations a second.

    The better of a large matrix product and of a large convolution that fits the cache.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(crops, size, 28, 28, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    convolution = nn.Conv2d(size, size, 3, padding=1).to(device, dtype)
    convolution = convolution.to(memory_format=torch.channels_last).requires_grad_(False)
    found = []
    for work, count in (
        (lambda: a @ b, 2 * side**3),
        (lambda: convolution(x), 2 * 9 * size * size * 28 * 28 * crops),
    ):
        best = float("inf")
        with torch.inference_mode():
            for _ in range(8):
                start = now()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, now() - start)
        found.append(count / best / 1e9)
    return max(found)


def bandwidth(device: torch.device) -> float:
    """Gigabytes a second of a large copy, read and written ones counted."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = now()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, now() - start)
    return 2 * source.numel() * source.element_size() / best / 1e9


def untrained_but_lively(model: nn.Module) -> nn.Module:
    """Weights of a scale at which every layer's output depends on the image."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    return model


def natural_crops(count: int, size: int) -> Tensor:
    """Crops of the embedded scenes, resized: textures, edges and noise as photographs have."""
    scenes = [make_scene(seed=seed).image.float() for seed in range(count)]
    return torch.stack(
        [
            nn.functional.interpolate(scene[None], (size, size), mode="bilinear")[0].byte()
            for scene in scenes
        ]
    )


def photographed_crops(root: Path, config: ModelConfig, count: int = 200) -> Tensor:
    """Crops around objects of a data set's validation images, of as many images as there are."""
    recipe = recipes.tiny() if config == ModelConfig.tiny() else recipes.short()
    crops = recipes.stage_crops(recipe, "1", open_dataset(root, "val"), training=False)
    return recipes.calibration_crops(crops, count)


def with_autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable:
    """The network as :class:`deconvnet.inference.Predictor` runs it in 16 bits."""

    def call(crops: Tensor) -> Tensor:
        with autocast(device, dtype):
            return model(crops)

    return call


def timed(network: Callable[[Tensor], Tensor], crops: Tensor, batch: int) -> float:
    """Seconds that the network takes for all crops."""
    if crops.is_cuda:
        torch.cuda.synchronize()
    start = now()
    with torch.inference_mode():
        for part in crops.split(batch):
            network(part)
    if crops.is_cuda:
        torch.cuda.synchronize()
    return now() - start


def forget_peak() -> None:
    """Makes this process's peak begin anew at what it holds now, where the system allows it."""
    with contextlib.suppress(OSError):  # only Linux, and not every container
        Path("/proc/self/clear_refs").write_text("5")


def peak_mebibytes(device: torch.device) -> int:
    """The most memory that this process has had, or that a GPU has lent it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak would begin with the parent's
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return round(int(lines["VmHWM"].split()[0]) / 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


if __name__ == "__main__":
    main()
