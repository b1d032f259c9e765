"""How long the network takes: a plain port, the book's network, and the network made ready for use.

    python benchmarks/network.py --json

All have the same weights and see the same crops. They take turns in one process, so that a machine
which does other things slows all of them down; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deconvnet.deployment import prepare_for_inference
from deconvnet.evaluation import provenance
from deconvnet.files import atomic_write
from deconvnet.hardware import autocast, choose_precision, default_device
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.shapes import make_scene


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
    parser.add_argument("--batch", type=int, default=10, help="crops at once")
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts")
    parser.add_argument("--recipe", choices=("full", "tiny"), default="full", help="which network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", help="also write it to this file")
    options = parser.parse_args()

    device = default_device()
    best_dtype = choose_precision("auto", device)
    config = ModelConfig() if options.recipe == "full" else ModelConfig.tiny()
    model = untrained_but_lively(DeconvNet(config)).to(device).eval()
    crops = natural_crops(options.crops, config.input_size).to(device)

    half = best_dtype != torch.float32
    steps: dict[str, Callable[[Tensor], Tensor]] = {"plain port": PlainPort(model)}
    # the book's network shares its weights with the plain port, but has them channels-last
    book = DeconvNet(config)
    book.load_state_dict(model.state_dict())
    steps["the book's network"] = book.to(device, memory_format=torch.channels_last).eval()
    steps["folded and turned"] = prepare_for_inference(model)
    if half:
        steps["in 16 bits (autocast)"] = with_autocast(book, device, best_dtype)
        steps["folded, turned, in 16 bits"] = prepare_for_inference(model, best_dtype)

    with torch.inference_mode():  # the first call also warms up
        scores = {name: step(crops[: options.batch]).float() for name, step in steps.items()}
    seconds: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, network in steps.items():
            taken = timed(network, crops, options.batch)
            seconds[name] = min(taken, seconds.get(name, taken))

    baseline, reference = seconds["plain port"], scores["plain port"]
    exact = scores["folded and turned"]
    fastest = min(seconds, key=seconds.get)
    result = {
        "network": options.recipe,
        "crops": options.crops,
        "batch": options.batch,
        "dtype": str(best_dtype).removeprefix("torch."),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratio_fp32": round(baseline / seconds["folded and turned"], 2),
        "ratio_best": round(baseline / seconds[fastest], 2),
        "best": fastest,
        "relative_error_fp32": float((exact - reference).abs().max() / reference.abs().max()),
        "label_agreement": {
            name: float((scores[name].argmax(1) == reference.argmax(1)).double().mean())
            for name in steps
        },
        **provenance(),
    }
    if options.out:
        with atomic_write(options.out) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result))
        return
    for name, value in seconds.items():
        print(f"{name:28} {value:7.2f} s   {baseline / value:5.2f} times the plain port's speed")


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


def with_autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable:
    """The network as :class:`deconvnet.inference.Predictor` runs it in 16 bits."""

    def call(crops: Tensor) -> Tensor:
        with autocast(device, dtype):
            return model(crops)

    return call


def timed(network: Callable[[Tensor], Tensor], crops: Tensor, batch: int) -> float:
    """Seconds that the network takes for all crops."""
    start = time.perf_counter()
    with torch.inference_mode():
        for part in crops.split(batch):
            network(part)
    if crops.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
